"""The trainer as several real processes, and what it survives: signals, the loss of one, another topology, damage.

A run of two processes on two cores takes 20 s, most of it compilation, so one run serves several promises.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_topology import ROOT, assert_same, config, devices
from test_train import changed, lines, losses

from benchmarks.faults import LOST, steps_saved, trainers
from configs import quickstart


def command(workdir, processes, per_process=1, recipe=quickstart, wanted=None, **fields):
    """`launch/local.py` with a recipe changed into what is wanted, `test_topology`'s run, over several processes."""
    overrides = dict(changed(recipe.get_config(), wanted or config())) | fields
    flags = [
        f"--config.{name}={','.join(map(str, v)) + ',' if isinstance(v, tuple) else v}" for name, v in overrides.items()
    ]
    launch = ["launch/local.py", "--processes", str(processes), "--devices", str(per_process), "--"]
    trainer = [sys.executable, "train.py", "--config", recipe.__file__, "--workdir", str(workdir), *flags]
    return [sys.executable, *launch, *trainer] if processes > 1 else trainer


def start(workdir, processes, per_process=1, **fields):
    env = devices(per_process)
    if processes > 1:
        env.pop("XLA_FLAGS")  # the launcher sets it
    return subprocess.Popen(
        command(workdir, processes, per_process, **fields),
        cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process, timeout=240):
    """(exit status, all output); kills what runs longer, which fails the test."""
    try:
        out = process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out


def wait_for_step(workdir, step, process, saved=0, timeout=180):
    """Until the run has this step in its log and has saved that often; returns the trainers' process ids, so that one
    can be hit at once."""
    deadline, found = time.monotonic() + timeout, {}
    log = Path(workdir) / "metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists():
            found = found or trainers(process)
            if log.read_bytes().count(b"train/loss") >= step and len(steps_saved(workdir)) >= saved:
                return found
        time.sleep(0.005)
    pytest.fail(f"step {step} did not come:\n{finish(process)[1][-3000:] if process.poll() is not None else ''}")


@pytest.mark.slow  # two processes are in the tests below, too
@pytest.mark.parametrize(
    "processes, per_process, mesh",
    [
        (2, 1, {}),
        (4, 1, {"mesh.fsdp": 2}),
        (2, 1, {"mesh.tensor": 2}),
        (2, 2, {"mesh.fsdp": 4}),
    ],
)
def test_processes_train_as_one(alone, tmp_path, processes, per_process, mesh):
    status, out = finish(start(tmp_path, processes, per_process, **mesh))
    assert status == 0, out[-3000:]
    assert_same(lines(tmp_path), alone)
    logged = [line for line in out.splitlines() if "compiling the step" in line or "done:" in line]
    assert len(logged) == 2 and all(line.startswith("[0]") for line in logged), out  # process 0 alone logs
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


@pytest.mark.slow
def test_sigterm_to_one_process_saves_and_stops_all_and_eight_devices_go_on(alone, tmp_path):
    process = start(tmp_path, 2, total_steps=20, **{"checkpoint_every_steps": 0})
    os.kill(wait_for_step(tmp_path, 2, process)[1], signal.SIGTERM)
    status, out = finish(process)
    (step,) = steps_saved(tmp_path)
    assert status == 0 and f"stopped at step {step} of 20 with a checkpoint" in out, out[-3000:]
    assert 2 <= step < 20
    status, out = finish(start(tmp_path, 1, 8, **{"mesh.fsdp": 4, "checkpoint_every_steps": 0}))
    assert status == 0 and f"resumed at step {step}" in out, out[-3000:]
    assert_same(lines(tmp_path), alone)


@pytest.mark.slow  # in the default set test_peers.py has the notice, test_train.py the resume
@pytest.mark.parametrize("victim", [1, 0])
def test_the_loss_of_a_process_stops_the_others_and_the_same_command_resumes(alone, tmp_path, victim):
    process = start(tmp_path, 2, **{"checkpoint_every_steps": 3})
    os.kill(wait_for_step(tmp_path, 5, process, saved=1)[victim], signal.SIGKILL)
    status, out = finish(process, timeout=60)  # "within a minute"
    assert status == LOST, out[-3000:]
    assert max(losses(lines(tmp_path))) < 20
    assert re.search(rf"^\[{1 - victim}\].*process {victim}", out, re.MULTILINE), out[-3000:]
    assert "resumes" in out and "Traceback" not in out and "*** Check failure stack trace" not in out, out[-3000:]
    status, out = finish(start(tmp_path, 2, **{"checkpoint_every_steps": 3}))
    assert status == 0 and "resumed at step" in out, out[-3000:]
    assert_same(lines(tmp_path), alone)


@pytest.mark.slow
def test_eight_devices_then_two_processes_of_two_after_damage(alone, tmp_path):
    """Steps 1-12 on eight devices, the last checkpoint cut short, the rest on 2 x 2: the same rows and losses."""
    process = start(tmp_path, 1, 8, **{"checkpoint_every_steps": 4})
    wait_for_step(tmp_path, 13, process, saved=2)
    os.kill(process.pid, signal.SIGKILL)
    finish(process)
    newest = max(steps_saved(tmp_path))
    files = [p for p in (tmp_path / "checkpoints" / str(newest) / "state").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    status, out = finish(start(tmp_path, 2, 2, **{"checkpoint_every_steps": 4, "mesh.fsdp": 2}))
    assert status == 0, out[-3000:]
    assert f"resumed at step {newest - 4}" in out and f"{newest}.damaged" in out, out[-3000:]
    assert_same(lines(tmp_path), alone)


def test_half_of_the_flags_is_a_mistake(tmp_path):
    flags = ["--num_processes=2", "--process_id=0"]
    trainer = [sys.executable, "train.py", "--config", "configs/quickstart.py", "--workdir", str(tmp_path), *flags]
    out = subprocess.run(trainer, cwd=ROOT, env=devices(1), capture_output=True, text=True, timeout=60)
    assert out.returncode == 2 and "--coordinator" in out.stderr and "Traceback" not in out.stderr
