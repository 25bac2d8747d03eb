"""Token budgets: how large each image becomes and how many of its tokens stay, from numbers alone.

Everything here is a pure function of (seed, stream position) and the image's size, so packing is planned before a
pixel is read and the same draws are made again when the row is built. Formulas: Dehghani et al. 2023 (NaViT),
sections 2.2 and 2.3; target sizes: Tschannen et al. 2025 (SigLIP 2 NaFlex), appendix.
"""

from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from scipy import special

from input_pipeline import keys
from input_pipeline.errors import UserError

_WHOLE = (0.0, 0.0, 1.0, 1.0)  # the crop that is the image


class Draws(NamedTuple):
    """What was drawn for n stream positions; all int64 but `crop`.

    index: [n] image of the source. crop: [n, 4] float64 (top, left, height, width) as shares of the image.
    grid: [n, 2] rows and columns of patches. keep: [n] tokens kept, 1..rows * columns; 0 for an unreadable image.
    """

    index: np.ndarray
    crop: np.ndarray
    grid: np.ndarray
    keep: np.ndarray


def target_grid(sizes: np.ndarray, budget: np.ndarray, patch: int) -> np.ndarray:
    """The largest grid of patches at the image's aspect with at most `budget` tokens: [n, 2] int64 rows, columns.

    sizes: [n, 2] (height, width) in pixels, > 0. budget: [n] tokens, >= 1. Of the largest scale r <= 100 with
    ceil(r h / p) * ceil(r w / p) <= budget; at least one patch a side. In closed form, 0.06 us an image where bisection
    takes 0.8: with n patches on the short side r is at most n / short and floor(budget / n) / long. The first grows and
    the second falls with n; they meet within one of the root of budget * short / long.
    """
    height, width = np.asarray(sizes, np.float64).T / patch
    short, long = np.minimum(height, width), np.maximum(height, width)
    meet, scale = np.floor(np.sqrt(budget * (short / long))), np.zeros(len(short))
    for near in (-1, 0, 1):
        n = np.clip(meet + near, 1, budget)
        scale = np.maximum(scale, np.minimum(n / short, np.floor(budget / n) / long))
    scale = np.minimum(scale, 100) * (1 - 1e-12)  # below the next whole patch, for all the rounding
    return np.maximum(1, np.ceil(np.stack([height * scale, width * scale], axis=1))).astype(np.int64)


def truncated_normal(u: np.ndarray, mean: float, std: float, low: float, high: float) -> np.ndarray:
    """Uniform numbers u in [0, 1) as a normal restricted to [low, high]."""
    a, b = special.ndtr((low - mean) / std), special.ndtr((high - mean) / std)
    return np.clip(mean + std * special.ndtri(a + u * (b - a)), low, high)


def token_budget(cfg: ConfigDict, u: np.ndarray, patch: int) -> np.ndarray:
    """Tokens for each image from uniform numbers; cfg is `config.resolution`."""
    if cfg.distribution == "uniform":
        share = u
    elif cfg.distribution == "truncated_normal":
        share = (truncated_normal(u, cfg.mean, cfg.std, -1.0, 1.0) + 1) / 2
    else:
        raise UserError(f"resolution.distribution is {cfg.distribution!r}; expected 'uniform' or 'truncated_normal'")
    if cfg.on == "side":
        area = (cfg.min_side + share * (cfg.max_side - cfg.min_side)) ** 2
    elif cfg.on == "area":
        area = cfg.min_side**2 + share * (cfg.max_side**2 - cfg.min_side**2)
    else:
        raise UserError(f"resolution.on is {cfg.on!r}; expected 'side' or 'area'")
    return np.maximum(1, np.round(area / patch**2)).astype(np.int64)


@cache
def beta_quantiles(mean_rate: float, max_rate: float, points: int = 4097) -> np.ndarray:
    """Quantiles of the beta token-drop rate at `points` equal steps of probability.

    u ~ Beta(7/3 m, 7/3 (1 - m)) with m = mean / max, which has the variance 0.3 m (1 - m) of the paper.
    """
    m = mean_rate / max_rate
    if not 0 < m < 1:
        raise UserError(f"drop.mean_rate {mean_rate} must lie between 0 and drop.max_rate {max_rate}")
    return max_rate * special.betaincinv(7 / 3 * m, 7 / 3 * (1 - m), np.linspace(0, 1, points))


