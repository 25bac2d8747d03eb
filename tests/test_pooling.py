"""Pooling against the textbook form, image by image."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from navit_jax import pooling, transformer

L, K = 24, 4
CFG = transformer.EncoderConfig(width=16, depth=1, heads=2, mlp_dim=24)


def test_map_pool_is_attention_of_the_probe():
    """Against the textbook form, image by image: keys projected, softmax over the image's tokens, residual MLP."""
    pool = pooling.MapPool(CFG, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    x = 5 * rng.standard_normal((2, L, 16)).astype(np.float32)
    ids = np.repeat([[1, 2, 0], [3, 0, 0]], 8, axis=1).astype(np.int32)
    got = pool(jnp.asarray(x), jnp.asarray(ids), K)
    q, k, v = (np.asarray(layer.kernel[...], np.float64) for layer in (pool.q, pool.k, pool.v))
    for b, slot in ((0, 1), (0, 2), (1, 3)):
        tokens = x[b][ids[b] == slot]
        logits = np.einsum("nh,lnh->nl", np.einsum("d,dnh->nh", pool.probe[0], q), np.einsum("ld,dnh->lnh", tokens, k))
        weights = np.exp(logits / np.sqrt(8))
        weights /= weights.sum(1, keepdims=True)
        y = np.einsum("nl,lnh->nh", weights, np.einsum("ld,dnh->lnh", tokens, v))
        y = pool.out(jnp.asarray(y, jnp.float32))
        np.testing.assert_allclose(got[b, slot - 1], y + pool.mlp(pool.norm(y)), atol=1e-4)
    assert not got[0, 2:].any() and not got[1, :2].any()


def test_map_pool_survives_logits_far_apart_between_images():
    """Each image has its own maximum: a row's common one would underflow the weaker image to 0 / 0."""
    pool = pooling.MapPool(CFG, rngs=nnx.Rngs(0))
    ids = jnp.asarray(np.repeat([[1, 2]], 12, axis=1), jnp.int32)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, L, 16)), jnp.float32)
    loud = x * jnp.where(ids == 1, 1e4, 1.0)[..., None]
    np.testing.assert_allclose(pool(loud, ids, 2)[0, 1], pool(x, ids, 2)[0, 1], atol=1e-5)


def test_mean_pool_is_the_mean():
    x = np.random.default_rng(0).standard_normal((1, L, 5)).astype(np.float32)
    ids = np.repeat([[1, 3, 0]], [9, 7, 8], axis=1).astype(np.int32)
    got = pooling.mean_pool(jnp.asarray(x), jnp.asarray(ids), K)
    np.testing.assert_allclose(got[0, 0], x[0, :9].mean(0), atol=1e-6)
    np.testing.assert_allclose(got[0, 2], x[0, 9:16].mean(0), atol=1e-6)
    assert not got[0, 1::2].any()


def test_last_pool_is_the_last_token():
    """Rows that are full, padded, with a slot left out, and empty; in bfloat16 no bit of the token is lost."""
    ids = np.zeros((4, L), np.int32)
    ids[0], ids[1, :16] = np.repeat([1, 2, 3, 4], 6), np.repeat([1, 2], [1, 15])
    ids[2, :7] = np.repeat([2, 4], [4, 3])
    ends = {(0, 0): 5, (0, 1): 11, (0, 2): 17, (0, 3): 23, (1, 0): 0, (1, 1): 15, (2, 1): 3, (2, 3): 6}
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, L, 5)), jnp.bfloat16)
    expected, slope = np.zeros((4, K, 5), np.float32), np.zeros((4, L, 5), np.float32)
    weights = np.random.default_rng(1).standard_normal(expected.shape).astype(np.float32)
    for (b, k), end in ends.items():
        expected[b, k], slope[b, end] = np.asarray(x[b, end], np.float32), weights[b, k]
    got = pooling.last_pool(x, jnp.asarray(ids), K)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, expected)
    gradient = jax.grad(lambda x: (pooling.last_pool(x, jnp.asarray(ids), K) * weights).sum())
    np.testing.assert_array_equal(gradient(x.astype(jnp.float32)), slope)


def test_query_pool_is_attention_with_normalised_queries_and_keys():
    cfg = transformer.EncoderConfig(width=16, depth=1, heads=2, mlp_dim=24, head_size=5, qk_rms=True)
    pool = pooling.QueryPool(cfg, rngs=nnx.Rngs(0))
    pool.k_norm.scale[...] = jnp.asarray(np.random.default_rng(2).uniform(1, 3, (2, 5)), jnp.float32)
    x = np.random.default_rng(1).standard_normal((1, L, 16)).astype(np.float32)
    ids = np.repeat([[1, 3, 0]], 8, axis=1).astype(np.int32)
    got = pool(jnp.asarray(x), jnp.asarray(ids), K)

    def unit(z_H):
        return np.sqrt(5) * z_H / np.linalg.norm(z_H, axis=-1, keepdims=True)

    query = np.asarray(pool.query[...], np.float64)
    normed = (query - query.mean()) / query.std()
    q, k, v = (np.asarray(layer.kernel[...], np.float64) for layer in (pool.q, pool.k, pool.v))
    for slot in (1, 3):
        tokens = x[0][ids[0] == slot]
        keys = unit(np.einsum("ld,dnh->lnh", tokens, k)) * np.asarray(pool.k_norm.scale[...])
        logits = np.einsum("nh,lnh->nl", unit(np.einsum("d,dnh->nh", normed, q)), keys) / np.sqrt(5)
        weights = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        y = np.einsum("nl,lnh->nh", weights, np.einsum("ld,dnh->lnh", tokens, v))
        expected = np.einsum("nh,nhd->d", y, np.asarray(pool.out.kernel[...])) + query
        np.testing.assert_allclose(got[0, slot - 1], expected, atol=1e-5)
    assert not got[0, 1].any() and not got[0, 3].any()
