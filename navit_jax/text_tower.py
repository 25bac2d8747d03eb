"""Packed texts in, one vector per text out: token rows, learned positions, the encoder that images have, pooling.

Attention is not causal: nothing is generated, and every token may read its whole text. Rows of the token table are
picked by indexing, whose gradient is a scatter-add: the product with a one-hot [B, T, V] that would spare it takes 50
MFLOP a token at width 768 and a vocabulary of 32 k, next to the 171 of 12 layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from input_pipeline.errors import UserError
from input_pipeline.packed import Packed
from navit_jax import layers, pooling, sharding, transformer


@dataclass(frozen=True, kw_only=True)
class TextConfig(transformer.EncoderConfig):
    """Everything that shapes a text tower, as in `configs.base.text`; UserError where it cannot work.

    vocab_size: rows of the token table. max_tokens: rows of the position table, the longest text. pad: what the
    tokenizer fills each text with up to max_tokens (`input_pipeline.text.filled`), which the tower reads; -1: nothing.
    """

    vocab_size: int
    max_tokens: int = 64
    pool: str = "last"
    pad: int = -1

    def __post_init__(self):
        for field in ("width", "depth", "heads", "mlp_dim", "vocab_size", "max_tokens"):
            if getattr(self, field) < 1:
                raise UserError(f"text.{field} is {getattr(self, field)}; it must be at least 1")
        if not self.head_size and self.width % self.heads:
            raise UserError(
                f"text.width {self.width} does not divide into {self.heads} heads: change text.width or text.heads"
            )
        if self.pad >= self.vocab_size:
            raise UserError(f"text.pad is {self.pad}; the token table has rows 0 to {self.vocab_size - 1}")
        if self.pool not in pooling.TEXT_KINDS:
            raise UserError(f"text.pool is {self.pool!r}; it must be one of {', '.join(pooling.TEXT_KINDS)}")
        super().__post_init__()


class TextTower(nnx.Module):
    """Token table [V, D], positions [max_tokens, D], blocks, norm, pooling. Source: CLIP (2103.00020), section 2.4."""

    def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        normal = jax.nn.initializers.normal(0.02)
        self.table = nnx.Param(normal(rngs.params(), (cfg.vocab_size, cfg.width), jnp.float32))
        self.positions = nnx.Param(normal(rngs.params(), (cfg.max_tokens, cfg.width), jnp.float32))
        self.blocks = transformer.stack_blocks(cfg, rngs=rngs)
        self.norm = cfg.make_norm(cfg.width)
        if cfg.pool == "map":
            self.pool = pooling.MapPool(cfg, rngs=rngs)

    def __call__(self, texts: Packed, *, key: jax.Array | None = None) -> jax.Array:
        """[B, M, D] float32, one vector a slot; an empty slot is exactly 0. Texts of a row do not see each other.

        key: for dropout and stochastic depth; None is deterministic.
        """
        cfg, slots = self.cfg, texts.grids.shape[1]
        embed_key, blocks_key = (None, None) if key is None else jax.random.split(key)
        # Whole on every device before it is read: from a split table the partitioner picks the rows of the whole step.
        # Float32 until the sum, so that the gradients of a frequent token are added in it; padding may hold any id.
        table_VD = sharding.constrain(self.table[...], "VD")
        rows_BTD = jnp.take(table_VD, texts.values, axis=0, mode="clip")
        place_BTS = jax.nn.one_hot(texts.coords[..., 2], cfg.max_tokens)
        rows_BTD = rows_BTD + jnp.matmul(place_BTS, self.positions[...], precision=pooling.EXACT)
        x_BTD = sharding.constrain(rows_BTD.astype(cfg.compute_dtype), "BTD")
        x_BTD = layers.dropout(x_BTD, cfg.dropout, embed_key)
        groups = transformer.make_groups(cfg, texts.segment_ids, texts.capacity, contiguous=True)
        x_BTD = self.norm(transformer.encode(cfg, self.blocks, x_BTD, groups, slots=slots, key=blocks_key))
        pools = {"last": pooling.last_pool, "mean": pooling.mean_pool}
        pool = self.pool if cfg.pool == "map" else pools[cfg.pool]
        return sharding.constrain(pool(sharding.constrain(x_BTD, "BTD"), texts.segment_ids, slots), "BMD")


def flops_forward(cfg: TextConfig, lengths: Sequence[int] | np.ndarray) -> float:
    """Useful matrix FLOPs (a multiply-add is 2) of one forward pass over texts with these token counts.

    Padding, masked logits and the tables are no use and not counted, as in `navit.flops_forward`.
    """
    n = np.asarray(lengths, np.float64)
    return transformer.flops_encode(cfg, n) + pooling.flops_pool(cfg, cfg.pool, n)
