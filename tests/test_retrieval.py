"""Promises of retrieval: ranks as a full sort gives them, ties against the query, memory of blocks alone."""

import csv
import tracemalloc

import numpy as np
import pytest
from fake_text_tower import text_tower, text_vector
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluators import Labelled, make_config, open_images, same

from input_pipeline import stream, text_index
from input_pipeline.errors import UserError
from navit_jax.evaluators import outputs, retrieval


def sorted_rank(scores, own):
    """Where the first own item stands when all are sorted, own ones behind others of the same score; -1: none."""
    order = np.lexsort((own, -scores))
    return int(np.argmax(own[order])) if own.any() else -1


def reference(x, numbers_x, y, number_y):
    """numbers_x: the set of numbers of each x."""
    scores = np.round(x.astype(np.float64) @ y.astype(np.float64).T, 12)
    own = np.array([[number in numbers for number in number_y.tolist()] for numbers in numbers_x])
    return [sorted_rank(*pair) for pair in zip(scores, own)], [sorted_rank(*pair) for pair in zip(scores.T, own.T)]


def padded(numbers):
    """Sets of numbers as rows of an array, in any order and some twice, padded with -1."""
    rng, width = np.random.default_rng(0), max(map(len, numbers)) + 2
    rows = [rng.permutation([*one, *list(one)[:1], -1])[:width] for one in numbers]
    return np.stack([np.pad(row, (0, width - len(row)), constant_values=-1) for row in rows])


def unit(rng, count, width=16):
    z = rng.normal(size=(count, width))
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(1, 50), st.booleans(), st.integers(0, 99)
)
def test_ranks_are_those_of_a_full_sort(n, m, different, block, ties, seed):
    rng = np.random.default_rng(seed)
    numbers_x = [set(rng.integers(0, different, rng.integers(0, 4)).tolist()) for _ in range(n)]
    number_y, x, y = rng.integers(0, different, m), unit(rng, n), unit(rng, m)
    if ties:  # corners of a cube: scores are quarters, and most are equal
        x, y = (rng.choice([-0.5, 0.5], (count, 4)).astype(np.float32) for count in (n, m))
    got = retrieval.ranks(x, padded(numbers_x), y, number_y, block=block)
    for mine, expected in zip(got, reference(x, numbers_x, y, number_y), strict=True):
        assert mine.tolist() == expected


def test_blocks_change_nothing_for_copies_of_long_vectors():
    """Copies tie exactly, though a product of other blocks rounds otherwise."""
    rng = np.random.default_rng(0)
    x, y = unit(rng, 12, 700)[rng.integers(0, 12, 300)], unit(rng, 9, 700)[rng.integers(0, 9, 200)]
    number_x, number_y = rng.integers(0, 30, 300), rng.integers(0, 30, 200)
    expected = reference(x, [{number} for number in number_x.tolist()], y, number_y)
    for block in (7, 64, 1024):
        got = retrieval.ranks(x, number_x[:, None], y, number_y, block=block)
        assert [side.tolist() for side in got] == list(expected)


def test_recall_of_ranks():
    got = retrieval.recalls(np.array([0, 4, 5, -1, 10]), np.array([-1, 9, 1, 1]))
    assert got == pytest.approx(dict(i2t_r1=0.25, i2t_r5=0.5, i2t_r10=0.75, t2i_r1=0, t2i_r5=2 / 3, t2i_r10=1))


def test_perfect_random_and_collapsed_vectors():
    rng, numbers = np.random.default_rng(1), np.arange(2000)
    x, y = unit(rng, 2000), unit(rng, 2000)
    perfect = retrieval.recalls(*retrieval.ranks(x, numbers[:, None], x, numbers))
    assert set(perfect.values()) == {1.0}
    chance = retrieval.recalls(*retrieval.ranks(x, numbers[:, None], y, numbers))
    for side in ("i2t", "t2i"):
        for k in (1, 5, 10):
            assert abs(chance[f"{side}_r{k}"] - k / 2000) < 5 * np.sqrt(k) / 2000
    collapsed = np.repeat(x[:1], 2000, 0)
    assert set(retrieval.recalls(*retrieval.ranks(collapsed, numbers[:, None], collapsed, numbers)).values()) == {0.0}


