"""Planning a run for a machine that is not here: targets, rows, the roofline, what would fit, and the command."""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks import scaling
from configs import recipes
from input_pipeline.errors import UserError
from navit_jax import metrics, navit, plan, sharding
from navit_jax.plan import chips, estimate, hlo, step, topology
from navit_jax.plan.hlo import Collective

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='the TPU compiler is missing: pip install "jax[tpu]"'
)
V5E = chips.CHIPS["v5e"]


def small(arg="", **model):
    config = recipes.navit("tiny", "Ti/16", arg, demo_steps=1, demo_lr=1e-3)
    config.model.update(width=64, depth=2, heads=2, mlp_dim=128, **model)
    return config


@pytest.mark.parametrize(
    "name, words",
    [
        ("v9:4x4", "v5e, v6e, v5p, v4 or cpu"),
        ("v5e", "how many chips"),
        ("v5e:4x4x4", "v5e needs 2 sizes"),
        ("v5p:4x4", "v5p needs 3 sizes"),
        ("cpu:0", "1 or more"),
        ("cpu:x", "v5e:16x16"),
    ],
)
def test_a_wrong_target_is_refused_with_the_known_ones(name, words):
    with pytest.raises(UserError, match=words):
        topology.parse(name)


def test_every_known_chip_has_a_peak():
    assert all(chip.peak == metrics.PEAKS[chip.kind] * 1e12 for chip in chips.CHIPS.values())


def test_without_the_compiler_its_installation_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape('pip install "jax[tpu]"')):
        topology.prepare(topology.parse("v5e:2x2"))


def test_too_few_devices_in_a_process_that_has_begun():
    jax.devices()
    with pytest.raises(UserError, match="already runs on"):
        topology.prepare(topology.parse("cpu:4096"))


@needs_libtpu
@pytest.mark.parametrize("name, kind", [("v5e:4x8", "v5"), ("v6e:1x1", "v6"), ("v5p:2x2x4", "v5"), ("v4:4x4x4", "v4")])
def test_a_device_of_a_slice_is_a_chip(name, kind):
    target = topology.parse(name)
    topology.prepare(target)
    devices = topology.devices_for(target)
    assert len(devices) == target.count
    assert {tuple(d.coords)[: len(target.shape)] for d in devices} == set(np.ndindex(target.shape))
    assert all(kind in d.device_kind for d in devices)


@needs_libtpu
def test_between_slices_goes_only_the_data_axis():
    topology.prepare(topology.parse("v5e:4x4"))
    two = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4", num_slices=2).devices
    mesh = sharding.make_mesh(dict(data=-1, fsdp=4, tensor=2), two)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert (slices == slices[:, :1, :1]).all() and slices[:2].max() == 0 and slices[2:].min() == 1
    with pytest.raises(UserError, match="mesh.data=1 does not divide over 2 slices"):
        sharding.make_mesh(dict(data=1, fsdp=-1, tensor=1), two)


@needs_libtpu
def test_a_shape_that_the_compiler_refuses():
    topology.prepare(topology.parse("v5e:3x3"))
    with pytest.raises(UserError, match="not divisible"):
        topology.devices_for("v5e:3x3")


def test_rows_of_data_that_can_be_opened():
    rows = step.rows_of(small())
    assert rows.classes == 10 and "'digits'" in rows.note
    assert rows.tokens <= rows.plan["length"] and rows.images <= rows.plan["slots"]


def test_rows_of_data_that_cannot(tmp_path):
    config = small("folder=/nowhere")
    rows = step.rows_of(config)
    assert rows.classes == step.STAND_IN_CLASSES and "stand-in" in rows.note and "/nowhere" in rows.note
    model, _, _ = navit.for_classes(config, rows.classes)
    whole = 3 * navit.flops_forward(model, [rows.plan["length"]])
    assert 0.5 * whole < rows.flops < whole * 1.5
    assert 0.9 * rows.plan["length"] < rows.tokens <= rows.plan["length"]


@pytest.mark.parametrize("variant", scaling.SIZES)
def test_the_benchmarks_recipes_fill_their_rows(variant):
    rows = step.rows_of(scaling.recipe(variant, 16, 8, 4))
    assert rows.plan["length"] == 256 and rows.tokens > 250


def test_a_wrong_packing_is_still_refused():
    config = small("folder=/nowhere")
    config.packing.row_length = 16
    with pytest.raises(UserError, match="row_length"):
        step.rows_of(config)


def test_rows_are_rounded_up_and_the_user_told():
    config = small()
    config.packing.rows_per_step = 7
    config.optim.accumulate_steps = 2
    adapted, mesh, notes = step.adapt(config, jax.devices("cpu")[:1])
    assert adapted.packing.rows_per_step == 8 and "planned with 8" in notes[0]
    assert config.packing.rows_per_step == 7
    assert adapted.model.dtype == "float32"


