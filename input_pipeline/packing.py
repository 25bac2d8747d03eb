"""Which image goes in which row, planned on numbers before a pixel is read.

Up to 512 images wait. A row takes the oldest of them while they fit, and is finished by one that fills it to the last
token, or by the longest that fit. Padding, before dropped tokens fill it, is 0.04 % at L = 1024 and 0.12 % at L = 256
(next-fit, the usual choice, has 4.6 % and 19 %) for about 2 us an image, and no image waits longer than some hundred
others. Rows come in groups that keep to a `Capacity`: a slab that is full passes on its images to the next group, and
only an image that finishes a row may take a place of a longer slab. Images wait also over the end of an epoch. They are
just stream positions, since everything else is drawn again from them, so the whole state is a few KB of integers.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from input_pipeline.budget import Draws
from input_pipeline.capacity import Capacity
from input_pipeline.errors import UserError

CHUNK = 4096  # positions drawn at a time: 0.4 us each, of 1024 twice as much
# An image that waits is one integer, tokens kept << _BITS | _MASK - position: the largest is the longest, and the
# oldest of that length.
_BITS = 40
_MASK = (1 << _BITS) - 1


class RowPlan(NamedTuple):
    """One row: stream positions [k] int64 and the tokens that each image gets [k] int64; k = 0: an empty row."""

    positions: np.ndarray
    keep: np.ndarray


class Planner:
    """An iterator of `RowPlan`: deterministic, restartable from `snapshot()`.

    draw: positions -> `Draws`, a pure function. length: L. slots: K. capacity: what each group of rows keeps to; None:
    nothing. look_ahead: images that wait. restore_dropped: give a row's free tokens back to images that had dropped
    some. stop: number of stream positions; None goes on for ever. Raises UserError for an image longer than a row.
    """

    def __init__(
        self,
        draw: Callable[[np.ndarray], Draws],
        *,
        length: int,
        slots: int,
        capacity: Capacity | None = None,
        look_ahead: int = 512,
        restore_dropped: bool = True,
        stop: int | None = None,
        snapshot: dict | None = None,
    ):
        self.draw, self.length, self.slots, self.look_ahead = draw, length, slots, look_ahead
        self.restore_dropped, self.stop = restore_dropped, stop
        self.capacity = capacity or Capacity(1, ((length, length),))  # which holds any row
        slabs = self.capacity.slabs
        self._shorter = [below for _, below in slabs[1:]] + [0]  # than any image of the slab
        self._slab_of = [sum(n <= m for _, m in slabs) - 1 for n in range(self.capacity.longest + 1)]
        self.cursor, self.row, self.slot_waste = 0, 0, 0
        self._queue: deque[int] = deque()  # images by age
        self._taken: set[int] = set()  # images of the queue that no longer wait
        self._sorted: list[int] = []  # images that wait, by length
        self._tokens: dict[int, int] = {}  # of the images that wait, before dropping
        self._planned: deque[RowPlan] = deque()  # rest of a group
        self._chunk: tuple[int, list[int], list[int]] = (-1, [], [])
        self._before: tuple[int, list[int]] = (0, [])  # cursor and queue before that group
        self._group: set[int] = set()  # images of that group
        if snapshot:
            self._load(snapshot)

    def __iter__(self) -> "Planner":
        return self

    def __next__(self) -> RowPlan:
        if not self._planned:
            self._plan_group()
        self.row += 1
        return self._planned.popleft()

    def snapshot(self) -> dict:
        """The state after the last row handed out: stream positions only, a few KB, JSON-ready."""
        cursor, queue = self._before if self._planned else (self.cursor, self._queue)
        here = self._tokens.keys() | self._group if self._planned else self._tokens
        waiting = [_MASK - (image & _MASK) for image in queue if image in here]
        return dict(row=self.row, left=len(self._planned), cursor=cursor, waiting=waiting)

    def _load(self, snapshot: dict) -> None:
        self.cursor = snapshot["cursor"]
        if snapshot["waiting"]:
            self._wait(*self._images(np.array(snapshot["waiting"])))
        if snapshot["left"]:  # of a group that was partly handed out
            self._plan_group()
            self._planned = deque(list(self._planned)[-snapshot["left"] :])
        self.row = snapshot["row"]

    def _images(self, positions: np.ndarray) -> tuple[list[int], list[int]]:
        """The images as they wait, and their tokens before dropping."""
        drawn = self.draw(positions)
        return ((drawn.keep << _BITS) + (_MASK - positions)).tolist(), drawn.grid.prod(axis=1).tolist()

    def _wait(self, images: list[int], tokens: list[int]) -> None:
        if min(images) <= _MASK:  # unreadable
            tokens = [n for image, n in zip(images, tokens, strict=True) if image > _MASK]
            images = [image for image in images if image > _MASK]
        self._tokens.update(zip(images, tokens, strict=True))
        self._queue.extend(images)
        self._sorted += images
        self._sorted.sort()
        longest = max(images, default=0) >> _BITS
        if longest > min(self.length, self.capacity.longest):
            raise UserError(
                f"an image of {longest} tokens does not fit in a row of {self.length}. Set --config.packing.row_length="
                f"{longest} or more, or lower --config.resolution.max_side or the token budget."
            )

    def _refill(self) -> None:
        """Let new images wait, unless nearly as many do as may; sorting a quarter at a time costs 0.1 us an image."""
        while 4 * len(self._sorted) <= 3 * self.look_ahead and self.cursor != self.stop:
            place = self.cursor % CHUNK
            if self._chunk[0] != self.cursor - place:
                start = self.cursor - place
                end = start + CHUNK if self.stop is None else min(start + CHUNK, self.stop)
                self._chunk = (start, *self._images(np.arange(start, end)))
            new = slice(place, place + self.look_ahead - len(self._sorted))
            images, tokens = (x[new] for x in self._chunk[1:])
            self.cursor += len(images)
            self._wait(images, tokens)

    def _plan_group(self) -> None:
        """Plan the rows that share a profile; the last ones of a stream that stops may be missing."""
        self._before, left = (self.cursor, list(self._queue)), [count for count, _ in self.capacity.slabs]
        images, ends, gaps = [], [0], []
        for _ in range(self.capacity.rows):
            self._refill()
            if not self._sorted:
                break
            gaps.append(self._plan_row(images, left))
            ends.append(len(images))
            self.slot_waste += gaps[-1] if ends[-1] - ends[-2] == self.slots else 0
        if not gaps:
            raise StopIteration
        self._group, whole = set(images), list(map(self._tokens.pop, images))
        images = np.array(images, np.int64)
        positions, keep = _MASK - (images & _MASK), images >> _BITS
        for gap, (start, end) in zip(gaps, pairwise(ends), strict=True):
            if gap and self.restore_dropped:
                self._restore(keep[start:end], whole[start:end], gap)
            self._planned.append(RowPlan(positions[start:end], keep[start:end]))

    def _plan_row(self, images: list[int], left: list[int]) -> int:
        """Append the images of one row; returns its free tokens. left: free places of each slab, of which it takes."""
        queue, taken, by_length, slab_of = self._queue, self._taken, self._sorted, self._slab_of
        full, free, room = [], self.length, self.slots
        while room and queue:
            image = queue.popleft()
            if image in taken:
                taken.remove(image)
                continue
            tokens = image >> _BITS
            if tokens > free:
                full.append(image)
                break
            slab = slab_of[tokens]
            if not left[slab]:
                full.append(image)
                continue
            left[slab] -= 1
            free -= tokens
            room -= 1
            images.append(image)
            del by_length[bisect_left(by_length, image)]
            place = bisect_left(by_length, free + 1 << _BITS)
            if place and by_length[place - 1] >> _BITS == free:
                break
        queue.extendleft(reversed(full))
        return self._finish_row(images, left, free, room) if room else free

    def _finish_row(self, images: list[int], left: list[int], free: int, room: int) -> int:
        """Append the longest images that fit, at most `room`; returns what stays free of the `free` tokens."""
        most = free
        while room and most:
            place = bisect_left(self._sorted, most + 1 << _BITS)
            if not place:
                break
            tokens = self._sorted[place - 1] >> _BITS
            slab = self._slab_of[tokens]
            while slab >= 0 and not left[slab]:
                slab -= 1
            if slab < 0:  # no place for this image, nor for any as long
                most = self._shorter[self._slab_of[tokens]]
                continue
            left[slab] -= 1
            free -= tokens
            room -= 1
            most = free
            images.append(self._sorted.pop(place - 1))
            self._taken.add(images[-1])
        return free

    def _restore(self, keep: np.ndarray, whole: list[int], gap: int) -> None:
        """Give a row's free tokens back to its images, as far as each had dropped some and its slab has room."""
        for i, tokens in enumerate(whole):
            more = min(gap, min(tokens, self.capacity.slabs[self._slab_of[keep[i]]][1]) - keep[i])
            keep[i] += more
            gap -= more