def test_memory_is_of_blocks():
    rng = np.random.default_rng(2)
    x, y, numbers = unit(rng, 3000), unit(rng, 3000), rng.permutation(3000)
    tracemalloc.start()
    try:
        retrieval.ranks(x, numbers[:, None], y, numbers, block=128)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3000 * 3000 / 8  # bytes: a bit for each pair


def captions(count=40, without=(3, 4), seed=0):
    """The texts of a source, some of them equal; examples `without` have none."""
    rng = np.random.default_rng(seed)
    different = [rng.integers(0, 200, n) for n in rng.integers(2, 20, 15)]
    numbers = rng.integers(0, 15, count)
    numbers[list(without)] = -1
    ids = [different[number] if number >= 0 else np.zeros(0, int) for number in numbers]
    return text_index.Texts(np.concatenate(ids), np.cumsum([0, *map(len, ids)]), numbers, 0)


def vectors_of(texts, files=None, noise=0.3):
    """A vector for each example, near that of its image's first text."""
    rng, count = np.random.default_rng(3), len(texts.numbers)
    files = np.arange(count) if files is None else files
    near = {
        f: text_vector(texts.ids(i) if texts.lengths[i] else [1]) for i, f in reversed([*enumerate(files.tolist())])
    }
    z = np.stack([near[f] for f in files.tolist()]) + noise * rng.normal(size=(count, 6))
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


def evaluate(
    tmp_path, texts=None, *, z=None, files=None, broken=(5, 9), unreadable=(7,), indices=None, tower=text_tower
):
    texts = captions() if texts is None else texts
    z = vectors_of(texts, files) if z is None else z
    images = open_images(Labelled([0] * len(z), 1, broken=broken))
    images.sizes[list(unreadable)] = 0
    loaders = dict(zip((4, 16), stream.eval_loaders(make_config(), [(images, b, indices) for b in (4, 16)])))

    def forward(params, batch):  # of more than 4 tokens an image is understood, else it is mistaken for image 0
        small = (batch.images.segment_ids > 0).sum() <= 4 * (batch.index >= 0).sum()
        return None, z[np.where(small, 0, batch.index)]

    seen = {budget: outputs.vectors(forward, None, loader, same) for budget, loader in loaders.items()}
    return retrieval.run(seen, tower, None, same, texts, files, rows=2, workdir=tmp_path), z, texts


def assert_scores(got, budget, image_ranks, text_ranks):
    for side, rank in (("i2t", np.array(image_ranks)), ("t2i", np.array(text_ranks))):
        for k in (1, 5, 10):
            assert got[f"retrieval/{side}_r{k}@{budget}"] == pytest.approx((rank[rank >= 0] < k).mean())


def test_a_run_equals_the_dense_reference(tmp_path):
    encoded = []

    def tower(params, packed):
        encoded.append(int((packed.grids[:, :, 2] > 0).sum()))
        return text_tower(params, packed)

    got, z, texts = evaluate(tmp_path, tower=tower)
    paired = [i for i in range(40) if i not in (3, 4)]
    usable = [i for i in paired if i not in (5, 7, 9)]
    y, numbers = np.stack([text_vector(texts.ids(i)) for i in paired]), [{int(texts.numbers[i])} for i in usable]
    for budget, x in ((16, z[usable]), (4, z[[0] * len(usable)])):
        assert_scores(got, budget, *reference(x, numbers, y, texts.numbers[paired]))
    assert 0.3 < got["retrieval/i2t_r1@16"] < 1 and 0.3 < got["retrieval/t2i_r1@16"] < 1
    assert got["retrieval/images"] == 35
    assert got["retrieval/texts"] == sum(encoded) == len(set(texts.numbers[paired].tolist()))


