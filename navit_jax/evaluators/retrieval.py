"""Image-text retrieval, recall at 1, 5 and 10 both ways, without ever holding all scores of all pairs.

Equal captions have equal numbers. An image is there once, however many captions it has; they are all its hits, and so
is any caption of another image that equals one of them. Ties count against the query: an item that is no hit and scores
as high as the best hit comes before it, so that vectors which are all the same score 0 and not 1. Products are float64:
a float32 product depends on the shape of its block by more than what tells a tie.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from input_pipeline.errors import UserError
from navit_jax import writers
from navit_jax.evaluators import texts
from navit_jax.evaluators.outputs import Seen

AT = (1, 5, 10)
_TIE = 1e-9  # scores of vectors of length 1; float64 rounds them at 1e-16, float32 vectors say nothing below 1e-8


class Captions(Protocol):
    """The texts of a source, one for each example; see `input_pipeline.text_index.Texts`."""

    numbers: np.ndarray  # [N] int, equal for equal texts; -1: none
    lengths: np.ndarray  # [N] int, tokens; 0: none

    def ids(self, i: int) -> np.ndarray:
        """The token ids of example i, [lengths[i]] int32."""


def ranks(
    x_NE: np.ndarray, numbers_NC: np.ndarray, y_ME: np.ndarray, number_M: np.ndarray, *, block: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """How many items of the other side, none of them hits, come before a query's best hit: of x over y, of y over x.

    x, y: vectors of length 1. number_M: int, 0 or more. numbers_NC: int; x_n belongs to each y_m whose number is among
    its C, padded with -1. Returns [N] and [M] int64; -1: nothing belongs to the query. Ties count as before. Memory is
    O(block^2 + block E + N C + M); where both sides are sorted by number the work is one product of x and y, else up
    to two.
    """
    best_N, best_M = np.full(len(x_NE), -np.inf), np.full(len(y_ME), -np.inf)
    for n, m, same in _blocks(numbers_NC, number_M, block):
        if same.any():
            scores = np.where(same, _product(x_NE[n], y_ME[m]), -np.inf)
            best_N[n], best_M[m] = np.maximum(best_N[n], scores.max(1)), np.maximum(best_M[m], scores.max(0))
    before_N, before_M = np.zeros(len(x_NE), np.int64), np.zeros(len(y_ME), np.int64)
    for n, m, same in _blocks(numbers_NC, number_M, block):
        scores = np.where(same, -np.inf, _product(x_NE[n], y_ME[m]) + _TIE)
        before_N[n] += (scores >= best_N[n, None]).sum(1)
        before_M[m] += (scores >= best_M[m]).sum(0)
    return np.where(np.isinf(best_N), -1, before_N), np.where(np.isinf(best_M), -1, before_M)


def recalls(image_ranks: np.ndarray, text_ranks: np.ndarray) -> dict[str, float]:
    """i2t_r1, ..., t2i_r10: shares of the queries that have a hit at all and have one among the first k."""
    sides = dict(i2t=image_ranks, t2i=text_ranks)
    return {f"{side}_r{k}": float((rank[rank >= 0] < k).mean()) for side, rank in sides.items() for k in AT}


def run(
    seen: Mapping[int, Seen],
    forward_texts: texts.ForwardTexts,
    params: Any,
    put: Callable[[Any], Any],
    captions: Captions,
    files: np.ndarray | None = None,
    *,
    rows: int,
    workdir: Path,
    local: Sequence[int] | None = None,
) -> dict[str, float]:
    """Recall among all pairs at each token budget of the images, the keys of `seen`: `retrieval/i2t_r1@256`, ...

    seen: of `outputs.vectors`, of length 1. captions: the text of each example of the source, none: it takes no part.
    files: [N] int, equal for the examples that are one image with several texts; None: all different. The images that
    should have come take part, each once, with all texts of their examples, one by one: a text that comes twice is
    twice in every list. Images that turned out unusable are missing from their side, and their texts stay.
    put, rows, local: of the texts; see `texts.encode`.
    Writes retrieval.csv and retrieval_over_tokens.png into workdir; returns `retrieval/images` and `retrieval/texts`
    (different ones) besides. Raises UserError if no image has a text, or none with one is usable.
    """
    files = np.arange(len(captions.numbers)) if files is None else files
    pairs = _pairs(np.unique(np.concatenate([one.wanted for one in seen.values()])), captions, files)
    file_M, number_M = files[pairs], captions.numbers[pairs]
    different, first, which_M = np.unique(number_M, return_index=True, return_inverse=True)
    ids = [captions.ids(i) for i in pairs[first].tolist()]
    z_ME = texts.encode(forward_texts, params, ids, put, rows=rows, local=local)[which_M]
    table, named = [], {"retrieval/texts": len(different)}
    for budget, one in sorted(seen.items()):
        x_NE, numbers_NC = _images(one, files, file_M, number_M)
        found = recalls(*ranks(x_NE, numbers_NC, z_ME, number_M))
        counts = dict(images=len(x_NE), texts=len(different), tokens=float(one.tokens.mean()))
        table.append(dict(budget=budget) | counts | found)
        named |= {f"retrieval/{name}@{budget}": value for name, value in found.items()}
        named["retrieval/images"] = len(x_NE)
    if jax.process_index() == 0:
        from navit_jax import plots  # takes 0.6 s: only who draws pays for it

        writers.write_table(table, Path(workdir) / "retrieval.csv")
        plots.retrieval_over_tokens(table, AT, Path(workdir) / "retrieval_over_tokens.png")
    return named


def _pairs(wanted: np.ndarray, captions: Captions, files: np.ndarray) -> np.ndarray:
    """The examples with a text whose image is wanted, [M] int64, by the text's number: half the work of `ranks`."""
    pairs = np.flatnonzero((captions.lengths > 0) & np.isin(files, files[wanted]))
    if not len(pairs):
        raise UserError(
            f"none of the {len(wanted)} held-out images has a text: retrieval needs pairs. Name another "
            "data.eval_source, or the field of its texts in data.text_field."
        )
    return pairs[np.argsort(captions.numbers[pairs], kind="stable")]


