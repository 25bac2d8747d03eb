"""NaViT: packed patches in, one vector or one row of logits per image out; and what goes with it: sizes, init, FLOPs.

Training code sees a model as (graphdef, parameters): a hashable description and a plain nested dict of float32 arrays,
so `jax.jit`, checkpoints and rules over parameter paths need to know nothing of modules.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from input_pipeline.errors import UserError
from input_pipeline.packed import Packed
from navit_jax import arrangement, layers, pooling, positions, sharding, transformer
from navit_jax.patch_embed import PatchEmbed

SIZES = {  # width, depth, heads, mlp_dim
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "So400m": (1152, 27, 16, 4304),
    "g": (1408, 40, 16, 6144),
}
PATCH_SIZES = (8, 14, 16, 32)
OVERRIDES = ("width", "depth", "heads", "mlp_dim", "patch_size")  # 0: the variant's


@dataclass(frozen=True, kw_only=True)
class NaViTConfig(transformer.EncoderConfig, positions.PositionConfig):
    """Everything that shapes a model; UserError where fields contradict each other. num_classes 0: no head."""

    patch_size: int
    channels: int = 3
    num_classes: int = 0
    head_bias: float = 0.0  # initial: -log(C) with a sigmoid loss, or the first steps only learn that most are absent
    stored_patch_size: int = 0
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    embed_norm: str = "none"
    pool: str = "map"
    registers: int = 0
    norm_tokens: bool = True
    norm_pooled: bool = False
    pre_logits: int = 0

    def __post_init__(self):
        super().__post_init__()
        self.check_positions(self.width, self.head_dim)
        for field, known in (("pool", pooling.KINDS), ("embed_norm", ("none", "after", "both", "entry"))):
            if getattr(self, field) not in known:
                raise UserError(f"model.{field} is {getattr(self, field)!r}; it must be one of {', '.join(known)}")
        for field in ("patch_size", "channels"):
            if getattr(self, field) < 1:
                raise UserError(f"model.{field} is {getattr(self, field)}; it must be at least 1")
        for field in ("registers", "stored_patch_size", "num_classes", "pre_logits"):
            if getattr(self, field) < 0:
                raise UserError(f"model.{field} is {getattr(self, field)}; it must not be negative")
        if self.pool == "first" and not self.registers:
            raise UserError("model.pool is 'first', the first register, and model.registers is 0; set it to 1 or more")
        for field in ("mean", "std"):
            if len(getattr(self, field)) not in (1, self.channels):
                raise UserError(
                    f"model.{field} is {getattr(self, field)}; expected one number, or one for each of the "
                    f"{self.channels} channels"
                )
        if min(self.std) <= 0:
            raise UserError(f"model.std is {self.std}; expected numbers above 0")


CONFIG_FIELDS = tuple(  # of configs.base.model, taken over as they are
    field.name
    for field in fields(NaViTConfig)
    if field.name not in (*OVERRIDES, "channels", "num_classes", "head_bias")
)


def variant(name: str) -> dict[str, int]:
    """Sizes of a variant such as 'B/16': width, depth, heads, mlp_dim, patch_size. UserError for an unknown name."""
    size, _, patch = name.partition("/")
    if size not in SIZES or patch not in map(str, PATCH_SIZES):
        patches = ", ".join(f"/{p}" for p in PATCH_SIZES)
        raise UserError(f"unknown model.variant {name!r}; write one of {', '.join(SIZES)} and one of {patches}: 'B/16'")
    return dict(zip(("width", "depth", "heads", "mlp_dim"), SIZES[size])) | {"patch_size": int(patch)}


def from_config(model: ConfigDict | Mapping, *, channels: int, num_classes: int, head_bias: float = 0.0) -> NaViTConfig:
    """The model that `configs.base.model` describes; its sizes and patch size override the variant's where not 0.

    Raises UserError for an unknown variant and for sizes that do not fit together.
    """
    sizes = variant(model["variant"]) | {name: model[name] for name in OVERRIDES if model[name]}
    shared = {name: tuple(x) if isinstance(x := model[name], list) else x for name in CONFIG_FIELDS}
    return NaViTConfig(**sizes, **shared, channels=channels, num_classes=num_classes, head_bias=head_bias)


def for_classes(config: ConfigDict, classes: int) -> tuple[NaViTConfig, nnx.GraphDef, dict]:
    """(model, graphdef, parameter shapes) of a run's whole config, whose loss decides the head's first bias."""
    head_bias = -float(np.log(classes)) if config.loss.kind == "sigmoid" else 0.0
    model = from_config(config.model, channels=config.data.channels, num_classes=classes, head_bias=head_bias)
    return model, *abstract(model)


class NaViT(nnx.Module):
    """Patch embedding, positions, encoder, pooling, head. Source: Dehghani et al. 2023 (2307.06304)."""

    def __init__(self, cfg: NaViTConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        stored, dtype = cfg.stored_patch_size, cfg.compute_dtype
        self.embed = PatchEmbed(
            cfg.patch_size,
            cfg.channels,
            cfg.width,
            stored=stored,
            bias=cfg.bias,
            dtype=dtype,
            rngs=rngs,
            mean=cfg.mean,
            std=cfg.std,
            norm_in=cfg.make_norm(cfg.patch_size**2 * cfg.channels) if cfg.embed_norm == "both" else None,
            norm_out=cfg.make_norm(cfg.width) if cfg.embed_norm in ("after", "both") else None,
        )
        if cfg.posemb not in ("rope", "none"):
            self.posemb = positions.PositionEmbedding(cfg, cfg.width, rngs=rngs)
        if cfg.registers:
            init = jax.nn.initializers.normal(0.02)
            self.registers = nnx.Param(init(rngs.params(), (cfg.registers, cfg.width), jnp.float32))
        if cfg.embed_norm == "entry":
            self.entry_norm = cfg.make_norm(cfg.width)
        self.blocks = transformer.stack_blocks(cfg, rngs=rngs)
        if cfg.norm_tokens:
            self.norm = cfg.make_norm(cfg.width)
        if cfg.pool in ("map", "query"):
            self.pool = (pooling.MapPool if cfg.pool == "map" else pooling.QueryPool)(cfg, rngs=rngs)
        if cfg.norm_pooled:
            self.pool_norm = cfg.make_norm(cfg.width)
        dense = partial(layers.Dense, bias=True, dtype=jnp.float32, rngs=rngs)
        if cfg.pre_logits:
            self.pre_logits = dense((cfg.width,), (cfg.pre_logits,))
        if cfg.num_classes:
            ins, outs, zeros = (cfg.pre_logits or cfg.width,), (cfg.num_classes,), jax.nn.initializers.zeros
            self.head = dense(ins, outs, init=zeros)
            self.head.bias[...] = jnp.full(outs, cfg.head_bias, jnp.float32)  # a weak type would compile the step twice

    def tokens(self, images: Packed, *, key: jax.Array | None = None) -> jax.Array:
        """Encoded tokens after the last norm, [B, L, D] in the compute dtype; those of padding mean nothing.

        key: for dropout and stochastic depth; None is deterministic.
        """
        return self._encode(images, key)[0]

    def __call__(self, images: Packed, *, key: jax.Array | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Logits [B, K, C] float32 of every slot, and {"pooled": [B, K, D] float32}; pooled of an empty slot is 0.

        Without a head (num_classes 0) the logits are the pooled vectors. key: as in `tokens`.
        """
        x_BLD, registers_BKRD = self._encode(images, key)
        x_BLD, slots = sharding.constrain(x_BLD, "BLD"), images.grids.shape[1]
        pooled_BKD = sharding.constrain(self._pool(x_BLD, registers_BKRD, images.segment_ids, slots), "BKD")
        logits_BKC = jnp.tanh(self.pre_logits(pooled_BKD)) if self.cfg.pre_logits else pooled_BKD
        return self.head(logits_BKC) if self.cfg.num_classes else logits_BKC, {"pooled": pooled_BKD}

    def _encode(self, images: Packed, key: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """Patches [B, L, D] and registers [B, K, R, D] (None without) behind the last norm."""
        cfg, slots, length = self.cfg, images.grids.shape[1], images.segment_ids.shape[1]
        embed_key, blocks_key = (None, None) if key is None else jax.random.split(key)
        x_BLD = sharding.constrain(self.embed(images.values), "BLD")
        sides_BL2 = positions.token_sides(images.segment_ids, images.grids)
        if cfg.posemb not in ("rope", "none"):
            x_BLD = x_BLD + self.posemb(images.coords, sides_BL2).astype(x_BLD.dtype)
        rope = positions.rope(cfg, images.coords, sides_BL2, cfg.head_dim) if cfg.posemb == "rope" else None
        x_BLD = layers.dropout(x_BLD, cfg.dropout, embed_key)
        ids_BL, capacity = images.segment_ids, images.capacity
        if cfg.registers:
            x_BLD, rope = self._append_registers(x_BLD, rope, slots)
            order, ids_BL = arrangement.with_registers(ids_BL, slots, cfg.registers)
            x_BLD, rope = (jax.tree.map(lambda x: arrangement.arrange(x, order), x) for x in (x_BLD, rope))
            capacity = capacity and capacity.longer(cfg.registers)
        x_BLD = self.entry_norm(x_BLD) if cfg.embed_norm == "entry" else x_BLD
        groups = transformer.make_groups(cfg, ids_BL, capacity, contiguous=True)
        x_BLD = transformer.encode(cfg, self.blocks, x_BLD, groups, slots=slots, rope=rope, key=blocks_key)
        x_BLD = self.norm(x_BLD) if cfg.norm_tokens else x_BLD
        if not cfg.registers:
            return x_BLD, None
        x_BLD = arrangement.restore(x_BLD, order)
        return x_BLD[:, :length], x_BLD[:, length:].reshape(x_BLD.shape[0], slots, cfg.registers, -1)

    def _pool(self, x_BLD: jax.Array, registers_BKRD: jax.Array | None, ids_BL: jax.Array, slots: int) -> jax.Array:
        """[B, K, D] float32; an empty slot is exactly 0."""
        if self.cfg.pool == "first":
            pooled_BKD = registers_BKRD[:, :, 0].astype(jnp.float32)
        else:
            pooled_BKD = (pooling.mean_pool if self.cfg.pool == "mean" else self.pool)(x_BLD, ids_BL, slots)
        if self.cfg.pool == "first" or self.cfg.norm_pooled:
            used_BK1 = pooling.membership(ids_BL, slots).any(-1)[..., None]
            pooled_BKD = jnp.where(used_BK1, self.pool_norm(pooled_BKD) if self.cfg.norm_pooled else pooled_BKD, 0)
        return pooled_BKD

    def _append_registers(self, x_BLD: jax.Array, rope: tuple | None, slots: int) -> tuple:
        """(patches and behind them R learned tokens for each slot, rope that does not turn those)."""
        rows_RD = jnp.tile(self.registers.astype(x_BLD.dtype), (slots, 1))
        x_BLD = jnp.concatenate([x_BLD, jnp.broadcast_to(rows_RD, (x_BLD.shape[0], *rows_RD.shape))], axis=1)
        if rope is not None:
            pad = [(0, 0), (0, len(rows_RD)), (0, 0), (0, 0), (0, 0)]
            rope = (jnp.pad(rope[0], pad), jnp.pad(rope[1], pad, constant_values=1.0))
        return x_BLD, rope


def split(model: nnx.Module) -> tuple[nnx.GraphDef, dict]:
    """(graphdef, parameters): a hashable description and a plain nested dict of arrays, as blocks/attn/q/kernel."""
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: nnx.GraphDef, params: dict) -> nnx.Module:
    """The inverse of `split`; also under jit, with tracers as parameters."""
    return nnx.merge(graphdef, params)


