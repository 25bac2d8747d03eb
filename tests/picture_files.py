"""Small pictures on disk, each known by its pixels, for tests of sources."""

import io

import numpy as np
from PIL import Image


def picture(i):
    """A PNG of (3 + i) x 5 pixels, all of value i."""
    file = io.BytesIO()
    Image.fromarray(np.full((3 + i, 5, 3), i, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(root, names):
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i % 200))
