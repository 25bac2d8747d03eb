"""Ours as timm's NaFlexVit, for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

Whether a model can be one is asked in one way: its options are written, read again as `timm_vit` reads any file, and
compared field by field. So an option that is added to ours later is refused here until it has a counterpart.
"""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline.errors import UserError
from navit_jax import navit
from navit_jax.compatibility import named_leaves, nested
from navit_jax.navit import NaViTConfig
from navit_jax.weights import Weights, mapping, orders, timm_names, timm_vit
from navit_jax.weights.files import Entry, write_safetensors
from navit_jax.weights.reader import Tensors
from navit_jax.weights.timm_rules import Form, rules

ARCHITECTURE = "naflexvit_base_patch16_map"  # any will do: every option is written out
TRAINING = ("dropout", "stochastic_depth", "remat", "dtype", "attention", "head_bias", "posemb_beyond")
POSITIONS = {  # what else matters of each kind of positions
    "table": ("posemb_grid", "posemb_resize", "posemb_square"),
    "learned": ("posemb_coords", "posemb_combine", "posemb_max", "posemb_resize", "posemb_square"),
    "rope": ("posemb_coords", "rope_base", "rope_axes"),
}


def write(weights: Weights, folder: Path) -> Path:
    """See `timm_vit.write`. Biases that the model is without are written as 0."""
    cfg, folder = weights.cfg, folder.expanduser()
    if not isinstance(cfg, NaViTConfig):
        raise UserError(
            "timm's NaFlexVit is one image tower, and this model has a text tower too: it cannot be written"
        )
    full = replace(cfg, bias=True)
    config, form = _config(full, weights.classes), _form(full)
    leaves, shapes = named_leaves(weights.params), named_leaves(navit.abstract(full)[1])
    if cfg.embed_norm == "entry" and np.any(leaves.get("embed/bias", 0)):
        raise UserError("embed/bias is not 0, and timm's NaFlexVit has none beside pre_norm: it cannot be written")
    params = nested({name: leaves.get(name, np.zeros(leaf.shape, np.float32)) for name, leaf in shapes.items()})
    tensors = mapping.save(_rules(full, form), params)
    _check(full, Tensors(folder, {name: Entry(x.shape, lambda: None) for name, x in tensors.items()}, config))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / "model.safetensors", tensors)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"The model could not be written to {folder}: {error}. Name a folder with room.") from error
    return folder


def _rules(cfg: NaViTConfig, form: Form) -> list[mapping.Rule]:
    """Those of what timm's model has; what is left over is told by `_check`, by the field that causes it."""
    known = named_leaves(navit.abstract(cfg)[1])
    return [rule for rule in rules(cfg, form) if rule.ours in known]


def _form(cfg: NaViTConfig) -> Form:
    """EvaBlock, which has rope and gates, has other names for the layer scale."""
    cls = int(cfg.pool == "first")
    turn = orders.rope_pairs(cfg.head_dim, half=_centred(cfg)) if cfg.posemb == "rope" else {}
    gamma = cfg.posemb == "rope" or cfg.mlp == "swiglu"
    lacks = frozenset(["embeds.proj.bias"] if cfg.embed_norm == "entry" else [])
    return Form(gamma=gamma, class_token=cls, registers=cfg.registers - cls, turn=turn, lacks=lacks)


def _centred(cfg: NaViTConfig) -> bool:
    return cfg.posemb_coords == "centred"


