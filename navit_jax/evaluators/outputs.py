"""The pass that evaluators share: every image through the model exactly once, and what to say if it was not.

A step is dispatched before the one before it is read, so the device computes while the host scores.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from input_pipeline.packed import Batch
from navit_jax import distributed, sharding

Forward = Callable[[Any, Any], tuple[Any, Any]]  # (params, batch) -> (logits_BKC, pooled_BKD)


class Rows(Protocol):
    """Evaluation rows ready to iterate: (batch, anything), whole steps, with empty rows at the end."""

    builder: Any  # its `sampler` has `indices`, the images that should come, and `sizes` of the source: 0 is unreadable
    bad: Mapping[int, str]  # images that turned out unusable on the way, with their reasons

    def __iter__(self) -> Iterator[tuple[Batch, Any]]: ...


def outputs(forward: Forward, params: Any, loader: Rows, put: Callable[[Batch], Any]) -> Iterator[tuple]:
    """(batch, logits_BKC, pooled_BKD) of every step, of all processes' rows; the latter two still on the device.

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
