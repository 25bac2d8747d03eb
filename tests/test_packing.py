"""Promises of the plan: every image once, no overfull row, the same from any snapshot, little padding."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import base
from input_pipeline.budget import Draws, Sampler
from input_pipeline.dry_run import choose_slots, dry_run
from input_pipeline.errors import UserError
from input_pipeline.packing import Planner


def fake(keep, full=None):
    keep = np.array(keep)
    full = keep if full is None else np.array(full)
    return lambda p: Draws(p, np.zeros((len(p), 4)), np.stack([full[p], np.ones(len(p), int)], 1), keep[p])


@given(
    keep=st.lists(st.integers(0, 30), min_size=1, max_size=300),
    slots=st.integers(1, 8),
    look_ahead=st.integers(1, 64),
    extra=st.integers(0, 10),
)
@settings(deadline=None, max_examples=100)
def test_every_image_once_and_no_row_overfull(keep, slots, look_ahead, extra):
    full = [k + extra * (k > 0) for k in keep]
    plan = dict(length=32, slots=slots, look_ahead=look_ahead, stop=len(keep))
    rows = list(Planner(fake(keep, full), **plan))
    placed = [p for row in rows for p in row.positions]
    assert sorted(placed) == [i for i, k in enumerate(keep) if k]
    for row in rows:
        assert 1 <= len(row.positions) <= slots and row.keep.sum() <= 32
        assert all(keep[p] <= n <= full[p] for p, n in zip(row.positions, row.keep, strict=True))
        # room is left only where every image has all its tokens
        assert row.keep.sum() == 32 or all(n == full[p] for p, n in zip(row.positions, row.keep, strict=True))
    plain = list(Planner(fake(keep, full), restore_dropped=False, **plan))
    assert all((r.keep == np.array(keep)[r.positions]).all() for r in plain)


def test_large_gaps_are_given_back_whole_and_late_in_a_long_run():
    def draw(p):
        return Draws(p, np.zeros((len(p), 4)), np.tile([64, 64], (len(p), 1)), np.full(len(p), 1500))

    start = 2**42
    planner = Planner(draw, length=4096, slots=8, snapshot=dict(row=0, left=0, cursor=start, waiting=[]))
    for i, row in enumerate(islice(planner, 5)):
        assert row.positions.tolist() == [start + 2 * i, start + 2 * i + 1]
        assert row.keep.sum() == 4096 and row.keep.min() >= 1500


@given(cut=st.integers(0, 60), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=25)
def test_a_snapshot_goes_on_identically(cut, seed):
    config = base.get_config()
    config.seed = seed
    config.drop.kind = "beta"
    sampler = Sampler(config, np.random.default_rng(seed).integers(60, 500, (37, 2)), 16)  # several epochs pass
    plan = dict(length=256, slots=10)
    planner = Planner(sampler, **plan)
    for _ in range(cut):
        next(planner)
    snapshot = json.loads(json.dumps(planner.snapshot()))
    assert len(json.dumps(snapshot)) < 8000
    again = Planner(sampler, snapshot=snapshot, **plan)
    for a, b in islice(zip(planner, again, strict=True), 40):
        assert np.array_equal(a.positions, b.positions) and np.array_equal(a.keep, b.keep)


@pytest.mark.parametrize(("length", "limit"), [(256, 1.0), (1024, 0.5)])
@pytest.mark.parametrize("restore", [True, False])
def test_padding_on_the_committed_sizes(length, limit, restore):
    """The default sampling: side U(64, 256), beta dropping to about 65 tokens an image."""
    sizes = np.load(Path(__file__).parent / "data" / "sizes_100k.npz")["sizes"].astype(int)
    assert len(sizes) == 100_000
    config = base.get_config()
    sampler = Sampler(config, sizes, 16)
    options = dict(length=length, restore_dropped=restore)
    slots = choose_slots(sampler, 20_000, slots=0, **options)
    found = dry_run(sampler, 100_000, slots=slots, **options)
    assert 100 * (1 - found.fill) <= limit


def test_an_image_longer_than_a_row_is_refused():
    with pytest.raises(UserError, match="40 tokens does not fit in a row of 32.*row_length=40"):
        next(Planner(fake([40]), length=32, slots=4, stop=1))


def test_too_few_slots_name_the_waste():
    draw = fake([4] * 1000)
    assert choose_slots(draw, 1000, length=32, slots=0) == 8
    with pytest.raises(UserError, match=r"images_per_row=2 .*wastes 75\.0 %.*images_per_row=8"):
        choose_slots(draw, 1000, length=32, slots=2)
