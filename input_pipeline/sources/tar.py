"""Tar shards in the WebDataset convention, with random access: files of one name are a sample, `0001.jpg` + `0001.cls`.

Shards are read once from end to end to note where each image lies and what its label is; the index goes to the user's
cache and afterwards an image is one ranged read (20 us locally). Streaming the shards instead would need no index, but
then sizes are unknown before packing and resuming means replaying. So shards must not be compressed.
"""

import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from input_pipeline.errors import UserError
from input_pipeline.size_index import cache_dir, write_cached
from input_pipeline.sources import paths
from input_pipeline.sources.base import Record, digest, select, to_label, to_text, unsplit_part
from input_pipeline.sources.files import IMAGE_ENDINGS
from input_pipeline.sources.problems import Problems
from input_pipeline.sources.records import Fields

VERSION = 2  # raise when the index changes
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd")
TXT, JSON = 1, 2
NO_IMAGE, DOUBLED = "texts without an image", "files with the name of another in their shard"
ENDINGS = tuple(ending[1:] for ending in IMAGE_ENDINGS)


class Index(NamedTuple):
    """One row a sample, shards in order. labels[label_starts[i] : label_starts[i + 1]] are its classes, (-1,) unknown.

    image, text: [N, 2] int64 offset and length; text_kind: 0 none, `TXT` a .txt file, `JSON`. problems: as JSON.
    """

    keys: np.ndarray
    shard: np.ndarray
    image: np.ndarray
    text: np.ndarray
    text_kind: np.ndarray
    labels: np.ndarray
    label_starts: np.ndarray
    problems: np.ndarray


class TarSource:
    """Samples of tar shards; see `input_pipeline.sources.base.Source`.

    The label is the number in `.cls`, or `label_field` of `.json`; a number, a list of them, or names listed in a
    `classes.txt` beside the first shard, which also names the classes. Without one they are '0', '1', ... up to the
    largest label found. The text is `.txt`, or "text" or "caption" of the JSON; with a `text_field`, that of the JSON.
    `problems` has the texts without an image and the doubled names of all shards, beside all samples.
    """

    def __init__(self, pattern: str, split: str, fields: Fields, hold_out: bool = True):
        self._where, self.split, self._fields = f"data.source=tar={pattern}", split, fields
        shards = paths.match(pattern, "tar")
        self._shards = [shard.name for shard in shards]
        names = paths.class_list(self._shards[0].rpartition("/")[0] or ".")
        self._index = _cached_index(shards, fields, names)
        if fields.text and not (self._index.text_kind == JSON).any():
            raise UserError(f"{self._where}: no sample has a field {fields.text!r} in its .json: set data.text_field")
        self.problems = Problems.from_json(str(self._index.problems))
        self.listed = len(self._index.keys) + self.problems.total()
        largest = int(self._index.labels.max(initial=-1))
        if names and largest >= len(names):
            raise UserError(f"{self._where}: label {largest}, but classes.txt names {len(names)} classes, from 0")
        self.class_names = names or tuple(map(str, range(largest + 1)))
        short = [name.rpartition("/")[2] for name in self._shards]
        keys = (f"{short[s]}/{os.fsdecode(k)}" for s, k in zip(self._index.shard, self._index.keys, strict=True))
        self._rows = select(keys, unsplit_part(split, hold_out, self._where), self._where)
        self._fingerprint = digest("tar", paths.fingerprint(shards), *fields.key, *self.class_names, self._rows.sum())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Record:
        row, index = self._rows[i], self._index
        offset, length = map(int, index.image[row])
        labels = index.labels[index.label_starts[row] : index.label_starts[row + 1]]
        label = to_label(labels, self._fields.multi_label, len(self.class_names), self.describe(i))
        return Record(self._read(row, offset, length), label)

    def head(self, i: int, num_bytes: int) -> bytes:
        """The first bytes of an image."""
        row = self._rows[i]
        offset, length = map(int, self._index.image[row])
        return self._read(row, offset, min(length, num_bytes))

    def _read(self, row: int, offset: int, length: int) -> bytes:
        return paths.read(self._shards[self._index.shard[row]], offset, length)

    def text(self, i: int) -> str:
        """Read from the offset that the index noted."""
        row, where = self._rows[i], self.describe(i)
        if not self._index.text_kind[row]:
            return ""
        text = to_text(self._read(row, *map(int, self._index.text[row])), where)
        if self._index.text_kind[row] == TXT:
            return text
        found = json.loads(text)
        return to_text(next((found[name] for name in self._fields.texts if found.get(name)), ""), where)

    def describe(self, i: int) -> str:
        row = self._rows[i]
        return f"{self._shards[self._index.shard[row]]}:{os.fsdecode(self._index.keys[row])}"

    def known_sizes(self) -> None:
        return None

    def fingerprint(self) -> str:
        return self._fingerprint


def _cached_index(shards: list[paths.File], fields: Fields, names: tuple[str, ...] | None) -> Index:
    key = (VERSION, paths.fingerprint(shards), fields.label, names)
    path = cache_dir("tar") / f"{digest(*key, *([fields.text] if fields.text else []))}.npz"
    index = _load_index(path)
    if index is None:
        index = _build_index(shards, fields, names)
        write_cached(path, lambda file: np.savez(file, **index._asdict()))
    return index


