"""Promises of the stream: rows depend on (seed, data, config) alone, every image once, nothing lost."""

import itertools

import numpy as np
import pytest
from memory_source import MemorySource

from configs import base
from input_pipeline import rows as building
from input_pipeline import stream
from input_pipeline.errors import UserError
from input_pipeline.packing import RowPlan


def make_config(**data):
    config = base.get_config()
    config.model.variant = "Ti/8"
    config.resolution.update(min_side=16, max_side=48)
    config.drop.kind = "beta"
    config.packing.update(row_length=64, rows_per_step=4)
    config.data.update(num_threads=2, **data)
    config.total_steps = 12
    return config


def make_stream(config, source):
    return stream.train_stream(config, stream.Images(source, source.known_sizes(), 3))


def flat(item):
    batch, info = item
    return [*batch.images.arrays, batch.labels, batch.index], info.snapshot


def assert_same(a, b):
    (xs, snap_x), (ys, snap_y) = flat(a), flat(b)
    assert snap_x == snap_y
    for x, y in zip(xs, ys, strict=True):
        assert x.dtype == y.dtype and np.array_equal(x, y)


@pytest.mark.parametrize("threads", [1, 5])
def test_rows_do_not_depend_on_threads(threads):
    config, source = make_config(), MemorySource()
    wanted = list(make_stream(config, source).loader(12))
    config.data.num_threads = threads
    got = list(make_stream(config, source).loader(12))
    assert len(got) == len(wanted) == 12
    for a, b in zip(wanted, got, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("workers", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_rows_do_not_depend_on_worker_processes(workers):
    config, source = make_config(), MemorySource()
    wanted = list(make_stream(config, source).loader(5))
    config.data.num_workers = workers
    for a, b in zip(wanted, make_stream(config, source).loader(5), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("start", [1, 7, 11])
def test_resuming_from_a_snapshot_replays_the_same_rows(start):
    rows = make_stream(make_config(), MemorySource())
    wanted = list(rows.loader(12))
    again = make_stream(make_config(), MemorySource()).loader(12, start=start, snapshot=wanted[start - 1][1].snapshot)
    for a, b in zip(wanted[start:], again, strict=True):
        assert_same(a, b)


def test_processes_read_their_own_rows_of_the_same_step():
    config, source = make_config(), MemorySource()
    whole = list(make_stream(config, source).loader(6))
    parts = [list(make_stream(config, source).loader(6, local=local)) for local in ([0, 1], [2, 3])]
    for step, (batch, info) in enumerate(whole):
        for field in ("labels", "index"):
            joined = np.concatenate([getattr(p[step][0], field) for p in parts])
            assert np.array_equal(joined, getattr(batch, field))
        assert np.array_equal(np.concatenate([p[step][0].images.values for p in parts]), batch.images.values)
        assert all(p[step][1].snapshot == info.snapshot for p in parts)


def test_contract_of_a_batch():
    config, source = make_config(), MemorySource()
    for batch, _ in make_stream(config, source).loader(12):
        values, ids, coords, grids = batch.images.arrays
        assert values.dtype == np.uint8 and values.shape[2] == 8 * 8 * 3
        for r in range(len(ids)):
            used = (ids[r] > 0).sum()
            assert (ids[r, :used] > 0).all() and (values[r, used:] == 0).all()
            assert (np.diff(ids[r, :used]) >= 0).all()
            for slot in range(grids.shape[1]):
                here = coords[r][ids[r] == slot + 1]
                frames, rows, columns = grids[r, slot]
                assert (batch.index[r, slot] >= 0) == bool(len(here)) == bool(frames)
                if len(here):
                    order = here[:, 1] * columns + here[:, 2]
                    assert (np.diff(order) > 0).all() and order[-1] < rows * columns and (here[:, 0] == 0).all()
                    assert batch.labels[r, slot] == batch.index[r, slot] % 3


def test_recent_draws_are_the_samplers():
    sampler = make_stream(make_config(), MemorySource()).sampler
    draw = building.RecentDraws(sampler)
    for asked in (
        np.arange(1024),
        np.array([1024, 1025]),
        np.arange(1024, 2048),
        np.arange(2048, 5500),
        np.array([5, 1020, 1024, 2047]),
    ):
        for positions in (asked, np.array([3, 900, 1500]), np.array([7, 5000]), np.array([9000])):
            for found, wanted in zip(draw(positions), sampler(positions), strict=True):
                assert found.dtype == wanted.dtype and np.array_equal(found, wanted)


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_a_planned_row_without_images_is_a_row_of_padding(mixup):
    """A group's profile can have no place for any image that waits; labels of classes and of blends."""
    config, nothing = make_config(), np.zeros(0, np.int64)
    config.augment.mixup = mixup
    builder = make_stream(config, MemorySource()).builder
    row, padding = builder(RowPlan(nothing, nothing)), building.empty_row(builder)
    for found, wanted in zip((*row.images.arrays, *row[1:3]), (*padding.images.arrays, *padding[1:3]), strict=True):
        assert found.dtype == wanted.dtype and np.array_equal(found, wanted)


def test_every_image_once_an_epoch():
    config, source = make_config(), MemorySource(count=30)
    seen = [i for batch, _ in make_stream(config, source).loader(12) for i in batch.index[batch.index >= 0]]
    counts = np.bincount(seen, minlength=30)
    # images come a little out of order: those that wait are the difference
    assert counts.min() >= 1 and len(seen) > 100
    sampler = make_stream(config, source).sampler
    for epoch in range(3):
        assert sorted(sampler(np.arange(30) + 30 * epoch).index) == list(range(30))


@pytest.mark.parametrize("subset", [None, np.array([3, 5, 8])])
def test_evaluation_sees_every_image_once_whole_and_in_its_own_pixels(subset):
    config, source = make_config(), MemorySource(count=33)
    images = stream.Images(source, source.known_sizes(), 3)
    seen, tokens = [], 0
    for batch, _ in stream.eval_loader(config, images, 16, indices=subset):
        seen += batch.index[batch.index >= 0].tolist()
        tokens += (batch.images.segment_ids > 0).sum()
        assert (batch.images.grids.prod(2) <= 16).all()
        assert (batch.images.grids.prod(2).sum() == (batch.images.segment_ids > 0).sum()).all()
    assert sorted(seen) == (list(range(33)) if subset is None else subset.tolist())


def test_a_bad_image_empties_its_slot_and_moves_nothing_else():
    config = make_config(max_bad_share=0.5)
    clean = list(make_stream(config, MemorySource()).loader(10))
    dirty = list(make_stream(config, MemorySource(broken={4, 9})).loader(10))
    skipped = 0
    for (a, _), (b, info) in zip(clean, dirty, strict=True):
        assert np.array_equal(np.where(np.isin(a.index, [4, 9]), -1, a.index), b.index)
        for r, slot in np.argwhere(b.index >= 0):
            same = [x.images.values[r][x.images.segment_ids[r] == slot + 1] for x in (a, b)]
            assert np.array_equal(*same)
        assert (b.images.grids[b.index < 0] == 0).all()
        skipped += len(info.bad)
        assert all(i in (4, 9) and reason for i, reason in info.bad)
    assert skipped >= 2


def test_too_many_bad_images_stop_the_run_with_name_and_reason():
    rows = make_stream(make_config(), MemorySource(broken=set(range(10))))
    with pytest.raises(UserError, match=r"memory image \d.*max_bad_share"):
        list(rows.loader(12))


def test_mixup_blends_pixels_and_labels_within_a_row():
    config, source = make_config(), MemorySource()
    plain = next(iter(make_stream(config, source).loader(1)))[0]
    config.augment.mixup = 0.4
    mixed = next(iter(make_stream(config, source).loader(1)))[0]
    assert mixed.labels.shape == (*plain.labels.shape, 3)
    real = mixed.index >= 0
    assert np.allclose(mixed.labels[real].sum(-1), 1) and (mixed.labels[~real] == 0).all()
    kept = np.take_along_axis(mixed.labels, np.maximum(plain.labels, 0)[..., None], 2)[..., 0]
    assert (kept[real] >= 0.5 - 1e-6).all() and (kept[real] < 1).any()
    assert not np.array_equal(mixed.images.values, plain.images.values)
    assert np.array_equal(mixed.images.segment_ids, plain.images.segment_ids)


@pytest.mark.parametrize(("channels", "bits", "dtype"), [(1, 8, np.uint8), (5, 8, np.uint8), (3, 16, np.uint16)])
def test_channels_and_depth(channels, bits, dtype):
    config = make_config(channels=channels, bits=bits)
    batch, _ = next(iter(make_stream(config, MemorySource(channels=channels, dtype=dtype)).loader(1)))
    assert batch.images.values.dtype == dtype and batch.images.values.shape[2] == 64 * channels
    assert batch.images.values.max() > np.iinfo(dtype).max // 2


def test_the_same_row_whatever_came_before():
    """A late reader that asks for an early row gets it again: plans are replayed."""
    rows = make_stream(make_config(), MemorySource()).loader(12).rows
    first = [rows[i][0].index for i in range(6)]
    for i in itertools.chain(range(40), [2, 0, 5]):
        row = rows[i][0]
        if i < 6:
            assert np.array_equal(row.index, first[i])


def test_steps_from_epochs_and_examples():
    config, source = make_config(), MemorySource(count=400)
    rows = make_stream(config, source)
    config.update(total_steps=0, total_epochs=2.0)
    steps = stream.total_steps(config, rows)
    seen = sum((batch.index >= 0).sum() for batch, _ in rows.loader(steps))
    assert 0.85 * 800 < seen <= 800
    config.update(total_epochs=0.0, total_examples=800)
    assert stream.total_steps(config, rows) == steps
    config.total_examples = 0
    with pytest.raises(UserError, match="a run needs a length"):
        stream.total_steps(config, rows)


def test_a_row_too_short_for_an_image_is_refused():
    config = make_config()
    config.drop.kind = "none"
    config.packing.row_length = 20
    with pytest.raises(UserError, match="row_length=36"):
        make_stream(config, MemorySource())


def test_patches_are_the_models():
    """Of the variant, unless the model sets their size itself."""
    config = base.get_config()
    config.model.variant = "Ti/14"
    assert stream.patch_size(config) == 14
    config.model.patch_size = 6
    assert stream.patch_size(config) == 6
