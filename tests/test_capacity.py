"""The promise of a capacity profile, against a checker of its own: every group of rows is within it, whatever comes."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import base
from input_pipeline import capacity, checks, dry_run
from input_pipeline.budget import Draws, Sampler
from input_pipeline.capacity import Capacity
from input_pipeline.errors import UserError
from input_pipeline.packing import Planner

LENGTH = 32


def fake(keep, full=None):
    keep = np.array(keep)
    full = keep if full is None else np.array(full)
    return lambda p: Draws(p, np.zeros((len(p), 4)), np.stack([full[p], np.ones(len(p), int)], 1), keep[p])


def within(slabs, lengths):
    """As the promise is used: no threshold has more images above it than the slabs have places above it."""
    return all(sum(n > t for n in lengths) <= sum(c for c, m in slabs if m > t) for t in range(LENGTH + 1))


@st.composite
def profiles(draw):
    lengths = sorted(draw(st.sets(st.integers(1, LENGTH - 1), max_size=4)) | {LENGTH}, reverse=True)
    return Capacity(draw(st.integers(1, 4)), tuple((draw(st.integers(1, 5)), m) for m in lengths))


streams = st.lists(st.integers(0, LENGTH), min_size=1, max_size=250)


@given(slabs=profiles(), lengths=st.lists(st.integers(0, LENGTH), max_size=12))
@settings(deadline=None, max_examples=200)
def test_a_profile_holds_what_its_places_hold(slabs, lengths):
    assert slabs.holds(lengths) == within(slabs.slabs, lengths)
    assert slabs.places == sum(c for c, _ in slabs.slabs) and slabs.longest == LENGTH
    assert slabs.slots == sum(c * m for c, m in slabs.slabs) and slabs.pairs == sum(c * m * m for c, m in slabs.slabs)


@given(keep=streams, profile=profiles(), slots=st.integers(1, 8), ahead=st.integers(1, 40), extra=st.integers(0, 9))
@settings(deadline=None, max_examples=200)
def test_every_group_is_within_its_profile_and_every_image_comes_once(keep, profile, slots, ahead, extra):
    """The profile knows nothing of the stream, as after the worst shift: rows may be emptier, nothing else changes."""
    full = [min(LENGTH, k + extra * (k > 0)) for k in keep]
    plan = dict(length=LENGTH, slots=slots, capacity=profile, look_ahead=ahead, stop=len(keep))
    rows = list(Planner(fake(keep, full), **plan))
    placed = [p for row in rows for p in row.positions]
    assert sorted(placed) == [i for i, k in enumerate(keep) if k]
    for start in range(0, len(rows), profile.rows):
        group = rows[start : start + profile.rows]
        assert within(profile.slabs, [n for row in group for n in row.keep])
        assert sum(len(row.keep) for row in group) >= 1
    for row in rows:
        assert len(row.positions) <= slots and row.keep.sum() <= LENGTH
        assert all(keep[p] <= n <= full[p] for p, n in zip(row.positions, row.keep, strict=True))
    # The oldest image that waits starts each group, so none is overtaken for more groups than images wait.
    group_of = {p: i // profile.rows for i, row in enumerate(rows) for p in row.positions}
    order = [group_of[i] for i, k in enumerate(keep) if k]
    assert all(mine - max(order[:i], default=0) <= ahead + 1 for i, mine in enumerate(order))


@given(keep=streams, profile=profiles(), ahead=st.integers(1, 40), cut=st.integers(0, 60))
@settings(deadline=None, max_examples=100)
def test_a_snapshot_within_a_group_goes_on_identically(keep, profile, ahead, cut):
    plan = dict(length=LENGTH, slots=6, capacity=profile, look_ahead=ahead, stop=len(keep))
    planner = Planner(fake(keep), **plan)
    list(islice(planner, cut))
    again = Planner(fake(keep), snapshot=json.loads(json.dumps(planner.snapshot())), **plan)
    assert again.row == planner.row
    for a, b in zip(planner, again, strict=True):
        assert np.array_equal(a.positions, b.positions) and np.array_equal(a.keep, b.keep)


@given(lengths=streams.filter(any), rows=st.integers(1, 8), longest=st.integers(LENGTH - 8, LENGTH))
@settings(deadline=None, max_examples=60)
def test_a_chosen_profile_has_room_for_a_mean_group_and_for_the_longest_image(lengths, rows, longest):
    lengths = np.minimum(lengths, longest)
    found = capacity.choose([lengths], rows=rows, row_length=LENGTH, longest=longest)
    assert longest <= found.longest <= LENGTH and len(found.slabs) <= 6
    for t in range(LENGTH):
        mean = (lengths > t).sum() / lengths.sum() * rows * LENGTH
        assert sum(c for c, m in found.slabs if m > t) >= mean


def test_slabs_are_as_few_as_the_lengths_need():
    assert capacity.choose([np.full(9, 30)], rows=4, row_length=32, longest=32).slabs == ((5, 32),)
    assert capacity.choose([np.full(9, 4)], rows=4, row_length=32, longest=32).slabs == ((1, 32), (34, 8))
    both = capacity.choose([np.full(9, 30), np.full(9, 4)], rows=4, row_length=32, longest=32)  # of two parts of a run
    assert both.slabs == ((5, 32), (34, 8))


@pytest.mark.parametrize("slabs", [(), ((1, 8), (1, 8)), ((1, 8), (1, 9)), ((0, 8),), ((1, 0),)])
def test_what_is_no_profile_is_refused(slabs):
    with pytest.raises(ValueError, match="longest first"):
        Capacity(1, slabs)


def test_rows_of_a_group():
    square = dict(row_length=256, longest=256)
    assert [capacity.group_rows(0, rows, **square) for rows in (1, 2, 6, 8, 24, 64)] == [1, 2, 6, 8, 12, 8]
    assert [capacity.group_rows(0, 24, row_length=n, longest=256) for n in (512, 1024, 2048, 8192)] == [6, 3, 2, 1]
    # a step of an evaluation may be short
    assert [capacity.group_rows(16, rows, **square) for rows in (64, 8, 24)] == [16, 8, 8]
    config = base.get_config()
    config.packing.update(rows_per_step=12, rows_per_group=8)
    with pytest.raises(UserError, match=r"packing.rows_per_group is 8; expected a divisor of packing.rows_per_step=12"):
        checks.check(config)


def test_a_dry_run_of_fewer_images_than_may_wait_looks_at_every_row():
    found = dry_run.dry_run(fake([LENGTH] * 3 + [8] * 8), 11, length=LENGTH, slots=LENGTH)
    assert (found.rows, found.images, found.most, found.fill) == (5, 11, 4, 1.0)


def test_rows_stay_full_within_the_profile():
    """Default sampling; before dropped tokens fill the rows, and while the lengths are others than in the dry run."""
    sizes = np.load(Path(__file__).parent / "data" / "sizes_100k.npz")["sizes"].astype(int)
    config = base.get_config()
    sampler = Sampler(config, sizes, 16)
    for length, padding in ((256, 0.5), (1024, 0.1)):
        config.packing.restore_dropped = False
        plan = dry_run.plan_options(config, [sampler], length, 8)
        found = dry_run.dry_run(sampler, 60_000, **plan)
        profile = plan["capacity"]
        assert 100 * (1 - found.fill) <= padding
        assert profile.slots <= 1.55 * profile.rows * length
    long = base.get_config()
    long.resolution.min_side = 160
    shifted = Sampler(long, sizes, 16)
    assert dry_run.dry_run(shifted, 20_000, **plan).fill > 0.7


def test_longer_images_need_longer_places():
    promise = capacity.Capacity(2, ((1, 40), (3, 8)))
    assert promise.longer(5) == capacity.Capacity(2, ((1, 45), (3, 13)))
