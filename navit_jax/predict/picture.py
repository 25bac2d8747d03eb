"""The picture of predictions: every image with its likeliest classes, and what its vector was made of laid over it."""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from input_pipeline.patches import resize

INK, MUTED, BAR, BEST, PAPER = "#1f2933", "#6b7785", "#c9d6ea", "#3b7dd8", "#f3f5f7"
WIDTH, MARGIN, SCALE = 1200, 40, 1.6  # units; a unit is SCALE pixels
COLUMNS, GAP, TOP = 4, 26, 84  # images a line, between images, above the first line
HEAD, NOTE, LINE = 24, 24, 20  # heights of an image's name, its note, and a class
LETTER = 8.8  # width of one of a name, in bold
MAP = "inferno"


class Shown(NamedTuple):
    """One image. name: above it. pixels: [H, W, 3] uint8, None where it could not be read; note: below, or why not.

    labels, probabilities: the best first, () for none. heat: [rows, columns], or None.
    """

    name: str
    pixels: np.ndarray | None
    note: str
    labels: Sequence[str] = ()
    probabilities: Sequence[float] = ()
    heat: np.ndarray | None = None


def draw(images: Sequence[Shown], title: str, subtitle: str) -> Figure:
    """The grid of the images, in their order; each with its heat map beside it where any has one."""
    wide = 2 if any(image.heat is not None for image in images) else 1
    columns = min(COLUMNS, max(2, len(images)))
    side = (WIDTH - 2 * MARGIN + GAP) / columns - GAP
    figure = Figure(dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.text(MARGIN, 32, _end(title, 76), fontsize=15, weight="bold", color=INK, va="center")
    axes.text(MARGIN, 58, subtitle, fontsize=10, color=MUTED, va="center")
    top = float(TOP)
    for first in range(0, len(images), columns):
        line = images[first : first + columns]
        tall = max(_size(image, side, wide)[0] + _words(image, side) for image in line)
        for i, image in enumerate(line):
            _one(axes, image, MARGIN + i * (side + GAP), top, side, wide, tall)
        top += HEAD + tall + NOTE + LINE * max(len(image.labels) for image in line) + GAP
    axes.set(xlim=(0, WIDTH), ylim=(top, 0))
    figure.set_size_inches(WIDTH / 100, top / 100)
    return figure


def _words(image: Shown, side: float) -> float:
    """Height of the reason below a picture that is not there."""
    return 0 if image.pixels is not None else 12 * (1 + _wrapped(image.note, int(side / LETTER)).count("\n"))


def _size(image: Shown, side: float, wide: int) -> tuple[float, float]:
    """Height and width of the picture in units, at its aspect within a square; of one that is not there, a strip."""
    room = (side - 8 * (wide - 1)) / wide
    if image.pixels is None:
        return 40.0, side
    height, width = image.pixels.shape[:2]
    return height * room / max(height, width), width * room / max(height, width)


def _one(axes: Axes, image: Shown, left: float, top: float, side: float, wide: int, tall: float) -> None:
    letters, (height, width) = int(side / LETTER), _size(image, side, wide)
    axes.text(left, top + 10, _end(image.name, letters), fontsize=9, weight="bold", color=INK, va="center")
    top += HEAD
    if image.pixels is None:
        axes.add_patch(Rectangle((left, top), width, height, facecolor=PAPER, hatch="///", edgecolor="#d5dae0", lw=0))
        axes.text(left, top + height + 12, _wrapped(image.note, letters), fontsize=8, color=MUTED, va="top")
        return
    _picture(axes, image.pixels, left, top, height, width)
    if image.heat is not None:
        _picture(axes, overlay(image.pixels, image.heat), left + side / 2 + 4, top, height, width)
    top += tall + 12
    axes.text(left, top, image.note, fontsize=8, color=MUTED, va="center")
    for i, (label, share) in enumerate(zip(image.labels, image.probabilities, strict=True)):
        at = top + 20 + i * LINE
        axes.barh(at, side, left=left, height=LINE - 4, color=PAPER)
        axes.barh(at, side * share, left=left, height=LINE - 4, color=BAR)
        axes.barh(at, 3, left=left, height=LINE - 4, color=BEST if i == 0 else BAR)
        text = label if len(label) <= letters - 8 else f"{label[: letters - 9]}…"
        weight = "bold" if i == 0 else "normal"
        axes.text(left + 9, at, text, fontsize=8.5, color=INK, va="center", weight=weight)
        axes.text(left + side - 5, at, f"{100 * share:.1f} %", fontsize=8.5, color=INK, va="center", ha="right")


def _picture(axes: Axes, pixels: np.ndarray, left: float, top: float, height: float, width: float) -> None:
    if pixels.shape[1] > SCALE * width:
        pixels = resize(pixels, max(1, round(SCALE * height)), max(1, round(SCALE * width)))
    extent = (left, left + width, top + height, top)
    axes.imshow(pixels, extent=extent, interpolation="nearest", aspect="auto")


def overlay(pixels: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """[H, W, 3] uint8: the image in grey, coloured where the heat is, from its least to its most.

    The heat [rows, columns] is interpolated between patches; the more of it, the less of the image shows through.
    """
    height, width = pixels.shape[:2]
    scale = 400 / max(height, width)
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    pixels = resize(np.ascontiguousarray(pixels), height, width)
    low, high = float(heat.min()), float(heat.max())
    levels = ((heat - low) / max(high - low, 1e-12)).astype(np.float32)
    levels = cv2.resize(levels, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    grey = np.repeat(pixels.astype(np.float64).mean(axis=2, keepdims=True), 3, axis=2)
    colours = 255 * colormaps[MAP](levels)[:, :, :3]
    opacity = 0.35 + 0.4 * levels[:, :, None]
    return np.rint((1 - opacity) * grey + opacity * colours).astype(np.uint8)


def _end(text: str, letters: int) -> str:
    return text if len(text) <= letters else f"…{text[1 - letters :]}"


def _wrapped(text: str, letters: int) -> str:
    """On lines of so many letters, broken at spaces where there are some."""
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > letters:
            lines.append(line)
            line = ""
        line = f"{line} {word}".strip()
    return "\n".join([*lines, line])
