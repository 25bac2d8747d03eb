"""The pass that evaluators share: every image through the model exactly once, and what to say if it was not.

A step is dispatched before the one before it is read, so the device computes while the host scores. Who keeps what of
an image decides its memory: logits are judged as they come, vectors are kept (of 50,000 images and width 512: 100 MB)
because several scores are made of them, and a second pass would decode every image again.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from input_pipeline.errors import UserError
from input_pipeline.packed import Batch
from navit_jax import distributed, sharding

# (params, batch) -> (logits_BKC, or None where the objective has none, pooled_BKD)
Forward = Callable[[Any, Any], tuple[Any, Any]]
# (index [n], labels [n] or [n, C], logits [n, C] or vectors [n, D]) of a step -> what is kept, arrays [n, ...]
Keep = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, ...]]
LOGITS, VECTORS = 0, 1  # of what a forward pass gives


class Seen(NamedTuple):
    """Every usable image of a loader once, n of them, in the order of the source.

    wanted: the numbers in the source of all images that the loader should give. index: [n] int, those of these images.
    labels: [n] int (-1: none), or [n, C] bool for sets of classes. tokens: [n] int. kept: arrays [n, ...].
    images_per_s: of the whole pass, without its first step (which compiles) where there are more.
    """

    wanted: np.ndarray
    index: np.ndarray
    labels: np.ndarray
    tokens: np.ndarray
    kept: tuple[np.ndarray, ...]
    images_per_s: float

    @property
    def skipped(self) -> int:
        """Images that could not be used."""
        return len(self.wanted) - len(self.index)


class Rows(Protocol):
    """Evaluation rows ready to iterate: (batch, anything), whole steps, with empty rows at the end."""

    builder: Any  # its `sampler` has `indices`, the images that should come, and `sizes` of the source: 0 is unreadable
    bad: Mapping[int, str]  # images that turned out unusable on the way, with their reasons

    def __iter__(self) -> Iterator[tuple[Batch, Any]]: ...


def read(
    forward: Forward,
    params: Any,
    loader: Rows,
    put: Callable[[Batch], Any],
    keep: Keep,
    *,
    of: int,
    multi_label: bool = False,
) -> Seen:
    """Every image of the loader through the model once: forward(params, put(batch)).

    keep: sees the LOGITS or VECTORS, as `of` says, of a step's real slots. Raises RuntimeError if an image comes twice
    or is lost, UserError if no image could be used.
    """
    parts, times, counts = [], [time.perf_counter()], []
    for batch, *found in outputs(forward, params, loader, put):
        real_BK = batch.index >= 0
        index, labels = batch.index[real_BK], _labels(batch.labels[real_BK], multi_label)
        ids = batch.images.segment_ids[:, :, None] == np.arange(1, real_BK.shape[1] + 1)
        kept = keep(index, labels, np.asarray(found[of])[real_BK])
        parts.append((index, labels, ids.sum(1)[real_BK], *kept))
        times.append(time.perf_counter())
        counts.append(len(index))
    if not sum(counts):
        raise UserError("evaluation has no usable image: every one was refused; the log names them with their reasons.")
    fields = [np.concatenate(field) for field in zip(*parts, strict=True)]
    order = np.argsort(fields[0])
    index, labels, tokens, *kept = (field[order] for field in fields)
    start = int(len(counts) > 1)
    speed = sum(counts[start:]) / (times[-1] - times[start])
    return Seen(loader.builder.sampler.indices, index, labels, tokens, tuple(kept), speed)


def vectors(
    forward: Forward, params: Any, loader: Rows, put: Callable[[Batch], Any], *, multi_label: bool = False
) -> Seen:
    """`read` that keeps the vectors: kept is (z_NE float32,). Raises RuntimeError for ones that are not finite, too."""

    def keep(index: np.ndarray, labels: np.ndarray, z_NE: np.ndarray) -> tuple[np.ndarray]:
        z_NE = z_NE.astype(np.float32)
        bad = index[~np.isfinite(z_NE).all(1)]
        if len(bad):
            raise RuntimeError(f"the vectors of {len(bad)} images are not finite, the first is image {bad[0]}")
        return (z_NE,)

    return read(forward, params, loader, put, keep, of=VECTORS, multi_label=multi_label)


def outputs(forward: Forward, params: Any, loader: Rows, put: Callable[[Batch], Any]) -> Iterator[tuple]:
    """(batch, logits_BKC or None, pooled_BKD) of every step, of all processes' rows; the latter two on the device.

    Raises RuntimeError if an image comes twice, or does not come though nothing is known to be wrong with it.
    """
    seen, pending = set(), None
    for batch, _ in loader:
        on_device = put(batch)
        batch = sharding.everywhere(_said(batch), _said(on_device))
        here = batch.index[batch.index >= 0].tolist()
        twice = seen.intersection(here)
        if twice or len(set(here)) < len(here):
            raise RuntimeError(f"images {sorted(twice)[:5] or here[:5]} came twice: evaluation would count them twice")
        seen.update(here)
        done, pending = pending, (batch, *forward(params, on_device))
        if done:
            yield done
    if pending:
        yield pending
    sampler = loader.builder.sampler
    bad = np.zeros(len(sampler.sizes), bool)
    bad[list(loader.bad)] = True
    lost = set(sampler.indices.tolist()) - seen - set(np.flatnonzero(distributed.gather(bad).any(axis=0)).tolist())
    lost = [i for i in lost if sampler.sizes[i].min() > 0]
    if lost:
        raise RuntimeError(f"{len(lost)} images never came, the first is {min(lost)}")


def _said(batch: Batch) -> Batch:
    """What evaluators read of a batch; its pixels stay where they are."""
    return batch._replace(images=batch.images._replace(values=None, coords=None, grids=None))


def _labels(labels: np.ndarray, multi_label: bool) -> np.ndarray:
    """Labels of n images; single classes may come as one-hot rows, as mixup needs them in training."""
    if multi_label:
        return labels > 0
    return labels if labels.ndim == 1 else np.where(labels.any(-1), labels.argmax(-1), -1)
