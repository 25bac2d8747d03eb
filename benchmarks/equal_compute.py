"""Trains the three models of `benchmarks.native_vs_square` on `shapes` at equal compute.

Compute is useful training FLOPs: real tokens, attention within each image. It is fixed before anything trains, by
planning rows dry, so that every model knows its number of steps and ends with its learning rate cooled down; models cut
off at a common budget would be judged in the middle of a schedule.
"""

import functools
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from configs import base
from input_pipeline import packing, stream
from input_pipeline.sources.shapes import ASPECTS
from navit_jax import losses, navit, objectives, optim, sharding, start, train_step
from navit_jax.evaluators import classification

NATIVE, SQUASHED, SQUARE = "NaViT, native", "NaViT, squashed", "ViT, fixed square"
# Each the best of 2e-4, 3e-4 and 1e-3 (the squares of 1e-4 too) at a quarter of the compute; 1e-3 fails for all.
LEARNING_RATES = {NATIVE: 3e-4, SQUASHED: 2e-4, SQUARE: 2e-4}
SIDE, TOKENS = 80, 25  # of the largest image
POINTS, SUBSET = 10, 500  # evaluations on the way and the images of each


class Result(NamedTuple):
    """One trained model.

    curve: (training FLOPs, top-1 on the subset). top1: on all held-out images. images, tokens, flops: trained on.
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
    c.data.update(source="shapes", squash=name != NATIVE)
    c.model.update(variant="Ti/16", width=128, depth=4, heads=4, mlp_dim=512)
    c.resolution.update(min_side=48, max_side=SIDE)  # 9 to 25 tokens
    c.drop.kind = "none"  # each patch of so few is needed
    c.packing.update(row_length=64, rows_per_step=8)
    c.optim.update(lr=LEARNING_RATES[name], schedule="constant", b2=0.95)
    c.loss.kind = "softmax"
    if name == SQUARE:  # one image a row, and as many tokens a step
        c.resolution.min_side = SIDE
        c.packing.update(row_length=TOKENS, rows_per_step=8 * 64 // TOKENS, images_per_row=1)
    return c


def build(config: ConfigDict) -> SimpleNamespace:
    """Rows, model and evaluation; nothing is trained yet."""
    train, held_out = stream.open_images(config, "train"), stream.open_images(config, "eval")
    mesh = sharding.make_mesh()
    sharding.check_rows(mesh, config.packing.rows_per_step)
    model = navit.from_config(config.model, channels=config.data.channels, num_classes=train.classes)
    graph, shapes = navit.abstract(model)
    subset = np.arange(SUBSET) * len(held_out.sizes) // SUBSET
    some, every = stream.eval_loaders(config, [(held_out, TOKENS, subset), (held_out, TOKENS, None)])
    put = functools.partial(sharding.put, mesh, count=stream.eval_rows(config))
    places = jax.tree.map(lambda _: sharding.replicated(mesh), shapes)
    forward = train_step.make_forward(objectives.make(config, train.classes).forward, mesh, places)

    def accuracy(params: dict, loader: object) -> float:
        return classification.run(forward, params, loader, put, num_classes=train.classes)["top1"]

    rows, parts = stream.train_stream(config, train), dict(graph=graph, shapes=shapes, accuracy=accuracy)
    return SimpleNamespace(config=config, rows=rows, mesh=mesh, model=model, some=some, every=every, **parts)


def planned_flops(run: SimpleNamespace) -> Iterator[float]:
    """Useful training FLOPs of each step, without end, from planning its rows."""
    planner = packing.Planner(run.rows.sampler, **run.rows.plan)
    while True:
        kept = np.concatenate([next(planner).keep for _ in range(run.rows.rows)])
        yield 3 * navit.flops_forward(run.model, kept)


def steps_within(run: SimpleNamespace, budget: float) -> int:
    """The number of steps, at least one, whose FLOPs come nearest to the budget."""
    spent = 0.0
    for steps, flops in enumerate(planned_flops(run)):
        if spent + flops / 2 > budget:
            return max(1, steps)
        spent += flops


def optimizer(run: SimpleNamespace, steps: int, lr: float) -> optax.GradientTransformation:
    """AdamW at a constant rate, with a warm-up of 5 % and a cool-down of 40 % of the steps."""
    run.config.optim.update(lr=lr, warmup_steps=steps // 20, cooldown_steps=2 * steps // 5)
    return optim.make_optimizer(run.config.optim, run.shapes, steps)[0]


def training(run: SimpleNamespace, steps: int, lr: float) -> Iterator[tuple[dict, np.ndarray]]:
    """(state, tokens of each image) behind compilation and behind each step, which may still be running."""
    config, count, compiled = run.config, run.config.packing.rows_per_step, None
    tx = optimizer(run, steps, lr)
    places = jax.tree.map(lambda leaf: leaf.sharding, start.shapes(run.shapes, tx, False, run.mesh))
    state = train_step.new_state(functools.partial(navit.init_params, run.model, config.seed), tx, False, places)
    gradient = objectives.supervised_gradient(run.graph, losses.make_loss(config.loss))
    host = sharding.put_host(run.mesh, [0.0])
    step = train_step.make_train_step(gradient, tx, run.mesh, places, seed=config.seed)
    for batch, _ in run.rows.loader(steps):
        rows = sharding.put(run.mesh, batch, count)
        if compiled is None:
            compiled = step.lower(state, rows, host).compile()
            yield state, np.zeros(0, int)
        state, _ = compiled(state, rows, host)
        slots_K = np.arange(1, batch.index.shape[1] + 1)
        lengths_BK = (batch.images.segment_ids[:, None, :] == slots_K[:, None]).sum(-1)
        yield state, lengths_BK[lengths_BK > 0]


def pace(run: SimpleNamespace, seconds: float, skip: int = 20, steps: int = 60) -> int:
    """How many steps of training take `seconds`, from a few that are thrown away."""
    times = []
    for done, (state, _) in enumerate(training(run, steps, 0.0)):
        if done in (skip, steps):
            jax.block_until_ready(state)
            times.append(time.perf_counter())
    return max(POINTS, round(seconds * (steps - skip) / (times[1] - times[0])))


def train(name: str, run: SimpleNamespace, steps: int, lr: float) -> Result:
    """Train from scratch, evaluating on the way, and at the end on all held-out images."""
    due = {-(-steps * (i + 1) // POINTS) for i in range(POINTS)}
    images, tokens, flops, seconds, curve, start = 0, 0, 0.0, 0.0, [], 0.0
    for done, (state, lengths) in enumerate(training(run, steps, lr)):
        start = start or time.perf_counter()
        images, tokens = images + len(lengths), tokens + int(lengths.sum())
        flops += 3 * navit.flops_forward(run.model, lengths)
        if done in due:
            jax.block_until_ready(state)
            seconds += time.perf_counter() - start
            curve.append((flops, run.accuracy(state["params"], run.some)))
            text = f"{name}: step {done} of {steps}, {seconds:.0f} s, top-1 {100 * curve[-1][1]:.1f} %"
            print(text, file=sys.stderr, flush=True)
            start = time.perf_counter()
    top1 = run.accuracy(state["params"], run.every)
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

    A squashed shape shows log(its aspect / the image's), which for each class is uniform over a length of 2 * spread
    around the class's own. The best guess is right for all that the classes cover together, out of all their lengths.
    """
    centres = np.log(sorted(ASPECTS.values()))
    covered = 2 * spread + np.minimum(np.diff(centres), 2 * spread).sum()
    return float(covered / (2 * spread * len(centres)))
