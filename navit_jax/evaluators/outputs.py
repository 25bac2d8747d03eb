"""The pass that evaluators share: every image through the model exactly once, and what to say if it was not.

A step is dispatched before the one before it is read, so the device computes while the host scores.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from input_pipeline.errors import UserError
from input_pipeline.packed import Batch
from navit_jax import sharding

Forward = Callable[[Any, Any], tuple[Any, Any]]  # (params, batch) -> (logits_BKC, pooled_BKD)


class Rows(Protocol):
    """Evaluation rows ready to iterate: (batch, anything), whole steps, with empty rows at the end."""

    builder: Any  # its `sampler` has `indices`, the images that should come, and `sizes` of the source: 0 is unreadable
    bad: Mapping[int, str]  # images that turned out unusable on the way, with their reasons

    def __iter__(self) -> Iterator[tuple[Batch, Any]]: ...


def outputs(forward: Forward, params: Any, loader: Rows, put: Callable[[Batch], Any]) -> Iterator[tuple]:
    """(batch, logits_BKC, pooled_BKD) of every step, the latter two still on the device.

    Raises RuntimeError if an image comes twice, or does not come though nothing is known to be wrong with it.
    """
    seen, pending = set(), None
    for batch, _ in loader:
        here = batch.index[batch.index >= 0].tolist()
        twice = seen.intersection(here)
        if twice or len(set(here)) < len(here):
            raise RuntimeError(f"images {sorted(twice)[:5] or here[:5]} came twice: evaluation would count them twice")
        seen.update(here)
        done, pending = pending, (batch, *forward(params, put(batch)))
        if done:
            yield done
    if pending:
        yield pending
    sampler = loader.builder.sampler
    lost = set(sampler.indices.tolist()) - seen - set(loader.bad)
    lost = [i for i in lost if sampler.sizes[i].min() > 0]
    if lost:
        raise RuntimeError(f"{len(lost)} images never came, the first is {min(lost)}")


def putter(mesh: Mesh, rows: int) -> Callable[[Batch], Any]:
    """put(batch) -> global arrays; a process hands over its part of the B rows, which it built all of."""
    devices = mesh.devices.size
    if rows % devices:
        raise UserError(
            f"eval.rows_per_step={rows} does not divide over {devices} devices. Set --config.eval.rows_per_step="
            f"{-(-rows // devices) * devices}."
        )
    local = sharding.local_rows(mesh, rows)
    if len(local) == rows:
        return lambda batch: sharding.put(mesh, batch, rows)
    return lambda batch: sharding.put(mesh, jax.tree.map(lambda x: x[local], batch), rows)
