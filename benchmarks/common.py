"""What benchmark reports share: the machine and the versions that numbers belong to, and markdown tables."""

import os
import platform
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import jax


def machine() -> str:
    """Cores, processor and accelerator, as `2 cores of AMD EPYC` or `NVIDIA H100, 16 cores of ...`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    name = found[1] if found else platform.processor() or platform.machine()
    text = f"{cores} core{'s' * (cores != 1)} of {name}"
    device = jax.devices()[0]
    return text if device.platform == "cpu" else f"{jax.device_count()} x {device.device_kind}, {text}"


def versions(*packages: str) -> str:
    """`Python 3.11.7, jax 0.10.2, flax 0.12.8`."""
    found = [f"{name} {metadata.version(name)}" for name in packages]
    return ", ".join([f"Python {platform.python_version()}", *found])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
