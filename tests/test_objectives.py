"""Objectives: the gradient of a step, whole or in parts, is one gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_packed

from configs import base
from input_pipeline.errors import UserError
from input_pipeline.packed import Batch, Packed, Pairs
from navit_jax import contrastive, navit, objectives, optim, sharding, start, train_step
from navit_jax.contrastive_loss import Ids, contrastive_loss
from navit_jax.plan import hlo

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
    pairs = Pairs(Packed(values, ids, coords, grids), example_BK, example_BM, *numbers, example_BK, example_BM)
    labels = np.full((B, K), -1, np.int32)
    return Batch(images, labels, example_BK, pairs)


def gradient(config, batch, mesh=None):
    mesh = sharding.make_mesh(mesh)
    objective = objectives.make(config, 0, VOCAB)

    def one(params):
        with sharding.under(mesh):
            return objective.gradient(mesh)(params, batch, jax.random.key(0))

    return jax.device_get(jax.jit(one)(objective.init(0)))


@pytest.mark.slow
@pytest.mark.parametrize("loss, parts", [("softmax", 4), ("sigmoid", 2)])
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


@pytest.mark.slow
def test_parts_are_dropped_out_alike_in_both_passes():
    """The gradient is that of one loss over parts that are encoded with the same keys, differentiated as it stands."""
    c = config(cache_parts=2)
    c.model.dropout = 0.3
    graph = contrastive.abstract(contrastive.from_config(c, vocab_size=VOCAB))[0]
    params = contrastive.init_params(contrastive.from_config(c, vocab_size=VOCAB), 0)
    mesh, batch, key = sharding.make_mesh(), random_batch(1), jax.random.key(3)

    def loss_of_parts(params):
        towers, parts = navit.merge(graph, params), objectives._slices(batch, 2, 1)
        z = []
        for i, part_key in enumerate(jax.random.split(key, 2)):
            rows, keys = jax.tree.map(lambda x: x[i], parts), jax.random.split(part_key)  # noqa: B023
            z.append((towers.encode_images(rows.images, keys[0]), towers.encode_texts(rows.pairs.texts, keys[1])))
        n, m = (jnp.stack(side, axis=1).reshape(-1, 12) for side in zip(*z, strict=True))
        ids = Ids(*(x.reshape(-1) for x in batch.pairs[1:]))
        return contrastive_loss(n, m, ids, towers.scale(), 0.0, kind="softmax", mesh=mesh, block=4)[0]

    with sharding.under(mesh):
        expected = jax.jit(jax.grad(loss_of_parts))(params)
        got = jax.jit(objectives.contrastive_gradient(graph, c.contrastive, mesh))(params, batch, key)[0]
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max())


@pytest.mark.slow
def test_a_frozen_tower_has_no_gradient_and_its_backward_pass_is_not_computed():
    batch, mesh = random_batch(0), sharding.make_mesh()
    flops = {}
    for freeze in ((), ("^image/",)):
        c = config()
        c.optim.freeze = freeze
        objective = objectives.make(c, 0, VOCAB)
        step = jax.jit(objective.gradient(mesh))
        with sharding.under(mesh):
            compiled = step.lower(objective.init(0), batch, jax.random.key(0)).compile()
        flops[freeze] = hlo.flops(compiled.as_text())
    found, _ = compiled(objective.init(0), batch, jax.random.key(0))
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(found["image"]))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(found["text"]))
    assert flops[("^image/",)] < 0.75 * flops[()]
    lengths = np.array([5, 7, 9]), np.array([4, 4, 3])
    assert objective.flops(*lengths) < 0.75 * objectives.make(config(), 0, VOCAB).flops(*lengths)
    c.optim.freeze = ("^image/", "^text/")
    both = objectives.make(c, 0, VOCAB).flops(*lengths)
    assert both < objective.flops(*lengths)


@pytest.mark.slow
def test_the_scale_stays_below_its_maximum():
    c = config(init_scale=100.0)
    c.optim.update(lr=1.0, schedule="constant", weight_decay=(), clip_norm=0.0)
    objective, mesh = objectives.make(c, 0, VOCAB), sharding.make_mesh()
    tx, _ = optim.make_optimizer(c.optim, objective.shapes, 10)
    places = jax.tree.map(lambda leaf: leaf.sharding, start.shapes(objective.shapes, tx, False, mesh))

    def raising(params, batch, key):  # a gradient that only asks for a larger scale
        grads = jax.tree.map(jnp.zeros_like, params) | dict(logit_scale=-jnp.ones(()))
        return grads, dict(images=jnp.ones(()))

    scales = {}
    for limit in (objective.limit, lambda params: params):
        state = train_step.new_state(partial(objective.init, 0), tx, False, places)
        step = train_step.make_train_step(raising, tx, mesh, places, limit=limit)
        for _ in range(3):
            state, _ = step(state, random_batch(0), sharding.put_host(mesh, [0.0]))
        scales[limit] = float(state["params"]["logit_scale"])
    held, free = scales.values()
    assert held == np.float32(np.log(100.0)) < free
    assert objective.limit(dict(logit_scale=jnp.zeros(())))["logit_scale"] == 0


def test_an_unknown_objective():
    c = base.get_config()
    c.objective = "captioning"
    with pytest.raises(UserError, match="supervised or contrastive"):
        objectives.make(c, 10)
