"""What a run measures of itself: its device's peak, and the means between two lines of its log.

Utilisation is useful FLOPs (of real tokens) against the peak that the maker states for dense bfloat16, so that figures
compare with papers. A CPU's stated peak says little: there, and on unknown devices, a matrix product is timed instead.
"""

import contextlib
import functools
import re
import time
from collections.abc import Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Dense bfloat16 (float16 on V100 and T4) of one jax device in 1e12 FLOP/s, from the makers' data sheets; where those
# count sparsity, half. One device is half of a TPU v2, v3 or v7x chip.
PEAKS = {
    **{"TPU v2": 22.5, "TPU v3": 61.5, "TPU v4": 275.0, "TPU v5 lite": 197.0, "TPU v5e": 197.0, "TPU v5p": 459.0},
    **{"TPU v5": 459.0, "TPU v6 lite": 918.0, "TPU v6e": 918.0, "TPU7x": 1153.5, "TPU v7x": 1153.5},
    **{"GB300": 2500.0, "GB200": 2500.0, "B300": 2250.0, "B200": 2250.0, "GH200": 989.4, "H200": 989.4},
    **{"H100 NVL": 835.5, "H100 PCIe": 756.0, "H100": 989.4, "A100": 312.0, "A40": 149.7, "A30": 165.0},
    **{"A10G": 70.0, "A10": 125.0, "L40S": 362.0, "L40": 181.0, "L4": 121.0, "V100": 125.0, "T4": 65.0},
    **{"RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71.0, "RTX 6000 Ada": 364.2, "RTX A6000": 154.8},
    **{"MI300X": 1307.4},
}


def peak_flops(device: jax.Device, dtype: DTypeLike) -> tuple[float, str]:
    """(FLOP/s that one device can reach, where the figure comes from).

    dtype: what the model computes in. In 16 bits, a known accelerator's stated peak; otherwise the best rate of a
    matrix product within 0.3 s, once a process: in float32 on a CPU, shared out over its jax devices, so that
    multiplying by the number of devices is right everywhere.
    """
    kind = device.device_kind
    known = next((name for name in PEAKS if re.search(rf"\b{name}\b", kind)), None)
    if known and jnp.dtype(dtype).itemsize == 2 and not re.search(r"\b(MIG|Laptop)\b", kind):
        return PEAKS[known] * 1e12, f"{PEAKS[known]:g} TFLOP/s, dense bfloat16 of {known} ({kind})"
    on_cpu = device.platform == "cpu"
    size, name = (1024, "float32") if on_cpu else (8192, jnp.dtype(dtype).name)
    rate = _measure(device, name, size)
    text = f"{rate / 1e12:.3g} TFLOP/s, measured on this {kind}: a {size} x {size} matrix product in {name}"
    return rate / (jax.local_device_count("cpu") if on_cpu else 1), text


@functools.cache
def _measure(device: jax.Device, dtype: str, size: int) -> float:
    a = jax.device_put(jax.random.normal(jax.random.key(0), (size, size)).astype(dtype), device)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    best, stop = float("inf"), time.perf_counter() + 0.3
    while time.perf_counter() < stop:
        start = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


PARTS = ("data", "h2d", "compute")


class Meter:
    """Sums over the steps since the last `flush`, and the time they took.

    peak: FLOP/s of all devices of the run. Every number is of the whole step, over all processes.
    """

    def __init__(self, peak: float) -> None:
        self._peak = peak
        self.restart()

    def restart(self) -> None:
        """Forget the steps since the last flush and start the clock: after compilation, evaluation, a checkpoint."""
        self._sums, self._times, self._start = {}, dict.fromkeys(PARTS, 0.0), time.perf_counter()

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds the time inside to one of `PARTS`, of which a step's time is made."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._times[part] += time.perf_counter() - max(start, self._start)

    def waits(self, items: Iterable) -> Iterator:
        """The items; the time until each comes counts as `data`."""
        iterator = iter(items)
        while True:
            with self.timed("data"):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def add(self, sums: Mapping[str, float], *, slots: int, flops: float, skipped: int = 0) -> None:
        """Add a step. sums: `loss`, `correct`, `images`, `tokens` of it, summed over its images or pairs; `grad_norm`.

        slots: tokens that its rows could hold. flops: useful ones of the step. skipped: images that could not be used.
        """
        for name, value in {**sums, "slots": slots, "flops": flops, "skipped": skipped, "steps": 1}.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def peek(self) -> dict[str, float]:
        """The means so far, named as in metrics.jsonl; empty before the first step. Per second of this process's clock.

        `train/loss`, `train/accuracy` are means over images, or over pairs with texts; `train/grad_norm` over steps;
        `train/images_per_s`, `train/tokens_per_s` count real ones; `train/mfu` and `data/fill` are shares;
        `data/skipped` is a count, and of pairs `data/unmatched`, images whose text had no place in their step.
        `time/step_s` is a mean over steps, and of it the host spent `time/data_s` waiting for rows, `time/h2d_s`
        handing them to the device and `time/compute_s` dispatching steps and waiting for them.
        """
        if not self._sums:
            return {}
        s, seconds = self._sums, time.perf_counter() - self._start
        images = max(s["images"], 1.0)
        return {
            "train/loss": s["loss"] / images,
            "train/accuracy": s["correct"] / images,
            "train/grad_norm": s["grad_norm"] / s["steps"],
            "train/images_per_s": s["images"] / seconds,
            "train/tokens_per_s": s["tokens"] / seconds,
            "train/mfu": s["flops"] / seconds / self._peak,
            "data/fill": s["tokens"] / s["slots"],
            "data/skipped": s["skipped"],
            **({"data/unmatched": s["unmatched"]} if "unmatched" in s else {}),
            "time/step_s": seconds / s["steps"],
            **{f"time/{part}_s": self._times[part] / s["steps"] for part in PARTS},
        }

    def flush(self) -> dict[str, float]:
        """As `peek`, and start anew."""
        values = self.peek()
        self.restart()
        return values


def line(values: Mapping[str, float]) -> str:
    """A meter's values for the progress bar: loss 0.123, accuracy 91.0 %, 512 images/s, ..."""
    if not values:
        return ""
    return (
        f"loss {values['train/loss']:.4g}, accuracy {values['train/accuracy']:.1%}, "
        f"{values['train/images_per_s']:.3g} images/s, {_short(values['train/tokens_per_s'])} tokens/s, "
        f"fill {values['data/fill']:.1%}, MFU {values['train/mfu']:.1%}"
    )


def _short(number: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
