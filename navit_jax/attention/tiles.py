"""Attention that visits only the tiles of keys that a tile of queries can see, in plain JAX and without a plan.

A row is cut into tiles of 64 tokens; a tile of queries runs an online softmax over its own images' keys, and the
backward pass visits the same pairs, so both cost what the images cost, not what L x L does. A few tiles run as one
batch of products, in a loop as long as the longest of them needs; sorted by that number, they waste little. The
backward pass is written out because `jax.grad` cannot go through a loop of unknown length.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name as keep

from navit_jax.attention.dense import MASKED
from navit_jax.attention.devices import on_each_device
from navit_jax.attention.segments import key_tiles

TILE = 64  # tokens; 32 costs 1.1x and 128 1.2x as much at L=1024 with images of 16-256 tokens
BATCH = 24  # products of tiles at a time, tiles x heads: 1.5 MiB, which stays in a core's cache


class Prepared(NamedTuple):
    """Tiles of a device's rows, T in all, those with most keys first.

    order_T: number of each tile in the rows. place_T: its inverse. first_T: its first tile of keys. count_T: how many.
    """

    order_T: jax.Array
    place_T: jax.Array
    first_T: jax.Array
    count_T: jax.Array


def unavailable(case: Any) -> str:
    """Why this backend cannot run, or ''; it only needs tokens of an image to lie side by side."""
    return "" if case.contiguous else "it needs the tokens of an image side by side"


def prepare(ids_BL: jax.Array, capacity: Any = None) -> Prepared:
    """What each tile of queries has to visit; ids: [B, L] int32, contiguous, 0 = padding. Made once a step."""
    return on_each_device(_prepare, (), ids_BL)


def _prepare(ids_BL: jax.Array) -> Prepared:
    ids_BL = _whole_tiles(ids_BL)
    first_BT, count_BT = key_tiles(ids_BL, *[_tile(ids_BL.shape[1])] * 2)
    row_B1 = jnp.arange(len(first_BT), dtype=jnp.int32)[:, None]
    first_T, count_T = (first_BT + row_B1 * first_BT.shape[1]).ravel(), count_BT.ravel()
    order_T = jnp.argsort(-count_T)
    return Prepared(order_T, jnp.argsort(order_T), first_T[order_T], count_T[order_T])


def attend(q_BLNH: jax.Array, k_BLNH: jax.Array, v_BLNH: jax.Array, ids_BL: jax.Array, prepared: Prepared) -> jax.Array:
    """Softmax attention among tokens of equal id; outputs and gradients of id 0 are exactly 0.

    q, k, v: [B, L, N, H] of one float dtype; ids: [B, L] int32, contiguous. Returns [B, L, N, H] in that dtype;
    logits and softmax are float32. Source: Milakov & Gimelshein 2018 (online softmax), Dao 2023 (FlashAttention-2).
    """
    return on_each_device(lambda q, k, v, rest: _attend(q, k, v, *rest), (q_BLNH, k_BLNH, v_BLNH), (ids_BL, prepared))


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, ids_BL: jax.Array, prepared: Prepared) -> jax.Array:
    return _forward(q, k, v, ids_BL, prepared)[0]


def _forward(
    q_BLNH: jax.Array, k_BLNH: jax.Array, v_BLNH: jax.Array, ids_BL: jax.Array, prepared: Prepared
) -> tuple[jax.Array, tuple]:
    q, k, v = (_cut(x) for x in (q_BLNH, k_BLNH, v_BLNH))
    k_TNHt, ids_Tt = _turned(k), _cut(ids_BL)
    visits, scale = _visits(prepared, q.shape[1]), q.shape[-1] ** -0.5

    def some_tiles(_: None, visit: tuple) -> tuple[None, tuple]:
        order_C, first_C, count_C = visit
        q_CNtH, ids_Ct = q[order_C], ids_Tt[order_C]

        def one_key_tile(j: jax.Array, carry: tuple) -> tuple:
            top, total, out = carry
            at_C = jnp.where(j < count_C, first_C + j, 0)
            seen = _seen(ids_Ct[:, :, None], ids_Tt[at_C][:, None, :], j < count_C)
            logits = jnp.where(seen, _dot(q_CNtH, k_TNHt[at_C]) * scale, MASKED)
            new_top = jnp.maximum(top, logits.max(-1, keepdims=True))
            weights = jnp.where(seen, jnp.exp(logits - new_top), 0)
            shrink = jnp.exp(top - new_top)
            total = total * shrink + weights.sum(-1, keepdims=True)
            return new_top, total, out * shrink + _dot(weights.astype(v.dtype), v[at_C])

        zero = jnp.zeros_like(q_CNtH, jnp.float32)
        carry = (zero[..., :1] + MASKED, zero[..., :1], zero)
        top, total, out = jax.lax.fori_loop(0, count_C[0], one_key_tile, carry)
        some = jnp.where(total > 0, total, 1)  # 0 where a query is padding
        return None, (out / some, top + jnp.log(some))

    _, (out, log_sum) = jax.lax.scan(some_tiles, None, visits)
    out, log_sum = keep(_in_order(out, prepared).astype(q.dtype), "attended"), keep(log_sum, "log_sum")
    return _join(out, ids_BL.shape), (q, k, v, out, log_sum, ids_BL, prepared)


def _backward(kept: tuple, d_out_BLNH: jax.Array) -> tuple:
    """Visits what the forward pass did, with the logits' transpose: then each product has plain operands."""
    q, k, v, out, log_sum, ids_BL, prepared = kept
    d_out, ids_Tt, k_TNHt = _cut(d_out_BLNH), _cut(ids_BL), _turned(k)
    slope_TNt = (out.astype(jnp.float32) * d_out).sum(-1)
    visits, scale = _visits(prepared, q.shape[1]), q.shape[-1] ** -0.5

    def some_tiles(sums: tuple, visit: tuple) -> tuple[tuple, jax.Array]:
        (order_C, first_C, count_C), log_sum_CN1t = visit[0], visit[1].swapaxes(2, 3)
        q_CNtH, d_out_CNtH, ids_Ct = q[order_C], d_out[order_C], ids_Tt[order_C]
        q_CNHt, d_out_CNHt, slope_CN1t = _turned(q_CNtH), _turned(d_out_CNtH), slope_TNt[order_C][:, :, None, :]

        def one_key_tile(j: jax.Array, carry: tuple) -> tuple:
            d_k, d_v, d_q_CNHt = carry
            at_C = jnp.where(j < count_C, first_C + j, 0)
            seen = _seen(ids_Ct[:, None, :], ids_Tt[at_C][:, :, None], j < count_C)
            weights = jnp.where(seen, jnp.exp(_dot(k[at_C], q_CNHt) * scale - log_sum_CN1t), 0)
            d_logits = (weights * (_dot(v[at_C], d_out_CNHt) - slope_CN1t) * scale).astype(q.dtype)
            d_v = d_v.at[at_C].add(_dot(weights.astype(v.dtype), d_out_CNtH))
            d_k = d_k.at[at_C].add(_dot(d_logits, q_CNtH))
            return d_k, d_v, d_q_CNHt + _dot(k_TNHt[at_C], d_logits)

        start = (*sums, jnp.zeros_like(q_CNHt, jnp.float32))
        d_k, d_v, d_q_CNHt = jax.lax.fori_loop(0, count_C[0], one_key_tile, start)
        return (d_k, d_v), d_q_CNHt.swapaxes(2, 3)

    zero = jnp.zeros_like(k, jnp.float32)
    (d_k, d_v), d_q = jax.lax.scan(some_tiles, (zero, zero), (visits, log_sum))
    return *(_join(x, ids_BL.shape).astype(q.dtype) for x in (_in_order(d_q, prepared), d_k, d_v)), None, None


