"""Few-shot linear probe on frozen features: the paper's measure of a representation (ImageNet, 10 shots).

A ridge regression has a closed form, so there is nothing to tune but its penalty: no learning rate, no epochs, and
the same number every time.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from input_pipeline.errors import UserError
from input_pipeline.packed import Batch
from navit_jax.evaluators.outputs import Forward, Rows, vectors


def run(
    forward: Forward,
    params: Any,
    train_loader: Rows,
    eval_loader: Rows,
    put: Callable[[Batch], Any],
    *,
    chosen_CS: np.ndarray,
    shots: Iterable[int],
    ridge: float,
) -> dict[str, float]:
    """Top-1 accuracy of a probe fitted on a few training images a class: `fewshot/top1@10shot`, ...

    train_loader: rows of the images `chosen_CS`, [C, S] their numbers in the source; n shots are the first n of each
    class. eval_loader: rows of the images to classify. ridge: the penalty of `probe`. Images need one class each.
    Raises RuntimeError for features that are not finite, UserError if no image to classify has a label, ValueError for
    more than S shots.
    """
    shots = sorted(set(shots))
    if shots[-1] > chosen_CS.shape[1]:
        raise ValueError(f"{shots[-1]} shots are asked for, but {chosen_CS.shape[1]} images a class were chosen")
    train, test = (vectors(forward, params, rows, put) for rows in (train_loader, eval_loader))
    x, x_test = (seen.kept[0].astype(np.float64) for seen in (train, test))
    labelled, scores = test.labels >= 0, {}
    if not labelled.any():
        raise UserError("no image of the held-out set has a label: a probe needs some. Name another data.eval_source.")
    for n in shots:
        part = np.isin(train.index, chosen_CS[:, :n])
        classes = probe(x[part], train.labels[part], x_test, num_classes=len(chosen_CS), ridge=ridge)
        scores[f"fewshot/top1@{n}shot"] = float((classes == test.labels)[labelled].mean())
    return scores


def probe(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, *, num_classes: int, ridge: float) -> np.ndarray:
    """Classes [m] that a linear probe gives x_test [m, D] after seeing x [n, D] with classes y [n].

    Features are standardised by x and get a column of ones; targets are 1 for the class and -1 elsewhere;
    w = (X^T X + ridge I)^-1 X^T Y in float64, by the smaller of the two equal systems, D + 1 or n unknowns a class.
    """
    mean, std = x.mean(0), x.std(0) + 1e-5
    x, x_test = (np.pad((z - mean) / std, ((0, 0), (0, 1)), constant_values=1.0) for z in (x, x_test))
    return (x_test @ solve_ridge(x, 2.0 * np.eye(num_classes)[y] - 1.0, ridge)).argmax(1)


def solve_ridge(x: np.ndarray, y: np.ndarray, ridge: float) -> np.ndarray:
    """argmin_w |x w - y|^2 + ridge |w|^2 for x [n, D] and y [n, C]; [D, C] float64."""
    n, width = x.shape
    if width <= n:
        return np.linalg.solve(x.T @ x + ridge * np.eye(width), x.T @ y)
    return x.T @ np.linalg.solve(x @ x.T + ridge * np.eye(n), y)
