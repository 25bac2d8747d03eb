"""How many images of which lengths a group of rows may hold: what lets static shapes follow the images.

Attention that gathers images of similar length costs sum(n m^2) for slabs of n images of up to m tokens, where a row of
L tokens costs L^2 (35x more at L = 4096), but n must be known when the step is compiled. So the planner keeps each group
of rows within one profile, made before the run.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Capacity:
    """A promise for each group of `rows` consecutive rows (0..rows-1, rows..2 rows-1, ... of a step).

    slabs: (count, length) pairs, lengths strictly descending. The images of a group, longest first, are each at most as
    long as the place of the same number in the slabs, and there are no more images than places. Hashable, so static
    under jit once `navit_jax.attention` has registered it; free of numpy and jax.
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

    def holds(self, lengths: Iterable[int]) -> bool:
        """Whether a group may hold images of these token counts; zeros are empty slots."""
        lengths = sorted((int(n) for n in lengths if n), reverse=True)
        places = [length for count, length in self.slabs for _ in range(count)]
        return len(lengths) <= len(places) and all(n <= m for n, m in zip(lengths, places, strict=False))
