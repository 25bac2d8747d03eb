"""NaViT: packed patches in, one vector or one row of logits per image out; and what goes with it: init, FLOPs.

Training code sees a model as (graphdef, parameters): a hashable description and a plain nested dict of float32 arrays,
so `jax.jit`, checkpoints and rules over parameter paths need to know nothing of modules.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from input_pipeline.capacity import Capacity
from input_pipeline.packed import Packed
from navit_jax import arrangement, attention, layers, merger, pooling, positions, sharding, transformer
from navit_jax.navit_config import CONFIG_FIELDS, OVERRIDES, NaViTConfig, from_config, variant  # noqa: F401
from navit_jax.patch_embed import PatchEmbed


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
        if cfg.merge:
            self.merger = merger.Merger(cfg, cfg.merge, rngs=rngs)
        if cfg.pool in ("map", "query"):
            self.pool = (pooling.MapPool if cfg.pool == "map" else pooling.QueryPool)(cfg, rngs=rngs)
        if cfg.norm_pooled:
            self.pool_norm = cfg.make_norm(cfg.token_width)
        dense = partial(layers.Dense, bias=True, dtype=jnp.float32, rngs=rngs)
        if cfg.pre_logits:
            self.pre_logits = dense((cfg.token_width,), (cfg.pre_logits,))
        if cfg.num_classes:
            ins, outs, zeros = (cfg.pre_logits or cfg.token_width,), (cfg.num_classes,), jax.nn.initializers.zeros
            self.head = dense(ins, outs, init=zeros)
            self.head.bias[...] = jnp.full(outs, cfg.head_bias, jnp.float32)  # a weak type would compile the step twice

    def tokens(self, images: Packed, *, key: jax.Array | None = None) -> jax.Array:
        """Encoded tokens after the last norm, [B, L, D] in the compute dtype; those of padding mean nothing.

        With cfg.merge the merged ones, [B, ceil(L / 4), cfg.merge]: an image's, row by row of its halved grid, where a
        quarter of its patches' places is. key: for dropout and stochastic depth; None is deterministic.
        """
        return self._encode(images, key)[0]

    def __call__(self, images: Packed, *, key: jax.Array | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Logits [B, K, C] float32 of every slot, and {"pooled": [B, K, D] float32}; pooled of an empty slot is 0.

        Without a head (num_classes 0) the logits are the pooled vectors. key: as in `tokens`.
        """
        x_BLD, ids_BL, registers_BKRD = self._encode(images, key)
        x_BLD, slots = sharding.constrain(x_BLD, "BLD"), images.grids.shape[1]
        pooled_BKD = sharding.constrain(self._pool(x_BLD, registers_BKRD, ids_BL, slots), "BKD")
        logits_BKC = jnp.tanh(self.pre_logits(pooled_BKD)) if self.cfg.pre_logits else pooled_BKD
        return self.head(logits_BKC) if self.cfg.num_classes else logits_BKC, {"pooled": pooled_BKD}

    def _encode(self, images: Packed, key: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Tokens [B, L, D] behind the last norm or the merger, their ids, and registers [B, K, R, D] (None without)."""
        cfg, slots, length = self.cfg, images.grids.shape[1], images.segment_ids.shape[1]
        embed_key, blocks_key = (None, None) if key is None else jax.random.split(key)
        x_BLD = sharding.constrain(self.embed(images.values), "BLD")
        sides_BL2 = positions.token_sides(images.segment_ids, images.grids)
        if cfg.posemb not in ("rope", "none"):
            x_BLD = x_BLD + self.posemb(images.coords, sides_BL2).astype(x_BLD.dtype)
        rope = positions.rope(cfg, images.coords, sides_BL2, cfg.head_dim) if cfg.posemb == "rope" else None
        x_BLD = layers.dropout(x_BLD, cfg.dropout, embed_key)
        if cfg.registers:
            x_BLD, rope = self._append_registers(x_BLD, rope, slots)
        windows_BL = arrangement.squares(images.coords, sides_BL2, cfg.window) if cfg.window else None
        layout = arrangement.lay_out(images.segment_ids, slots, cfg.registers, windows_BL)
        x_BLD, rope = (jax.tree.map(lambda x: arrangement.arrange(x, layout.order), x) for x in (x_BLD, rope))
        x_BLD = self.entry_norm(x_BLD) if cfg.embed_norm == "entry" else x_BLD
        seen = self._groups(layout, images.capacity)
        x_BLD = transformer.encode(cfg, self.blocks, x_BLD, **seen, slots=slots, rope=rope, key=blocks_key)
        x_BLD = arrangement.restore(self.norm(x_BLD) if cfg.norm_tokens else x_BLD, layout.order)
        registers_BKRD = x_BLD[:, length:].reshape(x_BLD.shape[0], slots, cfg.registers, -1) if cfg.registers else None
        x_BLD, ids_BL = x_BLD[:, :length], images.segment_ids
        if cfg.merge:
            x_BLD, ids_BL = self.merger(x_BLD, ids_BL, images.coords, sides_BL2)
        return x_BLD, ids_BL, registers_BKRD

    def _groups(self, layout: arrangement.Layout, capacity: Capacity | None) -> dict[str, Any]:
        """What tokens see, as `transformer.encode` takes it. Windows are not what rows were planned for."""
        cfg = self.cfg
        capacity = capacity.longer(cfg.registers) if capacity and cfg.registers else capacity
        groups = transformer.make_groups(cfg, layout.ids_BM, capacity, contiguous=True)
        if layout.windows_BM is None:
            return dict(groups=groups)
        unplanned = replace(cfg, attention="auto") if cfg.attention in attention.PLANNED else cfg
        windows = transformer.make_groups(unplanned, layout.windows_BM, None, contiguous=True)
        return dict(groups=groups, windows=windows, full_blocks=cfg.full_blocks)

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


def flops_forward(
    cfg: NaViTConfig, lengths: Sequence[int] | np.ndarray, grids: Sequence[tuple[int, int]] | None = None
) -> float:
    """Useful matrix FLOPs (a multiply-add is 2) of one forward pass over images with these token counts.

    Padding, masked logits and position tables are no use and not counted; a training step is three times as much.
    grids: their rows and columns, which say how large the windows at the edges are; without, windows count as whole.
    """
    n = np.asarray(lengths, np.float64)
    patches = n.sum() * 2 * cfg.patch_size**2 * cfg.channels * cfg.width
    last = cfg.pre_logits or cfg.token_width
    head = n.size * 2 * (cfg.token_width * cfg.pre_logits + last * cfg.num_classes)
    full = np.square(n + cfg.registers).sum()
    pairs = cfg.depth * full
    if cfg.window:
        full_blocks = len(set(cfg.full_blocks))
        pairs = full_blocks * full + (cfg.depth - full_blocks) * _window_pairs(cfg, n, grids)
    encoder = transformer.flops_encode(cfg, n + cfg.registers, pairs)
    if cfg.merge:
        pooled = merger.flops(cfg, cfg.merge, n.sum()) + n.sum() / merger.PATCHES * 2 * cfg.merge
    else:
        pooled = pooling.flops_pool(cfg, cfg.pool, n)
    return float(patches + encoder + pooled + head)


def _window_pairs(cfg: NaViTConfig, n: np.ndarray, grids: Sequence[tuple[int, int]] | None) -> float:
    """Pairs of a query and a key in one block within windows."""
    registers = n.size * cfg.registers**2
    if grids is None:
        return registers + (n * np.minimum(n, cfg.window**2)).sum()
    whole, rest = np.divmod(np.asarray(grids, np.float64), cfg.window)
    return registers + (whole * cfg.window**2 + rest**2).prod(axis=1).sum()  # squares of widths times of heights
