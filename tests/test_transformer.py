"""The encoder's parts against float64 formulas, and what its randomness may do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import random_params

from navit_jax import layers, transformer
from navit_jax.attention import make_groups

L, K, D, N, H = 24, 4, 16, 2, 8


def norm(x, params):
    centred = x - x.mean(-1, keepdims=True)
    y = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-6) * params["scale"]
    return y + params.get("bias", 0)


def dense(equation, x, params):
    return np.einsum(equation, x, params["kernel"]) + params.get("bias", 0)


def block(x_LD, params, qk_norm):
    """A pre-norm block on one image, in float64 numpy."""
    attn, mlp = params["attn"], params["mlp"]
    y_LD = norm(x_LD, params["attn_norm"])
    q, k, v = (dense("LD,DNH->LNH", y_LD, attn[name]) for name in "qkv")
    if qk_norm:
        q, k = norm(q, attn["q_norm"]), norm(k, attn["k_norm"])
    weights = np.exp(np.einsum("LNH,MNH->NLM", q, k) / np.sqrt(H))
    weights /= weights.sum(-1, keepdims=True)
    x_LD = x_LD + dense("LNH,NHD->LD", np.einsum("NLM,MNH->LNH", weights, v), attn["out"])
    up = dense("LD,DF->LF", norm(x_LD, params["mlp_norm"]), mlp["up"])
    gelu = up / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
    return x_LD + dense("LF,FD->LD", gelu, mlp["down"])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_block_against_its_formula(bias, qk_norm):
    cfg = transformer.EncoderConfig(width=D, depth=1, heads=N, mlp_dim=20, bias=bias, qk_norm=qk_norm)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: transformer.Block(cfg, rngs=nnx.Rngs(0))))
    params = random_params(nnx.to_pure_dict(state))
    ids = np.repeat([[1, 2, 0]], [9, 11, 4], axis=1).astype(np.int32)
    x = np.random.default_rng(1).standard_normal((1, L, D)).astype(np.float32)
    got = nnx.merge(graphdef, params)(jnp.asarray(x), make_groups(ids), None, lambda y, _: y)
    exact = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    for segment in (1, 2):
        image = x[ids == segment].astype(np.float64)
        np.testing.assert_allclose(np.asarray(got)[ids == segment], block(image, exact, qk_norm), atol=2e-5)


def test_layer_norm_gradients_against_automatic_ones():
    def plain(x, scale):
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6) * scale

    x, d, scale = (jnp.asarray(a) for a in np.random.default_rng(0).standard_normal((3, 4, 5, 7)).astype(np.float32))
    out, pull = jax.vjp(layers.scaled_norm, 3 + 2 * x, scale[0, 0])
    expected, pull_plain = jax.vjp(plain, 3 + 2 * x, scale[0, 0])
    for a, b in zip((out, *pull(d)), (expected, *pull_plain(d))):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_stochastic_depth_takes_whole_images_at_its_rate():
    ids = np.repeat([[1, 2, 3, 0]], 6, axis=1).astype(np.int32)
    y = jnp.ones((400, L, 2))
    out = transformer.drop_images(y, jnp.asarray(np.repeat(ids, 400, axis=0)), K, jnp.float32(0.25), jax.random.key(0))
    per_image = np.asarray(out).reshape(400, 4, 6, 2)
    assert (per_image == per_image[:, :, :1, :1]).all(), "the tokens of an image fall together"
    assert set(np.unique(per_image)) == {0.0, np.float32(1 / 0.75)}
    dropped = (per_image[:, :3, 0, 0] == 0).mean(0)
    np.testing.assert_allclose(dropped, 0.25, atol=0.08)
    assert np.abs(np.corrcoef(per_image[:, :3, 0, 0].T) - np.eye(3)).max() < 0.2, "images of a row fall alone"


def test_dropout_keeps_the_mean():
    out = np.asarray(layers.dropout(jnp.ones(20_000), 0.3, jax.random.key(0)))
    assert (out == 0).mean() == pytest.approx(0.3, abs=0.02) and out.mean() == pytest.approx(1, abs=0.03)
