"""SigLIP and SigLIP 2 of Hugging Face's transformers, in and out: both towers, the image tower, an image classifier.

SigLIP 2 NaFlex resizes its table of positions with antialiased bilinear weights and takes patches; SigLIP, and SigLIP 2
of a fixed resolution, have a convolution and a bicubic resize, exact at the size that they were trained at. Their texts
are filled up with a token that is read like any other, and the last position is pooled.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from input_pipeline.errors import UserError
from navit_jax import contrastive, navit
from navit_jax.contrastive import TwoTowersConfig
from navit_jax.weights import Weights, hugging_face, siglip_export, siglip_names
from navit_jax.weights.mapping import load
from navit_jax.weights.reader import Tensors

NAME = "Hugging Face SigLIP or SigLIP 2 (Siglip2Model, Siglip2VisionModel, SiglipModel, SiglipVisionModel)"
TYPES = ("siglip2", "siglip2_vision_model", "siglip", "siglip_vision_model")
GEMMA = 256_000  # tokens of SigLIP 2's tokenizer, whose padding is 0


def recognises(names: Mapping[str, tuple], config: dict) -> bool:
    """Whether these are tensors of SigLIP: by config.json, and where there is none by their names."""
    if "model_type" in config:
        return config["model_type"] in TYPES
    prefix = siglip_names.prefix_of(names)
    return {f"{prefix}embeddings.patch_embedding.bias", f"{prefix}post_layernorm.weight"} <= set(names)


def read(tensors: Tensors) -> Weights:
    """Both towers where the file has both, else the image tower, with a head where there is a classifier.

    Without an attention head (vision_use_head) tokens are pooled by their mean. Raises UserError for an activation that
    is not implemented, and for a folder without config.json: shapes do not tell the number of heads.
    """
    config, where = tensors.config, str(tensors.path)
    if "model_type" not in config:
        raise UserError(
            f"{where} looks like {NAME}, but there is no config.json beside it, and shapes do not tell the number of "
            'heads. Write one: {"model_type": "siglip2_vision_model", "num_attention_heads": 12, ...}'
        )
    cfg = siglip_names.from_theirs(config, tensors.names, where)
    pixels = hugging_face.normalisation(tensors, (0.5,), (0.5,))
    tensors.ignore(r".*\.position_ids")  # 0, 1, 2, ...
    kind = f"{(config.get('architectures') or [config['model_type']])[0]} of {where}"
    rules = siglip_names.rules(cfg, siglip_names.prefix_of(tensors.names))
    if isinstance(cfg, TwoTowersConfig):
        text = replace(cfg.text, pad=_pad(tensors))
        cfg = replace(cfg, image=replace(cfg.image, **pixels), text=text)
        params = load(rules, tensors, contrastive.abstract(cfg)[1])
        return Weights(cfg, params, (), hugging_face.tokenizer(tensors), kind)
    cfg = replace(cfg, **pixels)
    if cfg.num_classes:  # of the mean token: their classifier does not use the attention head that the file has
        tensors.ignore(r"vision_model\.head\..*")
    classes = hugging_face.classes(config) if cfg.num_classes else ()
    return Weights(cfg, load(rules, tensors, navit.abstract(cfg)[1]), classes, "", kind)


def write(weights: Weights, folder: str | Path) -> Path:
    """Write model.safetensors, config.json and what goes with them, as transformers reads it; returns the folder.

    Two towers become a Siglip2Model, one a Siglip2VisionModel, or with classes on mean tokens a
    Siglip2ForImageClassification; with a bicubic table the Siglip of that name. Biases that the model lacks are written
    as zeros. Raises UserError naming the fields that have no counterpart there.
    """
    return siglip_export.write(weights, folder)


def _pad(tensors: Tensors) -> int:
    """What texts are filled with, -1: nothing. The tokenizer knows; SigLIP 2's config has SigLIP's 1, not its own 0."""
    known = hugging_face.pad_id(tensors)
    if known is not None:
        return known
    text = tensors.config.get("text_config") or {}
    found = text.get("pad_token_id", 1)
    if found is None:
        return -1
    gemma = tensors.config["model_type"] == "siglip2" or text.get("vocab_size") == GEMMA
    return 0 if gemma and found == 1 else found