def drop_rate(
    cfg: ConfigDict, u: np.ndarray, tokens: np.ndarray, span: tuple[int, int], seen: np.ndarray
) -> np.ndarray:
    """Share of tokens dropped from each image; cfg is `config.drop`.

    u: [n] uniform. tokens: [n] before dropping. span: the fewest and the most tokens that can be drawn.
    seen: [n] images seen before this one in training.
    """
    match cfg.kind:
        case "none":
            return np.zeros(len(u))
        case "constant":
            return np.full(len(u), cfg.rate)
        case "beta":
            table = beta_quantiles(cfg.mean_rate, cfg.max_rate)
            return np.interp(u, np.linspace(0, 1, len(table)), table)
        case "resolution":
            long = np.clip((tokens - span[0]) / max(1, span[1] - span[0]), 0, 1)
            mu = cfg.min_rate + long * (cfg.max_rate - cfg.min_rate)
            return np.clip(mu + truncated_normal(u, 0.0, 0.02, -0.04, 0.04), 0, 1)
        case "scheduled":
            rise = special.expit((seen - cfg.midpoint_examples) / cfg.tau_examples)
            return cfg.min_rate + (cfg.end_rate - cfg.min_rate) * rise
    raise UserError(f"drop.kind is {cfg.kind!r}; expected none, constant, beta, resolution or scheduled")


def most_kept(cfg: ConfigDict, span: tuple[int, int]) -> int:
    """The most tokens that dropping can leave of an image, of sequences between the two lengths of `span`."""
    tokens = np.arange(span[0], span[1] + 1)
    if cfg.kind == "constant":
        rate = cfg.rate
    elif cfg.kind == "scheduled":
        rate = min(cfg.min_rate, cfg.end_rate)
    elif cfg.kind == "resolution":  # two standard deviations below its mean for that length
        rate = np.maximum(0, np.interp(tokens, span, (cfg.min_rate, cfg.max_rate)) - 0.04)
    else:
        rate = 0.0
    return max(1, int(np.round(tokens * (1 - rate)).max()))


