"""Records with named fields: what ArrayRecord, TFDS and Hugging Face sources share, and ArrayRecord files themselves.

ArrayRecord files hold `tf.train.Example` protos, which is what most writers put there; TFDS ships the proto's classes,
so TensorFlow is not needed to read them.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from input_pipeline.errors import DecodeError, UserError
from input_pipeline.size_index import cache_dir, write_cached
from input_pipeline.sources import paths
from input_pipeline.sources.base import TEXT_FIELDS, Record, digest, require, select, to_label, to_text, unsplit_part

FIRST = 16  # records that are looked at for the fields they have: protos leave out what is empty


class Fields(NamedTuple):
    """Where records keep the image, its label ("": nowhere) and its text ("": in `text` or `caption`, if anywhere).

    multi_label: whether the label is a set of classes.
    """

    image: str
    label: str
    multi_label: bool
    text: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        """Where a text is looked for, the first that is there."""
        return (self.text,) if self.text else TEXT_FIELDS

    @property
    def key(self) -> tuple[str | bool, ...]:
        """For fingerprints; one made before texts had a field still holds."""
        return self if self.text else self[:3]


class RecordSource:
    """The part of a source that depends on fields alone; `_read` gives the fields of a stored record.

    Subclasses set `_where` (the setting, for messages), `_fields`, `_rows` (stored records of this split),
    `_fingerprint` and `class_names`.
    """

    _where: str
    _fields: Fields
    _rows: np.ndarray
    _fingerprint: str
    _read: Callable[[int], dict[str, Any]]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Record:
        found, where = self._read(int(self._rows[i])), self.describe(i)
        image = found.get(self._fields.image)
        if image is None:
            raise DecodeError(f"no image in field {self._fields.image!r}")
        label = found.get(self._fields.label) if self._fields.label else None
        label = to_label(label, self._fields.multi_label, len(self.class_names), where)
        return Record(_to_data(image), label)

    def text(self, i: int) -> str:
        found = self._read_text(int(self._rows[i]))
        text = next((found[name] for name in self._fields.texts if found.get(name) is not None), "")
        return to_text(text, self.describe(i))

    def _read_text(self, row: int) -> dict[str, Any]:
        """At least the fields that may hold the text."""
        return self._read(row)

    def describe(self, i: int) -> str:
        return f"{self._where}[{self._rows[i]}]"

    def known_sizes(self) -> None:
        return None

    def fingerprint(self) -> str:
        return self._fingerprint

    def _check_fields(self, available: Iterable[str]) -> None:
        image, label, _, text = self._fields
        without = {"image_field": "", "label_field": ' ("": no labels)', "text_field": ' ("": text or caption, if any)'}
        for option, name in (("image_field", image), ("label_field", label), ("text_field", text)):
            if name not in available and (name or option == "image_field"):
                raise UserError(
                    f"{self._where} has no field {name!r}, only {', '.join(sorted(available))}: "
                    f"set data.{option}{without[option]}"
                )


def count_classes(labels: Callable[[], Iterable[Any]], records: int, key: str) -> tuple[str, ...]:
    """'0', '1', ... up to the largest label: one pass over the records, kept in the user's cache under `key`."""
    path = cache_dir("classes") / f"{key}.json"
    try:
        largest = int(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        from tqdm import tqdm

        found = tqdm(labels(), desc="counting classes (once)", unit="record", total=records, delay=2)
        largest = max((int(np.max(label, initial=-1)) for label in found if label is not None), default=-1)
        write_cached(path, lambda file: file.write(str(largest).encode()))
    return tuple(map(str, range(largest + 1)))


def _to_data(value: Any) -> bytes | np.ndarray:
    """Encoded bytes, or an array, from what libraries keep in an image field."""
    if isinstance(value, dict):  # Hugging Face: the bytes, or where they are
        return value["bytes"] if value["bytes"] is not None else paths.read(value["path"])
    if isinstance(value, str):
        return paths.read(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    return np.asarray(value)


class ArrayRecordSource(RecordSource):
    """ArrayRecord files of `tf.train.Example` protos; see `input_pipeline.sources.base.Source`.

    The image field holds one encoded image, the label field integers. `classes.txt` beside the first file names the
    classes; without it one pass over the records counts them. Write files with `group_size:1`: with the default, a
    random read costs 28 ms.
    """

    def __init__(self, pattern: str, split: str, fields: Fields, hold_out: bool = True):
        self._where, self._fields = f"data.source=array_record={pattern}", fields
        library = require("array_record.python.array_record_data_source", "array_record", self._where)
        files = paths.match(pattern, "array_record")
        try:
            self._data = library.ArrayRecordDataSource([file.name for file in files])
        except Exception as error:  # its C++ reader raises kinds of its own
            raise UserError(f"{self._where}: not readable as ArrayRecord: {error}") from error
        records, key = len(self._data), paths.fingerprint(files)
        self._rows = select(map(str, range(records)), unsplit_part(split, hold_out, self._where), self._where)
        self._check_fields({name for row in range(min(records, FIRST)) for name in self._read(row)})
        names = paths.class_list(files[0].name.rpartition("/")[0] or ".") if fields.label else ()
        if names is None:
            names = count_classes(self._labels, records, digest(key, fields.label))
        self.class_names = names
        self._fingerprint = digest("array_record", key, *fields.key, *names, self._rows.sum())

    def _labels(self) -> Iterable[Any]:
        return (self._read(row).get(self._fields.label) for row in range(len(self._data)))

    def _read(self, row: int) -> dict[str, Any]:
        return parse_example(self._data[row], self._where)


def parse_example(data: bytes, where: str) -> dict[str, Any]:
    """The fields of a serialized tf.train.Example: bytes where a field holds one value of bytes, else a list.

    Raises UserError for bytes that are no such proto.
    """
    from google.protobuf.message import DecodeError as ProtoError

    proto = require("tensorflow_datasets.proto", "tensorflow-datasets", where)
    try:
        fields = proto.tf_example_pb2.Example.FromString(data).features.feature
    except ProtoError as error:
        raise UserError(f"{where}: its records are no tf.train.Example protos: {error}") from error
    found = {}
    for name, feature in fields.items():
        kind = feature.WhichOneof("kind")
        values = list(getattr(feature, kind).value) if kind else []
        found[name] = values[0] if kind == "bytes_list" and len(values) == 1 else values
    return found
