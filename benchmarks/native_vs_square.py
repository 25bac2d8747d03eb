"""Does native resolution pay? The same small model at the same compute, and images for the same compute.

    python -m benchmarks.native_vs_square [--seconds 120] [--json FILE] [--out docs/native_vs_square]

First, three models train on `shapes`, whose class is an aspect that a square resize removes: NaViT on native and on
squashed images, and the fixed-square ViT, which is the same code with one image a row. Compute is fixed before anything
trains: the steps that native NaViT makes in `--seconds`, and for the others as many as cost the same useful training
FLOPs, so seconds may differ. Each has its own best learning rate; `--lr` tries another. Second, without training, how
many images a B/16 sees for the same compute (`benchmarks/images_for_compute.py`).
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks import common, images_for_compute, native_figure
from configs import base
from input_pipeline import packing, stream
from input_pipeline.errors import UserError
from input_pipeline.sources.shapes import ASPECTS
from navit_jax import losses, navit, optim, sharding, train_step
from navit_jax.evaluators import classification, outputs

NATIVE, SQUASHED, SQUARE = "NaViT, native", "NaViT, squashed", "ViT, fixed square"
# The best of 1e-4, 2e-4, 3e-4 and 1e-3 for each at a quarter of the compute; at 1e-3 none learns there.
LEARNING_RATES = {NATIVE: 3e-4, SQUASHED: 2e-4, SQUARE: 2e-4}
SIDE, TOKENS = 80, 25  # of the largest image
POINTS, SUBSET = 10, 500  # evaluations on the way and the images of each


class Result(NamedTuple):
    """One trained model. curve: (training FLOPs, top-1 on the subset); top1: on all held-out images.

    seconds: of training, without compilation and evaluation.
    """

    name: str
    lr: float
    steps: int
    images: int
    tokens: int
    flops: float
    seconds: float
    top1: float
    curve: list[tuple[float, float]]


def recipe(name: str) -> ConfigDict:
    """What the three share, and what makes each."""
    c = base.get_config()
    c.data.source = "shapes"
    c.model.update(variant="Ti/16", width=128, depth=4, heads=4, mlp_dim=512)
    c.resolution.update(min_side=48, max_side=SIDE)  # 9 to 25 tokens
    c.packing.update(row_length=64, rows_per_step=8)
    c.optim.update(lr=LEARNING_RATES[name], schedule="constant", b2=0.95)
    c.loss.kind = "softmax"
    c.drop.kind = "none"
    c.data.squash = name != NATIVE
    if name == SQUARE:  # one image a row, and as many tokens a step
        c.resolution.min_side = SIDE
        c.packing.update(row_length=TOKENS, rows_per_step=8 * 64 // TOKENS, images_per_row=1)
    return c


def build(config: ConfigDict) -> SimpleNamespace:
    """Rows, model and evaluation; nothing is trained yet."""
    train, held_out = stream.open_images(config, "train"), stream.open_images(config, "eval")
    mesh = sharding.make_mesh(config.packing.rows_per_step)
    model = navit.from_config(config.model, channels=config.data.channels, num_classes=train.classes)
    graph, shapes = navit.abstract(model)
    subset = np.arange(SUBSET) * len(held_out.sizes) // SUBSET
    loaders = stream.eval_loaders(config, [(held_out, TOKENS, subset), (held_out, TOKENS, None)])
    put = outputs.putter(mesh, stream.eval_rows(config))
    forward = train_step.make_forward(graph, mesh)

    def accuracy(params: dict, loader: object) -> float:
        return classification.run(forward, params, loader, put, num_classes=train.classes)["top1"]

    rows, names = stream.train_stream(config, train), ("subset", "whole")
    found = dict(config=config, rows=rows, mesh=mesh, model=model, graph=graph, shapes=shapes, accuracy=accuracy)
    return SimpleNamespace(**found, **dict(zip(names, loaders, strict=True)))


def planned_flops(run: SimpleNamespace) -> Iterator[float]:
    """Useful training FLOPs of each step, without end, from planning its rows."""
    planner = packing.Planner(run.rows.sampler, **run.rows.plan)
    while True:
        kept = np.concatenate([next(planner).keep for _ in range(run.rows.rows)])
        yield 3 * navit.flops_forward(run.model, kept)


def steps_within(run: SimpleNamespace, budget: float) -> int:
    """The number of steps whose FLOPs come nearest to the budget."""
    spent = 0.0
    for steps, flops in enumerate(planned_flops(run)):
        if spent + flops / 2 > budget:
            return max(1, steps)
        spent += flops


def optimizer(run: SimpleNamespace, steps: int, lr: float) -> object:
    """AdamW at a constant rate, with a warm-up of 5 % and a cool-down of 40 % of the steps."""
    run.config.optim.update(lr=lr, warmup_steps=steps // 20, cooldown_steps=2 * steps // 5)
    return optim.make_optimizer(run.config.optim, run.shapes, steps)[0]


def dispatch(run: SimpleNamespace, steps: int, lr: float) -> Iterator[tuple[dict, np.ndarray]]:
    """(state, tokens of each image) behind each step, which may still be running; first once behind compilation."""
    config, count = run.config, run.config.packing.rows_per_step
    tx = optimizer(run, steps, lr)
    state = train_step.init_state(navit.init_params(run.model, config.seed), tx, False)
    state = jax.device_put(state, sharding.replicated(run.mesh))
    step = train_step.make_train_step(run.graph, tx, losses.make_loss(config.loss), run.mesh, seed=config.seed)
    compiled = None
    for batch, _ in run.rows.loader(steps):
        rows = sharding.put(run.mesh, batch, count)
        if compiled is None:
            compiled = step.lower(state, rows).compile()
            yield state, np.zeros(0, int)
        state, _ = compiled(state, rows)
        slots_K = np.arange(1, batch.index.shape[1] + 1)
        lengths_BK = (batch.images.segment_ids[:, None, :] == slots_K[:, None]).sum(-1)
        yield state, lengths_BK[lengths_BK > 0]


def pace(run: SimpleNamespace, seconds: float, skip: int = 20, steps: int = 60) -> int:
    """How many steps of training take `seconds`, from a few that are thrown away."""
    for done, (state, _) in enumerate(dispatch(run, steps, 0.0)):
        if done in (skip, steps):
            jax.block_until_ready(state)
            start, end = (time.perf_counter(), 0.0) if done == skip else (start, time.perf_counter())
    return max(POINTS, round(seconds * (steps - skip) / (end - start)))


def train(name: str, run: SimpleNamespace, steps: int, lr: float) -> Result:
    """Train from scratch, evaluating on the way, and at the end on all held-out images."""
    due = {round(steps * (i + 1) / POINTS) for i in range(POINTS)}
    images = tokens = 0
    flops, seconds, curve, start = 0.0, 0.0, [], 0.0
    for done, (state, lengths) in enumerate(dispatch(run, steps, lr)):
        start = start or time.perf_counter()
        images, tokens = images + len(lengths), tokens + int(lengths.sum())
        flops += 3 * navit.flops_forward(run.model, lengths)
        if done in due:
            jax.block_until_ready(state)
            seconds += time.perf_counter() - start
            curve.append((flops, run.accuracy(state["params"], run.subset)))
            say(f"{name}: step {done} of {steps}, {seconds:.0f} s, top-1 {100 * curve[-1][1]:.1f} %")
            start = time.perf_counter()
    top1 = run.accuracy(state["params"], run.whole)
    return Result(name, lr, steps, images, tokens, flops, seconds, top1, curve)


def compare(seconds: float, steps: int = 0, lr: float = 0.0) -> list[Result]:
    """The three models at equal compute. steps: of native NaViT, instead of seconds. lr: of all three, if not 0."""
    results, budget = [], 0.0
    for name, own in LEARNING_RATES.items():
        run = build(recipe(name))
        if name == NATIVE:
            count = steps or pace(run, seconds)
            budget = sum(flops for _, flops in zip(range(count), planned_flops(run), strict=False))
        else:
            count = steps_within(run, budget)
        results.append(train(name, run, count, lr or own))
    return results


def ceiling(spread: float = 0.8) -> float:
    """The best top-1 on squashed images, for uniform classes and image aspects exp(U(-spread, spread)).

    A squashed shape shows log(its aspect / the image's), which for a class is uniform over 2 * spread around the
    class's own. The best guess is right for the length that the classes cover together, over all their lengths.
    """
    centres = np.log(sorted(ASPECTS.values()))
    covered = 2 * spread + np.minimum(np.diff(centres), 2 * spread).sum()
    return float(covered / (2 * spread * len(centres)))


def table(results: Sequence[Result]) -> str:
    """The three models in markdown."""
    header = ["on `shapes`", "top-1", "images seen", "tokens an image", "training TFLOP", "seconds", "steps", "rate"]
    rows = [
        [
            *(f"**{r.name}**" if r.name == NATIVE else r.name, f"{100 * r.top1:.1f} %", f"{r.images:,}"),
            *(f"{r.tokens / r.images:.1f}", f"{r.flops / 1e12:.2f}", f"{r.seconds:.0f}", r.steps, f"{r.lr:g}"),
        ]
        for r in results
    ]
    return common.markdown(header, rows)


def report(results: Sequence[Result], costs: Sequence[images_for_compute.Cost], command: str, picture: str) -> str:
    """The page: both tables, what they mean, and how to make them again."""
    where = f"{common.machine()}; {common.versions('jax', 'flax')}"
    return f"""# Does native resolution pay?

Made by `{command}` on {where}.

## The same model at the same compute

{table(results)}

![Native and squashed images, and accuracy over training compute]({picture})

Six classes: ellipse or rectangle, round, wide or tall, on images of any aspect from 0.45 to 2.2. Squashed to a square no
model can be right more often than {100 * ceiling():.1f} % of the time, since the image's own aspect is gone.
All three are a ViT of width 128 and depth 4 at patch 16, trained with AdamW at a constant rate with a cool-down of 40 %,
about 512 tokens a step: NaViT on 9 to 25 tokens an image in rows of 64, the fixed square on one image of {TOKENS} a row.
Equal compute is equal useful training FLOPs, fixed before training. Top-1 is on all 2000 held-out images at no more than
{TOKENS} tokens each; the curve is on {SUBSET} of them, and falls short of its end while the rate is high. One seed.

## Images for the same compute

B/16, sides U(64, 256), rows of 256 tokens, planned on the {100_000:,} sizes of `tests/data/sizes_100k.npz`; dropped tokens
are restored where a row has room.

{common.markdown(*images_for_compute.table(costs))}

FLOPs are of training, three times a forward pass, useful ones only: real tokens, attention within each image. The last
two columns add what dense attention over whole rows and padding cost. {images_for_compute.conclusion(costs)}
"""


def json_rows(results: Sequence[Result], costs: Sequence[images_for_compute.Cost]) -> list[dict]:
    """Ours against each peer, with everything measured beside it."""
    ours, *peers = results
    rows = [
        dict(name=f"top-1 on shapes at equal compute, against {peer.name}", unit="%", ours=100 * ours.top1)
        | dict(peer=100 * peer.top1, ratio=ours.top1 / peer.top1, details=[ours._asdict(), peer._asdict()])
        for peer in peers
    ]
    squares = costs[: len(images_for_compute.SQUARES)]
    for cost in costs[len(squares) :]:
        for square in squares:
            name = f"images for 1e18 FLOP, NaViT-B/16 ({cost.name}) against {square.name}"
            ours, peer = 1e18 / cost.flops, 1e18 / square.flops
            rows.append(dict(name=name, unit="images", ours=ours, peer=peer, ratio=ours / peer, details=cost._asdict()))
    return rows


def pictures(budget: int = TOKENS) -> list[tuple[str, list[np.ndarray]]]:
    """The same six images as NaViT and as the square see them."""
    lines = []
    for caption, name in (("native", NATIVE), ("squashed", SQUASHED)):
        config = recipe(name)
        images = stream.open_images(config, "eval")
        lines.append((caption, native_figure.shown(config, images, native_figure.alike(images), budget)))
    return lines


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="training time of native NaViT, sets the compute")
    parser.add_argument("--steps", type=int, default=0, help="steps of native NaViT instead: the same run anywhere")
    parser.add_argument("--lr", type=float, default=0.0, help="one learning rate for all three")
    parser.add_argument("--json", type=Path, help="where to write the rows as JSON")
    parser.add_argument("--out", type=Path, default=Path("docs/native_vs_square"), help="of the .md and .png")
    args = parser.parse_args(argv)
    try:
        results = compare(args.seconds, args.steps, args.lr)
    except UserError as error:
        sys.exit(f"error: {error}")
    costs = images_for_compute.costs()
    given = sys.argv[1:] if argv is None else argv
    image = args.out.with_suffix(".png")
    text = report(results, costs, " ".join(["python -m benchmarks.native_vs_square", *given]), image.name)
    native_figure.draw(results, pictures(), stream.patch_size(recipe(NATIVE)), ceiling(), image)
    args.out.with_suffix(".md").write_text(text)
    if args.json:
        args.json.write_text(json.dumps(json_rows(results, costs), indent=1))
    print(text)


if __name__ == "__main__":
    main()
