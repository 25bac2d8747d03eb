"""Pixels to tokens: resize to the grid, cut into patches, keep the chosen ones.

OpenCV because its resize is 2-4x as fast as Pillow's; area averaging where an axis shrinks (it does not alias) and
linear where it grows.
"""

import cv2
import numpy as np

cv2.setNumThreads(0)  # the loader's threads are the parallelism; OpenCV's own would fight them


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """[h, w, C] uint8 or uint16 to [height, width, C], antialiased."""
    if image.shape[2] > 4:  # OpenCV's area resize takes four channels at most
        parts = [resize(image[:, :, c : c + 4], height, width) for c in range(0, image.shape[2], 4)]
        return np.concatenate(parts, axis=2)
    h, w, channels = image.shape
    if height < h or width < w:
        small = (min(w, width), min(h, height))
        image = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
    if image.shape[:2] != (height, width):
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(image).reshape(height, width, channels)


def patchify(
    image: np.ndarray, patch: int, kept: np.ndarray | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """[h * p, w * p, C] to [h * w, p * p * C]: patches row by row, values in (row, column, channel) order.

    kept: [n] int64, the only patches wanted, in this order. out: [n, p * p * C] to write into.
    """
    h, w, channels = image.shape[0] // patch, image.shape[1] // patch, image.shape[2]
    cells = image.reshape(h, patch, w, patch, channels).swapaxes(1, 2)
    values = cells.reshape(h * w, patch * patch * channels)
    if kept is None:
        return values
    return np.take(values, kept, axis=0, out=out, mode="clip")  # any other mode copies `out` first


def unpatchify(values: np.ndarray, coords: np.ndarray, grid: tuple[int, int], patch: int, fill: int) -> np.ndarray:
    """Tokens back into an image [h * p, w * p, C]; dropped patches are `fill`. coords: [n, 2] (y, x)."""
    channels = values.shape[1] // patch**2
    image = np.full((grid[0], grid[1], patch, patch, channels), fill, values.dtype)
    image[coords[:, 0], coords[:, 1]] = values.reshape(-1, patch, patch, channels)
    return image.swapaxes(1, 2).reshape(grid[0] * patch, grid[1] * patch, channels)
