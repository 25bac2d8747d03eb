"""Where arrays live: a mesh of three axes, and rules over parameter paths that say which dimension lies on which axis.

A step's rows are split over `data` x `fsdp`. `fsdp` splits every large parameter, its moments and its average, and XLA
gathers a layer's weights when the scan reaches it; `tensor` splits heads and MLP, as in Megatron (1909.08053). The
model knows nothing of this but one hook, `constrain`, which keeps the partitioner from splitting activations by what
it happens to find in the weights. Specs are spelled out and pinned at the step's jit, because `P('data')` and
`P('data', None)` would be two cache entries.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from input_pipeline.capacity import Capacity
from input_pipeline.errors import UserError
from navit_jax.optim import is_stacked, name_of

jax.tree_util.register_static(Capacity)  # rides in batches; here, as the half that plans rows does not know of jax
AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
# The first rule found in a path decides; stacked layers have one more axis in front, which is never split. What no
# rule names (norms, biases of D, position tables) is small and lies whole on every device.
RULES = (
    (r"/[qkv]/kernel$", ("fsdp", "tensor", None)),  # D, N, H
    (r"/[qkv]/bias$", ("tensor", None)),
    (r"/out/kernel$", ("tensor", None, "fsdp")),  # N, H, D
    (r"(mlp|merger)/(up|gate)/kernel$", ("fsdp", "tensor")),  # D, F
    (r"(mlp|merger)/(up|gate)/bias$", ("tensor",)),
    (r"(mlp|merger)/down/kernel$", ("tensor", "fsdp")),  # F, D
    (r"(^|/)embed/kernel$", (None, "fsdp")),  # P, D
    (r"(^|/)pool/probe$", (None, "fsdp")),  # 1, D
    (r"^head/kernel$", ("fsdp", None)),  # D, C
    (r"_projection/kernel$", ("fsdp", None)),  # D, E
    (r"^text/table$", (None, "fsdp")),  # V, D: a vocabulary is seldom divisible
)


def make_mesh(cfg: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config.mesh`, sizes of data, fsdp and tensor; one of them may be -1, what is left.

    cfg: all on `data` by default. devices: all of the run by default. Over several TPU slices, which a slower network
    joins, only `data` extends. Raises UserError where the sizes do not multiply to the number of devices, or do not
    suit processes or slices.
    """
    count = len(devices) if devices is not None else jax.device_count()
    sizes = [int(cfg[axis]) for axis in AXES] if cfg is not None else [-1, 1, 1]
    given = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes))
    fixed = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) > 1 or min(size for size in [*sizes, 1] if size != -1) < 1:
        raise UserError(f"{given}: expected 1 or more each, and at most one -1, which takes what is left.")
    if count % fixed or (-1 not in sizes and fixed != count):
        raise UserError(
            f"{given} need {'a multiple of ' * (-1 in sizes)}{fixed} devices; this run has {count}. Set mesh.data=-1 "
            f"and sizes whose product divides {count}."
        )
    data, fsdp, tensor = (count // fixed if size == -1 else size for size in sizes)
    here, types = jax.local_device_count(), (AxisType.Auto,) * 3
    if devices is None and jax.process_count() > 1 and tensor % here and here % tensor:
        raise UserError(
            f"mesh.tensor={tensor} would split the {here} devices of a process unevenly: set a divisor of {here}."
        )
    slices = len({getattr(device, "slice_index", 0) for device in (jax.devices() if devices is None else devices)})
    if slices == 1:
        return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=types, devices=devices)
    if data % slices:
        raise UserError(f"mesh.data={data} does not divide over {slices} slices: fsdp and tensor stay within a slice.")
    within = (data // slices, fsdp, tensor)
    over = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(over, AXES, axis_types=types)


def check_rows(mesh: Mesh, count: int, field: str = "packing.rows_per_step", parts: int = 1) -> None:
    """Raises UserError if `count` rows do not divide over the mesh, in `parts` equal parts of a step each."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"] * parts
    if count % ways:
        in_parts = f" in {parts} parts (optim.accumulate_steps or contrastive.cache_parts)" * (parts > 1)
        raise UserError(
            f"{field}={count} does not divide over {ways // parts} devices (mesh data x fsdp = {mesh.shape['data']} x "
            f"{mesh.shape['fsdp']}){in_parts}. Set --config.{field}={-(-count // ways) * ways}."
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Arrays that lie whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """Arrays whose first axis is B."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """A NamedSharding for each leaf of a training state {params, opt, step[, ema]} of arrays or shapes.

    Parameters by `RULES`; a leaf elsewhere whose path ends in a parameter's and whose shape is the same lies as that
    parameter does (Adafactor's factored moments are smaller, and replicated). Raises UserError where a mesh axis does
    not divide the dimension that a rule puts on it.
    """
    params = {name_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(state["params"])}
    specs = {name: _spec(mesh, name, shape) for name, shape in params.items()}

    def one(path: tuple, leaf: Any) -> NamedSharding:
        parts = name_of(path).split("/")
        owner = next((n for i in range(len(parts)) if (n := "/".join(parts[i:])) in params), None)
        same = owner is not None and params[owner] == leaf.shape
        return NamedSharding(mesh, specs[owner] if same else PartitionSpec())

    return jax.tree_util.tree_map_with_path(one, state)


def _spec(mesh: Mesh, name: str, shape: tuple[int, ...]) -> PartitionSpec:
    axes = next((axes for regex, axes in RULES if re.search(regex, name)), ())
    axes = (None, *axes) if axes and is_stacked(name) else axes
    axes = tuple(axis if axis and mesh.shape[axis] > 1 else None for axis in axes)
    for size, axis in zip(shape, axes):
        if axis and size % mesh.shape[axis]:
            fits = max(n for n in range(1, mesh.shape[axis] + 1) if size % n == 0 and mesh.size % n == 0)
            raise UserError(
                f"mesh.{axis}={mesh.shape[axis]} does not divide {size}, a dimension of {name} {list(shape)}. "
                f"Set --config.mesh.{axis}={fits} and --config.mesh.data=-1."
            )
    return PartitionSpec(*axes)


def constrain(x: jax.Array, axes: str) -> jax.Array:
    """Pins activations under a step's mesh: `B` over data x fsdp, every other letter whole. Does nothing elsewhere."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(BATCH if axis == "B" else None for axis in axes)))


def row_shards() -> int:
    """Into how many parts the rows are split under a step's mesh; 1 elsewhere, and where a device sees only its own."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return 1
    return int(np.prod([mesh.shape.get(axis, 1) for axis in BATCH]))


def platform() -> str:
    """Of the devices that the step is compiled for, which need not be here."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return getattr(device, "platform", None) or jax.default_backend()


def under(mesh: Mesh) -> Any:
    """The context in which `constrain` pins: open it inside of the function that is compiled."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def local_rows(mesh: Mesh, count: int) -> list[int]:
    """Which of a step's B rows this process addresses, ascending; tensor peers address the same."""
    spans = rows(mesh).addressable_devices_indices_map((count,)).values()
    return sorted({r for (span,) in spans for r in range(*span.indices(count))})


def put(mesh: Mesh, batch: Any, count: int) -> Any:
    """A process's numpy rows, those of `local_rows` in order, as one global array a leaf, [B, ...]."""
    place = {row: i for i, row in enumerate(local_rows(mesh, count))}

    def leaf(x: np.ndarray) -> jax.Array:
        def part(index: tuple) -> np.ndarray:
            span = range(*index[0].indices(count))
            return x[place[span[0]] : place[span[-1]] + 1]

        return jax.make_array_from_callback((count, *x.shape[1:]), rows(mesh), part)

    return jax.tree.map(leaf, batch)


@functools.cache
def _gather(mesh: Mesh) -> Callable:
    return jax.jit(lambda x: x, out_shardings=replicated(mesh))


def everywhere(here: Any, batch: Any) -> Any:
    """The rows of all processes as numpy, in every one. here: this process's rows. batch: what `put` made of them."""
    if jax.process_count() == 1:
        return here
    mesh = jax.tree.leaves(batch)[0].sharding.mesh
    return jax.device_get(_gather(mesh)(batch))


def host_numbers(mesh: Mesh) -> NamedSharding:
    """[devices, n]: a row a device, so that summing over devices sums over hosts, whatever rows they share."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def put_host(mesh: Mesh, numbers: Sequence[float]) -> jax.Array:
    """Numbers of this process as its part of [devices, n] float32; the sum over devices is the sum over processes."""
    mine = np.asarray(numbers, np.float32)[None] / len(mesh.local_devices)
    return jax.make_array_from_callback((mesh.size, mine.shape[1]), host_numbers(mesh), lambda index: mine)


def from_host(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A value that every process holds, placed without asking the others whether it is the same."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
