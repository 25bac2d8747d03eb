"""Every position embedding: where a patch lies in its image, told to the model.

Tables are read by triangle weights, [L, M] @ [M, D], not by indexing: at an integer the weights are one-hot, between
two they interpolate, so one formula serves absolute, fractional and stretched coordinates, and its gradient is a
product, not a scatter. It costs 0.1 % of a B/16. `rope` turns queries and keys instead and has no parameters.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from input_pipeline.errors import UserError

KINDS = ("learned", "sinusoidal", "fourier", "rope", "table", "none")
COORDS = {  # in what coordinates a patch's place is given, and to which kinds
    "absolute": KINDS,  # patches from the top left
    "fractional": KINDS,  # shares of the image's sides
    "resized": ("learned",),  # the tables are resized to the image's sides, as one resizes an image
    "centred": ("rope",),  # a patch's centre, from -1 to 1
}
RESIZES = ("bilinear", "linear", "bicubic", "bicubic_antialias")
WAVELENGTH = 10_000.0  # base of the sinusoidal frequencies, and by default of the rotary ones
EXACT = jax.lax.Precision.HIGHEST  # a table entry must not be rounded on its way to a token


@dataclass(frozen=True, kw_only=True)
class PositionConfig:
    """Fields as in `configs.base.model`; UserError where they contradict each other."""

    posemb: str = "learned"
    posemb_coords: str = "absolute"
    posemb_combine: str = "sum"
    posemb_max: int = 64
    posemb_beyond: str = "error"
    posemb_grid: tuple[int, int] = (16, 16)
    posemb_resize: str = "bilinear"
    posemb_square: bool = False
    rope_base: float = WAVELENGTH
    rope_axes: str = "same"

    def check_positions(self, width: int, head_dim: int) -> None:
        """Raises UserError for an unknown choice, or one that this width and head size cannot take."""
        _one_of("posemb", self.posemb, KINDS)
        _one_of("posemb_coords", self.posemb_coords, tuple(COORDS))
        _one_of("posemb_resize", self.posemb_resize, RESIZES)
        _one_of("rope_axes", self.rope_axes, ("same", "alternate"))
        if self.posemb not in COORDS[self.posemb_coords]:
            raise UserError(
                f"model.posemb_coords is {self.posemb_coords!r}, which only posemb "
                f"{' or '.join(map(repr, COORDS[self.posemb_coords]))} can take, not {self.posemb!r}"
            )
        _one_of("posemb_combine", self.posemb_combine, ("sum", "product", "concat"))
        _one_of("posemb_beyond", self.posemb_beyond, ("error", "interpolate"))
        if self.posemb_combine != "sum" and self.posemb not in ("learned", "sinusoidal"):
            raise UserError(
                f"model.posemb_combine is {self.posemb_combine!r}, but only learned and sinusoidal embeddings have a "
                f"part for y and one for x to combine; {self.posemb!r} has not: set posemb_combine to 'sum'"
            )
        if len(self.posemb_grid) != 2 or min(self.posemb_grid) < 1:
            raise UserError(f"model.posemb_grid is {self.posemb_grid}; expected rows and columns, as (16, 16)")
        if self.posemb_max < 2:
            raise UserError(f"model.posemb_max is {self.posemb_max}; a table needs 2 rows or more")
        parts = 2 if self.posemb_combine == "concat" else 1
        multiple = {"learned": parts, "sinusoidal": 2 * parts, "fourier": 2}.get(self.posemb, 1)
        if width % multiple:
            raise UserError(f"model.width is {width}; posemb {self.posemb!r} here needs a multiple of {multiple}")
        if self.posemb == "rope" and head_dim % 4:
            raise UserError(f"posemb 'rope' needs a head size that is a multiple of 4; width / heads is {head_dim}")


def _one_of(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"model.{field} is {value!r}; it must be one of {', '.join(known)}")


class PositionEmbedding(nnx.Module):
    """What is added to the patches: every kind except 'rope' and 'none'.

    Parameters: y, x [M, D] (learned; [M, D/2] when concatenated), frequencies [2, D/2] (fourier), table
    [*posemb_grid, D].
    Sources: NaViT (2307.06304) section 2.1; fourier: Li et al. 2021 (2106.02795); table: SigLIP 2 (2502.14786).
    """

    def __init__(self, cfg: PositionConfig, width: int, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.width = width
        if cfg.posemb == "learned":
            part = width // 2 if cfg.posemb_combine == "concat" else width
            std = 0.02**0.5 if cfg.posemb_combine == "product" else 0.02  # the product is then as large as a sum
            self.y, self.x = (nnx.Param(_normal(rngs, (cfg.posemb_max, part), std)) for _ in range(2))
        if cfg.posemb == "fourier":
            std = 1.0 if cfg.posemb_coords == "absolute" else 2 * np.pi  # radians a patch, or a side
            self.frequencies = nnx.Param(_normal(rngs, (2, width // 2), std))
        if cfg.posemb == "table":
            self.table = nnx.Param(_normal(rngs, (*cfg.posemb_grid, width), 0.02))

    def __call__(self, coords_BL3: jax.Array, sides_BL2: jax.Array) -> jax.Array:
        """[B, L, D] float32 from coordinates (t, y, x) and each token's (rows, columns); finite for any padding."""
        yx_BL2 = coords_BL3[..., 1:]
        if self.cfg.posemb_square:
            sides_BL2 = jnp.broadcast_to(sides_BL2.max(-1, keepdims=True), sides_BL2.shape)
        if self.cfg.posemb == "table":
            y, x = self._resized(yx_BL2, sides_BL2, self.cfg.posemb_grid)
            outer = (y[..., :, None] * x[..., None, :]).reshape(*y.shape[:2], -1)
            return jnp.matmul(outer, self.table[...].reshape(-1, self.width), precision=EXACT)
        if self.cfg.posemb == "fourier":
            at = yx_BL2 / sides_BL2 if self.cfg.posemb_coords == "fractional" else yx_BL2.astype(jnp.float32)
            angles = at[..., :1] * self.frequencies[0] + at[..., 1:] * self.frequencies[1]
            return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        if self.cfg.posemb_coords == "resized":
            weights = self._resized(yx_BL2, sides_BL2, (self.cfg.posemb_max,) * 2)
        else:
            at_BL2 = table_position(self.cfg, yx_BL2, sides_BL2)
            weights = (_between(at_BL2[..., i], self.cfg.posemb_max) for i in range(2))
        y, x = (jnp.matmul(w, table, precision=EXACT) for w, table in zip(weights, self._tables(), strict=True))
        if self.cfg.posemb_combine == "concat":
            return jnp.concatenate([y, x], axis=-1)
        return y * x if self.cfg.posemb_combine == "product" else y + x

    def _resized(self, yx_BL2: jax.Array, sides_BL2: jax.Array, rows: tuple[int, int]) -> list[jax.Array]:
        """Weights of the rows of both axes, [B, L, rows] each."""
        return [resize_weights(yx_BL2[..., i], sides_BL2[..., i], rows[i], self.cfg.posemb_resize) for i in range(2)]

    def _tables(self) -> tuple[jax.Array, jax.Array]:
        if self.cfg.posemb == "learned":
            return self.y[...], self.x[...]
        if self.cfg.posemb_combine == "concat":
            table = jnp.asarray(sinusoidal_table(self.cfg.posemb_max, self.width // 2))
            return table, table
        table = jnp.asarray(sinusoidal_table(self.cfg.posemb_max, self.width))
        return table, table[:, ::-1]  # one order for both would give (y, x) and (x, y) the same sum and product


def token_sides(segment_ids_BL: jax.Array, grids_BK3: jax.Array) -> jax.Array:
    """(rows, columns) of each token's image, [B, L, 2], at least 1; padding gets those of some slot."""
    slots_BL1 = jnp.maximum(segment_ids_BL - 1, 0)[..., None]
    return jnp.maximum(jnp.take_along_axis(grids_BK3[..., 1:], slots_BL1, axis=1), 1)


def table_position(cfg: PositionConfig, yx_BL2: jax.Array, sides_BL2: jax.Array) -> jax.Array:
    """Where to read a table of M rows, float32 in [0, M - 1]: c, or (M - 1) * c / side when fractional.

    Absolute with 'interpolate': a side above M is squeezed onto the table, c * (M - 1) / (side - 1); with 'error' such
    a side never gets here, the planner refuses it (a position outside of the table would read as 0).
    """
    last = cfg.posemb_max - 1
    if cfg.posemb_coords == "fractional":
        return yx_BL2 * (last / sides_BL2)
    if cfg.posemb_beyond == "interpolate":
        return yx_BL2 * jnp.where(sides_BL2 > cfg.posemb_max, last / jnp.maximum(sides_BL2 - 1, 1), 1.0)
    return yx_BL2.astype(jnp.float32)


def _between(at_BL: jax.Array, rows: int) -> jax.Array:
    """[B, L, rows]: weights of a table's rows, linear between integers; 0 outside, where only padding may point."""
    return jnp.maximum(0, 1 - jnp.abs(at_BL[..., None] - jnp.arange(rows)))


def sinusoidal_table(rows: int, width: int) -> np.ndarray:
    """[rows, width] float32: sin(m w_i) for width / 2 frequencies w_i = 10000^(-2i / width), then the cosines."""
    angles = np.arange(rows)[:, None] * WAVELENGTH ** (-2 * np.arange(width // 2) / width)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def resize_weights(at_BL: jax.Array, side_BL: jax.Array, rows: int, kind: str = "bilinear") -> jax.Array:
    """[B, L, rows]: how a resize from `rows` to `side` samples makes the sample at `at`; sides may differ by token.

    'bilinear' is antialiased, equal to `jax.image.resize(..., 'bilinear', antialias=True)`; 'linear', 'bicubic' (a =
    -0.75) and 'bicubic_antialias' (a = -0.5, edges left out) are those of PyTorch's `interpolate`; where nothing else
    is said, edges are repeated. Weights sum to 1; outside of the image, where only padding may point, they are finite.
    """
    step_BL1 = (rows / side_BL)[..., None]
    source_BL1 = (at_BL[..., None] + 0.5) * step_BL1 - 0.5
    if kind == "linear":
        return _between(jnp.clip(source_BL1[..., 0], 0, rows - 1), rows)
    if kind == "bicubic":
        weights = _cubic(jnp.abs(source_BL1 - jnp.arange(-2, rows + 2)), -0.75)
        ends = weights[..., :3].sum(-1, keepdims=True), weights[..., -3:].sum(-1, keepdims=True)
        if rows == 1:
            return weights.sum(-1, keepdims=True)
        return jnp.concatenate([ends[0], weights[..., 3:-3], ends[1]], axis=-1)
    distance = jnp.abs(source_BL1 - jnp.arange(rows)) / jnp.maximum(step_BL1, 1)
    weights = jnp.maximum(0, 1 - distance) if kind == "bilinear" else _cubic(distance, -0.5)
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(jnp.abs(total) > 1e-6, total, 1)  # outside the image, in padding, all may be 0


def _cubic(distance: jax.Array, a: float) -> jax.Array:
    """Keys' kernel, 0 from 2 on."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return jnp.where(distance <= 1, near, jnp.where(distance < 2, far, 0))


def rope(
    cfg: PositionConfig, coords_BL3: jax.Array, sides_BL2: jax.Array, head_dim: int
) -> tuple[jax.Array, jax.Array]:
    """Sine and cosine for `rotate`, each [B, L, 1, 2, H/4] float32, with frequencies base^(-4i / H) radians a patch.

    Absolute: the angle is c * w. Fractional: an image counts as posemb_max patches a side, (posemb_max * c / side) * w.
    Centred: 2 pi w times the centre of the patch, from -1 to 1. Axes 'alternate' share base^(-2j / H), y takes even j.
    Source: Su et al. 2021 (2104.09864), for two axes as in Heo et al. 2024 (2403.13298); centred: DINOv3 (2508.10104).
    """
    at_BL2 = coords_BL3[..., 1:].astype(jnp.float32)
    if cfg.posemb_coords == "fractional":
        at_BL2 = at_BL2 * (cfg.posemb_max / sides_BL2)
    if cfg.posemb_coords == "centred":
        at_BL2 = 2 * np.pi * (2 * (at_BL2 + 0.5) / sides_BL2 - 1)
    exponents_2F = np.arange(head_dim // 4) * np.ones((2, 1)) * 4
    if cfg.rope_axes == "alternate":
        exponents_2F = exponents_2F + [[0], [2]]
    frequencies_2F = (cfg.rope_base ** (-exponents_2F / head_dim)).astype(np.float32)
    angles = at_BL2[:, :, None, :, None] * frequencies_2F
    return jnp.sin(angles), jnp.cos(angles)


def rotate(x_BLNH: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns queries or keys: the first half of a head's values by y, the second by x; value i pairs with i + H/4."""
    sin, cos = rope
    a, b = jnp.moveaxis(x_BLNH.astype(jnp.float32).reshape(*x_BLNH.shape[:-1], 2, 2, -1), -2, 0)
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-2)
    return turned.reshape(x_BLNH.shape).astype(x_BLNH.dtype)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> jax.Array:
    return std * jax.random.normal(rngs.params(), shape, jnp.float32)
