"""Weights from elsewhere, and ours for elsewhere; each format is a module here, known by its tensors' names.

A format has NAME, what people call it; recognises(names, config), whether these tensors, name -> shape, and the
config.json beside them are of it; read(tensors), which makes a `Weights` and leaves no tensor unaccounted for; and
write(weights, folder), where there is a way back. An option that it does not implement it refuses by name and value: a
silently different model is the one thing that an import must not give.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

from etils import epath

from input_pipeline.errors import UserError
from navit_jax import checkpoint, checkpoint_files
from navit_jax.contrastive import TwoTowersConfig
from navit_jax.navit import NaViTConfig
from navit_jax.weights import hub, reader


class Weights(NamedTuple):
    """A model with its parameters, in the shape that `navit.merge` takes.

    params: nested dict of numpy float32. classes: their names, () where unknown. tokenizer: what `text.tokenizer` takes
    to make the text tower's ids, "" where there is none or it is unknown. source: a line on where this is from. inputs:
    how images and texts were made in training, as far as known: `predict.Model`'s max_tokens, bits, background, squash
    and lower.
    """

    cfg: NaViTConfig | TwoTowersConfig
    params: dict
    classes: tuple[str, ...] = ()
    tokenizer: str = ""
    source: str = ""
    inputs: Mapping[str, Any] = MappingProxyType({})


def formats() -> tuple[ModuleType, ...]:
    """The modules of the formats, in the order in which they are asked; imported here, because they import this one."""
    from navit_jax.weights import (
        big_vision,
        dinov3,
        monai_navit,
        ours,
        pixtral,
        qwen_vl,
        siglip,
        timm_vit,
        vit_pytorch,
    )

    return (ours, siglip, big_vision, dinov3, pixtral, qwen_vl, timm_vit, vit_pytorch, monai_navit)


def read(path: str | Path) -> Weights:
    """The model of a run's folder, one of its checkpoints, our export, a foreign file or folder, or a hub name.

    Raises UserError for what cannot be read, has a format that is unknown, or options that are not implemented.
    """
    return _read(path, dry=False)


def config_of(path: str | Path) -> NaViTConfig | TwoTowersConfig:
    """The configuration of what `read` takes, without reading the arrays."""
    return _read(path, dry=True).cfg


def _read(name: str | Path, dry: bool) -> Weights:
    path = locate(name)
    if checkpoint.is_run(path):
        from navit_jax.weights import ours  # formats import this module

        return ours.read_run(path, dry)
    if "://" in str(path):
        raise UserError(
            f"{path} is no run of ours, and other weights are read from a local disk: copy it, give its path"
        )
    tensors = reader.open_tensors(Path(path), dry)
    for module in formats():
        if module.recognises(tensors.names, tensors.config):
            weights = module.read(tensors)
            tensors.finish()
            return weights if weights.source else weights._replace(source=f"{module.NAME}, {name}")
    known = ", ".join(module.NAME for module in formats())
    raise UserError(
        f"{name} is of no known format: its {len(tensors.names)} tensors start with "
        f"{', '.join(list(tensors.names)[:5])}; known are {known}"
    )


def locate(name: str | Path) -> epath.Path:
    """Where the weights of a path or hub name are; downloads the latter. Raises UserError if there are none."""
    path = checkpoint_files.absolute(name)
    if path.exists():
        return path
    if isinstance(name, str) and hub.is_name(name):
        return epath.Path(hub.fetch(name))
    raise UserError(f"There is no {path}; expected weights: a path, or a name on the Hugging Face hub such as org/name")
