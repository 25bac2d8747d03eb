"""Packed texts: what a text gives, and teaches, does not depend on what shares its row; sizes, FLOPs, randomness."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import fast_jit, random_lengths, random_params

from input_pipeline.errors import UserError
from input_pipeline.packed import Packed
from navit_jax import attention, navit, text_tower, transformer

T, M, V = 24, 4, 40
SIZES = dict(width=32, depth=2, heads=2, mlp_dim=48, vocab_size=V, max_tokens=T)
KINDS = [dict(pool="last"), dict(pool="map", bias=True), dict(pool="mean", remat="dots", qk_norm=False)]


def name_of(fields):
    return fields["pool"]


def build(**fields):
    cfg = text_tower.TextConfig(**(SIZES | fields))
    graphdef, state = nnx.split(nnx.eval_shape(lambda: text_tower.TextTower(cfg, rngs=nnx.Rngs(0))))
    return graphdef, random_params(nnx.to_pure_dict(state))


def pack(texts_per_row, length=T, slots=M):
    """Rows of texts, each an array of token ids, by the rules of `Packed`."""
    rows = len(texts_per_row)
    values, ids, coords = (np.zeros((rows, length, *end), np.int32) for end in ((), (), (3,)))
    grids = np.zeros((rows, slots, 3), np.int32)
    for b, texts in enumerate(texts_per_row):
        start = 0
        for m, text in enumerate(texts):
            here = slice(start, start + len(text))
            values[b, here], ids[b, here], coords[b, here, 2] = text, m + 1, np.arange(len(text))
            grids[b, m] = 1, 1, len(text)
            start = here.stop
    return Packed(values, ids, coords, grids)


def random_rows(rng, rows=3):
    lengths = [[T], *random_lengths(rng, rows - 1, T, M)]
    return [[rng.integers(0, V, n) for n in row] for row in lengths]


def run(graphdef, params, texts, key=None):
    return fast_jit(lambda p, x, k: navit.merge(graphdef, p)(x, key=k))(params, texts, key)


def gradient_and_output(graphdef):
    def loss(params, texts, weights):
        pooled = navit.merge(graphdef, params)(texts)
        return (pooled * weights).sum(), pooled

    return fast_jit(jax.grad(loss, has_aux=True))


@pytest.mark.parametrize("fields", KINDS, ids=name_of)
def test_packed_equals_alone(fields):
    rng = np.random.default_rng(0)
    rows = random_rows(rng)
    graphdef, params = build(**fields)
    compiled = gradient_and_output(graphdef)
    weights = rng.standard_normal((len(rows), M, 32)).astype(
        np.float32
    )  # also on empty slots, which must teach nothing
    gradients, pooled = compiled(params, pack(rows), weights)
    total = jax.tree.map(np.zeros_like, params)
    for b, row in enumerate(rows):
        assert not np.asarray(pooled[b, len(row) :]).any()
        for m, text in enumerate(row):
            weight = np.zeros_like(weights)
            weight[0, 0] = weights[b, m]
            gradient, alone = compiled(params, pack([[text], [], []]), weight)
            np.testing.assert_allclose(pooled[b, m], alone[0, 0], atol=1e-5, rtol=1e-5)
            total = jax.tree.map(np.add, total, gradient)

    def same(path, ours, theirs):
        size = max(1.0, float(np.abs(theirs).max()))
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * size, rtol=1e-5, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(same, gradients, total)


def test_the_last_token_after_the_layers_written_out():
    """One text in a row of its length: rows of both tables, the blocks one by one, the norm, the last vector."""
    graphdef, params = build()
    text = np.random.default_rng(1).integers(0, V, 9)
    cfg = text_tower.TextConfig(**SIZES)
    block = nnx.split(nnx.eval_shape(lambda: transformer.Block(cfg, rngs=nnx.Rngs(0))))[0]
    groups = attention.make_groups(jnp.ones((1, len(text)), jnp.int32))

    @fast_jit
    def last(params):
        x_BTD = (params["table"][text] + params["positions"][: len(text)])[None]
        for i in range(2):
            layer = nnx.merge(block, jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]))
            x_BTD = layer(x_BTD, groups, None, lambda y, _: y)
        return navit.merge(graphdef, params).norm(x_BTD)[0, -1]

    got = run(graphdef, params, pack([[np.arange(3), text]]))
    np.testing.assert_allclose(got[0, 1], last(jax.tree.map(jnp.asarray, params)), atol=1e-5)


@pytest.mark.parametrize("fields", KINDS, ids=name_of)
def test_other_tokens_beside_a_text_change_nothing(fields):
    graphdef, params = build(**fields)
    rng = np.random.default_rng(2)
    mine, *beside = (rng.integers(0, V, n) for n in (7, 9, 6))
    others = [rng.integers(0, V, len(text)) for text in beside]
    first, second = (run(graphdef, params, pack([[a, mine, b]])) for a, b in (beside, others))
    np.testing.assert_array_equal(first[0, 1], second[0, 1])
    assert np.abs(first[0, 0] - second[0, 0]).max() > 1e-3


@pytest.mark.parametrize("fields", KINDS, ids=name_of)
def test_gradient_to_another_texts_tokens_is_exactly_zero(fields):
    """No two texts share a token, so the rows of the table that a text's vector reaches are its own."""
    graphdef, params = build(**fields)
    tokens = np.random.default_rng(3).permutation(V)
    rows = [[tokens[:5], tokens[5:13], tokens[13:17]], [tokens[17:26], tokens[26:35]]]
    compiled = gradient_and_output(graphdef)
    for b, m in ((0, 0), (0, 1), (1, 1)):
        weights = np.zeros((2, M, 32), np.float32)
        weights[b, m] = np.arange(1, 33)
        gradient = compiled(params, pack(rows), weights)[0]
        reached = np.flatnonzero(np.asarray(gradient["table"]).any(-1))
        np.testing.assert_array_equal(reached, np.sort(rows[b][m]))
        longest = np.flatnonzero(np.asarray(gradient["positions"]).any(-1))
        np.testing.assert_array_equal(longest, np.arange(len(rows[b][m])))


