"""The order in which tokens lie while the encoder sees them: registers beside the patches of their own image.

Fast attention lives on groups whose tokens lie side by side, so registers go before their image's patches rather than
to the row's end: one gather before the encoder and one behind it, whose gradients are gathers, too.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Order(NamedTuple):
    """order: [B, M] int32, which token comes at each place. inverse: [B, M] int32, the place of each token."""

    order: jax.Array
    inverse: jax.Array


def by_key(key_BM: jax.Array) -> Order:
    """Tokens by ascending key, equal ones as they were."""
    order_BM = jnp.argsort(key_BM, axis=1, stable=True).astype(jnp.int32)
    return Order(order_BM, jnp.argsort(order_BM, axis=1).astype(jnp.int32))


def with_registers(ids_BL: jax.Array, slots: int, registers: int) -> tuple[Order, jax.Array]:
    """(order of L patches with K * R registers behind them, ids [B, L + K * R] in that order), padding last.

    The registers of an empty slot are padding, id 0.
    """
    used_BK = (ids_BL[:, None, :] == jnp.arange(1, slots + 1)[None, :, None]).any(-1)
    own_BK = jnp.where(used_BK, jnp.arange(1, slots + 1), 0).astype(ids_BL.dtype)
    ids_BM = jnp.concatenate([ids_BL, jnp.repeat(own_BK, registers, axis=1)], axis=1)
    is_patch_M = jnp.arange(ids_BM.shape[1]) < ids_BL.shape[1]
    order = by_key(jnp.where(ids_BM > 0, 2 * ids_BM + is_patch_M, 2 * slots + 2))
    return order, jnp.take_along_axis(ids_BM, order.order, axis=1)


@jax.custom_vjp
def arrange(x_BMD: jax.Array, order: Order) -> jax.Array:
    """[B, M, ...] in the order; `arrange(x, Order(order.inverse, order.order))` undoes it."""
    return _take(x_BMD, order.order)


def _take(x: jax.Array, places_BM: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, places_BM.reshape(*places_BM.shape, *[1] * (x.ndim - 2)), axis=1)


arrange.defvjp(
    lambda x, order: (_take(x, order.order), order),
    lambda order, d: (_take(d, order.inverse), None),  # a permutation's transpose: no scatter
)


def restore(x_BMD: jax.Array, order: Order) -> jax.Array:
    """The inverse of `arrange`."""
    return arrange(x_BMD, Order(order.inverse, order.order))
