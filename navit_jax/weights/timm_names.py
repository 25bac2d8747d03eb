"""What timm knows of a vision transformer beside its tensors: what its config.json says, and what its names imply.

Shapes tell most of a model, but not its heads, activation, eps of norms, or how positions are resized. timm keeps those
in its code, one function a name; the tables here restate that for the families whose blocks we have, and
tests/test_weights_timm_vit.py compares them with every name of timm's registry. A name that they do not cover, and an
option that is not listed, are refused: a model that is silently another one is worse than none.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from input_pipeline.errors import UserError

HEADS = {  # by the size in a name; not by the width, which a user may change
    **{"tiny": 3, "xsmall": 4, "wee": 4, "little": 5, "small": 6, "medium": 8, "mediumd": 8, "betwixt": 10, "base": 12},
    **{"so150m2": 13, "so150m": 14, "large": 16, "so400m": 16, "intern300m": 16, "huge": 16, "giant": 16},
    **{"giantopt": 16, "gigantic": 16},
}
ODD_HEADS = (  # (part of a name, heads), before HEADS
    (r"^vit_base_patch16_gap_224$", 16),
    (r"_plus_", 14),
    (r"giant_patch14_(reg\d_)?(dinov2|tipsv2)|giant_patch16_radio", 24),
    (r"^aimv2_large", 8),
    (r"^aimv2_huge", 12),
    (r"^aimv2_1b", 16),
    (r"^aimv2_3b", 24),
    (r"^test_vit2?$", 2),
    (r"^test_vit4$", 3),
)
NAME = re.compile(  # of models whose blocks we have; not parallel, post-norm or differential ones, or Eva's
    rf"^((naflexvit|vit)_({'|'.join(HEADS)})_patch\d+(_(\d+|v\d|reg\d|gap|map|siglip|clip|quickgelu|dinov2|tipsv2|plus|par|"
    r"parfac|miil|radio|36x1))*|flexivit_(small|base|large)|eva_large_patch14_(196|336)|aimv2_\w+|test_vit[24]?)$"
)
TANH = re.compile(
    r"patch32_siglip|giantopt.*siglip|so400m_patch16_siglip|large_patch16_siglip.*_512|^naflexvit.*siglip"
)
GAP = re.compile(r"_gap(_|$)|^eva_large|^aimv2|^test_vit[24]$")
MAP = re.compile(r"_map(_|$)|siglip(?!_gap)")
CLIP = re.compile(r"_clip_|^aimv2")
GATED = re.compile(r"giant_patch14_(reg\d_)?(dinov2|tipsv2)|^aimv2")  # their MLP is silu(gate) * up
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "quickgelu": "quick_gelu"}
NORMS = {"layernorm": "layer", "layernormfp32": "layer", "rmsnorm": "rms", "rmsnormfp32": "rms"}

TOLD = {  # by shapes and names of tensors; or of use in training or to timm's own loading only
    *("patch_size", "embed_dim", "depth", "mlp_ratio", "attn_pool_mlp_ratio", "qkv_bias", "proj_bias", "qk_norm"),
    *("class_token", "reg_tokens", "in_chans", "no_embed_class", "pre_norm", "final_norm", "fc_norm"),
    *("num_classes", "pos_embed", "pos_embed_grid_size", "qkv_fused", "swiglu_align_to", "embed_proj_type"),
    *("attn_type", "img_size", "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "use_naflex"),
    *("weight_init", "fix_init", "enable_patch_interpolator", "use_key_only_attn_mask", "drop_rate"),
    *("pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
    *("rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords", "features_only", "out_indices"),
    *("scriptable", "exportable", "no_jit"),
}
USED = {  # with timm's defaults
    **dict(num_heads=None, act_layer=None, norm_layer=None, global_pool=None, init_values=None, swiglu_mlp=False),
    **dict(pos_embed_interp_mode="bicubic", pos_embed_antialias=True, pos_embed_ar_preserving=False, rope_type=""),
    **dict(rope_temperature=10000.0, rope_ref_feat_shape=None, rope_grid_indexing="ij", rope_rotate_half=False),
    **dict(patchify_channels_last=True, attn_pool_num_heads=None, embed_norm_layer=None),
}
FIXED = {  # option: the values under which the model is one that we have
    **dict.fromkeys(("num_kv_heads", "rope_mrope_section", "block_fn", "mlp_layer", "input_norm_layer"), (None, "")),
    **dict.fromkeys(("scale_mlp_norm", "scale_attn_norm", "scale_attn_inner_norm", "attn_gated"), (False, None)),
    **dict.fromkeys(("attn_only_layer_scale", "pool_include_prefix", "pos_embed_align_corners"), (False, None)),
    **dict.fromkeys(("pos_embed_use_grid_sample",), (False, None)),
    "rope_grid_offset": (0, 0.0),
    "attn_layer": (None, "", "attn"),
}


def options(config: Mapping, path: Path) -> dict:
    """Every option of USED, "eps" of the norms, "architecture" and "stated" (those that the file gives itself).

    From config.json as timm writes it, or with options as plain keys; without one, a file or folder that is called as
    timm's architecture tells as much. Raises UserError for what we do not have.
    """
    name = str(config.get("architecture") or _name_of(path)).partition(".")[0]
    known = {*TOLD, *USED, *FIXED}
    given = {key: config[key] for key in known & set(config)} | dict(config.get("model_args") or {})
    if not name and not given:
        raise UserError(
            f"{path}: no shape tells heads, activation or how positions are resized; write a config.json beside it, as "
            'timm does: {"architecture": "vit_base_patch16_224", ...}, or {"num_heads": 12, "act_layer": "gelu", ...}: '
            "what is not given there is as VisionTransformer or NaFlexVit have it"
        )
    for key, value in given.items():
        if key not in known or (key in FIXED and value not in FIXED[key]):
            fixed = f"only {key}={FIXED[key][0]!r} is" if key in FIXED else "this option is not"
            raise UserError(f"{path}: {key}={value!r} of timm's {name or 'model'}: {fixed} implemented here")
    implied = _implied(name, given, path) if name else {}
    found = USED | implied | {key: given[key] for key in USED if given.get(key) is not None}
    found["stated"] = given
    found["eps"] = 1e-5 if CLIP.search(name) and not given.get("norm_layer") else 1e-6
    found["norm"] = _one(path, "norm_layer", found["norm_layer"] or "layernorm", NORMS)
    if found["embed_norm_layer"] and _one(path, "embed_norm_layer", found["embed_norm_layer"], NORMS) != found["norm"]:
        raise UserError(f"{path}: embed_norm_layer={found['embed_norm_layer']!r} of timm, but other norms elsewhere")
    return found | {"architecture": name}


def _implied(name: str, given: Mapping, path: Path) -> dict:
    """What the architecture's name says; UserError for one that we do not know."""
    if not NAME.match(name):
        raise UserError(
            f"{path}: timm's architecture {name!r} is not one whose defaults are known here (vit_*, naflexvit_*, "
            "flexivit_* with plain blocks). If its blocks are those of VisionTransformer or NaFlexVit, take "
            '"architecture" out of config.json and give "model_args": {"num_heads": ..., "act_layer": ...} there'
        )
    act = "quick_gelu" if "quickgelu" in name else "gelu_tanh" if TANH.search(name) else "gelu"
    pool = "avg" if GAP.search(name) else "map" if MAP.search(name) else "token"
    implied = dict(num_heads=_heads(name), act_layer=act, global_pool=pool, swiglu_mlp=bool(GATED.search(name)))
    if name.startswith("aimv2") or name == "test_vit4":
        implied["norm_layer"] = "rmsnorm"
    if name.startswith("naflexvit"):
        implied["pos_embed_interp_mode"] = "bilinear" if re.search("siglip|radio", name) else "bicubic"
        implied["pos_embed_ar_preserving"] = bool(re.search("_par|radio", name))
        implied["pos_embed_antialias"] = "radio" not in name
    if re.search("^naflexvit_(base|huge)_patch16_radio_v3", name) and given.get("pos_embed_align_corners") is not False:
        raise UserError(f"{path}: pos_embed_align_corners=True of timm's {name}: only False is implemented here")
    return implied


