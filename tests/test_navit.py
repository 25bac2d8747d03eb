"""The model around attention: sizes, options, parameters, FLOPs, and what randomness may do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import fast_jit, random_packed, random_params

from configs import base
from input_pipeline.capacity import Capacity
from input_pipeline.errors import UserError
from navit_jax import attention, navit, transformer

L, K, P = 24, 4, 12
SIZES = dict(width=16, depth=2, heads=2, mlp_dim=24, patch_size=2, num_classes=3, posemb_max=12)


def build(**fields):
    cfg = navit.NaViTConfig(**(SIZES | fields))
    graphdef, shapes = navit.abstract(cfg)
    return graphdef, random_params(shapes)


def images(seed=0, dtype=np.uint8):
    return random_packed(np.random.default_rng(seed), [[5, 8], [20], []], L, K, P, dtype)


def run(graphdef, params, batch, key=None):
    return fast_jit(lambda p, x, k: navit.merge(graphdef, p)(x, key=k)[0])(params, batch, key)


def model_config(**fields):
    model = base.get_config().model
    with model.unlocked():
        model.update(fields)
    return model


@pytest.mark.parametrize(
    "name, encoder, total",
    [
        *(("Ti/16", 5.3, 5.9), ("S/16", 21.2, 23.4), ("B/16", 85.0, 92.7), ("B/32", 85.0, 94.5), ("L/16", 302, 315.5)),
        *(("So400m/14", 411.1, 427.2), ("g/14", 1009.4, 1035.6)),
    ],
)
def test_variants_have_the_known_sizes(name, encoder, total):
    """Millions: the bias-free encoder is (4 D + 2 F) D a layer; then embedding, positions, pooling."""
    cfg = navit.from_config(model_config(variant=name), channels=3, num_classes=0)
    shapes = navit.abstract(cfg)[1]
    assert navit.count_params(shapes["blocks"]) / 1e6 == pytest.approx(encoder, abs=0.1)
    assert navit.count_params(shapes) / 1e6 == pytest.approx(total, abs=0.1)


def test_sizes_override_the_variant():
    cfg = navit.from_config(model_config(variant="Ti/8", depth=2, heads=6), channels=1, num_classes=7, head_bias=-2.0)
    assert (cfg.width, cfg.depth, cfg.heads, cfg.mlp_dim, cfg.patch_size) == (192, 2, 6, 768, 8)
    params = navit.init_params(cfg, 0)
    assert params["embed"]["kernel"].shape == (64, 192)
    assert not params["head"]["kernel"].any() and (params["head"]["bias"] == -2.0).all()


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(variant="B/15"), "B/15.*/14"),
        (dict(variant="H/16"), "So400m"),
        (dict(variant="B"), "variant"),
        (dict(heads=7), "768.*7 heads"),
        (dict(width=60, heads=10, posemb="rope"), "multiple of 4; width / heads is 6"),
        (dict(pool="cls"), "map, mean"),
        (dict(remat="some"), "none, light, dots, full"),
        (dict(dtype="float16"), "bfloat16"),
        (dict(attention="fast"), "dense"),
        (dict(dropout=1.0), "dropout"),
        (dict(registers=-1), "negative"),
        (dict(posemb="fourier", posemb_combine="concat"), "posemb_combine"),
        (dict(pool="first"), "model.registers is 0"),
        (dict(mean=(0.1, 0.2)), "each of the 3 channels"),
        (dict(std=(0.0,)), "above 0"),
        (dict(norm="batch"), "layer, rms"),
        (dict(mlp="relu"), "swiglu"),
        (dict(embed_norm="before"), "none, after, both"),
    ],
)
def test_configurations_that_cannot_work_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        navit.from_config(model_config(**fields), channels=3, num_classes=10)


def test_parameter_paths():
    _, params = build(registers=2)
    paths = {"/".join(part.key for part in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    attn = {
        f"blocks/attn/{n}" for n in ("q/kernel", "k/kernel", "v/kernel", "out/kernel", "q_norm/scale", "k_norm/scale")
    }
    mlp = {f"{owner}/mlp/{n}/kernel" for owner in ("blocks", "pool") for n in ("up", "down")}
    pool = {"pool/probe", "pool/norm/scale", *(f"pool/{n}/kernel" for n in ("q", "k", "v", "out"))}
    rest = {"embed/kernel", "posemb/y", "posemb/x", "registers", "norm/scale", "head/kernel", "head/bias"}
    assert paths == attn | mlp | pool | rest | {"blocks/attn_norm/scale", "blocks/mlp_norm/scale"}
    assert params["blocks"]["attn"]["q"]["kernel"].shape == (2, 16, 2, 8)


def test_bias_adds_a_bias_to_every_dense_layer_and_norm():
    _, params = build(bias=True)
    owners = [
        path[:-1] for path, _ in jax.tree_util.tree_leaves_with_path(params) if path[-1].key in ("kernel", "scale")
    ]
    without = [jax.tree_util.keystr(o) for o in owners if "bias" not in _at(params, o)]
    assert without == ["['pool']['k']"]  # the softmax would cancel it


def _at(params, path):
    for part in path:
        params = params[part.key]
    return params


def test_split_and_merge_are_inverse_and_hold_parameters_only():
    cfg = navit.NaViTConfig(**SIZES, posemb="sinusoidal")
    seeded = [navit.init_params(cfg, seed) for seed in (0, 1)]
    graphdef, shapes = navit.abstract(cfg)
    assert type(seeded[0]) is dict and jax.tree.structure(seeded[0]) == jax.tree.structure(shapes)
    again, params = navit.split(navit.merge(graphdef, seeded[0]))
    assert again == graphdef and hash(again) == hash(navit.abstract(cfg)[0])
    jax.tree.map(np.testing.assert_array_equal, params, seeded[0])
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    q = [p["blocks"]["attn"]["q"]["kernel"] for p in seeded]
    assert not np.allclose(*q) and not np.allclose(q[0][0], q[0][1]), "seeds and layers must differ"
    assert np.abs(q[0]).max() <= np.sqrt(6 / 32) and np.abs(q[0]).max() > 0.9 * np.sqrt(6 / 32)  # Xavier, fans 16 + 16


def test_output_is_float32_and_without_a_head_the_pooled_vector():
    batch = images()
    graphdef, params = build(num_classes=0, dtype="bfloat16")
    logits, extra = jax.eval_shape(navit.merge(graphdef, params), batch)
    assert logits.shape == (3, K, 16) == extra["pooled"].shape
    assert logits.dtype == extra["pooled"].dtype == jnp.float32
    assert jax.eval_shape(navit.merge(graphdef, params).tokens, batch).dtype == jnp.bfloat16
    logits, extra = fast_jit(lambda p: navit.merge(graphdef, p)(batch))(params)
    np.testing.assert_array_equal(logits, extra["pooled"])


def test_bfloat16_stays_near_float32():
    graphdef, params = build()
    half = navit.abstract(navit.NaViTConfig(**SIZES, dtype="bfloat16"))[0]
    exact, rounded = (run(g, params, images()) for g in (graphdef, half))
    assert 0 < np.abs(exact - rounded).max() < 0.05 * np.abs(exact).max()


def test_scan_equals_the_layers_written_out():
    graphdef, params = build(depth=3, posemb="none", pool="mean", num_classes=0)
    batch = images()
    model = navit.merge(graphdef, params)
    x_BLD = model.embed(batch.values)
    groups = attention.make_groups(batch.segment_ids)
    block = nnx.split(transformer.Block(model.cfg, rngs=nnx.Rngs(0)))[0]
    for i in range(3):
        layer = nnx.merge(block, jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]))
        x_BLD = layer(x_BLD, groups, None, lambda y, _: y)
    expected = model.norm(x_BLD)
    np.testing.assert_allclose(model.tokens(batch), expected, atol=1e-5)
    for b, k in ((0, 0), (0, 1), (1, 0)):
        mean = np.asarray(expected[b])[batch.segment_ids[b] == k + 1].mean(0)
        np.testing.assert_allclose(run(graphdef, params, batch)[b, k], mean, atol=1e-5)


@pytest.mark.parametrize("remat", ["full", pytest.param("dots", marks=pytest.mark.slow)])
def test_remat_changes_no_number(remat):
    batch, (graphdef, params) = images(), build()
    other = navit.abstract(navit.NaViTConfig(**SIZES, remat=remat))[0]
    value = lambda g: fast_jit(jax.grad(lambda p: navit.merge(g, p)(batch)[0].sum()))(params)  # noqa: E731
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), value(graphdef), value(other))


def test_randomness_needs_a_key_and_follows_it():
    graphdef, params = build(dropout=0.2, stochastic_depth=0.3)
    batch = images()
    calm, a, a_again, b = (run(graphdef, params, batch, k) for k in (None, *map(jax.random.key, (0, 0, 1))))
    np.testing.assert_array_equal(calm, run(*build(), batch))
    np.testing.assert_array_equal(a, a_again)
    assert np.abs(a - b)[0, 0].max() > 1e-3 and np.abs(a - calm)[0, 0].max() > 1e-3


@pytest.mark.parametrize(
    "fields", [dict(), dict(pool="mean", num_classes=0), dict(registers=2)], ids=["map", "mean", "registers"]
)
def test_flops_against_the_compiler(fields):
    """One layer (the compiler counts a scan's body once), one image filling each row: no product is wasted."""
    rows, length = 2, 128
    sizes = dict(width=128, depth=1, heads=2, mlp_dim=512, patch_size=8, posemb="none", num_classes=1000)
    cfg = navit.NaViTConfig(**(sizes | fields))
    graphdef, shapes = navit.abstract(cfg)
    batch = random_packed(np.random.default_rng(0), [[length]] * rows, length, 1, 192)
    compiled = jax.jit(lambda p, x: navit.merge(graphdef, p)(x)[0]).lower(shapes, batch).compile()
    counted = compiled.cost_analysis()["flops"]
    assert navit.flops_forward(cfg, [length] * rows) == pytest.approx(counted, rel=0.04)


def test_flops_of_the_base_model():
    """171 MFLOP a token in the linear layers of B/16; attention is 18 % of the whole at 1024 tokens."""
    cfg = navit.from_config(model_config(pool="mean"), channels=3, num_classes=0)
    assert navit.flops_forward(cfg, [1] * 1000) / 1e9 == pytest.approx(171, rel=0.01)
    attention_share = 1 - 1024 * navit.flops_forward(cfg, [1]) / navit.flops_forward(cfg, [1024])
    assert attention_share == pytest.approx(0.18, abs=0.01)


def test_registers_beside_their_image_keep_the_planned_profile():
    """Slabs with their longer places give what dense attention gives, tokens and pooled vectors alike."""
    images = random_packed(np.random.default_rng(0), [[5, 9], [9, 5, 2]], L, K, P)
    images = images._replace(capacity=Capacity(2, ((2, 9), (3, 5))))
    found = []
    for backend in ("slabs", "dense"):
        graphdef, params = build(pool="first", registers=3, attention=backend)
        answer = fast_jit(
            lambda p, x, graphdef=graphdef: (navit.merge(graphdef, p).tokens(x), navit.merge(graphdef, p)(x)[0])
        )
        tokens, logits = answer(params, images)
        found.append((tokens[images.segment_ids > 0], logits))
    for slabs, dense in zip(*found, strict=True):
        np.testing.assert_allclose(slabs, dense, atol=1e-5)
