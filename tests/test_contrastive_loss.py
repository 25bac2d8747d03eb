"""The ring over the devices gives the loss and the gradients of the dense formula, and never holds its matrix."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contrastive_ring import (
    BIAS,
    BLOCK,
    CASES,
    KINDS,
    MESHES,
    SCALE,
    E,
    M,
    N,
    alone,
    compiled,
    draw,
    largest,
    reference,
    step,
)
from helpers import fast_jit

from benchmarks import contrastive_loss as benchmark
from input_pipeline.errors import UserError
from navit_jax import sharding
from navit_jax.contrastive_loss import Ids, contrastive_loss
from navit_jax.plan import hlo


def assert_equal(got, expected, rtol=1e-5):
    for name, a, b in zip(("loss", "images", "correct", "images'", "texts'", "scale's", "bias'"), got, expected):
        b = np.asarray(b)
        assert np.isfinite(a).all() and np.abs(a - b).max() <= rtol * np.abs(b).max() + 1e-12, name


@pytest.fixture(scope="module", params=KINDS)
def one(request):
    compiled = step(request.param, alone())

    def run(z_NE, z_ME, pairs, scale=SCALE, bias=BIAS):
        return [np.asarray(x) for x in compiled(z_NE, z_ME, pairs, scale, bias)]

    run.kind = request.param
    return run


@pytest.mark.parametrize("case", CASES)
def test_one_device_gives_the_dense_loss_and_its_gradients(one, case):
    batch = draw(case)
    expected = reference(*batch, one.kind)
    assert (expected[1] > 0) == (case not in ("apart", "empty"))
    assert_equal(one(*batch), expected)


def test_a_tie_is_not_correct(one):
    z_NE, z_ME, pairs = draw("matched")
    alike = [np.zeros_like(z) + np.eye(E, dtype=np.float32)[0] for z in (z_NE, z_ME)]
    assert_equal(one(*alike, pairs)[:3], reference(*alike, pairs, one.kind)[:3])
    assert one(*alike, pairs)[2] == 0 < one(z_NE, z_ME, pairs)[2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [1, 16, 1000])
def test_blocks_of_any_size_give_the_same(kind, block):
    batch = draw("partly")
    got = step(kind, alone(), block)(*batch, SCALE, BIAS)
    assert_equal([np.asarray(x) for x in got], reference(*batch, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_s_gradients_are_its_value_s(kind):
    z_NE, z_ME, pairs = draw("equal texts")
    rng, at = np.random.default_rng(1), [z_NE.astype(float), z_ME.astype(float), SCALE, BIAS]
    to = [rng.normal(size=np.shape(x)) for x in at]

    def moved(h):
        z_NE, z_ME, *rates = (x + h * dx for x, dx in zip(at, to))
        return reference(z_NE, z_ME, pairs, kind, *rates)[0]

    slope = sum((np.asarray(g) * dx).sum() for g, dx in zip(reference(*at[:2], pairs, kind, *at[2:])[3:], to))
    assert (moved(1e-6) - moved(-1e-6)) / 2e-6 == pytest.approx(slope, rel=1e-6)


def test_the_order_of_slots_changes_nothing(one):
    z_NE, z_ME, pairs = draw("partly")
    rng = np.random.default_rng(2)
    n, m = rng.permutation(N), rng.permutation(M)
    loss, images, correct, d_NE, d_ME, *d = one(z_NE, z_ME, pairs)
    moved = Ids(*(x[n if i % 2 == 0 else m] for i, x in enumerate(pairs)))
    assert_equal(one(z_NE[n], z_ME[m], moved), (loss, images, correct, d_NE[n], d_ME[m], *d), 2e-6)


@pytest.mark.parametrize("case", ["partly", "sparse", "apart", "empty"])
def test_what_slots_without_a_partner_hold_changes_nothing(one, case):
    z_NE, z_ME, pairs = draw(case)
    expected = one(z_NE, z_ME, pairs)
    lone_N, lone_M = ~np.isin(pairs.example_N, pairs.example_M), ~np.isin(pairs.example_M, pairs.example_N)
    lone_N, lone_M = lone_N | (pairs.example_N < 0), lone_M | (pairs.example_M < 0)
    assert lone_N.any() and lone_M.any()
    for value in (np.nan, np.inf, 7.0):
        dirty = [np.where(lone[:, None], value, z).astype(np.float32) for z, lone in ((z_NE, lone_N), (z_ME, lone_M))]
        got = one(*dirty, pairs)
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_array_equal(a, b)
        assert not got[3][lone_N].any() and not got[4][lone_M].any()


def test_a_loss_that_is_nearly_nothing_keeps_its_digits():
    """At a scale of 100 the sum of exp(logits) less the positive would be the difference of equal numbers."""
    rng = np.random.default_rng(3)
    z = rng.normal(size=(N, E)) * 0.7 + 1
    z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
    ids = np.arange(N, dtype=np.int32)
    batch = z, z[:M], Ids(*[ids, ids[:M]] * 3)
    loss, *_ = expected = reference(*batch, "softmax", 100.0)
    assert 0 < loss / M < 1e-3
    got = step("softmax", alone())(*batch, 100.0, 0.0)
    assert_equal([np.asarray(x) for x in got], expected, 1e-4)


def test_it_runs_inside_of_a_scan():
    kind, batches = "softmax", [draw("partly", seed) for seed in (0, 1)]
    mesh = alone()

    @fast_jit
    def both(z_NE, z_ME, pairs):
        def part(total, batch):
            def loss(z_NE, z_ME):
                return contrastive_loss(z_NE, z_ME, batch[2], SCALE, BIAS, kind=kind, mesh=mesh, block=BLOCK)[0]

            value, grads = jax.value_and_grad(loss, (0, 1))(*batch[:2])
            return total + value, grads

        with sharding.under(mesh):
            return jax.lax.scan(part, 0.0, (z_NE, z_ME, pairs))

    total, (d_NE, d_ME) = both(*jax.tree.map(lambda *x: np.stack(x), *batches))
    expected = [reference(*batch, kind) for batch in batches]
    assert float(total) == pytest.approx(sum(e[0] for e in expected), rel=1e-5)
    for i, e in enumerate(expected):
        np.testing.assert_allclose(d_NE[i], e[3], atol=1e-5 * np.abs(e[3]).max())
        np.testing.assert_allclose(d_ME[i], e[4], atol=1e-5 * np.abs(e[4]).max())


@pytest.mark.parametrize("wrong, found", [(dict(kind="hinge"), "'hinge'.*softmax"), (dict(block=0), "blocks of 0")])
def test_wrong_settings_are_named(wrong, found):
    with pytest.raises(UserError, match=found):
        contrastive_loss(*draw("matched"), 1.0, 0.0, **(dict(kind="softmax", mesh=alone(), block=1) | wrong))


@pytest.mark.parametrize("kind", KINDS)
def test_memory_grows_with_the_slots_and_not_with_their_square(kind):
    programs = [compiled(kind, alone(), slots, 64) for slots in (256, 512, 1024)]
    assert [largest(p.as_text()) for p in programs] == [max(slots * E, 64 * 64) for slots in (256, 512, 1024)]
    small, middle, large = (p.memory_analysis().temp_size_in_bytes for p in programs)
    assert large - middle < 2.5 * (middle - small) and large < 4 * 1024 * 1024 / 4
    z = jax.ShapeDtypeStruct((256, E), jnp.float32)
    assert largest(jax.jit(lambda n, m: jax.nn.logsumexp(n @ m.T, 1)).lower(z, z).compile().as_text()) >= 256 * 256


@pytest.mark.parametrize("kind", KINDS)
def test_one_device_sends_nothing(kind):
    text = compiled(kind, alone(), 64, 16).as_text()
    assert not re.search("|".join(hlo.KINDS), text)
    assert hlo.flops(text) == 4 * 2 * 64 * 64 * E


@pytest.mark.parametrize("kind", KINDS)
def test_the_benchmark_times_equal_losses_and_notices_others(kind):
    makes = benchmark.ours, benchmark.dense
    ours, dense = (benchmark.compile_step(make(kind, alone()), alone(), 64) for make in makes)
    took = benchmark.seconds([ours, dense], 64)
    cost = benchmark.Cost(kind, 64, 2, 4, 1, 3, took[0], None)
    header, rows = benchmark.table([cost])
    assert len(took) == 2 and len(rows[0]) == len(header) and rows[0][-1] == "not run"
    assert [row["ratio"] for row in benchmark.json_rows([cost])] == [2, 3]
    other = benchmark.compile_step(benchmark.dense(KINDS[kind == KINDS[0]], alone()), alone(), 64)
    with pytest.raises(AssertionError):
        benchmark.seconds([ours, other], 64)


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    from test_topology import ROOT, devices

    file = tmp_path_factory.mktemp("ring") / "eight"
    command = [sys.executable, "tests/contrastive_ring.py", str(file)]
    out = subprocess.run(command, cwd=ROOT, env=devices(8), capture_output=True, text=True, timeout=200)
    assert out.returncode == 0, out.stderr[-3000:]
    return np.load(f"{file}.npz"), json.loads(Path(f"{file}.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_gives_the_dense_loss_and_its_gradients(eight, mesh, kind):
    for case in CASES:
        batch = draw(case)
        assert_equal([eight[0][f"{mesh} {kind} {case} {i}"] for i in range(7)], reference(*batch, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_eight_devices_hold_and_send_their_share(eight, kind):
    """Texts and what they gather are passed on eight times a pass; all else that is sent is a number a slot or less."""
    found = eight[1][kind]
    assert found["endless"] == [] and found["largest"] == 1024 // 8 * E
    assert found["flops"] == 4 * 2 * 1024 * 1024 * E / 8
    sent = {"softmax": (E + 3 + 3) + (E + 3 + 2 + E), "sigmoid": (E + 3) + (E + 3 + E)}[kind]
    assert 0 < found["permuted"] <= 4 * 1024 * sent
    assert found["other"] <= 4 * 2 * 1024 + 100