@pytest.mark.parametrize(
    "message, expected",
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.10G of 15.75G hbm.", 20.1 * 2**30),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total (596.24G) exceeds available HBM (15.75G).",
         596.24 * 2**30),
        ("RESOURCE_EXHAUSTED: something else", 0),
        ("INVALID_ARGUMENT: no", None),
    ],
)  # fmt: skip
def test_what_the_compiler_says_of_memory(message, expected):
    found = step.over_memory(message)
    assert found == (expected if expected is None else int(expected))


# The roofline by hand: v5e has 50 GB/s a link and direction; axes of 16 are rings.


def collective(kind, size, members, overlapped=False, count=1):
    return Collective(kind, count, size, tuple(members), ("f32[1]",), overlapped, "")


def seconds(name, shape, found, **work):
    target = topology.Target(name, shape, V5E)
    coords = [(i // shape[1], i % shape[1], 0) for i in range(shape[0] * shape[1])]
    return estimate.times(target, coords, **(dict(flops=0.0, traffic=0.0, cycles=0.0) | work), found=found)


def test_an_all_reduce_over_a_whole_torus_uses_all_links():
    t = seconds("v5e:16x16", (16, 16), [collective("all-reduce", 1e9, range(256))])
    sent, hops = 2e9 * 255 / 256, 2 * (8 + 8)
    assert t.exposed == pytest.approx(sent / 200e9 + hops * 1e-6) and t.hidden == 0


def test_a_gather_along_one_axis_uses_its_ring_and_a_line_one_link():
    ring = seconds("v5e:16x16", (16, 16), [collective("all-gather", 1e9, range(16))])
    line = seconds("v5e:4x4", (4, 4), [collective("all-gather", 1e9, range(4))])
    assert ring.exposed == pytest.approx(1e9 * 15 / 16 / 100e9 + 8e-6)
    assert line.exposed == pytest.approx(1e9 * 3 / 4 / 50e9 + 3e-6)


def test_groups_that_share_links_share_their_bandwidth():
    together = seconds("v5e:16x16", (16, 16), [collective("all-gather", 1e9, range(0, 16, 4))])
    assert together.exposed == pytest.approx(1e9 * 3 / 4 / (100e9 / 4) + 8e-6)


def test_permutes_in_two_directions_run_side_by_side():
    there, back = ([collective("collective-permute", 1e9, pair, True)] for pair in ((0, 1), (1, 0)))
    one = seconds("v5e:16x16", (16, 16), there)
    both = seconds("v5e:16x16", (16, 16), there + back)
    assert one.hidden == both.hidden == pytest.approx(1e9 / 50e9 + 1e-6)
    round_the_end = seconds("v5e:16x16", (16, 16), [collective("collective-permute", 1e9, (15, 0), True)])
    assert round_the_end.hidden == pytest.approx(one.hidden)


def test_the_step_is_the_longest_of_three_and_what_is_waited_for():
    found = [collective("all-gather", 1e9, range(16), True), collective("all-gather", 1e9, range(16))]
    t = seconds("v5e:16x16", (16, 16), found, flops=197e12 * 0.02, traffic=819e9 * 0.03)
    assert (t.compute, t.memory) == pytest.approx((0.02, 0.03))
    assert t.step == pytest.approx(0.03 + t.exposed) and t.bound == "memory"
    assert t.likely == t.step
    slow = seconds("v5e:16x16", (16, 16), found, flops=197e12 * 0.02, cycles=1.5e9 * 0.07)
    assert slow.likely == pytest.approx(0.07 + t.exposed) and slow.step < slow.likely


def run(*args, timeout=240):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | dict(JAX_PLATFORMS="cpu")
    command = [sys.executable, "train.py", "--config", "configs/quickstart.py", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


@pytest.mark.slow
def test_the_command_for_virtual_devices(tmp_path):
    done = run("--plan=cpu:8", "--config.mesh.fsdp=4", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert "mesh data 2 x fsdp 4 x tensor 1" in done.stdout
    assert "packing.rows_per_step=4 does not divide over data x fsdp = 8: planned with 8" in done.stdout
    assert re.search(r"all-gather +\d+ ", done.stdout) and "peak" in done.stdout
    assert not (tmp_path / "run").exists()  # nothing is trained


def test_the_command_with_an_unknown_machine():
    done = run("--plan=v9:2x2")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --plan=v9:2x2") and "Traceback" not in done.stderr


def test_a_plan_on_one_device():
    lines = []
    found = plan.plan(small(attention="dense"), "cpu:1", lines.append)
    model, _, shapes = navit.for_classes(found.config, 10)
    assert found.memory["parameters"] == 4 * navit.count_params(shapes)
    assert found.memory["optimizer"] >= 2 * found.memory["parameters"]
    assert found.memory["peak"] == sum(v for k, v in found.memory.items() if k != "peak")
    assert found.fits and found.times is None and found.collectives == []
    assert 0.7 < found.useful / found.flops < 1
    assert "compiling" in lines[0]
    text = plan.report(found)
    assert "collectives a chip and step: none" in text and "no speed is estimated" in text


def fake_compile(peak):
    """In place of the compiler: `peak(config)` bytes a chip."""

    def compile_step(config, mesh, rows):
        leaf = jax.ShapeDtypeStruct((64,), np.float32, sharding=NamedSharding(mesh, PartitionSpec()))
        state = dict(params=dict(norm=dict(scale=leaf)), opt=leaf)
        return step.Compiled(config, mesh, state, "", dict(peak=int(peak(config)), generated_code=0), 0.0, "")

    return compile_step


SAVES = dict(none=1.6, light=1.0, dots=0.6, full=0.3)


@needs_libtpu
@pytest.mark.parametrize(
    "state, activations, expected",
    [
        (0.0, 1.5, ["dots 1 1"]),
        (0.2, 1.5, ["dots 1 1", "full 1 1"]),
        (0.8, 0.7, ["light 4 1"]),
        (0.8, 2.5, ["light 4 1", "dots 4 1", "full 4 1"]),
        (0.0, 9.0, ["dots 1 1", "full 1 1", "full 1 4"]),
        (4.0, 9.0, ["light 8 1", "dots 8 1", "full 8 1", "full 8 8"]),
        (9.0, 1.0, ["light 8 1", "dots 8 1", "full 8 1"]),  # its state alone is too large: nothing fits
    ],
)
def test_what_is_tried_to_make_it_fit(monkeypatch, state, activations, expected):
    """state and activations as shares of a chip's memory; tried: remat, fsdp, parts of a step, until one fits."""

    def peak(config):
        mine = activations * SAVES[config.model.remat] / (config.optim.accumulate_steps or 1)
        return V5E.hbm * (state / config.mesh.fsdp + mine)

    monkeypatch.setattr(step, "compile_step", fake_compile(peak))
    monkeypatch.setattr(step, "bytes_a_chip", lambda tree: fsdp_of(tree, state * V5E.hbm))
    config = small()
    config.packing.rows_per_step = 128
    found = plan.plan(config, "v5e:2x4", lambda line: None)
    assert not found.fits
    tried = [attempt.config for _, attempt in found.attempts]
    assert [f"{c.model.remat} {c.mesh.fsdp} {c.optim.accumulate_steps or 1}" for c in tried] == expected
    fits = [attempt.fits for _, attempt in found.attempts]
    assert not any(fits[:-1]) and fits[-1] == (state < 9)
    assert (", " if fits[-1] else "Fewer rows") in plan.report(found).splitlines()[-1]


def fsdp_of(tree, size):
    """Bytes of a state that takes `size` on a chip where it is whole."""
    meshes = [leaf.sharding.mesh for leaf in jax.tree.leaves(tree) if leaf.sharding]
    return int(size) // meshes[0].shape["fsdp"] if meshes else 0


@needs_libtpu
def test_a_scan_compiled_for_a_tpu_counts_its_layers():
    """The TPU's text has no trip counts and writes products as convolutions."""
    target = topology.parse("v5e:2x2")
    topology.prepare(target)
    mesh = jax.make_mesh((4,), ("d",), devices=topology.devices_for(target), axis_types=(AxisType.Auto,))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("d",), ()))

    def total(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum()

    gradient = jax.jit(jax.grad(total, argnums=1), in_shardings=(rows, whole), out_shardings=whole)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((512, 256), (7, 256, 256))]
    text = gradient.lower(*shapes).compile().as_text()
    forward = 7 * 2 * (512 // 4) * 256**2
    assert hlo.flops(text) == pytest.approx(3 * forward - forward / 7, rel=0.05)  # no gradient of the first x
    reduced = hlo.by_kind(hlo.collectives(text))["all-reduce"]
    assert reduced[1] == 7 * 256 * 256 * 2


@needs_libtpu
@pytest.mark.slow
def test_a_plan_for_a_slice_and_what_fits_a_smaller_chip(monkeypatch):
    config = small()
    config.packing.rows_per_step = 64
    found = plan.plan(config, "v5e:2x4", lambda line: None)
    assert found.config.model.dtype == "bfloat16" and found.chips == 8 and found.fits
    assert 0 < found.times.step < found.times.likely < 0.1 and 0 < found.mfu(found.times.step) < 1
    assert "MFU" in plan.report(found)
    # A chip with room for the state on its own and little else.
    less = dataclasses.replace(V5E, hbm=found.memory["peak"] * 0.8)
    monkeypatch.setitem(chips.CHIPS, "v5e", less)
    again = plan.plan(config, "v5e:2x4", lambda line: None, attempts=1)
    assert not again.fits and len(again.attempts) == 1
    assert "Tried:" in plan.report(again)
