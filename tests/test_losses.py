"""Losses against float64 numpy, and the promise that a masked slot is nothing: 0 and no gradient, whatever it holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from input_pipeline.errors import UserError
from navit_jax.losses import correct_BK, make_loss, masked_sum, sigmoid_xent, softmax_xent

B, K, C = 3, 4, 7


def dense(targets, smoothing):
    """Smoothed target distributions [B, K, C], the plain way."""
    y = np.asarray(targets, np.float64)
    if y.ndim == 2:
        y = np.eye(C)[np.maximum(targets, 0)] * (np.asarray(targets) >= 0)[..., None]
    return (1 - smoothing) * y + smoothing * y.mean(-1, keepdims=True)


def numpy_softmax(x, y):
    p = np.exp(x - x.max(-1, keepdims=True))
    return -(y * np.log(p / p.sum(-1, keepdims=True))).sum(-1)


def numpy_sigmoid(x, y):
    p = 1 / (1 + np.exp(-x))
    return -(y * np.log(p) + (1 - y) * np.log(1 - p)).sum(-1)


LOSSES = [(softmax_xent, numpy_softmax), (sigmoid_xent, numpy_sigmoid)]


def make_targets(kind, rng):
    labels = rng.integers(0, C, (B, K))
    if kind == "labels":
        return labels.astype(np.int32)
    if kind == "multi-hot":
        return (rng.random((B, K, C)) < 0.4).astype(np.float32)
    soft = rng.random((B, K, C)).astype(np.float32)
    return soft / soft.sum(-1, keepdims=True)


@pytest.mark.parametrize("loss,oracle", LOSSES)
@pytest.mark.parametrize("kind", ["labels", "multi-hot", "soft"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_value_and_gradient_match_numpy(loss, oracle, kind, smoothing):
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(B, K, C)) * 4, make_targets(kind, rng)
    if kind == "multi-hot" and loss is softmax_xent:
        targets[0, 0] = 0  # no label at all: a loss of 0
    y = dense(targets, smoothing)
    ours = jax.jit(loss, static_argnums=2)(jnp.float32(logits), targets, smoothing)
    np.testing.assert_allclose(ours, oracle(np.float32(logits).astype(np.float64), y), rtol=2e-5, atol=2e-5)
    grad = jax.grad(lambda x: loss(x, targets, smoothing).sum())(jnp.float32(logits))
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    expected = p * y.sum(-1, keepdims=True) - y if loss is softmax_xent else 1 / (1 + np.exp(-logits)) - y
    np.testing.assert_allclose(grad, expected, atol=2e-5)


@pytest.mark.parametrize("loss,_", LOSSES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("soft", [False, True])
def test_masked_slots_are_nothing(loss, _, bad, soft):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(B, K, C)).astype(np.float32)
    targets = make_targets("soft" if soft else "labels", rng)
    mask = rng.random((B, K)) < 0.5
    logits[~mask] = bad
    if soft:
        targets[~mask] = bad
    else:
        targets = np.where(mask, targets, -1)

    def total(x):
        loss_BK = loss(x, targets, 0.1, mask if soft else None)
        return masked_sum(loss_BK, mask)[0], loss_BK

    (value, loss_BK), grad = jax.value_and_grad(total, has_aux=True)(jnp.asarray(logits))
    assert np.isfinite(value) and value > 0
    assert np.all(np.asarray(loss_BK)[~mask] == 0)
    assert np.all(np.asarray(grad)[~mask] == 0)
    clean = np.where(mask[..., None], logits, 0.5)
    clean_targets = np.where(mask[..., None], targets, 0) if soft else targets
    np.testing.assert_array_equal(loss_BK, loss(clean, clean_targets, 0.1, mask))
    assert np.isfinite(grad).all() and np.any(np.asarray(grad)[mask] != 0)


@pytest.mark.parametrize("loss,_", LOSSES)
def test_extreme_logits_are_finite_and_bfloat16_is_computed_in_float32(loss, _):
    x = jnp.array([[[300.0, -300.0, 0.0]]])
    value, grad = jax.value_and_grad(lambda x: loss(x, jnp.array([[1]])).sum())(x)
    assert abs(float(value) - 600) < 1.5 and np.isfinite(grad).all()
    half = jnp.array([[[1.0, 2.0, 3.0]]], jnp.bfloat16)
    assert loss(half, jnp.array([[1]])).dtype == jnp.float32
    np.testing.assert_array_equal(loss(half, jnp.array([[1]])), loss(half.astype(jnp.float32), jnp.array([[1]])))


def test_sigmoid_sums_over_classes():
    loss_BK = sigmoid_xent(jnp.zeros((B, K, C)), jnp.zeros((B, K), jnp.int32))
    np.testing.assert_allclose(loss_BK, C * np.log(2), rtol=1e-6)


def test_masked_sum_of_parts_is_the_mean_over_all_images():
    rng = np.random.default_rng(2)
    value, mask = rng.normal(size=(8, K)).astype(np.float32), rng.random((8, K)) < 0.4
    value[~mask] = np.nan
    parts = [masked_sum(value[i : i + 2], mask[i : i + 2]) for i in range(0, 8, 2)]
    mean = sum(p[0] for p in parts) / sum(p[1] for p in parts)
    np.testing.assert_allclose(mean, value[mask].astype(np.float64).mean(), rtol=1e-5)
    hits, count = masked_sum(jnp.array([[True, True, False]]), jnp.array([[1, 0, 1]]))
    assert (float(hits), float(count)) == (1.0, 2.0)


def test_correct():
    logits = jnp.array([[[0.0, 2.0, 1.0], [3.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])
    assert correct_BK(logits, jnp.array([[1, 0, 0, -1]])).tolist() == [[True, True, False, False]]
    several = jnp.array([[[1, 1, 0], [0, 1, 1], [0, 0, 0.2], [0, 0, 0]]])
    assert correct_BK(logits, several).tolist() == [[True, False, True, False]]


def test_make_loss_reads_the_config():
    x, y = jnp.array([[[1.0, 0.0, -1.0]]]), jnp.array([[2]])
    for kind, loss in (("sigmoid", sigmoid_xent), ("softmax", softmax_xent)):
        made = make_loss(ConfigDict({"kind": kind, "label_smoothing": 0.2}))
        np.testing.assert_array_equal(made(x, y), loss(x, y, 0.2))
        assert float(made(x, y, jnp.array([[False]]))[0, 0]) == 0
    with pytest.raises(UserError, match="hinge.*sigmoid, softmax"):
        make_loss(ConfigDict({"kind": "hinge", "label_smoothing": 0.0}))
    with pytest.raises(UserError, match="1.5"):
        make_loss(ConfigDict({"kind": "softmax", "label_smoothing": 1.5}))
