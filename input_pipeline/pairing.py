"""Which text goes in which row: the texts of a step's images, packed jointly with them.

The texts of a step fill as many rows as its images do, and any of them may hold the text of any image: texts are so
short against a row that best-fit decreasing over the whole step wastes hardly a token of a full step, where a text row
for each image row would have to be as long as the worst of them needs. Steps differ in their texts, and T is one: 91 %
of the rows of 16, 93 % of those of 64 or more, are filled on captions of 45 bytes, where a T that leaves out no text at
all gives 88 % and 91 %. Nothing here depends on more than the step's image plans, so the text rows are the same for any
number of threads and processes, and a snapshot needs nothing of them.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, count
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from input_pipeline.budget import Draws
from input_pipeline.errors import UserError
from input_pipeline.packed import Packed, stack
from input_pipeline.packing import Planner, RowPlan

if TYPE_CHECKING:
    from input_pipeline.text_index import Texts

_MOST_LEFT_OUT = 0.02  # of the texts, by a configured T or M
_SPARED = 0.001  # of the texts of the dry run, by a chosen T and again by M


def pack_texts(lengths: np.ndarray, rows: int, length: int, slots: int) -> list[np.ndarray]:
    """Best-fit decreasing: for each of `rows` rows the numbers of its texts, int64, longest first.

    lengths: [n] tokens. A row takes `length` tokens and `slots` texts. Equal lengths go in their order, equal rows from
    the first; rows without a text come last. Left out: what fits nowhere, and texts of length 0.
    """
    lengths = np.asarray(lengths, np.int64)
    order = np.argsort(-lengths, kind="stable")
    order = order[(lengths[order] > 0) & (lengths[order] <= length)]
    members: list[list[int]] = [[] for _ in range(rows)]
    shortest = int(lengths[order[-1]]) if len(order) else 0
    keys: list[int] = []  # free * rows + row of the started rows that can still take the shortest text, ascending
    started = 0
    for text, size in zip(order.tolist(), lengths[order].tolist(), strict=True):
        place = bisect_left(keys, size * rows)
        if place < len(keys):
            key = keys.pop(place)
        elif started < rows:
            key, started = length * rows + started, started + 1
        else:
            continue
        row = members[key % rows]
        row.append(text)
        key -= size * rows
        if key >= shortest * rows and len(row) < slots:
            insort(keys, key)
    return [np.array(row, np.int64) for row in members]


def _row(ids: Sequence[np.ndarray], length: int, slots: int) -> Packed:
    """One row of texts: the fields of `Packed` without their first axis."""
    values, segments = np.zeros(length, np.int32), np.zeros(length, np.int32)
    coords, grids = np.zeros((length, 3), np.int32), np.zeros((slots, 3), np.int32)
    start = 0
    for slot, text in enumerate(ids):
        here = slice(start, start + len(text))
        values[here], segments[here], coords[here, 2] = text, slot + 1, np.arange(len(text))
        grids[slot] = (1, 1, len(text))
        start = here.stop
    return Packed(values, segments, coords, grids)


def text_batches(
    ids: Sequence[np.ndarray],
    rows: int,
    *,
    length: int | None = None,
    slots: int | None = None,
    local: Sequence[int] | None = None,
) -> Iterator[tuple[Packed, np.ndarray]]:
    """Every text of a list once, for evaluation: (rows [B, T], index [B, M] int32 into the list, -1: empty slot).

    ids: token ids of each text. rows: B over all processes; whole steps, with empty rows at the end. length, slots: T
    and M; None: what the list needs, T at most 512 or the longest text. local: which of a step's rows this process
    builds; None: all. Raises UserError for a text without tokens or longer than `length`.
    """
    lengths = np.array([len(text) for text in ids], np.int64)
    if not len(lengths):
        return
    if length is None:
        length = _eights(max(int(lengths.max()), min(512, -(-int(lengths.sum()) // rows))))
    unfit = np.flatnonzero((lengths == 0) | (lengths > length))
    if len(unfit):
        i = int(unfit[0])
        raise UserError(f"text {i} has {lengths[i]} tokens; expected 1 to {length}, the length of a row of texts")
    limit = length if slots is None else slots
    # No two rows that best-fit has started would fit in one, so there are at most this many.
    most = min(len(lengths), 2 * int(lengths.sum()) // length + len(lengths) // limit + 2)
    packed = [row for row in pack_texts(lengths, most, length, limit) if len(row)]
    slots = max(map(len, packed)) if slots is None else slots
    packed += [np.zeros(0, np.int64)] * (-len(packed) % rows)
    for first in range(0, len(packed), rows):
        mine = [packed[first + r] for r in (range(rows) if local is None else local)]
        built = [_row([ids[i] for i in row], length, slots) for row in mine]
        index = np.stack([np.pad(row, (0, slots - len(row)), constant_values=-1) for row in mine]).astype(np.int32)
        yield stack(built), index


def _eights(n: int) -> int:
    return -(-n // 8) * 8


class StepTexts(NamedTuple):
    """The texts of a step, of N examples in the order (row, slot) of its images; examples are numbered 0..N - 1.

    index: [N] int64, each example's number in the source. first: [B], the number of each image row's first example.
    rows: for each of B text rows its examples.
    """

    index: np.ndarray
    first: np.ndarray
    rows: list[np.ndarray]


def plan_step(
    plans: Sequence[RowPlan | None],
    draw: Callable[[np.ndarray], Draws],
    texts: "Texts",
    length: int,
    slots: int,
) -> StepTexts:
    """The text rows of a step from its image rows (None: an empty row); length, slots: T and M."""
    index, first = _examples(plans, draw)
    return StepTexts(index, first, pack_texts(texts.lengths[index], len(plans), length, slots))


def _examples(plans: Sequence[RowPlan | None], draw: Callable[[np.ndarray], Draws]) -> tuple[np.ndarray, np.ndarray]:
    positions = [np.zeros(0, np.int64) if plan is None else plan.positions for plan in plans]
    ends = np.cumsum([len(p) for p in positions])
    return draw(np.concatenate(positions)).index, np.concatenate([[0], ends[:-1]])


def text_row(
    texts: "Texts", files: np.ndarray | None, index: np.ndarray, examples: np.ndarray, length: int, slots: int
) -> tuple[Packed, list[np.ndarray]]:
    """A text row: `Packed` without its first axis, and the example, number and image of each slot, [M] int32.

    files: of the source, see `image_ids`. index, examples: of the row's texts, in the order of its slots, their numbers
    in the source and in the step.
    """
    empty = (0, slots - len(examples))
    padded = (np.pad(x, empty, constant_values=-1) for x in (examples, index))
    return _row([texts.ids(int(i)) for i in index], length, slots), _slot_ids(texts, files, *padded)


def image_ids(texts: "Texts", files: np.ndarray | None, first: int, index: np.ndarray) -> list[np.ndarray]:
    """Example, number and image of a row's image slots, [K] int32; -1: empty, or the image was unusable.

    files: [N], equal for the examples of the source that are one image; None: no two are. first: the number of the
    row's first example. index: [K] of the row, -1: empty slot.
    """
    return _slot_ids(texts, files, first + np.arange(len(index)), index)


def _slot_ids(texts: "Texts", files: np.ndarray | None, example: np.ndarray, index: np.ndarray) -> list[np.ndarray]:
    found = (example, texts.numbers[index], index if files is None else files[index])
    return [np.where(index >= 0, x, -1).astype(np.int32) for x in found]


class TextPlan(NamedTuple):
    """T and M, and what a dry run gave: the share of the text rows' tokens that is used, and of texts left out."""

    length: int
    slots: int
    fill: float
    left_out: float


