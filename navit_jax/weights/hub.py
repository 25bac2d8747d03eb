"""Names on the Hugging Face hub: what `org/name` holds, downloaded once and then read from the library's cache.

The small files come first. They say which of the large ones make the model: repositories often hold the same weights
several times, as pickles, for other programs, in one piece and in shards.
"""

import re
from pathlib import Path

from input_pipeline.errors import UserError
from navit_jax.weights.files import KNOWN
from navit_jax.weights.reader import read_json

NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")  # org/name, or org/name@revision
WHOLE = ("model.safetensors", "*.safetensors", "*.npz")  # the first of these that there is


def is_name(name: str) -> bool:
    """Whether this could be a name on the hub."""
    return NAME.fullmatch(name) is not None and not name.startswith(".")


def fetch(name: str) -> Path:
    """The folder with the files of `org/name` or `org/name@revision`, from the cache where there is no network.

    Raises UserError if the library is missing, or the hub says no or cannot be reached and the cache has it not.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"There is no path {name}, and as a name on the Hugging Face hub it needs a library: pip install "
            "huggingface_hub; or give the path of the weights"
        ) from error
    repo, _, revision = name.partition("@")

    def get(*patterns: str) -> Path:
        ignored = ["*/*"]  # folders hold what other programs need
        found = huggingface_hub.snapshot_download(
            repo, revision=revision or None, allow_patterns=list(patterns), ignore_patterns=ignored
        )
        return Path(found)

    try:
        folder = get("*.json", "*.model")  # the latter are tokenizers
        indexes = sorted(folder.glob("*.safetensors.index.json"), key=lambda p: (not p.name.startswith("model."), p))
        if indexes:
            return get(*sorted(set(read_json(indexes[0]).get("weight_map", {}).values())))
        for pattern in WHOLE:
            if any(get(pattern).glob(pattern)):
                return folder
    except UserError:
        raise
    except Exception as error:  # the library, its HTTP client and the disk have each their own
        raise UserError(
            f"There is no path {name}, and from the Hugging Face hub it cannot be had: {_said(error)}. Where there "
            f"is a network, `hf download {name.replace('@', ' --revision ')} --local-dir FOLDER`; then give that folder"
        ) from error
    raise UserError(f"{name} on the Hugging Face hub, or what of it is in the cache {folder}, has no weights; {KNOWN}")


def _said(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}".rstrip(". ")