def _images(seen: Seen, files: np.ndarray, file_M: np.ndarray, number_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [N, E] of the usable images that have a text, of each the first example's, and its numbers [N, C].

    Numbers are padded with -1; images come in the order of their first number, which the ascending number_M gives.
    """
    images, first = np.unique(files[seen.index], return_index=True)
    here = np.isin(images, file_M)
    images, first = images[here], first[here]
    if not len(images):
        raise UserError("retrieval has no usable image: every one was refused; the log names them with their reasons.")
    image, number = (x[np.isin(file_M, images)] for x in (file_M, number_M))
    order = np.argsort(image, kind="stable")
    image, number = np.searchsorted(images, image[order]), number[order]
    place = np.arange(len(image)) - np.searchsorted(image, image)
    numbers_NC = np.full((len(images), place.max() + 1), -1, np.int64)
    numbers_NC[image, place] = number
    order = np.argsort(numbers_NC[:, 0], kind="stable")
    return seen.kept[0][first[order]], numbers_NC[order]


def _blocks(numbers_NC: np.ndarray, number_M: np.ndarray, block: int) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """(rows, columns, which of their pairs belong together) of each block of the N x M pairs."""
    for i in range(0, len(numbers_NC), block):
        for j in range(0, len(number_M), block):
            n, m = slice(i, i + block), slice(j, j + block)
            same = np.zeros((len(numbers_NC[n]), len(number_M[m])), bool)
            for number_N in numbers_NC[n].T:  # all C at once would be C times the memory
                same |= number_N[:, None] == number_M[m]
            yield n, m, same


def _product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) @ y.astype(np.float64).T