_attend.defvjp(_forward, _backward)


def _visits(prepared: Prepared, heads: int) -> tuple[jax.Array, ...]:
    """order, first and count, [chunks, C] each; those that fill the last chunk visit nothing."""
    chunk = max(1, min(16, BATCH // heads))
    padding = -len(prepared.order_T) % chunk
    return tuple(jnp.pad(x, (0, padding)).reshape(-1, chunk) for x in (prepared.order_T, *prepared[2:]))


def _seen(ids_q: jax.Array, ids_k: jax.Array, visited_C: jax.Array) -> jax.Array:
    """[C, 1, a, b]: which pairs attend; padding to nothing."""
    return ((ids_q == ids_k) & (ids_k > 0) & visited_C[:, None, None])[:, None]


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _turned(x: jax.Array) -> jax.Array:
    """Transposed in memory, once, and not again in each product: a CPU takes those at half speed."""
    turn = partial(jnp.swapaxes, axis1=-1, axis2=-2)
    return jax.lax.platform_dependent(x, cpu=lambda x: jax.lax.optimization_barrier(turn(x)), default=turn)


def _tile(length: int) -> int:
    return min(TILE, length)


def _whole_tiles(x_BL: jax.Array) -> jax.Array:
    """[B, L, ...] with zeros behind, which are padding, up to a multiple of the tile."""
    extra = -x_BL.shape[1] % _tile(x_BL.shape[1])
    return jnp.pad(x_BL, [(0, 0), (0, extra)] + [(0, 0)] * (x_BL.ndim - 2))


def _cut(x_BL: jax.Array) -> jax.Array:
    """[B, L] -> [T, t], [B, L, N, H] -> [T, N, t, H]."""
    x = _whole_tiles(x_BL)
    x = x.reshape(-1, _tile(x_BL.shape[1]), *x.shape[2:])
    return x if x.ndim == 2 else x.swapaxes(1, 2)


def _join(x_TNtH: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """[T, N, t, H] -> [B, L, N, H]."""
    x = x_TNtH.swapaxes(1, 2)
    return x.reshape(shape[0], -1, *x.shape[2:])[:, : shape[1]]


def _in_order(x: jax.Array, prepared: Prepared) -> jax.Array:
    """[chunks, C, ...], those with most keys first -> [T, ...] as they lie in the rows."""
    return x.reshape(-1, *x.shape[2:])[prepared.place_T]
