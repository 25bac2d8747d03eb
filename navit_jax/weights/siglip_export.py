"""Ours as Hugging Face's SigLIP 2 or SigLIP: what their config can say of a model, and a refusal of what it cannot.

Whether a model is one of theirs is asked in one way only: its config is written, read again as `siglip.read` does, and
compared field by field. So an option that is added to ours later is refused here until it has a counterpart.
"""

import json
import logging
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline.errors import UserError
from navit_jax import contrastive, navit
from navit_jax.compatibility import named_leaves, nested
from navit_jax.contrastive import TwoTowersConfig
from navit_jax.navit import NaViTConfig
from navit_jax.text_tower import TextConfig
from navit_jax.weights import Weights, hugging_face, siglip_names
from navit_jax.weights.files import write_safetensors
from navit_jax.weights.mapping import save

log = logging.getLogger(__name__)
ANY = {  # fields that may be anything: of training, of other kinds of positions, or written elsewhere
    *("dropout", "stochastic_depth", "remat", "dtype", "attention", "head_bias", "bias", "mean", "std", "pad"),
    *("posemb_coords", "posemb_combine", "posemb_max", "posemb_beyond", "rope_base", "rope_axes", "qk_rms"),
}


def write(weights: Weights, folder: str | Path) -> Path:
    """See `siglip.write`."""
    cfg, folder = weights.cfg, Path(folder)
    two = isinstance(cfg, TwoTowersConfig)
    image = cfg.image if two else cfg
    config, names = _config(cfg), {"logit_scale": ()} if two else {}
    if not two and cfg.num_classes and cfg.pool == "mean":
        names["classifier.weight"] = (cfg.num_classes, cfg.width)
        config |= _labels(weights.classes, cfg.num_classes)
    theirs = siglip_names.from_theirs(config, names, str(folder))
    _check(cfg, theirs, config["architectures"][0])
    shapes = named_leaves((contrastive if two else navit).abstract(theirs)[1])
    ours = named_leaves(weights.params)
    params = nested({name: ours.get(name, np.zeros(x.shape, np.float32)) for name, x in shapes.items()})
    if left := sorted(set(ours) - set(shapes)):
        log.warning("left out, as %s has no place for it: %s", config["architectures"][0], ", ".join(left))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / "model.safetensors", save(siglip_names.rules(theirs), params))
        for name, content in (("config", config), ("preprocessor_config", _pixels(image, naflex=_naflex(image)))):
            (folder / f"{name}.json").write_text(json.dumps(content, indent=1))
        _copy_tokenizer(Path(weights.tokenizer).expanduser(), folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}. Name another place.") from error
    return folder


def _config(cfg: NaViTConfig | TwoTowersConfig) -> dict:
    """Their config.json of the model that comes nearest."""
    two = isinstance(cfg, TwoTowersConfig)
    image = cfg.image if two else cfg
    family, name = ("siglip2", "Siglip2") if _naflex(image) else ("siglip", "Siglip")
    vision = _encoder(image) | dict(num_channels=image.channels, patch_size=image.patch_size)
    rows, columns = image.posemb_grid
    size = dict(num_patches=rows * columns) if _naflex(image) else dict(image_size=rows * image.patch_size)
    vision |= size | dict(vision_use_head=image.pool == "map", model_type=f"{family}_vision_model")
    if two:
        text = _encoder(cfg.text) | dict(vocab_size=cfg.text.vocab_size, max_position_embeddings=cfg.text.max_tokens)
        text |= dict(projection_size=cfg.embed_dim, model_type=f"{family}_text_model")
        text |= dict(pad_token_id=cfg.text.pad if cfg.text.pad >= 0 else None, bos_token_id=None, eos_token_id=None)
        return dict(architectures=[f"{name}Model"], model_type=family, text_config=text, vision_config=vision)
    if image.num_classes and image.pool == "mean":
        return dict(architectures=[f"{name}ForImageClassification"], model_type=family, vision_config=vision)
    return dict(architectures=[f"{name}VisionModel"]) | vision


def _naflex(image: NaViTConfig) -> bool:
    return image.posemb_resize != "bicubic"


def _encoder(cfg: NaViTConfig | TextConfig) -> dict:
    return dict(
        hidden_size=cfg.width,
        num_hidden_layers=cfg.depth,
        num_attention_heads=cfg.heads,
        intermediate_size=cfg.mlp_dim,
        hidden_act={ours: name for name, ours in hugging_face.ACTIVATIONS.items()}.get(cfg.mlp, "gelu_pytorch_tanh"),
        layer_norm_eps=cfg.norm_eps,
    )


def _labels(classes: tuple[str, ...], count: int) -> dict:
    names = classes or tuple(f"LABEL_{i}" for i in range(count))
    return dict(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})


def _check(cfg: NaViTConfig | TwoTowersConfig, theirs: NaViTConfig | TwoTowersConfig, what: str) -> None:
    """Raises UserError that lists every field by which the model is not the one that would be read again."""
    if isinstance(cfg, TwoTowersConfig):
        wrong = _differences("model", cfg.image, theirs.image) + _differences("text", cfg.text, theirs.text)
        if cfg.project_image:
            wrong.append("contrastive.project_image is True, there it is False")
    else:
        wrong = _differences("model", cfg, theirs)
    if wrong:
        raise UserError(f"this model cannot be written as {what}, which has no counterpart: {'; '.join(wrong)}")


def _differences(part: str, ours: Any, theirs: Any) -> list[str]:
    def value(cfg: Any, name: str) -> Any:
        if name == "head_size":
            return cfg.head_dim
        if name == "stored_patch_size":
            return cfg.stored_patch_size or cfg.patch_size
        if name == "num_classes" and cfg.pool == "map":
            return 0  # a Siglip2VisionModel is a tower without its head
        return getattr(cfg, name)

    named = [(field.name, *(value(cfg, field.name) for cfg in (ours, theirs))) for field in fields(ours)]
    return [f"{part}.{name} is {a!r}, there it is {b!r}" for name, a, b in named if name not in ANY and a != b]


def _pixels(image: NaViTConfig, naflex: bool) -> dict:
    """Their preprocessor_config.json."""
    mean, std = (list(x) * (image.channels if len(x) == 1 else 1) for x in (image.mean, image.std))
    config = dict(do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=mean, image_std=std)
    rows, columns = image.posemb_grid
    if naflex:
        size = dict(patch_size=image.patch_size, max_num_patches=rows * columns)
        return dict(image_processor_type="Siglip2ImageProcessor", do_resize=True) | size | config
    size = dict(height=rows * image.patch_size, width=columns * image.patch_size)
    return dict(image_processor_type="SiglipImageProcessor", do_resize=True, size=size) | config


def _copy_tokenizer(path: Path, folder: Path) -> None:
    """The tokenizer's file and, where it is there, what says how it pads; nothing for one without a file."""
    if not path.is_file():
        return
    name = path.name if path.name in hugging_face.TOKENIZERS else f"tokenizer{path.suffix}"
    for source, target in ((path, name), (path.parent / "tokenizer_config.json", "tokenizer_config.json")):
        target = folder / target
        if source.exists() and source.resolve() != target.resolve():
            shutil.copyfile(source, target)
