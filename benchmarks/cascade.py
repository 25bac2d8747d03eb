"""Accuracy against time of single token budgets and of cascades, which give more tokens only to images in doubt.

    python -m benchmarks.cascade [--run RUN] [--images 1000] [--json FILE] [--out docs/cascade.png] [--quick]

The model is `configs/quickstart.py:shapes` (width 128, 4 layers) trained on 4 to 36 tokens an image, by this script or
found in --run. Held-out shapes are arrays in memory; a pass is `classify`: resizing, packing and the model, on the CPU.
All settings are measured in turn and the median pass counts. The two pairs of budgets were chosen on the other half of
the held-out images, by tokens. Of 1 MFLOP a token, the model costs little more than resizing an image, which a cascade
does twice: tokens say what a larger model would save. Source: Dehghani et al. 2023 (NaViT), on adaptive inference.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

import navit_jax
from benchmarks import common
from input_pipeline.sources import open_source

if TYPE_CHECKING:
    from navit_jax.predict import Model

ROOT = Path(__file__).parent.parent
RECIPE = {  # of benchmarks.equal_compute, for more sizes
    "total_steps": 4000,
    "resolution.min_side": 32,
    "resolution.max_side": 96,
    "packing.row_length": 64,
    "packing.rows_per_step": 8,
    "drop.kind": "none",
    "augment.crop_min_area": 1.0,
    "augment.crop_max_aspect": 1.0,
    "model.posemb": "learned",
    "model.posemb_coords": "absolute",
    "optim.lr": 3e-4,
    "optim.b2": 0.95,
    "optim.warmup_steps": 200,
    "eval.token_budgets": "(9, 36)",
    "eval.max_examples": 500,
}
QUICK = {"total_steps": 20, "eval.max_examples": 20, "optim.warmup_steps": 2}
BUDGETS = (6, 9, 16, 25, 36)
CASCADES = ((9, 16), (16, 25))
SHARES = (0.1, 0.2, 0.3, 0.5)
INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
COLOURS = ("#f28e2b", "#2f6fde", "#3aa655")


class Point(NamedTuple):
    """A setting: budgets, and of a cascade the share that goes on. ms: an image. tokens: an image, over all budgets."""

    budgets: tuple[int, ...]
    share: float
    top1: float
    ms: float
    tokens: float

    @property
    def name(self) -> str:
        """For tables."""
        text = " then ".join(map(str, self.budgets)) + " tokens"
        return f"{text}, {100 * self.share:.0f} %" if self.share else text


def train(workdir: Path, quick: bool) -> None:
    """A run of the quickstart model on shapes, in a process of its own."""
    settings = RECIPE | (QUICK if quick else {})
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "train.py", "--config", "configs/quickstart.py:shapes", "--workdir", str(workdir)]
    subprocess.run([*command, *flags], cwd=ROOT, check=True, stdout=sys.stderr)


def held_out(count: int) -> tuple[list[np.ndarray], list[str]]:
    """(images, the names of their classes)."""
    source = open_source("shapes", "validation")
    records = [source[i] for i in range(min(count, len(source)))]
    return [record.data for record in records], [source.class_names[record.label] for record in records]


def measure(model: "Model", images: list, labels: list[str], repeats: int) -> list[Point]:
    """Every single budget and cascade, each over all images; the first pass compiles and does not count."""
    settings = [((budget,), 0.0) for budget in BUDGETS]
    settings += [(cascade, share) for cascade in CASCADES for share in SHARES]
    times: list[list[float]] = [[] for _ in settings]
    found = [None] * len(settings)
    for turn in range(repeats + 1):
        for i, (budgets, share) in enumerate(settings):
            start = time.perf_counter()
            found[i] = model.classify(images, 1, budgets=budgets, escalate=share if len(budgets) > 1 else None)
            if turn:
                times[i].append(time.perf_counter() - start)
    points = []
    for (budgets, share), answers, seconds in zip(settings, found, times, strict=True):
        right = [answer.labels[0] == label for answer, label in zip(answers, labels, strict=True)]
        ms = 1e3 * statistics.median(seconds) / len(images)
        tokens = statistics.mean(answer.spent for answer in answers)
        points.append(Point(budgets, share, statistics.mean(right), ms, tokens))
    return points


def single_at(points: list[Point], top1: float, cost: str) -> float:
    """What single budgets cost ('tokens' or 'ms' an image) at this accuracy, between two of them; inf if none has it.

    Of the accuracies that no smaller budget has reached.
    """
    best: list[Point] = []
    for point in points:
        if len(point.budgets) == 1 and (not best or point.top1 > best[-1].top1):
            best.append(point)
    return float(np.interp(top1, [p.top1 for p in best], [getattr(p, cost) for p in best], right=np.inf))


def draw(points: list[Point], images: int, path: Path) -> None:
    """Accuracy over tokens and over milliseconds an image."""
    figure = Figure(figsize=(11, 4.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    costs = ("tokens", "tokens an image, over both budgets"), ("ms", "ms an image: resizing, packing, model")
    for axes, (cost, text) in zip(panels, costs, strict=True):
        _line(axes, [p for p in points if len(p.budgets) == 1], cost, "one budget for all", MUTED, "s", (6, -11))
        for cascade, colour in zip(CASCADES, COLOURS, strict=False):
            first = next(p for p in points if p.budgets == cascade[:1])
            mine = [first, *(p for p in points if p.budgets == cascade)]
            name = f"{cascade[0]} tokens, the least confident share again with {cascade[1]}"
            _line(axes, mine, cost, name, colour, "o", (-4, 6))
        axes.set_xlabel(text, color=INK)
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=MUTED)
    panels[0].set_ylabel(f"top-1 of {images} held-out shapes", color=INK)
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panels[0].legend(loc="lower right", frameon=False, labelcolor=INK, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _line(
    axes: Axes, points: list[Point], cost: str, text: str, colour: str, marker: str, offset: tuple[int, int]
) -> None:
    style = dict(color=colour, linewidth=2, markersize=6, markeredgecolor="white", markeredgewidth=1)
    axes.plot([getattr(p, cost) for p in points], [p.top1 for p in points], f"-{marker}", label=text, **style)
    for point in points:
        name = f"{100 * point.share:.0f} %" if point.share else f"{point.budgets[0]}" if marker == "s" else ""
        align = "left" if offset[0] > 0 else "right"
        place = dict(xytext=offset, textcoords="offset points", ha=align, fontsize=8, color=colour)
        axes.annotate(name, (getattr(point, cost), point.top1), **place)


def table(points: list[Point]) -> str:
    """A line a setting; the last two columns: what single budgets cost at the same accuracy, over what it costs."""
    cells = []
    for p in points:
        saved = [single_at(points, p.top1, cost) / getattr(p, cost) for cost in ("tokens", "ms")]
        against = ["" if not p.share else "none is as good" if np.isinf(x) else f"{x:.2f}" for x in saved]
        cells.append([p.name, f"{100 * p.top1:.1f} %", f"{p.tokens:.1f}", f"{p.ms:.2f}", *against])
    header = ["budget", "top-1", "tokens an image", "ms an image"]
    return common.markdown([*header, "one budget at that top-1: tokens", "time"], cells)


def arguments() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--run", help="a run to measure; without, one is trained")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "cascade.png")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    count, repeats = (60, 1) if args.quick else (args.images, args.repeats)
    print(common.header("jax", "flax", threads=common.cores()))
    with tempfile.TemporaryDirectory() as folder:
        run = Path(args.run or f"{folder}/run")
        if not args.run:
            train(run, args.quick)
        model = navit_jax.load(str(run))
    images, labels = held_out(count)
    points = measure(model, images, labels, repeats)
    print(table(points))
    draw(points, len(images), args.out)
    last = points[len(BUDGETS) - 1]  # what a setting is compared with: the largest budget for all
    rows = [common.row(f"{p.name}, top-1", "share", p.top1, last.top1, p.top1 / max(last.top1, 1e-9)) for p in points]
    rows += [common.row(p.name, "images/s", 1e3 / p.ms, 1e3 / last.ms, last.ms / p.ms) for p in points]
    common.write_rows(args.json, rows)


if __name__ == "__main__":
    main()
