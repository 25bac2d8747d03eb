"""How many images the same training compute buys: NaViT with resolution sampling and dropping against a fixed square.

No training: rows are planned on the committed list of image sizes, and their FLOPs follow from a formula. Counted are
the useful ones, which is what a backend that skips other images' blocks and padding pays; dense attention over the
packed row, padding included, is priced beside it. The settings are those that the paper names, none is chosen to meet
its 4.87 images a row.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from configs import base
from input_pipeline import dry_run, packing
from input_pipeline.budget import Draws, Sampler
from navit_jax import navit

SIZES = Path(__file__).parent.parent / "tests/data/sizes_100k.npz"
CLASSES = 1000
SQUARES = (256, 196)  # tokens of the fixed-square ViT: 256 and 224 pixels at patch 16
PAPER_IMAGES = 4.87  # a row of 256 tokens
SETTINGS = {  # name: fields of config.drop, on sides U(64, 256)
    "no dropping": dict(kind="none"),
    "beta, mean 0.25 of at most 0.7": dict(kind="beta", mean_rate=0.25, max_rate=0.7),
    "beta, mean 0.5 of at most 0.7": dict(kind="beta", mean_rate=0.5, max_rate=0.7),
    "beta, mean 0.5 of at most 0.9": dict(kind="beta", mean_rate=0.5, max_rate=0.9),
    "by resolution, 0.2 to 0.8": dict(kind="resolution", min_rate=0.2, max_rate=0.8),
    "schedule, 0.8 down to 0.2": dict(kind="scheduled", min_rate=0.2, end_rate=0.8),
}


class Cost(NamedTuple):
    """What planned rows cost. FLOPs are of a training step (three forward passes), for one image.

    tokens: mean an image, kept. dropped: share of all tokens. fill: share of the rows' tokens that is used.
    images: a row. flops: useful. dense_flops: with attention over whole rows and the work on padding.
    """

    name: str
    tokens: float
    dropped: float
    images: float
    fill: float
    flops: float
    dense_flops: float


def square(tokens: int, model: navit.NaViTConfig) -> Cost:
    """The fixed-square ViT: one image a row."""
    flops = 3 * navit.flops_forward(model, [tokens])
    return Cost(f"square ViT, {tokens} tokens", tokens, 0.0, 1.0, 1.0, flops, flops)


def packed(name: str, drop: dict, model: navit.NaViTConfig, sizes: np.ndarray) -> Cost:
    """NaViT on rows planned over all the images once, without those still open at the end."""
    config = _config(drop, len(sizes))
    sampler = Sampler(config, sizes, model.patch_size)
    options = dict(length=config.packing.row_length, look_ahead=config.packing.look_ahead, restore_dropped=True)
    slots = dry_run.choose_slots(sampler, min(20_000, len(sizes)), slots=0, **options)
    plans = _closed(sampler, len(sizes), slots=slots, **options)
    positions, kept = (np.concatenate(field) for field in zip(*plans, strict=True))
    rows, images, length = len(plans), len(kept), options["length"]
    tokens, dropped = kept.mean(), 1 - kept.sum() / sampler(positions).grid.prod(axis=1).sum()
    useful, dense = navit.flops_forward(model, kept), dense_flops(model, rows, length, images)
    shares = float(tokens), float(dropped), images / rows, float(kept.sum() / (rows * length))
    return Cost(name, *shares, 3 * useful / images, 3 * dense / images)


def dense_flops(model: navit.NaViTConfig, rows: int, length: int, images: int) -> float:
    """One forward pass where every token of a row, padding too, attends to all of it."""
    further = navit.flops_forward(model, [0] * (images - rows))  # pooling and head of the images but one a row
    return navit.flops_forward(model, [length] * rows) + further


def _closed(draw: Callable[[np.ndarray], Draws], images: int, **options: object) -> list[packing.RowPlan]:
    planner, rows = packing.Planner(draw, stop=None, **options), []
    while planner.cursor < images:
        rows.append(next(planner))
    return rows


def _config(drop: dict, images: int) -> ConfigDict:
    config = base.get_config()
    config.model.posemb_beyond = "interpolate"  # the list has banners
    config.drop.update(drop)
    config.drop.update(midpoint_examples=images / 2, tau_examples=-images / 10)  # a whole schedule, slowly down
    return config


def costs(variant: str = "B/16", sizes: np.ndarray | None = None) -> list[Cost]:
    """The squares and every setting, in that order."""
    model = navit.from_config({**base.model(), "variant": variant}, channels=3, num_classes=CLASSES)
    sizes = np.load(SIZES)["sizes"].astype(np.int64) if sizes is None else sizes
    return [square(n, model) for n in SQUARES] + [packed(name, drop, model, sizes) for name, drop in SETTINGS.items()]


def table(found: list[Cost]) -> tuple[list[str], list[list[str]]]:
    """Header and rows for markdown."""
    squares = found[: len(SQUARES)]
    header = ["", "tokens an image", "dropped", "images a row", "fill", "GFLOP an image", "images for 1e18 FLOP"]
    header += [f"x ViT {s.tokens:.0f}" for s in squares] + ["dense: extra", f"dense: x ViT {squares[0].tokens:.0f}"]
    rows = []
    for cost in found:
        shares = [f"{100 * cost.dropped:.1f} %", f"{cost.images:.2f}", f"{100 * cost.fill:.2f} %"]
        flops = [f"{cost.flops / 1e9:.1f}", f"{1e12 / cost.flops:.1f} M"]
        flops += [f"{square.flops / cost.flops:.2f}" for square in squares]
        dense = [f"{100 * (cost.dense_flops / cost.flops - 1):.1f} %", f"{squares[0].flops / cost.dense_flops:.2f}"]
        rows.append([cost.name, f"{cost.tokens:.1f}", *shares, *flops, *dense])
    return header, rows


def conclusion(found: list[Cost]) -> str:
    """How much must be dropped to pack as the paper does, and which of its settings comes nearest."""
    reference, undropped, dropping = found[0], found[len(SQUARES)].tokens, found[len(SQUARES) + 1 :]
    needed = 1 - reference.tokens / PAPER_IMAGES / undropped
    nearest = min(dropping, key=lambda cost: abs(cost.images - PAPER_IMAGES))
    return (
        f"The paper packs {PAPER_IMAGES} images into a row of {reference.tokens:.0f} tokens, without saying which "
        f"dropping does. From {undropped:.0f} tokens an image it takes {100 * needed:.0f} % dropped. The nearest of "
        f"the settings that it names, '{nearest.name}', packs {nearest.images:.2f}. For the same useful FLOPs it sees "
        f"{reference.flops / nearest.flops:.2f} times the images of the square of {reference.tokens:.0f} tokens, "
        f"{reference.flops / nearest.dense_flops:.2f} times where attention is dense."
    )


def json_rows(found: list[Cost]) -> list[dict]:
    """Every setting against every square."""
    squares = found[: len(SQUARES)]
    return [
        dict(name=f"images for 1e18 FLOP, NaViT-B/16, {cost.name}, against {peer.name}", unit="images")
        | dict(ours=1e18 / cost.flops, peer=1e18 / peer.flops, ratio=peer.flops / cost.flops, details=cost._asdict())
        for cost in found[len(squares) :]
        for peer in squares
    ]
