"""The encoder: one pre-norm block, stacked over depth and run by a scan, so that 12 layers compile like one.

Modules hold no rng state; a call gets a key, or None to be deterministic. A scan stacks whatever the backward pass is
given, one copy a layer, so a layer names what it keeps and recomputes the rest, all of it element by element: a step of
a Ti over 6144 tokens takes 719 MiB of temporaries that way instead of 1325, in the same time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name as keep

from input_pipeline.capacity import Capacity
from input_pipeline.errors import UserError
from navit_jax import attention, positions, sharding
from navit_jax.attention import Groups

REMAT = {  # what the backward pass is given, from the most memory to the least
    "none": None,  # all that it asks for
    "light": jax.checkpoint_policies.save_from_both_policies(  # no product with weights is computed twice
        jax.checkpoint_policies.save_only_these_names("q", "k", "v", *attention.KEPT, "middle", "up"), attention.kept
    ),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keeps the products with weights
    "full": jax.checkpoint_policies.nothing_saveable,
}
DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Sizes and switches of an encoder, as in `configs.base.model`; UserError where they cannot work."""

    width: int
    depth: int
    heads: int
    mlp_dim: int
    qk_norm: bool = True
    bias: bool = False
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    remat: str = "light"
    dtype: str = "auto"
    attention: str = "auto"

    def __post_init__(self):
        for field in ("width", "depth", "heads", "mlp_dim"):
            if getattr(self, field) < 1:
                raise UserError(f"model.{field} is {getattr(self, field)}; it must be at least 1")
        if self.width % self.heads:
            raise UserError(f"model.width {self.width} does not divide into {self.heads} heads: change width or heads")
        for field in ("dropout", "stochastic_depth"):
            if not 0 <= getattr(self, field) < 1:
                raise UserError(f"model.{field} is {getattr(self, field)}; it must be in [0, 1)")
        for field, known in (("remat", REMAT), ("dtype", DTYPES)):
            if getattr(self, field) not in known:
                raise UserError(f"model.{field} is {getattr(self, field)!r}; it must be one of {', '.join(known)}")
        attention.check(self.attention)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def compute_dtype(self) -> jnp.dtype:
        """What the layers compute in: 'auto' is bfloat16 on accelerators, float32 on a CPU, where bfloat16 is slow."""
        name = self.dtype if self.dtype != "auto" else "float32" if jax.default_backend() == "cpu" else "bfloat16"
        return jnp.dtype(name)


