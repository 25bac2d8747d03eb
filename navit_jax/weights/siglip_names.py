"""What Hugging Face's SigLIP and SigLIP 2 call things: the fields of their configs and their tensors, name by name."""

from collections.abc import Mapping

import numpy as np

from navit_jax.contrastive import TwoTowersConfig
from navit_jax.navit import NaViTConfig
from navit_jax.text_tower import TextConfig
from navit_jax.weights import hugging_face
from navit_jax.weights.mapping import Rule, conv_patch, expect, linear, norm

DEFAULTS = dict(  # of their configs
    **dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
    **dict(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6),
)
VISION = DEFAULTS | dict(num_channels=3, patch_size=16, vision_use_head=True, num_patches=256, image_size=224)
TEXT = DEFAULTS | dict(vocab_size=32_000, max_position_embeddings=64, projection_size=None)
SCALES = dict(init_scale=10.0, max_scale=1000.0, init_bias=-10.0)  # theirs has no maximum; it learns about 110


def from_theirs(config: dict, names: Mapping[str, tuple], where: str) -> NaViTConfig | TwoTowersConfig:
    """Our configuration of their config.json; names: of the tensors, which tell two towers, and a classifier."""
    vision = VISION | (config.get("vision_config") or (config if "vision" in config["model_type"] else {}))
    classes = names["classifier.weight"][0] if "classifier.weight" in names else 0
    image = _image(vision, config["model_type"].startswith("siglip2"), classes, where)
    if "logit_scale" not in names:
        return image
    text = TEXT | (config.get("text_config") or {})
    tower = TextConfig(
        **_encoder(text, where), vocab_size=text["vocab_size"], max_tokens=text["max_position_embeddings"], pool="last"
    )
    embed_dim = text["projection_size"] or tower.width
    return TwoTowersConfig(
        image=image, text=tower, embed_dim=embed_dim, project_image=False, project_bias=True, **SCALES
    )


def _image(vision: dict, naflex: bool, classes: int, where: str) -> NaViTConfig:
    patch = hugging_face.patch_size(vision, where)
    side = round(vision["num_patches"] ** 0.5) if naflex else vision["image_size"] // patch
    return NaViTConfig(
        **_encoder(vision, where),
        patch_size=patch,
        channels=vision["num_channels"],
        num_classes=classes,
        posemb="table",
        posemb_grid=(side, side),
        posemb_resize="bilinear" if naflex else "bicubic",
        pool="map" if vision["vision_use_head"] and not classes else "mean",
    )


def _encoder(config: dict, where: str) -> dict:
    return dict(
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        mlp=hugging_face.activation(config, where),
        norm_eps=config["layer_norm_eps"],
        qk_norm=False,
        bias=True,
    )


def prefix_of(names: Mapping[str, tuple]) -> str:
    """An image tower alone is saved with or without this, by the version of transformers."""
    return "vision_model." if any(name.startswith("vision_model.") for name in names) else ""


def rules(cfg: NaViTConfig | TwoTowersConfig, prefix: str = "vision_model.") -> list[Rule]:
    """Ours and theirs, of a model with biases; prefix: of the names of an image tower alone."""
    if isinstance(cfg, NaViTConfig):
        return _vision(cfg, "", prefix) + (linear("head", "classifier") if cfg.num_classes else [])
    theirs = "text_model."
    return [
        *_vision(cfg.image, "image/", "vision_model."),
        _table("text/table", f"{theirs}embeddings.token_embedding.weight"),
        _table("text/positions", f"{theirs}embeddings.position_embedding.weight"),
        *_blocks("text/", theirs),
        *norm("text/norm", f"{theirs}final_layer_norm"),
        *linear("text_projection", f"{theirs}head"),
        *(Rule(n, n, lambda x, shape: expect(x, 1)[0], lambda y: y.reshape(1)) for n in ("logit_scale", "logit_bias")),
    ]


def _vision(cfg: NaViTConfig, ours: str, theirs: str) -> list[Rule]:
    embed = f"{ours}embed", f"{theirs}embeddings.patch_embedding"
    patches = conv_patch(*embed, patch=cfg.patch_size, channels=cfg.channels)
    return [
        *(linear(*embed) if cfg.posemb_resize == "bilinear" else patches),
        _table(f"{ours}posemb/table", f"{theirs}embeddings.position_embedding.weight"),
        *_blocks(ours, theirs),
        *norm(f"{ours}norm", f"{theirs}post_layernorm"),
        *(_pool(f"{ours}pool", f"{theirs}head") if cfg.pool == "map" else []),
    ]


def _table(ours: str, theirs: str) -> Rule:
    """Rows [n, D] of any grid [..., D]."""
    return Rule(
        ours,
        theirs,
        lambda x, shape: expect(x, int(np.prod(shape[:-1])), shape[-1]).reshape(shape),
        lambda y: y.reshape(-1, y.shape[-1]),
    )


def _blocks(ours: str, theirs: str) -> list[Rule]:
    block, layer = f"{ours}blocks", f"{theirs}encoder.layers.{{i}}"
    return [
        *norm(f"{block}/attn_norm", f"{layer}.layer_norm1"),
        *norm(f"{block}/mlp_norm", f"{layer}.layer_norm2"),
        *(rule for n in "qkv" for rule in linear(f"{block}/attn/{n}", f"{layer}.self_attn.{n}_proj")),
        *linear(f"{block}/attn/out", f"{layer}.self_attn.out_proj", ins=2),
        *linear(f"{block}/mlp/up", f"{layer}.mlp.fc1"),
        *linear(f"{block}/mlp/down", f"{layer}.mlp.fc2"),
    ]


def _pool(ours: str, theirs: str) -> list[Rule]:
    """torch's MultiheadAttention with one query; the bias of the keys, which the softmax cancels, is left out."""
    ins = []
    for number, name in enumerate("qkv"):
        kernel = linear(f"{ours}/{name}", "", bias=False, part=(number, 3))[0]
        ins.append(Rule(kernel.ours, f"{theirs}.attention.in_proj_weight", kernel.load, kernel.save, kernel.part))
    bias, load_bias = f"{theirs}.attention.in_proj_bias", lambda x, shape: x.reshape(shape)
    with_keys = lambda y: np.concatenate([y.ravel(), np.zeros(y.size, y.dtype)])  # noqa: E731
    return [
        Rule(f"{ours}/probe", f"{theirs}.probe", lambda x, shape: expect(x, 1, *shape)[0], lambda y: y[None]),
        *ins,
        Rule(f"{ours}/q/bias", bias, load_bias, with_keys, (0, 3)),
        Rule(f"{ours}/v/bias", bias, load_bias, lambda y: y.ravel(), (2, 3)),
        *linear(f"{ours}/out", f"{theirs}.attention.out_proj", ins=2),
        *norm(f"{ours}/norm", f"{theirs}.layernorm"),
        *linear(f"{ours}/mlp/up", f"{theirs}.mlp.fc1"),
        *linear(f"{ours}/mlp/down", f"{theirs}.mlp.fc2"),
    ]
