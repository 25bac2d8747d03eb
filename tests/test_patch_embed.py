"""The patch embedding: pixel scaling and FlexiViT's defining property."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from navit_jax import patch_embed


def test_pixels_are_normalised_to_plus_minus_one():
    for dtype, top in ((np.uint8, 255), (np.uint16, 65535)):
        values = np.array([0, 1, top // 2, top], dtype)
        expected = values.astype(np.float64) / top * 2 - 1
        np.testing.assert_allclose(jax.jit(patch_embed.normalise)(values), expected, atol=1e-7)
    np.testing.assert_array_equal(patch_embed.normalise(np.float32([-1, 0.5])), [-1, 0.5])
    with pytest.raises(TypeError, match="int32"):
        patch_embed.normalise(np.zeros(3, np.int32))


@pytest.mark.parametrize("old, new", [(4, 7), (8, 5), (16, 32), (14, 14), (3, 1)])
def test_resize_matrix_is_plain_bilinear(old, new):
    x = np.random.default_rng(0).standard_normal(old)
    expected = jax.image.resize(jnp.asarray(x), (new,), "bilinear", antialias=False)
    np.testing.assert_allclose(patch_embed.resize_matrix(old, new) @ x, expected, atol=1e-6)


@pytest.mark.parametrize("stored, patch, channels", [(4, 8, 3), (8, 8, 3), (5, 7, 1), (8, 14, 2)])
def test_larger_patches_keep_every_product(stored, patch, channels):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((6, stored, stored, channels)).astype(np.float32)
    w = rng.standard_normal((stored * stored * channels, 10)).astype(np.float32)
    larger = jax.image.resize(x, (6, patch, patch, channels), "bilinear", antialias=False)
    w_new = patch_embed.resample_kernel(jnp.asarray(w), stored, patch, channels)
    np.testing.assert_allclose(np.asarray(larger).reshape(6, -1) @ w_new, x.reshape(6, -1) @ w, atol=1e-3)


def test_smaller_patches_take_the_least_squares_kernel():
    """pinv(B^T) w is, among the minimisers of |B^T w_new - w|, the shortest: solved here without a factorised side."""
    stored, patch = 6, 4
    side = patch_embed.resize_matrix(stored, patch)
    w = np.random.default_rng(2).standard_normal((stored * stored, 3))
    expected = np.linalg.lstsq(np.kron(side, side).T, w, rcond=None)[0]
    got = patch_embed.resample_kernel(jnp.asarray(w, jnp.float32), stored, patch, 1)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_gradient_reaches_the_stored_kernel():
    embed = patch_embed.PatchEmbed(8, 3, 5, stored=4, bias=False, dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert embed.kernel.shape == (4 * 4 * 3, 5)
    graphdef, state = nnx.split(embed)
    values = np.random.default_rng(0).integers(0, 256, (2, 3, 8 * 8 * 3), np.uint8)
    gradient = jax.grad(lambda s: jnp.square(nnx.merge(graphdef, s)(values)).sum())(state)
    assert np.abs(gradient["kernel"][...]).min() > 0


def test_patches_of_another_size_are_refused_with_both_numbers():
    embed = patch_embed.PatchEmbed(4, 3, 5, stored=0, bias=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert embed(np.zeros((1, 2, 48), np.uint8)).shape == (1, 2, 5)
    with pytest.raises(ValueError, match="27.*48"):
        embed(np.zeros((1, 2, 27), np.uint8))
