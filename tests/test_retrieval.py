"""Promises of retrieval: ranks as a full sort gives them, ties against the query, memory of blocks alone."""

import csv
import tracemalloc

import numpy as np
import pytest
from fake_text_tower import text_tower, text_vector
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluators import Labelled, make_config, open_images, same

from input_pipeline import stream
from input_pipeline.errors import UserError
from navit_jax.evaluators import retrieval


def sorted_rank(scores, own):
    """Where the first own item stands when all are sorted, own ones behind others of the same score; -1: none."""
    order = np.lexsort((own, -scores))
    return int(np.argmax(own[order])) if own.any() else -1


def reference(x, number_x, y, number_y):
    scores = np.round(x.astype(np.float64) @ y.astype(np.float64).T, 12)
    same_number = np.equal.outer(number_x, number_y)
    return (
        [sorted_rank(*pair) for pair in zip(scores, same_number)],
        [sorted_rank(*pair) for pair in zip(scores.T, same_number.T)],
    )


def unit(rng, count, width=16):
    z = rng.normal(size=(count, width))
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(1, 50), st.booleans(), st.integers(0, 99)
)
def test_ranks_are_those_of_a_full_sort(n, m, different, block, ties, seed):
    rng = np.random.default_rng(seed)
    number_x, number_y = rng.integers(0, different, n), rng.integers(0, different, m)
    x, y = unit(rng, n), unit(rng, m)
    if ties:  # corners of a cube: scores are quarters, and most are equal
        x, y = (rng.choice([-0.5, 0.5], (count, 4)).astype(np.float32) for count in (n, m))
    got = retrieval.ranks(x, number_x, y, number_y, block=block)
    for mine, expected in zip(got, reference(x, number_x, y, number_y), strict=True):
        assert mine.tolist() == expected


def test_blocks_change_nothing_for_copies_of_long_vectors():
    """Copies tie exactly, though a product of other blocks rounds otherwise."""
    rng = np.random.default_rng(0)
    x, y = unit(rng, 12, 700)[rng.integers(0, 12, 300)], unit(rng, 9, 700)[rng.integers(0, 9, 200)]
    number_x, number_y = rng.integers(0, 30, 300), rng.integers(0, 30, 200)
    expected = reference(x, number_x, y, number_y)
    for block in (7, 64, 1024):
        got = retrieval.ranks(x, number_x, y, number_y, block=block)
        assert [side.tolist() for side in got] == list(expected)


def test_recall_of_ranks():
    got = retrieval.recalls(np.array([0, 4, 5, -1, 10]), np.array([-1, 9, 1, 1]))
    assert got == pytest.approx(dict(i2t_r1=0.25, i2t_r5=0.5, i2t_r10=0.75, t2i_r1=0, t2i_r5=2 / 3, t2i_r10=1))


def test_perfect_random_and_collapsed_vectors():
    rng, numbers = np.random.default_rng(1), np.arange(2000)
    x, y = unit(rng, 2000), unit(rng, 2000)
    perfect = retrieval.recalls(*retrieval.ranks(x, numbers, x, numbers))
    assert set(perfect.values()) == {1.0}
    chance = retrieval.recalls(*retrieval.ranks(x, numbers, y, numbers))
    for side in ("i2t", "t2i"):
        for k in (1, 5, 10):
            assert abs(chance[f"{side}_r{k}"] - k / 2000) < 5 * np.sqrt(k) / 2000
    collapsed = np.repeat(x[:1], 2000, 0)
    assert set(retrieval.recalls(*retrieval.ranks(collapsed, numbers, collapsed, numbers)).values()) == {0.0}


def test_memory_is_of_blocks():
    rng = np.random.default_rng(2)
    x, y, numbers = unit(rng, 3000), unit(rng, 3000), rng.permutation(3000)
    tracemalloc.start()
    try:
        retrieval.ranks(x, numbers, y, numbers, block=128)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3000 * 3000 / 8  # bytes: a bit for each pair


