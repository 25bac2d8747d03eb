"""Padding of packing policies on the same images, and the cost of planning.

    python -m benchmarks.packing [--images 100000] [--json FILE]

Sizes: `tests/data/sizes_100k.npz`. A: side U(64, 256), beta dropping with mean 0.36 (about 70 tokens an image). B: area
of 16 to 1024 tokens, no dropping. Peers: next-fit, which the PyTorch versions use (a full row is never looked at
again), and Grain's first-fit over 16 bins.
"""

import argparse
import json
import time

import grain
import numpy as np

from configs import base
from input_pipeline.budget import Sampler
from input_pipeline.dry_run import choose_slots, dry_run

PLANS = {"A L256": ("A", 256), "A L1024": ("A", 1024), "B L1024": ("B", 1024), "B L4096": ("B", 4096)}


def sampler(kind: str) -> Sampler:
    config = base.get_config()
    config.model.posemb_beyond = "interpolate"
    if kind == "A":
        config.drop.update(kind="beta", mean_rate=0.36)
    else:
        config.resolution.update(on="area", min_side=64, max_side=512)
    return Sampler(config, np.load("tests/data/sizes_100k.npz")["sizes"].astype(int), 16)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--json")
    args = parser.parse_args()
    rows = []
    print("| padding, % | next-fit | Grain, 16 bins | ours | ours, dropped tokens restored | us an image |")
    print("|---|---|---|---|---|---|")
    for name, (kind, length) in PLANS.items():
        draw = sampler(kind)
        keep = draw(np.arange(args.images)).keep
        slots = choose_slots(draw, min(20_000, args.images), length=length, slots=0)
        start = time.process_time()
        plain, ours = (
            1 - dry_run(draw, args.images, length=length, slots=slots, restore_dropped=r).fill for r in (False, True)
        )
        cost = (time.process_time() - start) / 2 / args.images * 1e6
        peers = next_fit(keep, length), grain_first_fit(keep, length)
        print(f"| {name} | " + " | ".join(f"{100 * x:.2f}" for x in (*peers, plain, ours)) + f" | {cost:.1f} |")
        for peer, value in zip(("next-fit", "grain"), peers, strict=True):
            ratio = value / max(plain, 1e-6)
            rows.append(dict(name=f"{peer} {name}", unit="% padding", ours=100 * plain, peer=100 * value, ratio=ratio))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