def test_five_captions_an_image_can_be_found_without_a_mistake(tmp_path):
    """Each is the image's, so none of its copies and none of its other captions stands in the way."""
    rng = np.random.default_rng(5)
    files, ids = np.arange(40) // 5, [rng.integers(0, 200, 8) for _ in range(40)]
    texts = text_index.Texts(np.concatenate(ids), np.arange(41) * 8, np.arange(40), 0)
    z = np.linalg.qr(rng.normal(size=(40, 40)))[0][files].astype(np.float32)
    near = z + 0.01 * rng.normal(size=z.shape)
    near = {tuple(of_one.tolist()): v / np.linalg.norm(v) for of_one, v in zip(ids, near)}

    def tower(params, packed):
        z_BME = np.zeros((*packed.grids.shape[:2], 40), np.float32)
        for b, m in np.argwhere(packed.grids[:, :, 2] > 0):
            z_BME[b, m] = near[tuple(packed.values[b, packed.segment_ids[b] == m + 1].tolist())]
        return z_BME

    got = evaluate(tmp_path, texts, z=z, files=files, broken=(), unreadable=(), tower=tower)[0]
    assert {got[f"retrieval/{side}_r{k}@16"] for side in ("i2t", "t2i") for k in (1, 5, 10)} == {1.0}
    assert got["retrieval/images"] == 8 and got["retrieval/texts"] == 40


@pytest.mark.parametrize("seed", range(4))
def test_images_with_several_captions_equal_the_dense_reference(tmp_path, seed):
    """Random files, equal captions of one and of several images, examples without text, broken ones, a part of them."""
    rng = np.random.default_rng(seed)
    files, texts = rng.integers(0, 12, 40), captions(without=rng.choice(40, 6, replace=False), seed=seed)
    indices = np.sort(rng.choice(40, 25, replace=False)) if seed % 2 else np.arange(40)
    bad, z = set(rng.choice(40, 8, replace=False).tolist()), vectors_of(texts, files, noise=0.5)
    got = evaluate(tmp_path, texts, z=z, files=files, indices=indices, broken=bad, unreadable=())[0]
    wanted = {int(files[i]) for i in indices}
    pairs = [i for i in range(40) if texts.lengths[i] and int(files[i]) in wanted]
    captioned, come = {int(files[i]) for i in pairs}, {int(files[i]) for i in indices if i not in bad}
    images = sorted(captioned & come)
    x = np.stack([z[min(i for i in indices if files[i] == f and i not in bad)] for f in images])
    numbers = [{int(texts.numbers[i]) for i in pairs if files[i] == f} for f in images]
    y = np.stack([text_vector(texts.ids(i)) for i in pairs])
    assert_scores(got, 16, *reference(x, numbers, y, texts.numbers[pairs]))
    assert got["retrieval/images"] == len(images) and got["retrieval/texts"] == len(set(texts.numbers[pairs].tolist()))


def test_only_the_images_of_the_loader_take_part(tmp_path):
    indices, asked = np.array([0, 3, 5, 8, 12, 20, 21, 33]), []

    class Asked(text_index.Texts):
        def ids(self, i):
            asked.append(i)
            return super().ids(i)

    texts = captions()
    watched = Asked(texts.tokens, texts.starts, texts.numbers, 0)
    got, z, _ = evaluate(tmp_path, watched, z=vectors_of(texts), indices=indices)
    paired, usable = [0, 5, 8, 12, 20, 21, 33], [0, 8, 12, 20, 21, 33]
    y, numbers = np.stack([text_vector(texts.ids(i)) for i in paired]), [{int(texts.numbers[i])} for i in usable]
    i2t, _ = reference(z[usable], numbers, y, texts.numbers[paired])
    assert got["retrieval/images"] == 6 and got["retrieval/i2t_r1@16"] == pytest.approx(np.mean(np.array(i2t) < 1))
    assert asked and set(asked) <= set(paired) and len(asked) == got["retrieval/texts"]


def test_the_table_and_the_picture(tmp_path):
    got = evaluate(tmp_path)[0]
    table = list(csv.DictReader((tmp_path / "retrieval.csv").open()))
    assert [row["budget"] for row in table] == ["4", "16"] and float(table[0]["tokens"]) < float(table[1]["tokens"])
    for row in table:
        for name in ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10"):
            assert float(row[name]) == got[f"retrieval/{name}@{row['budget']}"]
    assert (tmp_path / "retrieval_over_tokens.png").stat().st_size > 10_000


def test_data_without_texts_is_refused(tmp_path):
    with pytest.raises(UserError, match="text_field"):
        evaluate(tmp_path, captions(without=range(40)))


def test_vectors_that_are_not_finite_have_no_rank(tmp_path):
    z = unit(np.random.default_rng(4), 40, 6)
    z[11, 2] = np.nan
    with pytest.raises(RuntimeError, match="image 11"):
        evaluate(tmp_path, z=z)
