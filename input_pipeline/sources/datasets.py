"""Prepared datasets: TFDS without TensorFlow, and Hugging Face `datasets`. Nothing is downloaded from here.

TFDS is read through `as_data_source` with `SkipDecoding`, the only way that works without TensorFlow, so a dataset must
have been prepared as array_record or parquet. TFDS hands out whole parquet shards whatever slice is asked for and
holds them in memory: slices are cut here, and array_record is the better choice for large data.
"""

import difflib
import os
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from input_pipeline.errors import UserError
from input_pipeline.sources import paths
from input_pipeline.sources.base import choose_split, digest, require, select, unsplit_part
from input_pipeline.sources.records import Fields, RecordSource, count_classes

if TYPE_CHECKING:
    import datasets
    import tensorflow_datasets


class TfdsSource(RecordSource):
    """A split or slice (`train[:90%]`) of a prepared TFDS dataset, named `NAME`, `NAME:version` or by its folder.

    See `input_pipeline.sources.base.Source`. Names are looked for in TFDS_DATA_DIR, else in ~/tensorflow_datasets.
    """

    def __init__(self, name: str, split: str, fields: Fields, hold_out: bool = True):
        del hold_out  # TFDS data names its own splits
        self._where, self._fields, self._args = f"data.source=tfds={name}", fields, (name, split, fields)
        tfds = require("tensorflow_datasets", "tensorflow-datasets", self._where)
        info, open_records = _open_tfds(tfds, name, self._where)
        self._check_fields(list(info.features))
        try:
            instructions = info.splits[split].file_instructions
        except (KeyError, ValueError) as error:
            known = ", ".join(f"{s.name} ({s.num_examples})" for s in info.splits.values())
            raise UserError(
                f"{self._where} has no split {split!r}, only {known}, or a slice such as train[:90%]: set "
                "data.train_split and data.eval_split"
            ) from error
        skip = {k: tfds.decode.SkipDecoding() for k, v in info.features.items() if isinstance(v, tfds.features.Image)}
        self._data = open_records(split, decoders=skip)
        kind = info.file_format.value
        stored = len(self._data)
        self._rows = _parquet_rows(instructions, stored, self._where) if kind == "parquet" else np.arange(stored)
        shards = [(s.name, s.shard_lengths, s.num_bytes) for s in info.splits.values()]
        self._fingerprint = digest("tfds", info.full_name, kind, split, shards, *fields.key)
        self.class_names = _class_names(dict(info.features).get(fields.label)) or self._counted()

    def _counted(self) -> tuple[str, ...]:
        if not self._fields.label:
            return ()
        return count_classes(self._labels, len(self._rows), self._fingerprint)

    def _labels(self) -> Iterable[Any]:
        return (self._read(int(row))[self._fields.label] for row in self._rows)

    def _read(self, row: int) -> dict[str, Any]:
        return self._data[row]

    def __reduce__(self) -> tuple:
        return type(self), self._args  # opened again: a parquet table is the whole data


def _class_names(feature: Any) -> tuple[str, ...]:
    """Of a ClassLabel, or a sequence of them, of either library; else none."""
    return tuple(getattr(getattr(feature, "feature", feature), "names", None) or ())


