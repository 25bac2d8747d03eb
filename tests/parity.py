"""For tests against other libraries: getting them, five images of five sizes in one packed row, and comparing.

A library that is not installed skips the test; where the environment has PARITY=required it fails it, so that a build
which should have run all of them cannot pass by skipping.
"""

import dataclasses
import json
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import optional
import pytest
from helpers import fast_jit

from input_pipeline.errors import UserError
from input_pipeline.packed import Packed
from input_pipeline.patches import patchify
from navit_jax import contrastive, navit, weights

_library = partial(optional.library, variable="PARITY", requirements="requirements-parity.txt")
GRIDS = ((4, 6), (8, 3), (5, 5), (2, 9), (7, 10))  # rows, columns: five sizes, also after rounding up to 2 or 4
WITHOUT_TORCHVISION = ("torch", "safetensors", "huggingface_hub")
PADDING = 7  # tokens at the row's end
SPARE = 1  # slots that stay empty


def library(name: str):
    """The module, such as `transformers.models.pixtral`; without it the test is skipped, or fails (PARITY=required)."""
    if name.split(".")[0] not in WITHOUT_TORCHVISION:
        _library("benchmarks.torchvision_ops")
    return _library(name)


def randomise(module, seed=0):
    """Every parameter of a torch module: none is the 0 or 1 of an initial state, so none can hide a mistake."""
    torch = library("torch")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            draw = torch.randn(p.shape, generator=generator)
            if p.ndim < 2:  # norms stay near 1, biases near 0
                p.add_(0.2 * draw)
            else:
                p.copy_(draw / float(np.prod(p.shape[1:])) ** 0.5)
    return module.eval()


def five_images(rng, patch, multiple=1, channels=3):
    """Five uint8 images [h, w, C] of different sizes, in whole patches, a multiple of `multiple` on each side."""
    sides = [tuple(-(-n // multiple) * multiple * patch for n in grid) for grid in GRIDS]
    return [rng.integers(0, 256, (*side, channels), dtype=np.uint8) for side in sides]


def packed(images, patch):
    """One row of all the images, then PADDING tokens of noise; SPARE slots are empty."""
    grids = [(image.shape[0] // patch, image.shape[1] // patch) for image in images]
    length, slots = sum(h * w for h, w in grids) + PADDING, len(images) + SPARE
    values = np.random.default_rng(9).integers(0, 256, (1, length, patch * patch * images[0].shape[2]), dtype=np.uint8)
    ids, coords = np.zeros((1, length), np.int32), np.zeros((1, length, 3), np.int32)
    grids_BK3, start = np.zeros((1, slots, 3), np.int32), 0
    for k, (image, (h, w)) in enumerate(zip(images, grids)):
        here = slice(start, start + h * w)
        values[0, here], ids[0, here], grids_BK3[0, k] = patchify(image, patch), k + 1, (1, h, w)
        coords[0, here] = np.stack([np.zeros(h * w), *np.divmod(np.arange(h * w), w)], axis=1)
        start = here.stop
    return Packed(values, ids, coords, grids_BK3)


class Outputs(NamedTuple):
    """Of each image, in order: tokens [rows, columns, D], pooled [D], logits [C] ([D], the pooled, without a head)."""

    tokens: list[np.ndarray]
    pooled: list[np.ndarray]
    logits: list[np.ndarray]


def outputs(weights, row, dtype="float32"):
    """What the image tower of `Weights` makes of the images of one packed row, computed in `dtype`."""
    two = isinstance(weights.cfg, contrastive.TwoTowersConfig)
    cfg, params = (weights.cfg.image, weights.params["image"]) if two else (weights.cfg, weights.params)
    graph, shapes = navit.abstract(dataclasses.replace(cfg, dtype=dtype))
    jax.tree.map(lambda s, x: np.testing.assert_equal(x.shape, s.shape), shapes, params)

    @fast_jit
    def run(params, row):
        model = navit.merge(graph, params)
        logits_BKC, extra = model(row)
        return model.tokens(row), extra["pooled"], logits_BKC

    tokens_BLD, pooled_BKD, logits_BKC = map(np.asarray, run(params, row))
    used = [k for k in range(row.grids.shape[1]) if row.grids[0, k, 0]]
    return Outputs(tokens_of(tokens_BLD, row), [pooled_BKD[0, k] for k in used], [logits_BKC[0, k] for k in used])


def tokens_of(x_BLD, row):
    """Of each image of one packed row its tokens, [rows, columns, D]."""
    grids = [tuple(grid[1:]) for grid in row.grids[0] if grid[0]]
    return [np.asarray(x_BLD)[0][row.segment_ids[0] == k + 1].reshape(*grid, -1) for k, grid in enumerate(grids)]


def as_torch(image, mean=0.5, std=0.5):
    """[1, C, h, w] float32 of an uint8 image, (pixels / 255 - mean) / std per channel, as torch models take it."""
    torch = library("torch")
    pixels = (image.astype(np.float32) / 255 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]


def assert_close(ours, theirs, atol=1e-4):
    """Lists of arrays, one an image, are equal within atol; theirs are of order 1 and differ from each other.

    theirs: numpy or torch.
    """
    theirs = [np.asarray(x.detach() if hasattr(x, "detach") else x, np.float32) for x in theirs]
    assert len(ours) == len(theirs)
    for k, (x, y) in enumerate(zip(ours, theirs)):
        assert x.shape == y.shape, f"image {k}: {x.shape} here, {y.shape} there"
        np.testing.assert_allclose(np.asarray(x, np.float32), y, rtol=0, atol=atol, err_msg=f"image {k}")
        assert 0.03 < y.std() < 30, f"image {k}: of a std of {y.std()}, which tests nothing"
    first = [y.reshape(-1)[: theirs[0].shape[-1]] for y in theirs]
    assert all(np.abs(first[0] - y).max() > 20 * atol for y in first[1:]), "all images give the same: nothing is tested"


def same(a, b):
    """Whether two trees of arrays are equal bit by bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def assert_refused(folder, change, words):
    """With `change` in its config.json, or without that file (None), a folder is refused in these words, a regex."""
    config = folder / "config.json"
    if change is None:
        config.unlink()
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(UserError, match=words):
        weights.read(folder)


def refused(path, *said):
    """What the UserError says that `weights.read` raises; it says all of `said`."""
    with pytest.raises(UserError) as error:
        weights.read(path)
    for part in said:
        assert part in str(error.value), str(error.value)
    return str(error.value)
