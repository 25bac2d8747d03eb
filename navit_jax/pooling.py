"""One float32 vector per segment, an image or a text, for all of all rows at once, without a [B, N, K, L] array.

The query of attention pooling is the same for every segment, so its logits are [B, L, N] and only the sums differ: a
product with the [B, K, L] membership. For the same reason the key projection folds into the query, D * N operations a
token instead of D * D.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from navit_jax.layers import Dense, Mlp
from navit_jax.transformer import EncoderConfig

KINDS = ("map", "mean", "first", "query")  # first: the first register, a class token
TEXT_KINDS = ("last", "map", "mean")  # a tokenizer ends a text with a token of its own; an image has no such patch
EXACT = jax.lax.Precision.HIGHEST


def membership(segment_ids_BL: jax.Array, slots: int) -> jax.Array:
    """[B, K, L] bool: token l belongs to the segment of slot k (ids are 1..K)."""
    return segment_ids_BL[:, None, :] == jnp.arange(1, slots + 1)[None, :, None]


def flops_pool(cfg: EncoderConfig, kind: str, lengths: np.ndarray) -> float:
    """Useful matrix FLOPs (a multiply-add is 2) of pooling groups of these many tokens."""
    width, inner, tokens = cfg.width, cfg.heads * cfg.head_dim, lengths.sum()
    if kind == "map":
        each = 2 * (width * inner + 2 * width * cfg.mlp_dim)
        return float(tokens * 2 * (width * cfg.heads + width * inner + inner) + lengths.size * each)
    if kind == "query":
        return float(tokens * 2 * (2 * width * inner + 2 * inner) + lengths.size * 2 * width * inner)
    return float(tokens * 2 * width) if kind == "mean" else 0.0


def mean_pool(x_BLD: jax.Array, segment_ids_BL: jax.Array, slots: int) -> jax.Array:
    """[B, K, D] float32: the mean of each segment's tokens; an empty slot is exactly 0."""
    member_BKL = membership(segment_ids_BL, slots).astype(jnp.float32)
    total_BKD = jnp.matmul(member_BKL, x_BLD.astype(jnp.float32), precision=EXACT)
    return total_BKD / jnp.maximum(member_BKL.sum(-1, keepdims=True), 1)


def last_pool(x_BLD: jax.Array, segment_ids_BL: jax.Array, slots: int) -> jax.Array:
    """[B, K, D] float32: each segment's last token; an empty slot is exactly 0. Segments lie side by side."""
    next_BL = jnp.pad(segment_ids_BL[:, 1:], ((0, 0), (0, 1)))  # the row's end closes its last segment
    last_BL = segment_ids_BL != next_BL
    chosen_BKL = (membership(segment_ids_BL, slots) & last_BL[:, None]).astype(jnp.float32)
    return jnp.matmul(chosen_BKL, x_BLD.astype(jnp.float32), precision=EXACT)  # its gradient is no scatter


class MapPool(nnx.Module):
    """Attention pooling: y = out(attention(probe, tokens)), then y + mlp(norm(y)), as in big_vision's MAP head.

    The keys have no bias: the softmax would cancel it. Source: Zhai et al. 2022 (2106.04560), section 2.2.
    """

    def __init__(self, cfg: EncoderConfig, *, rngs: nnx.Rngs):
        heads = (cfg.heads, cfg.head_dim)
        dense = partial(Dense, dtype=jnp.float32, rngs=rngs)
        self.probe = nnx.Param(jax.nn.initializers.xavier_uniform()(rngs.params(), (1, cfg.width), jnp.float32))
        self.q = dense((cfg.width,), heads, bias=cfg.bias)
        self.k = dense((cfg.width,), heads, bias=False)
        self.v = Dense((cfg.width,), heads, bias=cfg.bias, dtype=cfg.compute_dtype, rngs=rngs)
        self.out = dense(heads, (cfg.width,), bias=cfg.bias)
        self.norm = cfg.make_norm(cfg.width)
        kind = "gelu_tanh" if cfg.mlp == "swiglu" else cfg.mlp
        self.mlp = Mlp(cfg.width, cfg.mlp_dim, bias=cfg.bias, dtype=jnp.float32, rngs=rngs, kind=kind)

    def __call__(self, x_BLD: jax.Array, segment_ids_BL: jax.Array, slots: int) -> jax.Array:
        """[B, K, D] float32 for ids 1..slots; an empty slot is exactly 0, with zero gradients."""
        q_NH = self.q(self.probe[...])[0] * self.q.outs[1] ** -0.5
        query_DN = jnp.einsum("DNH,NH->DN", self.k.kernel[...], q_NH)
        logits_BLN = jnp.einsum("BLD,DN->BLN", x_BLD.astype(jnp.float32), query_DN)
        member_BKL = membership(segment_ids_BL, slots)
        pooled_BKNH = _weighted_mean(logits_BLN, self.v(x_BLD), segment_ids_BL, member_BKL)
        y_BKD = self.out(pooled_BKNH)
        y_BKD = y_BKD + self.mlp(self.norm(y_BKD))
        return jnp.where(member_BKL.any(-1)[..., None], y_BKD, 0)


