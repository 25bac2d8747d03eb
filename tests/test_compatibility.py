"""What may start from a checkpoint: the same run, or another model with the same parameters but for its head."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_checkpoint import assert_same, make_params

from configs import base
from input_pipeline.errors import UserError
from navit_jax.checkpoint import check_compatible, init_from
from navit_jax.compatibility import other_tokenizer, to_json


def test_fine_tuning_takes_old_values_and_keeps_a_new_head():
    new, old = make_params(0, classes=9), jax.tree.map(np.asarray, make_params(1, classes=4))
    params, notes = init_from(new, old)
    assert_same(params["embed"], old["embed"])
    assert_same(params["head"], new["head"])
    assert len(notes) == 1 and "head/kernel [5, 4]" in notes[0] and "head/kernel [5, 9]" in notes[0]
    same, notes = init_from(make_params(0), old)
    assert_same(same, old)
    assert notes == []
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params(0))
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(init_from(half, old)[0]))
    headless = {k: v for k, v in old.items() if k != "head"}
    params, notes = init_from(new, headless)
    assert_same(params["head"], new["head"])
    assert "none in the checkpoint" in notes[0]


def test_fine_tuning_from_another_model_is_refused_by_name():
    old = jax.tree.map(np.asarray, make_params(1))
    old["embed"]["kernel"] = np.zeros((12, 5), np.float32)
    old["blocks"]["norm"] = {"scale": np.zeros((3, 5), np.float32)}
    del old["blocks"]["mlp"]
    with pytest.raises(UserError) as error:
        init_from(make_params(0, classes=9), old)
    assert error.match(r"embed/kernel: \[12, 5\] in the checkpoint, \[6, 5\] here")
    assert error.match(r"blocks/mlp/up/kernel: \[3, 5, 7\] here, missing in the checkpoint")
    assert error.match(r"blocks/norm/scale: \[3, 5\] in the checkpoint, missing here")
    assert "head" not in str(error.value)


def two_towers(seed=0, image=None, **fields):
    rng = np.random.default_rng(seed + 100)
    image = {k: v for k, v in (image or make_params(seed)).items() if k != "head"}
    text, projection = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((9, 5), (5, 3)))
    scale = jnp.asarray(rng.normal(), jnp.float32)
    return (
        dict(image=image, text=dict(table=text), image_projection=dict(kernel=projection), logit_scale=scale) | fields
    )


def test_one_tower_becomes_the_image_tower_of_two():
    new, old = two_towers(0), jax.tree.map(np.asarray, make_params(1))
    params, notes = init_from(new, old)
    assert_same(params["image"], {k: v for k, v in old.items() if k != "head"})
    rest = ("text", "image_projection", "logit_scale")
    assert_same({k: params[k] for k in rest}, {k: new[k] for k in rest})
    assert len(notes) == 1 and "image tower" in notes[0] and "all else starts anew" in notes[0]
    del old["head"]
    assert_same(init_from(new, old)[0], params)


def test_two_towers_give_their_image_tower_to_one():
    new, old = make_params(0), jax.tree.map(np.asarray, two_towers(1))
    params, notes = init_from(new, old)
    assert_same({k: v for k, v in params.items() if k != "head"}, old["image"])
    assert_same(params["head"], new["head"])
    assert len(notes) == 2 and "the rest left out" in notes[0] and "none in the checkpoint" in notes[1]


def test_two_towers_start_from_two_whole():
    new, old = two_towers(0), jax.tree.map(np.asarray, two_towers(1))
    params, notes = init_from(new, old)
    assert_same(params, old)
    assert notes == []
    biased, notes = init_from(two_towers(0, logit_bias=jnp.full((), -10.0)), old)
    assert float(biased.pop("logit_bias")) == -10 and "bias of the logits starts anew" in notes[0]
    assert_same(biased, old)
    with pytest.raises(UserError, match=r"text/table: \[4, 5\] in the checkpoint, \[9, 5\] here"):
        init_from(new, old | dict(text=dict(table=np.zeros((4, 5), np.float32))))


def test_another_tokenizer_is_noticed():
    old = dict(data=dict(source="a", tokenizer="bytes"))
    assert other_tokenizer(old, dict(tokenizer="bytes")) == "" == other_tokenizer(dict(data={}), dict(tokenizer="x"))
    assert "bytes" in other_tokenizer(old, dict(tokenizer="spm 12")) and "config.text" in other_tokenizer(
        old, dict(tokenizer="spm 12")
    )


def test_an_image_tower_of_other_sizes_is_refused_by_name_both_ways():
    other = make_params(1)
    other["embed"]["kernel"] = jnp.zeros((12, 5))
    with pytest.raises(UserError, match=r"image/embed/kernel: \[12, 5\] in the checkpoint, \[6, 5\] here"):
        init_from(two_towers(0), other)
    with pytest.raises(UserError, match=r"  embed/kernel: \[12, 5\] in the checkpoint, \[6, 5\] here"):
        init_from(make_params(0), two_towers(1, image=other))


def metas():
    """A config as a run stores it, and as it comes back from the disk."""
    config = base.get_config()
    meta = {"config": config.to_dict(), "data": {"seed": 0, "source": {"name": "digits", "images": 1437}}}
    return json.loads(json.dumps(meta)), meta


def test_the_same_run_is_accepted_in_spite_of_json():
    old, new = metas()
    assert isinstance(new["config"]["eval"]["token_budgets"], tuple)
    check_compatible(old, new)


@pytest.mark.parametrize(
    "field",
    ["log_every_steps", "checkpoint_every_steps", "eval_every_steps", "keep_checkpoints", "name", "best_metric"]
    + ["data.num_threads", "data.num_workers", "data.max_bad_share", "eval.token_budgets", "eval.max_examples"],
)
def test_harmless_changes_are_accepted(field):
    old, new = metas()
    *parents, last = field.split(".")
    inner = new["config"]
    for key in parents:
        inner = inner[key]
    assert last in inner
    inner[last] = (123,)
    check_compatible(old, new)


def test_changes_that_break_the_run_are_listed():
    old, new = metas()
    new["config"]["optim"]["lr"] = 0.5
    new["config"]["optim"]["weight_decay"] = (("^head/", 3.0),)
    new["config"]["model"]["new_field"] = 1
    new["config"]["log_every_steps"] = 99
    new["data"]["source"]["images"] = 1436
    with pytest.raises(UserError) as error:
        check_compatible(old, new)
    lines = [line.strip() for line in str(error.value).split("\n")[1:-1]]
    assert sorted(lines) == [
        "data fingerprint: source.images: was 1437, now 1436",
        "model.new_field: was (absent), now 1",
        "optim.lr: was 0.0008, now 0.5",
        "optim.weight_decay: was [['^head/', 3.0], ['.*kernel$', 0.03]], now [['^head/', 3.0]]",
    ]


def test_rules_that_are_functions_are_compared_by_name():
    old, new = metas()
    for meta in (old, new):
        meta["config"]["optim"]["lr_multipliers"] = [["^blocks/", optax.adamw]]
    old = json.loads(json.dumps(to_json(old)))
    check_compatible(old, new)
    new["config"]["optim"]["lr_multipliers"] = [["^blocks/", optax.lion]]
    with pytest.raises(UserError, match="adamw.*lion"):
        check_compatible(old, new)
