"""Weights from elsewhere, and ours for elsewhere: a file a format, recognised by the names of its tensors."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from input_pipeline.errors import UserError
from navit_jax.contrastive import TwoTowersConfig
from navit_jax.navit import NaViTConfig
from navit_jax.weights import reader

FORMATS = ("ours", "siglip", "big_vision", "dinov3", "timm_vit", "vit_pytorch", "monai_navit", "pixtral", "qwen_vl")


class Weights(NamedTuple):
    """A model with its parameters, in the shape that `navit.merge` takes.

    params: nested dict of numpy float32. classes: their names, () where unknown. tokenizer: what `text.tokenizer` takes
    to make the text tower's ids, "" where there is none or it is unknown. source: a line on where this is from.
    """

    cfg: NaViTConfig | TwoTowersConfig
    params: dict
    classes: tuple[str, ...] = ()
    tokenizer: str = ""
    source: str = ""


def formats() -> list[ModuleType]:
    """The modules of FORMATS; imported when they are asked for."""
    names = [f"{__name__}.{name}" for name in FORMATS]
    return [importlib.import_module(name) for name in names if importlib.util.find_spec(name)]


def read(path: str | Path) -> Weights:
    """The model of a run's folder, one of its checkpoints, our export, a foreign file or folder, or a hub name.

    Raises UserError for what cannot be read, has a format that is unknown, or options that are not implemented.
    """
    return _read(path, dry=False)


def config_of(path: str | Path) -> NaViTConfig | TwoTowersConfig:
    """The configuration of what `read` takes, without reading the arrays."""
    return _read(path, dry=True).cfg


def _read(path: str | Path, dry: bool) -> Weights:
    tensors = reader.open_tensors(Path(path), dry)
    for module in formats():
        if module.recognises(tensors.names, tensors.config):
            weights = module.read(tensors)
            tensors.finish()
            return weights
    known = ", ".join(module.NAME for module in formats())
    raise UserError(
        f"{path} is of no known format: its {len(tensors.names)} tensors start with "
        f"{', '.join(list(tensors.names)[:5])}; known are {known}"
    )
