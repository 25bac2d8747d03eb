"""Promises of the evaluators: every image once, scores equal to other formulas, one compile, honest failures."""

import csv
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_source import MemorySource
from sklearn.linear_model import Ridge
from sklearn.metrics import top_k_accuracy_score

from configs import base
from input_pipeline import shots, stream
from input_pipeline.errors import UserError
from navit_jax import sharding
from navit_jax.evaluators import classification, fewshot, outputs


class Labelled(MemorySource):
    """A memory source whose labels are given; `classes` of them."""

    def __init__(self, labels, classes, **options):
        super().__init__(count=len(labels), classes=classes, **options)
        self.labels = labels

    def __getitem__(self, i):
        return super().__getitem__(i)._replace(label=self.labels[i])


def make_config(**data):
    config = base.get_config()
    config.model.variant = "Ti/8"
    config.packing.update(row_length=64, rows_per_step=2)
    config.eval.token_budgets = (4, 9, 16)
    config.data.update(num_threads=1, max_bad_share=0.5, **data)
    return config


def open_images(source):
    return stream.Images(source, source.known_sizes(), len(source.class_names))


def table_forward(table, pooled=None):
    """A model that knows each image by its number."""
    pooled = table if pooled is None else pooled
    return lambda params, batch: (table[batch.index], pooled[batch.index])


def same(batch):
    return batch


def random_case(seed, classes=7, count=40):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    labels[:2] = -1, -1  # two without a label
    labels[2 : 2 + classes] = np.arange(classes)
    logits = rng.normal(size=(count, classes)).astype(np.float32) * 3
    return labels.tolist(), logits


def calibration_oracle(confidence, correct, buckets=30):
    total = 0.0
    for low in np.arange(buckets) / buckets:
        inside = [
            i for i, c in enumerate(confidence) if low <= c < low + 1 / buckets or (c == 1 and low >= 1 - 1 / buckets)
        ]
        if inside:
            total += len(inside) / len(confidence) * abs(np.mean(confidence[inside]) - np.mean(correct[inside]))
    return total


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("seed", [0, 1])
def test_scores_equal_other_formulas(seed, kind):
    labels, logits = random_case(seed)
    source = Labelled(labels, 7, broken=(5, 11))
    loader = stream.eval_loader(make_config(), open_images(source), 9)
    got = classification.run(table_forward(logits), None, loader, same, num_classes=7, probabilities=kind)
    used = [i for i in range(40) if labels[i] >= 0 and i not in (5, 11)]
    x, y = logits[used].astype(np.float64), np.array(labels)[used]
    e = np.exp(x)
    probabilities = e / e.sum(1, keepdims=True) if kind == "softmax" else 1 / (1 + 1 / e)
    assert got["top1"] == pytest.approx((x.argmax(1) == y).mean())
    assert got["top5"] == pytest.approx(top_k_accuracy_score(y, x, k=5, labels=np.arange(7)))
    assert got["ece"] == pytest.approx(calibration_oracle(probabilities.max(1), x.argmax(1) == y), abs=1e-9)
    assert got["images"] == 38 and got["skipped"] == 2 and got["images_per_s"] > 0
    grids = loader.builder.sampler(np.array([i for i in range(40) if i not in (5, 11)])).grid
    assert got["tokens"] == pytest.approx(grids.prod(1).mean())


def test_calibration_error_of_a_sure_model():
    sure = np.array([1.0, 1.0, 1.0, 1.0])
    assert classification.calibration_error(sure, np.array([True, True, True, False])) == pytest.approx(0.25)
    assert classification.calibration_error(np.array([0.5, 0.5]), np.array([True, False])) == 0.0


def test_predictions_come_once_and_in_the_order_of_the_source():
    labels, logits = random_case(3)
    images = open_images(Labelled(labels, 7))
    for budget in (1, 9, 64):
        config = make_config()
        config.packing.look_ahead = 3
        found = classification.predictions(
            table_forward(logits), None, stream.eval_loader(config, images, budget), same, num_classes=7
        )
        assert found.seen.index.tolist() == list(range(40)) and found.seen.labels.tolist() == labels
        assert found.predicted.tolist() == logits.argmax(1).tolist()
        assert found.seen.tokens.max() <= budget and found.seen.tokens.min() >= 1


def test_unreadable_headers_are_skipped_and_counted():
    labels, logits = random_case(4)
    images = open_images(Labelled(labels, 7, broken=(8,)))
    images.sizes[[20, 30]] = 0
    loader = stream.eval_loader(make_config(), images, 9)
    got = classification.run(table_forward(logits), None, loader, same, num_classes=7)
    assert (got["images"], got["skipped"]) == (37, 3)


