"""The step as mathematics: the mean is over real images, however the rows are divided."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_packed

from configs import base
from input_pipeline.capacity import Capacity
from input_pipeline.packed import Batch
from navit_jax import losses, navit, objectives, optim, sharding, start, train_step

B, L, K, CLASSES = 4, 24, 4, 5


def make_batch(seed, capacity=None):
    rng = np.random.default_rng(seed)
    images = random_packed(rng, [[5, 7], [9], [3, 3, 3, 3], []], L, K, 4 * 4 * 3)
    used = images.grids[..., 0] > 0
    labels = np.where(used, rng.integers(0, CLASSES, (B, K)), -1).astype(np.int32)
    images = images._replace(capacity=capacity)
    return Batch(images, labels, np.where(used, np.arange(B * K).reshape(B, K), -1).astype(np.int32))


def make(mesh=None, accumulate=1, **options):
    config = base.get_config()
    config.model.update(variant="Ti/8", width=16, depth=2, heads=2, mlp_dim=32)
    config.optim.update(lr=1e-2, schedule="constant", weight_decay=())
    cfg = navit.from_config(config.model, channels=3, num_classes=CLASSES)
    cfg = type(cfg)(**{**cfg.__dict__, "patch_size": 4})
    graph, shapes = navit.abstract(cfg)
    tx, _ = optim.make_optimizer(config.optim, shapes, 10)
    mesh, ema = sharding.make_mesh(mesh), bool(options.get("ema_decay"))
    places = jax.tree.map(lambda leaf: leaf.sharding, start.shapes(shapes, tx, ema, mesh))

    def params():
        params = navit.init_params(cfg, 0)
        params["head"]["kernel"] = jax.random.normal(jax.random.key(1), params["head"]["kernel"].shape)
        return params

    state = train_step.new_state(params, tx, ema, places)
    gradient = objectives.supervised_gradient(graph, losses.make_loss(config.loss), accumulate)
    step = train_step.make_train_step(gradient, tx, mesh, places, **options)
    return graph, state, lambda state, batch: step(state, batch, sharding.put_host(mesh, [1.0, 0.5]))


def run(steps=3, capacity=None, **options):
    _, state, step = make(**options)
    seen = []
    for i in range(steps):
        state, metrics = step(state, make_batch(i, capacity))
        seen.append(jax.device_get(metrics))
    return jax.device_get(state), seen


@pytest.mark.slow  # one step each of rows in parts is in the default set, below
@pytest.mark.parametrize("parts, capacity", [(2, Capacity(2, ((1, 16), (3, 8)))), (4, None)])
def test_accumulation_equals_the_undivided_step(parts, capacity):
    """The parts hold 3 + 0 images and so on: a mean of means would differ. Parts of two are groups in slabs."""
    one, seen_one = run()
    many, seen_many = run(accumulate=parts, capacity=capacity)
    for a, b in zip(seen_one, seen_many, strict=True):
        assert a["images"] == b["images"] == 7 and a["tokens"] == b["tokens"] == 33
        assert np.allclose(a["loss"], b["loss"], rtol=1e-5) and np.allclose(a["grad_norm"], b["grad_norm"], rtol=1e-4)
    for a, b in zip(jax.tree.leaves(one["params"]), jax.tree.leaves(many["params"]), strict=True):
        assert np.allclose(a, b, atol=2e-4)


@pytest.mark.parametrize(
    "tokens, capacity, parts",
    [
        pytest.param(24, None, 4, marks=pytest.mark.slow),
        pytest.param(48, None, 2, marks=pytest.mark.slow),
        pytest.param(40, None, 2, marks=pytest.mark.slow),
        (24, Capacity(2, ((1, 16), (3, 8))), 2),
        (2048, None, 1),
    ],
)
def test_one_cpu_takes_what_its_cache_holds_and_the_sums_are_the_same(monkeypatch, tokens, capacity, parts):
    """Four rows of 24 tokens; groups of two rows stay together."""
    monkeypatch.setattr(objectives, "CACHED_TOKENS", tokens)
    batch = make_batch(0, capacity)
    assert objectives._cached_parts(batch) == parts
    ((_, (seen,)), (_, (again,))) = run(steps=1), run(steps=1, accumulate=0, capacity=capacity)
    assert np.allclose(seen["loss"], again["loss"], rtol=1e-5)
    assert np.allclose(seen["grad_norm"], again["grad_norm"], rtol=1e-4)


def test_rows_over_several_devices_are_not_cut_for_a_cache(monkeypatch):
    monkeypatch.setattr(objectives, "CACHED_TOKENS", 24)
    mesh = jax.make_mesh((1, 1, 1), sharding.AXES)
    assert mesh.size == 1
    with sharding.under(mesh):
        assert objectives._cached_parts(make_batch(0)) == 4
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2, 2, 1), sharding.AXES)):
        assert objectives._cached_parts(make_batch(0)) == 1


def test_the_gradient_is_the_mean_over_real_images():
    graph, state, step = make()
    batch = make_batch(0)
    params = jax.tree.map(jnp.copy, state["params"])

    def mean(params):
        logits, _ = navit.merge(graph, params)(batch.images)
        real = np.argwhere(batch.index >= 0)
        total = 0.0
        for r, k in real:  # one image at a time, from the definition
            target = jax.nn.one_hot(batch.labels[r, k], CLASSES)
            x = logits[r, k]
            total += -jnp.sum(target * jax.nn.log_sigmoid(x) + (1 - target) * jax.nn.log_sigmoid(-x))
        return total / len(real)

    value, grads = jax.value_and_grad(mean)(params)
    _, metrics = step(state, batch)
    assert np.allclose(metrics["loss"] / metrics["images"], value, rtol=1e-5)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
    assert np.allclose(metrics["grad_norm"], norm, rtol=1e-4)


def test_the_average_follows_the_parameters():
    state, _ = run(steps=1, ema_decay=0.9)
    _, start, _ = make(ema_decay=0.9)
    for a, p, s in zip(*(jax.tree.leaves(t) for t in (state["ema"], state["params"], start["params"])), strict=True):
        assert np.allclose(a, 0.9 * s + 0.1 * p, atol=1e-6)


def test_one_compilation_serves_twenty_batches(monkeypatch):
    traces = []
    make_loss = losses.make_loss
    monkeypatch.setattr(losses, "make_loss", lambda cfg: lambda *args: traces.append(1) or make_loss(cfg)(*args))
    _, state, step = make()
    for i in range(20):
        state, _ = step(state, make_batch(i))
        jax.block_until_ready(state)
    assert len(traces) == 1
