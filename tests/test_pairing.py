"""Promises of the text rows: no text twice or over a limit, an image's text is its own, the same however it is read."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_source import MemorySource

from configs import base
from input_pipeline import checks, pairing, stream
from input_pipeline.budget import Draws
from input_pipeline.errors import UserError
from input_pipeline.packing import RowPlan
from input_pipeline.text import ByteTokenizer
from input_pipeline.text_index import Texts, read_texts

STEPS = 8


class Captioned(MemorySource):
    """Images with captions of many lengths, some of them equal; `silent` ones have none."""

    def __init__(self, *args, silent=(), **kwargs):
        super().__init__(*args, **kwargs)
        self.silent = set(silent)

    def fingerprint(self):
        return f"captioned-{len(self)}-{self.seed}-{sorted(self.silent)}"

    def text(self, i):
        return "" if i in self.silent else f"caption {i % 7} {'x' * (3 * i % 29)}"


def make_config(**text):
    config = base.get_config()
    config.model.variant, config.objective = "Ti/8", "contrastive"
    config.resolution.update(min_side=16, max_side=48)
    config.packing.update(row_length=64, rows_per_step=5)
    config.data.update(num_threads=2, max_bad_share=0.5)
    config.text.update(text)
    return config


@pytest.fixture(scope="module")
def open_stream(tmp_path_factory):
    """open_stream(source, threads, workers) -> TrainStream, each time from the beginning."""
    cache = tmp_path_factory.mktemp("texts")

    def make(source=None, threads=2, workers=0):
        source, config = source or Captioned(), make_config()
        config.data.update(num_threads=threads, num_workers=workers)
        texts = read_texts(source, ByteTokenizer(), max_tokens=32, lower=True, cache_dir=cache)
        return stream.train_stream(config, stream.Images(source, source.known_sizes(), 3, texts, ByteTokenizer()))

    return make


@pytest.fixture(scope="module")
def wanted(open_stream):
    """The first steps, read at once."""
    return list(open_stream().loader(STEPS))


def arrays(batch):
    texts, *ids = batch.pairs
    return [*batch.images.arrays, batch.labels, batch.index, *texts.arrays, *ids]


def assert_same(a, b, rows=slice(None)):
    assert a[1].snapshot == b[1].snapshot
    for x, y in zip(arrays(a[0]), arrays(b[0]), strict=True):
        assert x.dtype == y.dtype and np.array_equal(x[rows], y)


def best_fit_decreasing(lengths, rows, length, slots):
    """The same by looking at every row for every text."""
    members = [[] for _ in range(rows)]
    for text in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        free = [length - sum(lengths[i] for i in row) for row in members]
        holds = [r for r in range(rows) if 0 < lengths[text] <= free[r] and len(members[r]) < slots]
        if holds:
            members[min(holds, key=lambda r: free[r])].append(text)
    return members


few_texts = dict(
    lengths=st.lists(st.integers(0, 20), max_size=60),
    rows=st.integers(1, 8),
    length=st.integers(1, 40),
    slots=st.integers(1, 6),
)


@given(**few_texts)
@settings(deadline=None, max_examples=200)
def test_no_text_twice_no_limit_broken_nothing_left_out_that_fits(lengths, rows, length, slots):
    packed = pairing.pack_texts(np.array(lengths, int), rows, length, slots)
    assert len(packed) == rows
    placed = [i for row in packed for i in row.tolist()]
    assert len(set(placed)) == len(placed)
    free = [length - sum(lengths[i] for i in row) for row in packed]
    assert min(free) >= 0 and max(map(len, packed)) <= slots
    for i in set(range(len(lengths))) - set(placed):
        holds = [f >= lengths[i] and len(row) < slots for f, row in zip(free, packed, strict=True)]
        assert lengths[i] == 0 or not any(holds)
    assert [row.tolist() for row in packed] == best_fit_decreasing(lengths, rows, length, slots)


def check_layout(packed, slots):
    """The rules of `Packed` for texts: ascending segments from 1, padding last, places counted from 0."""
    values, ids, coords, grids = packed.arrays
    assert values.dtype == ids.dtype == coords.dtype == grids.dtype == np.int32
    assert grids.shape == (len(values), slots, 3)
    for r in range(len(values)):
        counts = np.bincount(ids[r], minlength=slots + 1)[1:]
        used = counts.sum()
        assert np.array_equal(ids[r], np.repeat([*range(1, slots + 1), 0], [*counts, len(ids[r]) - used]))
        places = [i for n in counts for i in range(n)]
        assert np.array_equal(coords[r, :used], [(0, 0, i) for i in places] or np.zeros((0, 3)))
        assert (coords[r, used:] == 0).all() and (values[r, used:] == 0).all()
        assert np.array_equal(grids[r], [(1, 1, n) if n else (0, 0, 0) for n in counts])


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=80),
    rows=st.integers(1, 5),
    length=st.none() | st.integers(20, 60),
    slots=st.none() | st.integers(1, 5),
)
@settings(deadline=None, max_examples=100)
def test_a_list_of_texts_comes_whole_once_in_whole_steps(lengths, rows, length, slots):
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, 99, n) for n in lengths]
    steps = list(pairing.text_batches(ids, rows, length=length, slots=slots))
    shapes = {(packed.values.shape, index.shape) for packed, index in steps}
    assert len(shapes) == 1
    (B, T), (_, M) = shapes.pop()
    assert rows == B and (T % 8 == 0 if length is None else length == T) and slots in (None, M)
    assert sorted(i for _, index in steps for i in index[index >= 0].tolist()) == list(range(len(ids)))
    for packed, index in steps:
        check_layout(packed, M)
        for r, slot in np.argwhere(index >= 0):
            assert np.array_equal(packed.values[r][packed.segment_ids[r] == slot + 1], ids[index[r, slot]])
        assert np.array_equal(packed.grids[..., 0] > 0, index >= 0)
    assert sum(1 for _, index in steps if (index < 0).all()) == 0
    local = [1 % rows, 0] if rows > 1 else [0]
    parts = pairing.text_batches(ids, rows, length=length, slots=slots, local=local)
    for whole, mine in zip(steps, parts, strict=True):
        for x, y in zip([*whole[0].arrays, whole[1]], [*mine[0].arrays, mine[1]], strict=True):
            assert np.array_equal(x[local], y)


def test_texts_that_no_row_can_hold_are_refused():
    assert not list(pairing.text_batches([], 4))
    with pytest.raises(UserError, match="text 1 has 0 tokens; expected 1 to 8"):
        list(pairing.text_batches([np.ones(3, int), np.zeros(0, int)], 4))
    with pytest.raises(UserError, match="text 0 has 9 tokens; expected 1 to 8"):
        list(pairing.text_batches([np.ones(9, int)], 4, length=8))


def as_texts(lengths):
    """Text i is `lengths[i]` times the token i."""
    lengths = np.array(lengths, np.int64)
    tokens = np.repeat(np.arange(len(lengths)), lengths)
    return Texts(tokens, np.concatenate([[0], np.cumsum(lengths)]), np.arange(len(lengths), dtype=np.int32) // 2, 0)


def test_examples_are_counted_row_by_row_and_rows_may_be_empty():
    def draw(position):
        return Draws(position % 4, None, None, None)

    plans = [RowPlan(np.array(p), np.ones(len(p), int)) if p else None for p in ([7, 2], [], [4, 5, 6])]
    step = pairing.plan_step(plans, draw, as_texts([3, 1, 5, 2]), 9, 3)
    assert step.index.tolist() == [3, 2, 0, 1, 2] and step.first.tolist() == [0, 2, 2]
    assert [row.tolist() for row in step.rows] == [[1, 2, 3], [4, 0], []]  # lengths 5 3 1, 5 2
    texts, files, row = as_texts([3, 1, 5, 2]), np.array([8, 9, 9, 8], np.int32), step.rows[1]
    packed, (example, number, image) = pairing.text_row(texts, files, step.index[row], row, 9, 3)
    assert packed.values.tolist() == [2, 2, 2, 2, 2, 3, 3, 0, 0]
    assert packed.segment_ids.tolist() == [1, 1, 1, 1, 1, 2, 2, 0, 0]
    assert example.tolist() == [4, 0, -1] and number.tolist() == [1, 1, -1] and image.tolist() == [9, 8, -1]
    assert pairing.text_row(texts, None, step.index[row], row, 9, 3)[1][2].tolist() == [2, 3, -1]
    for known, image in ((files, [8, -1, 9, -1]), (None, [0, -1, 2, -1])):
        ids = pairing.image_ids(texts, known, 2, np.array([0, -1, 2, -1]))
        assert [x.tolist() for x in ids] == [[2, -1, 4, -1], [0, -1, 1, -1], image]
        assert all(x.dtype == np.int32 for x in ids)


def choose(lengths, rows, images=0, **text):
    """Rows of four images of one token each, in order."""
    lengths = np.array(lengths)

    def draw(position):
        return Draws(position % len(lengths), None, np.ones((len(position), 2), int), np.ones(len(position), int))

    text = dict(row_length=0, texts_per_row=0) | text
    plan = dict(length=4, slots=4)
    return pairing.choose([draw], plan, as_texts(lengths), rows, images or len(lengths), SimpleNamespace(**text))


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=80), rows=st.integers(1, 6))
@settings(deadline=None, max_examples=60)
def test_the_chosen_rows_are_the_smallest_that_leave_nothing_out(lengths, rows):
    found = choose(lengths, rows)
    steps, position = [], 0
    while position < max(len(lengths), 4 * rows):
        steps.append([lengths[(position + i) % len(lengths)] for i in range(4 * rows)])
        position += 4 * rows

    def fits(length, slots):
        return all(sum(map(len, best_fit_decreasing(step, rows, length, slots))) == len(step) for step in steps)

    smallest = next(n for n in itertools.count(-(-max(lengths) // 8) * 8, 8) if fits(n, n))
    assert found.length == smallest
    assert found.slots == next(n for n in itertools.count(1) if fits(found.length, n))
    assert found.left_out == 0
    assert np.isclose(found.fill, sum(map(sum, steps)) / (len(steps) * rows * found.length))


@pytest.mark.parametrize("seed", range(3))
def test_of_many_texts_a_few_are_left_out_and_no_fewer_tokens_or_slots_would_do(seed):
    lengths = np.random.default_rng(seed).integers(5, 40, 4000)
    found, steps = choose(lengths, 5), lengths.reshape(-1, 20)

    def left_out(length, slots):
        return sum(len(s) - sum(map(len, best_fit_decreasing(s.tolist(), 5, length, slots))) for s in steps)

    by_length = left_out(found.length, found.length)
    assert by_length <= 4 < left_out(found.length - 8, found.length - 8)
    assert left_out(found.length, found.slots) <= by_length + 4 < left_out(found.length, found.slots - 1)
    assert found.left_out == left_out(found.length, found.slots) / 4000 > 0


def test_configured_rows_are_used_and_refused_where_they_leave_out_texts():
    lengths = [10] * 40
    assert choose(lengths, 2)[:2] == (40, 4)
    assert choose(lengths, 2, row_length=64)[:2] == (64, 4) and choose(lengths, 2, texts_per_row=6)[:2] == (40, 6)
    with pytest.raises(UserError, match=r"row_length=8 is too small for one text of 10 tokens.*row_length=40"):
        choose(lengths, 2, row_length=8)
    with pytest.raises(UserError, match=r"row_length=32 leaves out 25\.0 % of the texts.*row_length=40"):
        choose(lengths, 2, row_length=32)
    with pytest.raises(UserError, match=r"texts_per_row=3 leaves out 25\.0 % of the texts.*texts_per_row=4"):
        choose(lengths, 2, texts_per_row=3)
    found = choose([20] + [10] * 399, 2, row_length=40)  # one text of one step: below 2 %
    assert found[:2] == (40, 4) and found.left_out == 1 / 400


def test_every_image_finds_its_own_text(open_stream):
    rows = open_stream()
    texts, matched, images = rows.images.texts, 0, 0
    for batch, _ in rows.loader(STEPS):
        example, number, pairs = batch.pairs.example_BM, batch.pairs.number_BM, batch.pairs
        check_layout(pairs.texts, rows.text_plan.slots)
        assert np.array_equal(pairs.example_BK >= 0, batch.index >= 0)
        assert pairs.example_BK[batch.index >= 0].tolist() == list(range((batch.index >= 0).sum()))
        assert np.array_equal(example >= 0, pairs.texts.grids[..., 0] > 0)
        places = {int(example[m]): m for m in map(tuple, np.argwhere(example >= 0))}
        assert len(places) == (example >= 0).sum()
        for r, slot in np.argwhere(batch.index >= 0):
            image, place = batch.index[r, slot], places.get(int(pairs.example_BK[r, slot]))
            images += 1
            assert pairs.number_BK[r, slot] == texts.numbers[image] and pairs.image_BK[r, slot] == image
            if place is not None:
                matched += 1
                ids = pairs.texts.values[place[0]][pairs.texts.segment_ids[place[0]] == place[1] + 1]
                assert np.array_equal(ids, texts.ids(image)) and number[place] == texts.numbers[image]
                assert pairs.image_BM[place] == image
        assert np.array_equal(pairs.image_BM >= 0, example >= 0)
    assert matched / images > 0.98 and images > 100  # 0.1 % is left out of many steps, all of it by a few


class Copied(Captioned):
    """Examples i and i + 20 are one image."""

    def image_numbers(self):
        return (np.arange(len(self)) % 20).astype(np.int32)


def test_copies_of_an_image_share_its_number_and_so_do_their_texts(opened):
    images = opened(Copied())
    rows, copies = stream.train_stream(make_config(), images), 0
    for batch, _ in rows.loader(STEPS):
        pairs = batch.pairs
        assert np.array_equal(pairs.image_BK, np.where(batch.index >= 0, batch.index % 20, -1))
        of_example = dict(zip(pairs.example_BK.ravel().tolist(), pairs.image_BK.ravel().tolist(), strict=True))
        assert all(
            of_example[e] == n for e, n in zip(pairs.example_BM.ravel(), pairs.image_BM.ravel(), strict=True) if e >= 0
        )
        index = np.unique(batch.index[batch.index >= 0])
        copies += len(index) - len(np.unique(index % 20))
    assert copies > 20 and opened(Captioned()).files is None


@pytest.mark.parametrize(("threads", "workers"), [(1, 0), (5, 0), (2, 2)])
def test_pairs_do_not_depend_on_threads_or_worker_processes(open_stream, wanted, threads, workers):
    for a, b in zip(wanted, open_stream(threads=threads, workers=workers).loader(STEPS), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("start", [1, 5])
def test_pairs_go_on_from_a_snapshot(open_stream, wanted, start):
    again = open_stream().loader(STEPS, start=start, snapshot=wanted[start - 1][1].snapshot)
    for a, b in zip(wanted[start:], again, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5])
def test_processes_build_their_rows_of_the_same_pairs(open_stream, wanted, parts):
    rows = open_stream()
    for local in np.array_split(np.arange(5), parts):
        for a, b in zip(wanted, rows.loader(STEPS, local=local.tolist()), strict=True):
            assert_same(a, b, local)


def test_the_same_pairs_whatever_came_before(open_stream):
    """A late reader that asks for an early row gets it again."""
    rows = open_stream().loader(STEPS).rows
    first = [rows[i][0].pairs for i in range(12)]
    for i in [*range(12, 40), 3, 0, 11, 7]:
        pairs = rows[i][0].pairs
        if i < 12:
            now, then = ([*p.texts, *p[1:]] for p in (pairs, first[i]))
            assert all(np.array_equal(x, y) for x, y in zip(now, then, strict=True))


def test_the_text_of_a_bad_image_stays_without_a_partner(open_stream, wanted):
    skipped = 0
    for (a, _), (b, info) in zip(wanted, open_stream(Captioned(broken={4, 9})).loader(STEPS), strict=True):
        bad = np.isin(a.index, [4, 9])
        skipped += len(info.bad)
        assert np.array_equal(np.where(bad, -1, a.pairs.example_BK), b.pairs.example_BK)
        assert np.array_equal(np.where(bad, -1, a.pairs.number_BK), b.pairs.number_BK)
        for x, y in zip(
            [*a.pairs.texts.arrays, a.pairs.example_BM], [*b.pairs.texts.arrays, b.pairs.example_BM], strict=True
        ):
            assert np.array_equal(x, y)
        assert np.isin(a.pairs.example_BK[bad], b.pairs.example_BM).all()
    assert skipped >= 2


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """opened(source, split, **changes) -> Images, as a contrastive run opens them."""
    monkeypatch.setenv("NAVIT_JAX_CACHE", str(tmp_path))

    def open_it(source, split="train", bad_share=0.5, **text):
        monkeypatch.setattr(stream, "open_source", lambda *args, **kwargs: source)
        config = make_config(**text)
        config.data.max_bad_share = bad_share
        return stream.open_images(config, split)

    return open_it


def test_images_without_text_are_not_planned(opened):
    images = opened(Captioned(silent={3, 17}))
    assert np.array_equal(np.flatnonzero(images.sizes.min(1) == 0), [3, 17])
    rows = stream.train_stream(make_config(), images)
    seen = {i for batch, _ in rows.loader(STEPS) for i in batch.index.ravel().tolist()}
    assert seen == set(range(-1, 40)) - {3, 17}
    with pytest.raises(UserError, match=r"2 of 40 images .*max_bad_share=0\.04; the first is memory image 3"):
        opened(Captioned(silent={3, 17}), bad_share=0.04)
    with pytest.raises(UserError, match=r"no captions.*text_field"):
        opened(Captioned(silent=range(40)), bad_share=1.0)


def test_texts_that_are_all_equal_are_refused(opened, monkeypatch):
    monkeypatch.setattr(Captioned, "text", lambda self, i: "a photo")
    with pytest.raises(UserError, match=r"all 40 texts in digits are equal.*max_tokens=64"):
        opened(Captioned(seed=77))


def test_held_out_classes_need_no_text(opened):
    train, silent = opened(Captioned(classes=2)), Captioned(silent=range(40))
    held_out = stream.match_classes(train, opened(silent, "eval"))
    assert held_out.texts is None and held_out.classes == 3 and (held_out.sizes > 0).all()
    silent.class_names = ()
    with pytest.raises(UserError, match="no captions"):
        opened(silent, "eval")


def test_a_vocabulary_larger_than_the_table_is_refused(opened):
    size = ByteTokenizer().vocab_size
    assert opened(Captioned(), vocab_size=size).tokenizer.vocab_size == size
    with pytest.raises(UserError, match=rf"vocab_size is {size - 1}, .* has {size} tokens"):
        opened(Captioned(), vocab_size=size - 1)


def test_the_fingerprint_knows_tokenizer_and_texts(opened):
    found = stream.fingerprint(opened(Captioned(silent={5})))
    assert found["tokenizer"] == ByteTokenizer().fingerprint() and found["texts"] == 39
    source = Captioned()
    assert set(stream.fingerprint(stream.Images(source, source.known_sizes(), 3))) == {"source", "images", "sizes"}


def test_mixup_is_refused():
    config = make_config()
    checks.check(config)
    config.augment.mixup = 0.2
    with pytest.raises(UserError, match=r"augment\.mixup is 0\.2; expected 0, .*contrastive"):
        checks.check(config)
