"""Self-attention inside groups of tokens: one function, and the readable rule that picks its backend.

Callers pass groups, not a mask: a dense mask is L x L a row and hides which tokens lie together, which is what a faster
backend lives on. Group metadata is made once a step, outside the layers.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from input_pipeline.errors import UserError
from navit_jax.attention import dense

BACKENDS = {"dense": dense.attend}


@partial(jax.tree_util.register_dataclass, data_fields=["ids_BL"], meta_fields=["contiguous"])
@dataclass(frozen=True)
class Groups:
    """Which tokens see each other: those of a row with the same id; id 0 is padding.

    ids_BL: [B, L] int32. contiguous: the tokens of a group lie side by side and ids ascend (static under jit).
    """

    ids_BL: jax.Array
    contiguous: bool


def make_groups(ids_BL: jax.Array, contiguous: bool = True) -> Groups:
    """Groups of a step's rows, made once and used by every layer; ids_BL: [B, L] integers, 0 = padding."""
    return Groups(jnp.asarray(ids_BL, jnp.int32), contiguous)


def choose(backend: str = "auto") -> str:
    """Name of the backend that will run: 'auto' is dense, the only one so far. Raises UserError for an unknown name."""
    name = "dense" if backend == "auto" else backend
    if name not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise UserError(f"unknown attention backend {backend!r}; there are {known}: set model.attention to one of them")
    return name


def attend(
    q_BLNH: jax.Array, k_BLNH: jax.Array, v_BLNH: jax.Array, groups: Groups, *, backend: str = "auto"
) -> jax.Array:
    """Self-attention within groups; padding (id 0) attends to nothing and returns 0.

    q, k, v: [B, L, N, H], any one float dtype, logits scaled by 1/sqrt(H); logits and softmax are float32.
    Returns [B, L, N, H] in that dtype. Raises UserError for an unknown backend.
    Source: Dehghani et al. 2023 (NaViT), section 2.1.
    """
    return BACKENDS[choose(backend)](q_BLNH, k_BLNH, v_BLNH, groups.ids_BL)
