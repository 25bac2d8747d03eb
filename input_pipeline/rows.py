"""From a planned row to its arrays: read, decode, crop, resize, augment, cut, keep; a bad image leaves its slot empty.

In a contrastive run a row of texts comes with it, of the same number but not of the same examples (`pairing`).
Everything random comes from a generator keyed on the image's stream position: a row is the same wherever it is built.
"""

import math
import threading
from collections.abc import Sequence
from itertools import repeat
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from input_pipeline import augment, decode, keys, pairing
from input_pipeline.budget import Draws, Sampler
from input_pipeline.errors import DecodeError
from input_pipeline.packed import Packed, Pairs
from input_pipeline.packing import CHUNK, RowPlan
from input_pipeline.patches import patchify, resize
from input_pipeline.sources import Source

if TYPE_CHECKING:
    from input_pipeline.text_index import Texts


class Row(NamedTuple):
    """One row: the fields of a batch without their first axis, and what went wrong.

    labels: [K] int32 (-1: none) or [K, C] float32 for sets and blends. index: [K] int32 of the source, -1: empty.
    bad: (index, reason) of each image that could not be used. pairs: of a contrastive run, filled in by the loader.
    """

    images: Packed
    labels: np.ndarray
    index: np.ndarray
    bad: tuple[tuple[int, str], ...]
    pairs: Pairs | None = None


