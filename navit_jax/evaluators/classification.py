"""Accuracy, calibration and, for sets of classes, mean average precision; at several token budgets.

Scores are made in numpy from the logits of real slots, so they do not depend on how rows were packed. A logit that
is not finite raises: compared with anything it would look like the best one.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import special

from input_pipeline.errors import UserError
from input_pipeline.packed import Batch
from navit_jax import writers
from navit_jax.evaluators.outputs import LOGITS, Forward, Rows, Seen, read


class Predictions(NamedTuple):
    """What the model says of n images, in the order of the source.

    seen: their numbers, labels, tokens, and the pace of the pass. predicted: [n] int, the best class. confidence: [n]
    float64, its probability. rank: [n] int, classes before the label (for sets: before the best of them); -1: no label.
    logits: [n, C] float32 for sets of classes, else [n, 0].
    """

    seen: Seen
    predicted: np.ndarray
    confidence: np.ndarray
    rank: np.ndarray
    logits: np.ndarray


class Names(NamedTuple):
    """Of what `report` gives: prefix of its scores, file of its table and picture without an ending, its title."""

    prefix: str
    file: str
    title: str


_WHOLE = ("images", "skipped")  # the same at every budget
EVAL = Names("eval", "accuracy_over_tokens", "One model, every token budget")


def predictions(
    forward: Forward,
    params: Any,
    loader: Rows,
    put: Callable[[Batch], Any],
    *,
    num_classes: int,
    multi_label: bool = False,
    probabilities: str = "softmax",
) -> Predictions:
    """Every image of the loader once. forward(params, put(batch)) -> (logits_BKC float32, pooled_BKD).

    Raises RuntimeError if an image comes twice or a logit is not finite, UserError if no image could be used.
    """

    def keep(index: np.ndarray, labels: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, ...]:
        if logits.shape[1] != num_classes:
            raise ValueError(f"the model has {logits.shape[1]} classes, the data {num_classes}")
        return judge(index, labels, logits, probabilities)

    seen = read(forward, params, loader, put, keep, of=LOGITS, multi_label=multi_label)
    return Predictions(seen, *seen.kept)


def run(
    forward: Forward,
    params: Any,
    loader: Rows,
    put: Callable[[Batch], Any],
    *,
    num_classes: int,
    multi_label: bool = False,
    probabilities: str = "softmax",
) -> dict[str, float]:
    """Scores over every image of the loader exactly once.

    Returns top1, top5 (of at most C classes) and ece as shares over the images with a label; with `multi_label`
    top1 (the best class is one of the labels, over images that have any) and map, the mean average precision over
    the classes that occur. Besides: images, skipped, tokens (mean an image) and images_per_s.
    probabilities: ece's confidence in the best class, its softmax or its sigmoid: the one that the loss trained.
    Raises RuntimeError if an image comes twice or a logit is not finite, UserError if no image has a label.
    """
    options = dict(num_classes=num_classes, multi_label=multi_label, probabilities=probabilities)
    return scores(predictions(forward, params, loader, put, **options))


def scores(found: Predictions) -> dict[str, float]:
    """The scores of `run`, from its predictions."""
    has, seen = found.rank >= 0, found.seen
    if not has.any():
        raise UserError("no image of the held-out set has a label: accuracy needs some. Name another data.eval_source.")
    rank = found.rank[has]
    values = dict(top1=float((rank == 0).mean()))
    if seen.labels.ndim == 2:
        values["map"] = mean_average_precision(seen.labels, found.logits)
    else:
        values["top5"] = float((rank < 5).mean())
        values["ece"] = calibration_error(found.confidence[has], rank == 0)
    pace = dict(images=len(seen.index), skipped=seen.skipped, tokens=float(seen.tokens.mean()))
    return values | pace | dict(images_per_s=seen.images_per_s)


def calibration_error(confidence: np.ndarray, correct: np.ndarray, buckets: int = 30) -> float:
    """Expected calibration error: the mean gap between confidence and accuracy over equal-width buckets, by images.

    confidence: [n] in [0, 1]. correct: [n] bool. Source: Guo et al. 2017, equation 3; 30 buckets as in NaViT.
    """
    bucket = np.minimum((confidence * buckets).astype(int), buckets - 1)
    gaps = np.bincount(bucket, confidence, buckets) - np.bincount(bucket, correct, buckets)
    return float(np.abs(gaps).sum() / len(confidence))


def mean_average_precision(labels: np.ndarray, logits: np.ndarray) -> float:
    """Mean over the classes that occur of the average precision. labels: [n, C] bool. logits: [n, C]."""
    from sklearn.metrics import average_precision_score  # takes 2 s: only who has sets of classes pays for it

    occurs = np.flatnonzero(labels.any(0))
    return float(np.mean([average_precision_score(labels[:, c], logits[:, c]) for c in occurs]))


def at_budgets(
    forward: Forward,
    params: Any,
    loaders: Mapping[int, Rows],
    put: Callable[[Batch], Any],
    *,
    num_classes: int,
    multi_label: bool,
    probabilities: str,
    workdir: Path,
) -> dict[str, float]:
    """The scores of `run` at each token budget, the keys of `loaders`: `eval/top1@256`, ..., and `eval/images`.

    Writes accuracy_over_tokens.csv and .png into workdir. The model compiles once if all loaders have the same L and K.
    Options and errors are those of `run`.
    """
    options = dict(num_classes=num_classes, multi_label=multi_label, probabilities=probabilities)
    found = {budget: run(forward, params, loader, put, **options) for budget, loader in loaders.items()}
    return report(found, multi_label, workdir, EVAL)


def report(
    found: Mapping[int, Mapping[str, float]], multi_label: bool, workdir: Path, names: Names
) -> dict[str, float]:
    """The scores of each token budget under their full names; see `at_budgets`, which this ends."""
    named, rows = {}, [dict(budget=budget) | found[budget] for budget in sorted(found)]
    for row in rows:
        named |= {f"{names.prefix}/{name}": row[name] for name in _WHOLE}
        named |= {f"{names.prefix}/{k}@{row['budget']}": v for k, v in row.items() if k not in ("budget", *_WHOLE)}
    if jax.process_index() == 0:
        path = Path(workdir) / names.file
        from navit_jax import plots  # takes 0.6 s: only who draws pays for it

        writers.write_table(rows, path.with_suffix(".csv"))
        plots.accuracy_over_tokens(rows, "map" if multi_label else "top1", path.with_suffix(".png"), names.title)
    return named


def judge(
    index: np.ndarray, labels: np.ndarray, logits: np.ndarray, probabilities: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(predicted, confidence, rank, logits) of n images, as in `Predictions`; of equal logits the first is the best.

    index: [n], to name an image. logits: [n, C]. Raises RuntimeError for logits that are not finite.
    """
    if not np.isfinite(logits).all():
        bad = index[~np.isfinite(logits).all(-1)]
        raise RuntimeError(f"the logits of {len(bad)} images are not finite, the first is image {bad[0]}")
    kept = logits if labels.ndim == 2 else logits[:, :0]  # the logits of 50,000 images of 20,000 classes are 4 GB
    logits = logits.astype(np.float64)
    best = logits.max(1)
    if probabilities == "softmax":
        confidence = np.exp(best - special.logsumexp(logits, axis=1))
    elif probabilities == "sigmoid":
        confidence = special.expit(best)
    else:
        raise UserError(f"probabilities is {probabilities!r}; expected softmax or sigmoid.")
    if labels.ndim == 2:
        has, label = labels.any(1), np.where(labels, logits, -np.inf).argmax(1)
    else:
        has, label = labels >= 0, np.maximum(labels, 0)
    mine = np.take_along_axis(logits, label[:, None], axis=1)
    first = np.arange(logits.shape[1]) < label[:, None]
    rank = ((logits > mine) | ((logits == mine) & first)).sum(1)
    return logits.argmax(1), confidence, np.where(has, rank, -1), kept