def test_an_image_that_comes_twice_or_not_at_all_is_refused():
    labels, logits = random_case(5)
    images = open_images(Labelled(labels, 7))
    twice = stream.eval_loader(make_config(), images, 16, indices=np.array([0, 1, 2, 30, 31, 32, 33, 1]))
    with pytest.raises(RuntimeError, match="twice"):
        list(outputs.outputs(table_forward(logits), None, twice, same))
    short = stream.eval_loader(make_config(), images, 9)
    short.rows.steps -= 1
    with pytest.raises(RuntimeError, match="never came"):
        list(outputs.outputs(table_forward(logits), None, short, same))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_no_accuracy(value):
    labels, logits = random_case(6)
    logits[17, 3] = value
    loader = stream.eval_loader(make_config(), open_images(Labelled(labels, 7)), 9)
    with pytest.raises(RuntimeError, match="image 17"):
        classification.run(table_forward(logits), None, loader, same, num_classes=7)


def test_data_without_labels_is_refused():
    loader = stream.eval_loader(make_config(), open_images(Labelled([-1] * 10, 3)), 9)
    with pytest.raises(UserError, match="label"):
        classification.run(table_forward(np.zeros((10, 3))), None, loader, same, num_classes=3)


def test_one_hot_labels_of_mixup_are_single_classes():
    labels, logits = random_case(7)
    images, config = open_images(Labelled(labels, 7)), make_config()
    hard = classification.run(table_forward(logits), None, stream.eval_loader(config, images, 9), same, num_classes=7)
    config.augment.mixup = 0.2
    soft = classification.run(table_forward(logits), None, stream.eval_loader(config, images, 9), same, num_classes=7)
    assert {k: v for k, v in hard.items() if k != "images_per_s"} == {
        k: v for k, v in soft.items() if k != "images_per_s"
    }


def test_multi_label_scores():
    rng = np.random.default_rng(8)
    sets = rng.random((30, 5)) < 0.4
    sets[:, 4] = False  # a class that never occurs
    sets[3] = False
    logits = rng.normal(size=(30, 5)).astype(np.float32)
    source = Labelled([tuple(np.flatnonzero(row).tolist()) for row in sets], 5)
    config = make_config(multi_label=True)
    got = classification.run(
        table_forward(logits),
        None,
        stream.eval_loader(config, open_images(source), 9),
        same,
        num_classes=5,
        multi_label=True,
    )
    precisions = []
    for c in range(4):
        ranked = sets[np.argsort(-logits[:, c]), c]
        precisions.append(np.mean([ranked[: i + 1].mean() for i in np.flatnonzero(ranked)]))
    some = sets.any(1)
    assert got["map"] == pytest.approx(np.mean(precisions))
    assert got["top1"] == pytest.approx(np.mean([sets[i, logits[i].argmax()] for i in np.flatnonzero(some)]))
    assert not {"top5", "ece"} & set(got)