def test_garbage_in_padding_changes_nothing():
    graphdef, params = build()
    rng = np.random.default_rng(4)
    texts = pack([[np.arange(5), np.arange(8)], [], [np.arange(23)]])
    padding = texts.segment_ids == 0
    values, coords = texts.values.copy(), texts.coords.copy()
    values[padding] = rng.integers(-(2**31), 2**31, padding.sum())
    coords[padding] = rng.integers(-(2**31), 2**31, (padding.sum(), 3))
    weights = rng.standard_normal((3, M, 32)).astype(np.float32)
    compiled = gradient_and_output(graphdef)
    clean, dirty = (compiled(params, x, weights) for x in (texts, texts._replace(values=values, coords=coords)))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


@pytest.mark.parametrize("fields", KINDS, ids=name_of)
def test_rows_without_texts_give_zeros_and_teach_nothing(fields):
    graphdef, params = build(**fields)
    gradients, pooled = gradient_and_output(graphdef)(params, pack([[], []]), np.ones((2, M, 32), np.float32))
    assert pooled.shape == (2, M, 32) and not np.asarray(pooled).any()
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients))  # nan would count as any


def test_the_order_of_tokens_is_seen_and_the_order_of_texts_is_not():
    graphdef, params = build()
    texts = [np.random.default_rng(i).integers(0, V, n) for i, n in enumerate((5, 8, 4))]
    before, after = (run(graphdef, params, pack([row])) for row in (texts, [texts[2], texts[0], texts[1]]))
    np.testing.assert_allclose(before[0, :3], after[0, [1, 2, 0]], atol=1e-5)
    swapped = run(graphdef, params, pack([[texts[0][[1, 0, 2, 3, 4]]]]))
    assert np.abs(swapped[0, 0] - before[0, 0]).max() > 1e-3


def test_one_trace_over_differing_batches():
    graphdef, params = build()
    traces, rng = [], np.random.default_rng(5)

    @jax.jit
    def compiled(params, texts):
        traces.append(1)
        return navit.merge(graphdef, params)(texts)

    for _ in range(5):
        assert np.isfinite(compiled(params, pack(random_rows(rng)))).all()
    assert len(traces) == 1


def test_vectors_are_float32_and_near_in_bfloat16():
    graphdef, params = build()
    texts = pack(random_rows(np.random.default_rng(6)))
    exact, rounded = (run(g, params, texts) for g in (graphdef, build(dtype="bfloat16")[0]))
    assert rounded.dtype == jnp.float32
    assert 0 < np.abs(exact - rounded).max() < 0.1 * np.abs(exact).max()


def test_randomness_needs_a_key_and_follows_it():
    graphdef, params = build(dropout=0.2, stochastic_depth=0.3)
    texts = pack(random_rows(np.random.default_rng(7)))
    calm, a, a_again, b = (run(graphdef, params, texts, k) for k in (None, *map(jax.random.key, (0, 0, 1))))
    np.testing.assert_array_equal(calm, run(*build(), texts))
    np.testing.assert_array_equal(a, a_again)
    assert np.abs(a - b)[0, 0].max() > 1e-3 and np.abs(a - calm)[0, 0].max() > 1e-3


def test_a_fresh_tower_has_small_tables():
    cfg = text_tower.TextConfig(**(SIZES | dict(vocab_size=500, depth=1)))
    tower = text_tower.TextTower(cfg, rngs=nnx.Rngs(0))
    assert tower.table.shape == (500, 32) and tower.positions.shape == (T, 32)
    for table in (tower.table[...], tower.positions[...]):
        assert table.dtype == jnp.float32
        np.testing.assert_allclose(table.std(), 0.02, rtol=0.1)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(pool="cls"), "text.pool is 'cls'.*last, map, mean"),
        (dict(width=33), "text.width 33 .*2 heads.*text.heads"),
        (dict(depth=-1), "text.depth is -1"),
        (dict(vocab_size=0), "text.vocab_size is 0"),
        (dict(max_tokens=0), "text.max_tokens is 0"),
        (dict(attention="fast"), "dense"),
    ],
)
def test_towers_that_cannot_work_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        text_tower.TextConfig(**(SIZES | fields))


@pytest.mark.parametrize("pool", ["last", "map", "mean"])
def test_flops_against_the_compiler(pool):
    """One layer (the compiler counts a scan's body once), one text filling each row; less what reads the positions."""
    rows, length = 2, 128
    sizes = dict(width=128, depth=1, heads=2, mlp_dim=512, vocab_size=V, max_tokens=length, pool=pool)
    graphdef, params = build(**sizes)
    texts = pack([[np.zeros(length, np.int32)]] * rows, length, 1)
    compiled = jax.jit(lambda p, x: navit.merge(graphdef, p)(x)).lower(params, texts).compile()
    counted = compiled.cost_analysis()["flops"] - 2 * rows * length * length * 128
    expected = text_tower.flops_forward(text_tower.TextConfig(**(SIZES | sizes)), [length] * rows)
    assert expected == pytest.approx(counted, rel=0.04)
