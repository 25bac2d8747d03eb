"""timm's vision transformers: NaFlexVit, and the plain VisionTransformer read as a NaFlex one.

timm runs a plain ViT at its own size, or with dynamic_img_size at any by resizing its table of positions; that is what
we do for each image of a row. Files are those of `timm.models.save_for_hf`: safetensors and a config.json, which says
what shapes do not (see timm_names).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from input_pipeline.errors import UserError
from navit_jax import navit
from navit_jax.navit import NaViTConfig
from navit_jax.weights import Weights, mapping, orders, timm_names
from navit_jax.weights.reader import Tensors
from navit_jax.weights.timm_rules import OPTIONAL, Form, rules

NAME = "timm (NaFlexVit, VisionTransformer)"
RESIZES = {
    **{("bilinear", True): "bilinear", ("bilinear", False): "linear"},
    **{("bicubic", True): "bicubic_antialias", ("bicubic", False): "bicubic"},
}
POOLS = {"avg": "mean", "token": "first", "map": "map"}


def recognises(names: Mapping[str, tuple], config: Mapping) -> bool:
    """Whether these are tensors of one of timm's vision transformers."""
    proj, needed = (
        {"embeds.proj.weight", "patch_embed.proj.weight"},
        {"blocks.0.norm1.weight", "blocks.0.mlp.fc2.weight"},
    )
    if not proj & set(names) or not needed <= set(names) or "model_type" in config:
        return False
    return len(names["blocks.0.mlp.fc2.weight"]) == 2


def read(tensors: Tensors) -> Weights:
    """The model; UserError for an option that we do not have, by its name, and for what config.json must say."""
    found = timm_names.options(tensors.config, tensors.path)
    cfg, form = model(tensors, found)
    params = mapping.load(rules(cfg, form), tensors, navit.abstract(cfg)[1])
    labels = timm_names.classes(tensors.config, cfg.num_classes)
    return Weights(cfg, params, classes=labels, source=f"timm {found['architecture'] or 'ViT'} from {tensors.path}")


def write(weights: Weights, folder: str | Path) -> Path:
    """A folder as `timm.models.save_for_hf` makes it, for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    Returns the folder. Raises UserError for a model that timm's NaFlexVit cannot be, by the field.
    """
    from navit_jax.weights import timm_export  # which reads with this module what it writes

    return timm_export.write(weights, Path(folder))


