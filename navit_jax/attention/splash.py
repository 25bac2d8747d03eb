"""TPU attention over long rows: JAX's splash kernels, told for every batch which tiles its images lie in.

The kernels visit what a MaskInfo lists. Those that JAX makes are for masks known when the step is compiled (or, from an
array, break under jit in 0.10.2); here the lists are arrays of the batch, a first tile and a count for each tile of
queries, and segment ids mask inside of a tile. All rows of a device lie behind each other as one sequence, so that one
launch serves them. The length of the lists is static: it covers the longest image that the rows may hold, which
the planner promises (`Capacity.longest`); without a promise it is the row. Compiled for v5e and v6e and interpreted in
tests; not timed on a TPU yet.
"""

import importlib.util
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from navit_jax.attention.devices import on_each_device
from navit_jax.attention.segments import key_tiles

KERNELS = "jax.experimental.pallas.ops.tpu.splash_attention"
LANES = 128
LIST_BYTES = LANES * (4 + 1)  # of a tile's list in scalar memory, which pads it: 128 numbers of int32 and of int8
SCALAR_MEMORY = 2**20 - 2**16  # bytes, on v5e and v6e


class Prepared(NamedTuple):
    """Of each tile of a device's rows, T of t tokens in all, the W tiles that it may see.

    tiles_TW: their numbers in the rows, int32; behind its last it is repeated, so that nothing is fetched. visit_TW:
    int8, whether to. ids_Tt: int32, such that no two rows share one. fits_B: bool, whether a row's lists hold all.
    """

    tiles_TW: jax.Array
    visit_TW: jax.Array
    ids_Tt: jax.Array
    fits_B: jax.Array


def unavailable(case: Any) -> str:
    """Why this backend cannot run, or ''."""
    if case.platform != "tpu":
        return "its kernels run on TPUs only"
    if not case.contiguous:
        return "it needs the tokens of an image side by side"
    if importlib.util.find_spec(KERNELS) is None:
        return f"this version of jax has no {KERNELS}"
    tile = tile_of(_longest(case.capacity, case.length), case.length)
    most = SCALAR_MEMORY // LIST_BYTES * tile
    if case.rows * -(-case.length // tile) * tile > most:
        return f"its lists of tiles fill the scalar memory at {most} tokens a device"
    return ""


def tile_of(longest: int, length: int) -> int:
    """Tokens of a tile, a multiple of 128: 256 for images up to 512 tokens, 512 for longer ones, the row if shorter.

    A visit costs about 0.35 us besides its products, which is why 128 does not pay: 8 tiles of 128 visit 5 each where 4
    of 256 visit 3 (images up to 256 tokens).
    """
    return min(256 if longest <= 512 else 512, -(-length // LANES) * LANES)


def prepare(ids_BL: jax.Array, capacity: Any = None) -> Prepared:
    """The tiles that each tile of queries visits; ids: [B, L] int32, contiguous, 0 = padding. Made once a step.

    Rows with an image longer than `capacity.longest`, against the promise, return NaN: keys would be lost unseen.
    """
    return on_each_device(lambda ids: _prepare(ids, _longest(capacity, ids.shape[1])), (), ids_BL)


def _longest(capacity: Any, length: int) -> int:
    return min(capacity.longest, length) if capacity else length


def _prepare(ids_BL: jax.Array, longest: int) -> Prepared:
    rows, length = ids_BL.shape
    tile = tile_of(longest, length)
    ids_BL = jnp.pad(ids_BL, ((0, 0), (0, -length % tile)))
    tiles = ids_BL.shape[1] // tile
    width = min(tiles, 1 + 2 * -(-(longest - 1) // tile))  # an image that ends, and one that begins, in the tile
    first_BT, count_BT = key_tiles(ids_BL, tile, tile)
    # Padding shares an id and sees itself, in its own tile: a query without any key would divide by 0.
    first_BT = jnp.where(count_BT > 0, first_BT, jnp.arange(tiles))
    count_BT = jnp.maximum(count_BT, 1)
    row_B1 = jnp.arange(rows, dtype=jnp.int32)[:, None]
    nth_W = jnp.arange(width, dtype=jnp.int32)
    tiles_BTW = (first_BT + row_B1 * tiles)[..., None] + jnp.minimum(nth_W, count_BT[..., None] - 1)
    visit_BTW = nth_W < count_BT[..., None]
    ids_Tt = (ids_BL + row_B1 * (length + 1)).reshape(-1, tile)
    fits_B = (count_BT <= width).all(1)
    return Prepared(tiles_BTW.reshape(-1, width), visit_BTW.reshape(-1, width).astype(jnp.int8), ids_Tt, fits_B)


def attend(q_BLNH: jax.Array, k_BLNH: jax.Array, v_BLNH: jax.Array, ids_BL: jax.Array, prepared: Prepared) -> jax.Array:
    """Softmax attention among tokens of equal id; outputs and gradients of id 0 are exactly 0.

    q, k, v: [B, L, N, H] of one float dtype; ids: [B, L] int32, contiguous. Returns [B, L, N, H] in that dtype; logits
    and softmax are float32. Source: `jax.experimental.pallas.ops.tpu.splash_attention`, which is not JAX's stable part.
    """
    return on_each_device(lambda q, k, v, rest: _attend(q, k, v, *rest), (q_BLNH, k_BLNH, v_BLNH), (ids_BL, prepared))


def _attend(
    q_BLNH: jax.Array, k_BLNH: jax.Array, v_BLNH: jax.Array, ids_BL: jax.Array, prepared: Prepared
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    tile = prepared.ids_Tt.shape[1]
    blocks = kernel.BlockSizes(*[tile] * 8)
    queries = MaskInfo(prepared.tiles_TW[None], None, 2 * prepared.visit_TW[None], None, None)  # 2: all of a tile
    # Who sees whom is mutual.
    keys = MaskInfo(prepared.tiles_TW.T[None], None, 2 * prepared.visit_TW.T[None], None, None)
    run = kernel.SplashAttentionKernel(
        queries,
        queries,
        keys,
        is_mqa=False,
        block_sizes=blocks,
        save_residuals=False,
        mask_value=kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=None,
        interpret=False,
    )
    ids_S = prepared.ids_Tt.ravel()
    q_BLNH = q_BLNH * jnp.asarray(q_BLNH.shape[-1] ** -0.5, q_BLNH.dtype)  # 1/8 at H = 64, which rounds nothing
    out_NSH = run(*(_sequence(x, tile) for x in (q_BLNH, k_BLNH, v_BLNH)), kernel.SegmentIds(ids_S, ids_S))
    out_BLNH = out_NSH.swapaxes(0, 1).reshape(len(ids_BL), -1, *q_BLNH.shape[2:])[:, : ids_BL.shape[1]]
    out_BLNH = jnp.where(prepared.fits_B[:, None, None, None], out_BLNH, jnp.nan)
    return jnp.where(ids_BL[..., None, None] > 0, out_BLNH, 0)


def _sequence(x_BLNH: jax.Array, tile: int) -> jax.Array:
    """[B, L, N, H] -> [N, S, H], each row filled up to whole tiles."""
    x = jnp.pad(x_BLNH, ((0, 0), (0, -x_BLNH.shape[1] % tile), (0, 0), (0, 0)))
    return x.reshape(-1, *x.shape[2:]).swapaxes(0, 1)
