"""The TPU kernels: interpreted on the CPU against the float64 oracle, and compiled for TPUs that are not here."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas
from jax.sharding import NamedSharding, PartitionSpec
from test_attention import oracle
from test_attention_backends import assert_matches, check, fitting, garbage_elsewhere, inputs
from test_attention_backends import rows_of as any_rows
from test_attention_backends import run as uncached

from input_pipeline.capacity import Capacity
from navit_jax import sharding
from navit_jax.attention import Case, flash, splash
from navit_jax.plan import topology

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='the TPU compiler is missing: pip install "jax[tpu]"'
)
B, L = 3, 384  # three tiles of 128 a row
rows_of = functools.partial(any_rows, rows=B, length=L)
KERNEL = dict(heads=1, head_dim=64)
SHORT = Capacity(1, ((50, 128),))


step = jax.jit(uncached.__wrapped__, static_argnames=("backend", "capacity"))  # compiled once for all tests


@pytest.fixture
def run(monkeypatch):
    """Outputs and gradients of a backend whose kernels are interpreted, in tiles of 128."""
    call = pallas.pallas_call
    monkeypatch.setattr(pallas, "pallas_call", lambda *args, **kwargs: call(*args, **kwargs | dict(interpret=True)))
    monkeypatch.setattr(splash, "tile_of", lambda longest, length: 128)
    monkeypatch.setattr(flash, "TILE", 128)
    return lambda backend, capacity=None: functools.partial(step, backend=backend, capacity=capacity)


@pytest.mark.parametrize("backend", [splash, pytest.param(flash, marks=pytest.mark.slow)])
def test_edge_lengths(run, backend):
    check(rows_of([1, 383], [128, 127, 129], []), run=run(backend), **KERNEL)
    check(rows_of([384], [64] * 6, [130]), run=run(backend), **KERNEL)
    check(rows_of([255, 129], [1] * 50, [256]), run=run(backend), **KERNEL)


@pytest.mark.parametrize("backend", [splash, pytest.param(flash, marks=pytest.mark.slow)])
def test_garbage_in_padding_and_neighbours_is_not_seen(run, backend):
    garbage_elsewhere(rows_of([100, 150, 60], [200, 184]), run=run(backend), **KERNEL)


@pytest.mark.slow
@pytest.mark.parametrize("backend, capacity", [(splash, None), (splash, SHORT), (flash, None)])
def test_any_lengths(run, backend, capacity):
    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.lists(st.integers(1, 128), max_size=9), min_size=B, max_size=B), st.integers(0, 2**31))
    def one(lengths, seed):
        check(rows_of(*(fitting(row, L) for row in lengths)), seed, run=run(backend, capacity), **KERNEL)

    one()


@pytest.mark.slow
def test_images_may_change_places(run):
    lengths, order = [30, 200, 1, 100], [2, 3, 0, 1]
    ids, moved = rows_of(lengths), rows_of([lengths[i] for i in order])
    at = np.concatenate([np.flatnonzero(ids[0] == i + 1) for i in order] + [np.flatnonzero(ids[0] == 0)])
    x = inputs(ids, **KERNEL)
    for a, b in zip(run(splash)(*x, ids), run(splash)(*(a[:, at] for a in x), moved)):
        np.testing.assert_allclose(np.asarray(a)[:, at], b, rtol=1e-5, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [splash, flash])
def test_rows_that_tiles_do_not_divide_and_any_head_size(run, backend):
    for length, head_dim in ((200, 32), (60, 128)):
        ids = any_rows([length], [1], [], fitting([3, 40, 30, 20], length), rows=4, length=length)
        check(ids, run=run(backend), heads=2, head_dim=head_dim)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [splash, flash])
def test_bfloat16_keeps_float32_logits(run, backend):
    ids = rows_of([100, 40, 52], [384], [])
    x = inputs(ids, dtype=jnp.bfloat16, **KERNEL)
    x[0] = 4 * x[0]
    got = run(backend)(*x, ids)
    assert {a.dtype for a in got} == {jnp.dtype(jnp.bfloat16)}
    assert_matches(got, oracle(*x[:3], ids, x[3]), ids, bound=8e-3)


@pytest.mark.slow
def test_one_program_for_every_batch(run):
    rng, before = np.random.default_rng(0), step._cache_size()
    for seed in range(20):
        ids = rows_of(*(fitting(rng.integers(1, L, 9).tolist(), L) for _ in range(B)))
        run(splash)(*inputs(ids, seed, **KERNEL), ids)
    assert step._cache_size() - before <= 1


def test_lists_are_as_long_as_the_promise_needs_and_a_broken_promise_shows(monkeypatch):
    monkeypatch.setattr(splash, "tile_of", lambda longest, length: 128)
    ids = jnp.asarray(any_rows([128] * 8, [1, 127, 2, 128, 128], [120, 1, 128], rows=3, length=1024))
    prepare = jax.jit(splash.prepare, static_argnums=1)
    none, short = prepare(ids, None), prepare(ids, SHORT)
    assert none.tiles_TW.shape == (24, 8) and short.tiles_TW.shape == (24, 3)
    assert none.visit_TW.sum(1).reshape(3, 8).tolist() == [[1] * 8, [1, 2, 3, 2] + [1] * 4, [2, 2] + [1] * 6]
    np.testing.assert_array_equal(short.visit_TW.sum(1), none.visit_TW.sum(1))
    assert short.fits_B.tolist() == [True] * 3 and none.fits_B.all()
    broken = prepare(jnp.asarray(any_rows([100, 500], [128], rows=3, length=1024)), SHORT)
    assert broken.fits_B.tolist() == [False, True, True]


def test_the_reasons_why_they_cannot_run():
    usual = dict(rows=64, length=4096, head_dim=64, dtype=jnp.dtype(jnp.bfloat16), contiguous=True, capacity=None)
    assert "TPUs only" in splash.unavailable(Case(platform="cpu", **usual))
    assert "TPUs only" in flash.unavailable(Case(platform="gpu", **usual))
    assert splash.unavailable(Case(platform="tpu", **usual)) == "" == flash.unavailable(Case(platform="tpu", **usual))
    assert "side by side" in splash.unavailable(Case(platform="tpu", **usual | dict(contiguous=False)))
    assert "scalar memory" in splash.unavailable(Case(platform="tpu", **usual | dict(rows=256, capacity=SHORT)))


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("kind", ["v5e", "v6e"])
@pytest.mark.parametrize(
    "backend, dtype, rows, length, capacity",
    [
        (splash, jnp.bfloat16, 4, 1024, Capacity(1, ((9, 256),))),
        (splash, jnp.bfloat16, 160, 4096, Capacity(1, ((90, 256),))),  # 327,680 tokens fill a device's scalar memory
        (splash, jnp.float32, 2, 2048, None),
        (flash, jnp.bfloat16, 4, 1024, None),
        (flash, jnp.bfloat16, 4, 200, None),
        (flash, jnp.float32, 4, 512, None),
    ],
)
def test_forward_and_backward_compile_for_tpus_in_a_sharded_step(kind, backend, dtype, rows, length, capacity):
    topology.prepare(topology.parse(f"{kind}:2x2"))
    mesh = sharding.make_mesh(dict(data=2, fsdp=1, tensor=2), topology.devices_for(f"{kind}:2x2"))
    case = Case("tpu", rows // 2, length, 64, jnp.dtype(dtype), True, capacity)
    assert backend.unavailable(case) == ""

    def step(q, k, v, d_out, ids):
        with sharding.under(mesh):
            return uncached.__wrapped__(q, k, v, d_out, ids, backend, capacity)

    heads = NamedSharding(mesh, PartitionSpec(sharding.BATCH, None, "tensor", None))
    x = jax.ShapeDtypeStruct((rows, length, 4, 64), dtype, sharding=heads)
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=sharding.rows(mesh))
    text = jax.jit(step).lower(x, x, x, x, ids).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3  # forward, dq, and dk with dv
    assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
