"""The pictures of the documentation that show figures, each drawn from what a command wrote.

    python -m benchmarks.pictures [--only mask tokens speed padding] [--out docs]

mask: a packed row of the embedded photographs, and who attends to whom in it; packed here, as a run packs it. tokens:
`docs/data/accuracy_over_tokens.csv`, of the run that `docs/training.md` names. speed: `docs/data/train_step.json`, of
`python -m benchmarks.train_step --json`. padding: the policies of `benchmarks.packing`, packed here; two minutes.
(The packed rows of README are drawn by `python -m navit_jax show`.)
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator

from benchmarks import packing
from configs import navit_b16
from input_pipeline.dry_run import plan_options
from navit_jax import show
from navit_jax.row_picture import COLOURS

DATA = Path("docs/data")
INK, MUTED, GRID = "#1f2933", "#6b7785", "#e4e7eb"
OURS, OTHER, THIRD = "#2f6fde", "#b9c2cc", "#dde2e8"
TRAINED = 4, 36  # tokens of the smallest and the largest image of the run behind `tokens`


def mask(path: Path) -> None:
    """One row's tokens on both sides of the square of who sees whom."""
    config = navit_b16.get_config("photos")
    config.resolution.update(min_side=32, max_side=88)
    config.packing.update(row_length=64, look_ahead=8)  # too few waiting images to fill it
    (row,), _ = show.packed_rows(config, 1)
    ids, patch = row.segment_ids, row.tokens.shape[1]
    length, images = len(ids), len(row.pictures)
    figure = Figure(figsize=(7.2, 7.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    sees = (ids[:, None] == ids[None]) & (ids > 0)
    square = np.full((length, length, 3), 247, np.uint8)
    palette = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in COLOURS], np.uint8)
    square[sees] = palette[(np.maximum(ids, 1) - 1) % len(COLOURS)][np.nonzero(sees)[0]]
    axes.imshow(square, extent=(0, length, length, 0), interpolation="nearest")
    strip = np.pad(row.tokens[:, :-1, :-1], [(0, 0), (0, 1), (0, 1), (0, 0)], constant_values=255)
    strip[ids == 0] = 235
    across, down = strip.swapaxes(0, 1).reshape(patch, -1, 3), strip.reshape(-1, patch, 3)
    axes.imshow(across, extent=(0, length, -1.2, -3.2), aspect="auto")
    axes.imshow(down, extent=(-3.2, -1.2, length, 0), aspect="auto")
    edges = [0, *(np.flatnonzero(np.diff(ids)) + 1), length]
    for start, stop in zip(edges, edges[1:]):
        slot, middle = int(ids[start]), (start + stop) / 2
        if not slot:
            axes.text(middle, length / 2, "padding", color=MUTED, ha="center", va="center", size=11, rotation=90)
            continue
        colour = COLOURS[(slot - 1) % len(COLOURS)]
        for corner, size in (((start, -0.9), (stop - start, 0.6)), ((-0.9, start), (0.6, stop - start))):
            axes.add_patch(Rectangle(corner, *size, facecolor=colour, linewidth=0))
        text = f"image {slot}\n{stop - start} tokens" if stop - start > 7 else f"{slot}"
        axes.text(middle, middle, text, color="white", ha="center", va="center", size=10)
    filled = int((ids > 0).sum())
    axes.set_title(f"A packed row: {images} images, {filled} of {length} tokens. Coloured: attends", color=INK, size=13)
    axes.set_xlabel("token that is seen", color=INK, size=12)
    axes.set_ylabel("token that looks", color=INK, size=12)
    axes.set(xlim=(-3.4, length), ylim=(length, -3.4), xticks=range(0, length + 1, 16), yticks=range(0, length + 1, 16))
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=MUTED, labelsize=10)
    _save(figure, path)


