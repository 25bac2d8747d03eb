"""Checkpoints of several real processes: any topology reads what any other wrote, and what fails one reaches all.

The file is also the program that those processes run: `python FILE TASK FOLDER PORT PROCESS PROCESSES`.
"""

import functools
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from input_pipeline.errors import UserError
from navit_jax import checkpoint_integrity as integrity
from navit_jax.checkpoint import Checkpoints, restore_params

REPO = Path(__file__).parent.parent
SHAPES = {
    "rows": ((16, 24), PartitionSpec("fsdp"), jnp.float32),
    "columns": ((6, 32), PartitionSpec(None, "tensor"), jnp.bfloat16),
    "both": ((8, 16, 3), PartitionSpec("fsdp", "tensor"), jnp.float32),
    "replicated": ((64, 4), PartitionSpec(), jnp.float32),
    "odd": ((5,), PartitionSpec(), jnp.int32),
    "scalar": ((), PartitionSpec(), jnp.int32),
}


def values(step):
    rng = np.random.default_rng(step)
    return {n: rng.normal(size=shape).astype(dtype) * 100 for n, (shape, _, dtype) in SHAPES.items()} | {
        "scalar": np.int32(step),
        "odd": np.arange(5, dtype=np.int32) + step,
    }


def shardings():
    count = jax.device_count()
    shape = (count // 4, 2, 2) if count >= 4 else (1, count, 1)
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    return {n: NamedSharding(mesh, spec) for n, (_, spec, _) in SHAPES.items()}


def state(step):
    def place(value, sharding):
        return jax.make_array_from_callback(np.shape(value), sharding, lambda index: value[index])

    leaves = {n: place(value, shardings()[n]) for n, value in values(step).items()}
    return {"params": leaves, "step": leaves["scalar"]}


def like():
    shapes = {n: jax.ShapeDtypeStruct(s, d, sharding=shardings()[n]) for n, (s, _, d) in SHAPES.items()}
    return {"params": shapes, "step": shapes["scalar"]}


def check(restored, step):
    for name, value in values(step).items():
        leaf = restored["params"][name]
        assert leaf.sharding == shardings()[name]
        for shard in leaf.addressable_shards:
            assert np.asarray(shard.data).tobytes() == np.ascontiguousarray(value[shard.index]).tobytes(), name


def save(ours):
    start = ours.latest() or 0
    for step in range(start + 1, start + 4):
        assert ours.save(step, state(step), {"step": step}, {"acc": -step}), step
        assert not ours.save(step, state(step), {})
    ours.close()
    print("saved", sorted(int(p.name) for p in ours.root.iterdir()))


def restore(ours):
    step, restored, meta = ours.restore_newest(like())
    check(restored, step)
    assert meta == {"step": step}
    assert restore_params(ours.root / str(step))[0]["rows"].tobytes() == values(step)["rows"].tobytes()
    print("restored", step, sorted(p.name for p in ours.root.iterdir()))


def fail(ours, where):
    """Step 2 fails in one process; all say so, none hangs, and step 3 is whole."""
    save_one = functools.partial(ours.save, meta={}, metrics={})
    save_one(1, state(1))
    ours.wait()
    spoil = jax.process_index() == (0 if where in ("commit", "write0") else 1)
    healthy = integrity.record_share, integrity.record
    if spoil and where.startswith("write"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, -1))
    if spoil and where == "record":
        integrity.record_share = full_disk
    if spoil and where == "commit":
        integrity.record = full_disk
    try:
        save_one(2, state(2))
        ours.wait()
        print("no failure")
    except UserError as error:
        print("failed:", error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    integrity.record_share, integrity.record = healthy
    save_one(3, state(3))
    ours.close()
    step, restored, _ = ours.restore_newest(like())
    check(restored, step)
    print("then", step, sorted(p.name for p in ours.root.iterdir()))


def train(ours):
    """Process 1 records only once 20 common steps are done: would training wait for a save, neither would end."""
    done, healthy = threading.Event(), integrity.record_share
    if jax.process_index() == 1:
        integrity.record_share = lambda *args: done.wait(80) and healthy(*args)
    ours.save(1, state(1), {"step": 1})
    total = jax.jit(lambda x: x.sum())
    for _ in range(20):
        jax.block_until_ready(total(state(1)["params"]["rows"]))
    assert ours.latest() is None
    done.set()
    ours.close()
    print("whole", ours.restore_newest(like())[0])


def forever(ours):
    for step in range((ours.latest() or 0) + 1, 10_000):
        ours.save(step, state(step), {"step": step})
        print(step, flush=True)


def full_disk(*_):
    raise OSError(28, "No space left on device")


def main(task, folder, port, process, processes):
    sys.stdout = os.fdopen(os.dup(1), "w")  # ours alone: what C++ prints, several threads of it at once,
    os.dup2(2, 1)  # goes to stderr
    jax.config.update("jax_platforms", "cpu")
    if int(processes) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process), heartbeat_timeout_seconds=20)
    ours, (name, *more) = Checkpoints(folder, 2, "acc"), task.split(":")
    {"save": save, "restore": restore, "fail": fail, "forever": forever, "train": train}[name](ours, *more)


