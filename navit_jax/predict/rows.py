"""Images of any sizes in a few static shapes: which lie in one row, the arrays of a step, the answers in order.

A row is as long as the largest image may be, so one image alone costs no more than itself, and mixed sizes still fill
it (4 % padding of 64-1024 tokens in rows of 1024, 2 % where all are enlarged to a budget of 256). A step has B rows of
about STEP_TOKENS tokens in all, or one, for few images and for what a full step leaves: two programs to compile. No
`Capacity` is promised: it would be another for other images, and so another program; on a CPU the tiles that long rows
then take are as fast as slabs (276 and 278 us a token; width 384, 4 layers, 4 rows of 1024, images of 64-1024 tokens).
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from input_pipeline.budget import Draws
from input_pipeline.packed import Packed
from input_pipeline.packing import Planner
from navit_jax.predict.images import Tokens, Unreadable

STEP_TOKENS = {"cpu": 4096, "": 32768}  # "": elsewhere; more is no faster on two cores
ALONE = {"cpu": 2, "": 16}  # where at most this part of a full step is left, rows run one by one
SHORTEST_ROW = 128
AHEAD = 16  # steps of images that are looked at to plan; half are then run, as the last rows are the worst filled


class Shape(NamedTuple):
    """rows: B of a full step. length: L. slots: K. alone: rows that are run one by one where no more are left."""

    rows: int
    length: int
    slots: int
    alone: int


class Place(NamedTuple):
    """Where an image lies. number: its place in the caller's order. start: its first token in the row."""

    number: int
    grid: tuple[int, int]
    row: int
    slot: int
    start: int

    @property
    def stop(self) -> int:
        """Behind its last token."""
        return self.start + self.grid[0] * self.grid[1]


class Step(NamedTuple):
    """What one call of the model takes, and which image is where."""

    images: Packed
    places: list[Place]


def cores() -> int:
    """That this process may use, 16 at most: what decodes images beside the model."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def shape(max_tokens: int, mean_tokens: float, platform: str) -> Shape:
    """The static shape for images of at most `max_tokens`, and of about `mean_tokens`, which decides K alone."""
    length = -(-max(max_tokens, SHORTEST_ROW) // 8) * 8
    rows = max(1, STEP_TOKENS.get(platform, STEP_TOKENS[""]) // length)
    slots = 2 ** math.ceil(math.log2(1.5 * length / mean_tokens))  # few values, so few programs
    return Shape(rows, length, min(max(slots, 2), length), rows // ALONE.get(platform, ALONE[""]))


def steps(
    images: Iterable[tuple[int, Tokens | Unreadable]], max_tokens: int, *, platform: str, enlarged: bool = True
) -> Iterator[Step | tuple[int, Unreadable]]:
    """Every image once, in steps of two shapes, B rows and one; what is unreadable passes at once, as it came.

    images: (number, tokens), none with more than max_tokens. At most AHEAD steps of them are held. enlarged: they have
    about max_tokens each; else the first ones tell K.
    """
    waiting, tokens = [], 0
    chosen = shape(max_tokens, max_tokens, platform) if enlarged else None
    for image in images:
        if isinstance(image[1], Unreadable):
            yield image
            continue
        waiting.append(image)
        tokens += len(image[1].values)
        if tokens < AHEAD * STEP_TOKENS.get(platform, STEP_TOKENS[""]):
            continue
        chosen = chosen or shape(max_tokens, tokens / len(waiting), platform)
        rows = plan([len(x.values) for _, x in waiting], chosen)
        ready = chosen.rows * max(1, len(rows) // chosen.rows // 2)
        yield from _build(waiting, rows[:ready], chosen)
        waiting = [waiting[i] for i in sorted(i for row in rows[ready:] for i in row)]
        tokens = sum(len(x.values) for _, x in waiting)
    if waiting:
        chosen = chosen or shape(max_tokens, tokens / len(waiting), platform)
        yield from _build(waiting, plan([len(x.values) for _, x in waiting], chosen), chosen)


def plan(lengths: list[int], shape: Shape) -> list[list[int]]:
    """Which images lie in each row, by their numbers; the best filled rows come first."""
    kept = np.asarray(lengths, np.int64)

    def draw(at: np.ndarray) -> Draws:
        return Draws(at, np.zeros((len(at), 4)), np.stack([kept[at], np.ones_like(at)], axis=1), kept[at])

    planner = Planner(draw, length=shape.length, slots=shape.slots, restore_dropped=False, stop=len(kept))
    return [row.positions.tolist() for row in planner]


def _build(images: list[tuple[int, Tokens]], rows: list[list[int]], shape: Shape) -> Iterator[Step]:
    """Full steps, the last one perhaps with empty rows; few rows one by one."""
    at = 0
    while at < len(rows):
        count = shape.rows if len(rows) - at > shape.alone else 1
        yield pack([[images[i] for i in row] for row in rows[at : at + count]], shape._replace(rows=count))
        at += count


def pack(rows: list[list[tuple[int, Tokens]]], shape: Shape) -> Step:
    """The arrays of a step; rows that are not given are padding."""
    count, length, slots, _ = shape
    first = rows[0][0][1].values
    values = np.zeros((count, length, first.shape[1]), first.dtype)
    ids, coords = np.zeros((count, length), np.int32), np.zeros((count, length, 3), np.int32)
    grids, places = np.zeros((count, slots, 3), np.int32), []
    for row, images in enumerate(rows):
        start = 0
        for slot, (number, (patches, grid)) in enumerate(images):
            place = Place(number, grid, row, slot, start)
            here = slice(start, place.stop)
            values[row, here], ids[row, here], grids[row, slot] = patches, slot + 1, (1, *grid)
            coords[row, here, 1], coords[row, here, 2] = np.divmod(np.arange(len(patches)), grid[1])
            places.append(place)
            start = place.stop
    return Step(Packed(values, ids, coords, grids), places)


def run(
    steps: Iterable[Step | tuple[int, Unreadable]],
    launch: Callable[[Packed], Sequence],
    read: Callable[[list[np.ndarray], Place], Any],
) -> Iterator[tuple[int, Any]]:
    """(number, answer) of every image. A step is launched before the one before it is read.

    launch(images): arrays of the device, which may still compute them. read(arrays, place): one image's answer.
    """
    pending: tuple[list[Place], Sequence] = ([], ())

    def answers(places: list[Place], found: Sequence) -> Iterator[tuple[int, Any]]:
        arrays = [np.asarray(x) for x in found]
        return ((place.number, read(arrays, place)) for place in places)

    for step in steps:
        if not isinstance(step, Step):
            yield step
            continue
        done, pending = pending, (step.places, launch(step.images))
        yield from answers(*done)
    yield from answers(*pending)


def in_order(answers: Iterable[tuple[int, Any]]) -> Iterator[Any]:
    """The answers 0, 1, 2, ... as soon as each and all before it are there."""
    held: dict[int, Any] = {}
    number = 0
    for found, answer in answers:
        held[found] = answer
        while number in held:
            yield held.pop(number)
            number += 1
