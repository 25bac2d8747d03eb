"""The encoder's parts against float64 formulas, and what its randomness may do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import random_params
from scipy import special

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


@pytest.mark.parametrize("kind", layers.MLPS)
def test_mlps_follow_their_formulas(kind):
    mlp = layers.Mlp(D, 20, bias=True, dtype=jnp.float32, rngs=nnx.Rngs(0), kind=kind)
    x = 2 * np.random.default_rng(0).standard_normal((5, D))
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(mlp)))
    up = dense("LD,DF->LF", x, params["up"])
    if kind == "swiglu":
        gate = dense("LD,DF->LF", x, params["gate"])
        hidden = gate / (1 + np.exp(-gate)) * up
    elif kind == "quick_gelu":
        hidden = up / (1 + np.exp(-1.702 * up))
    elif kind == "gelu":
        hidden = up / 2 * (1 + special.erf(up / np.sqrt(2)))
    else:
        hidden = up / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
    np.testing.assert_allclose(mlp(jnp.asarray(x, jnp.float32)), dense("LF,FD->LD", hidden, params["down"]), atol=1e-5)


def test_rms_norm_keeps_the_mean_and_scales_each_head():
    x = 1 + np.random.default_rng(0).standard_normal((3, N, H)).astype(np.float32)
    norm = layers.Norm(N, H, kind="rms", bias=True)
    assert norm.bias is None
    norm.scale[...] = jnp.arange(N * H, dtype=jnp.float32).reshape(N, H)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True)) * np.arange(N * H).reshape(N, H)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5)


def test_layer_scale_of_zero_leaves_the_residual_alone():
    cfg = transformer.EncoderConfig(width=D, depth=1, heads=N, mlp_dim=20, layer_scale=0.5)
    made = transformer.Block(cfg, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, L, D)), jnp.float32)
    ids = make_groups(jnp.ones((1, L), jnp.int32))
    branches = []
    made(x, ids, None, lambda y, i: branches.append(y) or y)
    made.attn_scale[...], made.mlp_scale[...] = jnp.zeros(D), jnp.ones(D)
    scaled = []
    out = made(x, ids, None, lambda y, i: scaled.append(y) or y)
    np.testing.assert_array_equal(scaled[0], 0)
    np.testing.assert_allclose(out, x + scaled[1], atol=1e-6)
    assert np.abs(branches[0]).max() > 0.01


@pytest.mark.parametrize("kind", layers.NORMS)
@pytest.mark.parametrize("heads", [(), (5,)], ids=["one scale", "a scale a head"])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("bfloat16", 1e-2)])
def test_norms_and_their_gradients_against_float64(kind, heads, dtype, tolerance):
    rng = np.random.default_rng(0)
    x, d = (jnp.asarray(rng.standard_normal((3, 4, 5, 7)) * 2 + shift, dtype) for shift in (3, 0))
    scale = jnp.asarray(rng.standard_normal((*heads, 7)), jnp.float32)

    def plain(x, scale):
        centred = x - x.mean(-1, keepdims=True) if kind == "layer" else x
        return centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-3) * scale

    out, pull = jax.vjp(lambda x, scale: layers.scaled_norm(x, scale, kind, 1e-3), x, scale)
    found = out, *pull(d)
    assert [a.dtype for a in found] == [x.dtype, x.dtype, scale.dtype]
    with jax.enable_x64(True):
        x, d, scale = (np.asarray(a, np.float64) for a in (x, d, scale))
        out, pull = jax.vjp(plain, x, scale)
        for a, b in zip(found, (out, *pull(d)), strict=True):
            np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=tolerance * np.abs(b).max())


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