def start(task, folder, processes, devices):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {"PYTHONPATH": f"{REPO}:{REPO / 'tests'}", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, __file__, task, str(folder), str(port)]
    return [
        subprocess.Popen([*command, str(i), str(processes)], env=env, stdout=-1, stderr=-1, text=True)
        for i in range(processes)
    ]


def launch(task, folder, processes, devices, timeout=100):
    """What each process prints."""
    running = start(task, folder, processes, devices)
    try:
        ended = [p.communicate(timeout=timeout) for p in running]
    finally:
        for p in running:
            p.kill()
    for p, (out, err) in zip(running, ended):
        assert p.returncode == 0, out + err
    return [out for out, _ in ended]


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.slow
def test_any_topology_reads_what_another_wrote_and_damage_falls_back_in_all_processes(tmp_path):
    assert launch("save", tmp_path, 1, 8) == ["saved [1, 2, 3]\n"]  # 1 is the best
    assert launch("restore", tmp_path, 2, 2) == ["restored 3 ['1', '2', '3']\n"] * 2
    assert launch("save", tmp_path, 2, 2) == ["saved [1, 5, 6]\n"] * 2
    assert launch("restore", tmp_path, 1, 8) == ["restored 6 ['1', '5', '6']\n"]
    written = sum(f.stat().st_size for f in (tmp_path / "6" / "state").glob("*/[0-9]*"))
    assert written == sum(v.nbytes for v in values(6).values()) + 4  # each value once, `step` besides
    flip(sorted((tmp_path / "6" / "state" / "params.both").glob("[0-9]*"))[-1])
    first, second = launch("restore", tmp_path, 2, 2)
    assert "DAMAGED checkpoint" in first and "state/params.both/" in first and "step 5 is used instead" in first
    assert second == "restored 5 ['1', '5', '6.damaged']\n" and first.endswith(second)


@pytest.mark.parametrize(
    "where", ["write1", *(pytest.param(w, marks=pytest.mark.slow) for w in ("write0", "record", "commit"))]
)
def test_a_failure_of_one_process_reaches_all(tmp_path, where):
    outs = launch(f"fail:{where}", tmp_path, 2, 2)
    reason = "File too large" if where.startswith("write") else "No space left on device"
    for out in outs:
        assert out.count("\n") == 2, out
        failed, then = out.splitlines()
        assert failed.startswith("failed: The checkpoint of step 2 could not be written"), out
        assert reason in failed and "the last of step 1" in failed and "resumes" in failed, out
        assert then == "then 3 ['1', '3']"


@pytest.mark.slow
def test_training_goes_on_while_another_process_still_saves(tmp_path):
    assert launch("train", tmp_path, 2, 2) == ["whole 1\n"] * 2


@pytest.mark.slow
def test_a_kill_of_all_processes_leaves_the_newest_whole(tmp_path):
    rng, newest = np.random.default_rng(0), 0
    for _ in range(4):
        running = start("forever", tmp_path, 2, 2)
        begun = 0
        while begun < newest + 4 and running[0].poll() is None:
            line = running[0].stdout.readline().strip()
            begun = int(line) if line.isdigit() else begun
        time.sleep(rng.uniform(0, 0.2))
        for p in running[:: int(rng.choice([-1, 1]))]:
            p.kill()
        for p in running:
            p.communicate(timeout=60)
        step = int(launch("restore", tmp_path, 1, 4)[0].split()[1])
        assert step >= begun - 1 > newest
        assert not list(tmp_path.glob("*.damaged"))
        newest = step


if __name__ == "__main__":
    main(*sys.argv[1:])