def choose(
    draws: Sequence[Callable[[np.ndarray], Draws]], plan: dict, texts: "Texts", rows: int, images: int, text: ConfigDict
) -> TextPlan:
    """T and M: as configured, or the smallest that each leave out at most 0.1 % of the texts of a dry run.

    draws: of each place of the stream where `images` images, or one step if that is more, are planned. plan: options of
    the image `Planner`. rows: B. text: `config.text`. Nothing is read. Raises UserError for a T below the longest text
    and for a T or M that leaves out more than 2 % of the texts, naming one that works.
    """
    longest = int(texts.lengths.max())
    steps = [step for draw in draws for step in _dry_steps(draw, plan, texts, rows, images)]
    if 0 < text.row_length < longest:
        raise UserError(
            f"text.row_length={text.row_length} is too small for one text of {longest} tokens. Set --config.text."
            f"row_length={_length(steps, longest, rows)}, or 0 to choose, or lower --config.text.max_tokens."
        )
    length = text.row_length or _length(steps, longest, rows)
    _refuse("row_length", length, _share(steps, rows, length, length), lambda: _length(steps, longest, rows))
    slots = text.texts_per_row or _slots(steps, rows, length)
    left_out = _share(steps, rows, length, slots)
    _refuse("texts_per_row", slots, left_out, lambda: _slots(steps, rows, length))
    placed = sum(int(s[row].sum()) for s in steps for row in pack_texts(s, rows, length, slots))
    return TextPlan(length, slots, placed / (len(steps) * rows * length), left_out)


