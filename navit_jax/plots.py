"""Pictures of numbers. Figures are made without pyplot, so nothing global changes and no window system is asked for."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

INK, MUTED, LINE = "#1f2933", "#7b8794", "#2f6fde"
SCORES = {"top1": "top-1 accuracy", "map": "mean average precision"}


def accuracy_over_tokens(rows: Sequence[dict], score: str, path: Path) -> None:
    """One point a token budget. rows: of accuracy_over_tokens.csv, with `budget`, `tokens` and the score, a share."""
    rows = sorted(rows, key=lambda row: row["tokens"])
    x, y = np.array([row["tokens"] for row in rows]), np.array([row[score] for row in rows])
    figure = Figure(figsize=(6.4, 4.2), dpi=160, layout="constrained")
    axes = figure.subplots()
    axes.plot(x, y, "-o", color=LINE, linewidth=2, markersize=7, markeredgecolor="white", markeredgewidth=1.5)
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
    axes.set_xscale("log", base=2)
    axes.set_xticks(x)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:.3g}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("mean tokens an image (log scale)", color=INK)
    axes.set_ylabel(SCORES[score], color=INK)
    images = rows[0].get("images")
    axes.set_title(f"One model, every token budget{f' · {images:,} images' if images else ''}", color=INK, fontsize=11)
    axes.margins(x=0.16, y=0.25)
    low, high = axes.get_ylim()
    axes.set_ylim(max(0.0, low), min(1.0 + 0.03 * (1 - low), high))
    axes.grid(axis="y", color="#e4e7eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=MUTED)
    figure.savefig(path)
