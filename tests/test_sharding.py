"""Where arrays lie: the mesh, the rules over parameter paths, and what each process hands over. Eight virtual devices
and several processes are in `test_topology`."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from configs import base
from input_pipeline.errors import UserError
from navit_jax import contrastive, navit, optim, sharding, start, train_step


def mesh_of(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor), sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def state_of(name="adamw", variant="B/16", **fields):
    config = base.get_config()
    config.optim.update(name=name, weight_decay=())
    config.model.update(variant=variant, **fields)
    _, shapes = navit.abstract(navit.from_config(config.model, channels=3, num_classes=10))
    return with_optimizer(config, shapes)


def state_of_two_towers(name="adamw", vocab_size=257, **fields):
    config = base.get_config()
    config.optim.update(name=name, weight_decay=())
    config.contrastive.loss = "sigmoid"
    config.text.update(fields)
    return with_optimizer(config, contrastive.abstract(contrastive.from_config(config, vocab_size=vocab_size))[1])


def with_optimizer(config, shapes):
    tx, _ = optim.make_optimizer(config.optim, shapes, 10)
    return jax.eval_shape(lambda p: train_step.init_state(p, tx, True), shapes)


def specs(mesh, state):
    found = jax.tree_util.tree_leaves_with_path(sharding.state_shardings(mesh, state))
    return {optim.name_of(path): leaf.spec for path, leaf in found}


@pytest.mark.parametrize(
    "sizes, devices, expected",
    [((-1, 1, 1), 8, (8, 1, 1)), ((-1, 4, 1), 8, (2, 4, 1)), ((2, -1, 2), 8, (2, 2, 2)), ((1, 1, 1), 1, (1, 1, 1))],
)
def test_what_is_left_goes_to_the_open_axis(monkeypatch, sizes, devices, expected):
    monkeypatch.setattr(jax, "make_mesh", lambda sizes, *args, **kwargs: sizes)
    cfg = dict(zip(sharding.AXES, sizes))
    assert sharding.make_mesh(cfg, devices=[None] * devices) == expected


@pytest.mark.parametrize(
    "sizes, devices, words",
    [
        ((-1, 3, 1), 8, "mesh.fsdp=3.*a multiple of 3 devices; this run has 8"),
        ((2, 2, 1), 8, "need 4 devices; this run has 8"),
        ((-1, -1, 1), 8, "at most one -1"),
        ((0, 1, 1), 8, "mesh.data=0.*expected 1 or more"),
        ((-1, -2, 1), 8, "mesh.fsdp=-2.*expected 1 or more"),
    ],
)
def test_sizes_that_do_not_make_a_mesh_are_refused(sizes, devices, words):
    with pytest.raises(UserError, match=words):
        sharding.make_mesh(dict(zip(sharding.AXES, sizes)), devices=[None] * devices)


def test_rows_that_do_not_divide_are_refused_with_the_next_number_that_does():
    sharding.check_rows(mesh_of(2, 4, 2), 16, parts=2)
    with pytest.raises(UserError, match=r"rows_per_step=12 .*8 devices .*2 x 4.*rows_per_step=16"):
        sharding.check_rows(mesh_of(2, 4, 2), 12)
    with pytest.raises(UserError, match=r"in 3 parts .*accumulate_steps.*rows_per_step=24"):
        sharding.check_rows(mesh_of(2, 4, 1), 16, parts=3)
    with pytest.raises(UserError, match=r"eval\.rows_per_step=3 "):
        sharding.check_rows(mesh_of(2, 1, 1), 3, "eval.rows_per_step")


def test_large_parameters_lie_on_fsdp_and_tensor_and_the_small_rest_on_all():
    found = specs(mesh_of(2, 4, 2), state_of())
    assert found["params/blocks/attn/q/kernel"] == P(None, "fsdp", "tensor", None)
    assert found["params/blocks/attn/out/kernel"] == P(None, "tensor", None, "fsdp")
    assert found["params/blocks/mlp/up/kernel"] == P(None, "fsdp", "tensor")
    assert found["params/pool/mlp/down/kernel"] == P("tensor", "fsdp")
    assert found["params/norm/scale"] == P() and found["step"] == P()
    for part in ("params", "ema"):
        sizes = {optim.name_of(path): leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(state_of()[part])}
        whole = sum(size for name, size in sizes.items() if not any(found[f"{part}/{name}"]))
        assert whole < 0.003 * sum(sizes.values())  # norms and the positions' two tables


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_two_towers_lie_as_one_does_each(name):
    """The image tower's parameters and moments as a NaViT's; the text tower's alike; little lies whole everywhere."""
    mesh, state = mesh_of(2, 4, 2), state_of_two_towers(name, pool="map")
    alone, found = specs(mesh, state_of(name)), specs(mesh, state)
    shared = [path.removeprefix("params/") for path in alone if path.startswith("params/") and "head/" not in path]
    assert len(shared) > 20
    for path in shared:
        assert found[f"params/image/{path}"] == alone[f"params/{path}"], path
        if path.startswith(("blocks/", "pool/", "norm/")):
            assert found[f"params/text/{path}"] == alone[f"params/{path}"], path
    assert found["params/text/table"] == P(None, "fsdp")
    assert found["params/image_projection/kernel"] == found["params/text_projection/kernel"] == P("fsdp", None)
    assert found["params/logit_scale"] == found["params/logit_bias"] == P()
    sizes = {optim.name_of(path): leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(state["params"])}
    whole = sum(size for path, size in sizes.items() if not any(found[f"params/{path}"]))
    assert whole < 0.003 * sum(sizes.values())
    moments = [path for path in found if path.startswith("opt/") and path.endswith("image/blocks/mlp/up/kernel")]
    assert moments and any(found[path] == found["params/image/blocks/mlp/up/kernel"] for path in moments)
    places = sharding.state_shardings(mesh, state)
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True):
        place.shard_shape(leaf.shape)  # raises where it does not divide


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_moments_lie_as_their_parameters_where_they_have_their_shape(name):
    state, mesh = state_of(name), mesh_of(2, 4, 2)
    found, shapes = specs(mesh, state), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        shapes[optim.name_of(path)] = leaf.shape
    moments = [n for n in found if n.startswith("opt/") and n.endswith("blocks/mlp/up/kernel")]
    assert len(moments) == {"adamw": 2, "adafactor": 4}[name]
    for n in moments:
        same = shapes[n] == shapes["params/blocks/mlp/up/kernel"]
        assert found[n] == (found["params/blocks/mlp/up/kernel"] if same else P())
    assert any(found[n] != P() for n in moments)


