"""Objectives: the gradient of a step, whole or in parts, is one gradient."""

import jax
import numpy as np
import pytest
from helpers import random_packed

from configs import base
from input_pipeline.errors import UserError
from input_pipeline.packed import Batch, Packed, Pairs
from navit_jax import objectives, sharding

B, L, K, T, M, VOCAB = 4, 24, 4, 20, 5, 11


def config(**contrastive):
    c = base.get_config()
    c.objective = "contrastive"
    c.model.update(variant="Ti/8", width=16, depth=2, heads=2, mlp_dim=32)
    c.text.update(max_tokens=8)
    c.contrastive.update(embed_dim=12, block=4, **contrastive)
    return c


def random_batch(seed):
    """Seven images and eight texts in other rows; one image and two texts have no partner, two texts are equal."""
    rng = np.random.default_rng(seed)
    images = random_packed(rng, [[5, 7], [9], [3, 3, 3, 3], []], L, K, 8 * 8 * 3)
    values, ids = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    coords, grids = np.zeros((B, T, 3), np.int32), np.zeros((B, M, 3), np.int32)
    example_BM = np.full((B, M), -1, np.int32)
    example_BM[0, :3], example_BM[1, :2], example_BM[3, :3] = [6, 0, 2], [4, 9], [3, 5, 8]
    for b in range(B):
        start = 0
        for m in np.flatnonzero(example_BM[b] >= 0):
            n = int(rng.integers(2, 7))
            here = slice(start, start + n)
            values[b, here], ids[b, here] = rng.integers(0, VOCAB, n), m + 1
            coords[b, here, 2], grids[b, m] = np.arange(n), (1, 1, n)
            start += n
    used = images.grids[..., 0] > 0
    example_BK = np.full((B, K), -1, np.int32)
    example_BK[used] = np.arange(used.sum())
    number = np.arange(12, dtype=np.int32)
    number[5] = number[3]
    numbers = [np.where(e >= 0, number[e], -1).astype(np.int32) for e in (example_BK, example_BM)]
    pairs = Pairs(Packed(values, ids, coords, grids), example_BK, example_BM, *numbers)
    labels = np.full((B, K), -1, np.int32)
    return Batch(images, labels, example_BK, pairs)


def gradient(config, batch, mesh=None):
    mesh = sharding.make_mesh(mesh)
    objective = objectives.make(config, 0, VOCAB)

    def one(params):
        with sharding.under(mesh):
            return objective.gradient(mesh)(params, batch, jax.random.key(0))

    return jax.device_get(jax.jit(one)(objective.init(0)))


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("parts", [2, 4])
def test_towers_that_see_parts_have_the_gradient_of_the_whole(loss, parts):
    batch = random_batch(parts)
    whole, metrics = gradient(config(loss=loss), batch)
    cached, again = gradient(config(loss=loss, cache_parts=parts), batch)
    assert metrics["images"] == again["images"] == 6 and metrics["tokens"] == 33
    for name, value in metrics.items():
        np.testing.assert_allclose(again[name], value, rtol=1e-5)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(whole), jax.tree.leaves(cached), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(a).max(), err_msg=str(path))
        assert np.abs(a).max() > 0, path


def test_plain_accumulation_is_refused_and_says_why():
    c = config()
    c.optim.accumulate_steps = 2
    with pytest.raises(UserError, match=r"only their own negatives.*cache_parts=2"):
        objectives.make(c, 0, VOCAB)


def test_an_unknown_objective():
    c = base.get_config()
    c.objective = "captioning"
    with pytest.raises(UserError, match="supervised or contrastive"):
        objectives.make(c, 10)
