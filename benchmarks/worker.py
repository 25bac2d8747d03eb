"""One side of a measurement in a process of its own: ours with jax, a peer with torch, driven over pipes.

    with Worker(spec) as worker: worker.step()      # in the parent
    python -m benchmarks.worker                     # what it starts: JSON lines in, JSON lines out

A spec is a dict: `side`, a name that `ours.SIDES` or `peers_torch.SIDES` knows, `grids` [[rows, columns], ...] of the
images in patches, `threads`, and what that side takes. Memory is the most that the steps take over what the process
held when model and optimizer existed, in anonymous pages: mapped files, such as the code of libraries, are not counted.
What compiling leaves behind is.
"""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from navit_jax import host_memory

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Worker:
    """The parent's end. A worker sleeps (SIGSTOP) but while it answers, so idle threads that spin cost nobody."""

    def __init__(self, spec: dict):
        threads = str(spec.get("threads", 2))
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        env = os.environ | dict.fromkeys(names, threads) | {"TF_CPP_MIN_LOG_LEVEL": "2", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "benchmarks.worker"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.process = subprocess.Popen(command, text=True, env=env, cwd=Path(__file__).parent.parent, **pipes)
        self.info = self.ask(spec)

    def step(self) -> dict:
        """`seconds` of a whole step from images to updated parameters, `pack` of them before the model, `loss`."""
        return self.ask("step")

    def seconds(self) -> float:
        """Of a step."""
        return self.step()["seconds"]

    def memory(self) -> float:
        """MiB that steps since the last call of this took at most over the base."""
        return self.ask("memory")["mib"]

    def ask(self, message: dict | str) -> dict:
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a benchmark's process ended with status {self.process.wait()}; its message is above")
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(answer)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def anonymous(peak: bool = False) -> float:
    """MiB of anonymous pages, now or (as mapped files hardly change between steps) at most since `reset_peak`."""
    found = {name: int(value) / 1024 for name, value in re.findall(r"(\w+):\s*(\d+) kB", STATUS.read_text())}
    return found["VmHWM"] - found["RssFile"] - found["RssShmem"] if peak else found["RssAnon"]


def reset_peak() -> None:
    CLEAR.write_text("5")


def make(spec: dict) -> object:
    """The side's object: `step() -> {pack, loss, ...}`, and `info`, a dict."""
    if spec["side"] == "ours inference":  # in a user's own process, whose memory is theirs
        from benchmarks import inference_ours as module
    elif spec["side"].startswith("ours"):
        host_memory.keep()  # as train.py does

        from benchmarks import ours as module
    elif spec["side"].endswith("attention"):
        from benchmarks import attention as module
    elif spec["side"].startswith("inference"):
        from benchmarks import inference_peers as module
    else:
        from benchmarks import peers_torch as module
    return module.SIDES[spec["side"]](spec)


def serve() -> None:
    replies, ours = os.fdopen(os.dup(1), "w"), os.dup2(2, 1)  # what libraries print goes to stderr
    assert ours == 1
    spec = json.loads(sys.stdin.readline())
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: spec.get("threads", 2)])
    side = make(spec)
    ctypes.CDLL(None).malloc_trim(0)
    base = anonymous()
    answer = side.info | dict(base_mib=base)
    while True:
        replies.write(json.dumps(answer) + "\n")
        replies.flush()
        line = sys.stdin.readline()
        if not line:
            return
        message = json.loads(line)
        if message == "memory":
            answer = dict(mib=anonymous(peak=True) - base)
            reset_peak()
        elif message == "step":
            start = time.perf_counter()
            answer = side.step()
            answer["seconds"] = time.perf_counter() - start
        else:
            answer = getattr(side, message)()


if __name__ == "__main__":
    serve()
