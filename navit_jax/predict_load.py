"""From a path or a name to a `Model`: the weights, and how the images of its training were made."""

from pathlib import Path
from typing import Any

from navit_jax import checkpoint, checkpoint_files, weights
from navit_jax.predict import Model


def load(path: str | Path, **options: Any) -> Model:
    """The model in a run's folder, a checkpoint, a file of another library or on the hub, as `weights.read` takes it.

    options: of `Model`, over what the files say. Raises UserError for what cannot be read.
    """
    found = weights.read(path)
    return Model(found.cfg, found.params, found.classes, **{"tokenizer": found.tokenizer, **_of_run(path), **options})


def _of_run(path: str | Path) -> dict[str, Any]:
    """What a run's config says of its images and texts; nothing where this is no run.

    max_tokens: of its largest training images, rather than some number that the model never saw.
    """
    path = checkpoint_files.absolute(path)
    if not path.exists() or not checkpoint.is_run(path):
        return {}
    config = checkpoint_files.read_text(checkpoint.find_checkpoint(path))["meta"]["config"]
    data, patch = config["data"], int(config["model"].get("patch_size") or config["model"]["variant"].split("/")[1])
    max_tokens = max(1, round((config["resolution"]["max_side"] / patch) ** 2))
    found = dict(max_tokens=max_tokens, bits=data["bits"], background=tuple(data["background"]), squash=data["squash"])
    return found | (dict(lower=config["text"]["lower"]) if "text" in config else {})
