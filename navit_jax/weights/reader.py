"""A file or folder of weights as named arrays, and the account of which of them were used.

Nothing is read until it is asked for: of a vision-language model's shards, only the vision tower's tensors are.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from input_pipeline.errors import UserError
from navit_jax.weights.files import KNOWN, PICKLES, Entry, entries_of, refusal


class Tensors:
    """The named arrays of a file or folder, and the account of which were used.

    names: name -> shape, nothing read yet. config: config.json beside the file, {} where there is none. path: what was
    opened. dry: values do not matter to whoever opened this: `mapping.load` then checks all but reads nothing.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry], config: dict, dry: bool = False):
        self.path, self.config, self.dry = path, config, dry
        self._entries, self._open = dict(entries), set(entries)
        self.names: Mapping[str, tuple[int, ...]] = {name: entry.shape for name, entry in self._entries.items()}

    def take(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """A tensor as float32. Raises UserError by name if it is missing or not of this shape; None: any shape."""
        self.check(name, shape)
        return np.asarray(self._entries[name].fetch()).astype(np.float32)

    def check(self, name: str, shape: tuple[int, ...] | None = None) -> None:
        """What `take` does, without reading: the tensor counts as used."""
        if name not in self._entries:
            raise UserError(
                f"{self.path} lacks the tensor {name}; expected it{'' if shape is None else f' {[*shape]}'}"
                f" beside {', '.join(list(self.names)[:4])} ..."
            )
        if shape is not None and self.names[name] != tuple(shape):
            raise UserError(f"{self.path}: {name} is {[*self.names[name]]}, expected {[*shape]}")
        self._open.discard(name)

    def ignore(self, pattern: str) -> None:
        """Tensors whose whole name matches this regex need not be used: buffers, what this model has no part for."""
        self._open -= {name for name in self._open if re.fullmatch(pattern, name)}

    def finish(self) -> None:
        """Raises UserError that names the tensors neither taken nor ignored, 20 of them at most."""
        if self._open:
            left = [f"  {name} {[*self.names[name]]}" for name in self._entries if name in self._open]
            raise UserError(
                f"{self.path} holds {len(left)} tensors that this format has no place for, so the model would not be "
                "the one that was saved:\n" + "\n".join(left[:20] + [f"  and {len(left) - 20} more"] * (len(left) > 20))
            )

    def beside(self, name: str) -> dict:
        """Another JSON file of the same folder, such as preprocessor_config.json; {} where there is none."""
        return read_json(folder_of(self.path) / name)


def open_tensors(path: Path, dry: bool = False) -> Tensors:
    """The tensors of a file or of a folder, without reading them.

    Raises UserError for a file that is missing, of another format, a pickle or broken, and for a folder without weights
    or with several files of them and no index.
    """
    path = Path(path).expanduser()
    entries = (
        _folder(path) if path.is_dir() else _index(path) if path.name.endswith(".index.json") else entries_of(path)
    )
    if not entries:
        raise UserError(f"{path} holds no tensors; {KNOWN}")
    return Tensors(path, entries, read_json(folder_of(path) / "config.json"), dry)


def folder_of(path: Path) -> Path:
    """Where the files beside these weights are."""
    return path if path.is_dir() else path.parent


def read_json(path: Path) -> dict:
    """A JSON object; {} if there is no such file. Raises UserError if it is no JSON object."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def _folder(folder: Path) -> dict[str, Entry]:
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    for endings in ((".safetensors.index.json",), (".safetensors",), (".npz",)):
        found = [name for name in names if name.endswith(endings)]
        found = [f"model{endings[0]}"] if f"model{endings[0]}" in found else found
        if len(found) > 1:
            raise UserError(
                f"{folder} holds several files of weights and no index: {', '.join(found)}; name one of them"
            )
        if found:
            return _index(folder / found[0]) if found[0].endswith(".json") else entries_of(folder / found[0])
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise UserError(refusal(folder / pickles[0]))
    listed = ", ".join(names[:6]) or "nothing"
    raise UserError(f"{folder} is a folder without weights (it holds {listed}); {KNOWN}")


def _index(path: Path) -> dict[str, Entry]:
    """A sharded model: {"weight_map": {tensor: file}}."""
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f"{path} has no weight_map; expected the index of sharded safetensors")
    shards = {}
    for shard in sorted(set(where.values())):
        if Path(shard).name != shard or not (path.parent / shard).exists():
            wanted = sum(other == shard for other in where.values())
            raise UserError(f"{path.parent} lacks the shard {shard}, where {path.name} says {wanted} tensors are")
        shards[shard] = entries_of(path.parent / shard)
    lost = [f"{name} (in {shard})" for name, shard in where.items() if name not in shards[shard]]
    if lost:
        raise UserError(f"{path} names tensors that its shards do not hold: {', '.join(lost[:6])}")
    return {name: entry for entries in shards.values() for name, entry in entries.items()}
