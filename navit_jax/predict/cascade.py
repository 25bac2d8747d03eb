"""Predictions, and the cascade: few tokens for every image, more for those that few leave in doubt.

Source: Dehghani et al. 2023 (NaViT), section 3.6 and its appendix on adaptive inference: n1 tokens for all, the least
confident by maximum probability again with n2 > n1, so that the mean cost is t1 + share * t2.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np
from scipy import special

from input_pipeline.errors import UserError
from navit_jax.predict.images import Unreadable

BLOCK = 512  # images of an iterator whose confidences are compared with each other


class Prediction(NamedTuple):
    """What a model says of one image.

    labels: the likeliest classes, the best first; probabilities: theirs. tokens: of the image, of grid (rows, columns).
    spent: tokens over all budgets that it went through.
    """

    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    tokens: int
    grid: tuple[int, int]
    spent: int


def probabilities(logits_C: np.ndarray, kind: str) -> np.ndarray:
    """[C] float64 from logits: kind is 'softmax', or 'sigmoid' where classes do not exclude each other."""
    logits_C = logits_C.astype(np.float64)
    return special.expit(logits_C) if kind == "sigmoid" else special.softmax(logits_C)


def prediction(probabilities_C: np.ndarray, names: Sequence[str], top_k: int, grid: tuple[int, int]) -> Prediction:
    """The `top_k` best of the classes, equal ones in their order."""
    best = np.argsort(-probabilities_C, kind="stable")[:top_k].tolist()
    tokens = grid[0] * grid[1]
    return Prediction(tuple(names[i] for i in best), tuple(probabilities_C[best].tolist()), tokens, grid, tokens)


@dataclass(frozen=True)
class Cascade:
    """budgets: tokens, ascending. escalate: the least confident share that goes on; confidence: or those below it."""

    budgets: tuple[int, ...]
    escalate: float | None = None
    confidence: float | None = None

    def __post_init__(self):
        if not self.budgets or any(a >= b for a, b in pairwise(self.budgets)):
            raise UserError(f"budgets are {self.budgets}; expected token budgets that ascend, such as (64, 256)")
        if len(self.budgets) > 1 and (self.escalate is None) == (self.confidence is None):
            raise UserError(
                "a cascade needs either escalate=0.3, the share of images that goes on to the next budget, or "
                f"confidence=0.9, below which they do; found escalate={self.escalate}, confidence={self.confidence}"
            )
        for name in ("escalate", "confidence"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 <= value <= 1):
                raise UserError(f"{name} is {value!r}; expected a number from 0 to 1")

    def __call__(self, images: Iterable, stages: Sequence[Callable[[Iterable], Iterator]]) -> Iterator:
        """Predictions in order. stages: of each budget, what makes them. A list is one block, an iterator many."""
        images, size = iter(images), len(images) if hasattr(images, "__len__") else BLOCK
        while block := list(islice(images, max(1, size))):
            yield from self._block(block, stages)

    def _block(self, images: list, stages: Sequence[Callable[[Iterable], Iterator]]) -> list:
        found = list(stages[0](images))
        going = [i for i, x in enumerate(found) if isinstance(x, Prediction)]
        for stage in stages[1:]:
            going = self._doubtful(going, found)
            for i, again in zip(going, stage([images[i] for i in going]), strict=True):
                if not isinstance(again, Unreadable):  # else it went away in between: the first answer stays
                    found[i] = again._replace(spent=found[i].spent + again.spent)
        return found

    def _doubtful(self, going: list[int], found: list) -> list[int]:
        """Those of the numbers that go on, ascending."""
        if self.confidence is not None:
            return [i for i in going if found[i].probabilities[0] < self.confidence]
        least = sorted(going, key=lambda i: found[i].probabilities[0])
        return sorted(least[: round(self.escalate * len(going))])