def _heads(name: str) -> int:
    for part, heads in ODD_HEADS:
        if re.search(part, name):
            return heads
    return HEADS[name.split("_")[1]]


def _name_of(path: Path) -> str:
    """The architecture that a file or folder is called after, without its tag; "" if it is not."""
    names = [path.name, path.parent.name] if path.suffix else [path.name]
    stems = [name.partition(".")[0] for name in names]
    return next((stem for stem in stems if NAME.match(stem)), "")


def _one(path: Path, key: str, value: str, known: Mapping[str, str]) -> str:
    """Our word for theirs. Raises UserError for one that we do not have."""
    if str(value).replace("_", "").lower() not in {k.replace("_", "") for k in known}:
        raise UserError(f"{path}: {key}={value!r} of timm is not implemented here; only {', '.join(known)} are")
    return {k.replace("_", ""): v for k, v in known.items()}[str(value).replace("_", "").lower()]


def activation(found: Mapping, path: Path, gated: bool) -> str:
    """`NaViTConfig.mlp` of these options; gated: whether the tensors are those of an MLP with a gate."""
    if not gated:
        return _one(path, "act_layer", found["act_layer"] or "gelu", ACTIVATIONS)
    if not found["swiglu_mlp"]:
        raise UserError(
            f'{path}: the MLPs have a gate, whose activation is not known: write "model_args": {{"swiglu_mlp": true}} '
            "into config.json if it is silu(first half) * second half"
        )
    return "swiglu"


