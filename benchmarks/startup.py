"""Seconds from starting `train.py` to its first finished step, with an empty and a filled compilation cache.

    python -m benchmarks.startup [--config configs/navit_b16.py] [--repeats 1] [--json FILE] [--quick]

The cold start has no cache at all: sizes of images are read and everything is compiled. A second process then starts
with what the first one left in the user's cache folder. The peer of the cold start is the goal of 25 s.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import common

GOAL = 25.0  # seconds on two cores
ROOT = Path(__file__).parent.parent
QUICK = ("model.width=64", "model.depth=2", "model.heads=1", "model.mlp_dim=64")
# Runs in the started process. Marks are seconds since it was started; `compiled` sums what XLA took, `read` what its
# cache took to read.
PROBE = """
import json, os, sys, time
began = float(sys.argv.pop(1))
marks = {"python": time.time() - began, "compiled": 0.0, "read": 0.0}
out = sys.argv.pop(1)
from jax import monitoring
def note(name, seconds, **_):
    key = {"backend_compile_duration": "compiled", "cache_retrieval_time_sec": "read"}.get(name.rsplit("/", 1)[-1])
    if key: marks[key] += seconds
monitoring.register_event_duration_secs_listener(note)
import train
from navit_jax import cli
marks["imported"] = time.time() - began
def mark(module, name, before=None, after=None):
    whole = getattr(module, name)
    def wrapped(*args, **kwargs):
        if before: marks.setdefault(before, time.time() - began)
        found = whole(*args, **kwargs)
        if after: marks.setdefault(after, time.time() - began)
        return found
    setattr(module, name, wrapped)
mark(train, "build", "flags", "built")
mark(train.console, "compile_step", "batch", "step compiled")
settle = train.settle
def first(*args):
    settle(*args)
    marks["first step"] = time.time() - began
    json.dump(marks, open(out, "w"))
    os._exit(0)
train.settle = first
cli.run(train.main)
"""
STAGES = ("python", "imported", "flags", "built", "batch", "step compiled", "first step")
LABELS = ("Python and jax's listener", "imports", "config and flags", "data, parameters, evaluations", "first batch")
LABELS += ("the step: trace and compile", "the step: run")


def start(config: str, cache: Path, options: list[str]) -> dict:
    """Marks of one start: seconds since the process was started, and of XLA, compiling and reading its cache."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "marks.json"
        env = os.environ | {"NAVIT_JAX_CACHE": str(cache), "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
        arguments = [f"--config={config}", f"--workdir={folder}/run", "--config.log_every_steps=1", *options]
        command = [sys.executable, "-c", PROBE, str(time.time()), str(out), *arguments]
        subprocess.run(command, env=env, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text())


def cells(cold: dict, warm: dict) -> list[list[str]]:
    """Of the table: each stage's seconds in both starts."""
    found, before = [], {"cold": 0.0, "warm": 0.0}
    for stage, label in zip(STAGES, LABELS, strict=True):
        found.append([label, f"{cold[stage] - before['cold']:.1f}", f"{warm[stage] - before['warm']:.1f}"])
        before = {"cold": cold[stage], "warm": warm[stage]}
    found.append(["**first step done**", f"**{before['cold']:.1f}**", f"**{before['warm']:.1f}**"])
    found.append(["of it: XLA compiles", f"{cold['compiled']:.1f}", f"{warm['compiled']:.1f}"])
    return [*found, ["of it: compiled programs read", f"{cold['read']:.1f}", f"{warm['read']:.1f}"]]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--config", default="configs/navit_b16.py")
    parser.add_argument("--repeats", type=int, default=1, help="the median start is shown")
    args = parser.parse_args()
    options = [f"--config.{option}" for option in QUICK] if args.quick else []
    print(common.header("jax", "flax", "grain", threads=common.cores()))
    pairs = []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as cache:
            pairs.append([start(args.config, Path(cache), options) for _ in range(2)])
    cold, warm = ({k: statistics.median(p[i][k] for p in pairs) for k in pairs[0][i]} for i in range(2))
    print(common.markdown([f"{args.config}, seconds", "no cache", "second start"], cells(cold, warm)))
    done = [x["first step"] for x in (cold, warm)]
    names = [f"first step, {kind}" for kind in ("no cache", "second start")]
    common.write_rows(args.json, [common.row(n, "s", x, GOAL, GOAL / x) for n, x in zip(names, done, strict=True)])


if __name__ == "__main__":
    main()
