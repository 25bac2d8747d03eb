"""Attention that skips what it need not see, on the CPU: values, gradients and isolation against a float64 oracle."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import oracle

from navit_jax.attention import tiles
from navit_jax.attention.segments import key_tiles

B, L, N, H = 5, 192, 2, 8
NAMES = ("out", "dq", "dk", "dv")


def rows_of(*lengths_per_row, rows=B, length=L):
    ids = np.zeros((rows, length), np.int32)
    for row, lengths in zip(ids, lengths_per_row):
        filled = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        row[: len(filled)] = filled
    return ids


def inputs(ids, seed=0, dtype=jnp.float32, heads=N, head_dim=H):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal((*ids.shape, heads, head_dim)), dtype) for _ in range(4)]


@partial(jax.jit, static_argnames=("backend", "capacity"))
def run(q, k, v, d_out, ids, backend=tiles, capacity=None):
    prepared = backend.prepare(ids, capacity)
    out, pull = jax.vjp(lambda *qkv: backend.attend(*qkv, ids, prepared), q, k, v)
    return out, *pull(d_out)


def assert_matches(got, expected, ids, bound=3e-6):
    for name, a, b in zip(NAMES, got, expected):
        error = np.abs(np.asarray(a, np.float64) - b).max() / max(1.0, np.abs(b).max())
        assert error < bound, (name, error)
        assert not np.any(np.asarray(a)[ids == 0]), f"{name} of padding is not exactly 0"


def check(ids, seed=0, run=run, **kwargs):
    x = inputs(ids, seed, **kwargs)
    assert_matches(run(*x, ids), oracle(*x[:3], ids, x[3]), ids)


def fitting(lengths, length=L):
    return [n for i, n in enumerate(lengths) if sum(lengths[: i + 1]) <= length]


def garbage_elsewhere(ids, run=run, **kwargs):
    """Other queries, keys and values in all images but the second, and in padding, change no bit of the second."""
    x, garbage = inputs(ids, **kwargs), inputs(ids, seed=7, **kwargs)
    others = [jnp.where((ids == 2)[..., None, None], a, 1e4 * b) for a, b in zip(x[:3], garbage)]
    for a, b in zip(run(*x, ids), run(*others, x[3], ids)):
        np.testing.assert_array_equal(np.asarray(a)[ids == 2], np.asarray(b)[ids == 2])


def test_edge_lengths():
    check(rows_of([1, 191], [192], [], [64, 64, 64], [63, 65]))
    check(rows_of([65, 63, 64], [1] * 150, [128], [1], [127, 65]))


def test_gaps_of_padding_between_images():
    ids = rows_of([40, 60, 92], [1, 100, 91], [64, 64, 64])
    ids[0, 30:45], ids[1, 0], ids[2, 64:128] = 0, 0, 0
    check(ids)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(1, 150), max_size=8), min_size=B, max_size=B), st.integers(0, 2**31))
def test_any_lengths(lengths, seed):
    check(rows_of(*map(fitting, lengths)), seed)


def test_garbage_in_padding_and_neighbours_is_not_seen():
    garbage_elsewhere(rows_of([50, 80, 30], [100, 92], [190]))


def test_images_may_change_places():
    """Equal up to the order of sums: an image that moves meets the borders of tiles elsewhere."""
    lengths, order = [30, 64, 1, 90], [2, 3, 0, 1]
    ids, moved = rows_of(lengths), rows_of([lengths[i] for i in order])
    at = np.concatenate([np.flatnonzero(ids[0] == i + 1) for i in order] + [np.flatnonzero(ids[0] == 0)])
    x = inputs(ids)
    for a, b in zip(run(*x, ids), run(*(a[:, at] for a in x), moved)):
        np.testing.assert_allclose(np.asarray(a)[:, at], b, rtol=1e-5, atol=2e-6)


def test_large_logits_stay_finite():
    ids = rows_of([100, 40], [])
    x = inputs(ids)
    x[0] = 30 * x[0]
    assert_matches(run(*x, ids), oracle(*x[:3], ids, x[3]), ids, bound=1e-5)


def test_one_program_for_every_batch():
    rng, before = np.random.default_rng(0), run._cache_size()
    for seed in range(20):
        ids = rows_of(*(fitting(rng.integers(1, L, 9).tolist()) for _ in range(B)))
        run(*inputs(ids, seed), ids)
    assert run._cache_size() - before <= 1


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 65])
def test_rows_that_tiles_do_not_divide(length):
    check(rows_of([length], [1], [], fitting([3, 40, 30, 20], length), length=length))


@pytest.mark.slow
def test_one_tile_at_a_time(monkeypatch):
    monkeypatch.setattr(tiles, "BATCH", 1)
    check(rows_of([1, 100, 80], [192], [], [70, 70], [20] * 9), run=jax.jit(lambda *args: run.__wrapped__(*args)))


@pytest.mark.slow
def test_bfloat16_keeps_float32_logits():
    ids = rows_of([100, 40, 52], [192], [])
    x = inputs(ids, dtype=jnp.bfloat16)
    x[0] = 4 * x[0]
    got = run(*x, ids)
    assert {a.dtype for a in got} == {jnp.dtype(jnp.bfloat16)}
    assert_matches(got, oracle(*x[:3], ids, x[3]), ids, bound=8e-3)


def test_key_tiles_are_those_of_the_images_in_a_tile():
    ids = rows_of([3, 9, 4], [32], [], [8, 8], rows=4, length=32)
    first, count = jax.jit(key_tiles, static_argnums=(1, 2))(ids, 8, 4)
    np.testing.assert_array_equal(first, [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 2, 0, 0]])
    np.testing.assert_array_equal(count, [[3, 4, 0, 0], [8, 8, 8, 8], [0, 0, 0, 0], [2, 2, 0, 0]])


def test_short_images_cost_few_tiles_and_those_with_most_come_first():
    prepare = jax.jit(tiles.prepare)
    short, long = (prepare(rows_of(*[[n] * (L // n)] * B)) for n in (64, 192))
    assert int(short.count_T.sum()) == B * 3 and int(long.count_T.sum()) == B * 9
    assert np.all(np.diff(prepare(rows_of([64, 100], [1], [150])).count_T) <= 0)


SHARDED = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from navit_jax import sharding
from navit_jax.attention import tiles
from test_attention_backends import inputs, rows_of, run
ids = rows_of([1, 191], [64, 64], [192], [], [100], [3] * 60, [63, 65], [30], rows=8)
x = inputs(ids)
mesh = sharding.make_mesh(dict(data=2, fsdp=1, tensor=2))
def step(q, k, v, d_out, ids):
    with sharding.under(mesh):
        return run.__wrapped__(q, k, v, d_out, ids, tiles)
heads = NamedSharding(mesh, P(sharding.BATCH, None, "tensor", None))
placed = *(jax.device_put(a, heads) for a in x), jax.device_put(ids, sharding.rows(mesh))
compiled = jax.jit(step).lower(*placed).compile()
text = compiled.as_text()
assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute")), text
for a, b in zip(compiled(*placed), run(*x, ids)):
    assert a.sharding.is_equivalent_to(heads, 4)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)
"""


@pytest.mark.slow
def test_each_device_attends_to_its_own_rows_and_heads_and_nothing_is_sent():
    folder = Path(__file__).parent
    flags = dict(JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=4")
    environment = os.environ | flags | {"PYTHONPATH": f"{folder.parent}:{folder}"}
    out = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr[-3000:]
