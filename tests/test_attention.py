"""Attention against a float64 oracle that loops over the segments, in outputs and in gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from input_pipeline.capacity import Capacity
from input_pipeline.errors import UserError
from navit_jax.attention import Case, attend, choose, make_groups

L, N, H = 48, 2, 8


def oracle(q, k, v, ids, d_out):
    """Output and dq, dk, dv, in float64, one group at a time; rows and heads in loops, no masks."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    out, d_q, d_k, d_v = (np.zeros_like(q) for _ in range(4))
    for b, row in enumerate(np.asarray(ids)):
        for group in set(row[row > 0].tolist()):
            for n in range(q.shape[2]):
                at = (b, np.flatnonzero(row == group), n)
                weights = np.exp(q[at] @ k[at].T / np.sqrt(q.shape[-1]))
                weights /= weights.sum(1, keepdims=True)
                out[at] = weights @ v[at]
                d_v[at] = weights.T @ d_out[at]
                d_weights = d_out[at] @ v[at].T
                d_logits = weights * (d_weights - (weights * d_weights).sum(1, keepdims=True)) / np.sqrt(q.shape[-1])
                d_q[at], d_k[at] = d_logits @ k[at], d_logits.T @ q[at]
    return out, d_q, d_k, d_v


@partial(jax.jit, static_argnames=("backend", "capacity"))
def with_gradients(q, k, v, ids, d_out, backend="dense", capacity=None):
    groups = make_groups(ids, backend=backend, capacity=capacity)
    out, pull = jax.vjp(lambda *qkv: attend(*qkv, groups), q, k, v)
    return out, *pull(d_out)


def rows_of(*lengths_per_row):
    ids = np.zeros((len(lengths_per_row), L), np.int32)
    for row, lengths in zip(ids, lengths_per_row):
        filled = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        row[: len(filled)] = filled
    return ids


def inputs(rng, rows, dtype=jnp.float32):
    return [jnp.asarray(rng.standard_normal((rows, L, N, H)), dtype) for _ in range(4)]


def assert_matches(ids, seed=0, scale=1.0, **how):
    q, k, v, d_out = inputs(np.random.default_rng(seed), len(ids))
    got = with_gradients(q * scale, k, v, ids, d_out, **how)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, oracle(q * scale, k, v, ids, d_out)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6 * scale, err_msg=name)
        assert not np.any(np.asarray(a)[ids == 0]), f"{name} of padding is not exactly 0"


def test_edge_lengths():
    assert_matches(rows_of([1, L - 1], [L], [], [1] * L, [L - 1], [16, 16, 16], [17, 15, 3]))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(1, 20), max_size=8), min_size=7, max_size=7), st.integers(0, 2**31))
def test_any_lengths(lengths, seed):
    fitting = [[n for i, n in enumerate(row) if sum(row[: i + 1]) <= L] for row in lengths]
    assert_matches(rows_of(*fitting), seed)


def test_groups_need_not_be_contiguous():
    assert_matches(np.random.default_rng(1).integers(0, 4, (7, L)).astype(np.int32))


def test_large_logits_stay_finite():
    assert_matches(rows_of([20, 20]), scale=30.0)


def test_garbage_in_padding_and_neighbours_is_not_seen():
    ids = rows_of([10, 20], [L])
    q, k, v, d_out = inputs(np.random.default_rng(0), 2)
    others = [
        jnp.where(ids[..., None, None] == 1, x, 1e4 * y) for x, y in zip((q, k, v), inputs(np.random.default_rng(7), 2))
    ]
    for a, b in zip(with_gradients(q, k, v, ids, d_out), with_gradients(*others, ids, d_out)):
        np.testing.assert_array_equal(np.asarray(a)[ids == 1], np.asarray(b)[ids == 1])


def test_bfloat16_keeps_float32_logits():
    q, k, v, d_out = inputs(np.random.default_rng(0), 3, jnp.bfloat16)
    q = q * 4  # logits of about 10: rounded to bfloat16 they would be off by 0.03
    ids = rows_of([30, 10], [L], [])
    got = with_gradients(q, k, v, ids, d_out)
    expected = oracle(q, k, v, ids, d_out)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected):
        assert a.dtype == jnp.bfloat16
        error = np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()
        assert error < 8e-3, (name, error)