def abstract(cfg: NaViTConfig) -> tuple[nnx.GraphDef, dict]:
    """`split` of a model whose parameters are shapes only: nothing is computed or stored."""
    return split(nnx.eval_shape(lambda: NaViT(cfg, rngs=nnx.Rngs(0))))


def init_params(cfg: NaViTConfig, seed: int) -> dict:
    """Fresh parameters as a plain nested dict, made in one compiled call."""
    return _init(cfg, jax.random.key(seed))


@partial(jax.jit, static_argnums=0)
def _init(cfg: NaViTConfig, key: jax.Array) -> dict:
    return split(NaViT(cfg, rngs=nnx.Rngs(key)))[1]


def count_params(params: dict) -> int:
    """Number of scalars in a parameter dict, of arrays or of shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def flops_forward(cfg: NaViTConfig, lengths: Sequence[int] | np.ndarray) -> float:
    """Useful matrix FLOPs (a multiply-add is 2) of one forward pass over images with these token counts.

    Padding, masked logits and position tables are no use and not counted; a training step is three times as much.
    """
    n = np.asarray(lengths, np.float64)
    patches = n.sum() * 2 * cfg.patch_size**2 * cfg.channels * cfg.width
    last = cfg.pre_logits or cfg.width
    head = n.size * 2 * (cfg.width * cfg.pre_logits + last * cfg.num_classes)
    encoder = transformer.flops_encode(cfg, n + cfg.registers)
    return float(patches + encoder + pooling.flops_pool(cfg, cfg.pool, n) + head)
