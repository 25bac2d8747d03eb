"""Our own models: a run's folder or checkpoint, and the export of one as safetensors with a config.json.

The export is the plain form for handing a model around: parameters under their own paths (blocks/attn/q/kernel), and
beside them everything that `navit.NaViTConfig` or `contrastive.TwoTowersConfig` says, the classes and the tokenizer.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

import configs.base
from input_pipeline.errors import UserError
from navit_jax import checkpoint, contrastive, navit, text_tower
from navit_jax import checkpoint_files as stored
from navit_jax.compatibility import differences, named_leaves, nested
from navit_jax.weights import Weights
from navit_jax.weights.files import write_safetensors
from navit_jax.weights.reader import Tensors, folder_of

NAME = "navit_jax"
KINDS = {"NaViT": navit.NaViTConfig, "TwoTowers": contrastive.TwoTowersConfig}
INPUTS = {"max_tokens", "bits", "background", "squash", "lower"}  # of predict.Model
INNER = {"image": navit.NaViTConfig, "text": text_tower.TextConfig}  # of two towers


def recognises(names: Mapping[str, tuple], config: dict) -> bool:
    """Whether this is an export of ours."""
    return config.get("format") == NAME


def read(tensors: Tensors) -> Weights:
    """An export. Raises UserError for a configuration unknown to this version, and for tensors that do not fit."""
    config, where = tensors.config, f"{folder_of(tensors.path)}/config.json"
    cfg = from_json(config, where)
    leaves = named_leaves(shapes_of(cfg))
    take = (lambda name, shape: np.broadcast_to(np.float32(0), shape)) if tensors.dry else tensors.take
    for name, leaf in leaves.items():
        tensors.check(name, leaf.shape)
    params = nested({name: take(name, leaf.shape) for name, leaf in leaves.items()})
    tokenizer = config.get("tokenizer", "")
    beside = folder_of(tensors.path) / tokenizer
    tokenizer, inputs = str(beside) if beside.is_file() else tokenizer, config.get("inputs", {})
    unknown = set(inputs) - INPUTS
    if unknown:
        raise UserError(f"{where} has unknown inputs, {', '.join(sorted(unknown))}: update navit_jax, or correct them")
    return Weights(cfg, params, tuple(config.get("classes", ())), tokenizer, inputs=inputs)


def write(weights: Weights, folder: str | Path) -> Path:
    """Write model.safetensors, config.json and the tokenizer's file where there is one; returns the folder.

    Raises UserError where it cannot be written to.
    """
    folder = Path(folder).expanduser()
    about = {"format": NAME, **to_json(weights.cfg), "classes": list(weights.classes), "source": weights.source}
    about["inputs"] = dict(weights.inputs)
    tokenizer = Path(weights.tokenizer).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in (tokenizer, tokenizer.parent / "tokenizer_config.json") if tokenizer.is_file() else ():
            if file.exists() and file.resolve() != (folder / file.name).resolve():
                shutil.copyfile(file, folder / file.name)
        about["tokenizer"] = tokenizer.name if tokenizer.is_file() else weights.tokenizer
        write_safetensors(folder / "model.safetensors", named_leaves(weights.params))
        (folder / "config.json").write_text(json.dumps(about, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"The model could not be written to {folder}: {error}. Name a folder with room.") from error
    return folder


def to_json(cfg: navit.NaViTConfig | contrastive.TwoTowersConfig) -> dict:
    """{"kind", "config"} of a model, as an export's config.json has it."""
    kind = next(kind for kind, made in KINDS.items() if type(cfg) is made)
    return {"kind": kind, "config": dataclasses.asdict(cfg)}


def from_json(about: dict, where: str) -> navit.NaViTConfig | contrastive.TwoTowersConfig:
    """The inverse of `to_json`; fields that are not there have their defaults. Raises UserError."""
    if about.get("kind") not in KINDS:
        raise UserError(f"{where}: kind is {about.get('kind')!r}; expected one of {', '.join(KINDS)}")
    return _build(KINDS[about["kind"]], about.get("config", {}), where)


