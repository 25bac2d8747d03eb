"""What every source is, and the rules that several of them share: held-out images, split names, labels."""

import hashlib
import importlib
import logging
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import NamedTuple, Protocol

import numpy as np

from input_pipeline.errors import DecodeError, UserError

VALIDATION = ("validation", "val", "valid", "test")  # in the order in which a held-out split is looked for
TEXT_FIELDS = ("text", "caption")


class Record(NamedTuple):
    """One image as stored.

    data: an encoded image, or an array [H, W, C] of uint8 or uint16. label: a class, -1 without one, or the classes of
    a multi-label image, which may be none. Its caption is apart, `Source.text`: it is read once and not every epoch.
    """

    data: bytes | np.ndarray
    label: int | tuple[int, ...]


class Source(Protocol):
    """Random access to records; thread-safe, picklable, and cheap: `source[i]` reads bytes and decodes nothing.

    A source may also have `head(i, num_bytes)`, the first bytes of an image, where they can be read alone;
    `image_numbers()`, [N] int32, where several records may be one image with other texts: equal for those; and
    `problems` (`sources.problems`), what its files hold that cannot be used, among `listed` things.
    `source[i]` raises OSError or DecodeError where one image cannot be had, IndexError beyond the end.
    """

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Record: ...

    def text(self, i: int) -> str:
        """The image's caption, "" without one; neither reads nor draws the image where that can be avoided.

        Raises OSError or DecodeError where it cannot be had.
        """

    def describe(self, i: int) -> str:
        """The image's file name or key, for messages."""

    def known_sizes(self) -> np.ndarray | None:
        """Heights and widths [N, 2] int32 where they are known without reading; None: they are not."""

    def fingerprint(self) -> str:
        """Changes when the data does."""


def digest(*parts: object) -> str:
    """A short name for these parts, in this order."""
    joined = "\n".join(map(str, parts))
    return hashlib.blake2b(joined.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def is_held_out(name: str) -> bool:
    """Whether this image belongs to the tenth that is held out; a property of its name alone, so it never changes."""
    bits = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(bits, "little") % 10 == 0


def unsplit_part(split: str, hold_out: bool, where: str) -> str:
    """Which part of images without splits a split is: all, kept or held out."""
    if not hold_out:
        return "all"
    if split == "train":
        return "kept"
    if split in VALIDATION:
        return "held out"
    raise UserError(f"{where} has no split {split!r}: expected train or validation (a tenth, held out by name)")


def choose_split(available: Sequence[str], split: str, hold_out: bool, where: str) -> tuple[str, str]:
    """The stored split to read and which part of it; see `unsplit_part`.

    validation, val and valid mean the same and fall back to test; with nothing but train, a tenth of it is held out.
    """
    held = next((name for name in VALIDATION if name in available), None)
    wanted = VALIDATION if split in VALIDATION[:-1] else (split,)
    for name in wanted:
        if name in available:
            return name, "kept" if hold_out and name == "train" and held is None else "all"
    if hold_out and held is None and "train" in available and split in VALIDATION:
        return "train", "held out"
    raise UserError(f"{where} has no split {split!r}, only {', '.join(available)}: name one of these")


def select(names: Iterable[str], part: str, where: str) -> np.ndarray:
    """Rows [N] int64 of the images, by name, that belong to the part."""
    if part == "all":
        rows = np.arange(sum(1 for _ in names))
    else:
        rows = np.flatnonzero([is_held_out(name) == (part == "held out") for name in names])
    if not len(rows):
        raise UserError(
            f"{where}: no image is left in the part that is {part}: with so few images, name the evaluation data "
            "yourself (data.eval_source, or a val/ folder)"
        )
    return rows


def to_label(value: object, multi_label: bool, classes: int, where: str) -> int | tuple[int, ...]:
    """A label as `Record` has it from a number, a sequence of them or None.

    Raises UserError for a set of classes where one is expected, DecodeError for a class that does not exist.
    """
    if value is None:
        return -1
    found = tuple(int(v) for v in np.ravel(np.asarray(value, dtype=np.int64)))
    if found == (-1,):
        return -1
    if any(not 0 <= v < classes for v in found):
        raise DecodeError(f"label {value} of {where}: there are {classes} classes, from 0 to {classes - 1}")
    if multi_label:
        return found
    if len(found) != 1:
        raise UserError(
            f"{where} has {len(found)} labels {list(found)}: expected one; for sets of classes use "
            "--config.data.multi_label=True with a sigmoid loss"
        )
    return found[0]


def to_text(value: object, where: str) -> str:
    """A caption from UTF-8 bytes, a string, a sequence of them (the first), or a dict with a text or caption of these.

    Raises DecodeError for other bytes, a dict with neither, and what else is no text.
    """
    if isinstance(value, list | tuple | np.ndarray):
        return to_text(value[0], where) if len(value) else ""
    if isinstance(value, dict):
        name = next((name for name in TEXT_FIELDS if name in value), None)
        if name is None:
            raise DecodeError(f"{where}: the text is a dict of {', '.join(map(str, value))}: expected a string")
        return to_text(value[name], where)
    if value is None or isinstance(value, str):
        return (value or "").strip()
    if not isinstance(value, bytes):
        raise DecodeError(f"{where}: the text is {value!r:.40}: expected a string")
    try:
        return value.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DecodeError(f"{where}: the text is not UTF-8: {error}") from error


def refuse_multi_label(multi_label: bool, kind: str) -> None:
    """Raises UserError where sets of classes are asked of a source that has one class an image."""
    if multi_label:
        raise UserError(
            f"data.source={kind} has one class an image: data.multi_label needs tar, array_record, tfds or hf data "
            "whose label field is a list of classes"
        )


def require(module: str, package: str, where: str) -> ModuleType:
    """Imports a library that only some sources need. Raises UserError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{where} needs {package} ({error}): pip install {package}") from error


def log() -> logging.Logger:
    """Of all sources, named input_pipeline.sources."""
    return logging.getLogger("input_pipeline.sources")
