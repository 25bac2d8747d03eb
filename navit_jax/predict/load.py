"""From a path or a name to a `Model`: the weights, and how the images of its training were made."""

from pathlib import Path
from typing import Any

from navit_jax import weights
from navit_jax.predict.model import Model


def load(path: str | Path, **options: Any) -> Model:
    """The model in a run's folder, a checkpoint, a file of another library or on the hub, as `weights.read` takes it.

    options: of `Model`, over what the files say. Raises UserError for what cannot be read.
    """
    found = weights.read(path)
    return Model(found.cfg, found.params, found.classes, **{"tokenizer": found.tokenizer, **found.inputs, **options})
