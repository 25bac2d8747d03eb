"""DINOv3 ViT of Hugging Face's transformers: class token, registers, rotary positions of patch centres, layer scale.

The image's vector is the class token's (their pooler_output), our first register; `tokens` are the patches alone.
"""

from collections.abc import Mapping

import numpy as np

from input_pipeline.errors import UserError
from navit_jax import navit
from navit_jax.navit import NaViTConfig
from navit_jax.weights import Weights, hugging_face
from navit_jax.weights.mapping import Rule, conv_patch, copy, expect, linear, load, norm, zeros
from navit_jax.weights.orders import rope_pairs
from navit_jax.weights.reader import Tensors

NAME = "Hugging Face DINOv3 (DINOv3ViTModel)"
DEFAULTS = dict(  # of their config
    **dict(patch_size=16, num_channels=3, hidden_size=384, intermediate_size=1536, num_hidden_layers=12),
    **dict(num_attention_heads=6, hidden_act="gelu", layer_norm_eps=1e-5, rope_theta=100.0, layerscale_value=1.0),
    **dict(use_gated_mlp=False, num_register_tokens=0),
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's; models of satellite images have a file of theirs


def recognises(names: Mapping[str, tuple], config: dict) -> bool:
    """Whether these are tensors of DINOv3: by config.json, and where there is none by their names."""
    if "model_type" in config:
        return config["model_type"] == "dinov3_vit"
    return {"embeddings.cls_token", "embeddings.register_tokens", "norm.weight"} <= set(names)


def read(tensors: Tensors) -> Weights:
    """The tower without a head. Raises UserError for an activation that is not implemented, and without config.json."""
    config, where = tensors.config, str(tensors.path)
    if "model_type" not in config:
        raise UserError(
            f"{where} looks like {NAME}, but there is no config.json beside it, and shapes do not tell the number of "
            'heads. Write one: {"model_type": "dinov3_vit", "num_attention_heads": 6, ...}'
        )
    cfg = _config(DEFAULTS | config, hugging_face.normalisation(tensors, MEAN, STD), where)
    tensors.ignore(r"embeddings\.mask_token")  # stands for patches that pretraining hides: no image has such
    tensors.ignore(r"rope_embeddings\.inv_freq")  # by rope_theta
    params = load(_rules(cfg, tensors.names), tensors, navit.abstract(cfg)[1])
    return Weights(cfg, params, source=f"{(config.get('architectures') or [NAME])[0]} of {where}")


def _config(theirs: dict, pixels: dict, where: str) -> NaViTConfig:
    gated = theirs["use_gated_mlp"]
    if gated and theirs["hidden_act"] != "silu":
        raise UserError(f"{where}: hidden_act is {theirs['hidden_act']!r} with use_gated_mlp; implemented is 'silu'")
    return NaViTConfig(
        width=theirs["hidden_size"],
        depth=theirs["num_hidden_layers"],
        heads=theirs["num_attention_heads"],
        mlp_dim=theirs["intermediate_size"],
        mlp="swiglu" if gated else hugging_face.activation(theirs, where),
        norm_eps=theirs["layer_norm_eps"],
        layer_scale=theirs["layerscale_value"] or 1.0,  # initial: 0 would be a model without
        patch_size=hugging_face.patch_size(theirs, where),
        channels=theirs["num_channels"],
        registers=1 + theirs["num_register_tokens"],
        pool="first",
        posemb="rope",
        posemb_coords="centred",
        rope_base=theirs["rope_theta"],
        qk_norm=False,
        bias=True,
        **pixels,
    )


def _rules(cfg: NaViTConfig, names: Mapping[str, tuple]) -> list[Rule]:
    layer = "model.layer.{i}" if "model.layer.0.norm1.weight" in names else "layer.{i}"
    attention, turned = f"{layer}.attention", rope_pairs(cfg.head_dim, half=True)

    def dense(ours: str, theirs: str, **options) -> list[Rule]:
        """With the bias that theirs may lack, by its config."""
        found = theirs.replace("{i}", "0") + ".bias" in names
        return linear(ours, theirs, bias=found, **options) + ([] if found else zeros(f"{ours}/bias"))

    def first_tokens(token: np.ndarray, registers: np.ndarray, shape: tuple) -> np.ndarray:
        return np.concatenate([expect(token, 1, 1, shape[1]), expect(registers, 1, shape[0] - 1, shape[1])], axis=1)[0]

    tokens = ("embeddings.cls_token", "embeddings.register_tokens")
    return [
        *conv_patch("embed", "embeddings.patch_embeddings", patch=cfg.patch_size, channels=cfg.channels),
        Rule("registers", tokens, first_tokens),
        *norm("blocks/attn_norm", f"{layer}.norm1"),
        *norm("blocks/mlp_norm", f"{layer}.norm2"),
        *dense("blocks/attn/q", f"{attention}.q_proj", **turned),
        *dense("blocks/attn/k", f"{attention}.k_proj", **turned),
        *dense("blocks/attn/v", f"{attention}.v_proj"),
        *dense("blocks/attn/out", f"{attention}.o_proj", ins=2),
        *copy("blocks/attn_scale", f"{layer}.layer_scale1.lambda1"),
        *copy("blocks/mlp_scale", f"{layer}.layer_scale2.lambda1"),
        *(dense("blocks/mlp/gate", f"{layer}.mlp.gate_proj") if cfg.mlp == "swiglu" else []),
        *dense("blocks/mlp/up", f"{layer}.mlp.up_proj"),
        *dense("blocks/mlp/down", f"{layer}.mlp.down_proj"),
        *norm("norm", "norm"),
    ]
