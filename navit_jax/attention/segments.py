"""Where each token's image begins and ends in its row, and which tiles of keys a tile of queries needs."""

import jax
import jax.numpy as jnp


def bounds(ids_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First and last position of each token's run of equal ids, [B, L] int32 each."""
    at_L = jnp.arange(ids_BL.shape[1], dtype=jnp.int32)
    new_BL = jnp.pad(ids_BL[:, 1:] != ids_BL[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    final_BL = jnp.pad(new_BL[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    first_BL = jax.lax.cummax(jnp.where(new_BL, at_L, 0), axis=1)
    last_BL = jax.lax.cummin(jnp.where(final_BL, at_L, at_L[-1]), axis=1, reverse=True)
    return first_BL, last_BL


def key_tiles(ids_BL: jax.Array, queries: int, keys: int) -> tuple[jax.Array, jax.Array]:
    """First tile of `keys` tokens that a tile of `queries` tokens sees, and how many; [B, L / queries] int32 each.

    ids: [B, L], contiguous, 0 = padding, L a multiple of `queries`. Tiles are counted within the row; a tile of nothing
    but padding has none of them, from 0.
    """
    rows, length = ids_BL.shape
    first_BL, last_BL = bounds(ids_BL)
    first_BT = jnp.where(ids_BL > 0, first_BL, length).reshape(rows, -1, queries).min(-1) // keys
    last_BT = jnp.where(ids_BL > 0, last_BL, -1).reshape(rows, -1, queries).max(-1) // keys
    some_BT = last_BT >= 0
    return jnp.where(some_BT, first_BT, 0), jnp.where(some_BT, last_BT - first_BT + 1, 0)
