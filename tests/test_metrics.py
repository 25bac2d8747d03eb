"""The peak's figures reach the device they belong to, and a meter's means are those of all its images."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from navit_jax import metrics
from navit_jax.metrics import PEAKS, Meter, line, peak_flops


class Device:
    """As much of a jax device as naming it takes."""

    platform = "gpu"

    def __init__(self, kind):
        self.device_kind = kind


@pytest.mark.parametrize(
    "kind,tera",
    [
        ("TPU v2", 22.5),
        ("TPU v3", 61.5),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA A40", 149.7),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_known_devices(kind, tera):
    flops, text = peak_flops(Device(kind), jnp.bfloat16)
    assert flops == tera * 1e12
    assert "measured" not in text and "bfloat16" in text and kind in text


@pytest.mark.parametrize(
    "kind,dtype",
    [
        ("NVIDIA RTX A4000", jnp.bfloat16),
        ("NVIDIA T400", jnp.bfloat16),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", jnp.bfloat16),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", jnp.bfloat16),
        ("Something new", jnp.bfloat16),
        ("NVIDIA H100 80GB HBM3", jnp.float32),
    ],
)
def test_what_is_not_in_the_table_is_measured(kind, dtype, monkeypatch):
    monkeypatch.setattr(metrics, "_measure", lambda device, dtype, size: 5e12)
    flops, text = peak_flops(Device(kind), dtype)
    assert flops == 5e12 and "measured" in text and jnp.dtype(dtype).name in text and kind in text


def test_a_cpu_is_measured_once():
    device = jax.devices("cpu")[0]
    start = time.perf_counter()
    flops, text = peak_flops(device, jnp.float32)
    took = time.perf_counter() - start
    assert peak_flops(device, jnp.bfloat16) == (flops, text)  # in float32 whatever the model computes in
    assert time.perf_counter() - start - took < 0.1
    assert 1e9 < flops < 1e14 and "measured" in text and "float32" in text
    a = np.ones((1024, 1024), np.float32)
    start = time.perf_counter()
    a @ a
    assert flops * jax.local_device_count("cpu") > 2 * 1024**3 / (time.perf_counter() - start) / 50


def test_the_table_is_in_plain_terms():
    assert all(20 < tera < 3000 for tera in PEAKS.values())


def test_a_meters_means_are_over_all_images(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    meter = Meter(peak=1e12)
    assert meter.peek() == {} and line({}) == ""
    steps = [
        ({"loss": 6.0, "correct": 1, "images": 2, "tokens": 90, "grad_norm": 3.0}, 1),
        ({"loss": np.float32(2.0), "correct": 2, "images": jnp.float32(6), "tokens": 70, "grad_norm": 1.0}, 2),
    ]
    for sums, skipped in steps:
        meter.add(sums, slots=100, flops=4e11, skipped=skipped)
    for part, seconds in (("data", 0.5), ("h2d", 0.25), ("compute", 2.0), ("data", 0.5)):
        with meter.timed(part):
            now[0] += seconds
    now[0] += 0.75
    expected = {
        "train/loss": 1.0,
        "train/accuracy": 3 / 8,
        "train/grad_norm": 2.0,
        "train/images_per_s": 2.0,
        "train/tokens_per_s": 40.0,
        "train/mfu": 0.2,
        "data/fill": 0.8,
        "data/skipped": 3,
        "time/step_s": 2.0,
        "time/data_s": 0.5,
        "time/h2d_s": 0.125,
        "time/compute_s": 1.0,
    }
    assert meter.peek() == pytest.approx(expected)
    assert line(meter.peek()) == "loss 1, accuracy 37.5%, 2 images/s, 40 tokens/s, fill 80.0%, MFU 20.0%"
    assert meter.flush() == pytest.approx(expected) and meter.peek() == {}
    now[0] += 50.0  # an evaluation
    meter.restart()
    meter.add(steps[0][0], slots=100, flops=0.0)
    now[0] += 1.0
    assert meter.peek()["train/images_per_s"] == pytest.approx(2.0)
    assert meter.peek()["data/skipped"] == 0


def test_waiting_for_rows_counts_as_data(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    meter = Meter(peak=1e12)

    def slow():
        for i in range(3):
            now[0] += 2.0
            yield i

    got = []
    for i in meter.waits(slow()):
        got.append(i)
        now[0] += 10.0
        if i == 0:
            meter.restart()  # what was waited for before does not count
        meter.add(dict(loss=0.0, correct=0, images=1, tokens=1, grad_norm=0.0), slots=1, flops=0.0)
    assert got == [0, 1, 2]
    assert meter.peek()["time/data_s"] == pytest.approx(4 / 3)


def test_rows_without_an_image_are_no_error():
    meter = Meter(peak=1e12)
    meter.add({"loss": 0.0, "correct": 0, "images": 0, "tokens": 0, "grad_norm": 0.0}, slots=100, flops=0, skipped=4)
    assert meter.peek()["train/loss"] == 0 and meter.peek()["data/skipped"] == 4