def _load_index(path: Path) -> Index | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return Index(**stored)
    except (OSError, ValueError, EOFError, TypeError, KeyError):
        return None


def _build_index(shards: list[paths.File], fields: Fields, names: tuple[str, ...] | None) -> Index:
    from tqdm import tqdm

    with ThreadPoolExecutor(8) as pool:
        scans = pool.map(lambda shard: _scan(shard, fields, names), shards)
        scanned = list(tqdm(scans, desc="indexing tar shards (once)", total=len(shards), delay=2))
    rows = [(s, *sample) for s, (samples, _) in enumerate(scanned) for sample in samples]
    if not rows:
        raise UserError(
            f"{shards[0].name}: no sample with an image among {len(shards)} shards; expected WebDataset samples such "
            "as 0001.jpg with 0001.cls"
        )
    shard, keys, image, text, kind, labels = zip(*rows, strict=True)
    return Index(
        keys=np.array([os.fsencode(key) for key in keys]),
        shard=np.array(shard, np.int32),
        image=np.array(image, np.int64),
        text=np.array(text, np.int64),
        text_kind=np.array(kind, np.int8),
        labels=np.array([label for of_one in labels for label in of_one], np.int64),
        label_starts=np.cumsum([0, *map(len, labels)]),
        problems=np.array(Problems.together(problems for _, problems in scanned).to_json()),
    )


def _scan(shard: paths.File, fields: Fields, names: tuple[str, ...] | None) -> tuple[list[tuple], Problems]:
    """The samples of one shard that have an image, (key, image, text, text_kind, labels), and what is wrong with it."""
    samples, problems = [], Problems()
    with paths.open_file(shard.name) as file:
        if file.read(6).startswith(COMPRESSED):
            raise UserError(f"{shard.name} is compressed, which leaves no random access: unpack it to a plain .tar")
        file.seek(0)
        try:
            members = _members(file, shard, problems)
        except tarfile.TarError as error:
            raise UserError(f"{shard.name} is not a whole tar file: {error}; copy it again") from error
        for key, parts in members.items():
            where = f"{shard.name}:{key}"
            if image := next((parts[ending] for ending in ENDINGS if ending in parts), None):
                samples.append((key, image, *_text_and_labels(file, parts, fields, names, where)))
            elif _has_text(file, parts, fields):
                problems.add(NO_IMAGE, where)
    return samples, problems


def _members(file: BinaryIO, shard: paths.File, problems: Problems) -> dict[str, dict[str, tuple[int, int]]]:
    """Offset and length of each file by sample and ending; of two with one name the later one, as tar has it."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    with tarfile.open(fileobj=file, mode="r:") as members:
        for member in members:
            if not member.isfile():
                continue
            if member.offset_data + member.size > shard.size:
                raise tarfile.ReadError(f"{member.name} goes beyond the end of the file")
            folder, slash, name = member.name.rpartition("/")
            key, _, ending = name.partition(".")
            parts = samples.setdefault(folder + slash + key, {})
            if ending.lower() in parts:
                problems.add(DOUBLED, f"{shard.name}:{member.name}")
            parts[ending.lower()] = (member.offset_data, member.size)
    return samples


def _content(file: BinaryIO, place: tuple[int, int]) -> bytes:
    file.seek(place[0])
    return file.read(place[1])


def _described(file: BinaryIO, parts: dict[str, tuple[int, int]]) -> dict:
    """The fields of a .json, {} without one; raises ValueError. A byte that is no UTF-8 spoils the text alone."""
    try:
        found = json.loads(_content(file, parts["json"]).decode("utf-8-sig", "replace")) if "json" in parts else {}
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found


def _text_kind(parts: dict[str, tuple[int, int]], described: dict, fields: Fields) -> int:
    if "txt" in parts and not fields.text:
        return TXT
    return JSON if any(described.get(name) for name in fields.texts) else 0


def _has_text(file: BinaryIO, parts: dict[str, tuple[int, int]], fields: Fields) -> bool:
    """Whether a sample without an image is a text; other .json files may lie among the samples."""
    try:
        return _text_kind(parts, _described(file, parts), fields) != 0
    except ValueError:
        return "txt" in parts


def _text_and_labels(
    file: BinaryIO, parts: dict[str, tuple[int, int]], fields: Fields, names: tuple[str, ...] | None, where: str
) -> tuple[tuple[int, int], int, list[int]]:
    try:
        described = _described(file, parts)
        label = described.get(fields.label)
        if "cls" in parts and fields.label:
            label = _content(file, parts["cls"]).decode().strip()
    except ValueError as error:
        raise UserError(f"{where} has a .json or .cls file that cannot be read: {error}") from error
    kind = _text_kind(parts, described, fields)
    text = parts["txt" if kind == TXT else "json"] if kind else (0, 0)
    if label is None:
        return text, kind, [-1]
    return text, kind, [_class_number(v, names, where) for v in (label if isinstance(label, list) else [label])]


def _class_number(value: object, names: tuple[str, ...] | None, where: str) -> int:
    if names and value in names:
        return names.index(value)
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where} has the label {value!r}: expected a number, or a name listed in classes.txt beside the shards"
        ) from error
