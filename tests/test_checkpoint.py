"""Checkpoints keep every bit, survive kills and full disks, and refuse what would not be the same run."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from input_pipeline.errors import UserError
from navit_jax import checkpoint
from navit_jax import checkpoint_integrity as integrity
from navit_jax.checkpoint import Checkpoints, find_checkpoint, restore_params
from navit_jax.optim import make_optimizer

REPO = Path(__file__).parent.parent


def make_params(seed=0, classes=4):
    rng = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "embed": {"kernel": array(6, 5)},
        "blocks": {"mlp": {"up": {"kernel": array(3, 5, 7)}}},
        "head": {"kernel": array(5, classes), "bias": array(classes)},
    }


def make_state(seed=0, name="adamw", ema=True):
    """A state with everything awkward in it: NamedTuples, empty and masked states, bfloat16, scalars."""
    cfg = base.optim()
    cfg.name, cfg.freeze = name, ("^embed/",)
    params = make_params(seed)
    tx, _ = make_optimizer(cfg, params, 100)
    opt = tx.update(make_params(seed + 1), tx.init(params), params)[1]
    average = jax.tree.map(lambda p: p * 0.5, params) if ema else None
    return {"params": params, "opt": opt, "ema": average, "step": jnp.int32(seed)}


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def small(step):
    return {"params": {"w": jnp.arange(9.0) + step, "b": jnp.ones((), jnp.bfloat16)}, "step": jnp.int32(step)}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize("ema", [True, False])
def test_everything_comes_back_bit_for_bit(tmp_path, name, ema):
    state = make_state(7, name, ema)
    meta = {"loader": 12, "snapshot": {"open": [[1, 2], []]}, "rule": (1, "a"), "n": np.int64(3), "deep": {"x": None}}
    ours = Checkpoints(tmp_path / "checkpoints", 2, "")
    assert ours.latest() is None
    assert ours.save(7, state, meta) and not ours.save(7, make_state(8), meta)
    ours.close()
    again = Checkpoints(tmp_path / "checkpoints", 2, "")
    assert again.latest() == 7
    restored, back = again.restore(7, abstract(state))
    assert_same(state, restored)
    assert back == {**meta, "rule": [1, "a"], "n": 3} and again.restore_meta(7) == back


def test_a_megabyte_of_meta(tmp_path):
    ours = Checkpoints(tmp_path, 1, "")
    meta = {"snapshot": list(range(150_000))}
    ours.save(1, {"params": make_params()}, meta)
    ours.wait()
    assert ours.restore_meta(1) == meta


def test_the_next_step_may_donate_the_state_at_once(tmp_path):
    state = {"params": {"w": jnp.arange(4_000_000, dtype=jnp.float32)}, "step": jnp.int32(0)}
    before = jax.tree.map(lambda x: np.array(x, copy=True), state)
    train = jax.jit(lambda s: jax.tree.map(lambda x: x * 2 + 1, s), donate_argnums=0)
    ours = Checkpoints(tmp_path, 1, "")
    old = state["params"]["w"]
    ours.save(1, state, {})
    for _ in range(5):
        state = train(state)
    assert old.is_deleted()
    ours.wait()
    assert_same(before, ours.restore(1, abstract(state))[0])


def test_training_does_not_wait_for_the_checksums(tmp_path, monkeypatch):
    go, record = threading.Event(), integrity.record
    monkeypatch.setattr(integrity, "record", lambda *args: go.wait(60) and record(*args))
    ours = Checkpoints(tmp_path, 1, "")
    ours.save(1, small(1), {})
    assert ours.latest() is None and not go.is_set()  # it came back, and what has no record is no checkpoint
    go.set()
    ours.close()
    assert ours.latest() == 1 and (tmp_path / "1" / "checksums.json").exists()


def test_restores_onto_other_devices(tmp_path):
    """Written on one device, read onto two: the same bits, in the sharding asked for."""
    ours = Checkpoints(tmp_path, 1, "")
    ours.save(1, {"params": make_params()}, {})
    ours.close()
    code = f"""
        import jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec
        from navit_jax.checkpoint import Checkpoints
        place = NamedSharding(jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), PartitionSpec())
        rows = NamedSharding(place.mesh, PartitionSpec("data"))
        like = {{"params": {{
            "embed": {{"kernel": jax.ShapeDtypeStruct((6, 5), np.float32, sharding=rows)}},
            "blocks": {{"mlp": {{"up": {{"kernel": jax.ShapeDtypeStruct((3, 5, 7), np.float32, sharding=place)}}}}}},
            "head": {{"kernel": jax.ShapeDtypeStruct((5, 4), np.float32, sharding=place),
                      "bias": jax.ShapeDtypeStruct((4,), np.float32, sharding=place)}},
        }}}}
        state = Checkpoints({str(tmp_path)!r}, 1, "").restore(1, like)[0]["params"]
        assert state["embed"]["kernel"].sharding == rows and state["head"]["bias"].sharding == place
        print(float(state["embed"]["kernel"].sum()), float(state["head"]["kernel"].sum()))
    """
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], **process(env), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [float(make_params()["embed"]["kernel"].sum()), float(make_params()["head"]["kernel"].sum())]
    np.testing.assert_allclose([float(x) for x in done.stdout.split()], expected, rtol=1e-5)


def process(env=None):
    return {"cwd": REPO, "env": os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPO)} | (env or {})}


@pytest.mark.parametrize("best_metric,kept", [("", [5, 6]), ("acc", [3, 5, 6]), ("other", [5, 6])])
def test_keeps_the_last_and_the_best(tmp_path, best_metric, kept):
    ours = Checkpoints(tmp_path, 2, best_metric)
    for step, value in enumerate([0.1, 0.9, 0.9, 0.5, float("nan")], start=1):
        ours.save(step, {"params": {"w": jnp.full(3, float(step))}}, {}, {"acc": value})
    ours.save(6, {"params": {"w": jnp.full(3, 6.0)}}, {})
    ours.close()
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == kept
    assert ours.best() == (3 if best_metric == "acc" else None) and ours.latest() == 6
    assert restore_params(tmp_path)[0]["w"][0] == (3 if best_metric == "acc" else 6)
    assert restore_params(tmp_path / "5")[0]["w"][0] == 5


def test_parameters_alone_are_the_average_where_there_is_one(tmp_path, monkeypatch):
    for ema, factor in ((True, 0.5), (False, 1.0)):
        run = tmp_path / str(ema)
        ours = Checkpoints(run / "checkpoints", 1, "")
        ours.save(3, make_state(1, ema=ema), {"config": {"a": 1}})
        ours.close()
        for path in (run, run / "checkpoints", run / "checkpoints" / "3"):
            params, meta = restore_params(path)
            assert_same(jax.tree.map(lambda p, f=factor: p * f, make_params(1)), params)
            assert meta == {"config": {"a": 1}}
            assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(params))
        monkeypatch.chdir(run)
        assert find_checkpoint("checkpoints").name == "3"
    with pytest.raises(UserError, match="No checkpoint in .*nothing"):
        restore_params(tmp_path / "nothing")


def test_a_state_of_another_model_is_refused_by_name(tmp_path):
    ours = Checkpoints(tmp_path, 1, "")
    ours.save(1, make_state(ema=False), {})
    ours.wait()
    with pytest.raises(UserError, match="ema/embed/kernel: float32.*missing in the checkpoint"):
        ours.restore(1, abstract(make_state(ema=True)))
    like = abstract(make_state(ema=False))
    like["params"]["head"]["bias"] = jax.ShapeDtypeStruct((9,), jnp.float32)
    like["params"]["embed"]["kernel"] = jax.ShapeDtypeStruct((6, 5), jnp.bfloat16)
    with pytest.raises(UserError) as error:
        ours.restore(1, like)
    assert error.match(r"params/head/bias: float32\[4\] in the checkpoint, float32\[9\] here")
    assert error.match(r"params/embed/kernel: float32\[6, 5\] in the checkpoint, bfloat16\[6, 5\] here")
    with pytest.raises(UserError, match=r"No checkpoint at .*/5; there are the steps \[1\]"):
        ours.restore(5, like)


WRITER = """
    import sys, jax.numpy as jnp
    from navit_jax.checkpoint import Checkpoints
    ours = Checkpoints(sys.argv[1], 2, "acc")
    for step in range((ours.latest() or 0) + 1, 100_000):
        params = {f"w{i}": jnp.full(50_000, step + i, jnp.float32) for i in range(8)}
        ours.save(step, {"params": params, "step": jnp.int32(step)}, {"step": step}, {"acc": -abs(step - 3)})
        print(step, flush=True)