class QueryPool(nnx.Module):
    """One learned query attends to an image's tokens with normalised queries and keys, and is added to what it finds.

    The tokens themselves are not normalised again. Source: the attention pooling of NaViT in vit-pytorch and MONAI.
    """

    def __init__(self, cfg: EncoderConfig, *, rngs: nnx.Rngs):
        heads = (cfg.heads, cfg.head_dim)
        dense = partial(Dense, bias=cfg.bias, dtype=jnp.float32, rngs=rngs)
        self.query = nnx.Param(jax.random.normal(rngs.params(), (cfg.width,), jnp.float32))
        self.norm = cfg.make_norm(cfg.width)
        self.q, self.k, self.v = (dense((cfg.width,), heads) for _ in range(3))
        self.q_norm, self.k_norm = cfg.make_qk_norm(), cfg.make_qk_norm()
        self.out = dense(heads, (cfg.width,))

    def __call__(self, x_BLD: jax.Array, segment_ids_BL: jax.Array, slots: int) -> jax.Array:
        """[B, K, D] float32 for ids 1..slots; an empty slot is exactly 0, with zero gradients."""
        q_NH, k_BLNH = self.q(self.norm(self.query[...])), self.k(x_BLD)
        if self.q_norm is not None:
            q_NH, k_BLNH = self.q_norm(q_NH), self.k_norm(k_BLNH)
        logits_BLN = jnp.einsum("BLNH,NH->BLN", k_BLNH, q_NH * q_NH.shape[-1] ** -0.5)
        member_BKL = membership(segment_ids_BL, slots)
        y_BKD = self.out(_weighted_mean(logits_BLN, self.v(x_BLD), segment_ids_BL, member_BKL)) + self.query[...]
        return jnp.where(member_BKL.any(-1)[..., None], y_BKD, 0)


def _weighted_mean(
    logits_BLN: jax.Array, v_BLNH: jax.Array, segment_ids_BL: jax.Array, member_BKL: jax.Array
) -> jax.Array:
    """Softmax-weighted mean of v over each segment's tokens, [B, K, N, H] float32; 0 for an empty slot."""
    real_BL1 = (segment_ids_BL > 0)[..., None]
    slot_BL1 = jnp.maximum(segment_ids_BL - 1, 0)[..., None]
    fixed_BLN = jax.lax.stop_gradient(logits_BLN)  # the shift by the maximum changes no result, so no gradient
    top_BKN = jnp.where(member_BKL[..., None], fixed_BLN[:, None], -jnp.inf).max(axis=2)
    top_BLN = jnp.where(real_BL1, jnp.take_along_axis(top_BKN, slot_BL1, axis=1), fixed_BLN)
    weights_BLN = jnp.where(real_BL1, jnp.exp(logits_BLN - top_BLN), 0)
    member_BKL = member_BKL.astype(jnp.float32)
    weighted_BLD = (weights_BLN[..., None] * v_BLNH.astype(jnp.float32)).reshape(*v_BLNH.shape[:2], -1)
    total_BKD = jnp.matmul(member_BKL, weighted_BLD, precision=EXACT)
    weight_BKN = jnp.matmul(member_BKL, weights_BLN, precision=EXACT)
    total_BKNH = total_BKD.reshape(*total_BKD.shape[:2], *v_BLNH.shape[2:])
    return total_BKNH / jnp.where(weight_BKN > 0, weight_BKN, 1)[..., None]
