"""The picture of packed rows: images on their own grids, the tokens of the row, and who attends to whom.

Everything is placed in one coordinate system of units from the top left, so that captions, frames and pixels agree, and
text is laid out by the width of its letters rather than by a renderer.
"""

from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from input_pipeline.patches import resize

COLOURS = ("#3b7dd8", "#f28e2b", "#3aa655", "#e15759", "#8f63c7", "#17a2b8", "#d9a514", "#d8589f", "#8c6d4f", "#6b8e23")
INK, MUTED, DARK, PAPER = "#1f2933", "#6b7785", (22, 27, 36), 255
WIDTH, MARGIN, SCALE = 1200, 40, 2  # units; a unit is SCALE pixels
GAP, BAR, MASK = 14, 9, 150  # between images; height of a segment's bar; side of the attention picture


class Picture(NamedTuple):
    """One image of a row: patches [rows, columns, p, p, 3] uint8 to look at, kept [rows, columns] bool, its class."""

    patches: np.ndarray
    kept: np.ndarray
    name: str


class Shown(NamedTuple):
    """One row: tokens [L, p, p, 3] uint8 to look at, segment_ids [L], and its images by slot."""

    tokens: np.ndarray
    segment_ids: np.ndarray
    pictures: dict[int, Picture]


def summary(rows: list[Shown], slots: int) -> str:
    """L, K, fill and images a row, in words."""
    length = len(rows[0].segment_ids)
    fill = np.mean([(row.segment_ids > 0).mean() for row in rows])
    images = np.mean([len(row.pictures) for row in rows])
    room = f"L = {length} tokens a row, K = {slots} slot{'s' * (slots != 1)}"
    return f"{room}, {100 * fill:.1f} % filled, {images:.1f} images a row"


