"""timm's vision transformers, in and out: the same numbers as timm's own, for five images in one packed row."""

import functools

import numpy as np
import parity
import pytest
from timm_models import MEAN, PATCH, STD, theirs

from input_pipeline.errors import UserError
from navit_jax import weights
from navit_jax.weights import timm_names

SMALL = dict(embed_dim=64, depth=2, num_heads=4, num_classes=5, patch_size=PATCH)


def built(name, folder, **options):
    """A small random model of timm's, and the folder that it is saved in as timm's users do."""
    timm = parity.library("timm")
    hub = parity.library("timm.models._hub")
    torch = parity.library("torch")
    model = parity.randomise(timm.create_model(name, **{**SMALL, **options}))
    with torch.no_grad():  # of the size of what they are added to, so that a wrong one shows
        for part, tensor in model.named_parameters():
            if "pos_embed" in part or "_token" in part or "latent" in part:
                tensor.copy_(0.5 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(part))))
    model.pretrained_cfg.update(mean=MEAN, std=STD)
    hub.save_for_hf(model, folder, safe_serialization=True)
    return model


def compared(model, folder):
    """The weights in this folder, after they have been compared with the model; in float32 1e-5 is enough."""
    images = parity.five_images(np.random.default_rng(0), PATCH)
    found = weights.read(folder)
    ours = parity.outputs(found, parity.packed(images, PATCH))
    expected = theirs(model, images)
    for x, y in zip(ours, expected):
        parity.assert_close(x, y, atol=1e-5)
    return found


ROPE = dict(rope_type="axial", pos_embed="none")
FLEX = [
    ("naflexvit_base_patch16_gap", {}),
    ("naflexvit_base_patch16_parfac_gap", {}),
    ("naflexvit_base_patch16_map", dict(qk_norm=True, class_token=True, pos_embed_antialias=False)),
    ("naflexvit_base_patch16_siglip", dict(embed_proj_type="conv", num_classes=0)),
    (
        "naflexvit_so150m2_patch16_reg1_gap",
        dict(patchify_channels_last=False, num_heads=2, pos_embed_grid_size=(5, 7), pos_embed_ar_preserving=True),
    ),
    ("naflexvit_base_patch16_gap", ROPE | dict(qk_norm=True, fc_norm=False)),
    ("naflexvit_base_patch16_gap", ROPE | dict(rope_rotate_half=True, qkv_fused=False, rope_ref_feat_shape=(6, 6))),
    ("naflexvit_base_patch16_gap", ROPE | dict(rope_grid_indexing="xy", swiglu_mlp=True, attn_type="eva")),
    ("naflexvit_base_patch16_map", ROPE | dict(rope_type="dinov3", rope_rotate_half=True, reg_tokens=0)),
    (
        "naflexvit_base_patch16_gap",
        dict(class_token=True, global_pool="token", pre_norm=True, swiglu_mlp=True, swiglu_align_to=8)
        | dict(norm_layer="rmsnorm", qk_norm=True),
    ),
    ("naflexvit_large_patch16_radio_v3", dict(pos_embed_grid_size=(12, 12), img_size=None)),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, options", FLEX)
def test_naflexvit(name, options, tmp_path):
    compared(built(name, tmp_path, **options), tmp_path)


PLAIN = [
    ("vit_base_patch16_224", {}),
    ("vit_base_patch16_clip_quickgelu_224", {}),
    ("vit_medium_patch16_gap_240", dict(qk_norm=True)),
    ("vit_small_patch14_reg4_dinov2", {}),
    ("vit_giant_patch14_dinov2", dict(img_size=56, mlp_ratio=5)),
    ("vit_so150m_patch16_reg4_map_256", dict(img_size=(40, 56))),
    ("aimv2_large_patch14_224", {}),
    ("test_vit4", {}),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, options", PLAIN)
def test_plain_vit(name, options, tmp_path):
    compared(built(name, tmp_path, **{"img_size": 64, "dynamic_img_size": True, **options}), tmp_path)


def registry():
    """{name: what timm builds it with} of every model of the two classes that we read."""
    timm, kinds = parity.library("timm"), {}
    plain, flexible = (parity.library(f"timm.models.{name}") for name in ("vision_transformer", "naflexvit"))
    defaults = vars(flexible.NaFlexVitCfg())

    def record(variant, pretrained=False, cfg=None, **options):
        kinds[variant] = options if cfg is None else {k: v for k, v in vars(cfg).items() if v != defaults[k]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "_create_vision_transformer", record)
        patch.setattr(flexible, "_create_naflexvit", record)
        for module in (plain, flexible):
            for name in timm.list_models(module=module.__name__.rpartition(".")[2]):
                getattr(module, name)()
    return kinds


@pytest.mark.slow
def test_what_a_name_implies_is_what_timm_builds(tmp_path):
    """Every name of timm's registry is refused, or means the same here."""
    built_with, known = registry(), 0
    for name in parity.library("timm").list_models():
        try:
            found = timm_names.options({"architecture": name}, tmp_path)
        except UserError:
            continue
        known += 1
        options = built_with[name]  # a name of another class must be refused
        norm, eps = options.get("norm_layer"), 1e-6
        if isinstance(norm, functools.partial):
            norm, eps = norm.func.__name__, norm.keywords["eps"]
        expected = dict(num_heads=options.get("num_heads", 12), swiglu_mlp="mlp_layer" in options, eps=eps)
        expected |= dict(global_pool=options.get("global_pool", "map" if name.startswith("naflex") else "token"))
        expected |= dict(norm="rms" if norm and "rms" in norm.lower() else "layer")
        expected |= {key: options.get(key, timm_names.USED[key]) for key in timm_names.USED if key.startswith("pos_")}
        if not expected["swiglu_mlp"]:
            expected["act_layer"] = options.get("act_layer", "gelu")
        assert {key: found[key] for key in expected} == expected, name
        assert not options.get("pool_include_prefix") and not options.get("pos_embed_align_corners"), name
    assert known > 150