def _build(made: type, values: dict, where: str) -> Any:
    known = {field.name: field for field in dataclasses.fields(made)}
    unknown = [f"{name}={value!r}" for name, value in values.items() if name not in known]
    if unknown:
        raise UserError(f"{where} has the unknown fields {', '.join(unknown)}: update navit_jax, or correct them")
    required = {name for name, field in known.items() if field.default is dataclasses.MISSING}
    if required - set(values):
        raise UserError(f"{where} lacks the fields {', '.join(sorted(required - set(values)))}")

    def value(name: str, x: Any) -> Any:
        inner = INNER.get(name) if made is contrastive.TwoTowersConfig else None
        return _build(inner, x, f"{where}: {name}") if inner else tuple(x) if isinstance(x, list) else x

    return made(**{name: value(name, x) for name, x in values.items()})


def shapes_of(cfg: navit.NaViTConfig | contrastive.TwoTowersConfig) -> dict:
    """Shapes of the parameters, of one tower or of two."""
    return (navit if isinstance(cfg, navit.NaViTConfig) else contrastive).abstract(cfg)[1]


def read_run(path: epath.Path, dry: bool = False) -> Weights:
    """The best checkpoint of a run, or the one that this path is (`checkpoint.find_checkpoint`); averaged parameters
    where the run kept them. dry: without reading arrays. Raises UserError."""
    if dry:
        found = checkpoint.find_checkpoint(path)
        meta, leaves = stored.read_text(found)["meta"], stored.saved_arrays(found)
        params = {n.removeprefix("params/"): x for n, x in leaves.items() if n.startswith("params/")}
        params = nested({name: np.broadcast_to(np.float32(0), x.shape) for name, x in params.items()})
    else:
        params, meta = checkpoint.restore_params(path)
    cfg = cfg_of_run(meta, named_leaves(params))
    wrong = differences(named_leaves(params), named_leaves(shapes_of(cfg)), dtypes=False)
    if wrong:
        raise UserError(f"The checkpoint in {path} does not fit the model that its config describes:\n{wrong}")
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    text = meta["config"].get("text", {}) if isinstance(cfg, contrastive.TwoTowersConfig) else {}
    classes, inputs = tuple(meta.get("classes", ())), _inputs(meta["config"], getattr(cfg, "image", cfg).patch_size)
    return Weights(cfg, params, classes, text.get("tokenizer", ""), f"a run, {path}", inputs)


def _inputs(config: dict, patch: int) -> dict[str, Any]:
    """How a run made its images and texts; max_tokens: of its largest images, not a number that it never saw."""
    data = config["data"]
    found = {name: data[name] for name in ("bits", "background", "squash") if name in data}
    found["max_tokens"] = max(1, round((config["resolution"]["max_side"] / patch) ** 2))
    return found | (dict(lower=config["text"]["lower"]) if "text" in config else {})


def cfg_of_run(meta: dict, leaves: Mapping[str, np.ndarray]) -> Any:
    """The model that a run's config makes of its data.

    leaves: parameters by name; how many classes and tokens the data had is seen from their shapes.
    """
    config = configs.base.get_config().unlock()
    _update(config, meta["config"])
    if config.objective == "contrastive":
        return contrastive.from_config(config, vocab_size=leaves["text/table"].shape[0])
    return navit.for_classes(config, leaves["head/kernel"].shape[-1] if "head/kernel" in leaves else 0)[0]


def _update(config: ConfigDict, saved: dict) -> None:
    """Saved values over the defaults: a field that an earlier run had not yet gets the value that means the same."""
    for name, value in saved.items():
        if isinstance(value, dict) and isinstance(config.get(name), ConfigDict):
            _update(config[name], value)
        else:
            with config.ignore_type():
                config[name] = value
