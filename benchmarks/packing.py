"""Padding of packing policies on the same images, what the capacity profile costs, and the cost of planning.

    python -m benchmarks.packing [--json FILE] [--quick]

Sizes: `tests/data/sizes_100k.npz`. A: side U(64, 256), beta dropping with mean 0.36 (about 70 tokens an image). B: area
of 16 to 1024 tokens, no dropping (about 500 tokens). Ours keeps groups of rows within a capacity profile, without and
with restored tokens. Peers, which keep to none: next-fit, which the PyTorch versions use (a full row is never looked at
again), and Grain's first-fit over 16 bins, of 20,000 images as it takes its time. Slots and pairs: tokens and query-key
pairs of the profile's slabs against those of the images; dense: the pairs of whole rows. Planning includes the draws.
"""

import time
from collections.abc import Iterator

import grain
import numpy as np
from ml_collections import ConfigDict

from benchmarks import common
from configs import base
from input_pipeline.budget import Sampler
from input_pipeline.dry_run import plan_options
from input_pipeline.packing import Planner, RowPlan

PLANS = {"A L256": ("A", 256), "A L1024": ("A", 1024), "B L1024": ("B", 1024), "B L4096": ("B", 4096)}
ROWS, GOAL = 64, 3.0  # rows of a step; cpu-seconds to plan an epoch of ImageNet in
EPOCH = 1_281_167
HEADER = ("padding, %", "next-fit", "Grain, 16 bins", "ours", "ours, restored")
HEADER += ("slots", "pairs", "dense", "us an image", "1.28 M, cpu-s")


def config_of(kind: str) -> ConfigDict:
    """A config of the sampling `kind`, A or B."""
    config = base.get_config()
    config.model.posemb_beyond = "interpolate"
    if kind == "A":
        config.drop.update(kind="beta", mean_rate=0.36)
    else:
        config.drop.kind = "none"
        config.resolution.update(on="area", min_side=64, max_side=512)
    return config


def sampler(kind: str) -> Sampler:
    """Draws of that sampling for the images of the committed list."""
    return Sampler(config_of(kind), np.load("tests/data/sizes_100k.npz")["sizes"].astype(int), 16)


def next_fit(lengths: np.ndarray, row: int) -> float:
    """Share of padding when an image that does not fit closes the row."""
    rows, used = 1, 0
    for n in lengths.tolist():
        if used + n > row:
            rows, used = rows + 1, 0
        used += n
    return 1 - lengths.sum() / (rows * row)


def grain_first_fit(lengths: np.ndarray, row: int) -> float:
    """Share of padding of `grain.experimental.FirstFitPackIterDataset` with 16 bins, without its last, open rows."""
    source = grain.MapDataset.source(lengths.tolist()).map(lambda n: {"x": np.ones(n, np.int8)}).to_iter_dataset()
    packed = grain.experimental.FirstFitPackIterDataset(source, length_struct={"x": row}, num_packing_bins=16)
    fills = [int((item["x"] > 0).sum()) for item in packed]
    return 1 - float(np.mean(fills[: -32 or None])) / row


def planned(draw: Sampler, images: int, plan: dict) -> Iterator[RowPlan]:
    """Rows until `images` were drawn; in training there are always images that wait."""
    planner = Planner(draw, **plan)
    while planner.cursor < images:
        yield next(planner)


def seconds(draw: Sampler, images: int, plan: dict) -> float:
    """Cpu-seconds an image to plan those rows; none is kept, as in training."""
    start = time.process_time()
    for _ in planned(draw, images, plan):
        pass
    return (time.process_time() - start) / images


def measure(kind: str, length: int, images: int) -> dict:
    """Paddings (shares), overheads, and cpu-seconds an image; raises AssertionError for a group beyond its profile."""
    draw, config = sampler(kind), config_of(kind)
    plan = plan_options(config, [draw], length, ROWS)
    spent = float(np.median([seconds(draw, images, plan) for _ in range(7)]))  # first: rows that are kept slow it down
    profile, lengths = plan["capacity"], draw(np.arange(images)).keep
    plain, rows = (list(planned(draw, images, plan | dict(restore_dropped=r))) for r in (False, True))
    groups = [rows[i : i + profile.rows] for i in range(0, len(rows) - profile.rows + 1, profile.rows)]
    assert all(profile.holds(n for row in group for n in row.keep) for group in groups)
    own = sum(float((row.keep.astype(float) ** 2).sum()) for group in groups for row in group)
    return dict(
        next_fit=next_fit(lengths, length),
        grain=grain_first_fit(lengths[:20_000], length),
        plain=1 - sum(row.keep.sum() for row in plain) / (len(plain) * length),
        restored=1 - sum(row.keep.sum() for row in rows) / (len(rows) * length),
        slots=profile.slots / (profile.rows * length),
        pairs=profile.pairs * len(groups) / own,
        dense=length**2 * profile.rows * len(groups) / own,
        seconds=spent,
    )


def main() -> None:
    args = common.parser(__doc__).parse_args()
    print(common.header("numpy", "grain", threads=1))
    table, rows = [], []
    for name, (kind, length) in PLANS.items():
        found = measure(kind, length, 5_000 if args.quick else 100_000)
        ours, epoch = found["restored"], found["seconds"] * EPOCH
        shares = (f"{100 * found[key]:.3f}" for key in ("next_fit", "grain", "plain", "restored"))
        factors = (f"{found[key]:.2f}" for key in ("slots", "pairs", "dense"))
        table.append([name, *shares, *factors, f"{1e6 * found['seconds']:.2f}", f"{epoch:.2f}"])
        for peer in ("next_fit", "grain"):
            paddings = 100 * ours, 100 * found[peer]
            rows.append(common.row(f"{peer} {name}", "% padding", *paddings, found[peer] / max(ours, 1e-5)))
        rows.append(common.row(f"goal {name}", "cpu-s for 1.28 M", epoch, GOAL, GOAL / epoch))
        dense = found["pairs"], found["dense"]
        rows.append(common.row(f"dense {name}", "pairs a useful pair", *dense, found["dense"] / found["pairs"]))
    print(common.markdown(HEADER, table))
    common.write_rows(args.json, rows)


if __name__ == "__main__":
    main()
