"""Attention over slabs: images of similar length side by side, so that each pays for its own length alone.

The images of a group of rows, longest first, go to the slabs of its `Capacity`, [n, m] tokens each: dense attention
with masked keys in each slab costs sum(n m^2), about the same at any L. Which token goes where is derived once a step;
a layer gathers both ways, also in its backward pass, because scatters are slow. What it gathers are the H numbers of a
token's head, so that what arrives is head-major: half the time of gathering tokens and transposing them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name as keep

from input_pipeline.capacity import Capacity
from navit_jax.attention import dense
from navit_jax.attention.devices import on_each_device
from navit_jax.cpu import pin, sum_rows


class Places(NamedTuple):
    """Q groups of T = G * L tokens, S = sum(n * m) places in the slabs.

    tokens: [Q, S] int32, the token of each place; of an empty place any. real: [Q, S], which places are not empty.
    places: [Q, T] int32, the place of each token; S for padding. fits: [Q], whether the group is within its capacity.
    """

    tokens_QS: jax.Array
    real_QS: jax.Array
    places_QT: jax.Array
    fits_Q: jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=["places"], meta_fields=["capacity"])
@dataclass(frozen=True)
class Prepared:
    """capacity: static, so that the slabs have static shapes."""

    capacity: Capacity
    places: Places


def unavailable(case: Any) -> str:
    """Why this backend cannot run, or ''."""
    if case.capacity is None:
        return "its rows were not planned within a capacity"
    if case.rows % case.capacity.rows:
        return f"a device holds {case.rows} rows, not whole groups of packing.rows_per_group={case.capacity.rows}"
    return "" if case.contiguous else "it needs the tokens of an image side by side"


def prepare(ids_BL: jax.Array, capacity: Capacity) -> Prepared:
    """Where tokens go; ids: [B, L] int32, contiguous, within the capacity, 0 = padding. Made once a step."""
    return Prepared(capacity, on_each_device(partial(_places, capacity), (), ids_BL))


def attend(q_BLNH: jax.Array, k_BLNH: jax.Array, v_BLNH: jax.Array, ids_BL: jax.Array, prepared: Prepared) -> jax.Array:
    """Softmax attention among tokens of equal id; outputs and gradients of id 0 are exactly 0.

    q, k, v: [B, L, N, H] of one float dtype. Returns [B, L, N, H] in that dtype; logits and softmax are float32. Groups
    that are not within their capacity are NaN: a lost image must not go unnoticed.
    """
    slabs = prepared.capacity.slabs
    return on_each_device(lambda q, k, v, at: _attend(slabs, q, k, v, at), (q_BLNH, k_BLNH, v_BLNH), prepared.places)


def _places(capacity: Capacity, ids_BL: jax.Array) -> Places:
    rows, length = capacity.rows, ids_BL.shape[1]
    ids_QT, at_T = ids_BL.reshape(-1, rows * length), jnp.arange(rows * length, dtype=jnp.int32)
    new_QT = (ids_QT != jnp.roll(ids_QT, 1, axis=1)) | (at_T % length == 0)
    first_QT = (ids_QT > 0) & new_QT
    last_QT = (ids_QT > 0) & jnp.roll(new_QT, -1, axis=1)
    first_QP, last_QP = (_positions(edge, capacity.places) for edge in (first_QT, last_QT))
    length_QP = jnp.where(first_QP < at_T.size, last_QP - first_QP + 1, 0)
    order_QP = jnp.argsort(-length_QP, axis=1)  # of images by length, longest first; the order of the slabs
    take = partial(jnp.take_along_axis, axis=1)
    first_QP, length_QP = take(first_QP, order_QP), take(length_QP, order_QP)
    sizes_P = np.repeat(*np.array(capacity.slabs).T[::-1])
    starts_P = (np.cumsum(sizes_P) - sizes_P).astype(np.int32)
    image_S = np.repeat(np.arange(sizes_P.size), sizes_P)
    inside_S = (np.arange(image_S.size) - starts_P[image_S]).astype(np.int32)
    real_QS = inside_S < length_QP[:, image_S]
    tokens_QS = jnp.where(real_QS, first_QP[:, image_S] + inside_S, 0)
    place_QP = take(starts_P - first_QP, jnp.argsort(order_QP, axis=1))  # added to a token gives its place
    image_QT = jnp.clip(jnp.cumsum(first_QT, axis=1) - 1, 0, sizes_P.size - 1)
    places_QT = jnp.where(ids_QT > 0, take(place_QP, image_QT) + at_T, image_S.size)
    fits_Q = (length_QP <= sizes_P).all(1) & (first_QT.sum(1) <= sizes_P.size)
    return Places(tokens_QS, real_QS, places_QT, fits_Q)


def _positions(edge_QT: jax.Array, count: int) -> jax.Array:
    """The first `count` positions that are marked, ascending, then T; [Q, count] int32."""
    tokens = edge_QT.shape[1]
    at_QT = jnp.sort(jnp.where(edge_QT, jnp.arange(tokens, dtype=jnp.int32), tokens), axis=1)
    return jnp.pad(at_QT, ((0, 0), (0, max(0, count - tokens))), constant_values=tokens)[:, :count]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(slabs: tuple, q_BLNH: jax.Array, k_BLNH: jax.Array, v_BLNH: jax.Array, at: Places) -> jax.Array:
    return _forward(slabs, q_BLNH, k_BLNH, v_BLNH, at)[0]


def _forward(
    slabs: tuple, q_BLNH: jax.Array, k_BLNH: jax.Array, v_BLNH: jax.Array, at: Places
) -> tuple[jax.Array, tuple]:
    rows = _rows_of_tokens(slabs, at, q_BLNH.shape[2])
    q, k, v = (_to_slabs(x, rows) for x in (q_BLNH, k_BLNH, v_BLNH))
    masks = [real[:, None, None, :] for real in _cut(slabs, at.real_QS)]
    outs, log_sums = zip(*map(dense.forward, q, k, v, masks), strict=True)
    fits_B111 = jnp.repeat(at.fits_Q, q_BLNH.shape[0] // at.fits_Q.size)[:, None, None, None]
    out_BLNH = keep(jnp.where(fits_B111, _from_slabs(slabs, outs, at, q_BLNH.shape), jnp.nan), "attended")
    log_sums = [keep(x, "log_sum") for x in log_sums]
    return out_BLNH, (q, k, v, out_BLNH, log_sums, at)


def _backward(slabs: tuple, kept: tuple, d_out_BLNH: jax.Array) -> tuple:
    q, k, v, out_BLNH, log_sums, at = kept
    reals = _cut(slabs, at.real_QS)
    # Row sums of out * d_out before they are gathered: N numbers a token rather than N * H.
    slope_BLN1 = sum_rows(out_BLNH.astype(jnp.float32) * d_out_BLNH)
    rows = _rows_of_tokens(slabs, at, d_out_BLNH.shape[2])
    d_out, slope = (
        [jnp.where(real[:, None, :, None], x, 0) for real, x in zip(reals, _to_slabs(x, rows), strict=True)]
        for x in (d_out_BLNH, slope_BLN1)
    )
    masks = [real[:, None, :, None] for real in reals]
    grads = zip(*map(dense.backward, q, k, v, masks, log_sums, d_out, slope), strict=True)
    return *(_from_slabs(slabs, d, at, d_out_BLNH.shape) for d in grads), None


_attend.defvjp(_forward, _backward)


def _cut(slabs: tuple, x_QS: jax.Array) -> list[jax.Array]:
    """[Q, S, ...] -> [Q * n, m, ...] of each slab."""
    ends = np.cumsum([count * length for count, length in slabs])[:-1]
    return [x.reshape(-1, m, *x.shape[2:]) for x, (_, m) in zip(jnp.split(x_QS, ends, axis=1), slabs, strict=True)]


def _rows_of_tokens(slabs: tuple, at: Places, heads: int) -> list[jax.Array]:
    """Which row of [B * L * N, H] each head of each place holds: [Q * n, N, m] int32 of each slab."""
    groups, tokens = at.places_QT.shape
    tokens_QS = at.tokens_QS + tokens * np.arange(groups, dtype=np.int32)[:, None]
    return [pin(heads * x[:, None] + np.arange(heads, dtype=np.int32)[:, None]) for x in _cut(slabs, tokens_QS)]


def _to_slabs(x_BLNH: jax.Array, rows: list[jax.Array]) -> list[jax.Array]:
    """Head-major [Q * n, N, m, H] of each slab; empty places hold any token."""
    x_RH = x_BLNH.reshape(-1, x_BLNH.shape[-1])
    return [pin(x_RH.at[row_XNM].get(mode="promise_in_bounds")) for row_XNM in rows]


def _from_slabs(slabs: tuple, xs: Sequence[jax.Array], at: Places, shape: tuple[int, ...]) -> jax.Array:
    """The reverse, [B, L, N, H]: padding is 0."""
    groups, (heads, size) = at.places_QT.shape[0], shape[2:]
    x_RH = jnp.concatenate([*(x.reshape(-1, size) for x in xs), jnp.zeros((1, size), xs[0].dtype)])
    rows_QTN = jnp.take_along_axis(_rows_of_places(slabs, groups, heads), at.places_QT[..., None], axis=1)
    return x_RH.at[pin(rows_QTN)].get(mode="promise_in_bounds").reshape(shape)


def _rows_of_places(slabs: tuple, groups: int, heads: int) -> jax.Array:
    """[Q, S + 1, N] int32: of the rows of all slabs, [Q * n * N * m, H] each, that of a place's head; the last is 0."""
    parts, rows = [], 0
    for count, length in slabs:
        part = rows + np.arange(groups * count * heads * length, dtype=np.int32)
        parts.append(part.reshape(groups, count, heads, length).swapaxes(2, 3).reshape(groups, -1, heads))
        rows += part.size
    return jnp.asarray(np.concatenate([*parts, np.full((groups, 1, heads), rows, np.int32)], axis=1))