def _config(cfg: NaViTConfig, classes: tuple[str, ...]) -> dict:
    """timm's config.json of the NaFlexVit that comes nearest."""
    pool = {ours: theirs for theirs, ours in timm_vit.POOLS.items()}.get(cfg.pool, "avg")
    args = dict(
        **dict(patch_size=cfg.patch_size, embed_dim=cfg.width, depth=cfg.depth, num_heads=cfg.heads),
        **dict(mlp_ratio=_ratio(cfg), qkv_bias=True, qk_norm=cfg.qk_norm, init_values=cfg.layer_scale or None),
        **dict(class_token=cfg.pool == "first", reg_tokens=cfg.registers - (cfg.pool == "first"), global_pool=pool),
        **dict(norm_layer="rmsnorm" if cfg.norm == "rms" else "layernorm", pre_norm=cfg.embed_norm == "entry"),
        **dict(final_norm=cfg.norm_tokens or cfg.norm_pooled, fc_norm=cfg.norm_pooled, num_classes=cfg.num_classes),
        **dict(embed_proj_type="linear", patchify_channels_last=True, in_chans=cfg.channels),
        **dict(act_layer="gelu_tanh" if cfg.mlp == "swiglu" else cfg.mlp, swiglu_mlp=cfg.mlp == "swiglu"),
        **_positions(cfg),
    )
    if cfg.embed_norm == "after":
        args["embed_norm_layer"] = args["norm_layer"]
    if args["swiglu_mlp"]:
        args["attn_type"] = "rope"  # the attention of EvaBlock that has a bias for keys, with or without rope
    pixels = {
        key: list(x) * (cfg.channels if len(x) == 1 else 1) for key, x in dict(mean=cfg.mean, std=cfg.std).items()
    }
    about = dict(
        custom_load=False, input_size=[cfg.channels, 384, 384], fixed_input_size=False, num_classes=cfg.num_classes
    )
    about |= dict(interpolation="bicubic", crop_pct=1.0, first_conv="embeds.proj", classifier="head", **pixels)
    about |= dict(label_names=list(classes)) if classes else {}
    config = dict(architecture=ARCHITECTURE, num_classes=cfg.num_classes, num_features=cfg.width, global_pool=pool)
    return config | dict(model_args=args, pretrained_cfg=about)


def _ratio(cfg: NaViTConfig) -> float:
    """timm takes the whole part of width * ratio."""
    return cfg.mlp_dim / cfg.width if cfg.mlp_dim % cfg.width == 0 else (cfg.mlp_dim + 0.5) / cfg.width


def _positions(cfg: NaViTConfig) -> dict:
    if cfg.posemb == "rope":
        kind = dict(rope_type="dinov3" if _centred(cfg) else "axial", rope_rotate_half=_centred(cfg))
        reference = [cfg.posemb_max] * 2 if cfg.posemb_coords == "fractional" else None
        return dict(pos_embed="none", rope_temperature=cfg.rope_base, rope_ref_feat_shape=reference, **kind)
    if cfg.posemb not in POSITIONS:
        return dict(pos_embed="none", rope_type="")
    mode, antialias = {ours: theirs for theirs, ours in timm_vit.RESIZES.items()}[cfg.posemb_resize]
    resize = dict(pos_embed_interp_mode=mode, pos_embed_antialias=antialias, pos_embed_ar_preserving=cfg.posemb_square)
    if cfg.posemb == "learned":
        return dict(pos_embed="factorized", pos_embed_grid_size=[cfg.posemb_max] * 2, rope_type="", **resize)
    return dict(pos_embed="learned", pos_embed_grid_size=list(cfg.posemb_grid), rope_type="", **resize)


def _check(cfg: NaViTConfig, written: Tensors) -> None:
    """Raises UserError that lists every field by which the model is not the one that would be read again."""
    there = timm_vit.model(written, timm_names.options(written.config, written.path))[0]
    of_kind = {name for names in POSITIONS.values() for name in names} - set(POSITIONS.get(cfg.posemb, ()))
    skipped = {*TRAINING, *of_kind} - ({"posemb_max"} if cfg.posemb_coords == "fractional" else set())
    named = [(field.name, _value(cfg, field.name), _value(there, field.name)) for field in fields(cfg)]
    wrong = [f"model.{name} is {a!r}, there it is {b!r}" for name, a, b in named if name not in skipped and a != b]
    if cfg.norm_tokens and cfg.norm_pooled:
        wrong.append("model.norm_tokens and norm_pooled are both True, there one of them is")
    if wrong:
        raise UserError(
            f"this model cannot be written as timm's NaFlexVit, which has no counterpart: {'; '.join(wrong)}"
        )


def _value(cfg: NaViTConfig, name: str) -> Any:
    """A field as it works, however it is written."""
    value = getattr(cfg, name)
    if name in ("mean", "std"):
        return value[:1] if len(set(value)) == 1 else value
    if name == "head_size":
        return cfg.head_dim
    return value or cfg.patch_size if name == "stored_patch_size" else value
