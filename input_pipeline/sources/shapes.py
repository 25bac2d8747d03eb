"""Procedural images on which native resolution pays: the class is a shape's true aspect, lost in a square resize.

One bright ellipse or rectangle, round, wide or tall (1.8 to 1), on a dark noisy ground whose own aspect is anything
from 0.45 to 2.2. Images are small and the ground plain on purpose: with busy, coloured grounds a small model learns
nothing in minutes. Row i of one random table gives image i its numbers, so sizes are known without drawing anything;
the noise comes from a Philox generator keyed on (split, i).
"""

import numpy as np

from input_pipeline.errors import UserError
from input_pipeline.sources.base import Record, digest

VERSION = 1  # raise when the images or their captions change
KEY = 0x5A9E5
SPLITS = {"train": (0, 50_000), "validation": (1, 2_000)}  # stream, images
ASPECTS = {"round": 1.0, "wide": 1.8, "tall": 1 / 1.8}
CLASS_NAMES = tuple(f"{aspect} {shape}" for shape in ("ellipse", "rectangle") for aspect in ASPECTS)
COLOURS = {
    "red": (240, 70, 70),
    "green": (70, 230, 90),
    "blue": (80, 120, 250),
    "yellow": (245, 225, 70),
    "purple": (210, 90, 240),
    "cyan": (70, 225, 230),
    "orange": (250, 160, 60),
    "white": (245, 245, 245),
}
NOISE = 48  # grey levels


class ShapesSource:
    """50 000 training or 2000 validation shapes, with captions; see `input_pipeline.sources.base.Source`."""

    class_names = CLASS_NAMES

    def __init__(self, split: str):
        if split not in SPLITS:
            raise UserError(f"data.source=shapes has no split {split!r}: expected {' or '.join(SPLITS)}")
        self.split = split
        self._stream, images = SPLITS[split]
        table = np.random.Generator(np.random.Philox(key=[KEY, self._stream])).random((images, 8))
        kind, side, aspect, fill, x, y, colour, brightness = table.T
        self._labels = (kind * len(CLASS_NAMES)).astype(np.int64)
        side, aspect = 96 + 224 * side, np.exp(0.8 * (2 * aspect - 1))
        self._sizes = np.rint(np.stack([side / np.sqrt(aspect), side * np.sqrt(aspect)], axis=1)).astype(np.int32)
        self._fill, self._place = 0.55 + 0.4 * fill, np.stack([y, x], axis=1)
        self._colours = (colour * len(COLOURS)).astype(np.int64)
        self._brightness = 0.8 + 0.2 * brightness

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> Record:
        label = int(self._labels[i])
        top, left, shape_h, shape_w = self._box(i)
        pixels = self._ground(i)
        y0, y1, x0, x1 = round(top), round(top + shape_h), round(left), round(left + shape_w)
        inside = pixels[y0:y1, x0:x1]
        rgb = list(COLOURS.values())[self._colours[i]]
        bright = (np.array(rgb) * self._brightness[i]).astype(np.uint8) - inside % NOISE
        if CLASS_NAMES[label].endswith("ellipse"):
            y = (np.arange(y0, y1) + 0.5 - top - shape_h / 2) / (shape_h / 2)
            x = (np.arange(x0, x1) + 0.5 - left - shape_w / 2) / (shape_w / 2)
            inside[...] = np.where((y[:, None] ** 2 + x**2 <= 1)[:, :, None], bright, inside)
        else:
            inside[...] = bright
        return Record(pixels, label)

    def text(self, i: int) -> str:
        _, left, _, shape_w = self._box(i)
        size = "large" if self._fill[i] >= 0.75 else "small"
        middle = (left + shape_w / 2) / self._sizes[i, 1]
        place = "on the left" if middle < 0.42 else "on the right" if middle > 0.58 else "in the middle"
        return f"a {size} {list(COLOURS)[self._colours[i]]} {CLASS_NAMES[self._labels[i]]} {place}"

    def _box(self, i: int) -> tuple[float, float, float, float]:
        """Top, left, height and width of the shape in pixels: a share `fill` of the largest that fits."""
        height, width = map(float, self._sizes[i])
        aspect = ASPECTS[CLASS_NAMES[self._labels[i]].split()[0]]
        shape_w = float(self._fill[i]) * min(width, height * aspect)
        shape_h = shape_w / aspect
        y, x = map(float, self._place[i])
        return y * (height - shape_h), x * (width - shape_w), shape_h, shape_w

    def _ground(self, i: int) -> np.ndarray:
        """Dark noise [H, W, 3] uint8 below `NOISE`."""
        rng = np.random.Generator(np.random.Philox(key=[KEY + 1 + self._stream, i]))
        height, width = self._sizes[i]
        return rng.integers(0, NOISE, (height, width, 3), np.uint8)

    def describe(self, i: int) -> str:
        return f"shapes {self.split}[{i}]"

    def known_sizes(self) -> np.ndarray:
        return self._sizes

    def fingerprint(self) -> str:
        return digest("shapes", VERSION, self.split, len(self))