def test_an_axis_that_does_not_divide_is_refused_with_one_that_does():
    with pytest.raises(UserError, match=r"mesh\.tensor=8 does not divide 12, .*mesh\.tensor=4"):
        specs(mesh_of(1, 1, 8), state_of())
    with pytest.raises(UserError, match=r"mesh\.fsdp=256 does not divide 1152, .*mesh\.fsdp=128"):
        specs(mesh_of(1, 256, 1), state_of(variant="So400m/14"))


def test_every_leaf_of_every_kind_of_model_gets_a_place():
    for fields in (
        dict(posemb="table"),
        dict(posemb="fourier", bias=True),
        dict(pool="mean", registers=2, posemb="rope"),
    ):
        state = state_of(variant="Ti/16", **fields)
        places = sharding.state_shardings(mesh_of(2, 2, 1), state)
        assert jax.tree.structure(places) == jax.tree.structure(state)
        for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True):
            place.shard_shape(leaf.shape)  # raises where it does not divide


def test_put_hands_over_rows_in_order_and_host_numbers_sum():
    mesh = sharding.make_mesh()
    count = 2 * mesh.size
    rows = np.arange(count * 3).reshape(count, 3)
    assert sharding.local_rows(mesh, count) == list(range(count))
    np.testing.assert_array_equal(sharding.put(mesh, rows, count), rows)
    np.testing.assert_allclose(sharding.put_host(mesh, [7.0, 0.5]).sum(axis=0), [7.0, 0.5], rtol=1e-6)


def test_a_process_with_rows_apart_hands_over_the_right_ones(monkeypatch):
    """A process may address rows 0-1 and 4-5 of 8: its part of the array is looked up by row number."""
    asked = {}
    spans = [slice(0, 2), slice(4, 6)]
    place = SimpleNamespace(addressable_devices_indices_map=lambda shape: {i: (s,) for i, s in enumerate(spans)})
    monkeypatch.setattr(sharding, "rows", lambda mesh: place)

    def callback(shape, sharding, part):
        asked.update({span.start: part((span, slice(None))) for span in spans})

    monkeypatch.setattr(jax, "make_array_from_callback", callback)
    mine = np.array([[0], [1], [4], [5]])
    assert sharding.local_rows(None, 8) == [0, 1, 4, 5]
    sharding.put(None, mine, 8)
    assert asked[0].tolist() == [[0], [1]] and asked[4].tolist() == [[4], [5]]


def test_constrain_does_nothing_outside_of_a_mesh_and_pins_inside():
    x = jnp.ones((2, 3, 4))
    assert sharding.constrain(x, "BLD") is x
    mesh = sharding.make_mesh()

    def inside(x):
        with sharding.under(mesh):
            return sharding.constrain(x, "BLD")

    assert "sharding_constraint" in str(jax.make_jaxpr(inside)(x))


def test_a_new_state_lies_where_it_should_and_is_the_one_that_init_gives():
    config = base.get_config()
    config.model.update(variant="Ti/16", width=16, depth=2, heads=2, mlp_dim=32)
    config.optim.ema_decay = 0.9
    model = navit.from_config(config.model, channels=3, num_classes=3)
    _, shapes = navit.abstract(model)
    tx, _ = optim.make_optimizer(config.optim, shapes, 10)
    like = start.shapes(shapes, tx, True, sharding.make_mesh())
    init = partial(navit.init_params, model)
    state = start.fresh(config, init, tx, jax.tree.map(lambda leaf: leaf.sharding, like), {}, whole=False).state
    for got, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype and got.sharding == wanted.sharding
    for a, b, c in zip(*map(jax.tree.leaves, (navit.init_params(model, config.seed), state["params"], state["ema"]))):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