def about(config: Mapping) -> dict:
    """What config.json says of the pretrained weights; older files have it beside the architecture."""
    return dict(config.get("pretrained_cfg") or {}) | {k: v for k, v in config.items() if v is not None}


def pixels(config: Mapping, path: Path, flexible: bool) -> dict[str, tuple[float, ...]]:
    """mean and std from `pretrained_cfg` or plain keys; those of NaFlexVit are 0.5 where nothing is said."""
    said = about(config)
    if not {"mean", "std"} <= set(said):
        if flexible:
            return dict(mean=(0.5,), std=(0.5,))
        raise UserError(
            f"{path}: no tensor tells with what mean and std its pixels were normalised, and timm's models differ; "
            'write "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}, with the right numbers, into '
            "config.json"
        )
    found = {key: tuple(float(x) for x in said[key]) for key in ("mean", "std")}
    return {key: x[:1] if len(set(x)) == 1 else x for key, x in found.items()}


def classes(config: Mapping, number: int) -> tuple[str, ...]:
    """The classes' names, their descriptions where there are some; () if they are not known for all."""
    said = about(config)
    names, more = said.get("label_names") or said.get("labels") or (), said.get("label_descriptions") or {}
    if isinstance(names, Mapping):
        names = [names[key] for key in sorted(names, key=int)]
    return tuple(str(more.get(name, name)) for name in names) if len(names) == number else ()


def table_grid(
    tokens: int, prefix: int, patch: int, found: Mapping, config: Mapping, path: Path
) -> tuple[int, int, int]:
    """(rows, columns, how many of the prefix tokens have a place of their own) of VisionTransformer's pos_embed."""
    said = found["stated"].get("img_size") or about(config).get("input_size", ())[1:]
    sides = (said, said) if isinstance(said, int) else tuple(said)
    for own in dict.fromkeys((0, prefix)):
        if len(sides) == 2 and (sides[0] // patch) * (sides[1] // patch) == tokens - own:
            return sides[0] // patch, sides[1] // patch, own
    for own in dict.fromkeys((0, prefix)):
        side = math.isqrt(max(tokens - own, 0))
        if side and side * side == tokens - own:
            return side, side, own
    raise UserError(
        f"{path}: pos_embed has {tokens} places, which is no square; write the image size that it is for into "
        'config.json: "model_args": {"img_size": [height, width]}'
    )