def draw(rows: list[Shown], slots: int, title: str) -> Figure:
    """The picture of some rows of equal length."""
    figure = Figure(dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    patch = rows[0].tokens.shape[1]
    axes.text(MARGIN, 34, title, fontsize=15, weight="bold", color=INK, va="center")
    axes.text(MARGIN, 60, summary(rows, slots), fontsize=10.5, color=MUTED, va="center")
    y = 84.0
    for number, row in enumerate(rows):
        y = _row(axes, row, number + 1, slots, y)
    note = (
        f"One square is one token, a patch of {patch}x{patch} pixels.  Under an image: rows x columns, tokens kept.  "
        "Dark with a slash: dropped in this step.  Hatched: padding."
    )
    axes.text(MARGIN, y, note, fontsize=9, color=MUTED, va="center")
    height = y + 24
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    figure.set_size_inches(WIDTH / 100, height / 100)
    return figure


def _row(axes: Axes, row: Shown, number: int, slots: int, y: float) -> float:
    """One row from height y on; the height where it ends."""
    filled = int((row.segment_ids > 0).sum())
    share = f"{filled} of {len(row.segment_ids)} tokens ({100 * filled / len(row.segment_ids):.1f} %)"
    axes.plot([MARGIN, WIDTH - MARGIN], [y, y], color="#e4e7eb", linewidth=1)
    images = len(row.pictures)
    text = f"row {number}", f"{images} image{'s' * (images != 1)} in {slots} slot{'s' * (slots != 1)}, {share}"
    axes.text(MARGIN, y + 20, text[0], fontsize=11, weight="bold", color=INK, va="center")
    axes.text(MARGIN + 56, y + 20, text[1], fontsize=9.5, color=MUTED, va="center")
    bottom = max(_pictures(axes, row.pictures, y + 40), _attention(axes, row.segment_ids, y + 40))
    return _strip(axes, row, bottom + 16) + 22


def _pictures(axes: Axes, pictures: dict[int, Picture], y: float) -> float:
    """The images on their own grids, all at the same size of a patch, as large as fits."""
    room, limit = WIDTH - 2 * MARGIN - MASK - 3 * GAP, 330 + 24 * max(0, len(pictures) - 8)
    captions = [_caption(slot, picture) for slot, picture in pictures.items()]
    shapes = [picture.kept.shape for picture in pictures.values()]
    for cell in range(26, 2, -1):
        widths = [max(n * cell, 7.4 * len(head), 6 * len(foot)) for (_, n), (head, foot) in zip(shapes, captions)]
        places, bottom = _flow(widths, [rows * cell for rows, _ in shapes], room)
        if bottom <= limit:
            break
    for (slot, picture), (head, foot), (left, base) in zip(pictures.items(), captions, places, strict=True):
        colour, left, base = COLOURS[slot % len(COLOURS)], MARGIN + left, y + base
        _picture(axes, picture, left, base, cell, colour)
        axes.text(left, base + 13, head, fontsize=8.5, weight="bold", color=colour, va="center")
        axes.text(left, base + 27, foot, fontsize=7.5, color=MUTED, va="center")
    return y + bottom


def _caption(slot: int, picture: Picture) -> tuple[str, str]:
    (rows, columns), kept = picture.kept.shape, int(picture.kept.sum())
    name = picture.name if len(picture.name) <= 16 else f"{picture.name[:15]}…"
    tokens = f"{kept}" if kept == rows * columns else f"{kept} of {rows * columns}"
    return f"#{slot + 1} {name}", f"{rows}x{columns}: {tokens}"


def _picture(axes: Axes, picture: Picture, left: float, base: float, cell: int, colour: str) -> None:
    """One image standing on the line `base`, dropped patches dark with a slash, in a frame of its segment's colour."""
    height, width = (n * cell for n in picture.kept.shape)
    patches, top, dropped = picture.patches.copy(), base - height, ~picture.kept
    patches[dropped] = (0.22 * patches[dropped] + 0.78 * np.array(DARK)).astype(np.uint8)
    _image(axes, _mosaic(patches, cell), left, top, width, height)
    if cell >= 8:  # a dark image has dark patches
        corners = np.argwhere(dropped)[:, ::-1] * cell + (left, top)
        slashes = [[corner + 0.3 * cell, corner + 0.7 * cell] for corner in corners]
        axes.add_collection(LineCollection(slashes, colors="#77808d", linewidths=0.7, zorder=3))
    axes.add_patch(Rectangle((left - 1.5, top - 1.5), width + 3, height + 3, fill=False, edgecolor=colour, linewidth=2))


def _flow(widths: list[float], heights: list[float], room: int) -> tuple[list[tuple[float, float]], float]:
    """(left, base line) of each image, set like words on lines, and the height of it all with the captions."""
    places, line, left, top = [], [], 0.0, 0.0
    for width, height in zip(widths, heights, strict=True):
        if line and left + width > room:
            base = top + max(h for _, h in line)
            places += [(x, base) for x, _ in line]
            line, left, top = [], 0.0, base + 46
        line.append((left, height))
        left += width + GAP
    base = top + max((h for _, h in line), default=0.0)
    return places + [(x, base) for x, _ in line], base + 34


def _attention(axes: Axes, segment_ids: np.ndarray, y: float) -> float:
    """Who attends to whom: every image to itself, padding to nothing."""
    left, scale = WIDTH - MARGIN - MASK, MASK / len(segment_ids)
    axes.add_patch(Rectangle((left, y), MASK, MASK, facecolor="#f3f5f7", edgecolor="#d5dae0", linewidth=0.8))
    for slot, start, stop in _spans(segment_ids):
        if slot:
            at, side = start * scale, (stop - start) * scale
            colour = COLOURS[(slot - 1) % len(COLOURS)]
            axes.add_patch(Rectangle((left + at, y + at), side, side, facecolor=colour, linewidth=0))
    axes.text(left, y + MASK + 13, "attention", fontsize=8.5, weight="bold", color=INK, va="center")
    axes.text(left, y + MASK + 27, "within each image only", fontsize=7.5, color=MUTED, va="center")
    return y + MASK + 34


def _strip(axes: Axes, row: Shown, y: float) -> float:
    """The tokens in the order of the row, on as many lines as it takes, with a bar of the segment's colour below."""
    length = len(row.segment_ids)
    columns = next((n for n in range(64, 31, -1) if length % n == 0), min(length, 64))
    cell = min((WIDTH - 2 * MARGIN) / columns, 40)
    for start in range(0, length, columns):
        ids = row.segment_ids[start : start + columns]
        tokens, real = row.tokens[start : start + columns], int((ids > 0).sum())
        if real:
            _image(axes, _mosaic(tokens[None, :real], cell), MARGIN, y, real * cell, cell)
        for slot, first, last in _spans(ids):
            left, width = MARGIN + first * cell, (last - first) * cell
            if not slot:
                grey = dict(facecolor="#f3f5f7", edgecolor="#c3cad3", hatch="////", linewidth=0)
                axes.add_patch(Rectangle((left, y), width, cell + 2 + BAR, **grey))
                continue
            colour = COLOURS[(slot - 1) % len(COLOURS)]
            axes.add_patch(Rectangle((left + 0.5, y + cell + 2), width - 1, BAR, facecolor=colour, linewidth=0))
            if width > 12:
                middle = left + width / 2, y + cell + 2.4 + BAR / 2
                axes.text(*middle, str(slot), fontsize=6, weight="bold", color="white", ha="center", va="center")
        y += cell + BAR + 9
    return y


def _spans(ids: np.ndarray) -> list[tuple[int, int, int]]:
    """(id, start, stop) of each run of equal ids."""
    edges = [0, *(np.flatnonzero(np.diff(ids)) + 1), len(ids)]
    return [(int(ids[a]), int(a), int(b)) for a, b in zip(edges, edges[1:], strict=False)]


def _mosaic(patches: np.ndarray, cell: float) -> np.ndarray:
    """[rows, columns, p, p, 3] as one picture of `cell` units a patch, with a fine line between larger ones."""
    rows, columns = patches.shape[:2]
    side = max(2, round(cell * SCALE))
    inside = side - int(side >= 14)
    canvas = np.full((rows, columns, side, side, 3), PAPER, np.uint8)
    for i, j in np.ndindex(rows, columns):
        canvas[i, j, :inside, :inside] = resize(patches[i, j], inside, inside)
    return canvas.swapaxes(1, 2).reshape(rows * side, columns * side, 3)


def _image(axes: Axes, pixels: np.ndarray, left: float, top: float, width: float, height: float) -> None:
    extent = (left, left + width, top + height, top)
    axes.imshow(pixels, extent=extent, interpolation="nearest", aspect="auto", zorder=2)
