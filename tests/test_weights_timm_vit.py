"""timm's vision transformers, in and out: the same numbers as timm's own, for five images in one packed row."""

import json

import jax
import numpy as np
import parity
import pytest

from input_pipeline.errors import UserError
from navit_jax import navit, weights
from navit_jax.weights import timm_names, timm_vit

SMALL = dict(embed_dim=64, depth=2, num_heads=4, num_classes=5, patch_size=8)
MEAN, STD = (0.4, 0.45, 0.6), (0.2, 0.25, 0.3)


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


def theirs(model, images, mean=MEAN, std=STD):
    """(tokens of patches, pooled, logits) of images, each on its own."""
    torch = parity.library("torch")
    tokens, pooled, logits = [], [], []
    with torch.no_grad():
        for image in images:
            features = model.forward_features(parity.as_torch(image, mean, std))
            rows, columns = (side // SMALL["patch_size"] for side in image.shape[:2])
            tokens.append(features[0, model.num_prefix_tokens :].reshape(rows, columns, -1))
            pooled.append(model.forward_head(features, pre_logits=True)[0])
            logits.append(model.forward_head(features)[0])
    return tokens, pooled, logits


def compared(model, folder):
    """The weights in this folder, after they have been compared with the model; float32 allows ten times less than 1e-4."""
    images = parity.five_images(np.random.default_rng(0), SMALL["patch_size"])
    found = weights.read(folder)
    ours = parity.outputs(found, parity.packed(images, SMALL["patch_size"]))
    expected = theirs(model, images)
    for x, y in zip(ours, expected):
        parity.assert_close(x, y, atol=1e-5)
    return found


FLEX = [
    ("naflexvit_base_patch16_gap", {}),
    ("naflexvit_base_patch16_par_gap", {}),
    ("naflexvit_base_patch16_parfac_gap", {}),
    ("naflexvit_base_patch16_map", dict(qk_norm=True, class_token=True, pos_embed_antialias=False)),
    ("naflexvit_base_patch16_siglip", dict(embed_proj_type="conv", num_classes=0)),
    ("naflexvit_so150m2_patch16_reg1_gap", dict(patchify_channels_last=False, num_heads=2, pos_embed_grid_size=(5, 7))),
    ("naflexvit_base_patch16_gap", dict(rope_type="axial", pos_embed="none", qk_norm=True, fc_norm=False)),
    ("naflexvit_base_patch16_gap", dict(rope_type="axial", pos_embed="none", rope_rotate_half=True, qkv_fused=False)),
    ("naflexvit_base_patch16_gap", dict(rope_type="axial", pos_embed="none", rope_grid_indexing="xy", swiglu_mlp=True)),
    ("naflexvit_base_patch16_gap", dict(rope_type="axial", pos_embed="none", rope_ref_feat_shape=(6, 6), attn_type="eva")),
    ("naflexvit_base_patch16_map", dict(rope_type="dinov3", pos_embed="none", rope_rotate_half=True, reg_tokens=0)),
    ("naflexvit_base_patch16_gap", dict(class_token=True, global_pool="token", pre_norm=True, swiglu_mlp=True)),
    ("naflexvit_base_patch16_gap", dict(swiglu_mlp=True, swiglu_align_to=8, norm_layer="rmsnorm", qk_norm=True)),
    ("naflexvit_large_patch16_radio_v3", dict(depth=3, pos_embed_grid_size=(12, 12), img_size=None)),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, options", FLEX)
def test_naflexvit(name, options, tmp_path):
    compared(built(name, tmp_path, **options), tmp_path)


PLAIN = [
    ("vit_base_patch16_224", {}),
    ("vit_base_patch16_clip_quickgelu_224", {}),
    ("vit_base_patch16_siglip_256", {}),
    ("vit_base_patch16_siglip_gap_256", {}),
    ("vit_medium_patch16_reg4_gap_256", dict(qk_norm=True)),
    ("vit_medium_patch16_gap_240", {}),
    ("vit_small_patch14_reg4_dinov2", {}),
    ("vit_giant_patch14_dinov2", dict(img_size=56, mlp_ratio=5)),
    ("vit_so150m_patch16_reg4_map_256", dict(img_size=(40, 56))),
    ("aimv2_large_patch14_224", {}),
    ("vit_base_patch16_224", dict(global_pool="avg", fc_norm=False, pos_embed="none")),
    ("test_vit4", {}),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, options", PLAIN)
def test_plain_vit(name, options, tmp_path):
    compared(built(name, tmp_path, **{"img_size": 64, "dynamic_img_size": True, **options}), tmp_path)


OURS = [
    dict(),
    dict(posemb="table", posemb_square=True, posemb_grid=(5, 7), pool="mean", norm_tokens=False, norm_pooled=True),
    dict(posemb="learned", posemb_coords="resized", posemb_resize="linear", posemb_max=9, pool="first", registers=3),
    dict(posemb="rope", mlp="swiglu", registers=2, layer_scale=0.1, bias=False, mlp_dim=101, mean=(0.5,), std=(0.5,)),
    dict(posemb="rope", posemb_coords="centred", rope_base=100.0, qk_norm=False, norm="rms", mlp="quick_gelu"),
    dict(posemb="rope", posemb_coords="fractional", posemb_max=7, embed_norm="after", pool="mean"),
    dict(posemb="none", embed_norm="entry", num_classes=0, norm_tokens=False, registers=1, pool="first", bias=False),
]


def ours(**fields):
    """Random weights of a small model that timm has, too."""
    sizes = dict(width=64, depth=2, heads=4, mlp_dim=96, patch_size=SMALL["patch_size"], num_classes=5, bias=True)
    kinds = dict(posemb="table", posemb_resize="bicubic_antialias", mean=MEAN, std=STD)
    cfg, rng = navit.NaViTConfig(**{**sizes, **kinds, **fields}), np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: (rng.normal(size=x.shape) * x.shape[-2 if x.ndim > 2 else 0] ** -0.5).astype(np.float32),
        navit.abstract(cfg)[1],
    )
    return weights.Weights(cfg, params, classes=tuple("abcde") if cfg.num_classes else ())


@pytest.mark.slow
@pytest.mark.parametrize("fields", OURS)
def test_timm_loads_what_is_written(fields, tmp_path):
    timm = parity.library("timm")
    given = ours(**fields)
    assert timm_vit.write(given, tmp_path) == tmp_path
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = parity.five_images(np.random.default_rng(0), SMALL["patch_size"])
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    expected = theirs(model, images, mean, std)
    for x, y in zip(parity.outputs(given, parity.packed(images, SMALL["patch_size"])), expected):
        parity.assert_close(x, y, atol=1e-5)
