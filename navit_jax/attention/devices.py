"""One place where an attention backend is told to run on each device alone, on its own rows and heads.

Kernels and gathers over the rows of a batch mean nothing to XLA's partitioner: it would gather every row to every
device first. No token sees another row or head, so inside `shard_map` nothing is communicated at all.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from navit_jax.sharding import BATCH

HEADS = P(BATCH, None, "tensor", None)


def on_each_device(f: Callable, qkv: tuple[jax.Array, ...], rows: Any) -> Any:
    """f(*qkv, rows) on each device of the mesh in use, or plainly where there is none or every axis is manual already.

    qkv: [B, L, N, H] each, split over B and N, as is the one result; rows: a tree of arrays that are split over their
    first axis, as are the results where `qkv` is empty. f sees and returns the parts of one device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not {*BATCH, "tensor"} <= set(mesh.axis_names) or AxisType.Manual in mesh.axis_types:
        return f(*qkv, rows)
    specs = (*(HEADS for _ in qkv), P(BATCH))
    # check_vma off: a kernel's results carry no note of the axes that they vary over
    return jax.shard_map(f, in_specs=specs, out_specs=HEADS if qkv else P(BATCH), check_vma=False)(*qkv, rows)
