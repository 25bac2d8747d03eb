"""Few-shot linear probe on frozen features: the paper's measure of a representation (ImageNet, 10 shots).

A ridge regression has a closed form, so there is nothing to tune but its penalty: no learning rate, no epochs, and
the same number every time.
"""

from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from input_pipeline import keys
from input_pipeline.errors import DecodeError, UserError
from input_pipeline.loader import Loader
from input_pipeline.stream import Images
from navit_jax.evaluators.outputs import Forward, eval_rows, outputs, putter, same_shapes


def run(
    forward: Forward, params: Any, config: ConfigDict, train_images: Images, eval_images: Images, mesh: Mesh
) -> dict[str, float]:
    """Top-1 accuracy of a probe fitted on a few training images a class: `fewshot/top1@10shot`, ...

    The shots are `config.eval.fewshot_shots`, at the largest token budget; fewer shots are the first of more.
    Raises UserError for multi-label data and for classes with too few images.
    """
    shots = sorted(set(config.eval.fewshot_shots))
    if config.data.multi_label:
        raise UserError(
            "the few-shot probe needs one class an image: set --config.eval.fewshot_shots=() for multi-label"
        )
    chosen_CS = choose_shots(train_images, shots[-1], config.seed)
    budget = max(config.eval.token_budgets)
    loaders = same_shapes(config, [(train_images, budget, np.sort(chosen_CS.ravel())), (eval_images, budget, None)])
    put = putter(mesh, eval_rows(config))
    (index, x, y), (_, x_test, y_test) = (features(forward, params, loader, put) for loader in loaders)
    scores = {}
    for n in shots:
        part = np.isin(index, chosen_CS[:, :n])
        classes = probe(x[part], y[part], x_test, num_classes=len(chosen_CS), ridge=config.eval.fewshot_ridge)
        labelled = y_test >= 0
        scores[f"fewshot/top1@{n}shot"] = float((classes == y_test)[labelled].mean())
    return scores


def choose_shots(images: Images, shots: int, seed: int) -> np.ndarray:
    """Images a class, [C, shots] int64: the first of each in a shuffle of the source that only the seed decides.

    Labels are read along the shuffle until every class has enough: about 30 thousand of ImageNet's 1.28 million for 10
    shots. Raises UserError naming a class with fewer readable images.
    """
    source = images.source
    names, size = source.class_names, len(source)
    chosen = [[] for _ in names]
    missing = len(names)
    for start in range(0, size, 1024):
        position = np.arange(start, min(size, start + 1024))
        for i in keys.permute(position, size, seed, np.zeros_like(position)).tolist():
            if not missing:
                return np.array(chosen)
            label = _label(images, i)
            if label >= 0 and len(chosen[label]) < shots:
                chosen[label].append(i)
                missing -= len(chosen[label]) == shots
    if missing:
        label = min(range(len(names)), key=lambda c: len(chosen[c]))
        raise UserError(
            f"{shots} shots a class are asked for, but {names[label]!r} has {len(chosen[label])} readable training "
            f"images. Set --config.eval.fewshot_shots={max(1, len(chosen[label]))}, or () for no probe."
        )
    return np.array(chosen)


def features(forward: Forward, params: Any, loader: Loader, put: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(index [n], pooled features [n, D] float64, labels [n], -1: none) of every usable image of the loader."""
    parts = []
    for batch, _, pooled_BKD in outputs(forward, params, loader, put):
        real_BK = batch.index >= 0
        labels = batch.labels[real_BK]
        if labels.ndim == 2:  # mixup makes one-hot rows of all labels
            labels = np.where(labels.any(-1), labels.argmax(-1), -1)
        parts.append((batch.index[real_BK], np.asarray(pooled_BKD)[real_BK].astype(np.float64), labels))
    index, x, y = (np.concatenate(field) for field in zip(*parts, strict=True))
    if not np.isfinite(x).all():
        raise RuntimeError(f"the features of image {index[~np.isfinite(x).all(1)][0]} are not finite")
    return index, x, y


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


def _label(images: Images, i: int) -> int:
    """The class of image i; -1 where it has none or cannot be read."""
    if images.sizes[i].min() == 0:
        return -1
    try:
        return int(images.source[i].label)
    except (DecodeError, OSError):
        return -1