def _crops(cfg: ConfigDict, seed: int, position: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Random crops as shares of the image: [n, 4] float64 (top, left, height, width); cfg is `config.augment`."""
    if cfg.crop_min_area == cfg.crop_max_aspect == 1:
        return np.broadcast_to(_WHOLE, (len(position), 4))
    area = 1 - (1 - cfg.crop_min_area) * keys.uniform(seed, "croparea", position)
    stretch = np.exp((2 * keys.uniform(seed, "cropasp", position) - 1) * np.log(cfg.crop_max_aspect))
    height, width = np.minimum(1, np.sqrt(area * stretch)), np.minimum(1, np.sqrt(area / stretch))
    height, width = np.maximum(height, 1 / sizes[:, 0]), np.maximum(width, 1 / sizes[:, 1])
    top = (1 - height) * keys.uniform(seed, "croptop", position)
    left = (1 - width) * keys.uniform(seed, "cropleft", position)
    return np.stack([top, left, height, width], axis=1)


def _plain(config: ConfigDict) -> SimpleNamespace:
    """As it is now; a look-up in a ConfigDict costs 5 us, and a call of the sampler makes 30 of them."""
    return SimpleNamespace(**{k: _plain(v) if isinstance(v, ConfigDict) else v for k, v in config.items()})


class Sampler:
    """Draws for any stream positions: `sampler(positions) -> Draws`.

    In training, position s is image permute(s mod N) of epoch s // N. With `budget`, evaluation: position s is image
    indices[s] (default: all, in order), with at most `budget` tokens, no crop, no dropping.
    """

    def __init__(
        self, config: ConfigDict, sizes: np.ndarray, patch: int, budget: int = 0, indices: np.ndarray | None = None
    ):
        self.config, self.sizes, self.patch, self.budget = _plain(config), sizes, patch, budget
        self.indices = np.arange(len(sizes)) if indices is None else np.asarray(indices)
        self.span = tuple(int(n) for n in token_budget(config.resolution, np.array([0.0, 1 - 1e-9]), patch))
        if not len(sizes):
            raise UserError("the source has no images")
        if self.span[0] > self.span[1]:
            raise UserError(
                f"resolution.min_side {config.resolution.min_side} is above resolution.max_side "
                f"{config.resolution.max_side}"
            )

        # The most extreme aspects at the largest budget, so a run is refused before it starts and not on the way.
        aspect = np.log(np.maximum(1, sizes)) @ np.array([1.0, -1.0])
        extremes = np.array([aspect.argmin(), aspect.argmax()])
        stretch = 1.0 if budget else config.augment.crop_max_aspect
        stretched = np.maximum(1, sizes[extremes]) * np.array([[1, stretch], [stretch, 1]])
        worst = self._grid(stretched, np.full(2, self.largest))
        self._check_positions(extremes, worst, sizes[extremes].min(axis=1) > 0)

    @property
    def largest(self) -> int:
        """The most tokens an image can have before dropping."""
        return self.budget or self.span[1]

    @property
    def largest_kept(self) -> int:
        """The most tokens of an image that dropping is sure to leave at most."""
        return self.budget or most_kept(self.config.drop, self.span)

    def __call__(self, position: np.ndarray) -> Draws:
        config, seed = self.config, self.config.seed
        position = np.asarray(position, np.int64)
        if self.budget:
            index, crop = self.indices[position], np.broadcast_to(_WHOLE, (len(position), 4))
            budget = np.full(len(position), self.budget)
        else:
            size = len(self.sizes)
            index = keys.permute(position % size, size, seed, position // size)
            crop = _crops(config.augment, seed, position, np.maximum(1, self.sizes[index]))
            budget = token_budget(config.resolution, keys.uniform(seed, "budget", position), self.patch)
        sizes = self.sizes[index]
        readable = sizes.min(axis=1) > 0
        grid = self._grid(np.maximum(1, sizes * crop[:, 2:]), budget)
        tokens = grid.prod(axis=1)
        keep = tokens
        if not self.budget:
            rate = drop_rate(config.drop, keys.uniform(seed, "drop", position), tokens, self.span, position)
            keep = np.clip(np.round(tokens * (1 - rate)), 1, tokens).astype(np.int64)
        self._check_positions(index, grid, readable)
        return Draws(index, crop, grid, np.where(readable, keep, 0))

    def _grid(self, sizes: np.ndarray, budget: np.ndarray) -> np.ndarray:
        unit = 2 if self.config.model.merge else 1  # patches a side of what becomes one token
        units = np.maximum(1, budget // unit**2)
        if not self.config.data.squash:
            return unit * target_grid(sizes, units, unit * self.patch)
        side = unit * np.floor(np.sqrt(units)).astype(np.int64)
        return np.stack([side, side], axis=1)

    def _check_positions(self, index: np.ndarray, grid: np.ndarray, readable: np.ndarray) -> None:
        """Refuse grids that the position embedding has no rows for, before they reach the model."""
        model = self.config.model
        tabular = model.posemb in ("learned", "sinusoidal") and model.posemb_coords == "absolute"
        if not tabular or model.posemb_beyond != "error" or not len(index):
            return
        worst = int(np.argmax(grid.max(axis=1) * readable))
        if grid[worst].max() > model.posemb_max and readable[worst]:
            h, w = self.sizes[index[worst]]
            raise UserError(
                f"image {index[worst]} of {h}x{w} pixels gives a grid of {grid[worst][0]}x{grid[worst][1]} patches, "
                f"but the position table has {model.posemb_max} rows. Set --config.model.posemb_max="
                f"{grid[worst].max()} or more, --config.model.posemb_beyond=interpolate, or a fractional embedding."
            )
