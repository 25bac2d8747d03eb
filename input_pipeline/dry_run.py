"""What a run's planner needs to know before it starts, from planning the first images: K and the capacity profile.

Only sizes are looked at, and only the config and the data decide, so every process finds the same.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from input_pipeline import capacity
from input_pipeline.budget import Draws, Sampler
from input_pipeline.errors import UserError
from input_pipeline.packing import Planner

IMAGES = 20_000  # planned to choose K and to report fill: 0.1 s


class DryRun(NamedTuple):
    """What planning gave: closed rows, images and tokens in them, the most images in a row.

    fill, slot_waste: shares of all tokens, used and lost to the slot limit.
    """

    rows: int
    images: int
    tokens: int
    most: int
    fill: float
    slot_waste: float


def dry_run(draw: Callable[[np.ndarray], Draws], images: int, *, length: int, slots: int, **options: object) -> DryRun:
    """Plan the first `images` stream positions and report; nothing is read."""
    planner = Planner(draw, length=length, slots=slots, stop=images, **options)
    # Rows that could no longer choose are no evidence about fill: in training there are always images that wait.
    rows = []
    while planner.cursor < images:
        rows.append(next(planner))
    if 2 * sum(len(r.keep) for r in rows) < images:  # but where all the images wait, those rows are all there are
        rows += planner
    tokens = sum(int(r.keep.sum()) for r in rows)
    total = len(rows) * length
    placed = sum(len(r.keep) for r in rows)
    return DryRun(len(rows), placed, tokens, max(len(r.keep) for r in rows), tokens / total, planner.slot_waste / total)


def choose_slots(
    draw: Callable[[np.ndarray], Draws], images: int, *, length: int, slots: int, **options: object
) -> int:
    """K: the configured one, or with 0, twice the mean images a row (never more than a row was seen to hold).

    Raises UserError when a configured K wastes more than 2 % of the tokens, naming the waste and the K to use.
    """
    if slots:
        found = dry_run(draw, images, length=length, slots=slots, **options)
        if found.slot_waste <= 0.02:
            return slots
    free = dry_run(draw, images, length=length, slots=length, **options)
    best = max(1, min(free.most, int(np.ceil(2 * free.images / free.rows))))
    if slots and best > slots:
        raise UserError(
            f"packing.images_per_row={slots} closes rows early and wastes {100 * found.slot_waste:.1f} % of the tokens "
            f"(fill {100 * found.fill:.1f} % against {100 * free.fill:.1f} %). Set "
            f"--config.packing.images_per_row={best}, or 0 to choose."
        )
    return slots or best


def plan_options(config: ConfigDict, samplers: Sequence[Sampler], length: int, rows: int) -> dict:
    """Options of a `Planner` for rows of any of the samplers, all of training or all of evaluation."""
    p, train = config.packing, not samplers[0].budget
    plan = dict(length=length, look_ahead=p.look_ahead, restore_dropped=p.restore_dropped and train)
    looks = [
        (draw, IMAGES if train else min(len(sampler.indices), IMAGES))
        for sampler in samplers
        for draw in windows(config, sampler)
    ]
    kept = [draw(np.arange(images)).keep for draw, images in looks]
    longest = max(sampler.largest_kept for sampler in samplers)
    group = capacity.group_rows(p.rows_per_group, rows, row_length=length, longest=longest)
    plan["capacity"] = capacity.choose(kept, rows=group, row_length=length, longest=longest)
    slots = p.images_per_row if train else 0
    return plan | dict(slots=max(choose_slots(draw, images, slots=slots, **plan) for draw, images in looks))


def windows(config: ConfigDict, sampler: Sampler) -> list[Callable[[np.ndarray], Draws]]:
    """The draws from each place of the stream that a dry run looks at."""
    drop, starts = config.drop, [0]
    if drop.kind == "scheduled" and not sampler.budget:  # images a row change on the way: look at both ends
        starts.append(max(0, int(drop.midpoint_examples + 4 * abs(drop.tau_examples))))
    return [lambda p, s=start: sampler(p + s) for start in starts]
