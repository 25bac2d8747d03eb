"""Accuracy, calibration and, for sets of classes, mean average precision; at several token budgets.

Scores are made in numpy from the logits of real slots, so they do not depend on how rows were packed. A logit that
is not finite raises: compared with anything it would look like the best one.
"""

import csv
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import special
from sklearn.metrics import average_precision_score

from input_pipeline.errors import UserError
from input_pipeline.packed import Batch
from navit_jax import plots
from navit_jax.evaluators.outputs import Forward, Rows, outputs


class Predictions(NamedTuple):
    """What the model says of n images, in the order of the source.

    index: [n] int, number in the source. labels: [n] int (-1: none), or [n, C] bool for sets of classes.
    predicted: [n] int, the best class. confidence: [n] float64, its probability. rank: [n] int, classes before the
    label (for sets: before the best of them); -1: no label. logits: [n, C] float32 for sets of classes, else None.
    tokens: [n] int. images_per_s: of the whole pass, without its first step (which compiles) where there are more.
    skipped: images that could not be used.
    """

    index: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    rank: np.ndarray
    logits: np.ndarray | None
    tokens: np.ndarray
    images_per_s: float
    skipped: int


class Names(NamedTuple):
    """Of what `at_budgets` gives: prefix of its scores, file of its table and picture without an ending, its title."""

    prefix: str
    file: str
    title: str


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
    parts, times, counts = [], [time.perf_counter()], []
    for batch, logits_BKC, _ in outputs(forward, params, loader, put):
        real_BK = batch.index >= 0
        index, logits = batch.index[real_BK], np.asarray(logits_BKC)[real_BK]
        if logits.shape[1] != num_classes:
            raise ValueError(f"the model has {logits.shape[1]} classes, the data {num_classes}")
        if not np.isfinite(logits).all():
            bad = index[~np.isfinite(logits).all(-1)]
            raise RuntimeError(f"the logits of {len(bad)} images are not finite, the first is image {bad[0]}")
        labels = _labels(batch.labels[real_BK], multi_label)
        ids = batch.images.segment_ids[:, :, None] == np.arange(1, real_BK.shape[1] + 1)
        kept = logits if multi_label else logits[:, :0]  # the logits of 50,000 images of 20,000 classes are 4 GB
        parts.append((index, labels, *_judge(logits, labels, probabilities), kept, ids.sum(1)[real_BK]))
        times.append(time.perf_counter())
        counts.append(len(index))
    if not sum(counts):
        raise UserError("evaluation has no usable image: every one was refused; the log names them with their reasons.")
    fields = [np.concatenate(field) for field in zip(*parts, strict=True)]
    order = np.argsort(fields[0])
    index, labels, predicted, confidence, rank, logits, tokens = (field[order] for field in fields)
    start = int(len(counts) > 1)
    speed = sum(counts[start:]) / (times[-1] - times[start])
    skipped = len(loader.builder.sampler.indices) - len(index)
    logits = logits if multi_label else None
    return Predictions(index, labels, predicted, confidence, rank, logits, tokens, speed, skipped)


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
    found = predictions(forward, params, loader, put, **options)
    has = found.rank >= 0
    if not has.any():
        raise UserError("no image of the held-out set has a label: accuracy needs some. Name another data.eval_source.")
    rank = found.rank[has]
    scores = dict(top1=float((rank == 0).mean()))
    if multi_label:
        scores["map"] = mean_average_precision(found.labels, found.logits)
    else:
        scores["top5"] = float((rank < 5).mean())
        scores["ece"] = calibration_error(found.confidence[has], rank == 0)
    pace = dict(images=len(found.index), skipped=found.skipped, tokens=float(found.tokens.mean()))
    return scores | pace | dict(images_per_s=found.images_per_s)


def calibration_error(confidence: np.ndarray, correct: np.ndarray, buckets: int = 30) -> float:
    """Expected calibration error: the mean gap between confidence and accuracy over equal-width buckets, by images.

    confidence: [n] in [0, 1]. correct: [n] bool. Source: Guo et al. 2017, equation 3; 30 buckets as in NaViT.
    """
    bucket = np.minimum((confidence * buckets).astype(int), buckets - 1)
    gaps = np.bincount(bucket, confidence, buckets) - np.bincount(bucket, correct, buckets)
    return float(np.abs(gaps).sum() / len(confidence))


def mean_average_precision(labels: np.ndarray, logits: np.ndarray) -> float:
    """Mean over the classes that occur of the average precision. labels: [n, C] bool. logits: [n, C]."""
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
    names: Names = EVAL,
) -> dict[str, float]:
    """The scores of `run` at each token budget, the keys of `loaders`: `eval/top1@256`, ..., and `eval/images`.

    Writes accuracy_over_tokens.csv and .png into workdir; `names` may say otherwise. The model compiles once if all
    loaders have the same L and K. Options and errors are those of `run`.
    """
    options = dict(num_classes=num_classes, multi_label=multi_label, probabilities=probabilities)
    rows, scores = [], {}
    for budget, loader in sorted(loaders.items()):
        found = run(forward, params, loader, put, **options)
        rows.append(dict(budget=budget) | found)
        whole = {f"{names.prefix}/{name}": found.pop(name) for name in ("images", "skipped")}
        scores |= {f"{names.prefix}/{name}@{budget}": value for name, value in found.items()} | whole
    if jax.process_index() == 0:
        _write(rows, Path(workdir), "map" if multi_label else "top1", names)
    return scores


def _labels(labels: np.ndarray, multi_label: bool) -> np.ndarray:
    """Labels of n images; single classes may come as one-hot rows, as mixup needs them in training."""
    if multi_label:
        return labels > 0
    return labels if labels.ndim == 1 else np.where(labels.any(-1), labels.argmax(-1), -1)


def _judge(logits: np.ndarray, labels: np.ndarray, probabilities: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(predicted, confidence, rank) of n images; of equal logits the first class is before the others."""
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
    return logits.argmax(1), confidence, np.where(has, rank, -1)


def _write(rows: Sequence[dict], workdir: Path, score: str, names: Names) -> None:
    with (workdir / f"{names.file}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    plots.accuracy_over_tokens(rows, score, workdir / f"{names.file}.png", names.title)