def _open_tfds(tfds: ModuleType, name: str, where: str) -> tuple["tensorflow_datasets.core.DatasetInfo", Callable]:
    """The dataset's info and its `as_data_source`. Raises UserError with the command that prepares it."""
    data_dir = os.environ.get("TFDS_DATA_DIR") or tfds.core.constants.DATA_DIR
    prepare = (
        "nothing is downloaded during training: prepare it once with `pip install tensorflow tensorflow-datasets && "
        f"tfds build {name} --file_format=array_record --data_dir={data_dir}` (ImageNet's own tar files go to "
        f"{data_dir}/downloads/manual first), or set TFDS_DATA_DIR"
    )
    try:
        if paths.is_remote(name) or os.path.exists(os.path.join(name, "dataset_info.json")):
            builder = tfds.builder_from_directory(name)
        else:
            builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        near = difflib.get_close_matches(name.split(":")[0], tfds.list_builders(with_community_datasets=False), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{where}: not prepared in {data_dir} and unknown to TFDS{hint}; {prepare}") from error
    except (AssertionError, OSError, ValueError) as error:
        raise UserError(f"{where}: {error}") from error
    if not builder.info.splits:
        raise UserError(f"{where} is not prepared in {data_dir}; {prepare}")
    formats = {f.value for f in builder.info.available_file_formats()}
    if not formats & {"array_record", "parquet"}:
        raise UserError(
            f"{where} is prepared in {builder.data_dir} as {', '.join(sorted(formats))}, which has no random access: "
            f"convert it with `tfds convert_format --dataset_dir={builder.data_dir} --out_file_format=array_record "
            f"--out_path={builder.data_dir}` (needs TensorFlow)"
        )
    return builder.info, builder.as_data_source


def _parquet_rows(instructions: list, stored: int, where: str) -> np.ndarray:
    """Which rows of the whole shards that TFDS read belong to the slice."""
    starts = np.cumsum([0, *(i.examples_in_shard for i in instructions)])
    if starts[-1] != stored:
        raise UserError(
            f"{where}: {stored} records in its parquet files, {starts[-1]} by its metadata: prepare it again"
        )
    return np.concatenate([np.arange(s + i.skip, s + i.skip + i.take) for s, i in zip(starts, instructions)])


class HuggingFaceSource(RecordSource):
    """A Hugging Face dataset on disk; see `input_pipeline.sources.base.Source`.

    The folder is one that `save_to_disk` wrote, or one that `load_dataset` understands (parquet, imagefolder, ...).
    """

    def __init__(self, path: str, split: str, fields: Fields, hold_out: bool = True):
        self._where, self._fields = f"data.source=hf={path}", fields
        library = require("datasets", "datasets", self._where)
        stored = _load_hf(library, os.path.expanduser(path), self._where)
        if isinstance(stored, dict):
            name, part = choose_split(list(stored), split, hold_out, self._where)
            data = stored[name]
        else:
            name, part, data = "", unsplit_part(split, hold_out, self._where), stored
        self._check_fields(data.column_names)
        self._texts = data.select_columns([c for c in fields.texts if c in data.column_names])
        data = data.select_columns([c for c in fields[:2] if c in data.column_names])
        for column, feature in data.features.items():
            if isinstance(feature, library.Image):
                data = data.cast_column(column, library.Image(decode=False))
        self._data, self._rows = data, select(map(str, range(len(data))), part, self._where)
        image = data.features[fields.image]
        self._dtype = image.dtype if isinstance(image, library.Array2D | library.Array3D) else None
        self._fingerprint = digest("hf", name, part, paths.fingerprint(paths.list_tree(path)), *fields.key)
        self.class_names = _class_names(data.features.get(fields.label)) or self._counted()

    def _counted(self) -> tuple[str, ...]:
        if not self._fields.label:
            return ()
        return count_classes(self._labels, len(self._data), self._fingerprint)

    def _labels(self) -> Iterable[Any]:
        return (row[self._fields.label] for row in self._data.select_columns(self._fields.label))

    def _read_text(self, row: int) -> dict[str, Any]:
        return self._texts[row] if self._texts.column_names else {}

    def _read(self, row: int) -> dict[str, Any]:
        found = self._data[row]
        if self._dtype is not None:  # arrays come as nested lists
            found[self._fields.image] = np.asarray(found[self._fields.image], self._dtype)
        return found


def _load_hf(library: ModuleType, path: str, where: str) -> "datasets.Dataset | datasets.DatasetDict":
    if not paths.is_remote(path) and not os.path.isdir(path):
        raise UserError(
            f"{where}: no such folder. Nothing is downloaded during training: fetch the data once with "
            "`datasets.load_dataset(NAME).save_to_disk(PATH)` and give that PATH"
        )
    saved = any(file.name in ("dataset_dict.json", "state.json") for file in paths.list_tree(path))
    try:
        return library.load_from_disk(path) if saved else library.load_dataset(path)
    except Exception as error:  # the library raises kinds of its own
        raise UserError(f"{where} cannot be opened as a Hugging Face dataset: {error}") from error
