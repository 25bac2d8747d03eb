"""Orders in which other libraries keep the numbers of one axis, as changes for the rules of `mapping`.

What a linear map sums over, or what only meets itself (the numbers of a query's and a key's head), may lie in any order
if all that touches it agrees; so a foreign order costs nothing at run time: it is undone once, on import.
"""

import numpy as np

from navit_jax.weights.mapping import Change


def channels_last(patch: int, channels: int) -> dict[str, Change]:
    """`then` and `back` for a first axis of flat patches that they keep as (channel, row, column)."""
    return _along(0, np.arange(patch * patch * channels).reshape(channels, -1).T.ravel())


def rope_pairs(head: int, *, half: bool, x_first: bool = False) -> dict[str, Change]:
    """`then` and `back` for a last axis of head numbers, from another rotary layout to that of `positions.rotate`.

    half False: the number 2 i turns with 2 i + 1, first all of y, then all of x. half True: i turns with i + head / 2,
    and either half has first y, then x. x_first: x where the above says y.
    """
    quarter = head // 4
    if half:  # [part, axis, i] there, [axis, part, i] here
        yx = np.arange(head).reshape(2, 2, quarter).swapaxes(0, 1)
    else:  # [axis, i, part] there
        yx = np.arange(head).reshape(2, quarter, 2).swapaxes(1, 2)
    return _along(-1, (yx[::-1] if x_first else yx).ravel())


def _along(axis: int, order: np.ndarray) -> dict[str, Change]:
    """There, number order[i] is our number i."""
    back = np.argsort(order)
    return dict(then=lambda x: np.take(x, order, axis), back=lambda x: np.take(x, back, axis))
