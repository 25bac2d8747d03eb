"""`model.like`: the architecture of given weights, written out field by field into the config.

So a run's config, its checkpoints and what is planned for it say all by themselves, and need no file that may be gone.
"""

import json
from dataclasses import fields, replace
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from input_pipeline.errors import UserError
from navit_jax import contrastive, navit

# What concerns training, or grids beyond what was learned: any of it suits the weights, so it stays the config's.
FREE = ("dropout", "stochastic_depth", "remat", "dtype", "attention", "posemb_beyond")


def resolve(config: ConfigDict, saved: Path | None = None) -> None:
    """Gives the config the architecture of `model.like`, and empties that field; without it does nothing.

    Two towers: the image tower's, in a contrastive run both. A `stored_patch_size` of the config means another patch
    size than the weights were stored with; theirs otherwise. saved: config.json of the run that goes on, which has
    resolved the same: so it goes on without the weights. Raises UserError for weights that cannot be read, and for a
    field on the command line that says otherwise.
    """
    source = config.model.like
    if not source:
        return
    from navit_jax import weights

    try:
        found = weights.config_of(source)
    except UserError as error:
        if saved is None or not saved.is_file():
            raise
        print(f"{error}\nThe architecture is taken from {saved}.", flush=True)
        return _as_before(config, json.loads(saved.read_text()))
    two = isinstance(found, contrastive.TwoTowersConfig)
    image = found.image if two else found
    decided = {f"model.{name}": value for name, value in _image(config, source, image).items()}
    decided["data.channels"] = image.channels
    if config.objective == "contrastive" and two:
        decided |= _texts(config, found)
    _refuse_others(decided, source)
    config.update_from_flattened_dict(decided)
    config.model.like = ""
    if two and config.objective == "contrastive":
        _check_texts(config, found, source)
    print(
        f"like {source}: width {image.width}, {image.depth} layers, {image.heads} heads, patches of "
        f"{config.model.patch_size} pixels, {image.posemb} positions",
        flush=True,
    )


def _as_before(config: ConfigDict, saved: dict) -> None:
    for group, names in dict(model=config.model, text=config.text, contrastive=config.contrastive).items():
        values = {k: saved[group][k] for k in names if k in saved.get(group, {}) and k not in FREE}
        config[group].update({k: tuple(x) if isinstance(x, list) else x for k, x in values.items()})
    config.data.channels = saved["data"]["channels"]


def differences(here: navit.NaViTConfig, there: navit.NaViTConfig) -> list[str]:
    """The fields by which the same parameters would mean another model, as "model.mlp: gelu there, gelu_tanh here"."""
    free = (*FREE, "num_classes", "head_bias", "patch_size", "stored_patch_size")
    pairs = {f.name: (getattr(there, f.name), getattr(here, f.name)) for f in fields(here) if f.name not in free}
    return [f"model.{name}: {old} there, {new} here" for name, (old, new) in pairs.items() if old != new]


def _image(config: ConfigDict, source: str, image: navit.NaViTConfig) -> dict:
    names = [name for name in (*navit.OVERRIDES, *navit.CONFIG_FIELDS) if name not in FREE]
    found = {name: getattr(image, name) for name in names}
    asked, stored = config.model.stored_patch_size, image.stored_patch_size or image.patch_size
    if not asked:
        return found
    if asked != stored:
        raise UserError(f"model.stored_patch_size is {asked}, but the patches of {source} are stored at {stored}")
    patch = config.model.patch_size or navit.variant(config.model.variant)["patch_size"]
    return found | dict(patch_size=patch, stored_patch_size=stored)


def _texts(config: ConfigDict, found: contrastive.TwoTowersConfig) -> dict:
    text = {name: getattr(found.text, name) for name in config.text if hasattr(found.text, name)}
    towers = {name: getattr(found, name) for name in config.contrastive if hasattr(found, name)}
    towers = {name: value for name, value in towers.items() if not name.startswith("init_")}
    if "contrastive.max_scale" in _given():  # else theirs: the first update would cut a larger learned scale
        del towers["max_scale"]
    return {f"text.{k}": v for k, v in text.items()} | {f"contrastive.{k}": v for k, v in towers.items()}


def _check_texts(config: ConfigDict, found: contrastive.TwoTowersConfig, source: str) -> None:
    """Both towers take their switches from `config.model`, so not every text tower can be said."""
    here = contrastive.from_config(config, vocab_size=found.text.vocab_size).text
    there = replace(found.text, **{name: getattr(here, name) for name in FREE if hasattr(here, name)})
    wrong = [
        f"{f.name}: {getattr(there, f.name)}" for f in fields(here) if getattr(here, f.name) != getattr(there, f.name)
    ]
    if wrong:
        raise UserError(
            f"the text tower of {source} has {', '.join(wrong)}, which a config cannot say beside this image tower. "
            "Train without it: --config.objective=supervised takes the image tower alone."
        )


def _refuse_others(decided: dict, source: str) -> None:
    """Raises UserError for fields that the command line sets to something else than the weights have."""
    given = _given()
    wrong = [f"{k}={given[k]} ({v} there)" for k, v in decided.items() if k in given and given[k] not in (v, 0)]
    if wrong:
        raise UserError(
            f"--config.{', --config.'.join(wrong)}: --config.model.like={source} takes these from its weights. Leave "
            "them out, or give all fields without model.like."
        )


def _given() -> dict:
    """What the command line sets, by field."""
    parsed = "config" in flags.FLAGS and flags.FLAGS["config"].present  # flags may be parsed without, by the loader
    return flags.FLAGS["config"].override_values if parsed else {}
