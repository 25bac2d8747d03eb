"""Attention on NVIDIA GPUs from Hopper on, in bfloat16: cuDNN's kernels, which take where each image begins and ends.

They skip what other images hold, forward and backward, at any row length. JAX only reaches them through a private
module, and cuDNN's own notes know of versions that mistake the gaps between images. So before the first use a small
case is compared with `dense` on the device at hand, gaps and isolation included; what differs is not used, and the log
says why. Only traced and lowered so far, never run on a GPU.
"""

import functools
import importlib.util
import inspect
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from navit_jax.attention import dense
from navit_jax.attention.devices import on_each_device
from navit_jax.attention.segments import bounds

log = logging.getLogger(__name__)
MODULE = "jax._src.cudnn.fused_attention_stablehlo"
CUDNN = 90600  # 9.6, the first with packed rows
TOLERANCE = 2e-2  # of the largest value: bfloat16 in, out and for the weights


class Prepared(NamedTuple):
    """Images of a row in order, M places: starts_BM1 [B, M + 1] and lengths_BM [B, M], int32, -1 where there is none.

    The last of the M + 1 is always -1: cuDNN wants an end there, which JAX fills in.
    """

    starts_BM1: jax.Array
    lengths_BM: jax.Array


def unavailable(case: Any) -> str:
    """Why this backend cannot run, or ''; the first call that gets as far tries the kernels on the device."""
    if case.platform not in ("gpu", "cuda"):
        return "its kernels run on NVIDIA GPUs only"
    if case.dtype not in (jnp.bfloat16, jnp.float16):
        return f"its kernels take bfloat16 or float16, not {case.dtype}"
    if not case.contiguous:
        return "it needs the tokens of an image side by side"
    if case.capacity is None:
        return "it needs rows that were planned, to know how many images they hold at most"
    if case.head_dim % 8 or case.head_dim > 128:
        return f"it needs heads of a multiple of 8 and at most 128 numbers, not {case.head_dim}"
    return _on_this_device(case.head_dim, case.dtype)


@functools.cache
def _on_this_device(head_dim: int, dtype: jnp.dtype) -> str:
    """Versions, the device, and whether the kernels agree with `dense` on it; asked once."""
    if importlib.util.find_spec(MODULE) is None:
        return f"this version of jax has no {MODULE}"
    module = importlib.import_module(MODULE)
    asked = {"q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "scale"}
    if not asked <= set(inspect.signature(module.dot_product_attention).parameters):
        return "this version of jax calls cuDNN in another way"
    try:
        capability = float(jax.local_devices()[0].compute_capability)
        version = module.check_cudnn_version()
        if capability < 9 or version < CUDNN:
            return f"it needs compute capability 9.0 and cuDNN 9.6; here are {capability} and {version}"
        with ThreadPoolExecutor(1) as pool:  # a thread of its own, as this one may be tracing a step
            reason = pool.submit(disagreement, head_dim, dtype).result()
    except Exception as error:  # whatever a private interface or a driver raises: the other backends work
        reason = (
            f"cuDNN refuses a small case: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
    if reason:
        log.warning("attention without cuDNN: %s", reason)
    return reason


def disagreement(head_dim: int, dtype: jnp.dtype) -> str:
    """How outputs or gradients of a small case differ from `dense`'s, or depend on other images; '' if they do not."""
    rng, length = np.random.default_rng(0), 256
    ids = np.zeros((3, length), np.int32)  # the last row is all padding
    for row, lengths in zip(ids, ([1, 63, 64, 65, 30], [200])):
        row[: sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    ids[0, 60:64] = 0  # a gap in between, as well as behind
    x = [rng.standard_normal((3, length, 2, head_dim)).astype(dtype) for _ in range(4)]
    others = [np.where((ids == 3)[..., None, None], a, 8 * a[:, ::-1]).astype(dtype) for a in x]

    def run(f: Any, q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> tuple:
        out, pull = jax.vjp(f, q, k, v)
        return (out, *pull(d_out))

    prepared = jax.jit(_prepare, static_argnums=1)(ids, 6)
    ours = jax.jit(functools.partial(run, lambda *qkv: _attend(*qkv, (jnp.asarray(ids), prepared))))
    theirs = jax.jit(functools.partial(run, lambda *qkv: dense.attend(*qkv, jnp.asarray(ids))))
    exact = theirs(*(a.astype(np.float32) for a in x))
    for name, a, b, changed in zip(("outputs", "dq", "dk", "dv"), ours(*x), exact, ours(*others)):
        a, b, changed = (np.asarray(y, np.float32) for y in (a, b, changed))
        error = np.abs(a - b).max() / np.abs(b).max()
        if not error < TOLERANCE:
            return f"{name} differ from those of dense attention by {error:.3g} of the largest"
        if (
            not np.abs(a - changed)[ids == 3].max() < TOLERANCE * np.abs(b).max()
        ):  # gradients are not repeatable to the bit
            return f"{name} of an image depend on other images"
    return ""


def prepare(ids_BL: jax.Array, capacity: Any) -> Prepared:
    """Where images begin and how long they are; ids: [B, L] int32, contiguous, 0 = padding. Made once a step."""
    return on_each_device(lambda ids: _prepare(ids, capacity.places), (), ids_BL)


def _prepare(ids_BL: jax.Array, places: int) -> Prepared:
    length = ids_BL.shape[1]
    first_BL, last_BL = bounds(ids_BL)
    at_L = jnp.arange(length, dtype=jnp.int32)
    starts_BL = jnp.sort(jnp.where((first_BL == at_L) & (ids_BL > 0), at_L, length))
    starts_BM = starts_BL[:, : max(2, places)]  # of one place, JAX would think that rows are not packed
    some_BM, at_BM = starts_BM < length, jnp.minimum(starts_BM, length - 1)
    lengths_BM = jnp.where(some_BM, jnp.take_along_axis(last_BL, at_BM, 1) - at_BM + 1, -1)
    return Prepared(jnp.pad(jnp.where(some_BM, starts_BM, -1), ((0, 0), (0, 1)), constant_values=-1), lengths_BM)


def attend(q_BLNH: jax.Array, k_BLNH: jax.Array, v_BLNH: jax.Array, ids_BL: jax.Array, prepared: Prepared) -> jax.Array:
    """Softmax attention among tokens of equal id; outputs and gradients of id 0 are exactly 0.

    q, k, v: [B, L, N, H] of bfloat16 or float16; ids: [B, L] int32, contiguous. Returns [B, L, N, H] in that dtype;
    logits and softmax are float32, the weights are rounded for their product with v, as in `dense`.
    """
    return on_each_device(_attend, (q_BLNH, k_BLNH, v_BLNH), (ids_BL, prepared))


def _attend(q_BLNH: jax.Array, k_BLNH: jax.Array, v_BLNH: jax.Array, rest: tuple) -> jax.Array:
    ids_BL, (starts_BM1, lengths_BM) = rest
    module = importlib.import_module(MODULE)
    real = ids_BL[..., None, None] > 0  # cuDNN leaves the rest of outputs and gradients as it finds the memory
    out_BLNH = module.dot_product_attention(
        *(jnp.where(real, x, 0) for x in (q_BLNH, k_BLNH, v_BLNH)),
        q_seqlen=lengths_BM,
        kv_seqlen=lengths_BM,
        q_offsets=starts_BM1,
        kv_offsets=starts_BM1,
        scale=q_BLNH.shape[-1] ** -0.5,
        mask_type=module.MaskType.NO_MASK,
    )
    return jnp.where(real, out_BLNH, 0)
