"""Which image goes in which row, planned on numbers before a pixel is read.

Rolling best-fit over a few open rows: an image goes to the fullest row that still holds it; when it fits nowhere the
fullest row is closed. With 16 open rows padding is 0.1 % at L = 1024 (next-fit, the usual choice, has 4.6 %) for about
1 us an image. Open rows carry over the end of an epoch. An open row is just stream positions, since everything else
is drawn again from them, so the whole state is a few KB of integers.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from input_pipeline.budget import Draws
from input_pipeline.errors import UserError

_CHUNK = 1024  # positions drawn at a time
Item = tuple[int, int, int]  # stream position, tokens kept, tokens before dropping


class RowPlan(NamedTuple):
    """One row: stream positions [k] int64 and the tokens that each image gets [k] int64."""

    positions: np.ndarray
    keep: np.ndarray


class Planner:
    """An iterator of `RowPlan`: deterministic, restartable from `snapshot()`.

    draw: positions -> `Draws`, a pure function. length: L. slots: K. open_rows: rows kept open.
    restore_dropped: give a closed row's free tokens back to images that had dropped some.
    stop: number of stream positions; None goes on for ever. Raises UserError for an image longer than a row.
    """

    def __init__(
        self,
        draw: Callable[[np.ndarray], Draws],
        *,
        length: int,
        slots: int,
        open_rows: int = 16,
        restore_dropped: bool = True,
        stop: int | None = None,
        snapshot: dict | None = None,
    ):
        self.draw, self.length, self.slots, self.open_rows = draw, length, slots, open_rows
        self.restore_dropped, self.stop = restore_dropped, stop
        self.cursor, self.row, self.slot_waste = 0, 0, 0
        self._free: list[int] = []  # free tokens of the open rows, ascending
        self._open: list[list[Item]] = []  # their images, in the same order
        self._closed: deque[list[Item]] = deque()
        self._chunk: tuple[int, list[Item]] = (-1, [])
        if snapshot:
            self._load(snapshot)

    def __iter__(self) -> "Planner":
        return self

    def __next__(self) -> RowPlan:
        while not self._closed:
            if self.stop is not None and self.cursor >= self.stop:
                if not self._open:
                    raise StopIteration
                self._close(0)
                break
            self._place(self._item(self.cursor))
            self.cursor += 1
        self.row += 1
        return self._finish(self._closed.popleft())

    def snapshot(self) -> dict:
        """The state after the last row handed out: stream positions only, a few KB, JSON-ready."""
        rows = {
            name: [[item[0] for item in row] for row in rows]
            for name, rows in (("open", self._open), ("closed", self._closed))
        }
        return dict(row=self.row, cursor=self.cursor, **rows)

    def _load(self, snapshot: dict) -> None:
        self.row, self.cursor = snapshot["row"], snapshot["cursor"]
        self._open = [self._items(np.array(p)) for p in snapshot["open"]]
        self._closed = deque(self._items(np.array(p)) for p in snapshot["closed"])
        self._free = [self.length - sum(keep for _, keep, _ in row) for row in self._open]

    def _items(self, positions: np.ndarray) -> list[Item]:
        drawn = self.draw(positions)
        return list(zip(positions.tolist(), drawn.keep.tolist(), drawn.grid.prod(axis=1).tolist(), strict=True))

    def _item(self, position: int) -> Item:
        start = position - position % _CHUNK
        if self._chunk[0] != start:
            end = start + _CHUNK if self.stop is None else min(start + _CHUNK, self.stop)
            self._chunk = (start, self._items(np.arange(start, end)))
        return self._chunk[1][position - start]

    def _place(self, item: Item) -> None:
        tokens = item[1]
        if tokens == 0:  # an unreadable image: counted when the sizes were read
            return
        if tokens > self.length:
            raise UserError(
                f"an image of {tokens} tokens does not fit in a row of {self.length}. Set "
                f"--config.packing.row_length={tokens} "
                "or more, or lower --config.resolution.max_side or the token budget."
            )
        place = bisect_left(self._free, tokens)
        if place < len(self._free):
            free, members = self._free.pop(place) - tokens, self._open.pop(place)
        else:
            if len(self._open) >= self.open_rows:
                self._close(0)
            free, members = self.length - tokens, []
        members.append(item)
        place = bisect_left(self._free, free)
        self._free.insert(place, free)
        self._open.insert(place, members)
        if free == 0 or len(members) == self.slots:
            self.slot_waste += free
            self._close(place)

    def _close(self, place: int) -> None:
        self._free.pop(place)
        self._closed.append(self._open.pop(place))

    def _finish(self, members: list[Item]) -> RowPlan:
        gap = self.length - sum(keep for _, keep, _ in members) if self.restore_dropped else 0
        plan = []
        for position, keep, tokens in members:
            more = min(gap, tokens - keep)
            gap -= more
            plan.append((position, keep + more))
        positions, keep = np.array(plan, np.int64).T
        return RowPlan(positions, keep)


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
    # Rows still open at the end are no evidence about fill: they stay open in training.
    rows = []
    while planner.cursor < images or planner._closed:
        rows.append(next(planner))
    rows = rows or [next(planner)]
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
