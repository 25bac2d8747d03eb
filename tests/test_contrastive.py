"""Two towers into one space: unit vectors, what the config makes, the scale's limit, and rules that pick one tower."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import fast_jit, random_packed, random_params
from test_text_tower import pack

from configs import base
from input_pipeline.errors import UserError
from navit_jax import contrastive, navit, optim, text_tower

L, K, T, M, E, V = 24, 4, 20, 3, 12, 40
ENCODER = dict(width=32, depth=2, heads=2, mlp_dim=48)


def build(loss="sigmoid", towers=(), **encoder):
    image = navit.NaViTConfig(**(ENCODER | encoder), patch_size=2, posemb_max=12)
    text = text_tower.TextConfig(**(ENCODER | encoder | dict(width=16)), vocab_size=V, max_tokens=T)
    bias = -10.0 if loss == "sigmoid" else None
    fields = dict(embed_dim=E, init_scale=10.0, max_scale=100.0, init_bias=bias) | dict(towers)
    cfg = contrastive.TwoTowersConfig(image=image, text=text, **fields)
    graphdef, shapes = contrastive.abstract(cfg)
    return cfg, graphdef, random_params(shapes)


def batch(seed=0):
    rng = np.random.default_rng(seed)
    images = random_packed(rng, [[5, 8], [20], []], L, K, 12)
    return images, pack([[rng.integers(0, V, 7), rng.integers(0, V, 13)], [], [rng.integers(0, V, 4)]], T, M)


def encode(graphdef, params, images, texts, keys=(None, None)):
    towers = navit.merge(graphdef, params)
    return towers.encode_images(images, key=keys[0]), towers.encode_texts(texts, key=keys[1])


def config(**fields):
    c = base.get_config()
    c.model.update(variant="Ti/16", **ENCODER)
    c.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return c


def names(tree):
    return {optim.name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


SIGLIP = dict(project_image=False, project_bias=True, embed_dim=32)
TOWERS = pytest.mark.parametrize("towers", [(), SIGLIP], ids=["plain", "siglip"])


@TOWERS
def test_a_vector_is_the_projected_one_at_length_one(towers):
    """Against float64, with pooled vectors from each tower alone; empty slots are exactly 0."""
    cfg, graphdef, params = build(towers=towers)
    images, texts = batch()
    found = fast_jit(lambda p: encode(graphdef, p, images, texts))(params)
    image = navit.abstract(cfg.image)[0]
    pooled = (
        fast_jit(lambda p: navit.merge(image, p)(images)[0])(params["image"]),
        fast_jit(lambda p: navit.merge(graphdef, p).text(texts))(params),
    )
    for z, vector, packed, name in zip(found, pooled, (images, texts), ("image", "text")):
        expected, projection = np.asarray(vector, np.float64), params.get(f"{name}_projection")
        if projection:
            expected = expected @ projection["kernel"] + projection.get("bias", 0)
        used = packed.grids[..., 0] > 0
        expected[~used] = 0
        expected[used] /= np.linalg.norm(expected[used], axis=-1, keepdims=True)
        assert z.dtype == jnp.float32 and z.shape == (*packed.grids.shape[:2], cfg.embed_dim)
        np.testing.assert_allclose(z, expected, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(z).any(-1), used)


@TOWERS
def test_empty_slots_teach_nothing_and_no_gradient_is_nan(towers):
    """A weight on every slot: its gradient is that of the filled slots, and 0 where all are empty."""
    cfg, graphdef, params = build(towers=towers)
    rng = np.random.default_rng(1)
    weights = [rng.standard_normal((3, slots, cfg.embed_dim)).astype(np.float32) for slots in (K, M)]

    @fast_jit
    @jax.grad
    def gradient(params, images, texts, weights):
        return sum((z * w).sum() for z, w in zip(encode(graphdef, params, images, texts), weights))

    images, texts = batch()
    everywhere = gradient(params, images, texts, weights)
    filled = [w * (x.grids[..., :1] > 0) for w, x in zip(weights, (images, texts))]
    jax.tree.map(np.testing.assert_array_equal, everywhere, gradient(params, images, texts, filled))
    assert np.any(everywhere["image"]["embed"]["kernel"]) and np.any(everywhere["text"]["table"])
    nothing = gradient(params, random_packed(rng, [[], [], []], L, K, 12), pack([[], [], []], T, M), weights)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(nothing))


def test_the_image_tower_is_exactly_a_navit_and_the_bias_is_the_sigmoids():
    cfg, _, params = build("softmax")
    shape = lambda leaf: leaf.shape  # noqa: E731
    assert jax.tree.map(shape, params["image"]) == jax.tree.map(shape, navit.abstract(cfg.image)[1])
    own = {name: leaf.shape for name, leaf in names(params).items() if not name.startswith(("image/", "text/blocks/"))}
    projections = {"image_projection/kernel": (32, E), "text_projection/kernel": (16, E), "logit_scale": ()}
    assert own == projections | {"text/table": (V, 16), "text/positions": (T, 16), "text/norm/scale": (16,)}
    assert set(names(build("sigmoid")[2])) == {*names(params), "logit_bias"}


def test_the_config_sets_scale_and_bias():
    c = config(contrastive__loss="sigmoid", contrastive__init_scale=7.0, contrastive__init_bias=-3.0)
    cfg = contrastive.from_config(c, vocab_size=V)
    graphdef, shapes = contrastive.abstract(cfg)
    params, other = (contrastive.init_params(cfg, seed) for seed in (0, 1))
    assert jax.tree.structure(params) == jax.tree.structure(shapes) and type(params) is dict
    assert all(leaf.dtype == jnp.float32 and not leaf.weak_type for leaf in jax.tree.leaves(params))
    towers = navit.merge(graphdef, params)
    np.testing.assert_allclose(towers.scale(), 7.0, rtol=1e-6)
    assert towers.bias() == -3.0 and towers.bias().shape == ()
    for name in ("image_projection", "text_projection"):
        assert not np.allclose(params[name]["kernel"], other[name]["kernel"])
    c.contrastive.loss = "softmax"
    graphdef, shapes = contrastive.abstract(contrastive.from_config(c, vocab_size=V))
    assert navit.merge(graphdef, random_params(shapes)).bias() == 0.0


def test_sizes_of_the_text_tower_are_the_images_unless_given():
    c = config(model__bias=True, model__dropout=0.1, model__remat="dots", data__channels=1, contrastive__embed_dim=24)
    cfg = contrastive.from_config(c, vocab_size=257)
    text = text_tower.TextConfig(**ENCODER, bias=True, dropout=0.1, remat="dots", vocab_size=257, max_tokens=64)
    assert cfg.text == text
    assert cfg.image == navit.from_config(c.model, channels=1, num_classes=0) and cfg.embed_dim == 24
    c.text.update(width=48, heads=3, pool="map", max_tokens=16, vocab_size=300)
    text = contrastive.from_config(c, vocab_size=257).text
    assert (text.width, text.heads, text.depth, text.mlp_dim) == (48, 3, 2, 48)
    assert (text.vocab_size, text.max_tokens, text.pool) == (300, 16, "map")


def test_a_siglip_by_the_config():
    c = config(contrastive__project_image=False, contrastive__project_bias=True, contrastive__embed_dim=32, text__pad=3)
    cfg = contrastive.from_config(c, vocab_size=257)
    assert (cfg.text.pad, cfg.project_image, cfg.project_bias) == (3, False, True)
    own = {name for name in names(contrastive.init_params(cfg, 0)) if "projection" in name}
    assert own == {"text_projection/kernel", "text_projection/bias"}


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(text__vocab_size=256), "text.vocab_size is 256.*bytes has 257.*text.vocab_size=257"),
        (dict(text__pool="first"), "text.pool is 'first'"),
        (dict(text__heads=5), "text.width 32 .*5 heads"),
        (dict(text__max_tokens=0), "text.max_tokens is 0"),
        (dict(text__pad=257), "text.pad is 257; the token table has rows 0 to 256"),
        (dict(contrastive__embed_dim=0), "contrastive.embed_dim is 0"),
        (dict(contrastive__project_image=False), "embed_dim is 512, .*tower's width: set it to 32"),
        (dict(contrastive__init_scale=101.0), "init_scale is 101.0.*max_scale.*100.0"),
        (dict(contrastive__init_scale=0.0), "init_scale is 0.0"),
        (dict(model__pool="last"), "model.pool is 'last'; it must be one of map, mean"),
    ],
)
def test_configurations_that_cannot_work_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        contrastive.from_config(config(**fields), vocab_size=257)


def test_the_scale_is_held_below_its_maximum_and_nothing_else_is_touched():
    _, graphdef, params = build()
    rng = np.random.default_rng(2)
    limit = jax.jit(contrastive.limit_scale, static_argnums=1)
    for log_scale in rng.uniform(-3, 9, 20).astype(np.float32):
        before = params | dict(logit_scale=jnp.asarray(log_scale))
        after = limit(before, 100.0)
        expected = before | dict(logit_scale=min(log_scale, np.float32(np.log(100.0))))
        jax.tree.map(np.testing.assert_array_equal, after, expected)
        assert navit.merge(graphdef, after).scale() <= 100.0 * (1 + 1e-6)
        assert after["logit_scale"].dtype == jnp.float32 and not after["logit_scale"].weak_type
    assert before["logit_scale"] == log_scale


def updates(params, **fields):
    """Parameters before and after two updates by random gradients."""
    cfg = base.optim()
    cfg.update(dict(schedule="constant", weight_decay=((".*kernel$", 0.1),), clip_norm=0.0) | fields)
    tx, _ = optim.make_optimizer(cfg, params, 10)
    rng = np.random.default_rng(3)
    state, trained = tx.init(params), params
    step = fast_jit(tx.update)
    for _ in range(2):
        grads = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(np.float32), params)
        change, state = step(grads, state, trained)
        trained = optax.apply_updates(trained, change)
    return names(params), names(trained)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_a_locked_image_tower_keeps_its_bits_and_all_else_trains(name):
    before, after = updates(build()[2], name=name, freeze=("^image/",))
    for path, old in before.items():
        same = np.asarray(old).tobytes() == np.asarray(after[path]).tobytes()
        assert same == path.startswith("image/"), path


def test_rates_by_tower_and_by_layer():
    params = build()[2]
    before, plain = updates(params, weight_decay=())
    rules = (("^image/blocks/", (0.5, 0.25)), ("^image/", 0.1), ("^logit_", 2.0))
    _, found = updates(params, weight_decay=(), lr_multipliers=rules, freeze=(("^text/blocks/", (1, 0)),))
    for path, old in before.items():
        whole, part = np.asarray(plain[path] - old), np.asarray(found[path] - old)
        factor = 0.1 if path.startswith("image/") else 2.0 if path.startswith("logit_") else 1.0
        if path.startswith("image/blocks/"):
            factor = np.reshape([0.5, 0.25], (2, *[1] * (whole.ndim - 1)))
        if path.startswith("text/blocks/"):
            factor = np.reshape([0.0, 1.0], (2, *[1] * (whole.ndim - 1)))
        np.testing.assert_allclose(part, factor * whole, atol=1e-6, err_msg=path)


def test_randomness_needs_a_key():
    _, graphdef, params = build(dropout=0.2)
    images, texts = batch()
    run = fast_jit(lambda p, keys: encode(graphdef, p, images, texts, keys))
    a, again, b = (run(params, tuple(jax.random.split(jax.random.key(seed)))) for seed in (0, 0, 1))
    calm = run(params, (None, None))
    jax.tree.map(np.testing.assert_array_equal, a, again)
    for i in range(2):
        assert np.abs(a[i] - b[i]).max() > 1e-3 and np.abs(a[i] - calm[i]).max() > 1e-3


def test_flops_are_those_of_both_towers_and_projections():
    cfg, siglip = build()[0], build(towers=SIGLIP)[0]
    images, texts = [5, 8, 20], [7, 13, 4, 2]
    towers = navit.flops_forward(cfg.image, images) + text_tower.flops_forward(cfg.text, texts)
    assert contrastive.flops_forward(cfg, images, texts) == towers + 2 * 3 * 32 * E + 2 * 4 * 16 * E
    assert contrastive.flops_forward(siglip, images, texts) == towers + 2 * 4 * 16 * 32