class RecentDraws:
    """`draw(positions) -> Draws` of a sampler, which remembers the ranges that a planner asked for, in blocks.

    A call costs 0.4 ms whatever it draws, so a row's few images would cost 0.1 ms each to draw again.
    """

    BLOCK, BLOCKS = CHUNK, 64  # 256 KB each

    def __init__(self, sampler: Sampler):
        self.sampler = sampler
        self._lock, self._blocks = threading.Lock(), {}

    def __getstate__(self) -> dict:
        return dict(sampler=self.sampler)

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["sampler"])

    def __call__(self, positions: np.ndarray) -> Draws:
        number, first = divmod(int(positions[0]), self.BLOCK) if len(positions) else (0, 1)
        if first == 0 and len(positions) > 1 and positions[-1] - positions[0] == len(positions) - 1:
            drawn = self.sampler(positions)
            with self._lock:
                for start in range(0, len(positions), self.BLOCK):
                    self._keep(number + start // self.BLOCK, Draws(*(x[start : start + self.BLOCK] for x in drawn)))
            return drawn
        return (self._recall(positions) if len(positions) else None) or self.sampler(positions)

    def _keep(self, number: int, drawn: Draws) -> None:
        if number not in self._blocks or len(drawn.index) > len(self._blocks[number].index):
            self._blocks[number] = drawn
        if len(self._blocks) > self.BLOCKS:
            del self._blocks[next(iter(self._blocks))]

    def _recall(self, positions: np.ndarray) -> Draws | None:
        """From the blocks; None where one of them is not there."""
        numbers, places = np.divmod(positions, self.BLOCK)
        with self._lock:
            blocks = [self._blocks.get(number) for number in numbers.tolist()]
        if any(block is None for block in blocks):
            return None
        each = list(zip(blocks, places.tolist(), strict=True))
        if any(place >= len(block.index) for block, place in each):
            return None
        return Draws(*(np.array([block[field][place] for block, place in each]) for field in range(len(Draws._fields))))


class RowBuilder:
    """`builder(plan) -> Row` for one source and sampler; `soft` labels are [K, C] rather than [K].

    texts, files, text_plan: of a contrastive run, whose rows come in pairs; see `stream.Images`; T and M.
    """

    def __init__(
        self,
        source: Source,
        sampler: Sampler,
        config: ConfigDict,
        *,
        length: int,
        slots: int,
        classes: int,
        texts: "Texts | None" = None,
        files: np.ndarray | None = None,
        text_plan: pairing.TextPlan | None = None,
    ):
        self.source, self.sampler, self.config, self.classes = source, sampler, config, classes
        self.texts, self.files, self.text_plan = texts, files, text_plan
        self.length, self.slots, self.train = length, slots, not sampler.budget
        self.dtype = np.uint16 if config.data.bits == 16 else np.uint8
        self.mixup = config.augment.mixup if self.train else 0.0
        self.soft = config.data.multi_label or bool(self.mixup)
        # Plain values, as a look-up in a ConfigDict costs 5 us and an image would need 14 of them.
        self.seed, data, changes = config.seed, config.data, config.augment
        self.fast = self.train and data.decode == "fast"
        self.decoding = {name: data[name] for name in ("channels", "bits", "max_pixels")}
        self.decoding["background"] = tuple(data.background)
        augmented = self.train and (changes.flip or changes.randaugment_ops or changes.erasing)
        self.augment = SimpleNamespace(**changes.to_dict()) if augmented else None
        self.draw = RecentDraws(sampler)

    def __call__(self, plan: RowPlan) -> Row:
        drawn = self.draw(plan.positions)
        pixels, labels, bad = [], [], []
        streams = keys.generators(self.seed, "pixels", plan.positions) if self.augment else repeat(None)
        each = zip(drawn.index.tolist(), drawn.crop.tolist(), drawn.grid.tolist(), streams)  # streams may be endless
        for index, crop, grid, rng in each:
            try:
                record = self.source[index]
                pixels.append(self._pixels(record.data, crop, grid, rng))
                labels.append(self._target(record.label))
            except (DecodeError, OSError) as error:
                pixels.append(None)
                labels.append(self._target(-1))
                bad.append((index, str(error)))
        if self.mixup:
            pixels, labels = self._mix(pixels, labels, plan.positions)
        return self._assemble(plan, drawn, pixels, labels, tuple(bad))

    def plan_texts(self, plans: Sequence[RowPlan | None]) -> pairing.StepTexts | None:
        """The text rows of a step from its image rows; None in a run without texts."""
        if self.texts is None:
            return None
        return pairing.plan_step(plans, self.sampler, self.texts, self.text_plan.length, self.text_plan.slots)

    def pairs(self, step: pairing.StepTexts, row: int, index: np.ndarray) -> Pairs:
        """`Pairs` without their first axis: text row `row` of the step, and the ids of its image row of that number.

        index: [K] of the image row, -1 where an image could not be used.
        """
        examples, (length, slots, *_) = step.rows[row], self.text_plan
        packed, of_M = pairing.text_row(self.texts, self.files, step.index[examples], examples, length, slots)
        of_K = pairing.image_ids(self.texts, self.files, int(step.first[row]), index)
        return Pairs(packed, *(ids for both in zip(of_K, of_M, strict=True) for ids in both))

    def _pixels(
        self, data: bytes | np.ndarray, crop: list[float], grid: list[int], rng: np.random.Generator | None
    ) -> np.ndarray:
        """The image at its drawn size, [rows * p, columns * p, C]."""
        height, width = (side * self.sampler.patch for side in grid)
        top, left, crop_h, crop_w = crop
        at_least = (math.ceil(height / crop_h), math.ceil(width / crop_w)) if self.fast else None
        image = decode.decode(data, **self.decoding, at_least=at_least)
        h, w = image.shape[:2]
        y, x = int(top * h), int(left * w)
        image = image[y : max(y + 1, round((top + crop_h) * h)), x : max(x + 1, round((left + crop_w) * w))]
        image = resize(image, height, width)
        return augment.augment(image, self.augment, rng) if self.augment else image

    def _target(self, label: int | tuple[int, ...]) -> np.ndarray:
        if not self.soft:
            return np.int32(label)
        classes = np.atleast_1d(np.array(label, np.int64))
        if (classes < 0).any():  # no label, which is not the same as an empty set of classes
            return np.full(self.classes, -1, np.float32)
        target = np.zeros(self.classes, np.float32)
        target[classes] = 1
        return target

    def _mix(self, pixels: list, labels: list, positions: np.ndarray) -> tuple[list, list]:
        """Blend each image with the next usable one of its row, resized to its grid (mixup: Zhang et al. 2018)."""
        usable = [i for i, image in enumerate(pixels) if image is not None and labels[i].min() >= 0]
        mixed, targets = list(pixels), list(labels)
        for here, there in zip(usable, usable[1:] + usable[:1], strict=True):
            rng = keys.generator(self.config.seed, "mixup", int(positions[here]))
            share = rng.beta(self.mixup, self.mixup)
            share = np.float32(max(share, 1 - share))  # the larger part stays with the image whose grid it is
            other = resize(pixels[there], *pixels[here].shape[:2])
            blend = share * pixels[here].astype(np.float32) + (1 - share) * other
            mixed[here] = np.rint(blend).astype(self.dtype)
            targets[here] = share * labels[here] + (1 - share) * labels[there]
        return mixed, targets

    def _assemble(self, plan: RowPlan, drawn: Draws, pixels: list, labels: list, bad: tuple) -> Row:
        row, patch, images = empty_row(self), self.sampler.patch, len(pixels)
        values, segment_ids, coords, grids = row.images[:4]
        kept, counts, used = [], np.zeros(images, np.int64), 0
        streams = keys.generators(self.seed, "tokens", plan.positions)
        each = zip(pixels, drawn.grid.tolist(), plan.keep.tolist(), streams, strict=True)
        for slot, (image, (rows, columns), keep, rng) in enumerate(each):
            if image is None:
                continue
            kept.append(_kept(rows * columns, keep, rng))
            patchify(image, patch, kept[-1], out=values[used : used + keep])
            counts[slot], used = keep, used + keep
        if images:  # a group's profile may leave a row empty
            row.labels[:images] = labels
        if used:
            kept, columns = np.concatenate(kept), np.repeat(drawn.grid[:, 1], counts)
            segment_ids[:used] = np.repeat(np.arange(1, images + 1), counts)
            coords[:used, 1], coords[:used, 2] = np.divmod(kept, columns)
            grids[:images, 0] = counts > 0
            grids[:images, 1:] = drawn.grid * (counts > 0)[:, None]
            row.index[:images] = np.where(counts > 0, drawn.index, -1)
        return row._replace(bad=bad)


def _kept(tokens: int, keep: int, rng: np.random.Generator) -> np.ndarray:
    """Which tokens stay, ascending: the first `keep` of the example's own shuffle, so more budget only adds."""
    if keep == tokens:
        return np.arange(tokens)
    return np.sort(rng.permutation(tokens)[:keep])


def empty_row(builder: RowBuilder) -> Row:
    """A row of padding, as it fills the last step of an evaluation."""
    patch_values = builder.sampler.patch**2 * builder.config.data.channels
    length, slots = builder.length, builder.slots
    return Row(
        images=Packed(
            values=np.zeros((length, patch_values), builder.dtype),
            segment_ids=np.zeros(length, np.int32),
            coords=np.zeros((length, 3), np.int32),
            grids=np.zeros((slots, 3), np.int32),
        ),
        labels=np.zeros((slots, builder.classes), np.float32) if builder.soft else np.full(slots, -1, np.int32),
        index=np.full(slots, -1, np.int32),
        bad=(),
    )