"""


def check_whole(folder):
    """Every checkpoint that is listed restores to what was written at its step. Returns the newest step."""
    ours = Checkpoints(folder, 2, "acc")
    like = {"params": {f"w{i}": jax.ShapeDtypeStruct((50_000,), np.float32) for i in range(8)}}
    like["step"] = jax.ShapeDtypeStruct((), np.int32)
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit()]
    for step in steps:
        state, meta = ours.restore(step, like)
        assert int(state["step"]) == meta["step"] == step
        for i in range(8):
            assert np.all(np.asarray(state["params"][f"w{i}"]) == step + i)
    return max(steps, default=0)


@pytest.mark.parametrize("kills", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_sigkill_leaves_whole_checkpoints(tmp_path, kills):
    rng, newest = np.random.default_rng(kills), 0
    for _ in range(kills):
        command = [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path)]
        child = subprocess.Popen(command, **process(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3 + int(rng.integers(0, 4))):
            started = int(child.stdout.readline())
        time.sleep(float(rng.uniform(0, 0.06)))
        child.send_signal(signal.SIGKILL)
        assert child.communicate()[1] == ""  # Orbax is quiet
        found = check_whole(tmp_path)
        assert found >= started - 1 > newest
        newest = found
    ours = Checkpoints(tmp_path, 2, "acc")
    leftovers = [p.name for p in tmp_path.iterdir() if not p.name.isdigit()]
    ours.save(newest + 1, {"params": {"w": jnp.zeros(1)}}, {})
    ours.close()
    names = sorted(int(p.name) for p in tmp_path.iterdir())  # no leftover stays
    assert names == sorted({3, newest, newest + 1}), leftovers


FULL = """
    import resource, sys, jax.numpy as jnp
    from input_pipeline.errors import UserError
    from navit_jax.checkpoint import Checkpoints
    ours = Checkpoints(sys.argv[1], 2, "")
    ours.save(1, {"params": {"w": jnp.zeros(10)}}, {})
    ours.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    state = {"params": {f"w{i}": jnp.zeros(1_000_000) for i in range(3)}}
    try:
        ours.save(2, state, {})
        ours.close()
    except UserError as error:
        print(error)
    print(ours.latest(), ours.save(3, {"params": {"w": jnp.zeros(10)}}, {}), flush=True)
    ours.close()
