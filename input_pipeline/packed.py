"""The contract between data and model: one batch of packed rows.

A `NamedTuple` because jax and grain both treat it as a pytree, and numpy alone can make it: this file imports no jax,
so loader processes never start an accelerator runtime for it.
"""

from typing import NamedTuple

import numpy as np


class Packed(NamedTuple):
    """Rows of packed tokens; B rows, L tokens a row, K image slots a row, P values a patch.

    values: [B, L, P] uint8 or uint16 pixels in (frame, row, column, channel) order, or [B, L] int32 text tokens.
    segment_ids: [B, L] int32, 1..K = slot of the row, 0 = padding; contiguous, ascending, padding last.
    coords: [B, L, 3] int32, (t, y, x) of the patch in its own grid, in (t, y, x) order within a segment.
    grids: [B, K, 3] int32, (frames, rows, columns) of the full grid before token dropping; 0 = empty slot.
    """

    values: np.ndarray
    segment_ids: np.ndarray
    coords: np.ndarray
    grids: np.ndarray


class Batch(NamedTuple):
    """What a step reads: packed rows and what rides beside them, per slot. A pytree.

    labels: [B, K] int32 (-1: none), or [B, K, C] float32 for sets of classes and blends.
    index: [B, K] int32, the image's number in its source; -1: empty slot.
    """

    images: Packed
    labels: np.ndarray
    index: np.ndarray
