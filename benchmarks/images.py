"""The images of the training-step benchmarks: sizes in patches, and random pixels; numpy only."""

import numpy as np

LABELS, PATCH = 1000, 16  # classes; pixels of a patch's side


def draw_grids(
    images: int, tokens: int, *, sides: tuple[int, int] = (4, 16), aspect: float = 1.5, first: int = 0
) -> np.ndarray:
    """[images, 2] rows and columns of patches, `tokens` in all; side of the square of equal area U(sides).

    Aspects are log-uniform up to `aspect` either way; every image has at least sides[0]^2 and at most sides[1]^2
    tokens. Seeds are tried from `first` on until the total is right, so that no size is bent to meet it.
    """
    for seed in range(first, first + 100_000):
        rng = np.random.default_rng(seed)
        side = rng.uniform(sides[0], sides[1] + 1, images)
        stretch = np.exp(rng.uniform(-0.5, 0.5, images) * np.log(aspect))
        grids = np.maximum(1, np.stack([side * stretch, side / stretch], 1)).astype(int)
        counts = grids.prod(1)
        if counts.sum() == tokens and counts.min() >= sides[0] ** 2 and counts.max() <= sides[1] ** 2:
            return grids
    raise ValueError(f"no {images} images of sides {sides} have {tokens} tokens in all")


def make_images(grids_I2: np.ndarray, patch: int) -> tuple[list[np.ndarray], np.ndarray]:
    """([h, w, 3] uint8 each, [images] labels): random pixels and classes."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h * patch, w * patch, 3), np.uint8) for h, w in grids_I2]
    return images, rng.integers(0, LABELS, len(images))
