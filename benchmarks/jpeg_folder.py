"""A folder of generated JPEGs that cost a decoder what photographs do, for benchmarks without a download.

Noise of octaves (1/f, as in natural images), some hard edges, grain; quality 87, 4:2:0: 1.8-2.3 bits a pixel. Bits and
not pixels are what most of a JPEG decoder's time goes with, so a folder of other bits has other figures.
"""

import os
from pathlib import Path

import cv2
import numpy as np

from input_pipeline.size_index import cache_dir

QUALITY = 87
CLASSES = 4


def picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """[height, width, 3] uint8."""
    image = np.zeros((height, width, 3), np.float32)
    cells, octave = 2, max(height, width)
    while octave > 3:
        coarse = rng.standard_normal((2 + height * cells // max(height, width), cells + 2, 3)).astype(np.float32)
        image += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) * (60 / cells**0.7)
        cells, octave = 2 * cells, octave // 2
    image = 128 + image
    for _ in range(12):  # edges
        centre = tuple(int(rng.integers(0, n)) for n in (width, height))
        axes = tuple(int(rng.integers(5, max(6, n // 4))) for n in (width, height))
        colour = rng.integers(0, 256, 3).tolist()
        cv2.ellipse(image, centre, axes, float(rng.integers(0, 180)), 0, 360, colour, int(rng.choice([-1, 2, 5])))
    return np.clip(image + 8 * rng.standard_normal(image.shape, np.float32), 0, 255).astype(np.uint8)


def jpeg_folder(count: int, height: int, width: int, folder: str | Path = "") -> Path:
    """`count` JPEGs in class folders, sides within 20 % of these, a third upright; made once, then found again.

    folder: where; "": in the user's cache.
    """
    root = Path(folder or cache_dir("benchmarks")) / f"jpegs_{count}_{height}x{width}_q{QUALITY}"
    if root.exists():
        return root
    building = root.with_name(f"{root.name}.{os.getpid()}")
    for i in range(count):
        rng = np.random.default_rng([count, height, width, i])
        h, w = (round(side * rng.uniform(0.8, 1.2)) for side in ((width, height) if i % 3 == 2 else (height, width)))
        place = building / f"class{i % CLASSES}" / f"{i:05d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(place), picture(rng, h, w), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    building.rename(root)
    return root
