"""timm's files as we write them: timm computes the same, a round trip is exact, what one side lacks is refused."""

import json

import jax
import numpy as np
import parity
import pytest
from timm_models import MEAN, OURS, PATCH, STD, WITHOUT_BIAS, ours, theirs

from input_pipeline.errors import UserError
from navit_jax import weights
from navit_jax.weights import files, reader, timm_vit


@pytest.mark.slow
@pytest.mark.parametrize("fields", [*OURS, WITHOUT_BIAS | dict(bias=False)])
def test_timm_loads_what_is_written(fields, tmp_path):
    timm = parity.library("timm")
    given = ours(**fields)
    assert timm_vit.write(given, tmp_path) == tmp_path
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = parity.five_images(np.random.default_rng(0), PATCH)
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    expected = theirs(model, images, mean, std)
    for x, y in zip(parity.outputs(given, parity.packed(images, PATCH)), expected):
        parity.assert_close(x, y, atol=1e-5)


@pytest.mark.parametrize("fields", OURS)
def test_round_trip_is_exact(fields, tmp_path):
    given = ours(**fields)
    timm_vit.write(given, tmp_path / "a")
    back = weights.read(tmp_path / "a")
    assert back.classes == given.classes
    jax.tree.map(np.testing.assert_array_equal, back.params, given.params)
    timm_vit.write(back, tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert weights.config_of(tmp_path / "a") == back.cfg
    kept = dict(qk_rms=False, **{name: getattr(back.cfg, name) for name in fields})
    assert {name: getattr(given.cfg, name) for name in kept} == kept


def test_a_model_without_biases_comes_back_with_zeros(tmp_path):
    given = ours(bias=False)
    back = weights.read(timm_vit.write(given, tmp_path))
    assert back.cfg.bias and not back.params["blocks"]["mlp"]["up"]["bias"].any()
    np.testing.assert_array_equal(
        back.params["blocks"]["mlp"]["up"]["kernel"], given.params["blocks"]["mlp"]["up"]["kernel"]
    )


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(posemb="learned"), "model.posemb_coords is 'absolute', there it is 'resized'"),
        (dict(posemb="fourier"), "model.posemb is 'fourier', there it is 'none'"),
        (dict(posemb="rope", rope_axes="alternate"), "model.rope_axes is 'alternate'"),
        (dict(norm_eps=1e-5), "model.norm_eps is 1e-05, there it is 1e-06"),
        (dict(embed_norm="both"), "model.embed_norm is 'both'"),
        (dict(pool="query"), "model.pool is 'query'"),
        (dict(pre_logits=8), "model.pre_logits is 8, there it is 0"),
        (dict(qk_rms=True), "model.qk_rms is True"),
        (dict(head_size=8), "model.head_size is 8, there it is 16"),
        (dict(stored_patch_size=4), "model.patch_size is 8, there it is 4"),
        (dict(norm_pooled=True), "norm_tokens and norm_pooled are both True"),
        (dict(embed_norm="entry"), "embed/bias is not 0"),
    ],
)
def test_what_timm_cannot_be_is_refused_by_the_field(fields, words, tmp_path):
    with pytest.raises(UserError, match=words):
        timm_vit.write(ours(**fields), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def changed(folder, change):
    """The written model after `change(config, tensors)`."""
    timm_vit.write(ours(), folder)
    config = json.loads((folder / "config.json").read_text())
    tensors = reader.open_tensors(folder)
    arrays = {name: tensors.take(name) for name in tensors.names}
    change(config, arrays)
    (folder / "config.json").write_text(json.dumps(config))
    files.write_safetensors(folder / "model.safetensors", arrays)
    return folder


def option(**options):
    return lambda config, arrays: config["model_args"].update(options)


@pytest.mark.parametrize(
    "change, words",
    [
        (option(rope_type="mixed", pos_embed="none"), "rope_type='mixed'"),
        (option(rope_type="axial"), "learned positions and rope_type='axial' together"),
        (option(pool_include_prefix=True), "pool_include_prefix=True .*only pool_include_prefix=False is"),
        (option(pos_embed_align_corners=True), "pos_embed_align_corners=True"),
        (option(num_kv_heads=2), "num_kv_heads=2"),
        (option(attn_pool_num_heads=2), "attn_pool_num_heads=2"),
        (option(block_fn="ParallelScalingBlock"), "block_fn='ParallelScalingBlock'"),
        (option(brand_new=1), "brand_new=1.*this option is not"),
        (option(act_layer="silu"), "act_layer='silu'.*gelu_tanh"),
        (option(norm_layer="batchnorm2d"), "norm_layer='batchnorm2d'"),
        (option(global_pool="avgmax"), "global_pool='avgmax'"),
        (option(global_pool="token"), "global_pool='token'"),
        (option(num_heads=3), "num_heads is 3, which does not divide the width 64"),
        (option(in_chans=5), "no square of 5 channels"),
        (
            lambda c, a: [a.pop(f"blocks.{i}.attn.qkv.bias") for i in range(2)],
            "lacks the tensor blocks.0.attn.qkv.bias",
        ),
        (lambda c, a: a.pop("attn_pool.q.bias"), "lacks the tensor attn_pool.q.bias"),
        (lambda c, a: a.update({"dist_token": np.zeros((1, 1, 64), np.float32)}), "dist_token \\[1, 1, 64\\]"),
        (lambda c, a: a.update({"head.weight": a["head.weight"].T}), "head.weight|head.bias"),
        (lambda c, a: c.update(architecture="vit_base_patch16_rpn_224"), "'vit_base_patch16_rpn_224' is not one"),
        (lambda c, a: c.update(architecture="vit_small_patch16_dinov3"), "'vit_small_patch16_dinov3' is not one"),
    ],
)
def test_what_we_do_not_have_is_refused_by_name(change, words, tmp_path):
    folder = changed(tmp_path, change)
    with pytest.raises(UserError, match=words):
        weights.read(folder)


def test_a_bare_file_is_told_by_its_name_or_says_what_to_write(tmp_path):
    folder = changed(tmp_path / "x", lambda config, arrays: config.clear())
    with pytest.raises(UserError, match='config.json beside it, as timm does: {"architecture"'):
        weights.read(folder)
    named = tmp_path / "naflexvit_base_patch16_siglip.v2.safetensors"
    (folder / "model.safetensors").rename(named)
    with pytest.raises(UserError, match="num_heads is 12, which does not divide the width 64"):
        weights.read(named)
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 4}))
    cfg = weights.config_of(named)
    assert (cfg.heads, cfg.mlp, cfg.pool, cfg.posemb_resize, cfg.mean) == (4, "gelu_tanh", "map", "bilinear", (0.5,))


