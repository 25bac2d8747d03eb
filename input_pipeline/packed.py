"""The contract between data and model: one batch of packed rows.

A `NamedTuple` because jax and grain both treat it as a pytree, and numpy alone can make it: this file imports no jax,
so loader processes never start an accelerator runtime for it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from input_pipeline.capacity import Capacity


class Packed(NamedTuple):
    """Rows of packed tokens; B rows, L tokens a row, K image slots a row, P values a patch.

    values: [B, L, P] uint8 or uint16 pixels in (frame, row, column, channel) order, or [B, L] int32 text tokens.
    segment_ids: [B, L] int32, 1..K = slot of the row, 0 = padding; contiguous, ascending, padding last.
    coords: [B, L, 3] int32, (t, y, x) of the patch in its own grid, in (t, y, x) order within a segment.
    grids: [B, K, 3] int32, (frames, rows, columns) of the full grid before token dropping; 0 = empty slot.
    capacity: what each group of rows is within, static under jit; None: no promise.
    """

    values: np.ndarray
    segment_ids: np.ndarray
    coords: np.ndarray
    grids: np.ndarray
    capacity: Capacity | None = None

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """values, segment_ids, coords, grids."""
        return self[:4]


def stack(rows: Sequence[Packed], capacity: Capacity | None = None) -> Packed:
    """A batch of rows, each the fields of `Packed` without their first axis."""
    return Packed(*map(np.stack, zip(*(row.arrays for row in rows), strict=True)), capacity)


class Pairs(NamedTuple):
    """The texts of a contrastive step, B rows of T tokens and M slots, and which text belongs to which image.

    A text may lie in any row of the step. Whatever has no partner carries no loss.

    texts: values [B, T] token ids; coords of a token are (0, 0, place in its text), grids (1, 1, length).
    example_BK, example_BM: [B, K] and [B, M] int32, a number of this step that an image and its text share; -1: none.
    number_BK, number_BM: int32, the same for equal texts of the data, of an image its text's; -1: none.
    image_BK, image_BM: int32, the same for examples that are one image with several texts, of a text its image's; -1:
    none.
    """

    texts: Packed
    example_BK: np.ndarray
    example_BM: np.ndarray
    number_BK: np.ndarray
    number_BM: np.ndarray
    image_BK: np.ndarray
    image_BM: np.ndarray


class Batch(NamedTuple):
    """What a step reads: packed rows and what rides beside them, per slot. A pytree.

    labels: [B, K] int32 (-1: none), or [B, K, C] float32 for sets of classes and blends.
    index: [B, K] int32, the image's number in its source; -1: empty slot.
    pairs: of a contrastive step.
    """

    images: Packed
    labels: np.ndarray
    index: np.ndarray
    pairs: Pairs | None = None
