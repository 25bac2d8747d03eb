"""The pass over texts that evaluators share: every text through the text tower exactly once.

A step is dispatched before the one before it is read, as for images. Every process plans all rows, which costs
microseconds a text, and hands over only its own; the vectors come back whole everywhere.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from input_pipeline.packed import Packed
from input_pipeline.pairing import text_batches

ForwardTexts = Callable[[Any, Any], Any]  # (params, texts) -> z_BME


def encode(
    forward_texts: ForwardTexts,
    params: Any,
    ids: Sequence[np.ndarray],
    put: Callable[[Packed], Any],
    *,
    rows: int,
    local: Sequence[int] | None = None,
) -> np.ndarray:
    """Vectors [n, E] float32 of n texts, in their order. forward_texts(params, put(texts)) -> z_BME, whole everywhere.

    ids: the token ids of each text; one text or more. rows: B of a step, of which `put` takes this process's, `local`
    (None: all). Raises UserError for a text without tokens, RuntimeError for one that does not come exactly once or
    whose vector is not finite.
    """
    parts, pending = [], None

    def read(index_BM: np.ndarray, z_BME: Any) -> None:
        real_BM = index_BM >= 0
        parts.append((index_BM[real_BM], np.asarray(z_BME)[real_BM].astype(np.float32)))

    for packed, index_BM in text_batches(ids, rows):
        here = packed if local is None else Packed(*(x[list(local)] for x in packed.arrays))
        done, pending = pending, (index_BM, forward_texts(params, put(here)))
        if done:
            read(*done)
    read(*pending)
    index, z_NE = (np.concatenate(field) for field in zip(*parts, strict=True))
    times = np.bincount(index, minlength=len(ids))
    if (times != 1).any():
        wrong = np.flatnonzero(times != 1)
        raise RuntimeError(f"{len(wrong)} texts did not come once; the first, {wrong[0]}, came {times[wrong[0]]} times")
    bad = index[~np.isfinite(z_NE).all(1)]
    if len(bad):
        raise RuntimeError(f"the vectors of {len(bad)} texts are not finite, the first is text {bad.min()}")
    return z_NE[np.argsort(index)]
