"""Attention by cuDNN as far as a machine without a GPU can tell: what it is told, when it is refused, its two calls."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention_backends import L, inputs, rows_of, run

from input_pipeline.capacity import Capacity
from navit_jax.attention import Case, cudnn, dense

CAPACITY = Capacity(1, ((6, L),))
CUDNN = "jax._src.cudnn.fused_attention_stablehlo"


def case(**changes):
    usual = dict(platform="gpu", rows=4, length=L, head_dim=64, contiguous=True, capacity=CAPACITY)
    return Case(**usual | dict(dtype=jnp.dtype(jnp.bfloat16)) | changes)


def test_cudnn_is_told_where_images_begin_and_how_long_they_are():
    ids = rows_of([1, 63, 64], [], [192], [2] * 6)
    ids[0, 1:10] = 0  # a gap
    starts, lengths = jax.jit(cudnn.prepare, static_argnums=1)(ids, CAPACITY)
    expected = [[0, 10, 64], [], [0], [0, 2, 4, 6, 8, 10], []], [[1, 54, 64], [], [192], [2] * 6, []]
    for found, rows, width in zip((starts, lengths), expected, (7, 6)):
        np.testing.assert_array_equal(found, [row + [-1] * (width - len(row)) for row in rows])


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(platform="cpu"), "NVIDIA GPUs only"),
        (dict(dtype=jnp.dtype(jnp.float32)), "bfloat16 or float16, not float32"),
        (dict(contiguous=False), "side by side"),
        (dict(capacity=None), "planned"),
        (dict(head_dim=60), "multiple of 8"),
        ({}, "AttributeError|cuDNN"),  # this machine's device is a CPU
    ],
)
def test_cudnn_says_why_it_cannot_run(changes, reason):
    cudnn._on_this_device.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cudnn.log, "warning", lambda *args: None)
        found = cudnn.unavailable(case(**changes))
    assert any(word in found for word in reason.split("|")), found


def like_cudnn(leak=0.0):
    """Its interface on the CPU, with memory that nobody wrote in padding; `leak` of it reaches the images."""

    def attention(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
        assert q_seqlen is kv_seqlen and q_offsets is kv_offsets and scale == q.shape[-1] ** -0.5
        at, starts = jnp.arange(q.shape[1])[:, None], q_offsets[:, None, :-1]
        mine = (starts >= 0) & (at >= starts) & (at < starts + q_seqlen[:, None])
        ids = (mine * (1 + jnp.arange(mine.shape[-1]))).sum(-1).astype(jnp.int32)
        out = dense.attend(q, k, v, ids) + jnp.asarray(leak, q.dtype) * v.mean(1, keepdims=True)
        return jnp.where(ids[..., None, None] > 0, out, jnp.nan).astype(q.dtype)

    return attention


@pytest.mark.parametrize(
    "wrong, reason",
    [({}, ""), pytest.param(dict(leak=0.5), "outputs differ", marks=pytest.mark.slow)],
)
def test_cudnn_is_compared_with_dense_before_it_is_used(monkeypatch, wrong, reason):
    monkeypatch.setattr(f"{CUDNN}.dot_product_attention", like_cudnn(**wrong))
    found = cudnn.disagreement(64, jnp.dtype(jnp.bfloat16))
    assert found.startswith(reason) and bool(found) == bool(reason), found


@pytest.mark.slow
def test_cudnn_lowers_to_its_two_kernels_with_all_that_they_take(monkeypatch):
    monkeypatch.setattr(f"{CUDNN}.check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(f"{CUDNN}.check_compute_capability", lambda capability: True)
    monkeypatch.setattr(f"{CUDNN}.is_cuda_compute_capability_equal", lambda capability: False)
    ids = rows_of([1, 63, 64], [192])
    traced = jax.jit(partial(run.__wrapped__, backend=cudnn, capacity=CAPACITY)).trace(
        *inputs(ids, dtype=jnp.bfloat16, head_dim=64), ids
    )
    calls = [line for line in traced.lower(lowering_platforms=("cuda",)).as_text().split("\n") if "@__cudnn$" in line]
    assert ["fmhaSoftmaxBackward" in call for call in calls] == [False, True]
    for call in calls:
        assert "max_seg_per_batch\\22: 6" in call and "fmha_scale\\22: 0.125" in call
        assert call.count("tensor<5x6xi32>") == 2 and call.count("tensor<5x7xi32>") == 2
