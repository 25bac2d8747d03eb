"""The picture of native against square: what each model is shown, and accuracy over the training compute."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter
from ml_collections import ConfigDict

from benchmarks.equal_compute import Result
from input_pipeline import stream
from input_pipeline.patches import unpatchify
from input_pipeline.sources.shapes import ASPECTS, CLASS_NAMES

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
COLOURS = ("#2f6fde", "#f28e2b", "#8c6d4f")


def alike(images: stream.Images) -> np.ndarray:
    """One image of every class, [C] indices, chosen to look most alike once squashed: its own aspect is its shape's."""
    labels = np.array([images.source[i].label for i in range(200)])
    stretch = np.log(images.sizes[:200, 1] / images.sizes[:200, 0])
    shape = np.log([ASPECTS[CLASS_NAMES[label].split()[0]] for label in labels])
    return np.array([np.argmin(np.where(labels == c, abs(shape - stretch), np.inf)) for c in range(len(CLASS_NAMES))])


def shown(config: ConfigDict, images: stream.Images, indices: np.ndarray, budget: int) -> list[np.ndarray]:
    """What the model is given of these images, [H, W, 3] each, rebuilt from the evaluation rows' patches."""
    patch, found = stream.patch_size(config), {}
    for batch, _ in stream.eval_loader(config, images, budget, indices=indices):
        for row, slot in np.argwhere(batch.index >= 0):
            mine = batch.images.segment_ids[row] == slot + 1
            values, coords = batch.images.values[row, mine], batch.images.coords[row, mine, 1:]
            grid = tuple(batch.images.grids[row, slot, 1:])
            found[int(batch.index[row, slot])] = unpatchify(values, coords, grid, patch, 0)
    return [found[int(i)] for i in indices]


def draw(
    results: Sequence[Result], pictures: Sequence[tuple[str, list[np.ndarray]]], patch: int, ceiling: float, path: Path
) -> None:
    """Writes the picture to `path`. pictures: (caption, one image a class) a line. ceiling: what squashing allows."""
    figure = Figure(figsize=(9.6, 8.4), dpi=150, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.25))
    top.suptitle("The class is the shape's true aspect: a square resize removes it", color=INK, fontsize=12)
    axes = top.subplots(len(pictures), len(CLASS_NAMES))
    side = max(max(image.shape[:2]) for _, images in pictures for image in images)
    for line, (caption, images) in enumerate(pictures):
        for place, image in zip(axes[line], images, strict=True):
            _picture(place, image, patch, side)
        axes[line, 0].set_ylabel(caption, color=INK, fontsize=10)
    for place, name in zip(axes[0], CLASS_NAMES, strict=True):
        place.set_title(name, color=MUTED, fontsize=9)
    _curves(bottom.subplots(), results, ceiling)
    figure.savefig(path)


def _picture(axes: Axes, image: np.ndarray, patch: int, side: int) -> None:
    """One image with the borders of its patches, all at the same scale."""
    height, width = image.shape[:2]
    axes.imshow(image, extent=(0, width, height, 0), interpolation="nearest")
    axes.vlines(range(patch, width, patch), 0, height, color="white", linewidth=0.6)
    axes.hlines(range(patch, height, patch), 0, width, color="white", linewidth=0.6)
    axes.add_patch(Rectangle((0, 0), width, height, fill=False, edgecolor=MUTED, linewidth=0.8))
    half, y, x = side / 2 + 1, height / 2, width / 2
    axes.set(xlim=(x - half, x + half), ylim=(y + half, y - half), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _curves(axes: Axes, results: Sequence[Result], ceiling: float) -> None:
    largest = max(flops for result in results for flops, _ in result.curve)
    chance = 1 / len(CLASS_NAMES)
    levels = (ceiling, f"the most that squashed images allow, {100 * ceiling:.1f} %"), (chance, "chance")
    for level, text in levels:
        axes.axhline(level, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        place = dict(xytext=(-4, 4), textcoords="offset points", ha="right")
        axes.annotate(text, (1.03 * largest / 1e12, level), color=MUTED, fontsize=8.5, **place)
    for result, colour in zip(results, COLOURS, strict=True):
        x, y = np.array([(0.0, chance), *result.curve]).T
        style = dict(color=colour, linewidth=2.2, markersize=6, markeredgecolor="white", markeredgewidth=1.2)
        axes.plot(x / 1e12, y, "-o", label=f"{result.name}: {100 * result.top1:.1f} %", **style)
    axes.set(xlim=(0, 1.03 * largest / 1e12), ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("training compute, TFLOP", color=INK)
    axes.set_ylabel("top-1 accuracy", color=INK)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=MUTED)
    axes.legend(loc="upper left", frameon=False, labelcolor=INK, fontsize=10)
