"""Where arrays live: parameters on every device, a step's rows split over the mesh.

One axis, `data`, for now; rules over parameter paths for further axes belong in this file. Specs are spelled out
and pinned at the step's jit, because `P('data')` and `P('data', None)` would be two cache entries.
"""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from input_pipeline.errors import UserError


def make_mesh(rows: int) -> Mesh:
    """All devices on the axis `data`. rows: B, which they must divide. Raises UserError where they do not."""
    devices = jax.device_count()
    if rows % devices:
        raise UserError(
            f"packing.rows_per_step={rows} does not divide over {devices} devices. Set "
            f"--config.packing.rows_per_step={-(-rows // devices) * devices}."
        )
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """Arrays whose first axis is B."""
    return NamedSharding(mesh, PartitionSpec("data"))


def local_rows(mesh: Mesh, count: int) -> list[int]:
    """Which of a step's B rows this process addresses, ascending."""
    spans = rows(mesh).addressable_devices_indices_map((count,)).values()
    return sorted({r for (span,) in spans for r in range(*span.indices(count))})


def put(mesh: Mesh, batch: object, count: int) -> object:
    """A process's numpy rows as one global array a leaf, [B, ...]."""

    def leaf(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(rows(mesh), x, (count, *x.shape[1:]))

    return jax.tree.map(leaf, batch)
