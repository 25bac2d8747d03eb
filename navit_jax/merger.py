"""Four patches of a 2x2 square become one token: what the vision towers of Qwen's language models end with."""

import jax
import jax.numpy as jnp
from flax import nnx

from navit_jax import arrangement
from navit_jax.layers import Dense
from navit_jax.transformer import EncoderConfig

SIDE = 2  # patches of a square; grids must be multiples of it
PATCHES = SIDE**2


class Merger(nnx.Module):
    """down(gelu(up(x))) of the joined vectors x of a square's four patches, row by row; to `width` numbers.

    Source: Wang et al. 2024 (Qwen2-VL, 2409.12191), section 2.1.
    """

    def __init__(self, cfg: EncoderConfig, width: int, *, rngs: nnx.Rngs):
        joined = (PATCHES * cfg.width,)
        self.up = Dense(joined, joined, bias=cfg.bias, dtype=cfg.compute_dtype, rngs=rngs)
        self.down = Dense(joined, (width,), bias=cfg.bias, dtype=cfg.compute_dtype, rngs=rngs)

    def __call__(
        self, x_BLD: jax.Array, ids_BL: jax.Array, coords_BL3: jax.Array, sides_BL2: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(tokens [B, ceil(L / 4), width], their segment ids), an image's row by row, where a quarter of its places is.

        What would be made of patches that are no whole square, of a grid with an odd side or after token dropping, is
        NaN: the tokens behind it are no squares either, and must not pass for some.
        """
        over = ((0, 0), (0, -x_BLD.shape[1] % PATCHES))
        ids_BL, squares_BL = (jnp.pad(x, over) for x in (ids_BL, arrangement.squares(coords_BL3, sides_BL2, SIDE)))
        order = arrangement.by_key(jnp.where(ids_BL > 0, ids_BL, jnp.iinfo(ids_BL.dtype).max), squares_BL)
        x_BLD = arrangement.arrange(jnp.pad(x_BLD, (*over, (0, 0))), order)
        ids_BM4, squares_BM4 = (
            arrangement.arrange(x, order).reshape(len(x), -1, PATCHES) for x in (ids_BL, squares_BL)
        )
        whole_BM = ((ids_BM4 == ids_BM4[..., :1]) & (squares_BM4 == squares_BM4[..., :1])).all(-1)
        y_BMD = self.up(x_BLD.reshape(*ids_BM4.shape[:2], -1))
        y_BMD = self.down(jax.nn.gelu(y_BMD, approximate=False))
        return jnp.where((whole_BM | (ids_BM4[..., 0] == 0))[..., None], y_BMD, jnp.nan), ids_BM4[..., 0]


def flops(cfg: EncoderConfig, width: int, patches: float) -> float:
    """Useful matrix FLOPs (a multiply-add is 2) of merging so many patches."""
    joined = PATCHES * cfg.width
    return patches / PATCHES * 2 * joined * (joined + width)
