"""Where the vector of an image comes from: the weights of its attention pooling, a number a token.

The model gives the logits and the host the softmax, over each image's tokens and then averaged over heads: so nothing
of it needs a mask, and the model's own pooling stays as it is.
"""

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline.errors import UserError
from input_pipeline.packed import Packed
from navit_jax import navit
from navit_jax.predict.rows import Place

POOLS = ("map", "query")


def check_heat(cfg: navit.NaViTConfig) -> None:
    """Raises UserError for a model whose vector is no weighted mean of its tokens."""
    if cfg.pool not in POOLS:
        other = {"mean": "its tokens all count alike", "first": "it reads a class token"}.get(cfg.pool, cfg.pool)
        raise UserError(
            f"a heat map shows the weights of attention pooling (model.pool {' or '.join(POOLS)}), which this model "
            f"does not have: {other}. Leave the heat map out."
        )


def heat_logits(model: navit.NaViT, images: Packed) -> jax.Array:
    """[B, L, N] float32: the logits of attention pooling, before their softmax over an image's tokens."""
    x_BLD, pool = model.tokens(images).astype(jnp.float32), model.pool
    if model.cfg.pool == "map":
        q_NH, k_BLNH = pool.q(pool.probe[...])[0], pool.k(x_BLD)
    else:
        q_NH, k_BLNH = pool.q(pool.norm(pool.query[...])), pool.k(x_BLD)
        if pool.q_norm is not None:
            q_NH, k_BLNH = pool.q_norm(q_NH), pool.k_norm(k_BLNH)
    return jnp.einsum("BLNH,NH->BLN", k_BLNH, q_NH * q_NH.shape[-1] ** -0.5)


def heat_of(arrays: list[np.ndarray], place: Place) -> np.ndarray:
    """[rows, columns] float32 that add up to 1, of one image."""
    logits_nN = np.asarray(arrays[0][place.row, place.start : place.stop], np.float64)
    weights_nN = np.exp(logits_nN - logits_nN.max(axis=0))
    weights_n = (weights_nN / weights_nN.sum(axis=0)).mean(axis=1)
    return weights_n.astype(np.float32).reshape(place.grid)