def test_an_older_config_says_it_all_in_one_place(tmp_path):
    def flat(config, arrays):
        config.update(config.pop("pretrained_cfg"))
        config["labels"] = config.pop("label_names")

    back = weights.read(changed(tmp_path, flat))
    assert (back.cfg.mean, back.cfg.std, back.classes) == (MEAN, STD, tuple("abcde"))


def test_a_plain_vit_must_say_its_pixels(tmp_path):
    def plain(config, arrays):
        config.clear()
        config.update(num_heads=4)
        arrays["patch_embed.proj.weight"] = arrays.pop("embeds.proj.weight").reshape(64, 8, 8, 3).transpose(0, 3, 1, 2)
        arrays["patch_embed.proj.bias"] = arrays.pop("embeds.proj.bias")
        arrays["pos_embed"] = arrays.pop("embeds.pos_embed").reshape(1, -1, 64)

    folder = changed(tmp_path, plain)
    with pytest.raises(UserError, match='"pretrained_cfg": {"mean"'):
        weights.read(folder)
    (folder / "config.json").write_text(
        json.dumps({"num_heads": 4, "mean": MEAN, "std": STD, "act_layer": "gelu_tanh"})
    )
    back = weights.read(folder)
    jax.tree.map(np.testing.assert_array_equal, back.params, ours().params)
    assert (back.cfg.posemb_grid, back.cfg.mean, back.cfg.pool) == ((16, 16), MEAN, "map")
