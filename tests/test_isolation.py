"""The promise of packing: what an image gives, and teaches, does not depend on what shares its row."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Image, fast_jit, pack, random_image, random_lengths, random_packed, random_params

from navit_jax import navit

L, K, PATCH, CLASSES = 24, 4, 2, 3
P = PATCH * PATCH * 3
FACTORISED = [
    dict(posemb=kind, posemb_coords=coords, posemb_combine=combine)
    for kind in ("learned", "sinusoidal")
    for coords in ("absolute", "fractional")
    for combine in ("sum", "product", "concat")
]
OTHERS = [
    *(dict(posemb=kind, posemb_coords=coords) for kind in ("fourier", "rope") for coords in ("absolute", "fractional")),
    dict(posemb="table"),
    dict(posemb="none"),
]
OPTIONS = [
    dict(posemb="learned", posemb_beyond="interpolate", posemb_max=5),
    dict(posemb="rope", pool="mean", registers=2),
    dict(posemb="table", bias=True, qk_norm=False, registers=1, embed_norm="entry"),
    dict(posemb="none", stored_patch_size=4, remat="dots"),
    dict(
        pool="first", registers=2, norm="rms", mlp="swiglu", embed_norm="both", posemb="rope", posemb_coords="centred"
    ),
    dict(pool="query", qk_rms=True, mlp="gelu", head_size=4, norm_pooled=True, posemb_coords="resized", bias=True),
]
FOREIGN = [
    dict(posemb="rope", rope_axes="alternate", rope_base=100.0, mlp="quick_gelu", layer_scale=0.5, norm_tokens=False),
    dict(posemb="table", posemb_grid=(3, 5), posemb_resize="bicubic", pre_logits=7, mean=(0.1, 0.2, 0.3), std=(0.4,)),
    dict(posemb="table", posemb_resize="bicubic_antialias", posemb_square=True, pool="mean", norm_pooled=True),
]
QUICK = [FACTORISED[0], OTHERS[1], OPTIONS[1], *OPTIONS[4:6]]  # the others are in the slow set


def name_of(fields):
    return "-".join(str(v) for v in fields.values())


def build(**fields):
    sizes = dict(width=16, depth=2, heads=2, mlp_dim=24, patch_size=PATCH, num_classes=CLASSES, posemb_max=12)
    cfg = navit.NaViTConfig(**(sizes | fields))
    graphdef, shapes = navit.abstract(cfg)
    return graphdef, random_params(shapes)


def outputs(graphdef, params, images):
    return navit.merge(graphdef, params)(images)[0]


def packed_and_alone(graphdef):
    """One compiled function: logits and parameter gradients of a weighted sum over the slots."""

    def loss(params, images, weights):
        logits = outputs(graphdef, params, images)
        return (logits * weights).sum(), logits

    return fast_jit(jax.grad(loss, has_aux=True))


def random_rows(rng, rows=3, dtype=np.uint8):
    lengths = [[L], *random_lengths(rng, rows - 1, L, K)]
    return [[random_image(rng, n, P, dtype) for n in row] for row in lengths]


def check_same(fields, seed):
    rng = np.random.default_rng(seed)
    rows = random_rows(rng)
    graphdef, params = build(**fields)
    run = packed_and_alone(graphdef)
    weights = rng.standard_normal((len(rows), K, CLASSES)).astype(np.float32)
    used = np.arange(K) < np.array([[len(row)] for row in rows])
    gradients, logits = run(params, pack(rows, L, K, P), weights * used[..., None])
    total = jax.tree.map(np.zeros_like, params)
    for b, row in enumerate(rows):
        for k, image in enumerate(row):
            alone = pack([[image], [], []], L, K, P)
            weight = np.zeros_like(weights)
            weight[0, 0] = weights[b, k]
            gradient, logits_alone = run(params, alone, weight)
            np.testing.assert_allclose(logits[b, k], logits_alone[0, 0], atol=1e-5, rtol=1e-5)
            total = jax.tree.map(np.add, total, gradient)
    for path, ours in jax.tree_util.tree_leaves_with_path(gradients):
        theirs = total
        for part in path:
            theirs = theirs[part.key]
        size = max(1.0, float(np.abs(theirs).max()))
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * size, rtol=1e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("fields", QUICK, ids=name_of)
def test_packed_equals_alone(fields):
    check_same(fields, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["map", "mean"])
@pytest.mark.parametrize("fields", FACTORISED + OTHERS + OPTIONS + FOREIGN, ids=name_of)
def test_packed_equals_alone_for_every_choice(fields, pool):
    for seed in range(1, 4):
        check_same(fields | {"pool": pool}, seed)


def test_alone_needs_no_padding():
    """The same image in a row of exactly its length with one slot: no padding, no mask, nothing beside it."""
    graphdef, params = build(registers=1)
    rows = random_rows(np.random.default_rng(3))
    image = rows[1][0]
    run = fast_jit(partial(outputs, graphdef, params))
    packed = run(pack(rows, L, K, P))
    alone = run(pack([[image]], len(image.values_nP), 1, P))
    np.testing.assert_allclose(packed[1, 0], alone[0, 0], atol=1e-5)


@pytest.mark.parametrize("fields", [dict(), dict(posemb="rope", registers=1, pool="mean")], ids=["map", "mean"])
def test_other_pixels_beside_an_image_change_nothing(fields):
    graphdef, params = build(**fields)
    rng = np.random.default_rng(4)
    mine, *beside = (random_image(rng, n, P) for n in (7, 9, 6))
    others = [random_image(rng, len(image.values_nP), P) for image in beside]
    run = fast_jit(partial(outputs, graphdef, params))
    first = run(pack([[beside[0], mine, beside[1]]], L, K, P))
    second = run(pack([[others[0], mine, others[1]]], L, K, P))
    np.testing.assert_array_equal(first[0, 1], second[0, 1])
    assert np.abs(first[0, 0] - second[0, 0]).max() > 1e-3


@pytest.mark.parametrize("posemb", ["learned", "rope"])
def test_garbage_in_padding_changes_nothing(posemb):
    graphdef, params = build(posemb=posemb)
    rng = np.random.default_rng(5)
    images = random_packed(rng, [[5, 8], [], [23]], L, K, P)
    padding = images.segment_ids == 0
    values, coords = images.values.copy(), images.coords.copy()
    values[padding] = rng.integers(0, 256, (padding.sum(), P))
    coords[padding] = rng.integers(-(2**31), 2**31, (padding.sum(), 3))
    weights = rng.standard_normal((3, K, CLASSES)).astype(np.float32) * (images.grids[..., :1] > 0)
    run = packed_and_alone(graphdef)
    clean, dirty = run(params, images, weights), run(params, images._replace(values=values, coords=coords), weights)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


@pytest.mark.parametrize("fields", [dict(), dict(pool="mean", registers=2)], ids=["map", "mean-registers"])
def test_gradient_to_another_images_pixels_is_exactly_zero(fields):
    graphdef, params = build(**fields)
    images = random_packed(np.random.default_rng(6), [[5, 8, 4], [9, 9]], L, K, P, np.float32)

    def output(values, b, k):
        return outputs(graphdef, params, images._replace(values=values))[b, k] @ jnp.arange(1.0, CLASSES + 1)

    gradient = fast_jit(jax.grad(output))
    for b, k in ((0, 0), (0, 1), (1, 1)):
        reached = np.asarray(gradient(images.values, b, k)).any(-1)
        own = (images.segment_ids == k + 1) & (np.arange(2) == b)[:, None]
        np.testing.assert_array_equal(reached, own)


def test_permuting_images_permutes_outputs():
    graphdef, params = build()
    rng = np.random.default_rng(7)
    images = [random_image(rng, n, P) for n in (5, 8, 4, 9, 3, 12)]
    run = fast_jit(partial(outputs, graphdef, params))
    before = run(pack([images[:3], images[3:]], L, K, P))
    order = [[4, 0, 3], [2, 5, 1]]
    after = run(pack([[images[i] for i in row] for row in order], L, K, P))
    for b, row in enumerate(order):
        for k, i in enumerate(row):
            np.testing.assert_allclose(after[b, k], before[i // 3, i % 3], atol=1e-5)


@pytest.mark.parametrize(
    "fields", [dict(bias=True), dict(pool="mean", posemb="table", registers=1)], ids=["map", "mean"]
)
def test_rows_of_padding_are_finite_and_empty_slots_exactly_zero(fields):
    graphdef, params = build(**fields)

    def loss(params, images):
        logits, extra = navit.merge(graphdef, params)(images)
        return jnp.square(logits).sum() + extra["pooled"].sum(), extra["pooled"]

    run = fast_jit(jax.grad(loss, has_aux=True))
    for images in (pack([[], []], L, K, P), random_packed(np.random.default_rng(8), [[], [3, 1]], L, K, P)):
        gradients, pooled = run(params, images)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
        np.testing.assert_array_equal(np.asarray(pooled).any(-1), images.grids[..., 0] > 0)
        assert images.grids.any() or not np.any(gradients["blocks"]["mlp"]["up"]["kernel"])


def test_one_trace_over_differing_batches():
    graphdef, params = build()
    traces = []

    @jax.jit
    def run(params, images):
        traces.append(1)
        return outputs(graphdef, params, images)

    rng = np.random.default_rng(9)
    for _ in range(20):
        assert np.isfinite(run(params, pack(random_rows(rng), L, K, P))).all()
    assert len(traces) == 1


def test_the_position_is_seen():
    """A control for all the above: moving a patch inside its image does change the output, except without positions."""
    image = random_image(np.random.default_rng(10), 2, P)
    moved = Image(image.values_nP, image.coords_n3[::-1], image.grid_3)
    for fields in (FACTORISED[0], FACTORISED[9], *OTHERS[::2], OTHERS[-1]):
        graphdef, params = build(**fields)
        run = fast_jit(partial(outputs, graphdef, params))
        before, after = (run(pack([[x]], 4, 1, P)) for x in (image, moved))
        assert (np.abs(before - after).max() < 1e-5) == (fields["posemb"] == "none"), fields
