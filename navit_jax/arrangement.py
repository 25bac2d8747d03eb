"""The order in which tokens lie while the encoder sees them: an image's registers first, then its windows one by one.

Fast attention lives on groups whose tokens lie side by side, so registers go before their image's patches rather than
to the row's end, and where some blocks attend within windows, a window's patches lie together: one gather before the
encoder and one behind it, whose gradients are gathers, too.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Order(NamedTuple):
    """order: [B, M] int32, which token comes at each place. inverse: [B, M] int32, the place of each token."""

    order: jax.Array
    inverse: jax.Array


class Layout(NamedTuple):
    """ids_BM: the segment of each place, 0 = padding, last. windows_BM: the number of its window in its row, ascending.

    windows_BM is None without windows. order: None where tokens stay as they are.
    """

    ids_BM: jax.Array
    windows_BM: jax.Array | None
    order: Order | None


def by_key(*keys_BM: jax.Array) -> Order:
    """Tokens by ascending first key, where it is equal by the next one, then as they were."""
    at_BM = jnp.broadcast_to(jnp.arange(keys_BM[0].shape[1], dtype=jnp.int32), keys_BM[0].shape)
    order_BM = jax.lax.sort((*keys_BM, at_BM), dimension=1, num_keys=len(keys_BM), is_stable=True)[-1]
    return Order(order_BM, jnp.argsort(order_BM, axis=1).astype(jnp.int32))


def squares(coords_BL3: jax.Array, sides_BL2: jax.Array, side: int) -> jax.Array:
    """[B, L] int32: which of the squares of side x side patches of its image a patch lies in, row by row, from 0.

    coords: (t, y, x). sides: each token's (rows, columns). Squares at the lower and right edges may be smaller.
    """
    up_BL, across_BL = (-(-sides_BL2[..., i] // side) for i in range(2))
    t_BL, y_BL, x_BL = (coords_BL3[..., i] for i in range(3))
    return (t_BL * up_BL + y_BL // side) * across_BL + x_BL // side


def lay_out(ids_BL: jax.Array, slots: int, registers: int, windows_BL: jax.Array | None = None) -> Layout:
    """Where L patches go, with the K * R registers that were put behind them; M = L + K * R.

    windows: each patch's window in its image. The registers of an image are a window of their own, those of an empty
    slot are padding.
    """
    if not registers and windows_BL is None:
        return Layout(ids_BL, None, None)
    used_BK = (ids_BL[:, None, :] == jnp.arange(1, slots + 1)[None, :, None]).any(-1)
    own_BK = jnp.where(used_BK, jnp.arange(1, slots + 1), 0).astype(ids_BL.dtype)
    ids_BM = jnp.concatenate([ids_BL, jnp.repeat(own_BK, registers, axis=1)], axis=1)
    inside_BL = jnp.zeros_like(ids_BL) if windows_BL is None else windows_BL
    inside_BM = jnp.pad(inside_BL, ((0, 0), (0, slots * registers)), constant_values=-1)
    order = by_key(jnp.where(ids_BM > 0, ids_BM, slots + 1), inside_BM)
    ids_BM, inside_BM = (_take(x, order.order) for x in (ids_BM, inside_BM))
    if windows_BL is None:
        return Layout(ids_BM, None, order)
    new_BM = (ids_BM[:, 1:] != ids_BM[:, :-1]) | (inside_BM[:, 1:] != inside_BM[:, :-1])
    number_BM = 1 + jnp.cumsum(jnp.pad(new_BM, ((0, 0), (1, 0))), axis=1)
    return Layout(ids_BM, jnp.where(ids_BM > 0, number_BM, 0).astype(ids_BM.dtype), order)


def arrange(x_BMD: jax.Array, order: Order | None) -> jax.Array:
    """[B, M, ...] in the order; None changes nothing."""
    return x_BMD if order is None else _arrange(x_BMD, order)


def restore(x_BMD: jax.Array, order: Order | None) -> jax.Array:
    """The inverse of `arrange`."""
    return x_BMD if order is None else _arrange(x_BMD, Order(order.inverse, order.order))


@jax.custom_vjp
def _arrange(x_BMD: jax.Array, order: Order) -> jax.Array:
    return _take(x_BMD, order.order)


def _take(x: jax.Array, places_BM: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, places_BM.reshape(*places_BM.shape, *[1] * (x.ndim - 2)), axis=1)


_arrange.defvjp(
    lambda x, order: (_take(x, order.order), order),
    lambda order, d: (_take(d, order.inverse), None),  # a permutation's transpose: no scatter
)
