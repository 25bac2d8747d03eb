"""Benchmarks: compute is equal and counted right, ceilings and prices are true, sides see the same rows in turn."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import (
    attention,
    common,
    equal_compute,
    images,
    images_for_compute,
    native_figure,
    native_vs_square,
    ours,
    train_step,
)
from benchmarks.equal_compute import NATIVE, SQUARE, SQUASHED
from configs import base
from input_pipeline import patches, stream
from input_pipeline.capacity import Capacity
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


@pytest.mark.slow
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
    assert page.count("\n| --- |") == 2 and common.machine() in page and (tmp_path / "a/page.webp").exists()
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert all(row["ratio"] == pytest.approx(row["ours"] / row["peer"]) for row in rows)
    models = SimpleNamespace(native=rows[0]["details"][0], peers=[row["details"][1] for row in rows[:2]])
    step = models.native["flops"] / models.native["steps"]
    assert all(abs(peer["flops"] - models.native["flops"]) < 0.6 * step for peer in models.peers)


def test_recipes_differ_only_where_they_should():
    native, squashed = equal_compute.recipe(NATIVE), equal_compute.recipe(SQUASHED)
    squashed.data.squash, squashed.optim.lr = native.data.squash, native.optim.lr
    assert native == squashed and stream.patch_size(native) == 16


def test_the_ratio_is_that_of_pairs_not_of_medians():
    """A machine that slows down in the middle of a measurement slows both of a pair."""
    ours, peer = iter([9.0, 1.0, 10.0, 1.0, 10.0]), iter([9.0, 2.0, 20.0, 2.0, 20.0])
    found = common.paired(ours.__next__, peer.__next__, repeats=4)
    assert found.ratio == 2 and (found.ours, found.peer) == (5.5, 11)


def test_rows_of_json_are_plain(tmp_path):
    rows = [common.row("peer L256", "images/s", np.float32(2), 1, np.float64(2))]
    common.write_rows(tmp_path / "a/rows.json", rows)
    assert json.loads((tmp_path / "a/rows.json").read_text()) == [
        {"name": "peer L256", "unit": "images/s", "ours": 2.0, "peer": 1.0, "ratio": 2.0}
    ]
    common.write_rows(None, rows)


@pytest.mark.parametrize(("length", "rows"), [(256, 24), (1024, 6), (2048, 3)])
def test_measured_rows_are_those_of_a_run(length, rows):
    grids = images.draw_grids(train_step.IMAGES, train_step.TOKENS, first=train_step.SEED)
    assert grids.prod(1).sum() == 6064 and grids.prod(1).min() >= 16 and grids.prod(1).max() <= 256
    step = images.plan_step(grids, length, rows)
    tokens = step.grids.prod(1)
    assert sorted(sum(step.rows, [])) == list(range(len(step.grids))) and len(step.rows) == rows
    assert all(tokens[row].sum() <= length for row in step.rows) and tokens.sum() > 0.975 * rows * length
    capacity = Capacity(*step.capacity)
    groups = [sum(step.rows[i : i + capacity.rows], []) for i in range(0, rows, capacity.rows)]
    assert all(capacity.holds(tokens[group]) for group in groups)
    assert images.plan_step(grids, length, rows).rows == step.rows
    json.dumps(step.spec())


def test_packed_rows_hold_the_images_in_order():
    step = images.plan_step(np.array([[2, 3], [1, 4], [3, 3], [2, 2]]), 16, 2)
    pictures, labels = images.make_images(step.grids, images.PATCH)
    batch = ours.pack(pictures, labels, step.rows, 16)
    for b, row in enumerate(step.rows):
        for k, i in enumerate(row):
            own = batch.images.segment_ids[b] == k + 1
            coords = batch.images.coords[b, own, 1:]
            picture = patches.unpatchify(batch.images.values[b, own], coords, tuple(step.grids[i]), images.PATCH, 0)
            assert (picture == pictures[i]).all() and batch.labels[b, k] == labels[i]
    assert (batch.index >= 0).sum() == len(step.grids)


def test_attention_sees_the_rows_of_the_step():
    spec = images.plan_step(np.array([[2, 3], [1, 4], [3, 3], [2, 2]]), 16, 2).spec()
    ids = attention.ids_of(spec)
    assert [sorted(np.bincount(row)[1:]) for row in ids] == [
        sorted(np.prod(spec["grids"][i]) for i in row) for row in spec["rows"]
    ]
    assert attention.runnable(["dense", "splash"], spec) == ["dense"]


@pytest.mark.slow
@pytest.mark.skipif(not all(map(common.installed, ("torch", "vit-pytorch", "timm"))), reason="requirements-parity.txt")
def test_the_training_step_is_measured_against_peers(tmp_path):
    out = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.train_step", "--quick", "--peers", "vit-pytorch", "timm"]
    done = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True, check=True)
    rows = json.loads(out.read_text())
    assert [row["name"] for row in rows][::2] == ["vit-pytorch L256", "timm"]
    assert all(row["ratio"] > 0 for row in rows) and "| vit-pytorch L256 |" in done.stdout