def test_budgets_share_one_compile_and_write_their_table(tmp_path):
    labels = [i % 3 for i in range(40)]
    images, config = open_images(Labelled(labels, 3)), make_config()
    config.eval.update(token_budgets=(16, 4, 100), rows_per_step=3)
    traces = []

    @jax.jit
    def forward(params, batch):  # right from the first class on where an image has more than 4 tokens
        traces.append(batch.images.values.shape)
        slots = jnp.arange(1, batch.index.shape[1] + 1)
        tokens = (batch.images.segment_ids[:, None] == slots[:, None]).sum(-1)
        logits = jax.nn.one_hot(jnp.where(tokens > 4, batch.labels, 0), 3)
        return logits, logits

    mesh = sharding.make_mesh() if 3 % jax.device_count() == 0 else pytest.skip("needs 1 or 3 devices")
    loaders = stream.eval_loaders(config, [(images, budget, None) for budget in config.eval.token_budgets])
    assert len({loader.builder.slots for loader in loaders}) == 1
    got = classification.at_budgets(
        forward,
        None,
        dict(zip(config.eval.token_budgets, loaders)),
        partial(sharding.put, mesh, count=stream.eval_rows(config)),
        num_classes=3,
        multi_label=False,
        probabilities="softmax",
        workdir=tmp_path,
    )
    assert len(traces) == 1 and traces[0][1] == 100
    assert got["eval/top1@4"] == pytest.approx(14 / 40) and got["eval/top1@100"] == 1.0
    assert got["eval/tokens@4"] < got["eval/tokens@16"] < got["eval/tokens@100"] <= 100
    assert got["eval/images"] == 40 and got["eval/skipped"] == 0
    table = list(csv.DictReader((tmp_path / "accuracy_over_tokens.csv").open()))
    assert [row["budget"] for row in table] == ["4", "16", "100"]
    assert [float(row["top1"]) for row in table] == [got[f"eval/top1@{b}"] for b in (4, 16, 100)]
    assert (tmp_path / "accuracy_over_tokens.png").stat().st_size > 10_000


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_ridge_equals_scikit_learn(n, width, ridge, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, width)), rng.normal(size=(n, 4))
    other = Ridge(alpha=ridge, fit_intercept=False, solver="svd").fit(x, y)
    np.testing.assert_allclose(fewshot.solve_ridge(x, y, ridge), other.coef_.T, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("width", [3, 200])
def test_probe_equals_scikit_learn(width):
    rng = np.random.default_rng(0)
    x, y, test = rng.normal(2, 5, (60, width)), rng.integers(0, 4, 60), rng.normal(2, 5, (50, width))
    scale = lambda z: (z - x.mean(0)) / (x.std(0) + 1e-5)  # noqa: E731
    ones = lambda z: np.hstack([z, np.ones((len(z), 1))])  # noqa: E731
    other = Ridge(alpha=7.0, fit_intercept=False).fit(ones(scale(x)), 2 * np.eye(4)[y] - 1)
    got = fewshot.probe(x, y, test, num_classes=4, ridge=7.0)
    assert got.tolist() == other.predict(ones(scale(test))).argmax(1).tolist()
    assert len(set(got.tolist())) > 1


def test_shots_are_of_their_class_and_only_the_seed_chooses_them():
    rng = np.random.default_rng(1)
    labels = np.concatenate([np.arange(4), rng.integers(-1, 4, 3000)]).tolist()
    images = open_images(Labelled(labels, 4))
    images.sizes[::7] = 0
    a, again, b = (shots.choose_shots(images, images, 6, seed) for seed in (0, 0, 1))
    assert a.shape == (4, 6) and np.array_equal(a, again) and not np.array_equal(a, b)
    assert all(labels[i] == c for c in range(4) for i in a[c]) and len(np.unique(a)) == 24
    assert not (a % 7 == 0).any()
    assert np.array_equal(shots.choose_shots(images, images, 2, 0), a[:, :2])


def test_a_class_with_too_few_images_is_named():
    images = open_images(Labelled([0] * 20 + [1] * 3, 2))
    with pytest.raises(UserError, match="'class1' has 3"):
        shots.choose_shots(images, images, 5, 0)


def test_shots_of_multi_label_data_are_refused():
    with pytest.raises(UserError, match="multi"):
        images = open_images(Labelled([(0, 1), (1,), ()] * 5, 2))
        shots.choose_shots(images, images, 1, 0)


@pytest.mark.parametrize(
    "train, held_out", [((), ()), ((), ("cat", "dog")), (("0", "1"), ()), (("a", "b"), ("b", "a"))]
)
def test_a_probe_without_the_same_classes_on_both_sides_is_refused(train, held_out):
    """Also where the objective needs none: texts are there."""
    images, others = (open_images(Labelled([0, 1] * 5, 2)) for _ in range(2))
    images.source.class_names, others.source.class_names = train, held_out
    images = dataclasses.replace(images, texts=object())
    with pytest.raises(UserError, match="data.label_field"):
        shots.choose_shots(images, others, 1, 0)


def test_probe_reads_features_and_nothing_else():
    rng = np.random.default_rng(2)
    labels = [i % 3 for i in range(60)]
    means = rng.normal(size=(3, 8))
    good = means[np.array(labels)] + 0.02 * rng.normal(size=(60, 8))
    train, held_out = open_images(Labelled(labels, 3, broken=(4,))), open_images(Labelled(labels, 3, seed=9))
    config, mesh = make_config(), sharding.make_mesh()
    config.eval.rows_per_step = jax.device_count()
    chosen_CS = shots.choose_shots(train, held_out, 5, config.seed)
    wanted = [(train, 16, np.sort(chosen_CS.ravel())), (held_out, 16, None)]
    put = partial(sharding.put, mesh, count=stream.eval_rows(config))
    options = dict(chosen_CS=chosen_CS, shots=(5, 1), ridge=1.0)
    forward = table_forward(np.zeros((60, 3)), jnp.asarray(good))
    got = fewshot.run(forward, None, *stream.eval_loaders(config, wanted), put, **options)
    assert got == {"fewshot/top1@1shot": 1.0, "fewshot/top1@5shot": 1.0}
    forward = table_forward(np.zeros((60, 3)), jnp.asarray(rng.normal(size=(60, 8))))
    got = fewshot.run(forward, None, *stream.eval_loaders(config, wanted), put, **options)
    assert got["fewshot/top1@5shot"] < 0.75
    with pytest.raises(ValueError, match="6 shots"):
        fewshot.run(forward, None, (), (), put, **options | dict(shots=(1, 6)))