"""


def test_a_write_that_fails_in_the_background_is_the_users_error(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(FULL), str(tmp_path)]
    done = subprocess.run(command, **process(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    message, after = done.stdout.strip().split("\n")
    for words in (f"step 2 could not be written to {tmp_path}", "File too large", "last of step 1", "resumes"):
        assert words in message
    assert after == "1 True"
    assert restore_params(tmp_path / "1")[0]["w"].shape == (10,)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "3"]


def test_a_disk_that_fills_at_the_record_costs_only_that_checkpoint(tmp_path, monkeypatch):
    ours = Checkpoints(tmp_path, 2, "")
    ours.save(1, small(1), {})
    ours.wait()

    def full(*_):
        raise OSError(28, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match="step 2 could not .* No space .* last of step 1"),
    ):
        patch.setattr(integrity, "record", full)
        ours.save(2, small(2), {})
        ours.wait()
    assert ours.save(2, small(2), {})
    ours.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


@pytest.mark.slow
def test_a_disk_that_fills_at_any_byte_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    """A real file system with 0 to all of the bytes that a checkpoint needs."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system here")

    def resize(kilobytes):
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(tmp_path)], check=True)

    def state(step):
        return {"params": {f"w{i}": jnp.full(60_000, step + i, jnp.float32) for i in range(6)}, "step": jnp.int32(step)}

    try:
        ours, outcomes = Checkpoints(tmp_path, 2, ""), []
        ours.save(1, state(1), {})
        ours.wait()
        used = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: used)  # it would say so before the write
        for spare in [*range(0, 1440, 160), *range(1440, 1520, 4)]:
            resize(used.used // 1024 + spare)
            try:
                ours.save(2, state(2), {})
                ours.wait()
                outcomes.append(2)
            except UserError as error:
                assert "No space" in str(error) or "RESOURCE_EXHAUSTED" in str(error)
                outcomes.append(1)
            resize(1 << 20)
            step, restored, _ = ours.restore_newest(state(0))
            assert step == outcomes[-1]
            assert_same(restored, state(step))
            shutil.rmtree(tmp_path / "2", ignore_errors=True)
        assert outcomes == sorted(outcomes) and set(outcomes) == {1, 2}
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    ours = Checkpoints(tmp_path, 2, "")
    ours.save(1, {"params": {"w": jnp.zeros(10)}}, {})
    ours.wait()
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=f"No room .* step 2 in {tmp_path}.*resumes"):
        ours.save(2, {"params": {"w": jnp.zeros(1000)}}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["1"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot make .*file/checkpoints"):
        Checkpoints(tmp_path / "file" / "checkpoints", 2, "")
    with pytest.raises(UserError, match="keep_checkpoints is 0"):
        Checkpoints(tmp_path, 0, "")


def test_a_folder_that_stops_being_writable_is_named(tmp_path):
    ours = Checkpoints(tmp_path / "checkpoints", 2, "")
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="step 1 could not be written to .*checkpoints: .*No earlier one"):
        ours.save(1, {"params": make_params()}, {})


def test_opening_leaves_the_files_of_a_running_trainer_alone(tmp_path):
    (tmp_path / "4.orbax-checkpoint-tmp").mkdir()
    Checkpoints(tmp_path, 2, "").close()
    assert (tmp_path / "4.orbax-checkpoint-tmp").exists()
