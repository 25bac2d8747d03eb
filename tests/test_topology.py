"""The same training on any mesh and any number of processes: rows, losses, and what the compiled step communicates."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from test_train import lines, losses, tiny

import train
from navit_jax import navit, optim, sharding, train_step
from navit_jax.plan import hlo

ROOT = Path(train.__file__).parent
MESHES = {"8,1,1": "data", "2,4,1": "data x fsdp", "2,2,2": "data x fsdp x tensor"}
# Both axes in the default set; the others, of which each test takes half a minute, in the slow one.
EACH_MESH = [pytest.param(m, id=name, marks=[pytest.mark.slow] * (m != "2,4,1")) for m, name in MESHES.items()]


def devices(count):
    # The CPU's other scheduler can hold all threads in collectives of one step that wait for each other.
    flags = f"--xla_force_host_platform_device_count={count} --xla_cpu_enable_concurrency_optimized_scheduler=false"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


def config():
    rows = dict(packing__rows_per_step=8, packing__rows_per_group=1, eval__rows_per_step=8)
    # eps: a class with exactly its share of a step has a gradient of 0 but for rounding, which Adam would blow up
    c = tiny(total_steps=20, model__attention="slabs", optim__lr=1e-2, optim__eps=1e-5, **rows)
    c.eval.update(max_examples=64, fewshot_shots=(2,))
    return c


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """eight(mesh): the folder in which eight devices trained the same on that mesh, and their compiled step's text."""
    folder = tmp_path_factory.mktemp("eight")

    @functools.cache
    def on(mesh):
        command = [sys.executable, "tests/eight_devices.py", str(folder), config().to_json_best_effort(), mesh]
        out = subprocess.run(command, cwd=ROOT, env=devices(8), capture_output=True, text=True, timeout=300)
        assert out.returncode == 0, out.stderr[-3000:]
        return folder / mesh, (folder / f"{mesh}.hlo").read_text()

    return on


def scores(records):
    return {k: v for r in records for k, v in r.items() if k.startswith(("eval/", "fewshot/")) and "per_s" not in k}


def assert_same(got, expected):
    a, b = losses(got), losses(expected)
    assert sorted(a) == sorted(b) == list(range(1, 21))
    np.testing.assert_allclose([a[s] for s in a], [b[s] for s in a], rtol=1e-5)
    norms = [[r["train/grad_norm"] for r in records if "train/grad_norm" in r] for records in (got, expected)]
    np.testing.assert_allclose(*norms, rtol=1e-4)
    for name in ("train/accuracy", "data/fill", "data/skipped"):  # of the same rows, so exactly the same
        assert [r[name] for r in got if name in r] == [r[name] for r in expected if name in r], name
    ours, theirs = scores(got), scores(expected)
    assert ours.keys() == theirs.keys() and any(k.startswith("fewshot") for k in ours)
    for name in ours:  # one image of 64 may fall on the other side of a tie
        assert ours[name] == pytest.approx(theirs[name], abs=0.02), name


@pytest.mark.parametrize("mesh", EACH_MESH)
def test_eight_devices_train_as_one(alone, eight, mesh):
    assert min(losses(alone).values()) < 0.98 * losses(alone)[1]  # it learns, so that a wrong gradient would show
    assert_same(lines(eight(mesh)[0]), alone)


def parameter_bytes(mesh):
    """Bytes of the parameters that a mesh splits, and of all: in the blocks, and outside of them.

    Left out of the latter are the pooling's probe, q and k: only their product, [D, N], meets the tokens, and it is
    what is gathered and reduced for them.
    """
    c = config()
    _, _, shapes = navit.for_classes(c, 10)
    sizes = tuple(map(int, mesh.split(",")))
    fake = AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    places = sharding.state_shardings(fake, dict(params=shapes))["params"]
    split, whole = dict(blocks=0, outside=4 * 32 * 2), dict(blocks=0, outside=4 * 32 * 2)
    for (path, leaf), place in zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(places), strict=True):
        name = optim.name_of(path)
        part = "blocks" if optim.is_stacked(name) else "outside"
        if name not in ("pool/probe", "pool/q/kernel", "pool/k/kernel"):
            whole[part] += 4 * leaf.size
            split[part] += 4 * leaf.size * ("fsdp" in place.spec)
    return split, whole


def found(eight, mesh):
    text = eight(mesh)[1]
    assert hlo.endless(text) == []
    return hlo.collectives(text)


