"""TPU attention over short rows: JAX's flash kernels with segment ids, in as few tiles as the chip's memory allows.

It computes a whole row's logits, as `dense` does, but never writes them: at L = 512 XLA moves 12 bytes or more a logit
through HBM, which takes longer than the products. Rows this short gain nothing from skipping tiles, see `splash`.
Compiled for v5e and v6e and interpreted in tests; not timed on a TPU yet.
"""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from navit_jax.attention.devices import on_each_device

KERNELS = "jax.experimental.pallas.ops.tpu.flash_attention"
LANES = 128
TILE = 512  # queries and keys of a tile at most: float32 logits of 1 MiB, of which the backward pass holds a few


def unavailable(case: Any) -> str:
    """Why this backend cannot run, or ''."""
    if case.platform != "tpu":
        return "its kernels run on TPUs only"
    return "" if importlib.util.find_spec(KERNELS) else f"this version of jax has no {KERNELS}"


def prepare(ids_BL: jax.Array, capacity: Any = None) -> None:
    """Needs nothing but the ids."""


def attend(
    q_BLNH: jax.Array, k_BLNH: jax.Array, v_BLNH: jax.Array, ids_BL: jax.Array, prepared: None = None
) -> jax.Array:
    """Softmax attention among tokens of equal id; outputs and gradients of id 0 are exactly 0.

    q, k, v: [B, L, N, H] of one float dtype; ids: [B, L] int32. Returns [B, L, N, H] in that dtype; logits and softmax
    are float32. Source: `jax.experimental.pallas.ops.tpu.flash_attention`, which is not JAX's stable part.
    """
    return on_each_device(_attend, (q_BLNH, k_BLNH, v_BLNH), ids_BL)


def _attend(q_BLNH: jax.Array, k_BLNH: jax.Array, v_BLNH: jax.Array, ids_BL: jax.Array) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import flash_attention as kernel

    length = ids_BL.shape[1]
    extra = -length % LANES
    q, k, v = (jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))
    ids = jnp.pad(ids_BL, ((0, 0), (0, extra)))
    tile = max(n for n in range(LANES, TILE + 1, LANES) if (length + extra) % n == 0)
    blocks = kernel.BlockSizes(*[tile] * 3, 1, *[tile] * 7)
    scale = q.shape[-1] ** -0.5
    out = kernel.flash_attention(
        q, k, v, segment_ids=kernel.SegmentIds(ids, ids), sm_scale=scale, block_sizes=blocks
    ).swapaxes(1, 2)
    return jnp.where(ids_BL[..., None, None] > 0, out[:, :length], 0)
