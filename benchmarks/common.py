"""What benchmarks share: paired measurements, the machine and versions that numbers belong to, tables and JSON rows.

A shared machine drifts by tens of percent within a minute, so ours and a peer are measured in turn and the ratio of
each pair counts; its median is what a table shows. Where both sides need their own threads and memory each runs in its
own process (`benchmarks.worker`), which is stopped while the other is measured.
"""

import argparse
import json
import os
import platform
import re
import statistics
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple


class Pair(NamedTuple):
    """ours, peer: medians of the measured values. ratio: median of the pairs' ratios, > 1 is better for us."""

    ours: float
    peer: float
    ratio: float


def paired(ours: Callable[[], float], peer: Callable[[], float], repeats: int, warmup: int = 1) -> Pair:
    """Seconds (or any cost) of both, measured in turn `repeats` times after `warmup` turns that do not count."""
    for _ in range(warmup):
        ours(), peer()
    return pair_of([(ours(), peer()) for _ in range(repeats)])


def pair_of(costs: Sequence[tuple[float, float]]) -> Pair:
    """Of (ours, peer) costs, less is better."""
    mine, others = zip(*costs, strict=True)
    return Pair(*map(statistics.median, (mine, others, [b / a for a, b in costs])))


def row(name: str, unit: str, ours: float, peer: float, ratio: float) -> dict:
    """A row of `--json`: ratio > 1 is better for us."""
    return dict(name=name, unit=unit, ours=float(ours), peer=float(peer), ratio=float(ratio))


def write_rows(path: str | Path | None, rows: list[dict]) -> None:
    """The rows as a JSON list, where a path was given."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(rows, indent=1) + "\n")


def parser(doc: str) -> argparse.ArgumentParser:
    """With `--json FILE` and `--quick`; doc: the benchmark's docstring, whose first line is the description."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--json", metavar="FILE", help="where to write the rows as JSON")
    made.add_argument("--quick", action="store_true", help="a smoke test in seconds; its figures mean nothing")
    return made


def header(*packages: str, threads: int = 0) -> str:
    """The line above a table: machine, threads and versions. With threads, what is measured runs on the CPU."""
    if threads:
        os.environ["JAX_PLATFORMS"] = "cpu"  # nor is another device looked for
    return f"On {machine()}{f', {threads} threads' * bool(threads)}; {versions(*packages)}.\n"


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> str:
    """Cores, processor and accelerator, as `2 cores of AMD EPYC` or `NVIDIA H100, 16 cores of ...`."""
    import jax  # not above: a peer's process has no use for it

    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    name = found[1] if found else platform.processor() or platform.machine()
    text = f"{cores()} core{'s' * (cores() != 1)} of {name}"
    device = jax.devices()[0]
    return text if device.platform == "cpu" else f"{jax.device_count()} x {device.device_kind}, {text}"


def versions(*packages: str) -> str:
    """`Python 3.11.7, jax 0.10.2, flax 0.12.8`; packages that are not installed are left out."""
    found = [f"{name} {version}" for name in packages if (version := installed(name))]
    return ", ".join([f"Python {platform.python_version()}", *found])


def installed(package: str) -> str:
    """Its version, "" where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
