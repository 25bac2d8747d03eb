"""What towers are built of: linear maps, norms, the MLP, dropout. Parameters are float32, no module holds rng state."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name as keep

from navit_jax import cpu

NORMS = ("layer", "rms")
MLPS = ("gelu_tanh", "gelu", "quick_gelu", "swiglu")  # the last has a gate: silu(gate) * up


class Dense(nnx.Module):
    """A linear map over the last axes, [..., *ins] -> [..., *outs], in `dtype`; kernel [*ins, *outs] float32."""

    def __init__(
        self,
        ins: tuple[int, ...],
        outs: tuple[int, ...],
        *,
        bias: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        init: Callable = jax.nn.initializers.xavier_uniform(),  # noqa: B008
    ):
        self.ins, self.outs, self.dtype = ins, outs, dtype
        flat = init(rngs.params(), (int(np.prod(ins)), int(np.prod(outs))), jnp.float32)
        self.kernel = nnx.Param(flat.reshape(*ins, *outs))
        self.bias = nnx.Param(jnp.zeros(outs)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        lead = x.shape[: x.ndim - len(self.ins)]
        kernel = self.kernel.astype(self.dtype).reshape(int(np.prod(self.ins)), -1)
        y = _product(x.astype(self.dtype).reshape(-1, kernel.shape[0]), kernel).reshape(*lead, *self.outs)
        return y if self.bias is None else y + self.bias.astype(self.dtype)


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel; a tall kernel's gradient is made wide and then transposed, in 3/4 of the time on a CPU."""
    return x @ kernel


def _product_backward(kept: tuple, d: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Operands as they lie: of a transposed kernel XLA's partitioner would gather a second copy over fsdp.
    x, kernel = kept
    tall = kernel.shape[0] > kernel.shape[1]
    return (
        jnp.einsum("to,io->ti", d, kernel),
        cpu.pin(jnp.einsum("to,ti->oi", d, x)).T if tall else jnp.einsum("ti,to->io", x, d),
    )


_product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _product_backward)


class Norm(nnx.Module):
    """Normalisation over the last axis in float32; returns the input's dtype.

    kind: 'layer', or 'rms' (no mean is subtracted, and there is never a bias). shape: of the scale; its last axis is
    normalised, the ones before it are heads with a scale each.
    """

    def __init__(self, *shape: int, bias: bool, kind: str = "layer", eps: float = 1e-6):
        self.kind, self.eps = kind, eps
        self.scale = nnx.Param(jnp.ones(shape))
        self.bias = nnx.Param(jnp.zeros(shape)) if bias and kind == "layer" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = scaled_norm(x, self.scale[...], self.kind, self.eps)
        return y if self.bias is None else (y + self.bias[...]).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def scaled_norm(x: jax.Array, scale: jax.Array, kind: str = "layer", eps: float = 1e-6) -> jax.Array:
    """x over its root mean square, after its mean is subtracted ('layer') or not ('rms'), times scale; in x's dtype.

    Its own gradient: JAX's passes over x more often, and the two numbers a token that are kept need not be summed up
    again where a layer recomputes.
    """
    return _norm_forward(x, scale, kind, eps)[0]


def _norm_forward(x: jax.Array, scale: jax.Array, kind: str, eps: float) -> tuple[jax.Array, tuple]:
    wide = x.astype(jnp.float32)
    mean = keep(_mean(wide), "moments") if kind == "layer" else 0.0
    inverse = keep(jax.lax.rsqrt(_mean(jnp.square(wide - mean)) + eps), "moments")
    return ((wide - mean) * inverse * scale).astype(x.dtype), (x, scale, mean, inverse)


def _norm_backward(kind: str, eps: float, kept: tuple, d: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, scale, mean, inverse = kept
    unit, wide = (x.astype(jnp.float32) - mean) * inverse, d.astype(jnp.float32)
    product = wide * unit
    d_x = wide * scale - unit * _mean(product * scale)
    if kind == "layer":
        d_x = d_x - _mean(wide * scale)
    d_scale = product.sum(tuple(range(x.ndim - scale.ndim)))
    return (inverse * d_x).astype(x.dtype), d_scale.astype(scale.dtype)


def _mean(x: jax.Array) -> jax.Array:
    """Over the last axis, which stays."""
    return cpu.sum_rows(x) / x.shape[-1]


scaled_norm.defvjp(_norm_forward, _norm_backward)


class Mlp(nnx.Module):
    """up, activation, down; kind: one of MLPS."""

    def __init__(
        self, width: int, mlp_dim: int, *, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs, kind: str = "gelu_tanh"
    ):
        self.kind = kind
        self.up = Dense((width,), (mlp_dim,), bias=bias, dtype=dtype, rngs=rngs)
        if kind == "swiglu":
            self.gate = Dense((width,), (mlp_dim,), bias=bias, dtype=dtype, rngs=rngs)
        self.down = Dense((mlp_dim,), (width,), bias=bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        up = keep(self.up(x), "up")
        if self.kind == "swiglu":
            return self.down(jax.nn.silu(keep(self.gate(x), "gate")) * up)
        return self.down(_ACTIVATIONS[self.kind](up))


@jax.custom_vjp
def _gelu_tanh(x: jax.Array) -> jax.Array:
    """JAX's own gradient of it passes over the [B, L, F] array three times on a CPU, this one once.

    Its tanh is computed again: kept from the forward pass that a layer repeats, it would be another array to fetch.
    """
    return jax.nn.gelu(x, approximate=True)


def _gelu_tanh_backward(x: jax.Array, d: jax.Array) -> tuple[jax.Array]:
    scale = np.sqrt(2 / np.pi).astype(np.float32)
    wide = cpu.pin(x).astype(jnp.float32)
    tanh = jnp.tanh(scale * (wide + 0.044715 * wide**3))
    slope = 0.5 * (1 + tanh) + 0.5 * wide * (1 - tanh * tanh) * scale * (1 + 3 * 0.044715 * wide * wide)
    return ((d * slope).astype(x.dtype),)


_gelu_tanh.defvjp(lambda x: (_gelu_tanh(x), x), _gelu_tanh_backward)

_ACTIVATIONS = {
    "gelu_tanh": _gelu_tanh,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each value with probability `rate` and scales the others by 1 / (1 - rate); key None: returns x."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)
