"""Where the numbers of a run go: metrics.jsonl, TensorBoard, and a picture of the loss.

One JSON object a line, because that survives a kill with at most its last line lost, and any tool reads it. TensorBoard
is written by tensorboardX; TensorFlow is not needed. Files are local: object stores cannot append.
"""

import csv
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from input_pipeline.errors import UserError
from navit_jax.distributed import is_lead


def open_writer(folder: str | os.PathLike, resume_step: int | None) -> "MetricWriter | Silent":
    """The run's writer in process 0, one that writes nothing in the others."""
    return MetricWriter(folder, resume_step) if is_lead() else Silent()


def write_table(rows: Sequence[Mapping[str, object]], path: Path) -> None:
    """A CSV file with a column for each field of the first row."""
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def _summary_writer() -> type:
    """tensorboardX's class, without torch: where that is installed it takes 2 s to import, for types of no use here."""
    hide = "torch" not in sys.modules
    try:
        if hide:
            sys.modules["torch"] = None
        from tensorboardX import SummaryWriter
    finally:
        if hide:
            sys.modules.pop("torch", None)
    return SummaryWriter


class Silent:
    """Takes the numbers of a run that another process writes."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class MetricWriter:
    """Appends to FOLDER/metrics.jsonl and to TensorBoard files in FOLDER/tensorboard.

    resume_step: the step that training goes on from; what was written after it is cut, as it will be written again.
    None: only append, next to a trainer that may be running. In one process of a run. Raises UserError, naming the
    file, where it cannot be written, a full disk among the reasons.
    """

    def __init__(self, folder: str | os.PathLike, resume_step: int | None) -> None:
        summary_writer = _summary_writer()  # takes 0.5 s: only who writes pays for it

        self.path = Path(folder) / "metrics.jsonl"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if resume_step is not None:
                _cut(self.path, resume_step)
            self._file = open(self.path, "ab+")  # noqa: SIM115
            self._end_line()
            purge = None if resume_step is None else resume_step + 1
            self._board = summary_writer(str(Path(folder) / "tensorboard"), purge_step=purge, flush_secs=10)
        except OSError as error:
            raise self._unwritable(error) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers of a step, on the disk when this returns (TensorBoard within 10 s). Not finite becomes null."""
        numbers = {name: _number(value) for name, value in values.items()}
        try:
            self._file.write((json.dumps({"step": int(step), **numbers}) + "\n").encode())
            self._file.flush()
            for name, value in numbers.items():
                if value is not None:
                    self._board.add_scalar(name, value, int(step))
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Close both."""
        self._file.close()
        self._board.close()

    def _end_line(self) -> None:
        """A line that a kill left half must not swallow the next one."""
        self._file.seek(-1 if self._file.tell() else 0, os.SEEK_END)
        if self._file.read(1) not in (b"", b"\n"):
            self._file.write(b"\n")

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"Cannot write {self.path}: {error.strerror or error}. Free space there or name another --workdir; "
            "the same command then resumes."
        )


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """The lines of a metrics.jsonl (or of the one in a folder) as dicts, `step` first, but for what a kill left half.

    Raises UserError if there is no such file.
    """
    path = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
    if not path.exists():
        raise UserError(f"No {path}; expected a run's folder or its metrics.jsonl.")
    return [found for line in path.read_bytes().splitlines() if (found := _parse(line)) is not None]


def plot_loss(metrics_path: str | os.PathLike, png: str | os.PathLike) -> None:
    """Draw loss, and accuracy and learning rate where they were written, over the steps into a PNG.

    Points are the values, the line their running mean over a twentieth of the run. Does nothing before the first value.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_metrics(metrics_path)
    panels = [("train/loss", "training loss"), ("train/accuracy", "training accuracy"), ("train/lr", "learning rate")]
    series = {name: [(m["step"], m[name]) for m in lines if m.get(name) is not None] for name, _ in panels}
    panels = [(name, label) for name, label in panels if series[name]]
    if not panels:
        return
    heights = [1 if name == "train/lr" else 2 for name, _ in panels]
    figure = Figure(figsize=(8, 1.2 + 1.2 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (name, label) in zip(axes, panels):
        steps, values = np.asarray(series[name], float).T
        if name != "train/lr":
            ax.plot(steps, values, ".", color="#9db7d5", markersize=4, label="each line of the log")
            values = running_mean(values, max(1, len(values) // 20))
        ax.plot(steps, values, color="#1f4e79", linewidth=1.8, label="running mean")
        ax.set_ylabel(label)
        ax.grid(color="#e6e6e6")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    axes[-1].set_xlabel("step")
    figure.align_ylabels(axes)
    figure.savefig(png, dpi=140)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over at most 2 * width + 1 values, fewer at the ends."""
    total, centre = np.concatenate([[0.0], np.cumsum(values)]), np.arange(len(values))
    low, high = np.maximum(centre - width, 0), np.minimum(centre + width + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _cut(path: Path, last: int) -> None:
    """Keep the whole lines of steps up to `last`, by way of a new file: a kill leaves the old or the new one."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    kept = [line for line in lines if (found := _parse(line)) is not None and found["step"] <= last]
    new = path.with_suffix(".jsonl.new")
    new.write_bytes(b"".join(line + b"\n" for line in kept))
    os.replace(new, path)


def _parse(line: bytes) -> dict | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "step" in found else None


def _number(value: float) -> float | int | None:
    value = np.asarray(value).item()
    return value if math.isfinite(value) else None