def total(collectives, kind, group=None, of="bytes"):
    mine = [c for c in collectives if c.kind == kind and group in (None, c.group)]
    return sum(c.count * (c.bytes if of == "bytes" else 1) for c in mine)


METRICS = 4 * (4 + 3)  # loss, correct, images, tokens; what the hosts said


@pytest.mark.parametrize("mesh", EACH_MESH)
def test_every_buffer_of_the_state_is_written_in_place_and_split_as_the_rules_say(eight, mesh):
    text, c = eight(mesh)[1], config()
    _, _, shapes = navit.for_classes(c, 10)
    tx, _ = optim.make_optimizer(c.optim, shapes, 20)
    state = jax.eval_shape(lambda p: train_step.init_state(p, tx, False), shapes)
    assert text.split("\n")[0].count("may-alias") == len(jax.tree.leaves(state))
    fake = AbstractMesh(tuple(map(int, mesh.split(","))), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    places = sharding.state_shardings(fake, state)
    parts = [place.shard_shape(leaf.shape) for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(places))]
    layout = text[text.index("entry_computation_layout={(") :].split(")->")[0]
    found = [tuple(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"[a-z]\w*\[([\d,]*)\]", layout)]
    assert found[: len(parts)] == parts


@pytest.mark.slow
def test_data_parallel_steps_reduce_each_gradient_once_and_nothing_else(eight):
    collectives = found(eight, "8,1,1")
    _, whole = parameter_bytes("8,1,1")
    assert {(c.kind, c.group) for c in collectives} == {("all-reduce", 8)}
    assert total(collectives, "all-reduce") == whole["blocks"] + whole["outside"] + METRICS
    assert total(collectives, "all-reduce", of="runs") <= 2 + 2  # one a layer, and a few behind the loop


def test_fsdp_gathers_each_weight_twice_and_reduces_its_gradient_once(eight):
    """The CPU's compiler has no reduce-scatter: it reduces whole over fsdp, keeps its part, reduces that over data."""
    collectives = found(eight, "2,4,1")
    split, whole = parameter_bytes("2,4,1")
    assert {c.kind for c in collectives} == {"all-gather", "all-reduce"}
    # a layer's weights forward and again backward, none of them in one piece with another layer's
    assert total(collectives, "all-gather", 4) == total(collectives, "all-gather")
    assert total(collectives, "all-gather") == 2 * split["blocks"] + split["outside"]
    assert total(collectives, "all-gather", of="runs") == 2 * 2 * 6 + 7
    over_fsdp = split["blocks"] + split["outside"]
    small = 4 * (2 * 32 + 64)  # the pooling's query, N * H each way; sums of squares for the gradient's norm
    assert over_fsdp <= total(collectives, "all-reduce", 4) <= over_fsdp + small
    over_data = (split["blocks"] + split["outside"]) // 4
    assert total(collectives, "all-reduce", 2) == over_data
    rest = whole["blocks"] + whole["outside"] - split["blocks"] - split["outside"]  # norms, biases, positions
    assert total(collectives, "all-reduce", 8) == rest + METRICS


@pytest.mark.slow
def test_tensor_parallel_layers_reduce_activations_of_their_own_rows(eight):
    collectives = found(eight, "2,2,2")
    split, whole = parameter_bytes("2,2,2")
    # half of each weight forward and backward; outside the pooling's and the head's backward products, too
    blocks = 2 * split["blocks"] // 2
    assert blocks < total(collectives, "all-gather") <= blocks + 2 * split["outside"]
    tokens = 4 * (8 // 4) * 32 * 32  # f32 [B / (data * fsdp) * L, D]
    activations = [
        c for c in collectives if c.kind == "all-reduce" and f"f32[{2 * 32},32]" in c.shapes and c.count == 2
    ]
    # forward: attention's and the MLP's output; backward: the input of the MLP and of q, k and v
    assert sum(c.count * c.shapes.count("f32[64,32]") for c in activations) == 2 * (2 + 1 + 3)
    assert all(c.group == 2 for c in activations)
    permuted = 4 * 16 * (768 + 10)  # a half of the patch embedding and of the head, moved from fsdp to tensor and back
    assert total(collectives, "collective-permute") == 2 * permuted
    everything = sum(c.count * c.bytes for c in collectives)
    assert everything <= 2 * (split["blocks"] + split["outside"]) + whole["blocks"] + whole["outside"] + 2 * 8 * tokens
