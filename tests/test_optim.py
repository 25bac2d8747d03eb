"""Updates against AdamW and Adafactor written in float64 numpy, schedules against their formulas, rules by promise."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from input_pipeline.errors import UserError
from navit_jax.optim import ema_update, make_optimizer, make_schedule, name_of, rule_values
from navit_jax.rules import layer_scales

DEPTH, TOTAL = 3, 40
SHAPES = {
    "embed": {"kernel": (6, 5)},
    "blocks": {"mlp": {"up": {"kernel": (DEPTH, 5, 7)}}, "norm": {"scale": (DEPTH, 5)}},
    "head": {"kernel": (5, 4), "bias": (4,)},
}
PATHS = ["blocks/mlp/up/kernel", "blocks/norm/scale", "embed/kernel", "head/bias", "head/kernel"]


def is_shape(x):
    return isinstance(x, tuple)


def random_tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: (rng.normal(size=s) * scale).astype(np.float32), SHAPES, is_leaf=is_shape)


def config(**fields):
    cfg = base.optim()
    cfg.update({"warmup_steps": 4, "cooldown_steps": 6, "rsqrt_timescale_steps": 10, **fields})
    return cfg


def flat(tree):
    return {name_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def run(cfg, steps=6, grads=None):
    """Parameters after some jitted, donated updates, and the gradients that were used."""
    params = jax.tree.map(jnp.asarray, random_tree(0))
    tx, _ = make_optimizer(cfg, params, TOTAL)
    grads = grads or [random_tree(i + 1, scale=10.0 ** (i % 3 - 1)) for i in range(steps)]

    def update(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    update, state = jax.jit(update, donate_argnums=(0, 1)), tx.init(params)
    for g in grads:
        params, state = update(params, state, g)
    return flat(params), grads, state


def numpy_rate(cfg, s):
    """The schedule in plain Python, term by term as documented."""
    t = max(0, s - cfg.warmup_steps)
    u = t / (TOTAL - cfg.warmup_steps)
    main = {
        "rsqrt": (cfg.rsqrt_timescale_steps / (cfg.rsqrt_timescale_steps + t)) ** 0.5,
        "cosine": np.cos(np.pi * u / 2) ** 2,
        "linear": 1 - u,
        "constant": 1.0,
    }[cfg.schedule]
    warm = min(1.0, (s + 1) / cfg.warmup_steps) if cfg.warmup_steps else 1.0
    cool = min(1.0, (TOTAL - s) / cfg.cooldown_steps) if cfg.cooldown_steps else 1.0
    return cfg.lr * warm * main * cool


def numpy_adamw(cfg, grads, decay, scale, trained=None):
    """decay, scale: {path: broadcastable}; trained: paths that take part. Returns float64 parameters."""
    params = {path: p.astype(np.float64) for path, p in flat(random_tree(0)).items()}
    trained = trained or set(params)
    m, v = ({path: np.zeros_like(p) for path, p in params.items()} for _ in range(2))
    for s, g in enumerate(grads):
        g = {path: x.astype(np.float64) for path, x in flat(g).items() if path in trained}
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        for path, x in g.items():
            x = x / max(1.0, norm / cfg.clip_norm) if cfg.clip_norm else x
            m[path] = cfg.b1 * m[path] + (1 - cfg.b1) * x
            v[path] = cfg.b2 * v[path] + (1 - cfg.b2) * x**2
            adam = (m[path] / (1 - cfg.b1 ** (s + 1))) / (np.sqrt(v[path] / (1 - cfg.b2 ** (s + 1))) + cfg.eps)
            params[path] -= numpy_rate(cfg, s) * scale[path] * (adam + decay[path] * params[path])
    return params


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_adamw_with_layerwise_rules_matches_float64_numpy(clip):
    layers = np.array([0.25, 0.5, 1.0])
    cfg = config(
        lr=0.03,
        clip_norm=clip,
        weight_decay=(("^head/", 3.0), ("kernel$", (0.1, 0.2, 0.3)), (".*", 0.0)),
        lr_multipliers=(("^embed/", 0.125), ("^blocks/", lambda layer, depth: 0.5 ** (depth - 1 - layer))),
    )
    with pytest.raises(UserError, match="embed/kernel has no layers"):
        run(cfg)
    cfg.weight_decay = (("^head/", 3.0), ("^blocks/.*kernel$", (0.1, 0.2, 0.3)), ("kernel$", 0.05))
    ours, grads, _ = run(cfg)
    decay = dict.fromkeys(PATHS, 0.0) | {"head/kernel": 3.0, "head/bias": 3.0, "embed/kernel": 0.05}
    decay["blocks/mlp/up/kernel"] = np.array([0.1, 0.2, 0.3])[:, None, None]
    scale = dict.fromkeys(PATHS, 1.0) | {"embed/kernel": 0.125, "blocks/norm/scale": layers[:, None]}
    scale["blocks/mlp/up/kernel"] = layers[:, None, None]
    expected = numpy_adamw(cfg, grads, decay, scale)
    for path in PATHS:
        np.testing.assert_allclose(ours[path], expected[path], rtol=2e-5, atol=2e-5, err_msg=path)


def test_frozen_parameters_keep_their_bits_and_no_moments_and_leave_the_norm_alone():
    cfg = config(lr=0.1, weight_decay=((".*", 0.5),), freeze=("^embed/", "head/bias"))
    ours, grads, state = run(cfg)
    before, trained = flat(random_tree(0)), set(PATHS) - {"embed/kernel", "head/bias"}
    for path in set(PATHS) - trained:
        assert ours[path].tobytes() == before[path].tobytes()
    expected = numpy_adamw(cfg, grads, dict.fromkeys(PATHS, 0.5), dict.fromkeys(PATHS, 1.0), trained)
    for path in trained:
        np.testing.assert_allclose(ours[path], expected[path], rtol=2e-5, atol=2e-5, err_msg=path)
    moments = [name for name in flat(state) if "/mu/" in name]
    assert len(moments) == len(trained) and not any("embed" in name for name in moments)


def test_a_frozen_minus_zero_stays_minus_zero():
    params = {"embed": {"kernel": jnp.full((2,), -0.0)}, "head": {"kernel": jnp.ones(2)}}
    tx, _ = make_optimizer(config(freeze=("^embed",)), params, TOTAL)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert np.signbit(optax.apply_updates(params, updates)["embed"]["kernel"]).all()


@pytest.mark.parametrize("value", [(1, 1, 0), lambda layer, depth: layer < depth - 1])
def test_freezing_single_layers(value):
    cfg = config(lr=0.1, weight_decay=((".*", 0.5),), freeze=(("^blocks/", value),))
    ours, grads, _ = run(cfg)
    before = flat(random_tree(0))
    quiet = [copy.deepcopy(g) for g in grads]
    for g in quiet:
        g["blocks"]["mlp"]["up"]["kernel"][:2] = 0
        g["blocks"]["norm"]["scale"][:2] = 0
    expected = numpy_adamw(cfg, quiet, dict.fromkeys(PATHS, 0.5), dict.fromkeys(PATHS, 1.0))
    for path in PATHS:
        if path.startswith("blocks"):
            np.testing.assert_array_equal(ours[path][:2], before[path][:2])
            np.testing.assert_allclose(ours[path][2], expected[path][2], rtol=2e-5, atol=2e-5)
        else:
            np.testing.assert_allclose(ours[path], expected[path], rtol=2e-5, atol=2e-5)


def numpy_adafactor(cfg, grads, p0, stacked, smallest):
    """One parameter, a layer at a time; the last two axes are factored if both have `smallest` entries."""
    layers = list(p0) if stacked else [p0]
    out = []
    for i, p in enumerate(layers):
        p, row, col, v, m = p.astype(np.float64), 0.0, 0.0, 0.0, 0.0
        for s, g in enumerate(grads):
            g = (g[i] if stacked else g).astype(np.float64)
            beta, square = min(cfg.b2, 1 - (s + 1) ** -0.8), g**2 + 1e-30
            if g.ndim == 2 and min(g.shape) >= smallest:
                row = beta * row + (1 - beta) * square.mean(1, keepdims=True)
                col = beta * col + (1 - beta) * square.mean(0, keepdims=True)
                u = g / np.sqrt(row * col / row.mean())
            else:
                v = beta * v + (1 - beta) * square
                u = g / np.sqrt(v)
            m = cfg.b1 * m + (1 - cfg.b1) * u / max(1.0, np.sqrt((u**2).mean()))
            p = p - numpy_rate(cfg, s) * (m + 0.1 * p)
        out.append(p)
    return np.stack(out) if stacked else out[0]


def test_adafactor_matches_float64_numpy_layer_by_layer():
    cfg = config(name="adafactor", clip_norm=0.0, weight_decay=((".*", 0.1),), lr=0.01)
    shapes = {"blocks": {"up": (3, 40, 48), "norm": (3, 40)}, "head": (40, 33), "bias": (50,)}
    rng = np.random.default_rng(0)

    def tree():
        return jax.tree.map(lambda s: rng.normal(size=s).astype(np.float32), shapes, is_leaf=is_shape)

    first, grads = tree(), [tree() for _ in range(5)]
    tx, _ = make_optimizer(cfg, first, TOTAL)
    params, state = jax.tree.map(jnp.asarray, first), tx.init(first)
    for g in grads:
        updates, state = jax.jit(tx.update)(g, state, params)
        params = optax.apply_updates(params, updates)
    for path, ours in flat(params).items():
        own = [flat(g)[path] for g in grads]
        expected = numpy_adafactor(cfg, own, flat(first)[path], path.startswith("blocks"), 32)
        np.testing.assert_allclose(ours, expected, atol=3e-4, err_msg=path)  # the momentum is bfloat16
    sizes = {name: leaf.size for name, leaf in flat(state).items() if "/v/" in name}
    assert next(size for name, size in sizes.items() if name.endswith("up")) == 1  # factored: no full second moment


@pytest.mark.parametrize("schedule", ["rsqrt", "cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup,cooldown", [(0, 0), (4, 0), (4, 6), (30, 10)])
def test_schedules_by_formula(schedule, warmup, cooldown):
    cfg = config(schedule=schedule, warmup_steps=warmup, cooldown_steps=cooldown)
    if cooldown and schedule in ("cosine", "linear"):
        with pytest.raises(UserError, match="cooldown_steps"):
            make_schedule(cfg, TOTAL)
        return
    rates = jax.jit(jax.vmap(make_schedule(cfg, TOTAL)))(jnp.arange(TOTAL))
    np.testing.assert_allclose(rates, [numpy_rate(cfg, s) for s in range(TOTAL)], rtol=1e-5, atol=1e-9)
    assert rates[0] > 0 and max(rates) <= cfg.lr * (1 + 1e-6)
    if schedule != "rsqrt" or not cooldown:
        assert rates[warmup] == pytest.approx(cfg.lr, rel=1e-5) or warmup == 30
    if cooldown:
        assert float(make_schedule(cfg, TOTAL)(TOTAL)) == 0
        assert rates[-1] == pytest.approx(numpy_rate(cfg, TOTAL - 1)) and rates[-1] < cfg.lr / 5


def test_ema():
    ema, params = random_tree(1), random_tree(2)
    ours = flat(jax.jit(ema_update, static_argnums=2)(ema, params, 0.9))
    for path, value in ours.items():
        np.testing.assert_allclose(value, 0.9 * flat(ema)[path] + 0.1 * flat(params)[path], rtol=1e-5, atol=1e-6)


def test_first_match_decides_and_nothing_means_the_default():
    params = random_tree(0)
    rules = (("^head/kernel", 1), ("^head/", 2.0), ("kernel$", np.float32(3)))
    values = rule_values("weight_decay", rules, params, 0.5)
    assert values == dict(zip(PATHS, [3, 0.5, 3, 2, 1]))
    assert make_optimizer(base.optim(), params, TOTAL)  # the defaults fit


@pytest.mark.parametrize(
    "fields,words",
    [
        ({"weight_decay": (("^blocks/mpl/up", 0.1),)}, ["weight_decay", "mpl", "blocks/mlp/up/kernel"]),
        ({"weight_decay": ((".*", 0.1), ("^head/", 3.0))}, [r"\^head/", "earlier rules", "head/bias"]),
        ({"weight_decay": ("^head/", 3.0)}, ["pairs"]),
        ({"lr_multipliers": (("^blocks/", (1.0, 2.0)),)}, ["2 values", "3 layers"]),
        ({"lr_multipliers": (("^head/", (1.0, 2.0, 3.0)),)}, ["head/(bias|kernel) has no layers"]),
        ({"lr_multipliers": (("^head/", lambda layer, depth: 1.0),)}, ["no layers"]),
        ({"freeze": ("^hed/",)}, ["freeze", "hed", "head/"]),
        ({"freeze": ("(",)}, ["not a regular expression"]),
        ({"name": "sgd"}, ["sgd", "adamw or adafactor"]),
        ({"schedule": "step"}, ["step", "rsqrt, cosine"]),
        ({"warmup_steps": 38}, ["38 \\+ 6", "40 steps"]),
    ],
)
def test_mistakes_are_named(fields, words):
    with pytest.raises(UserError) as error:
        make_optimizer(config(**fields), random_tree(0), TOTAL)
    for word in words:
        assert error.match(word)


@pytest.mark.parametrize("prefix", ["", "image/"])
def test_layer_decay_counts_from_the_head(prefix):
    tree = random_tree(0)
    if prefix:
        tree = {"image": tree, "text": {"table": np.zeros((9, 5)), "blocks": {"up": np.zeros((1, 5))}}}
    scales = {name: np.ravel(value).tolist() for name, value in layer_scales(0.5, tree).items()}
    wanted = dict.fromkeys(("head/bias", "head/kernel"), [1.0]) | {"embed/kernel": [0.5**4]}
    wanted |= dict.fromkeys(("blocks/mlp/up/kernel", "blocks/norm/scale"), [0.125, 0.25, 0.5])
    wanted = {prefix + name: value for name, value in wanted.items()}
    assert scales == (wanted | {"text/table": [0.25], "text/blocks/up": [0.5]} if prefix else wanted)


def test_layer_decay_slows_the_update_and_multiplies_the_rules():
    cfg = config(lr=0.03, weight_decay=((".*", 0.1),), lr_multipliers=(("^embed/", 3.0),), layer_decay=0.5)
    ours, grads, _ = run(cfg)
    scale = dict.fromkeys(PATHS, 1.0) | {"embed/kernel": 3 * 0.5**4}
    scale["blocks/norm/scale"] = np.array([0.125, 0.25, 0.5])[:, None]
    scale["blocks/mlp/up/kernel"] = scale["blocks/norm/scale"][..., None]
    expected = numpy_adamw(cfg, grads, dict.fromkeys(PATHS, 0.1), scale)
    for path in PATHS:
        np.testing.assert_allclose(ours[path], expected[path], rtol=2e-5, atol=2e-5, err_msg=path)
