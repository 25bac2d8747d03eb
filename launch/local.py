"""Start a run of several processes on this machine: launch/local.py --processes 2 -- python train.py --config=...

The command gets --coordinator, --num_processes and --process_id appended. Lines are prefixed with the process's number.
When one process fails the others get a minute to stop by themselves, which they do. The status is then 75 if a process
was lost (the same command resumes), else the failed one's. SIGTERM and Ctrl-C are passed on: all save and stop.

--devices N gives each process N virtual CPU devices; without it the GPUs are shared out, or all use the CPU.
"""

import argparse
import glob
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import IO

LOST = 75  # what a process exits with when another was lost: EX_TEMPFAIL
_OUTPUT = threading.Lock()


def main(argv: list[str]) -> int:
    """Runs the command of `argv` until all its processes have ended; returns the exit status."""
    args = _parse(argv)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for index in range(args.processes):
        named = [f"--coordinator={coordinator}", f"--num_processes={args.processes}", f"--process_id={index}"]
        # In sessions of their own, so that Ctrl-C reaches them once, from here.
        process = subprocess.Popen(
            [*args.command, *named],
            env=_environment(index, args),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        processes.append(process)
    for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        passed_on = signal.SIGTERM if kind == signal.SIGHUP else kind  # a closed terminal
        signal.signal(kind, lambda number, frame, passed_on=passed_on: _send(processes, passed_on))
    readers = [
        threading.Thread(target=_copy, args=(stream, out, f"[{index}] "), daemon=True)
        for index, process in enumerate(processes)
        for stream, out in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    ]
    for reader in readers:
        reader.start()
    status = _wait(processes, args.grace)
    for reader in readers:
        reader.join(2)
    return status


def _parse(argv: list[str]) -> argparse.Namespace:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="launch/local.py", description=__doc__, formatter_class=about)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--devices", type=int, default=0, help="virtual CPU devices of each process")
    parser.add_argument("--grace", type=float, default=60, help="seconds to stop in after another has failed")
    parser.add_argument("command", nargs="+", help="behind --, such as python train.py --config configs/navit_b16.py")
    args = parser.parse_args(argv)
    if args.processes < 1:
        parser.error(f"--processes is {args.processes}; expected 1 or more")
    return args


def _environment(index: int, args: argparse.Namespace) -> dict[str, str]:
    env = dict(os.environ, PYTHONUNBUFFERED="1")
    if args.devices:
        # Its other scheduler can hold all threads in collectives that wait for each other.
        flags = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={args.devices}"
        flags += " --xla_cpu_enable_concurrency_optimized_scheduler=false"
        return env | dict(JAX_PLATFORMS="cpu", XLA_FLAGS=flags.strip())
    numbers = [str(i) for i in range(len(glob.glob("/dev/nvidia[0-9]*")))]
    gpus = [gpu for gpu in env.get("CUDA_VISIBLE_DEVICES", ",".join(numbers)).split(",") if gpu]
    if gpus:
        share = len(gpus) // args.processes
        if not share:
            sys.exit(f"{args.processes} processes do not fit on {len(gpus)} GPUs: give --processes of that at most")
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[index * share : (index + 1) * share])
    return env


def _send(processes: list[subprocess.Popen], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _copy(stream: IO[bytes], out: IO[str], prefix: str) -> None:
    """Whole lines; what a progress bar rewrites is a line, too."""
    rest = b""
    while data := stream.read1(65536):
        *lines, rest = (rest + data.replace(b"\r", b"\n")).split(b"\n")
        _write(lines, out, prefix)
    _write([rest], out, prefix)


def _write(lines: list[bytes], out: IO[str], prefix: str) -> None:
    with _OUTPUT:
        for line in filter(None, lines):
            out.write(f"{prefix}{line.decode(errors='replace')}\n")
        out.flush()


def _wait(processes: list[subprocess.Popen], grace: float) -> int:
    """The exit status of all; after `grace` seconds since the first failure what still runs is killed."""
    deadline = float("inf")
    while None in (statuses := [process.poll() for process in processes]):
        if any(statuses):
            deadline = min(deadline, time.monotonic() + grace)
        if time.monotonic() > deadline:
            print(f"launch/local.py: killing what still runs {grace:g} s after a process failed", file=sys.stderr)
            _send(processes, signal.SIGKILL)
            break
        time.sleep(0.05)
    statuses = [code if code >= 0 else 128 - code for code in (process.wait() for process in processes)]
    return LOST if LOST in statuses else next(filter(None, statuses), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
