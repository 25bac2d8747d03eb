"""metrics.jsonl is whole after any kill and cut back on resume; TensorBoard hides what was cut."""

import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from input_pipeline.errors import UserError
from navit_jax.writers import MetricWriter, plot_loss, read_metrics, running_mean

REPO = Path(__file__).parent.parent


def write(folder, steps, resume_step):
    writer = MetricWriter(folder, resume_step)
    for step in steps:
        writer.write(step, {"train/loss": 1.0 / step})
    writer.close()


def test_a_line_is_one_object_with_step_first_and_every_bit(tmp_path):
    loss = np.float32(0.1)
    writer = MetricWriter(tmp_path / "new" / "run", 0)
    writer.write(np.int64(3), {"train/loss": jnp.float32(loss), "train/lr": 1e-30, "n": 4, "bad": float("nan")})
    text = (tmp_path / "new" / "run" / "metrics.jsonl").read_text()  # before any close
    assert text.endswith("\n") and list(json.loads(text)) == ["step", "train/loss", "train/lr", "n", "bad"]
    assert read_metrics(tmp_path / "new" / "run") == [
        {"step": 3, "train/loss": float(loss), "train/lr": 1e-30, "n": 4, "bad": None}
    ]
    writer.close()


@pytest.mark.parametrize("resume,kept", [(0, []), (4, [1, 2, 3, 4]), (9, range(1, 7)), (None, range(1, 7))])
def test_resuming_cuts_back(tmp_path, resume, kept):
    write(tmp_path, range(1, 7), 0)
    write(tmp_path, [10, 11], resume)
    assert [m["step"] for m in read_metrics(tmp_path)] == [*kept, 10, 11]
    assert not list(tmp_path.glob("*.new"))


@pytest.mark.parametrize("resume", [5, None])
@pytest.mark.parametrize("size", [1, 8, 30])
def test_half_a_line_costs_only_itself(tmp_path, size, resume):
    write(tmp_path, [1, 2, 3], 0)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 4, "train/loss": 0.123456}\n'[:size])
    assert [m["step"] for m in read_metrics(path)] == [1, 2, 3]
    write(tmp_path, [4, 5], resume)
    assert [m["step"] for m in read_metrics(path)] == [1, 2, 3, 4, 5]


def test_a_killed_process_leaves_every_line_it_wrote(tmp_path):
    code = """
        import sys
        from navit_jax.writers import MetricWriter
        writer = MetricWriter(sys.argv[1], 0)
        for step in range(1, 10**6):
            writer.write(step, {"train/loss": step})
            print(step, flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    child = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True)
    for _ in range(20):
        said = int(child.stdout.readline())
    child.send_signal(signal.SIGKILL)
    child.communicate()
    steps = [m["step"] for m in read_metrics(tmp_path)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= said


def events(folder):
    """(step, tag or 'start', value) of all TensorBoard events, in the order of the files."""
    from tensorboardX.proto.event_pb2 import Event

    out = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            out += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            out += [(event.step, "start", None)] if event.HasField("session_log") else []
    return out


def test_tensorboard_has_the_same_numbers_and_drops_what_was_cut(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    writer.write(2, {"train/loss": 0.5, "bad": float("inf")})
    writer.close()
    assert (2, "train/loss", 0.5) in events(tmp_path)
    assert "bad" not in {tag for _, tag, _ in events(tmp_path)}
    time.sleep(1.1)  # its files are named by the second
    write(tmp_path, [3], 2)
    assert (3, "start", None) in events(tmp_path)  # hides the earlier steps from 3 on
    time.sleep(1.1)
    before = [e for e in events(tmp_path) if e[1] == "start"]
    write(tmp_path, [3], None)
    assert [e for e in events(tmp_path) if e[1] == "start"] == before


def test_what_cannot_be_written_is_the_users_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write .*file/run/metrics.jsonl.*workdir"):
        MetricWriter(tmp_path / "file" / "run", 0)
    writer = MetricWriter(tmp_path, 0)
    writer._file.close()
    writer._file = open("/dev/full", "wb")  # noqa: SIM115
    with pytest.raises(UserError, match="metrics.jsonl: No space left on device"):
        writer.write(1, {"train/loss": 1.0})


def test_reading_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="No .*metrics.jsonl"):
        read_metrics(tmp_path)


def test_the_loss_is_drawn(tmp_path):
    rng = np.random.default_rng(0)
    writer = MetricWriter(tmp_path, 0)
    for step in range(10, 2010, 10):
        value = 3 * np.exp(-step / 600) + 0.4 + 0.15 * rng.normal()
        loss = float("nan") if step == 500 else value
        accuracy = 1 - value / 4
        writer.write(step, {"train/loss": loss, "train/accuracy": accuracy, "train/lr": 1e-3 * min(1, step / 200)})
    writer.write(2000, {"eval/top1@256": 0.9})
    writer.close()
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    tall = np.asarray(Image.open(tmp_path / "loss.png").convert("L"), float)
    assert tall.shape[1] == 8 * 140 and tall.std() > 10
    with open(tmp_path / "short.jsonl", "w") as file:
        file.write('{"step": 1, "train/loss": 2.0}\n')
    plot_loss(tmp_path / "short.jsonl", tmp_path / "short.png")
    assert Image.open(tmp_path / "short.png").size[1] < tall.shape[0]  # one panel
    (tmp_path / "empty.jsonl").write_text("")
    plot_loss(tmp_path / "empty.jsonl", tmp_path / "empty.png")
    assert not os.path.exists(tmp_path / "empty.png")


def test_running_mean():
    values = np.random.default_rng(0).normal(size=9)
    expected = [values[max(0, i - 2) : i + 3].mean() for i in range(9)]
    np.testing.assert_allclose(running_mean(values, 2), expected)
