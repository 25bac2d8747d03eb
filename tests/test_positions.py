"""Position embeddings against formulas written out per token in numpy, and against jax.image.resize."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import random_packed

from input_pipeline.errors import UserError
from navit_jax import positions

M, D = 12, 16
FACTORISED = [
    (k, c, o)
    for k in ("learned", "sinusoidal")
    for c in ("absolute", "fractional")
    for o in ("sum", "product", "concat")
]


def batch(max_side=M, seed=0):
    images = random_packed(np.random.default_rng(seed), [[5, 9, 1], [20], []], 24, 3, 1, max_side=max_side)
    return images, positions.token_sides(images.segment_ids, images.grids)


def embedding(kind, coords="absolute", combine="sum", beyond="error"):
    cfg = positions.PositionConfig(
        posemb=kind, posemb_coords=coords, posemb_combine=combine, posemb_max=M, posemb_beyond=beyond
    )
    cfg.check_positions(D, 4)
    return positions.PositionEmbedding(cfg, D, rngs=nnx.Rngs(0))


def real_tokens(images):
    for b, l in zip(*np.nonzero(images.segment_ids)):
        yield (b, l), images.coords[b, l, 1:], images.grids[b, images.segment_ids[b, l] - 1, 1:]


def interpolated(table, at):
    return np.stack([np.interp(at, np.arange(len(table)), column) for column in table.T])


def sinusoidal(at, width):
    """The table's rows at the two integers around `at`, mixed."""
    row = lambda m: np.array(  # noqa: E731
        [f(m / 10000 ** (2 * i / width)) for f in (np.sin, np.cos) for i in range(width // 2)]
    )
    low = int(np.floor(at))
    return row(low) * (1 - (at - low)) + row(low + 1) * (at - low)


@pytest.mark.parametrize("kind, coords, combine", FACTORISED)
def test_factorised_embeddings_follow_their_formula(kind, coords, combine):
    model = embedding(kind, coords, combine)
    images, sides = batch()
    got = model(images.coords, sides)
    assert got.shape == (3, 24, D) and got.dtype == jnp.float32
    part = D // 2 if combine == "concat" else D
    for at, yx, grid in real_tokens(images):
        where = yx * (M - 1) / grid if coords == "fractional" else yx
        if kind == "learned":
            y, x = (interpolated(np.asarray(t[...]), w) for t, w in zip((model.y, model.x), where))
        else:
            y, x = (sinusoidal(w, part) for w in where)
            x = x if combine == "concat" else x[::-1]
        expected = {"sum": y + x, "product": y * x, "concat": np.concatenate([y, x])}[combine]
        np.testing.assert_allclose(got[at], expected, atol=1e-5)


@pytest.mark.parametrize("kind, coords, combine", FACTORISED)
def test_rows_and_columns_are_told_apart(kind, coords, combine):
    """Every patch of an 8 x 8 image gets a place of its own; (y, x) and (x, y) above all."""
    y, x = np.divmod(np.arange(64), 8)
    got = embedding(kind, coords, combine)(np.stack([0 * y, y, x], axis=1)[None], np.full((1, 64, 2), 8))[0]
    distance = np.linalg.norm(got[:, None] - got[None], axis=-1) / np.linalg.norm(got, axis=-1).mean()
    assert distance[~np.eye(64, dtype=bool)].min() > 0.03


@pytest.mark.parametrize("coords", ["absolute", "fractional"])
def test_fourier_is_one_linear_map_then_sine_and_cosine(coords):
    model = embedding("fourier", coords)
    images, sides = batch()
    got = model(images.coords, sides)
    for at, yx, grid in real_tokens(images):
        angles = (yx / grid if coords == "fractional" else yx) @ np.asarray(model.frequencies[...], np.float64)
        np.testing.assert_allclose(got[at], np.concatenate([np.sin(angles), np.cos(angles)]), atol=2e-5)


def test_absolute_lookup_is_exact_and_trains_only_what_was_read():
    model = embedding("learned")
    coords = jnp.array([[[0, 3, 5]]])
    got = model(coords, jnp.array([[[8, 8]]]))[0, 0]
    np.testing.assert_array_equal(got, model.y[3] + model.x[5])
    graphdef, state = nnx.split(model)
    gradient = jax.grad(lambda s: nnx.merge(graphdef, s)(coords, jnp.array([[[8, 8]]])).sum())(state)
    np.testing.assert_array_equal(np.asarray(gradient["y"][...]).any(1), np.arange(M) == 3)


def test_fractional_does_not_know_the_size():
    model = embedding("learned", "fractional")
    small = model(jnp.array([[[0, 1, 2]]]), jnp.array([[[4, 4]]]))
    large = model(jnp.array([[[0, 3, 6]]]), jnp.array([[[12, 12]]]))
    np.testing.assert_allclose(small, large, atol=1e-6)


def test_beyond_the_table_is_stretched_onto_it():
    model = embedding("learned", beyond="interpolate")
    side, tall = 3 * M, jnp.array([[[3 * M, M]]])
    for y in (0, 1, 17, side - 1):
        expected = interpolated(np.asarray(model.y[...]), y * (M - 1) / (side - 1)) + np.asarray(model.x[4])
        np.testing.assert_allclose(model(jnp.array([[[0, y, 4]]]), tall)[0, 0], expected, atol=1e-6)


@pytest.mark.parametrize(
    "rows, columns", [(1, 1), (1, 16), (7, 5), (16, 16), (13, 40), (64, 64), (65, 3), (130, 97), (2, 300)]
)
def test_table_equals_jax_image_resize(rows, columns):
    model = embedding("table")
    resized = jax.image.resize(model.table[...], (rows, columns, D), "bilinear", antialias=True)
    y, x = np.divmod(np.arange(rows * columns), columns)
    coords = np.stack([0 * y, y, x], axis=1)[None]
    got = model(coords, np.broadcast_to([rows, columns], (1, rows * columns, 2)))
    np.testing.assert_allclose(got[0].reshape(rows, columns, D), resized, atol=2e-6)


@pytest.mark.parametrize("rows, columns", [(3, 5), (5, 3), (9, 9), (2, 40)])
def test_cubic_table_equals_jax_image_resize(rows, columns):
    """Antialiased: JAX's cubic has the same kernel. Not antialiased: below, as JAX leaves out what lies outside."""
    cfg = positions.PositionConfig(posemb="table", posemb_grid=(5, 7), posemb_resize="bicubic_antialias")
    model = positions.PositionEmbedding(cfg, D, rngs=nnx.Rngs(0))
    resized = jax.image.resize(model.table[...], (rows, columns, D), "cubic", antialias=True)
    got = whole(model, rows, columns)
    np.testing.assert_allclose(got, resized, atol=2e-6)


def whole(model, rows, columns):
    y, x = np.divmod(np.arange(rows * columns), columns)
    coords = np.stack([0 * y, y, x], axis=1)[None]
    return model(coords, np.broadcast_to([rows, columns], (1, rows * columns, 2))).reshape(rows, columns, -1)


@pytest.mark.parametrize("old, new", [(7, 5), (5, 9), (6, 6), (2, 5), (1, 3), (3, 1)])
def test_bicubic_repeats_the_edges(old, new):
    """Keys' kernel with a = -0.75 over 4 samples, whose indices are cut to the table, sample by sample."""
    table = np.random.default_rng(0).standard_normal(old)

    def kernel(d):
        a = -0.75
        return ((a + 2) * d - (a + 3)) * d * d + 1 if d <= 1 else a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a

    weights = positions.resize_weights(jnp.arange(new)[None], jnp.full((1, new), new), old, "bicubic")[0]
    for i in range(new):
        source = (i + 0.5) * old / new - 0.5
        first = int(np.floor(source)) - 1
        expected = sum(kernel(abs(source - j)) * table[np.clip(j, 0, old - 1)] for j in range(first, first + 4))
        assert weights[i] @ table == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("old, new", [(7, 5), (5, 9), (6, 6), (2, 5), (1, 3), (9, 2)])
def test_linear_reads_between_two_rows_and_repeats_the_edges(old, new):
    table, at = np.random.default_rng(0).standard_normal(old), (np.arange(new) + 0.5) * old / new - 0.5
    weights = positions.resize_weights(jnp.arange(new)[None], jnp.full((1, new), new), old, "linear")[0]
    np.testing.assert_allclose(weights @ table, np.interp(at, np.arange(old), table), atol=1e-5)


def test_learned_tables_are_resized_as_an_image_is():
    cfg = positions.PositionConfig(posemb_coords="resized", posemb_max=M)
    model = positions.PositionEmbedding(cfg, D, rngs=nnx.Rngs(0))
    y, x = (jax.image.resize(t[...], (n, D), "bilinear", antialias=True) for t, n in ((model.y, 5), (model.x, 20)))
    np.testing.assert_allclose(whole(model, 5, 20), y[:, None] + x[None], atol=2e-6)


def test_square_tables_are_resized_to_the_longer_side_and_cut():
    cfg = positions.PositionConfig(posemb="table", posemb_square=True)
    model = positions.PositionEmbedding(cfg, D, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(whole(model, 4, 9), whole(model, 9, 9)[:4], atol=1e-6)


def test_rope_about_the_centre_and_with_alternating_frequencies():
    cfg = positions.PositionConfig(posemb="rope", posemb_coords="centred", rope_base=100.0, rope_axes="alternate")
    sin, cos = positions.rope(cfg, jnp.array([[[0, 2, 5]]]), jnp.array([[[4, 6]]]), 8)
    y, x = 2 * np.pi * (2 * 2.5 / 4 - 1), 2 * np.pi * (2 * 5.5 / 6 - 1)
    expected = np.array([[y, y * 100 ** (-4 / 8)], [x * 100 ** (-2 / 8), x * 100 ** (-6 / 8)]])
    np.testing.assert_allclose(sin[0, 0, 0], np.sin(expected), atol=1e-5)
    np.testing.assert_allclose(cos[0, 0, 0], np.cos(expected), atol=1e-5)


@pytest.mark.parametrize("coords", ["absolute", "fractional"])
def test_rope_rotates_pairs_by_y_and_x(coords):
    cfg = positions.PositionConfig(posemb="rope", posemb_coords=coords, posemb_max=M)
    images, sides = batch()
    x = np.random.default_rng(1).standard_normal((3, 24, 2, 12)).astype(np.float32)
    got = positions.rotate(jnp.asarray(x), positions.rope(cfg, images.coords, sides, 12))
    for at, yx, grid in real_tokens(images):
        where = yx * M / grid if coords == "fractional" else yx
        z = x[at].reshape(2, 2, 2, 3)  # head, axis, real and imaginary, frequency
        turned = (z[:, :, 0] + 1j * z[:, :, 1]) * np.exp(1j * where[:, None] * 10000.0 ** (-np.arange(3) / 3))
        expected = np.stack([turned.real, turned.imag], axis=2).reshape(2, 12)
        np.testing.assert_allclose(got[at], expected, atol=1e-5)


def test_rope_products_depend_on_the_offset_alone():
    cfg = positions.PositionConfig(posemb="rope")
    q, k = np.random.default_rng(2).standard_normal((2, 1, 1, 1, 16)).astype(np.float32)

    def product(yx_q, yx_k):
        turn = lambda z, yx: positions.rotate(z, positions.rope(cfg, jnp.array([[[0, *yx]]]), jnp.ones((1, 1, 2)), 16))  # noqa: E731
        return float((turn(q, yx_q) * turn(k, yx_k)).sum())

    assert product((3, 4), (1, 9)) == pytest.approx(product((13, 6), (11, 11)), abs=1e-4)
    assert product((3, 4), (1, 9)) != pytest.approx(product((3, 4), (9, 1)), abs=1e-3)


@pytest.mark.parametrize("kind", ["learned", "sinusoidal", "fourier", "table", "rope"])
def test_garbage_in_padding_gives_finite_numbers(kind):
    garbage = jnp.array([[[-7, 2**31 - 1, -(2**31)]] * 2])
    sides = positions.token_sides(jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 3, 3), jnp.int32))
    assert sides.min() == 1
    for coords in ("absolute", "fractional"):
        if kind == "rope":
            out = positions.rope(positions.PositionConfig(posemb="rope", posemb_coords=coords), garbage, sides, 8)
        else:
            out = embedding(kind, coords, beyond="interpolate")(garbage, sides)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))
    for resize in positions.RESIZES:
        cfg = positions.PositionConfig(posemb="table", posemb_resize=resize)
        assert np.isfinite(positions.PositionEmbedding(cfg, D, rngs=nnx.Rngs(0))(garbage, sides)).all()