def slabs(rows, *lengths):
    """The least capacity for these images, lengths rounded up to multiples of 8."""
    most = np.sort([-(-n // 8) * 8 for n in lengths])
    found, counts = np.unique(most, return_counts=True)
    return Capacity(rows, tuple(zip(counts.tolist()[::-1], found.tolist()[::-1])))


def test_slabs_edge_lengths():
    ids = rows_of([1, L - 1], [L], [], [1] * 20, [17, 15, 3], [16, 16, 16], [8, 9], [L])
    assert_matches(ids, backend="slabs", capacity=slabs(2, *[1] * 21, 15, 16, 16, 17, L, L))
    assert_matches(rows_of([], []), backend="slabs", capacity=slabs(1, L))
    assert_matches(rows_of([1] * L, [2, 3]), backend="slabs", capacity=Capacity(1, ((4, 8), (L, 1))))  # places > tokens


def test_a_group_beyond_its_capacity_is_not_a_number():
    """Rather than an image lost in silence; other groups are as ever."""
    ids = rows_of([20, 10], [30], [8, 8, 8], [8])
    q, k, v, d_out = inputs(np.random.default_rng(0), 4)
    out = np.asarray(with_gradients(q, k, v, ids, d_out, backend="slabs", capacity=Capacity(1, ((1, 24), (1, 16))))[0])
    assert np.isnan(out[1:3]).all() and np.isfinite(out[[0, 3]]).all()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(1, 20), max_size=5), min_size=8, max_size=8), st.integers(0, 2**31))
def test_slabs_of_any_lengths_in_one_program(lengths, seed):
    fitting = [[n for i, n in enumerate(row) if sum(row[: i + 1]) <= L] for row in lengths]
    how = dict(backend="slabs", capacity=Capacity(4, ((20, 24),)))
    assert_matches(rows_of(*[[1]] * 8), **how)
    programs = with_gradients._cache_size()
    assert_matches(rows_of(*fitting), seed, **how)
    assert with_gradients._cache_size() == programs


def test_rows_of_a_group_and_places_of_a_slab_do_not_matter():
    """The same images in other rows of the group and in another order: the same result for each."""
    q, k, v, d_out = inputs(np.random.default_rng(0), 2)
    ids, turned = rows_of([10, 20], [5, 40]), rows_of([40, 5], [20, 10])
    pairs = [((0, 1), (1, 2)), ((0, 2), (1, 1)), ((1, 1), (0, 2)), ((1, 2), (0, 1))]
    moved = [np.zeros_like(x) for x in (q, k, v, d_out)]
    for (row, slot), (new_row, new_slot) in pairs:
        for x, y in zip((q, k, v, d_out), moved):
            y[new_row][turned[new_row] == new_slot] = np.asarray(x)[row][ids[row] == slot]
    how = dict(backend="slabs", capacity=Capacity(2, ((2, L), (3, 24))))
    for a, b in zip(with_gradients(q, k, v, ids, d_out, **how), with_gradients(*moved[:3], turned, moved[3], **how)):
        for (row, slot), (new_row, new_slot) in pairs:
            np.testing.assert_array_equal(
                np.asarray(a)[row][ids[row] == slot], np.asarray(b)[new_row][turned[new_row] == new_slot]
            )


def test_other_images_change_nothing_in_slabs():
    ids = rows_of([10, 20], [L])
    q, k, v, d_out = inputs(np.random.default_rng(0), 2)
    others = [
        jnp.where(ids[..., None, None] == 1, x, 1e4 * y) for x, y in zip((q, k, v), inputs(np.random.default_rng(7), 2))
    ]
    how = dict(backend="slabs", capacity=Capacity(2, ((1, L), (2, 24))))
    for a, b in zip(with_gradients(q, k, v, ids, d_out, **how), with_gradients(*others, ids, d_out, **how)):
        np.testing.assert_array_equal(np.asarray(a)[ids == 1], np.asarray(b)[ids == 1])


def case(platform="cpu", **other):
    rest = dict(rows=8, length=1024, head_dim=64, dtype=jnp.dtype("float32"), contiguous=True, capacity=None)
    return Case(platform, **(rest | other))


def test_the_rule():
    planned = Capacity(4, ((8, 256),))
    assert choose("auto", case(capacity=planned)) == "slabs"
    assert (
        choose("auto", case()) == choose("auto", case(capacity=planned, rows=6)) == "tiles"
    )  # no plan, no whole group
    assert choose("auto", case(contiguous=False, capacity=planned)) == "dense"
    assert choose("auto", case("tpu", length=256)) == choose("auto", case("gpu", length=256)) == "dense"
    assert [choose("auto", case("tpu", length=length)) for length in (512, 4096)] == ["flash", "splash"]
    assert choose("auto", case("gpu", capacity=planned)) == "slabs"  # float32: nothing for cuDNN


def test_backends_that_cannot_be_are_refused_with_the_reason():
    with pytest.raises(UserError, match="slab.*auto, dense, slabs"):
        choose("slab", case())
    with pytest.raises(UserError, match="'slabs', which cannot run here: its rows were not planned"):
        choose("slabs", case())
    with pytest.raises(UserError, match="6 rows, not whole groups of packing.rows_per_group=4"):
        choose("slabs", case(rows=6, capacity=Capacity(4, ((8, 256),))))


def test_groups_pass_through_jit_with_static_metadata():
    groups = make_groups(rows_of([3], [4]), capacity=Capacity(2, ((2, 8),)), backend="slabs")
    back = jax.jit(lambda g: g)(groups)
    assert back.backend == "slabs" and back.prepared.capacity.rows == 2 and back.ids_BL.dtype == jnp.int32