class Dense(nnx.Module):
    """A linear map over the last axes, [..., *ins] -> [..., *outs], in `dtype`; kernel [*ins, *outs] float32."""

    def __init__(
        self,
        ins: tuple[int, ...],
        outs: tuple[int, ...],
        *,
        bias: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        init: Callable = jax.nn.initializers.xavier_uniform(),  # noqa: B008
    ):
        self.ins, self.outs, self.dtype = ins, outs, dtype
        flat = init(rngs.params(), (int(np.prod(ins)), int(np.prod(outs))), jnp.float32)
        self.kernel = nnx.Param(flat.reshape(*ins, *outs))
        self.bias = nnx.Param(jnp.zeros(outs)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        lead = x.shape[: x.ndim - len(self.ins)]
        kernel = self.kernel.astype(self.dtype).reshape(int(np.prod(self.ins)), -1)
        y = (x.astype(self.dtype).reshape(-1, kernel.shape[0]) @ kernel).reshape(*lead, *self.outs)
        return y if self.bias is None else y + self.bias.astype(self.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis in float32, eps 1e-6; returns the input's dtype."""

    def __init__(self, width: int, *, bias: bool):
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = _scaled_norm(x, self.scale[...])
        return y if self.bias is None else (y + self.bias[...]).astype(x.dtype)


def _scaled_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    centred = x.astype(jnp.float32)
    centred = centred - centred.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6)
    return (centred * inverse * scale).astype(x.dtype)


class Mlp(nnx.Module):
    """up, tanh GELU, down."""

    def __init__(self, width: int, mlp_dim: int, *, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.up = Dense((width,), (mlp_dim,), bias=bias, dtype=dtype, rngs=rngs)
        self.down = Dense((mlp_dim,), (width,), bias=bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(_gelu(keep(self.up(x), "up")))


@jax.custom_vjp
def _gelu(x: jax.Array) -> jax.Array:
    """With tanh. JAX's own gradient of it passes over the [B, L, F] array three times on a CPU, this one once."""
    return jax.nn.gelu(x, approximate=True)


def _gelu_backward(x: jax.Array, d: jax.Array) -> tuple[jax.Array]:
    scale = np.sqrt(2 / np.pi).astype(np.float32)
    wide = x.astype(jnp.float32)
    tanh = jnp.tanh(scale * (wide + 0.044715 * wide**3))
    slope = 0.5 * (1 + tanh) + 0.5 * wide * (1 - tanh * tanh) * scale * (1 + 3 * 0.044715 * wide * wide)
    return ((d * slope).astype(x.dtype),)


_gelu.defvjp(lambda x: (_gelu(x), x), _gelu_backward)


class Attention(nnx.Module):
    """Self-attention within groups; queries and keys are normalised as in ViT-22B (2302.05442), then turned by rope."""

    def __init__(self, cfg: EncoderConfig, *, rngs: nnx.Rngs):
        heads = (cfg.heads, cfg.width // cfg.heads)
        dense = partial(Dense, bias=cfg.bias, dtype=cfg.compute_dtype, rngs=rngs)
        self.q, self.k, self.v = (dense((cfg.width,), heads) for _ in range(3))
        self.out = dense(heads, (cfg.width,))
        self.q_norm, self.k_norm = (LayerNorm(heads[1], bias=cfg.bias) if cfg.qk_norm else None for _ in range(2))

    def __call__(self, x_BLD: jax.Array, groups: Groups, rope: tuple[jax.Array, jax.Array] | None) -> jax.Array:
        q_BLNH, k_BLNH, v_BLNH = (keep(f(x_BLD), name) for name, f in (("q", self.q), ("k", self.k), ("v", self.v)))
        if self.q_norm is not None:
            q_BLNH, k_BLNH = self.q_norm(q_BLNH), self.k_norm(k_BLNH)
        if rope is not None:
            q_BLNH, k_BLNH = positions.rotate(q_BLNH, rope), positions.rotate(k_BLNH, rope)
        return self.out(attention.attend(q_BLNH, k_BLNH, v_BLNH, groups))


class Block(nnx.Module):
    """x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, cfg: EncoderConfig, *, rngs: nnx.Rngs):
        self.attn_norm, self.mlp_norm = (LayerNorm(cfg.width, bias=cfg.bias) for _ in range(2))
        self.attn = Attention(cfg, rngs=rngs)
        self.mlp = Mlp(cfg.width, cfg.mlp_dim, bias=cfg.bias, dtype=cfg.compute_dtype, rngs=rngs)

    def __call__(self, x_BLD: jax.Array, groups: Groups, rope: tuple | None, branch: Callable) -> jax.Array:
        """branch(y_BLD, i) is what reaches the residual of branch i: y, or y after dropout and stochastic depth."""
        x_BLD = keep(x_BLD + branch(self.attn(self.attn_norm(x_BLD), groups, rope), 0), "middle")
        return x_BLD + branch(self.mlp(self.mlp_norm(x_BLD)), 1)


def make_groups(cfg: EncoderConfig, ids_BL: jax.Array, capacity: Capacity | None, *, contiguous: bool) -> Groups:
    """`attention.make_groups` with the backend, head size and dtype of this encoder."""
    return attention.make_groups(
        ids_BL,
        contiguous=contiguous,
        capacity=capacity,
        backend=cfg.attention,
        head_dim=cfg.head_dim,
        dtype=cfg.compute_dtype,
    )


def stack_blocks(cfg: EncoderConfig, *, rngs: nnx.Rngs) -> Block:
    """`depth` blocks as one module whose parameters have a leading axis of layers."""

    @nnx.split_rngs(splits=cfg.depth)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs: nnx.Rngs) -> Block:
        return Block(cfg, rngs=rngs)

    return make(rngs)


def encode(
    cfg: EncoderConfig,
    blocks: Block,
    x_BLD: jax.Array,
    groups: Groups,
    *,
    slots: int,
    rope: tuple[jax.Array, jax.Array] | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Runs stacked blocks over [B, L, D]; groups' ids are 1..slots; key None: no dropout and no stochastic depth.

    rope: sine and cosine of `positions.rope`. Stochastic depth drops a branch for whole images, not for whole rows, at
    a rate that grows linearly from 0 to cfg.stochastic_depth over the layers.
    """
    graphdef, params = nnx.split(blocks)
    random = key is not None and (cfg.dropout > 0 or cfg.stochastic_depth > 0)
    keys = jax.random.split(key, cfg.depth) if random else None
    rates = jnp.linspace(0.0, cfg.stochastic_depth, cfg.depth)

    def layer(x_BLD: jax.Array, xs: tuple) -> tuple[jax.Array, None]:
        params, key, rate = xs

        def branch(y_BLD: jax.Array, i: int) -> jax.Array:
            if key is None:
                return y_BLD
            drop_key, depth_key = jax.random.split(jax.random.fold_in(key, i))
            y_BLD = dropout(y_BLD, cfg.dropout, drop_key)
            return drop_images(y_BLD, groups.ids_BL, slots, rate, depth_key) if cfg.stochastic_depth else y_BLD

        x_BLD = sharding.constrain(x_BLD, "BLD")
        return nnx.merge(graphdef, params)(x_BLD, groups, rope, branch), None

    if REMAT[cfg.remat] is not None:
        layer = jax.checkpoint(layer, policy=REMAT[cfg.remat], prevent_cse=False)
    return jax.lax.scan(layer, x_BLD, (params, keys, rates))[0]


def flops_encode(cfg: EncoderConfig, lengths: np.ndarray) -> float:
    """Useful matrix FLOPs (a multiply-add is 2) of the blocks over groups of these many tokens."""
    linear = 2 * (4 * cfg.width**2 + 2 * cfg.width * cfg.mlp_dim)
    return float(cfg.depth * (lengths.sum() * linear + 4 * cfg.width * np.square(lengths).sum()))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each value with probability `rate` and scales the others by 1 / (1 - rate); key None: returns x."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def drop_images(y_BLD: jax.Array, ids_BL: jax.Array, slots: int, rate: jax.Array, key: jax.Array) -> jax.Array:
    """Zeroes y for each (row, slot) with probability `rate` and scales the others by 1 / (1 - rate)."""
    keep_BK = jax.random.bernoulli(key, 1 - rate, (ids_BL.shape[0], slots))
    keep_BL = jnp.take_along_axis(keep_BK, jnp.maximum(ids_BL - 1, 0), axis=1)
    return y_BLD * (keep_BL / (1 - rate)).astype(y_BLD.dtype)[..., None]
