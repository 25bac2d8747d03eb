"""Starting from weights of any kind: their architecture in the config, their parameters in the run; the recipe."""

import json
import shutil
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params
from test_configs import dry
from test_train import losses, run

from configs import base, finetune, quickstart
from input_pipeline import stream
from input_pipeline.errors import UserError
from navit_jax import checkpoint, contrastive, like, navit, optim, sharding, start, text_tower, weights
from navit_jax.compatibility import named_leaves, without_other_classes
from navit_jax.weights import ours

SIZES = dict(width=32, depth=2, heads=2, mlp_dim=48, patch_size=8)
UNLIKE = dict(  # no field as in configs.base
    **SIZES, head_size=8, posemb="table", posemb_grid=(4, 6), posemb_resize="bicubic", posemb_square=True, norm="rms",
    norm_eps=1e-5, norm_tokens=False, norm_pooled=True, embed_norm="after", mlp="swiglu", layer_scale=0.1,
    qk_norm=False, bias=True, pool="first", registers=3, pre_logits=24, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4),
    rope_base=100.0, rope_axes="alternate", dropout=0.3, stochastic_depth=0.2, remat="full", posemb_max=32,
)  # fmt: skip
NOT_WITH_TABLES = ("posemb_coords", "posemb_combine", "qk_rms", "window", "full_blocks", "merge")
CLASSES = tuple("0123456789")


def write(folder, cfg, classes=(), tokenizer=""):
    """An export of random parameters: the file, as other formats are read the same way, and its content."""
    abstract = navit.abstract if isinstance(cfg, navit.NaViTConfig) else contrastive.abstract
    params = jax.tree.map(np.asarray, random_params(abstract(cfg)[1]))
    ours.write(weights.Weights(cfg, params, classes, tokenizer), folder)
    return params


def two_towers(**fields):
    text = text_tower.TextConfig(
        **dict(width=16, depth=1, heads=2, mlp_dim=16, vocab_size=300, max_tokens=12, pool="mean", bias=True) | fields
    )
    image = navit.NaViTConfig(**SIZES, posemb="rope", bias=True)
    towers = dict(embed_dim=24, init_scale=5.0, max_scale=50.0, init_bias=-3.0, project_bias=True)
    return contrastive.TwoTowersConfig(image=image, text=text, **towers)


def fresh(config, meta=None, whole=False):
    """What a run of this config starts from, on one device; what starts anew is 7."""
    shapes = navit.abstract(navit.from_config(config.model, channels=3, num_classes=10))[1]
    tx, _ = optim.make_optimizer(config.optim, shapes, 100)
    places = jax.tree.map(lambda x: x.sharding, start.shapes(shapes, tx, False, sharding.make_mesh(base.mesh())))

    def init(seed):
        return jax.tree.map(lambda x: jnp.full(x.shape, 7.0), shapes)

    return jax.device_get(start.fresh(config, init, tx, places, meta or {}, whole).state["params"])


def anew(params):
    return all((x == 7).all() for x in jax.tree.leaves(params))


def small(folder, **model):
    """A config that starts from this folder, with its architecture, before that is resolved."""
    config = base.get_config()
    config.init_from = config.model.like = str(folder)
    config.model.update(**model)
    return config


def equal(one, two):
    one, two = named_leaves(one), named_leaves(two)
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def test_like_writes_out_every_field_of_the_architecture_and_nothing_else(tmp_path):
    cfg = navit.NaViTConfig(**UNLIKE, num_classes=4)
    write(tmp_path / "w", cfg)
    config = small(tmp_path / "w", posemb_beyond="interpolate", dropout=0.1)
    like.resolve(config)
    shutil.rmtree(tmp_path / "w")  # from here on the config says all
    saved = base.get_config()
    saved.update(json.loads(config.to_json()))
    found = asdict(navit.from_config(saved.model, channels=3, num_classes=4))
    free = dict(dropout=0.1, stochastic_depth=0.0, remat="light", posemb_beyond="interpolate")
    assert found == asdict(cfg) | free
    default = asdict(navit.from_config(base.model(), channels=3, num_classes=0))
    unchanged = {name for name in navit.CONFIG_FIELDS if found[name] == default[name]} - {*free}
    assert unchanged == {"stored_patch_size", "dtype", "attention", *NOT_WITH_TABLES}  # or this test sees too little
    assert stream.patch_size(config) == 8 and config.model.like == ""


def test_another_patch_size_than_the_stored_one(tmp_path):
    write(tmp_path / "w", navit.NaViTConfig(**SIZES))
    config = small(tmp_path / "w", stored_patch_size=8, patch_size=4)
    like.resolve(config)
    found = navit.from_config(config.model, channels=3, num_classes=0)
    assert (found.patch_size, found.stored_patch_size, stream.patch_size(config)) == (4, 8, 4)
    assert fresh(config)["embed"]["kernel"].shape == (8 * 8 * 3, 32)
    config = small(tmp_path / "w", stored_patch_size=16)
    with pytest.raises(UserError, match="stored_patch_size is 16, but the patches of .* are stored at 8"):
        like.resolve(config)


def test_two_towers_give_both_to_a_contrastive_run_and_one_to_a_supervised_one(tmp_path):
    cfg = two_towers()
    params = write(tmp_path / "w", cfg)
    config = small(tmp_path / "w")
    config.objective = "contrastive"
    config.contrastive.update(loss="sigmoid", init_scale=5.0, init_bias=-3.0)  # the scale's maximum is theirs, too
    like.resolve(config)
    assert contrastive.from_config(config, vocab_size=300) == cfg
    config = small(tmp_path / "w")
    like.resolve(config)
    found = fresh(config)
    assert anew(found.pop("head")) and equal(found, params["image"])
    write(tmp_path / "v", two_towers(mlp="gelu"))
    config = small(tmp_path / "v")
    config.objective = "contrastive"
    with pytest.raises(UserError, match=r"text tower of .* has mlp: gelu, which a config cannot say"):
        like.resolve(config)


