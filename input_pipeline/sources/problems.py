"""What the files of a source hold that cannot be used: counted by kind, the first few of each listed, judged once.

A million captions hold a few bad ones whatever their origin, so one is never an error; more than a share of them is.
"""

import collections
import json
from collections.abc import Iterable

import numpy as np

from input_pipeline.errors import UserError
from input_pipeline.sources.base import log

LISTED = 10  # of each kind


class Problems:
    """Bad input by kind: how often, and the first few of each, to be listed."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.first: dict[str, list[str]] = {}

    def add(self, kind: str, what: str) -> None:
        """One more of a kind; what: a name to list."""
        self.counts[kind] += 1
        first = self.first.setdefault(kind, [])
        if len(first) < LISTED:
            first.append(what)

    @classmethod
    def together(cls, parts: Iterable["Problems"]) -> "Problems":
        """Those of several parts of a source, in their order."""
        found = cls()
        for part in parts:
            found.counts.update(part.counts)
            for kind, first in part.first.items():
                found.first[kind] = [*found.first.get(kind, ()), *first][:LISTED]
        return found

    def to_json(self) -> str:
        """As text, for other processes; `from_json` reads it."""
        return json.dumps([self.counts, self.first])

    @classmethod
    def from_json(cls, text: str) -> "Problems":
        """What `to_json` wrote."""
        found = cls()
        counts, found.first = json.loads(text)
        found.counts.update(counts)
        return found

    def total(self) -> int:
        """How many there are, of all kinds."""
        return self.counts.total()

    def lines(self) -> list[str]:
        """One a kind, with the first few."""
        return [
            f"{count} {kind}: {', '.join(self.first[kind])}{', ...' if count > LISTED else ''}"
            for kind, count in self.counts.items()
        ]


def report(source: object, where: str) -> None:
    """Logs the problems of a source, and how many images have several texts; nothing for a source without them."""
    for line in source.problems.lines() if hasattr(source, "problems") else ():
        log().warning("%s: %s", where, line)
    images = np.bincount(source.image_numbers()) if hasattr(source, "image_numbers") else np.zeros(0)
    if (images > 1).any():
        several = int((images > 1).sum())
        log().warning("%s: %d of %d images have several texts, and are as many examples", where, several, len(images))


def check_share(source: object, where: str, max_share: float) -> None:
    """Raises UserError where a source's `problems` are more than this share of what it `listed`; `where` names it.

    A source without them passes.
    """
    problems = getattr(source, "problems", None)
    if problems is not None and problems.total() > max_share * source.listed:
        raise UserError(
            f"{problems.total()} of {source.listed} rows and files in {where} cannot be used, above "
            f"data.max_bad_share={max_share:g}: {'; '.join(problems.lines())}. Correct them or raise "
            "--config.data.max_bad_share."
        )
