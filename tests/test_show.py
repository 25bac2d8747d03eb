"""Promises of the picture: it shows the row's own pixels, dark is what was dropped, and nothing overlaps."""

import matplotlib.image
import numpy as np
import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_source import MemorySource

from configs import base
from input_pipeline import packing, stream
from input_pipeline.errors import UserError
from navit_jax import row_picture, show


def make_config(**data):
    config = base.get_config()
    config.model.variant = "Ti/8"
    config.resolution.update(min_side=16, max_side=48)
    config.drop.kind = "beta"
    config.packing.update(row_length=64, rows_per_step=2)
    config.data.update(max_bad_share=0.5, **data)
    return config


@pytest.fixture
def shown(monkeypatch):
    def make(config, source, count=3):
        images = stream.Images(source, source.known_sizes(), len(source.class_names))
        monkeypatch.setattr(stream, "open_images", lambda config, split: images)
        rows, slots = show.packed_rows(config, count)
        train = stream.train_stream(config, images)
        planner = packing.Planner(train.sampler, **train.plan)
        return rows, slots, [train.builder(next(planner)) for _ in range(count)]

    return make


@pytest.mark.parametrize("augment", [dict(), dict(flip=True, mixup=0.4, crop_min_area=0.4, erasing=0.5)])
def test_images_are_the_rows_own_and_dark_is_what_was_dropped(shown, augment):
    config = make_config()
    config.augment.update(**augment)
    rows, slots, built = shown(config, MemorySource(broken=(3, 4, 5)))
    dropped = 0
    for row, truth in zip(rows, built, strict=True):
        ids = truth.images.segment_ids
        assert np.array_equal(row.segment_ids, ids)
        assert np.array_equal(row.tokens.reshape(len(ids), -1), truth.images.values)
        assert sorted(row.pictures) == np.flatnonzero(truth.index >= 0).tolist()
        for slot, picture in row.pictures.items():
            assert picture.kept.shape == tuple(truth.images.grids[slot, 1:])
            assert np.array_equal(picture.patches[picture.kept], row.tokens[ids == slot + 1])
            assert picture.patches[~picture.kept].std() > 0 or picture.kept.all()  # pixels, not a fill
            label = truth.labels[slot].argmax() if augment else truth.labels[slot]
            assert picture.name == f"class{label}"
            dropped += int((~picture.kept).sum())
    assert dropped > 10


@pytest.mark.parametrize(("channels", "bits"), [(1, 8), (2, 8), (3, 16), (6, 16), (1, 16)])
def test_any_channels_and_depth_become_colour(shown, channels, bits):
    dtype = np.uint16 if bits == 16 else np.uint8
    rows, slots, built = shown(make_config(channels=channels, bits=bits), MemorySource(channels=channels, dtype=dtype))
    tokens = rows[0].tokens[rows[0].segment_ids > 0]
    assert tokens.shape[1:] == (8, 8, 3) and tokens.dtype == np.uint8
    assert tokens[..., 0].min() < 40 and tokens[..., 0].max() > 215
    raw = built[0].images.values[built[0].images.segment_ids > 0].reshape(-1, 8, 8, channels)[..., 0]
    assert np.corrcoef(raw.ravel(), tokens[..., 0].ravel())[0, 1] > 0.99
    assert (np.ptp(tokens, axis=-1) == 0).all() == (channels == 1)
    row_picture.draw(rows[:1], slots, "any")


def test_dark_sixteen_bit_images_are_stretched(shown):
    class Dim(MemorySource):
        def __getitem__(self, i):
            record = super().__getitem__(i)
            return record._replace(data=record.data // 64)

    rows, _, _ = shown(make_config(channels=1, bits=16), Dim(channels=1, dtype=np.uint16))
    assert rows[0].tokens.max() > 215


def test_the_picture_has_every_segments_colour_and_its_padding(shown, tmp_path):
    config = make_config()
    config.drop.kind = "none"
    config.packing.look_ahead = 1
    rows, slots, _ = shown(config, MemorySource())
    row = min(rows, key=lambda r: (r.segment_ids > 0).sum())
    padding = int((row.segment_ids == 0).sum())
    assert padding > 0
    row_picture.draw([row], slots, "a row").savefig(tmp_path / "row.png", dpi=200)
    picture = np.rint(255 * matplotlib.image.imread(tmp_path / "row.png")[..., :3]).astype(int)
    assert picture.shape[1] == 2400
    for slot in row.pictures:
        colour = row_picture.COLOURS[slot % len(row_picture.COLOURS)]
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        # its bar below the tokens, its block of attention and its frame
        side = int((row.segment_ids == slot + 1).sum())
        least = 2 * row_picture.BAR * 2 * (side * 17.5 - 14) + (side * 2 * row_picture.MASK / 64) ** 2
        assert (np.abs(picture - wanted).sum(-1) < 6).sum() > 0.9 * least, slot
    filled, whole = int((row.segment_ids > 0).sum()), len(row.segment_ids)
    assert f"{100 * filled / whole:.1f} % filled" in row_picture.summary([row], slots)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 400), st.integers(1, 300)), min_size=1, max_size=30))
def test_images_on_lines_do_not_overlap(sizes):
    widths, heights = zip(*sizes, strict=True)
    places, bottom = row_picture._flow(widths, heights, 500)
    boxes = [(x, base - h, x + w, base + 34) for (x, base), w, h in zip(places, widths, heights, strict=True)]
    for i, (left, top, right, low) in enumerate(boxes):
        assert left >= 0 and top >= 0 and right <= 500 and low <= bottom
        for left2, top2, right2, low2 in boxes[:i]:
            assert right <= left2 or right2 <= left or low <= top2 or low2 <= top


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=20))
def test_spans_cover_the_ids(ids):
    spans = row_picture._spans(np.array(ids))
    assert [i for slot, start, stop in spans for i in [slot] * (stop - start)] == ids
    assert all(a[0] != b[0] and a[2] == b[1] for a, b in zip(spans, spans[1:], strict=False))


def test_a_picture_that_cannot_be_written_is_the_users_to_correct(monkeypatch, tmp_path, shown):
    config, source = make_config(), MemorySource()
    shown(config, source)
    (tmp_path / "file").write_text("")
    for name in ("rows.xyz", "rows", "file/rows.png"):
        monkeypatch.setattr(show, "OUT", type("Flag", (), dict(value=str(tmp_path / name))))
        monkeypatch.setattr(show, "ROWS", type("Flag", (), dict(value=1)))
        with pytest.raises(UserError, match="--out"):
            show.main(config)
    assert "out" in flags.FLAGS
