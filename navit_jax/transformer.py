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
from navit_jax import attention, layers, positions, sharding
from navit_jax.attention import Groups

REMAT = {  # what the backward pass is given, from the most memory to the least
    "none": None,  # all that it asks for
    "light": jax.checkpoint_policies.save_from_both_policies(  # no product with weights is computed twice
        jax.checkpoint_policies.save_only_these_names(
            "q", "k", "v", *attention.KEPT, "middle", "up", "gate", "moments"
        ),
        attention.kept,
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
    head_size: int = 0
    norm: str = "layer"
    norm_eps: float = 1e-6
    mlp: str = "gelu_tanh"
    qk_norm: bool = True
    qk_rms: bool = False
    layer_scale: float = 0.0
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
        if not self.head_size and self.width % self.heads:
            raise UserError(f"model.width {self.width} does not divide into {self.heads} heads: change width or heads")
        for field in ("dropout", "stochastic_depth"):
            if not 0 <= getattr(self, field) < 1:
                raise UserError(f"model.{field} is {getattr(self, field)}; it must be in [0, 1)")
        for field, known in (("remat", REMAT), ("dtype", DTYPES), ("norm", layers.NORMS), ("mlp", layers.MLPS)):
            if getattr(self, field) not in known:
                raise UserError(f"model.{field} is {getattr(self, field)!r}; it must be one of {', '.join(known)}")
        attention.check(self.attention)

    @property
    def head_dim(self) -> int:
        return self.head_size or self.width // self.heads

    def make_norm(self, width: int) -> layers.Norm:
        """A norm over `width` numbers, of this encoder's kind."""
        return layers.Norm(width, kind=self.norm, eps=self.norm_eps, bias=self.bias)

    def make_qk_norm(self) -> layers.Norm | None:
        """The norm of queries or keys over a head's numbers; None without."""
        if not self.qk_norm:
            return None
        if self.qk_rms:  # the eps of a vector divided by its length
            return layers.Norm(self.heads, self.head_dim, kind="rms", eps=1e-12, bias=False)
        return self.make_norm(self.head_dim)

    @property
    def compute_dtype(self) -> jnp.dtype:
        """What the layers compute in: 'auto' is bfloat16 on accelerators, float32 on a CPU, where bfloat16 is slow."""
        name = self.dtype if self.dtype != "auto" else "float32" if jax.default_backend() == "cpu" else "bfloat16"
        return jnp.dtype(name)


class Attention(nnx.Module):
    """Self-attention within groups; queries and keys are normalised as in ViT-22B (2302.05442), then turned by rope."""

    def __init__(self, cfg: EncoderConfig, *, rngs: nnx.Rngs):
        heads = (cfg.heads, cfg.head_dim)
        dense = partial(layers.Dense, bias=cfg.bias, dtype=cfg.compute_dtype, rngs=rngs)
        self.q, self.k, self.v = (dense((cfg.width,), heads) for _ in range(3))
        self.out = dense(heads, (cfg.width,))
        self.q_norm, self.k_norm = cfg.make_qk_norm(), cfg.make_qk_norm()

    def __call__(self, x_BLD: jax.Array, groups: Groups, rope: tuple[jax.Array, jax.Array] | None) -> jax.Array:
        q_BLNH, k_BLNH, v_BLNH = (keep(f(x_BLD), name) for name, f in (("q", self.q), ("k", self.k), ("v", self.v)))
        if self.q_norm is not None:
            q_BLNH, k_BLNH = self.q_norm(q_BLNH), self.k_norm(k_BLNH)
        if rope is not None:
            q_BLNH, k_BLNH = positions.rotate(q_BLNH, rope), positions.rotate(k_BLNH, rope)
        return self.out(attention.attend(q_BLNH, k_BLNH, v_BLNH, groups))


class Block(nnx.Module):
    """x + attn(norm(x)), then x + mlp(norm(x)); with layer scale (2103.17239) each branch times a learned vector."""

    def __init__(self, cfg: EncoderConfig, *, rngs: nnx.Rngs):
        self.attn_norm, self.mlp_norm = cfg.make_norm(cfg.width), cfg.make_norm(cfg.width)
        self.attn = Attention(cfg, rngs=rngs)
        self.mlp = layers.Mlp(cfg.width, cfg.mlp_dim, bias=cfg.bias, dtype=cfg.compute_dtype, rngs=rngs, kind=cfg.mlp)
        if cfg.layer_scale:
            self.attn_scale, self.mlp_scale = (nnx.Param(jnp.full(cfg.width, cfg.layer_scale)) for _ in range(2))
        else:
            self.attn_scale = self.mlp_scale = None

    def __call__(self, x_BLD: jax.Array, groups: Groups, rope: tuple | None, branch: Callable) -> jax.Array:
        """branch(y_BLD, i) is what reaches the residual of branch i: y, or y after dropout and stochastic depth."""
        y_BLD = _scaled(self.attn(self.attn_norm(x_BLD), groups, rope), self.attn_scale)
        x_BLD = keep(x_BLD + branch(y_BLD, 0), "middle")
        return x_BLD + branch(_scaled(self.mlp(self.mlp_norm(x_BLD)), self.mlp_scale), 1)


def _scaled(y_BLD: jax.Array, scale: nnx.Param | None) -> jax.Array:
    return y_BLD if scale is None else y_BLD * scale.astype(y_BLD.dtype)


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
    windows: Groups | None = None,
    full_blocks: tuple[int, ...] = (),
) -> jax.Array:
    """Runs stacked blocks over [B, L, D]; groups' ids are 1..slots; key None: no dropout and no stochastic depth.

    rope: sine and cosine of `positions.rope`. Stochastic depth drops a branch for whole images, not for whole rows, at
    a rate that grows linearly from 0 to cfg.stochastic_depth over the layers. windows: what tokens see in all blocks
    but the `full_blocks`.
    """
    graphdef, params = nnx.split(blocks)
    random = key is not None and (cfg.dropout > 0 or cfg.stochastic_depth > 0)
    keys = jax.random.split(key, cfg.depth) if random else None
    rates = jnp.linspace(0.0, cfg.stochastic_depth, cfg.depth)

    full = [windows is None or i in full_blocks for i in range(cfg.depth)]
    mixed = len(set(full)) == 2

    def layer(x_BLD: jax.Array, xs: tuple) -> tuple[jax.Array, None]:
        params, key, rate, is_full = xs

        def branch(y_BLD: jax.Array, i: int) -> jax.Array:
            if key is None:
                return y_BLD
            drop_key, depth_key = jax.random.split(jax.random.fold_in(key, i))
            y_BLD = layers.dropout(y_BLD, cfg.dropout, drop_key)
            return drop_images(y_BLD, groups.ids_BL, slots, rate, depth_key) if cfg.stochastic_depth else y_BLD

        seen = attention.Either(is_full, groups, windows) if mixed else groups if full[0] else windows
        x_BLD = sharding.constrain(x_BLD, "BLD")
        return nnx.merge(graphdef, params)(x_BLD, seen, rope, branch), None

    if REMAT[cfg.remat] is not None:
        layer = jax.checkpoint(layer, policy=REMAT[cfg.remat], prevent_cse=False)
    return jax.lax.scan(layer, x_BLD, (params, keys, rates, jnp.asarray(full) if mixed else None))[0]


def flops_encode(cfg: EncoderConfig, lengths: np.ndarray, pairs: float | None = None) -> float:
    """Useful matrix FLOPs (a multiply-add is 2) of the blocks over groups of these many tokens.

    pairs: of a query and a key that it sees, over all blocks; None: every token sees its whole group in each.
    """
    inner = cfg.heads * cfg.head_dim
    linear = 2 * cfg.width * (4 * inner + (3 if cfg.mlp == "swiglu" else 2) * cfg.mlp_dim)
    pairs = cfg.depth * np.square(lengths).sum() if pairs is None else pairs
    return float(cfg.depth * lengths.sum() * linear + 4 * inner * pairs)


def drop_images(y_BLD: jax.Array, ids_BL: jax.Array, slots: int, rate: jax.Array, key: jax.Array) -> jax.Array:
    """Zeroes y for each (row, slot) with probability `rate` and scales the others by 1 / (1 - rate)."""
    keep_BK = jax.random.bernoulli(key, 1 - rate, (ids_BL.shape[0], slots))
    keep_BL = jnp.take_along_axis(keep_BK, jnp.maximum(ids_BL - 1, 0), axis=1)
    return y_BLD * (keep_BL / (1 - rate)).astype(y_BLD.dtype)[..., None]
