"""The benchmark: compute is equal and counted right, the ceiling and the price of dense attention are true."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import common, equal_compute, images_for_compute, native_figure, native_vs_square
from benchmarks.equal_compute import NATIVE, SQUARE, SQUASHED
from configs import base
from input_pipeline import stream
from input_pipeline.sources.shapes import ASPECTS
from navit_jax import navit


@pytest.mark.parametrize("name", [NATIVE, SQUASHED, SQUARE])
def test_planned_flops_are_those_of_the_rows_that_come(name):
    run = equal_compute.build(equal_compute.recipe(name))
    for (batch, _), planned in zip(run.rows.loader(3), equal_compute.planned_flops(run), strict=False):
        lengths = [n for row in batch.images.segment_ids for n in np.bincount(row)[1:] if n]
        assert len(lengths) == (batch.index >= 0).sum()
        assert planned == pytest.approx(3 * navit.flops_forward(run.model, lengths))
        squares = batch.images.grids[..., 1] == batch.images.grids[..., 2]
        assert squares.all() == (name != NATIVE)
        if name == SQUARE:
            assert set(lengths) == {equal_compute.TOKENS} and batch.index.shape[1] == 1


@pytest.mark.parametrize(("budget", "steps"), [(0.1, 1), (1.4, 1), (1.6, 2), (5.4, 3)])
def test_steps_come_nearest_to_the_budget(monkeypatch, budget, steps):
    monkeypatch.setattr(equal_compute, "planned_flops", lambda run: iter([1.0, 1.0, 3.0, 10.0]))
    assert equal_compute.steps_within(None, budget) == steps


def test_the_ceiling_is_what_the_best_guess_reaches():
    rng, spread = np.random.default_rng(0), 0.8
    own = np.log(list(ASPECTS.values()))
    label = rng.integers(0, 3, 400_000)
    seen = own[label] - rng.uniform(-spread, spread, len(label))
    bins = np.digitize(seen, np.linspace(-1.5, 1.5, 400))
    counts = np.zeros((402, 3))
    np.add.at(counts, (bins, label), 1)
    assert counts.max(1).sum() / counts.sum() == pytest.approx(equal_compute.ceiling(spread), abs=0.01)


@pytest.mark.parametrize(("width", "overhead"), [(1024, 0.28), (4096, 0.07)])
def test_dense_attention_costs_what_the_formula_says(width, overhead):
    """(k - 1) n / (6 d + n) for k = 8 images of n = 256 tokens; the patch embedding and the head are left out of it."""
    model = {**base.model(), "width": width, "depth": 24, "heads": 16, "mlp_dim": 4 * width, "pool": "mean"}
    cfg = navit.from_config(model, channels=3, num_classes=0)
    useful = navit.flops_forward(cfg, [256] * 8)
    assert images_for_compute.dense_flops(cfg, 1, 8 * 256, 8) / useful - 1 == pytest.approx(overhead, abs=0.01)


def test_costs_of_planned_rows_agree_with_each_other():
    sizes = np.load(images_for_compute.SIZES)["sizes"][:3000].astype(np.int64)
    found = images_for_compute.costs("B/16", sizes)
    large, small, none, *dropping = found
    assert large.flops / small.flops > 256 / 196
    for cost in [none, *dropping]:
        assert cost.images * cost.tokens == pytest.approx(256 * cost.fill)
        assert cost.flops < cost.dense_flops < large.flops
    assert none.dropped == 0 and all(0.2 < cost.dropped < 0.6 for cost in dropping)
    header, rows = images_for_compute.table(found)
    assert all(len(row) == len(header) for row in rows)
    assert "4.87 images" in images_for_compute.conclusion(found)


def test_the_pictures_differ_in_aspect_natively_and_not_squashed():
    (_, native), (_, squashed) = native_vs_square.pictures()
    assert all(image.shape == (80, 80, 3) for image in squashed)
    aspects = np.array([image.shape[1] / image.shape[0] for image in native])
    assert np.allclose(aspects, [1, 1.5, 1 / 1.5] * 2)
    assert all(image.max() > 150 for image in native + squashed)


def test_a_short_training_counts_what_it_trained_on(monkeypatch, tmp_path):
    monkeypatch.setattr(equal_compute, "SUBSET", 20)
    monkeypatch.setattr(equal_compute, "POINTS", 2)
    config = equal_compute.recipe(SQUARE)
    config.model.update(width=16, depth=1, heads=2, mlp_dim=32)
    run = equal_compute.build(config)
    run.every = run.some
    found = equal_compute.train(SQUARE, run, 3, 1e-3)
    assert (found.steps, found.images, found.tokens) == (3, 60, 1500)
    assert found.flops == pytest.approx(3 * navit.flops_forward(run.model, [25] * 60))
    assert len(found.curve) == 2 and found.curve[-1] == (found.flops, found.top1) and found.seconds > 0
    results = [found._replace(name=name) for name in (NATIVE, SQUASHED, SQUARE)]
    native_figure.draw(results, native_vs_square.pictures(), 16, 0.578, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_the_command_writes_page_picture_and_rows(monkeypatch, tmp_path):
    monkeypatch.setattr(equal_compute, "SUBSET", 20)
    monkeypatch.setattr(equal_compute, "POINTS", 2)
    native_vs_square.main(["--steps", "4", "--out", str(tmp_path / "a/page"), "--json", str(tmp_path / "rows.json")])
    page = (tmp_path / "a/page.md").read_text()
    assert page.count("\n| --- |") == 2 and common.machine() in page and (tmp_path / "a/page.png").exists()
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert all(row["ratio"] == pytest.approx(row["ours"] / row["peer"]) for row in rows)
    models = SimpleNamespace(native=rows[0]["details"][0], peers=[row["details"][1] for row in rows[:2]])
    step = models.native["flops"] / models.native["steps"]
    assert all(abs(peer["flops"] - models.native["flops"]) < 0.6 * step for peer in models.peers)


def test_recipes_differ_only_where_they_should():
    native, squashed = equal_compute.recipe(NATIVE), equal_compute.recipe(SQUASHED)
    squashed.data.squash, squashed.optim.lr = native.data.squash, native.optim.lr
    assert native == squashed and stream.patch_size(native) == 16