def tokens(path: Path) -> None:
    """Accuracy at every token budget of one model, and the sizes that it was trained on."""
    with open(DATA / "accuracy_over_tokens.csv") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    x, y = np.array([row["tokens"] for row in rows]), np.array([row["top1"] for row in rows])
    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.axvspan(*TRAINED, color="#eaf1fd", zorder=0)
    axes.text(np.sqrt(np.prod(TRAINED)), 0.08, "sizes trained on", ha="center", color=OURS, fontsize=11)
    axes.plot(x, y, "-o", color=OURS, linewidth=2.2, markersize=8, markeredgecolor="white", markeredgewidth=1.5)
    for a, b in zip(x, y, strict=True):
        axes.annotate(
            f"{100 * b:.1f}", (a, b), (-7, 9), textcoords="offset points", ha="center", fontsize=11, color=INK
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks([row["budget"] for row in rows], [f"{row['budget']:.0f}" for row in rows])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens an image, at most (log scale)", color=INK, fontsize=11)
    axes.set_ylabel("top-1 accuracy, %", color=INK, fontsize=11)
    axes.set_ylim(0, 1.1)
    axes.set_yticks(np.linspace(0, 1, 6), range(0, 101, 20))
    axes.set_title(f"One small NaViT on {rows[0]['images']:.0f} held-out shapes", color=INK, fontsize=12)
    _plain(axes)
    _save(figure, path)


def speed(path: Path) -> None:
    """Images a second of a training step beside each peer's, a pair of bars a peer and length of row."""
    found = [row for row in json.loads((DATA / "train_step.json").read_text()) if row["unit"] == "images/s"]
    figure = Figure(figsize=(7.6, 0.62 * len(found) + 1), dpi=130, layout="constrained")
    axes = figure.subplots()
    y, most = np.arange(len(found)), max(max(row["ours"], row["peer"]) for row in found)
    for side, name, colour, shift in (("ours", "navit_jax", OURS, -0.19), ("peer", "the other", OTHER, 0.19)):
        bars = axes.barh(y + shift, [row[side] for row in found], 0.36, color=colour, label=name)
        axes.bar_label(bars, fmt="%.1f", color=INK, fontsize=10, padding=3)
    for place, row in zip(y, found, strict=True):
        axes.text(1.2 * most, place, f"x {row['ratio']:.2f}", va="center", color=OURS, fontsize=12, weight="bold")
    cases = [row["name"].partition(" L") for row in found]
    axes.set_yticks(y, [f"{peer}{f', rows of {length}' * bool(length)}" for peer, _, length in cases])
    axes.set_xlabel("images/s of a training step, CPU", color=INK, fontsize=11)
    axes.set(xlim=(0, 1.38 * most), ylim=(len(found) - 0.5, -1.2))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=INK, length=0)
    axes.legend(loc="upper right", ncol=2, frameon=False, fontsize=10, labelcolor=INK)
    _save(figure, path)


def padding(path: Path, images: int = 100_000) -> None:
    """Share of padding of each packing policy; on a logarithmic scale, as ours is a hundredth of the others'."""
    cases = [("A L256", "70 tokens an image,\nrows of 256"), ("A L1024", "70 tokens an image,\nrows of 1024")]
    cases += [("B L1024", "500 tokens an image,\nrows of 1024"), ("B L4096", "500 tokens an image,\nrows of 4096")]
    found = [paddings(*packing.PLANS[name], images) for name, _ in cases]
    figure = Figure(figsize=(7.8, 4.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    x = np.arange(len(cases))
    names = dict(next_fit="next-fit (PyTorch versions)", grain="Grain, first-fit in 16 bins", ours="navit_jax")
    for (key, name), colour, shift in zip(names.items(), (OTHER, THIRD, OURS), (-0.27, 0, 0.27), strict=True):
        shares = [100 * row[key] for row in found]
        bars = axes.bar(x + shift, [max(share, 0.006) for share in shares], 0.26, color=colour, label=name)
        labels = [f"{share:.2g}" if share >= 0.01 else "< 0.01" for share in shares]  # which a logarithm has no bar for
        axes.bar_label(bars, labels, color=INK, fontsize=10, padding=2)
    _bars(axes, x, [name for _, name in cases], "padding, % of all tokens (log scale)")
    axes.set_yscale("log")
    axes.set_ylim(0.005, 300)
    axes.set_yticks([0.01, 0.1, 1, 10, 100], ["0.01", "0.1", "1", "10", "100"])
    axes.minorticks_off()
    axes.legend(loc="upper center", ncol=3, frameon=False, fontsize=10, labelcolor=INK)
    _save(figure, path)


def paddings(kind: str, length: int, images: int) -> dict[str, float]:
    """Shares of padding of `benchmarks.packing`, without its timings; ours with dropped tokens restored."""
    draw = packing.sampler(kind)
    plan = plan_options(packing.config_of(kind), [draw], length, packing.ROWS)
    lengths, rows = draw(np.arange(images)).keep, list(packing.planned(draw, images, plan))
    ours = 1 - sum(row.keep.sum() for row in rows) / (len(rows) * length)
    found = dict(next_fit=packing.next_fit(lengths, length), grain=packing.grain_first_fit(lengths[:20_000], length))
    print(f"{kind} L{length}:", {name: f"{100 * share:.3f} %" for name, share in (found | dict(ours=ours)).items()})
    return found | dict(ours=ours)


def _bars(axes: Axes, x: np.ndarray, names: list[str], label: str) -> None:
    axes.set_xticks(x, names)
    axes.set_ylabel(label, color=INK, fontsize=11)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=11, length=0)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, facecolor="white")


PICTURES = dict(
    mask=(mask, "segment_mask.webp"),
    tokens=(tokens, "accuracy_over_tokens.png"),
    speed=(speed, "images_per_second.png"),
    padding=(padding, "padding.png"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=list(PICTURES))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args()
    for name in args.only:
        draw, file = PICTURES[name]
        draw(args.out / file)
        print(args.out / file)


if __name__ == "__main__":
    main()
