"""From a planned row to its arrays: read, decode, crop, resize, augment, cut, keep; a bad image leaves its slot empty.

In a contrastive run a row of texts comes with it, of the same number but not of the same examples (`pairing`).
Everything random comes from a generator keyed on the image's stream position: a row is the same wherever it is built.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from input_pipeline import augment, decode, keys, pairing
from input_pipeline.budget import Draws, Sampler
from input_pipeline.errors import DecodeError
from input_pipeline.packed import Packed, Pairs
from input_pipeline.packing import RowPlan
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

    def __call__(self, plan: RowPlan) -> Row:
        drawn = self.sampler(plan.positions)
        pixels, labels, bad = [], [], []
        for i, position in enumerate(plan.positions):
            try:
                record = self.source[int(drawn.index[i])]
                pixels.append(self._pixels(record.data, drawn, i, int(position)))
                labels.append(self._target(record.label))
            except (DecodeError, OSError) as error:
                pixels.append(None)
                labels.append(self._target(-1))
                bad.append((int(drawn.index[i]), str(error)))
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

    def _pixels(self, data: bytes | np.ndarray, drawn: Draws, i: int, position: int) -> np.ndarray:
        """The image at its drawn size, [rows * p, columns * p, C]."""
        cfg, patch = self.config.data, self.sampler.patch
        (height, width), (top, left, crop_h, crop_w) = drawn.grid[i] * patch, drawn.crop[i]
        fast = cfg.decode == "fast" and self.train
        image = decode.decode(
            data,
            channels=cfg.channels,
            bits=cfg.bits,
            background=tuple(cfg.background),
            max_pixels=cfg.max_pixels,
            at_least=(int(np.ceil(height / crop_h)), int(np.ceil(width / crop_w))) if fast else None,
        )
        h, w = image.shape[:2]
        y, x = int(top * h), int(left * w)
        image = image[y : max(y + 1, round((top + crop_h) * h)), x : max(x + 1, round((left + crop_w) * w))]
        image = resize(image, int(height), int(width))
        if self.train:
            image = augment.augment(image, self.config.augment, keys.generator(self.config.seed, "pixels", position))
        return image

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
        row = empty_row(self)
        images, cursor = row.images, 0
        for slot, (image, keep) in enumerate(zip(pixels, plan.keep, strict=True)):
            row.labels[slot] = labels[slot]
            if image is None:
                continue
            rows, columns = drawn.grid[slot]
            kept = self._kept(int(rows * columns), int(keep), int(plan.positions[slot]))
            here = slice(cursor, cursor + len(kept))
            images.values[here] = patchify(image, self.sampler.patch)[kept]
            images.segment_ids[here] = slot + 1
            images.coords[here, 1], images.coords[here, 2] = kept // columns, kept % columns
            images.grids[slot] = (1, rows, columns)
            row.index[slot] = drawn.index[slot]
            cursor += len(kept)
        return row._replace(bad=bad)

    def _kept(self, tokens: int, keep: int, position: int) -> np.ndarray:
        """Which tokens stay, ascending: the first `keep` of the example's own shuffle, so more budget only adds."""
        if keep == tokens:
            return np.arange(tokens)
        return np.sort(keys.generator(self.config.seed, "tokens", position).permutation(tokens)[:keep])


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
