"""Which image goes in which row, planned on numbers before a pixel is read.

Up to 512 images wait. A row takes the oldest of them while they fit, and is finished by one that fills it to the last
token, or by the longest that fit. Padding, before dropped tokens fill it, is 0.01 % at L = 1024 and 0.17 % at L = 256
(next-fit, the usual choice, has 5.3 % and 21 %) for about 2 us an image, and no image waits longer than some hundred
others. Rows come in groups that keep to a `Capacity`: a slab that is full passes on its images to the next group, and
only an image that finishes a row may take a place of a longer slab. Images wait also over the end of an epoch. They are
just stream positions, since everything else is drawn again from them, so the whole state is a few KB of integers.
"""

from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from input_pipeline.budget import Draws
from input_pipeline.capacity import Capacity
from input_pipeline.errors import UserError

CHUNK = 4096  # positions drawn at a time: 0.4 us each, of 1024 twice as much; rows depend on it
_CHUNKS = 8  # kept, for the few images that get dropped tokens back
# An image that waits is one integer, stream position << _BITS | tokens kept. Their order is their age.
_BITS = 20
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
        self._passed: list[int] = []  # older than the queue's: of slabs that are full in this group
        self._taken: set[int] = set()  # images of these two that no longer wait
        self._of_length = [deque[int]() for _ in self._slab_of]  # images that wait, by length and age
        self._lengths = 0  # bit n is set where images of n tokens wait
        self._planned: deque[RowPlan] = deque()  # rest of a group
        self._chunks: dict[int, tuple[list[int], list[int], list[int]]] = {}
        self._before = 0  # cursor before that group
        self._group: list[int] = []  # images of that group
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
        cursor, images = self.cursor, [image for image in self._queue if image not in self._taken]
        if self._planned:  # as it was before that group
            cursor, images = self._before, sorted(images + self._group)
        waiting = [position for image in images if (position := image >> _BITS) < cursor]
        return dict(row=self.row, left=len(self._planned), cursor=cursor, waiting=waiting)

    def _load(self, snapshot: dict) -> None:
        self.cursor = snapshot["cursor"]
        if snapshot["waiting"]:
            self._wait(*self._images(np.array(snapshot["waiting"]))[:2])
        if snapshot["left"]:  # of a group that was partly handed out
            self._plan_group()
            self._planned = deque(list(self._planned)[-snapshot["left"] :])
        self.row = snapshot["row"]

    def _chunk(self, number: int) -> tuple[list[int], list[int], list[int]]:
        """`_images` of the positions from number * CHUNK on."""
        if number not in self._chunks:
            start = number * CHUNK
            end = start + CHUNK if self.stop is None else min(start + CHUNK, self.stop)
            self._chunks[number] = self._images(np.arange(start, end))
            if len(self._chunks) > _CHUNKS:
                del self._chunks[next(iter(self._chunks))]
        return self._chunks[number]

    def _images(self, positions: np.ndarray) -> tuple[list[int], list[int], list[int]]:
        """The images as they wait, the tokens that they keep, and their tokens before dropping."""
        drawn = self.draw(positions)
        keep, longest = drawn.keep, int(drawn.keep.max(initial=0))
        if longest > min(self.length, self.capacity.longest):
            raise UserError(
                f"an image of {longest} tokens does not fit in a row of {self.length}. Set --config.packing.row_length="
                f"{longest} or more, or lower --config.resolution.max_side or the token budget."
            )
        return (positions << _BITS | keep).tolist(), keep.tolist(), drawn.grid.prod(axis=1).tolist()

    def _wait(self, images: list[int], lengths: list[int]) -> None:
        if 0 in lengths:  # unreadable
            images, lengths = ([x[i] for i, n in enumerate(lengths) if n] for x in (images, lengths))
        self._queue.extend(images)
        of_length, found = self._of_length, self._lengths
        for image, length in zip(images, lengths, strict=True):
            alike = of_length[length]
            if not alike:
                found |= 1 << length
            alike.append(image)
        self._lengths = found

    def _refill(self) -> None:
        """Let new images wait, unless nearly as many do as may; a quarter of them at a time."""
        while self.cursor != self.stop:
            waiting = len(self._queue) + len(self._passed) - len(self._taken)
            if 4 * waiting > 3 * self.look_ahead:
                break
            number, place = divmod(self.cursor, CHUNK)
            new = slice(place, place + self.look_ahead - waiting)
            images, lengths = (x[new] for x in self._chunk(number)[:2])
            self.cursor += len(images)
            self._wait(images, lengths)

    def _plan_group(self) -> None:
        """Plan the rows that share a profile; the last ones of a stream that stops may be missing."""
        self._before, left = self.cursor, [count for count, _ in self.capacity.slabs]
        images, ends, gaps = [], [0], []
        for _ in range(self.capacity.rows):
            self._refill()
            if not self._lengths:
                break
            gaps.append(self._plan_row(images, left))
            ends.append(len(images))
            self.slot_waste += gaps[-1] if ends[-1] - ends[-2] == self.slots else 0
        if not gaps:
            raise StopIteration
        self._queue.extendleft(reversed(self._passed))
        self._passed.clear()
        self._group, kept = images, [image & _MASK for image in images]
        if self.restore_dropped:
            for gap, (start, end) in zip(gaps, pairwise(ends), strict=True):
                if gap:
                    self._restore(images, kept, range(start, end), gap)
        positions, keep = np.array(images, np.int64) >> _BITS, np.array(kept, np.int64)
        self._planned.extend(RowPlan(positions[start:end], keep[start:end]) for start, end in pairwise(ends))

    def _plan_row(self, images: list[int], left: list[int]) -> int:
        """Append the images of one row; returns its free tokens. left: free places of each slab, of which it takes."""
        queue, taken, of_length, slab_of = self._queue, self._taken, self._of_length, self._slab_of
        free, room = self.length, self.slots
        while room and queue:
            image = queue.popleft()
            if image in taken:
                taken.remove(image)
                continue
            tokens = image & _MASK
            if tokens > free:
                queue.appendleft(image)
                break
            slab = slab_of[tokens]
            if not left[slab]:
                self._passed.append(image)
                continue
            left[slab] -= 1
            free -= tokens
            room -= 1
            images.append(image)
            alike = of_length[tokens]
            alike.popleft()  # this image: the oldest of all
            if not alike:
                self._lengths ^= 1 << tokens
            if self._lengths >> free & 1:  # one that waits fills the row to the last token
                break
        return self._finish_row(images, left, free, room) if room else free

    def _finish_row(self, images: list[int], left: list[int], free: int, room: int) -> int:
        """Append the longest images that fit, at most `room`; returns what stays free of the `free` tokens."""
        most = free
        while room and (tokens := (self._lengths & (2 << most) - 1).bit_length() - 1) > 0:
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
            alike = self._of_length[tokens]
            images.append(alike.popleft())
            self._taken.add(images[-1])
            if not alike:
                self._lengths ^= 1 << tokens
        return free

    def _restore(self, images: list[int], kept: list[int], row: range, gap: int) -> None:
        """Give a row's free tokens back to its images, as far as each had dropped some and its slab has room."""
        for i in row:
            if not gap:
                break
            number, place = divmod(images[i] >> _BITS, CHUNK)
            whole = self._chunk(number)[2][place]
            if whole > kept[i]:
                more = min(gap, min(whole, self.capacity.slabs[self._slab_of[kept[i]]][1]) - kept[i])
                kept[i] += more
                gap -= more
