"""Images of the training-step benchmarks, sizes in patches and random pixels, and the rows that a run makes of them.

No jax: the process that drives the others has no use for it.
"""

from typing import NamedTuple

import numpy as np

from input_pipeline import capacity, dry_run, packing
from input_pipeline.budget import Draws

LABELS, PATCH = 1000, 16  # classes; pixels of a patch's side


def draw_grids(
    images: int, tokens: int, *, sides: tuple[int, int] = (4, 16), aspect: float = 1.5, first: int = 0
) -> np.ndarray:
    """[images, 2] rows and columns of patches, `tokens` in all; side of the square of equal area U(sides).

    Aspects are log-uniform up to `aspect` either way; every image has at least sides[0]^2 and at most sides[1]^2
    tokens. Seeds are tried from `first` on until the total is right, so that no size is bent to meet it.
    """
    for seed in range(first, first + 100_000):
        rng = np.random.default_rng(seed)
        side = rng.uniform(sides[0], sides[1] + 1, images)
        stretch = np.exp(rng.uniform(-0.5, 0.5, images) * np.log(aspect))
        grids = np.maximum(1, np.stack([side * stretch, side / stretch], 1)).astype(int)
        counts = grids.prod(1)
        if counts.sum() == tokens and counts.min() >= sides[0] ** 2 and counts.max() <= sides[1] ** 2:
            return grids
    raise ValueError(f"no {images} images of sides {sides} have {tokens} tokens in all")


def make_images(grids_I2: np.ndarray, patch: int) -> tuple[list[np.ndarray], np.ndarray]:
    """([h, w, 3] uint8 each, [images] labels): random pixels and classes."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h * patch, w * patch, 3), np.uint8) for h, w in grids_I2]
    return images, rng.integers(0, LABELS, len(images))


class Step(NamedTuple):
    """The rows of a step as a run has them. grids: [images, 2]. rows: numbers of the images in each row.

    capacity: what each group of rows keeps to, rows and slabs of a `Capacity`. length: tokens of a row.
    """

    grids: np.ndarray
    rows: list[list[int]]
    capacity: tuple[int, tuple[tuple[int, int], ...]]
    length: int

    def spec(self) -> dict:
        """For `worker`: grids, rows, capacity and length; all sides see the images in the same order."""
        return self._asdict() | dict(grids=self.grids.tolist())


def plan_step(grids_I2: np.ndarray, length: int, rows: int) -> Step:
    """A step of a run over these images, shuffled each epoch, by the run's own planner and its default settings.

    Of steps 8 to 16 the one whose images are nearest in number to the data's.
    """
    tokens, rng = grids_I2.prod(1), np.random.default_rng(0)
    order = np.concatenate([rng.permutation(len(tokens)) for _ in range(64)])

    def draw(at: np.ndarray) -> Draws:
        index = order[at % len(order)]
        return Draws(index, np.zeros((len(at), 4)), grids_I2[index], tokens[index])

    longest = int(tokens.max())
    group = capacity.group_rows(0, rows, row_length=length, longest=longest)
    profile = capacity.choose([tokens], rows=group, row_length=length, longest=longest)
    options = dict(length=length, capacity=profile, restore_dropped=False)
    slots = dry_run.choose_slots(draw, len(order), slots=0, **options)
    planner = packing.Planner(draw, slots=slots, **options)
    steps = [[next(planner).positions.tolist() for _ in range(rows)] for _ in range(16)][8:]
    chosen = min(steps, key=lambda plans: abs(sum(map(len, plans)) - len(tokens)))
    at = sorted(sum(chosen, []))  # in the stream's order
    return Step(
        grids_I2[order[at]], [[at.index(i) for i in row] for row in chosen], (profile.rows, profile.slabs), length
    )
