"""A folder of images with a captions file beside them; one row, a file name and a text, is one example.

Class folders are not needed: a class is the optional column `label`. A captions file decides what a folder is: with
one, the folder is this source, without one it is class folders (`files`). The name list is the Hugging Face imagefolder
convention and two plainer names.
"""

import hashlib
import os

import numpy as np

from input_pipeline.errors import UserError
from input_pipeline.sources import paths
from input_pipeline.sources.base import Source, choose_split, digest, log, select, unsplit_part
from input_pipeline.sources.caption_file import Row, read_rows
from input_pipeline.sources.files import IMAGE_ENDINGS, SPLITS, FolderSource, ImageFiles
from input_pipeline.sources.records import Fields

VERSION = 2  # raise when other rows of a captions file are used
CAPTION_FILES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")  # the first that is there
NO_IMAGE, NO_CAPTION = "captions whose image does not exist", "images without a caption"


def open_folder(path: str, split: str, fields: Fields, hold_out: bool = True) -> Source:
    """The images of `folder=PATH`: with captions where PATH is a captions file or holds one, else in class folders."""
    root, where = os.path.expanduser(path).rstrip("/"), f"data.source=folder={path}"
    if root.lower().endswith((".csv", ".jsonl")):
        folder, _, name = root.rpartition("/")
        part = unsplit_part(split, hold_out, where)
        return CaptionsSource(folder or ("/" if root.startswith("/") else "."), name, part, fields, where, subset=True)
    found = {name: file for name in SPLITS if (file := _captions_file(f"{root}/{name}"))}
    if found:
        for name in paths.names_in(root) & {*SPLITS} - {*found}:
            log().warning("%s/%s has no captions file and is left out; expected one of %s", root, name, CAPTION_FILES)
        chosen, part = choose_split(list(found), split, hold_out, where)
        return CaptionsSource(f"{root}/{chosen}", found[chosen], part, fields, where)
    if name := _captions_file(root):
        return CaptionsSource(root, name, unsplit_part(split, hold_out, where), fields, where)
    return FolderSource(path, split, hold_out)


class CaptionsSource(ImageFiles):
    """Images of a folder by the rows of its captions file; see `input_pipeline.sources.base.Source`.

    part: all, kept or held out (a hash of the file name, so all captions of an image fall on one side). subset: whether
    the file may leave images out on purpose. Bad rows, and images without one, are left out; `problems` has them, of
    `listed` rows and images.
    """

    def __init__(self, root: str, name: str, part: str, fields: Fields, where: str, subset: bool = False):
        self.root = root
        path = f"{root}/{name}"
        try:
            data = paths.read(path)
        except OSError as error:
            raise UserError(f"{where}: {error}; expected a captions file") from error
        rows, self.problems = read_rows(data, path, fields)
        files = {file.name: file for file in paths.list_tree(root)}
        rows = self._existing(rows, files, subset)
        self.listed = self.problems.total() + len(rows)
        if not rows:
            found = "; ".join(self.problems.lines()) or "it has no rows"
            raise UserError(f"{where}: no caption in {path} can be used: {found}. File names are relative to {root}")
        self.class_names = _sorted_names({row.label for row in rows if row.label})
        rows = [rows[i] for i in select((row.file_name for row in rows), part, where)]
        self._keep(rows)
        used = [files[name] for name in sorted({row.file_name for row in rows})]
        content = hashlib.blake2b(data).hexdigest()
        key = (VERSION, fields.texts, fields.label, part, content, paths.fingerprint(used))
        self._fingerprint = digest("captions", *key, *self.class_names)

    def _existing(self, rows: list[Row], files: dict[str, paths.File], subset: bool) -> list[Row]:
        """The rows whose image exists; what has no partner is noted, in both directions."""
        for row in rows:
            if row.file_name not in files:
                self.problems.add(NO_IMAGE, row.file_name)
        captioned = {row.file_name for row in rows}
        for name in files if not subset else ():
            if name not in captioned and name.lower().endswith(IMAGE_ENDINGS):
                self.problems.add(NO_CAPTION, name)
        return [row for row in rows if row.file_name in files]

    def _keep(self, rows: list[Row]) -> None:
        """As arrays, of which each worker process gets a copy: names once an image, texts one after another."""
        number = {name: i for i, name in enumerate(self.class_names)}
        self._labels = np.array([number.get(row.label, -1) for row in rows], np.int32)
        images = {name: k for k, name in enumerate(dict.fromkeys(row.file_name for row in rows))}
        self._names = np.array([os.fsencode(name) for name in images])
        self._images = np.array([images[row.file_name] for row in rows], np.int32)
        texts = [row.text.encode() for row in rows]
        self._texts, self._ends = b"".join(texts), np.cumsum([0, *map(len, texts)])

    def text(self, i: int) -> str:
        return self._texts[self._ends[i] : self._ends[i + 1]].decode()

    def describe(self, i: int) -> str:
        return f"{self.root}/{os.fsdecode(self._names[self._images[i]])}"

    def image_numbers(self) -> np.ndarray:
        """[N] int32, equal for the texts of one image."""
        return self._images


def _captions_file(folder: str) -> str:
    """The name of the captions file of a folder; "": none."""
    names = paths.names_in(folder)
    found = [name for name in CAPTION_FILES if name in names]
    if len(found) > 1:
        log().warning("%s has %s: %s is used", folder, ", ".join(found), found[0])
    return found[0] if found else ""


def _sorted_names(names: set[str]) -> tuple[str, ...]:
    """Class names in order; numbers in the order of numbers."""
    return tuple(sorted(names, key=lambda name: (int(name), name) if name.isdecimal() else (-1, name)))
