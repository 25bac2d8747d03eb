"""How many images of which lengths a group of rows may hold: what lets static shapes follow the images.

Attention that gathers images of similar length costs sum(n m^2) for slabs of n images of up to m tokens, where a row
of L tokens costs L^2 (35 times more at L = 4096), but n must be known when the step is compiled. So the planner keeps
each group of rows within one profile, chosen before the run. It is near the mean group, not near the worst: images that
a group has no place for wait for a later one, which smooths what a random group would hold. At L = 1024 (benchmarks.
packing) slabs have 1.42 times the tokens and 1.64 times the query-key pairs of the images, where a profile for 99 % of
random groups would have 2.3 and 3.1.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

_SLABS = 6  # at most: each is a few more products a layer; 8: 7 % fewer pairs, yet a Ti is 6 % slower, a B 3 % faster
_SPARE = 0.05  # more places than a mean group needs, beside rounding up: 0.1 costs 3 % more pairs, 0.025 more padding
_STEP = 8  # lengths are multiples of it
_MOST = 12  # of the longest images in a group


@dataclass(frozen=True)
class Capacity:
    """A promise for each group of `rows` consecutive rows (0..rows-1, rows..2 rows-1, ... of a step).

    slabs: (count, length) pairs, lengths strictly descending. The images of a group, longest first, are each at most as
    long as the place of the same number in the slabs, and there are no more images than places. Hashable, so static
    under jit once `navit_jax.sharding` has registered it.
    """

    rows: int
    slabs: tuple[tuple[int, int], ...]

    def __post_init__(self):
        lengths = [length for _, length in self.slabs]
        descending = all(a > b for a, b in zip(lengths, lengths[1:], strict=False))
        if self.rows < 1 or not self.slabs or not descending or min(min(slab) for slab in self.slabs) < 1:
            raise ValueError(f"{self}: expected 1 row or more and slabs of counts and lengths >= 1, longest first")

    @property
    def longest(self) -> int:
        """Tokens of the longest image that a group may hold."""
        return self.slabs[0][1]

    @property
    def places(self) -> int:
        """Images that a group may hold."""
        return sum(count for count, _ in self.slabs)

    @property
    def slots(self) -> int:
        """Token slots of all slabs: sum of count * length."""
        return sum(count * length for count, length in self.slabs)

    @property
    def pairs(self) -> int:
        """Query-key pairs of all slabs, what attention costs: sum of count * length^2."""
        return sum(count * length**2 for count, length in self.slabs)

    def longer(self, tokens: int) -> "Capacity":
        """The promise of the same groups where each image has so many tokens more."""
        return Capacity(self.rows, tuple((count, length + tokens) for count, length in self.slabs))

    def holds(self, lengths: Iterable[int]) -> bool:
        """Whether a group may hold images of these token counts; zeros are empty slots."""
        lengths = sorted((int(n) for n in lengths if n), reverse=True)
        places = [length for count, length in self.slabs for _ in range(count)]
        return len(lengths) <= len(places) and all(n <= m for n, m in zip(lengths, places, strict=False))


def choose(lengths: Sequence[np.ndarray], *, rows: int, row_length: int, longest: int) -> Capacity:
    """The profile of least attention for groups of `rows` full rows of images like these.

    lengths: the token counts [n] of images from each part of the stream that the profile must do for. longest: the most
    tokens of any image that may come, at most `row_length`. Each slab has room for the images of its lengths that a
    mean group holds and a twentieth more, at least for one; which lengths share a slab is chosen to keep the query-key
    pairs fewest, exactly, by dynamic programming over multiples of 8.
    """
    edges = np.unique(np.minimum(row_length, np.arange(0, longest + _STEP, _STEP)))
    longer = np.stack([_longer(x, edges) * (rows * row_length) for x in lengths])  # images of a mean group above edges
    last = len(edges) - 1
    # least[i]: fewest pairs in at most so many slabs for images above edges[i]; chosen[i]: their slabs, shortest first
    least, chosen = np.where(np.arange(last + 1) == last, 0.0, np.inf), [()] * (last + 1)
    for _ in range(_SLABS):
        before, kept = least.copy(), list(chosen)
        for i in range(last):
            counts = np.maximum(1, np.ceil((longer[:, i, None] - longer[:, i + 1 :]).max(axis=0) * (1 + _SPARE)))
            pairs = before[i + 1 :] + counts * edges[i + 1 :] ** 2.0
            best = int(np.argmin(pairs))
            if pairs[best] < least[i]:
                least[i] = pairs[best]
                chosen[i] = ((int(counts[best]), int(edges[i + 1 + best])), *kept[i + 1 + best])
    return Capacity(rows, chosen[0][::-1])


def _longer(lengths: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Images above each edge for each token of all of them; none above the last."""
    lengths = np.sort(lengths[lengths > 0])
    if not len(lengths):
        return np.zeros(len(edges))
    above = len(lengths) - np.searchsorted(lengths, edges, side="right")
    return np.where(edges < edges[-1], above, 0) / lengths.sum()


def group_rows(configured: int, rows: int, *, row_length: int, longest: int) -> int:
    """G for steps of `rows`: what the configured one has in common with them.

    0: the largest divisor of them, at most 12, that holds at most about 12 images of the `longest` tokens. A profile
    needs the room of about 8 to follow the images closely; with more nothing is gained, and a step has fewer groups to
    divide into.
    """
    if configured:
        return math.gcd(configured, rows)
    most = max(1, min(_MOST, round(_MOST * longest / row_length)))
    return max(n for n in range(1, most + 1) if rows % n == 0)