def captions(count, seed=0):
    """Token ids and numbers of images; some texts are equal, images 3 and 4 have none."""
    rng = np.random.default_rng(seed)
    different = [rng.integers(0, 200, n).astype(np.int32) for n in rng.integers(2, 20, 15)]
    numbers = rng.integers(0, 15, count)
    ids = [different[number] for number in numbers]
    for i in (3, 4):
        ids[i], numbers[i] = np.zeros(0, np.int32), -1
    return ids, numbers


def evaluate(tmp_path, *, broken=(5, 9), unreadable=(7,), indices=None, noise=0.3, z=None, ids=None, tower=text_tower):
    rng = np.random.default_rng(3)
    given_ids, numbers = captions(40)
    ids = given_ids if ids is None else ids
    if z is None:
        z = np.stack([text_vector(of_one if len(of_one) else [1]) for of_one in ids]) + noise * rng.normal(size=(40, 6))
        z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
    images = open_images(Labelled([0] * 40, 1, broken=broken))
    images.sizes[list(unreadable)] = 0
    loaders = dict(zip((4, 16), stream.eval_loaders(make_config(), [(images, b, indices) for b in (4, 16)])))

    def forward(params, batch):  # of more than 4 tokens an image is understood, else it is mistaken for image 0
        small = (batch.images.segment_ids > 0).sum() <= 4 * (batch.index >= 0).sum()
        return None, z[np.where(small, 0, batch.index)]

    got = retrieval.run(forward, tower, None, loaders, same, ids, numbers, rows=2, workdir=tmp_path)
    return got, z, ids, numbers


def test_a_run_equals_the_dense_reference(tmp_path):
    encoded = []

    def tower(params, packed):
        encoded.append(int((packed.grids[:, :, 2] > 0).sum()))
        return text_tower(params, packed)

    got, z, ids, numbers = evaluate(tmp_path, tower=tower)
    paired = [i for i in range(40) if len(ids[i])]
    usable = [i for i in paired if i not in (5, 7, 9)]
    y = np.stack([text_vector(ids[i]) for i in paired])
    for budget, x in ((16, z[usable]), (4, z[[0] * len(usable)])):
        i2t, t2i = reference(x, numbers[usable], y, numbers[paired])
        for side, rank in (("i2t", np.array(i2t)), ("t2i", np.array(t2i))):
            for k in (1, 5, 10):
                assert got[f"retrieval/{side}_r{k}@{budget}"] == pytest.approx((rank[rank >= 0] < k).mean())
    assert 0.3 < got["retrieval/i2t_r1@16"] < 1 and 0.3 < got["retrieval/t2i_r1@16"] < 1
    assert got["retrieval/images"] == 35 and got["retrieval/texts"] == sum(encoded) == len(set(numbers[paired]))


def test_only_the_images_of_the_loader_take_part(tmp_path):
    indices = np.array([0, 3, 5, 8, 12, 20, 21, 33])
    got, z, ids, numbers = evaluate(tmp_path, indices=indices)
    paired, usable = [0, 5, 8, 12, 20, 21, 33], [0, 8, 12, 20, 21, 33]
    y = np.stack([text_vector(ids[i]) for i in paired])
    i2t, _ = reference(z[usable], numbers[usable], y, numbers[paired])
    assert got["retrieval/images"] == 6 and got["retrieval/i2t_r1@16"] == pytest.approx(np.mean(np.array(i2t) < 1))


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
        evaluate(tmp_path, ids=[np.zeros(0, np.int32)] * 40, z=np.ones((40, 6)))


def test_vectors_that_are_not_finite_have_no_rank(tmp_path):
    z = unit(np.random.default_rng(4), 40, 6)
    z[11, 2] = np.nan
    with pytest.raises(RuntimeError, match="image 11"):
        evaluate(tmp_path, z=z)
