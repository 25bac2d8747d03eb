"""The pass that evaluators share: every image through the model exactly once, and what to say if it was not.

A step is dispatched before the one before it is read, so the device computes while the host scores.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from input_pipeline import stream
from input_pipeline.errors import UserError
from input_pipeline.loader import Loader
from input_pipeline.packed import Batch
from navit_jax import sharding

Forward = Callable[[Any, Any], tuple[Any, Any]]  # (params, batch) -> (logits_BKC, pooled_BKD)


def outputs(forward: Forward, params: Any, loader: Loader, put: Callable[[Batch], Any]) -> Iterator[tuple]:
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


def eval_rows(config: ConfigDict) -> int:
    """B in evaluation."""
    return config.eval.rows_per_step or config.packing.rows_per_step


def same_shapes(config: ConfigDict, wanted: Sequence[tuple[stream.Images, int, np.ndarray | None]]) -> list[Loader]:
    """Evaluation rows for each (images, budget, indices), all with one L and one K, so the model compiles once."""
    config = config.copy_and_resolve_references()
    config.packing.row_length = max(config.packing.row_length, *(budget for _, budget, _ in wanted))
    loaders = [stream.eval_loader(config, images, budget, indices=indices) for images, budget, indices in wanted]
    slots = max(loader.builder.slots for loader in loaders)
    return [
        loader
        if loader.builder.slots == slots
        else stream.eval_loader(config, images, budget, indices=indices, slots=slots)
        for loader, (images, budget, indices) in zip(loaders, wanted, strict=True)
    ]
