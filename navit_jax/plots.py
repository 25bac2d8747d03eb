"""Pictures of numbers. Figures are made without pyplot, so nothing global changes and no window system is asked for."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

INK, MUTED, LINE = "#1f2933", "#7b8794", "#2f6fde"
SHADES = (LINE, "#7ba4ea", "#b5cdf4")  # of what is more and more lenient
SCORES = {"top1": "top-1 accuracy", "map": "mean average precision"}


def accuracy_over_tokens(rows: Sequence[dict], score: str, path: Path, title: str) -> None:
    """One point a token budget. rows: of accuracy_over_tokens.csv, with `budget`, `tokens` and the score, a share."""
    rows = sorted(rows, key=lambda row: row["tokens"])
    x, y = np.array([row["tokens"] for row in rows]), np.array([row[score] for row in rows])
    figure = Figure(figsize=(6.4, 4.2), dpi=160, layout="constrained")
    axes = figure.subplots()
    _line(axes, x, y, LINE)
    for row, a, b in zip(rows, x, y, strict=True):
        axes.annotate(
            f"{100 * b:.1f} %\n≤ {row['budget']} tokens",
            (a, b),
            xytext=(5, -6),  # the curve rises, so the room is below it
            textcoords="offset points",
            va="top",
            fontsize=8,
            color=INK,
        )
    _style(axes, x)
    axes.set_ylabel(SCORES[score], color=INK)
    images = rows[0].get("images")
    axes.set_title(f"{title}{f' · {images:,} images' if images else ''}", color=INK, fontsize=11)
    axes.margins(x=0.16, y=0.25)
    low, high = axes.get_ylim()
    axes.set_ylim(max(0.0, low), min(1.0 + 0.03 * (1 - low), high))
    figure.savefig(path)


def retrieval_over_tokens(rows: Sequence[dict], at: Sequence[int], path: Path) -> None:
    """Recall at each of `at`, texts of an image beside images of a text; one point a token budget.

    rows: of retrieval.csv, with `tokens`, `images`, `texts` and shares `i2t_r1`, ..., `t2i_r1`, ...
    """
    rows = sorted(rows, key=lambda row: row["tokens"])
    x = np.array([row["tokens"] for row in rows])
    figure = Figure(figsize=(8.6, 4.2), dpi=160, layout="constrained")
    for axes, side, title in zip(
        figure.subplots(1, 2, sharey=True), ("i2t", "t2i"), ("texts of an image", "images of a text"), strict=True
    ):
        room = 0.0
        for k, colour in zip(at, SHADES, strict=True):
            y = np.array([row[f"{side}_r{k}"] for row in rows])
            _line(axes, x, y, colour)
            room = max(room, y[-1])  # above the label before: recall grows with k
            axes.annotate(
                f"R@{k}  {100 * y[-1]:.1f} %",
                (x[-1], room),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=INK,
            )
            room += 0.05
        _style(axes, x)
        axes.set_title(title, color=INK, fontsize=10)
        axes.margins(x=0.3)
        axes.set_ylim(0, 1.12)
    figure.axes[0].set_ylabel("recall", color=INK)
    counts = f"{rows[0]['images']:,} images, {rows[0]['texts']:,} different texts"
    figure.suptitle(f"Retrieval, every token budget · {counts}", color=INK, fontsize=11)
    figure.savefig(path)


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str) -> None:
    axes.plot(x, y, "-o", color=colour, linewidth=2, markersize=7, markeredgecolor="white", markeredgewidth=1.5)


def _style(axes: Axes, x: np.ndarray) -> None:
    """Tokens an image in doublings, shares as per cent, and no more ink than needed."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(x)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:.3g}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("mean tokens an image (log scale)", color=INK)
    axes.grid(axis="y", color="#e4e7eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=MUTED)