@pytest.mark.parametrize(
    "fields, width, head_dim, words",
    [
        (dict(posemb="fourier", posemb_combine="product"), 16, 8, "posemb_combine.*sum"),
        (dict(posemb="rope", posemb_combine="concat"), 16, 8, "posemb_combine.*sum"),
        (dict(posemb="rope"), 12, 6, "multiple of 4"),
        (dict(posemb="sinusoidal", posemb_combine="concat"), 18, 6, "multiple of 4"),
        (dict(posemb="rotary"), 16, 8, "one of learned"),
        (dict(posemb_coords="relative"), 16, 8, "absolute, fractional"),
        (dict(posemb_beyond="wrap"), 16, 8, "error, interpolate"),
        (dict(posemb_max=1), 16, 8, "2 rows"),
        (dict(posemb="table", posemb_coords="resized"), 16, 8, "only posemb 'learned'"),
        (dict(posemb_coords="centred"), 16, 8, "only posemb 'rope'"),
        (dict(posemb_grid=(0, 4)), 16, 8, "rows and columns"),
        (dict(posemb_resize="nearest"), 16, 8, "one of bilinear"),
    ],
)
def test_choices_that_cannot_work_are_refused(fields, width, head_dim, words):
    with pytest.raises(UserError, match=words):
        positions.PositionConfig(**fields).check_positions(width, head_dim)
