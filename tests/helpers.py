"""Random images and the packed rows made of them, for tests of the model."""

from typing import NamedTuple

import jax
import numpy as np

from input_pipeline.packed import Packed


class Image(NamedTuple):
    values_nP: np.ndarray
    coords_n3: np.ndarray
    grid_3: tuple[int, int, int]


def random_image(rng, tokens, patch_values, dtype=np.uint8, max_side=12):
    """An image of which `tokens` patches were kept, on a random grid with room for them."""
    columns = int(rng.integers(max(1, -(-tokens // max_side)), max_side + 1))
    rows = -(-tokens // columns)
    rows = int(rng.integers(rows, max(rows, max_side) + 1))
    kept = np.sort(rng.permutation(rows * columns)[:tokens])
    coords = np.stack([0 * kept, kept // columns, kept % columns], axis=1).astype(np.int32)
    if np.issubdtype(dtype, np.floating):
        values = rng.uniform(-1, 1, (tokens, patch_values)).astype(dtype)
    else:
        values = rng.integers(0, np.iinfo(dtype).max + 1, (tokens, patch_values)).astype(dtype)
    return Image(values, coords, (1, rows, columns))


def pack(images_per_row, length, slots, patch_values, dtype=np.uint8):
    """Rows of the given images, in the given order, by the rules of `Packed`."""
    rows = len(images_per_row)
    values = np.zeros((rows, length, patch_values), dtype)
    ids, coords = np.zeros((rows, length), np.int32), np.zeros((rows, length, 3), np.int32)
    grids = np.zeros((rows, slots, 3), np.int32)
    for b, images in enumerate(images_per_row):
        start = 0
        for k, image in enumerate(images):
            here = slice(start, start + len(image.values_nP))
            values[b, here], ids[b, here], coords[b, here], grids[b, k] = image.values_nP, k + 1, *image[1:]
            start = here.stop
    return Packed(values, ids, coords, grids)


def random_packed(rng, lengths_per_row, L, K, P, dtype=np.uint8, max_side=12):
    """One row for each list of image lengths: `random_packed(rng, [[3, 5], []], L=8, K=2, P=12)`."""
    return pack([[random_image(rng, n, P, dtype, max_side) for n in row] for row in lengths_per_row], L, K, P, dtype)


def random_lengths(rng, rows, L, K):
    """Image lengths of rows that are full, nearly full, or empty."""
    out = []
    for _ in range(rows):
        cuts = np.sort(rng.integers(0, L + 1, int(rng.integers(0, K)) + 1))
        out.append([int(n) for n in np.diff(cuts, prepend=0) if n > 0])
    return out


def random_params(shapes, seed=0):
    """Parameters for a dict of shapes: none is the zero or the one of an initial state, so none can hide a mistake."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        return (path[-1].key == "scale") + rng.normal(0, 0.25, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def fast_jit(function):
    """`jax.jit` that compiles in half the time, for code that runs a few times on small arrays."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})
