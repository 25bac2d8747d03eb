"""Image-text retrieval, recall at 1, 5 and 10 both ways, without ever holding all scores of all pairs.

Equal captions have equal numbers, and any item with the query's number is a hit. Ties count against the query: an item
of another number that scores as high as the best hit comes before it, so that vectors which are all the same score 0
and not 1. Products are float64: a float32 product depends on the shape of its block by more than what tells a tie.
"""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from input_pipeline.errors import UserError
from navit_jax import plots
from navit_jax.evaluators import texts
from navit_jax.evaluators.outputs import Forward, Rows, outputs

AT = (1, 5, 10)
_TIE = 1e-9  # scores of vectors of length 1; float64 rounds them at 1e-16, float32 vectors say nothing below 1e-8


def ranks(
    x_NE: np.ndarray, number_N: np.ndarray, y_ME: np.ndarray, number_M: np.ndarray, *, block: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """How many items of the other side, of another number, come before a query's best hit: of x over y, of y over x.

    x, y: vectors of length 1; numbers: int, equal for what belongs together. Returns [N] and [M] int64; -1: no item has
    the query's number. Ties count as before. Memory is O(block^2 + block E + N + M); with both sides sorted by number
    the work is one product of x and y, else up to two.
    """
    best_N, best_M = np.full(len(x_NE), -np.inf), np.full(len(y_ME), -np.inf)
    for n, m, same in _blocks(number_N, number_M, block):
        if same.any():
            scores = np.where(same, _product(x_NE[n], y_ME[m]), -np.inf)
            best_N[n], best_M[m] = np.maximum(best_N[n], scores.max(1)), np.maximum(best_M[m], scores.max(0))
    before_N, before_M = np.zeros(len(x_NE), np.int64), np.zeros(len(y_ME), np.int64)
    for n, m, same in _blocks(number_N, number_M, block):
        scores = np.where(same, -np.inf, _product(x_NE[n], y_ME[m]) + _TIE)
        before_N[n] += (scores >= best_N[n, None]).sum(1)
        before_M[m] += (scores >= best_M[m]).sum(0)
    return np.where(np.isinf(best_N), -1, before_N), np.where(np.isinf(best_M), -1, before_M)


def recalls(image_ranks: np.ndarray, text_ranks: np.ndarray) -> dict[str, float]:
    """i2t_r1, ..., t2i_r10: shares of the queries that have a hit at all and have one among the first k."""
    sides = dict(i2t=image_ranks, t2i=text_ranks)
    return {f"{side}_r{k}": float((rank[rank >= 0] < k).mean()) for side, rank in sides.items() for k in AT}


def run(
    forward: Forward,
    forward_texts: texts.ForwardTexts,
    params: Any,
    loaders: Mapping[int, Rows],
    put: Callable[[Any], Any],
    ids: Sequence[np.ndarray],
    numbers: Sequence[int],
    *,
    rows: int,
    workdir: Path,
    local: Sequence[int] | None = None,
) -> dict[str, float]:
    """Recall among all pairs at each token budget of the images, the keys of `loaders`: `retrieval/i2t_r1@256`, ...

    forward(params, batch) -> (anything, z_BKE of length 1). ids[i], numbers[i]: tokens of image i's text, and a number
    that equal texts share; no tokens: image i takes no part. Only the images that the loaders should give take part,
    all pairs one by one: a caption that comes twice is twice in every list. Images that turn out unusable are missing
    from their side, and their texts stay. put, rows, local: of images and of texts; see `texts.encode`.
    Writes retrieval.csv and retrieval_over_tokens.png into workdir; returns `retrieval/images` and `retrieval/texts`
    (different ones) besides. Raises UserError if no image has a text, or none with one is usable, RuntimeError for
    vectors that are not finite.
    """
    wanted = np.unique(np.concatenate([loader.builder.sampler.indices for loader in loaders.values()]))
    paired, number_M = _pairs(wanted, ids, numbers)
    different, first, which_M = np.unique(number_M, return_index=True, return_inverse=True)
    unique = [ids[i] for i in paired[first].tolist()]
    z_ME = texts.encode(forward_texts, params, unique, put, rows=rows, local=local)[which_M]
    table, scores = [], {"retrieval/texts": len(different)}
    for budget, loader in sorted(loaders.items()):
        index, z_NE, tokens = _images(forward, params, loader, put)
        place = np.full(wanted[-1] + 1, -1)
        place[index] = np.arange(len(index))
        usable = place[paired] >= 0
        if not usable.any():
            raise UserError("retrieval has no usable image: every one was refused; the log names them with reasons.")
        found = recalls(*ranks(z_NE[place[paired[usable]]], number_M[usable], z_ME, number_M))
        table.append(dict(budget=budget, images=int(usable.sum()), texts=len(different), tokens=tokens) | found)
        scores |= {f"retrieval/{name}@{budget}": value for name, value in found.items()}
        scores["retrieval/images"] = int(usable.sum())
    if jax.process_index() == 0:
        _write(table, Path(workdir))
    return scores


def _pairs(wanted: np.ndarray, ids: Sequence[np.ndarray], numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The wanted images that have a text, and its number, int64 both; by number, which halves the work of `ranks`."""
    paired = np.array([i for i in wanted.tolist() if len(ids[i])], np.int64)
    if not len(paired):
        raise UserError(
            f"none of the {len(wanted)} held-out images has a text: retrieval needs pairs. Name another "
            "data.eval_source, or the field of its texts in data.text_field."
        )
    number_M = np.array([numbers[i] for i in paired.tolist()], np.int64)
    order = np.argsort(number_M, kind="stable")
    return paired[order], number_M[order]


def _images(
    forward: Forward, params: Any, loader: Rows, put: Callable[[Any], Any]
) -> tuple[np.ndarray, np.ndarray, float]:
    """(index [n], vectors [n, E] float32, mean tokens an image) of every usable image of the loader."""
    parts, tokens = [], 0
    for batch, _, z_BKE in outputs(forward, params, loader, put):
        real_BK = batch.index >= 0
        parts.append((batch.index[real_BK], np.asarray(z_BKE)[real_BK].astype(np.float32)))
        tokens += int((batch.images.segment_ids > 0).sum())
    index, z_NE = (np.concatenate(field) for field in zip(*parts, strict=True))
    bad = index[~np.isfinite(z_NE).all(1)]
    if len(bad):
        raise RuntimeError(f"the vectors of {len(bad)} images are not finite, the first is image {bad[0]}")
    return index, z_NE, tokens / max(1, len(index))


def _blocks(number_N: np.ndarray, number_M: np.ndarray, block: int) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """(rows, columns, which of their pairs have equal numbers) of each block of the N x M pairs."""
    for i in range(0, len(number_N), block):
        for j in range(0, len(number_M), block):
            n, m = slice(i, i + block), slice(j, j + block)
            yield n, m, number_N[n, None] == number_M[m]


def _product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) @ y.astype(np.float64).T


def _write(table: Sequence[dict], workdir: Path) -> None:
    with (workdir / "retrieval.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    plots.retrieval_over_tokens(table, AT, workdir / "retrieval_over_tokens.png")
