"""Windows and the 2x2 merger: who sees whom, what compiles, what is refused."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Image, fast_jit, pack, random_image, random_packed, random_params

from configs import base
from input_pipeline import checks
from input_pipeline.budget import Sampler
from input_pipeline.capacity import Capacity
from input_pipeline.errors import UserError
from navit_jax import arrangement, attention, merger, navit, positions, transformer

PATCH, P = 2, 12
SIZES = dict(width=16, depth=4, heads=2, mlp_dim=24, patch_size=PATCH, posemb="rope", pool="mean", norm="rms")
GRIDS = ((4, 6), (2, 2), (6, 2))
L, K = 56, 5  # 40 patches in three images, 16 of padding
SLOW = pytest.mark.slow


def build(**fields):
    cfg = navit.NaViTConfig(**(SIZES | fields))
    graphdef, shapes = navit.abstract(cfg)
    return cfg, graphdef, random_params(shapes)


MERGED = dict(depth=2, window=4, full_blocks=(1,), merge=8, bias=True, num_classes=3, norm_pooled=True)


@functools.cache
def model(**fields):
    """(config, parameters, a compiled function of parameters and images: tokens, pooled, logits)."""
    cfg, graphdef, params = build(**fields)

    def run(params, images):
        model = navit.merge(graphdef, params)
        logits_BKC, extra = model(images)
        return model.tokens(images), extra["pooled"], logits_BKC

    return cfg, params, fast_jit(run)


def whole_images(seed=0, grids=GRIDS, dtype=np.uint8):
    rng, images = np.random.default_rng(seed), []
    for rows, columns in grids:
        image = random_image(rng, rows * columns, P, dtype)
        coords = np.stack([np.zeros(rows * columns), *np.divmod(np.arange(rows * columns), columns)], axis=1)
        images.append(Image(image.values_nP, coords.astype(np.int32), (1, rows, columns)))
    return pack([images], L, K, P, dtype)


def by_hand(images, slots, registers, window):
    """For each token, patches then registers, (segment, window of its image): plain loops."""
    out = []
    for b, ids in enumerate(images.segment_ids):
        out.append([(k, t, y // window, x // window) if k else None for k, (t, y, x) in zip(ids, images.coords[b])])
        out[-1] += [(k, "registers") if k in ids else None for k in range(1, slots + 1) for _ in range(registers)]
    return out


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("window", [2, 3, 4, 100])
def test_windows_lie_together_and_are_those_of_plain_loops(window, registers):
    """Also of images of which patches were dropped, and of rows that are full or empty."""
    images = random_packed(np.random.default_rng(window), [[9, 1, 20], [30], []], 30, 3, P)
    sides_BL2 = positions.token_sides(images.segment_ids, images.grids)
    windows_BL = arrangement.squares(images.coords, sides_BL2, window)
    ids_BM, windows_BM, order = arrangement.lay_out(jnp.asarray(images.segment_ids), 3, registers, windows_BL)
    expected = by_hand(images, 3, registers, window)
    for b in range(3):
        placed = [expected[b][i] for i in order.order[b]]
        np.testing.assert_array_equal(ids_BM[b], [0 if where is None else where[0] for where in placed])
        numbers = dict.fromkeys(where for where in placed if where)  # in the order of their first tokens
        wanted = {where: i + 1 for i, where in enumerate(numbers)} | {None: 0}
        np.testing.assert_array_equal(windows_BM[b], [wanted[where] for where in placed])
        for ids in (ids_BM[b], windows_BM[b]):
            steps = np.diff(np.where(ids > 0, ids, 10_000))
            assert (steps >= 0).all(), "ids ascend, so groups lie together, and padding is last"
        np.testing.assert_array_equal(np.sort(order.order[b]), np.arange(len(placed)))


def test_arranging_is_undone_and_its_gradient_is_no_scatter():
    ids = jnp.asarray(np.repeat([[1, 2, 3, 0]], [3, 2, 2, 3], axis=1))
    order = arrangement.by_key(jnp.where(ids > 0, ids, 9), jnp.asarray([[2, 1, 0, 5, 5, 1, 0, 0, 0, 0]]))
    np.testing.assert_array_equal(order.order, [[2, 1, 0, 3, 4, 6, 5, 7, 8, 9]])
    x, d = (jnp.asarray(np.random.default_rng(0).standard_normal((1, 10, 3))) for _ in range(2))
    there, pull = jax.vjp(lambda x: arrangement.arrange(x, order), x)
    np.testing.assert_array_equal(arrangement.restore(there, order), x)
    np.testing.assert_array_equal(pull(d)[0], arrangement.restore(d, order))
    assert "scatter" not in str(jax.make_jaxpr(jax.grad(lambda x: arrangement.arrange(x, order).sum()))(x))


def reach(fields, images, of):
    """[L, L] bool: whether the token at the first place depends on the pixels at the second."""
    cfg, graphdef, params = build(**fields)

    def tokens(values):
        return navit.merge(graphdef, params).tokens(images._replace(values=values))[0]

    weights = jnp.asarray(np.random.default_rng(3).standard_normal(cfg.token_width), jnp.float32)
    one = fast_jit(jax.grad(lambda values, i: tokens(values)[i] @ weights))
    return np.stack([np.asarray(one(images.values, i))[0].any(-1) for i in of])


@pytest.mark.parametrize("full_blocks", [(), (1,)], ids=["windows", "windows-and-images"])
def test_a_token_sees_its_window_or_through_a_full_block_its_image_and_nothing_else(full_blocks):
    """The gradient to all other pixels is exactly zero, also between the windows of an image."""
    images = whole_images(dtype=np.float32)
    ids, (_, y, x) = images.segment_ids[0], images.coords[0].T
    of = [0, 9, 23, 24, 27, 28, 39]
    found = reach(dict(depth=len(full_blocks) + 1, window=4, full_blocks=full_blocks), images, of)
    window = np.stack([ids, y // 4, x // 4])
    seen = np.stack([ids == ids[i] if full_blocks else (window == window[:, [i]]).all(0) for i in of])
    np.testing.assert_array_equal(found, seen)


@SLOW
def test_a_window_larger_than_all_images_changes_nothing():
    images = whole_images()
    plain, windowed = (
        fast_jit(lambda p, g=graphdef: navit.merge(g, p).tokens(images))(params)
        for _, graphdef, params in (build(registers=2), build(registers=2, window=8, full_blocks=(0, 1, 2, 3)))
    )
    real = images.segment_ids[0] > 0
    np.testing.assert_allclose(windowed[0][real], plain[0][real], atol=1e-5)
    _, graphdef, params = build()
    _, other, _ = build(window=8)
    a, b = (fast_jit(lambda p, g=g: navit.merge(g, p).tokens(images))(params) for g in (graphdef, other))
    np.testing.assert_allclose(a[0][real], b[0][real], atol=1e-5)


@pytest.mark.parametrize("pattern", [(1, 3), *(pytest.param(p, marks=SLOW) for p in ((3,), (0, 1), (0, 1, 2, 3)))])
def test_the_scan_over_a_pattern_equals_the_layers_written_out(pattern):
    images = whole_images()
    cfg, graphdef, params = build(window=2, full_blocks=pattern)
    model = navit.merge(graphdef, params)
    sides_BL2 = positions.token_sides(images.segment_ids, images.grids)
    windows_BL = arrangement.squares(images.coords, sides_BL2, 2)
    mixed_BL = jnp.where(images.segment_ids > 0, 1000 * images.segment_ids + windows_BL, 0)
    groups = [attention.make_groups(jnp.asarray(ids), contiguous=False) for ids in (mixed_BL, images.segment_ids)]
    rope = positions.rope(cfg, images.coords, sides_BL2, cfg.head_dim)
    block = nnx.split(nnx.eval_shape(lambda: transformer.Block(cfg, rngs=nnx.Rngs(0))))[0]

    @fast_jit
    def one(x_BLD, params, groups):
        return nnx.merge(block, params)(x_BLD, groups, rope, lambda y, _: y)

    x_BLD = model.embed(images.values)
    for i in range(cfg.depth):
        x_BLD = one(x_BLD, jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]), groups[i in pattern])
    real, found = images.segment_ids[0] > 0, fast_jit(lambda p: navit.merge(graphdef, p).tokens(images))(params)
    np.testing.assert_allclose(found[0][real], model.norm(x_BLD)[0][real], atol=1e-5)


@SLOW
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_remat_changes_no_gradient(remat):
    images = whole_images()
    cfg, graphdef, params = build(window=2, full_blocks=(1, 3), merge=8)
    other = navit.abstract(replace(cfg, remat=remat))[0]
    found = [fast_jit(jax.grad(lambda p, g=g: navit.merge(g, p)(images)[0].sum()))(params) for g in (graphdef, other)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), *found)


def test_a_block_is_compiled_once_whatever_the_pattern():
    """The text of a program of sixteen blocks is that of four, and no weights are cut out of their stack."""
    images = whole_images()

    def size(depth, full_blocks):
        _, graphdef, params = build(depth=depth, window=2, full_blocks=full_blocks)
        return len(jax.jit(lambda p: navit.merge(graphdef, p).tokens(images)).lower(params).as_text())

    assert size(16, (2, 7, 11, 15)) < 1.02 * size(4, (3,))
    assert size(4, (3,)) > 1.05 * size(4, (0, 1, 2, 3)), "a control: one kind of block is less than two"


@SLOW
def test_slabs_take_the_images_and_another_backend_the_windows():
    images, rows = whole_images(), Capacity(1, ((2, 24), (1, 16)))
    cfg, graphdef, params = build(window=2, full_blocks=(1, 3), registers=1)
    slabs = navit.abstract(replace(cfg, attention="slabs"))[0]
    a, b = (
        fast_jit(lambda p, g=g: navit.merge(g, p)(images._replace(capacity=rows))[0])(params) for g in (graphdef, slabs)
    )
    assert np.isfinite(b).all()
    np.testing.assert_allclose(a, b, atol=1e-5)
    with pytest.raises(UserError, match="planned within a capacity"):
        navit.merge(slabs, params)(images)


def test_the_merger_joins_squares_row_by_row():
    (_, params, run), (_, _, plain) = model(**MERGED), model(**MERGED | dict(merge=0))
    other = {name: leaf for name, leaf in params.items() if name not in ("merger", "pool_norm", "head")}
    plain_params = build(**MERGED | dict(merge=0))[2] | other
    before, after = np.asarray(plain(plain_params, whole_images())[0]), np.asarray(run(params, whole_images())[0])
    up, down = (params["merger"][name] for name in ("up", "down"))
    assert after.shape == (1, L // 4, 8)
    start = 0
    for rows, columns in GRIDS:
        here = before[0, start : start + rows * columns].reshape(rows, columns, -1)
        squares = [[here[y : y + 2, x : x + 2].ravel() for x in range(0, columns, 2)] for y in range(0, rows, 2)]
        joined = np.array(squares).reshape(rows * columns // 4, -1) @ up["kernel"] + up["bias"]
        expected = np.asarray(jax.nn.gelu(joined, approximate=False)) @ down["kernel"] + down["bias"]
        np.testing.assert_allclose(after[0, start // 4 : (start + rows * columns) // 4], expected, atol=1e-4)
        start += rows * columns


@pytest.mark.parametrize("length", [L, *(pytest.param(n, marks=SLOW) for n in (L + 1, 40))])
def test_merged_images_do_not_depend_on_the_row(length):
    _, params, run = model(**MERGED)
    each = [Image(*image) for image in _each(whole_images())]
    tokens_BMD, pooled_BKD, logits_BKC = run(params, pack([each], length, K, P))
    assert logits_BKC.shape == (1, K, 3) and pooled_BKD.shape == (1, K, 8)
    start = 0
    for k, image in enumerate(each):
        alone, (_, pooled, logits) = len(image.values_nP) // 4, run(params, pack([[image]], L, K, P))
        np.testing.assert_allclose(logits_BKC[0, k], logits[0, 0], atol=1e-5)
        mean = params["pool_norm"]["scale"] * _rms(np.asarray(tokens_BMD)[0, start : start + alone].mean(0))
        np.testing.assert_allclose(pooled[0, 0], mean, atol=1e-5)
        start += alone
    assert not np.asarray(pooled_BKD)[0, len(each) :].any()


def _rms(x):
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)


def _each(images):
    for k, grid in enumerate(GRIDS):
        here = images.segment_ids[0] == k + 1
        yield images.values[0][here], images.coords[0][here], (1, *grid)


@pytest.mark.parametrize("broken", ["odd", "dropped"])
def test_what_is_no_square_is_not_taken_for_one(broken):
    """A grid with an odd side, or a dropped patch, is seen in its tokens, in those behind it and in pooled vectors."""
    _, params, run = model(**MERGED)
    images = whole_images(grids=((4, 2), (3, 3), (2, 2)) if broken == "odd" else ((4, 2), (4, 2), (2, 2)))
    if broken == "dropped":
        keep = np.append(np.delete(np.arange(L), 11), L - 1)
        images = images._replace(**{n: getattr(images, n)[:, keep] for n in ("values", "segment_ids", "coords")})
    tokens_BMD, pooled_BKD, _ = run(params, images)
    bad = np.isnan(tokens_BMD[0]).any(-1)
    assert not bad[:2].any() and bad[[3 if broken == "odd" else 2, 4]].all() and not bad[6:].any()
    assert np.isnan(pooled_BKD[0, :3]).any(-1).all()


@pytest.mark.parametrize("fields", [dict(), dict(registers=1)], ids=["", "registers"])
def test_flops_count_the_pairs_within_windows(fields):
    """Against pairs counted one by one; without the grids every window counts as whole, never less."""
    lengths = [rows * columns for rows, columns in GRIDS]
    plain, windowed = (navit.NaViTConfig(**SIZES, **fields, **more) for more in ({}, dict(window=4, full_blocks=(1,))))
    images, registers = whole_images(), fields.get("registers", 0)
    groups = [w for w in by_hand(images, K, registers, 4)[0] if w]
    pairs = sum(a == b for a in groups for b in groups)
    whole = sum((n + registers) ** 2 for n in lengths)
    saved = 3 * (whole - pairs) * 4 * 16
    assert navit.flops_forward(plain, lengths) - navit.flops_forward(windowed, lengths, GRIDS) == pytest.approx(saved)
    assert navit.flops_forward(windowed, lengths, GRIDS) < navit.flops_forward(windowed, lengths)
    assert navit.flops_forward(windowed, lengths) < navit.flops_forward(plain, lengths)


def test_flops_of_the_merger():
    cfg = navit.NaViTConfig(**SIZES, merge=8)
    more = navit.flops_forward(cfg, [40]) - navit.flops_forward(replace(cfg, merge=0), [40])
    pooling = 10 * 2 * 8 - 40 * 2 * 16
    assert more == pytest.approx(10 * 2 * (64 * 64 + 64 * 8) + pooling) and merger.PATCHES == 4


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(full_blocks=(1,)), "window 0"),
        (dict(window=4, full_blocks=(4,)), "0 to 3"),
        (dict(window=-1), "negative"),
        (dict(merge=8, pool="map"), "'mean'"),
    ],
)
def test_configurations_that_cannot_work_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        navit.NaViTConfig(**(SIZES | fields))


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("budget", [0, 4, 50], ids=lambda n: f"budget-{n}")
def test_a_run_plans_grids_that_can_be_merged(budget, squash):
    """Even sides, within the budget, and nothing dropped; a run that drops patches is refused."""
    config = base.get_config()
    config.model.merge, config.model.posemb, config.drop.kind, config.data.squash = 8, "rope", "none", squash
    checks.check(config)
    sizes = np.random.default_rng(0).integers(20, 2000, (300, 2))
    draws = Sampler(config, sizes, 16, budget)(np.arange(300))
    assert (draws.grid % 2 == 0).all() and (draws.grid >= 2).all()
    np.testing.assert_array_equal(draws.keep, draws.grid.prod(1))
    assert draws.keep.max() <= (budget or (config.resolution.max_side / 16) ** 2)
    config.drop.kind = "beta"
    with pytest.raises(UserError, match="drop.kind is 'beta'.*model.merge"):
        checks.check(config)


def test_what_a_planner_must_know():
    assert navit.NaViTConfig(**SIZES).grid_multiple == 1 and navit.NaViTConfig(**SIZES).token_width == 16
    merged = navit.NaViTConfig(**SIZES, merge=8)
    assert (merged.grid_multiple, merged.token_width) == (2, 8)
