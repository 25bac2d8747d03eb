"""launch/local.py: names the run, marks lines, passes signals on, and ends when one process fails."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from processes import ROOT


def launch(*args, command, **options):
    argv = [sys.executable, str(ROOT / "launch/local.py"), *args, "--", sys.executable, "-c", command]
    env = dict(os.environ, **options.pop("env", {}))
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **options)


def test_launcher_names_the_run_and_marks_the_lines():
    command = "import os, sys; print(sys.argv[1:], os.environ['XLA_FLAGS']); print('e', file=sys.stderr)"
    out, error = launch("--processes", "3", "--devices", "2", command=command).communicate(timeout=30)
    lines = sorted(out.splitlines())
    ports = {re.search(r"--coordinator=127.0.0.1:(\d+)", line)[1] for line in lines}
    assert len(ports) == 1 and sorted(error.splitlines()) == ["[0] e", "[1] e", "[2] e"]
    for index, line in enumerate(lines):
        assert line.startswith(f"[{index}] ") and "--num_processes=3" in line and f"--process_id={index}'" in line
        assert "--xla_force_host_platform_device_count=2 " in line


def test_launcher_shares_out_gpus():
    command = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    run = launch("--processes", "2", command=command, env=dict(CUDA_VISIBLE_DEVICES="1,2,5,7,9"))
    assert sorted(run.communicate(timeout=30)[0].splitlines()) == ["[0] 1,2", "[1] 5,7"]
    run = launch("--processes", "2", command=command, env=dict(CUDA_VISIBLE_DEVICES="1"))
    assert "do not fit on 1 GPUs" in run.communicate(timeout=30)[1] and run.returncode == 1


@pytest.mark.parametrize(
    "first, second, wanted",
    [
        ("sys.exit(0)", "sys.exit(0)", 0),
        ("sys.exit(2)", "sys.exit(0)", 2),
        ("sys.exit(75)", "os.kill(os.getpid(), 9)", 75),
    ],
)
def test_launcher_status(first, second, wanted):
    command = f"import os, sys\nif sys.argv[-1].endswith('0'): {first}\nelse: {second}"
    run = launch("--processes", "2", command=command)
    run.communicate(timeout=30)
    assert run.returncode == wanted


def test_launcher_kills_what_does_not_stop_by_itself():
    command = "import sys, time\nif sys.argv[-1].endswith('1'): sys.exit(3)\ntime.sleep(60)"
    start = time.monotonic()
    run = launch("--processes", "3", "--grace", "1", command=command)
    _, error = run.communicate(timeout=30)
    assert run.returncode != 0 and "killing what still runs 1 s after" in error and time.monotonic() - start < 10


def test_launcher_passes_signals_on_once():
    command = """
import signal, sys, time
caught = []
signal.signal(signal.SIGTERM, lambda *_: caught.append(1))
print("ready", flush=True)
while not caught: time.sleep(0.02)
time.sleep(0.3)
print("caught", len(caught), flush=True)
"""
    run = launch("--processes", "2", command=command)
    assert {run.stdout.readline() for _ in range(2)} == {"[0] ready\n", "[1] ready\n"}
    run.terminate()
    out, _ = run.communicate(timeout=30)
    assert run.returncode == 0 and sorted(out.splitlines()) == ["[0] caught 1", "[1] caught 1"]


@pytest.mark.parametrize("status, again", [(0, False), (2, False), (75, True), (137, True), ("signal", True)])
def test_slurm_script_puts_an_unfinished_run_back_into_the_queue(status, again, tmp_path):
    """With stand-ins for Slurm's commands, which are not here."""
    stand_ins = {
        "srun": "echo started $@; trap 'echo saved; exit 0' TERM; [ $WANTED = signal ] || exit $WANTED; "
        "echo $$ > $HERE/pid; while true; do sleep 0.05; done",
        "scancel": "kill -TERM $(cat $HERE/pid)",
        "scontrol": 'echo "scontrol $@"',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | dict(
        PATH=f"{tmp_path}:{os.environ['PATH']}", HERE=str(tmp_path), WANTED=str(status), SLURM_JOB_ID="7"
    )
    script = ["bash", str(ROOT / "launch/slurm_gpu.sh"), "--config", "a b.py"]
    run = subprocess.Popen(script, env=env, stdout=subprocess.PIPE, text=True)
    if status == "signal":
        while not (tmp_path / "pid").exists():
            time.sleep(0.02)
        run.send_signal(signal.SIGTERM)
    out, _ = run.communicate(timeout=20)
    assert "python train.py --config a b.py" in out
    assert ("scontrol requeue 7" in out) == again
    assert run.returncode == (0 if status == "signal" else status)
    assert ("saved" in out) == (status == "signal")


def test_the_other_recipes_are_well_formed():
    yaml = pytest.importorskip("yaml")
    recipe = yaml.safe_load((ROOT / "launch/gke.yaml").read_text())
    job = recipe["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    config = next(a for a in container["command"] if a.startswith("--config=")).removeprefix("--config=")
    assert (ROOT / config).is_file() and job["parallelism"] == job["completions"]
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    assert subprocess.run(["bash", "-n", str(ROOT / "launch/tpu_pod.sh")], timeout=20).returncode == 0
