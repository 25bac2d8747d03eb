"""What XLA's CPU compiler has to be told; on other devices these are what their names say and nothing else."""

import jax
import jax.numpy as jnp


def pin(x: jax.Array) -> jax.Array:
    """x as it is, computed once and not folded into what uses it: a transpose into the product next to it, a function
    into two places that are far apart."""
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def sum_rows(x: jax.Array) -> jax.Array:
    """Sums over the last axis, which stays: [..., n] -> [..., 1].

    The CPU's library sums, and computes all that is fused to a sum, on one thread: there this is a product with ones,
    which makes the backward pass of a norm two to four times as fast.
    """
    return jax.lax.platform_dependent(
        x, cpu=lambda x: x @ jnp.ones((x.shape[-1], 1), x.dtype), default=lambda x: x.sum(-1, keepdims=True)
    )
