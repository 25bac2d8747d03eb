"""Attention over slabs: images of similar length side by side, so that each pays for its own length alone.

The segments of a group of rows, longest first, go to the slabs of its `Capacity`, [n, m] tokens each: dense attention
with masked keys in each slab costs sum(n m^2), about the same at any L. Which token goes where is derived once a step;
a layer gathers both ways, also in its backward pass, because scatters are slow.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline.capacity import Capacity
from navit_jax.attention import dense


class Places(NamedTuple):
    """Where tokens lie; Q groups of T = G * L tokens, S = sum(n * m) places in the slabs.

    tokens: [Q, S] int32, the token of each place, T where there is none. places: [Q, T] int32, the reverse, S for
    padding. ids: of each slab [Q, n, m] int32, 0 where there is no token.
    """

    tokens_QS: jax.Array
    places_QT: jax.Array
    ids: tuple[jax.Array, ...]
