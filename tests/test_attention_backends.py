"""Attention that skips what it need not see, on the CPU: values, gradients and isolation against a float64 oracle."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import oracle

from navit_jax.attention import tiles
from navit_jax.attention.segments import key_tiles

N, H = 2, 8
NAMES = ("out", "dq", "dk", "dv")


def rows_of(length, *lengths_per_row):
    ids = np.zeros((len(lengths_per_row), length), np.int32)
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


def check(ids, seed=0):
    x = inputs(ids, seed)
    assert_matches(run(*x, ids), oracle(*x[:3], ids, x[3]), ids)


def fitting(lengths, length):
    return [n for i, n in enumerate(lengths) if sum(lengths[: i + 1]) <= length]


def test_edge_lengths():
    check(rows_of(192, [1, 191], [192], [], [64, 64, 64], [63, 65], [65, 63, 64], [1] * 150, [128]))


@pytest.mark.parametrize("length", [1, 7, 63, 65, 130])
def test_rows_that_tiles_do_not_divide(length):
    check(rows_of(length, [length], [1], [], fitting([3, 40, 30, 20], length)))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(1, 150), max_size=8), min_size=5, max_size=5), st.integers(0, 2**31))
def test_any_lengths(lengths, seed):
    check(rows_of(192, *(fitting(row, 192) for row in lengths)), seed)


def test_one_tile_at_a_time_and_many(monkeypatch):
    ids = rows_of(192, [1, 100, 80], [192], [], [70, 70], [20] * 9)
    x = inputs(ids)
    for batch in (1, 1000):
        monkeypatch.setattr(tiles, "BATCH", batch)
        jax.clear_caches()
        assert_matches(run(*x, ids), oracle(*x[:3], ids, x[3]), ids)


def test_garbage_in_padding_and_neighbours_is_not_seen():
    ids = rows_of(192, [50, 80, 30], [192], [190])
    x, garbage = inputs(ids), inputs(ids, seed=7)
    others = [jnp.where((ids == 2)[..., None, None], a, 1e4 * b) for a, b in zip(x[:3], garbage)]
    for a, b in zip(run(*x, ids), run(*others, x[3], ids)):
        np.testing.assert_array_equal(np.asarray(a)[ids == 2], np.asarray(b)[ids == 2])


def test_images_may_change_places():
    """Equal up to the order of sums: an image that moves meets the borders of tiles elsewhere."""
    lengths = [30, 64, 1, 90]
    order = [2, 3, 0, 1]
    ids, moved = rows_of(192, lengths), rows_of(192, [lengths[i] for i in order])
    at = np.concatenate([np.flatnonzero(ids[0] == i + 1) for i in order] + [np.flatnonzero(ids[0] == 0)])
    x = inputs(ids)
    for a, b in zip(run(*x, ids), run(*(a[:, at] for a in x), moved)):
        np.testing.assert_allclose(np.asarray(a)[:, at], b, rtol=1e-5, atol=2e-6)


def test_one_program_for_every_batch():
    rng, traces = np.random.default_rng(0), []

    @jax.jit
    def step(q, k, v, ids):
        traces.append(1)
        prepared = tiles.prepare(ids)
        return jax.grad(lambda q: tiles.attend(q, k, v, ids, prepared).sum())(q)

    for seed in range(20):
        ids = rows_of(192, *(fitting(rng.integers(1, 192, 9).tolist(), 192) for _ in range(3)))
        step(*inputs(ids, seed)[:3], ids)
    assert len(traces) == 1 and step._cache_size() == 1


def test_large_logits_stay_finite():
    ids = rows_of(192, [100, 40], [])
    x = inputs(ids)
    x[0] = 30 * x[0]
    assert_matches(run(*x, ids), oracle(*x[:3], ids, x[3]), ids, bound=1e-5)


def test_bfloat16_keeps_float32_logits():
    ids = rows_of(192, [100, 40, 52], [192], [])
    x = inputs(ids, dtype=jnp.bfloat16)
    x[0] = 4 * x[0]
    got = run(*x, ids)
    assert {a.dtype for a in got} == {jnp.dtype(jnp.bfloat16)}
    assert_matches(got, oracle(*x[:3], ids, x[3]), ids, bound=8e-3)


def test_key_tiles_are_those_of_the_images_in_a_tile():
    ids = rows_of(32, [3, 9, 4], [32], [], [8, 8])
    first, count = key_tiles(jnp.asarray(ids), 8, 4)
    np.testing.assert_array_equal(first, [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 2, 0, 0]])
    np.testing.assert_array_equal(count, [[3, 4, 0, 0], [8, 8, 8, 8], [0, 0, 0, 0], [2, 2, 0, 0]])


def test_a_step_pays_only_for_the_tiles_it_sees():
    """Trips of the compiled loops cannot be counted here; what they run over can."""
    short, long = (tiles.prepare(jnp.asarray(rows_of(1024, *([n] * (1024 // n) for _ in range(2))))) for n in (64, 1024))
    assert int(short.count_T.sum()) == 2 * 16 and int(long.count_T.sum()) == 2 * 16 * 16