def _dry_steps(
    draw: Callable[[np.ndarray], Draws], plan: dict, texts: "Texts", rows: int, images: int
) -> list[np.ndarray]:
    """The text lengths of the first steps, an array each; those with most tokens first, which tell soonest."""
    planner, plans, placed = Planner(draw, **plan), [], 0
    while placed < images:
        plans += [next(planner) for _ in range(rows)]
        placed += sum(len(plan.positions) for plan in plans[-rows:])
    index, first = _examples(plans, draw)
    return sorted(np.split(texts.lengths[index], first[rows::rows]), key=np.sum, reverse=True)


def _refuse(field: str, value: int, left_out: float, works: Callable[[], int]) -> None:
    if left_out > _MOST_LEFT_OUT:
        raise UserError(
            f"text.{field}={value} leaves out {100 * left_out:.1f} % of the texts, and their images would learn "
            f"nothing. Set --config.text.{field}={works()}, or 0 to choose."
        )


def _left_out(steps: Sequence[np.ndarray], rows: int, length: int, slots: int) -> Iterator[int]:
    """How many texts of each step find no place."""
    return (len(step) - sum(map(len, pack_texts(step, rows, length, slots))) for step in steps)


def _share(steps: Sequence[np.ndarray], rows: int, length: int, slots: int) -> float:
    return sum(_left_out(steps, rows, length, slots)) / sum(map(len, steps))


def _fits(steps: Sequence[np.ndarray], rows: int, length: int, slots: int, most: int) -> bool:
    """Whether at most `most` texts are left out; given up as soon as they are more."""
    return all(total <= most for total in accumulate(_left_out(steps, rows, length, slots)))


def _length(steps: Sequence[np.ndarray], longest: int, rows: int) -> int:
    """The smallest T, with any number of slots."""
    most = int(_SPARED * sum(map(len, steps)))
    tokens = sum(int(step.sum()) for step in steps) - most * longest
    least = _eights(max(longest, tokens // (len(steps) * rows)))
    return next(n for n in count(least, 8) if _fits(steps, rows, n, n, most))


def _slots(steps: Sequence[np.ndarray], rows: int, length: int) -> int:
    """The smallest M that leaves out no more than it may, beside what any number of slots does."""
    texts = sum(map(len, steps))
    most = int(_SPARED * texts) + sum(_left_out(steps, rows, length, length))
    least = max(1, (texts - most) // (len(steps) * rows))
    return next(n for n in count(least) if _fits(steps, rows, length, n, most))