def model(tensors: Tensors, found: dict) -> tuple[NaViTConfig, Form]:
    """The configuration and the layout that names, shapes and options tell together."""
    names, flexible = tensors.names, "embeds.proj.weight" in tensors.names
    width, hidden = names["blocks.0.mlp.fc2.weight"]
    packed = names.get("blocks.0.mlp.fc1.weight", (0,))[0] == 2 * hidden
    gate = "split" if "blocks.0.mlp.fc1_g.weight" in names else "packed" if packed else ""
    heads = _heads(tensors, found)
    cls, registers = (names.get(f"{'embeds.' * flexible}{x}_token", (1, 0))[1] for x in ("cls", "reg"))
    form = Form(
        flexible=flexible,
        conv=len(_proj(names)) == 4,
        channels_first=not found["patchify_channels_last"],
        attention=_attention(names),
        gamma="blocks.0.gamma_1" in names,
        gate=gate,
        class_token=cls,
        registers=registers,
        turn=_turn(found, width // heads),
        lacks=_lacks(tensors, found),
    )
    patches = _patches(tensors, found)
    positions, places = _positions(tensors, found, form, patches["patch_size"])
    scaled = form.gamma or "blocks.0.ls1.gamma" in names
    cfg = NaViTConfig(
        **patches,
        **positions,
        **timm_names.pixels(tensors.config, tensors.path, flexible),
        **_top(tensors, found, form),
        **dict(width=width, heads=heads, mlp_dim=hidden, registers=cls + registers, bias=True),
        depth=len({name.split(".")[1] for name in names if re.match(r"blocks\.\d+\.", name)}),
        norm=found["norm"],
        norm_eps=found["eps"],
        qk_norm="blocks.0.attn.q_norm.weight" in names,
        mlp=timm_names.activation(found, tensors.path, bool(gate)),
        layer_scale=float(found["init_values"] or 1e-5) if scaled else 0.0,
    )
    return cfg, replace(form, places=places)


def _proj(names: Mapping[str, tuple]) -> tuple[int, ...]:
    return names.get("embeds.proj.weight") or names["patch_embed.proj.weight"]


def _patches(tensors: Tensors, found: dict) -> dict:
    """patch_size, channels and embed_norm; UserError for patches that are not square."""
    names, shape = tensors.names, _proj(tensors.names)
    norms = {
        "entry": "norm_pre.weight" in names,
        "after": bool({"embeds.norm.weight", "patch_embed.norm.weight"} & set(names)),
    }
    if all(norms.values()):
        raise UserError(f"{tensors.path}: a norm behind the patch embedding and norm_pre together are not implemented")
    embed_norm = next((kind for kind, there in norms.items() if there), "none")
    if len(shape) == 4:
        channels, sides = shape[1], shape[2:]
    else:
        channels = int(found["stated"].get("in_chans") or timm_names.about(tensors.config).get("input_size", (3,))[0])
        side = math.isqrt(shape[1] // channels)
        sides = (side, shape[1] / channels / max(side, 1))
    if sides[0] != sides[1]:
        raise UserError(
            f"{tensors.path}: {shape[1:]} weights a patch are no square of {channels} channels; write the right "
            '"model_args": {"in_chans": ...} into config.json'
        )
    return dict(patch_size=int(sides[0]), channels=channels, embed_norm=embed_norm)


def _heads(tensors: Tensors, found: dict) -> int:
    """From config.json or the architecture's name, else from the norm of a head's numbers."""
    names = tensors.names
    width, norm = names["blocks.0.mlp.fc2.weight"][0], names.get("blocks.0.attn.q_norm.weight")
    heads = int(found["num_heads"] or (width // norm[0] if norm else 0))
    if not heads:
        raise UserError(
            f'{tensors.path}: no shape tells its heads; write "num_heads" or "architecture" into config.json'
        )
    if width % heads:
        raise UserError(f"{tensors.path}: num_heads is {heads}, which does not divide the width {width}")
    pool_heads = found["attn_pool_num_heads"] or heads
    if pool_heads != heads:
        raise UserError(f"{tensors.path}: attn_pool_num_heads={pool_heads} of timm: only the {heads} of the blocks are")
    return heads


def _attention(names: Mapping[str, tuple]) -> str:
    if "blocks.0.attn.q_proj.weight" in names:
        return "split"
    return "eva" if "blocks.0.attn.q_bias" in names else "fused"


def _lacks(tensors: Tensors, found: dict) -> frozenset[str]:
    """Biases that the first block is without, as an option of timm says or may say; later blocks must agree."""
    gone = {name for name in OPTIONAL if name.replace("{i}", "0") not in tensors.names}
    if "norm_pre.weight" in tensors.names:  # the embedding then has no bias
        gone |= {"embeds.proj.bias", "patch_embed.proj.bias"} - set(tensors.names)
    return frozenset(name for name in gone if not found["stated"].get(OPTIONAL.get(name)))


def _positions(tensors: Tensors, found: dict, form: Form, patch: int) -> tuple[dict, int]:
    """Fields of the positions, and how many class tokens and registers have a place in the table."""
    names, path, start = tensors.names, tensors.path, form.tokens
    resize = RESIZES.get((found["pos_embed_interp_mode"], bool(found["pos_embed_antialias"])))
    if resize is None:
        raise UserError(f"{path}: pos_embed_interp_mode={found['pos_embed_interp_mode']!r} of timm is not implemented")
    square = dict(posemb_square=bool(found["pos_embed_ar_preserving"]))
    table, factors = names.get(f"{start}pos_embed"), [names.get(f"{start}pos_embed_{axis}") for axis in "yx"]
    if found["rope_type"] not in ("", "none", None):
        if table or any(factors):
            raise UserError(
                f"{path}: learned positions and rope_type={found['rope_type']!r} together are not implemented"
            )
        return _rope(found, path), 0
    if table and form.flexible:
        return dict(posemb="table", posemb_grid=tuple(table[1:3]), posemb_resize=resize, **square), 0
    if table:
        prefix = form.class_token + form.registers
        rows, columns, places = timm_names.table_grid(table[1], prefix, patch, found, tensors.config, path)
        return dict(posemb="table", posemb_grid=(rows, columns), posemb_resize="bicubic_antialias"), places
    if any(factors):
        if factors[0] != factors[1]:
            raise UserError(f"{path}: tables of {factors} positions; only as many rows as columns are implemented")
        return dict(
            posemb="learned", posemb_coords="resized", posemb_resize="linear", posemb_max=factors[0][1], **square
        ), 0
    return dict(posemb="none"), 0


def _rope(found: dict, path: Path) -> dict:
    kind, reference = found["rope_type"], found["rope_ref_feat_shape"]
    fields = dict(posemb="rope", rope_base=float(found["rope_temperature"]))
    if kind == "dinov3":
        return fields | dict(posemb_coords="centred")
    if kind != "axial":
        raise UserError(f"{path}: rope_type={kind!r} of timm is not implemented; 'axial' and 'dinov3' are")
    if not reference:
        return fields
    sides = {reference} if isinstance(reference, int) else set(reference)
    if len(sides) > 1:
        raise UserError(f"{path}: rope_ref_feat_shape={reference} of timm is no square, which is not implemented")
    return fields | dict(posemb_coords="fractional", posemb_max=int(sides.pop()))


def _turn(found: dict, head: int) -> dict:
    """Where the numbers of a head go under rope."""
    if found["rope_type"] in ("", "none", None):
        return {}
    return orders.rope_pairs(head, half=found["rope_rotate_half"], x_first=found["rope_grid_indexing"] == "xy")


def _top(tensors: Tensors, found: dict, form: Form) -> dict:
    """pool, the last norms and the head."""
    names, path = tensors.names, tensors.path
    there = "map" if "attn_pool.latent" in names else ""
    pool = found["global_pool"] or there or ("token" if form.class_token and not form.flexible else "avg")
    if pool not in POOLS or (pool == "map") != bool(there) or (pool == "token" and not form.class_token):
        raise UserError(
            f"{path}: global_pool={pool!r} of timm with these tensors; implemented are avg, token (with cls_token) and "
            'map (with attn_pool): write the right "global_pool" into config.json'
        )
    if pool == "map" and found["swiglu_mlp"] and found["act_layer"] != "gelu_tanh":
        raise UserError(f"{path}: swiglu_mlp with global_pool='map' is implemented for act_layer='gelu_tanh' only")
    norms = dict(norm_tokens="norm.weight" in names, norm_pooled="fc_norm.weight" in names)
    return dict(pool=POOLS[pool], num_classes=names.get("head.weight", (0,))[0], **norms)