def test_parameters_of_a_file_are_taken_with_the_head_of_the_same_classes(tmp_path):
    params = write(tmp_path / "w", navit.NaViTConfig(**SIZES, num_classes=10), CLASSES)
    config = small(tmp_path / "w")
    like.resolve(config)
    assert equal(fresh(config, dict(classes=list(CLASSES)), whole=True), params)
    found = fresh(config, dict(classes=list("abcdefghij")))
    assert anew(found["head"]) and equal(found["blocks"], params["blocks"])
    with pytest.raises(UserError, match=r"whole model.*10 classes were 0, 1, 2, ...; here are 10, a, b, c, ..."):
        fresh(config, dict(classes=list("abcdefghij")), whole=True)


def test_heads_without_names_are_told_apart_by_their_size_alone():
    params = dict(head=1, rest=2)
    for old, new in ((None, ["a"]), ([], ["a"]), (["a"], None), (("a", "b"), ["a", "b"])):
        assert without_other_classes(params, old, new) == (params, "")
    assert without_other_classes(params, ["a", "b"], ["b", "a"])[0] == dict(rest=2)
    assert without_other_classes(dict(rest=2), ["a"], ["b"]) == (dict(rest=2), "")


def test_weights_of_another_model_with_the_same_shapes_are_told_apart(tmp_path, capsys):
    write(tmp_path / "w", navit.NaViTConfig(**SIZES, mlp="gelu", mean=(0.1,)))
    config = small(tmp_path / "w", **SIZES)
    config.model.like = ""
    fresh(config)
    said = capsys.readouterr().out
    assert "model.mlp: gelu there, gelu_tanh here" in said and "model.mean: (0.1,) there, (0.5,) here" in said
    assert "--config.model.like=" in said
    with pytest.raises(UserError, match="model.mlp"):
        fresh(config, whole=True)
    config.model.width = 64
    with pytest.raises(
        UserError, match=r"embed/kernel: \[192, 32\] in the checkpoint, \[192, 64\] here[^$]*model.like"
    ):
        fresh(config)


def recipe(arg):
    config = finetune.get_config(arg)
    config.init_from = config.model.like = ""
    config.model.update(SIZES)
    return config


@pytest.mark.parametrize("source", ["", "shapes"])
def test_the_recipe_plans_its_rows(source):
    assert dry(recipe(f"weights=x,{source}")).fill > 0.95


def test_the_recipe_on_a_folder_takes_patches_of_any_size(tmp_path):
    from PIL import Image

    for i in range(24):
        (tmp_path / f"class{i % 2}").mkdir(exist_ok=True)
        Image.new("RGB", (200 + 10 * i, 150)).save(tmp_path / f"class{i % 2}" / f"{i}.png")
    for patch in (8, 14, 16, 32):
        config = recipe(f"folder={tmp_path},probe=true,weights=x")
        config.model.patch_size = patch
        dry(config)


def test_the_recipes_argument():
    config = finetune.get_config("tar=a,b,weights=p=q,probe=true")
    assert (config.init_from, config.model.like, config.data.source, config.name) == ("p=q", "p=q", "tar=a,b", "probe")
    assert finetune.get_config("weights=x").data.source == "digits"
    for arg in ("", "folder=x", "weights=", "weights=x,probe=yes", "weights=x,digits,prob=true"):
        with pytest.raises(ValueError, match="which weights|probe=yes: expected true or false|prob=true: expected"):
            finetune.get_config(arg)


def test_a_probe_trains_the_head_alone_and_a_whole_model_slower_towards_the_patches():
    shapes = navit.abstract(navit.NaViTConfig(**SIZES, num_classes=3))[1]
    probe, whole = (finetune.get_config(f"weights=x,probe={probe}").optim for probe in ("true", "false"))
    assert optim.paths(shapes) - optim.frozen(probe, shapes) == {"head/kernel", "head/bias"}
    assert not optim.frozen(whole, shapes) and 0 < whole.layer_decay < 1


def shrunk(config, steps):
    config.update(total_steps=steps, log_every_steps=1, checkpoint_every_steps=2)
    config.packing.update(row_length=32, rows_per_step=2)
    config.eval.update(token_budgets=(9,), max_examples=20, rows_per_step=2)
    return config


@pytest.mark.slow
def test_a_run_exported_and_probed_needs_the_file_no_more_and_changes_its_head_alone(tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    config = shrunk(quickstart.get_config(), 3)
    config.model.update(width=32, depth=2, heads=2, mlp_dim=64)
    run(config, first)
    ours.write(weights.read(first), tmp_path / "export")
    config = shrunk(finetune.get_config(f"weights={tmp_path / 'export'},probe=true"), 4)
    run(config, again)
    (before, _), (after, meta) = checkpoint.restore_params(first), checkpoint.restore_params(again)
    before, after = named_leaves(before), named_leaves(after)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"head/kernel", "head/bias"}
    assert meta["config"]["model"]["width"] == 32 and meta["config"]["model"]["like"] == ""
    assert meta["classes"] == list(CLASSES)
    shutil.rmtree(tmp_path / "export")
    shutil.rmtree(again / "checkpoints" / "4")
    same = shrunk(finetune.get_config(f"weights={tmp_path / 'export'},probe=true"), 4)
    assert set(losses(run(same, again))) == {1, 2, 3, 4}
    with pytest.raises(UserError, match="There is no .*export"):
        run(shrunk(finetune.get_config(f"weights={tmp_path / 'export'}"), 4), tmp_path / "third")
