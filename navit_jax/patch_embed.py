"""From pixels to tokens: bytes are normalised on the device, then one dense layer, as the patches are cut already.

A kernel may be kept at another patch size than it runs at (FlexiViT): it is resampled at each use, because resampling a
resampled kernel loses detail, and the gradient reaches the kept one.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class PatchEmbed(nnx.Module):
    """x = normalised patch @ kernel (+ bias), in `dtype`; kernel [stored * stored * channels, D] float32.

    mean, std: of pixels in [0, 1], one for all channels or one a channel. norm_in, norm_out: of the flat patch before
    the product, and of what comes out of it; None: without.
    """

    def __init__(
        self,
        patch: int,
        channels: int,
        width: int,
        *,
        stored: int,
        bias: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        mean: tuple[float, ...] = (0.5,),
        std: tuple[float, ...] = (0.5,),
        norm_in: nnx.Module | None = None,
        norm_out: nnx.Module | None = None,
    ):
        self.patch, self.stored, self.channels, self.dtype = patch, stored or patch, channels, dtype
        self.mean, self.std, self.norm_in, self.norm_out = mean, std, norm_in, norm_out
        values = self.stored**2 * channels
        self.kernel = nnx.Param(jax.nn.initializers.lecun_normal()(rngs.params(), (values, width), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width)) if bias else None

    def __call__(self, values_BLP: jax.Array) -> jax.Array:
        """[B, L, D]; raises ValueError when P is not patch * patch * channels."""
        expected = self.patch**2 * self.channels
        if values_BLP.shape[-1] != expected:
            raise ValueError(f"patches hold {values_BLP.shape[-1]} values; this model takes {expected}")
        kernel_PD = resample_kernel(self.kernel[...], self.stored, self.patch, self.channels)
        x_BLP = normalise(values_BLP, self.mean, self.std)
        x_BLP = (x_BLP if self.norm_in is None else self.norm_in(x_BLP)).astype(self.dtype)
        x_BLD = x_BLP @ kernel_PD.astype(self.dtype)
        x_BLD = x_BLD if self.bias is None else x_BLD + self.bias.astype(self.dtype)
        return x_BLD if self.norm_out is None else self.norm_out(x_BLD)


def normalise(values: jax.Array, mean: tuple[float, ...] = (0.5,), std: tuple[float, ...] = (0.5,)) -> jax.Array:
    """(pixel - mean) / std of pixels in [0, 1], float32, as [-1, 1] by default; floats are taken as normalised.

    values: [..., n * channels] uint8 or uint16, the channel last. mean, std: one number, or one a channel.
    """
    if jnp.issubdtype(values.dtype, jnp.floating):
        return values.astype(jnp.float32)
    if values.dtype not in (jnp.uint8, jnp.uint16):
        raise TypeError(f"pixels are {values.dtype}; expected uint8, uint16 or normalised floats")
    mean, std = (np.tile(x, values.shape[-1] // len(x)) if len(x) > 1 else x[0] for x in (mean, std))
    scale = np.float32(1 / (np.float64(std) * jnp.iinfo(values.dtype).max))
    return values.astype(jnp.float32) * scale - np.float32(np.float64(mean) / std)


def resample_kernel(kernel_PD: jax.Array, stored: int, patch: int, channels: int) -> jax.Array:
    """The kernel for another patch size, [patch * patch * channels, D], whose products change least.

    With B the bilinear resize of a patch, w_new = pinv(B)^T w: for patch >= stored, <x, w> = <B x, w_new> exactly. B is
    a product of one matrix a side, so its pseudo-inverse is too. Source: Beyer et al. 2022 (FlexiViT, 2212.08013), 3.3.
    """
    if stored == patch:
        return kernel_PD
    side_pq = jnp.asarray(np.linalg.pinv(resize_matrix(stored, patch)).T, jnp.float32)
    kernel = kernel_PD.reshape(stored, stored, channels, -1)
    kernel = jnp.einsum("yv,xw,vwcd->yxcd", side_pq, side_pq, kernel, precision=jax.lax.Precision.HIGHEST)
    return kernel.reshape(patch * patch * channels, -1)


def resize_matrix(old: int, new: int) -> np.ndarray:
    """[new, old] float64: bilinear resize of `old` samples, half-pixel centres, edges repeated, no antialias."""
    at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old)))
