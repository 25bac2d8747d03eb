"""A folder of images, `base/class/image.jpg`, scanned here rather than by a library.

With `train/` and `val/` folders between, those are the splits and must have the same classes; without them a tenth is
held out, chosen by a hash of each file's relative name: adding images moves none of the others. Names are kept as one
numpy array of bytes (50 MB for 1.3 M images, a quarter of a list of strings): each worker process gets a copy.
"""

import os

import numpy as np

from input_pipeline.errors import UserError
from input_pipeline.sources import paths
from input_pipeline.sources.base import VALIDATION, Record, choose_split, digest, log, select, unsplit_part

SPLITS = ("train", *VALIDATION)
IMAGE_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2"),
    *(".ppm", ".pgm", ".pbm", ".npy"),
)
LAYOUT = "expected images in one folder a class, PATH/cat/1.jpg, or PATH/train/cat/1.jpg and PATH/val/cat/2.jpg"


class ImageFiles:
    """The part of a source of image files that depends on `describe`, `_labels` and `_fingerprint` alone."""

    _labels: np.ndarray
    _fingerprint: str

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> Record:
        return Record(paths.read(self.describe(i)), int(self._labels[i]))

    def head(self, i: int, num_bytes: int) -> bytes:
        """The first bytes of an image."""
        return paths.read(self.describe(i), 0, num_bytes)

    def known_sizes(self) -> None:
        return None

    def fingerprint(self) -> str:
        return self._fingerprint


class FolderSource(ImageFiles):
    """Images of one split of a folder; see `input_pipeline.sources.base.Source`.

    Class numbers are the sorted order of the class folders' names.
    """

    def __init__(self, root: str, split: str, hold_out: bool = True):
        self.root, self.split = os.path.expanduser(root).rstrip("/"), split
        where = f"data.source=folder={root}"
        images = _list_images(self.root, where)
        splits = split_folders([file.name for file in images])
        used = sum(len(_within(images, f"{name}/")) for name in splits) if splits else len(_within(images, ""))
        if used < len(images):
            log().warning("%s: %d images are in no class folder and are left out", where, len(images) - used)
        prefix = ""
        if splits:
            chosen, part = choose_split(splits, split, hold_out, where)
            _check_classes(images, splits, chosen, where)
            prefix = chosen + "/"
        else:
            part = unsplit_part(split, hold_out, where)
        images = _within(images, prefix)
        self.class_names = tuple(sorted({_class(file.name, prefix) for file in images}))
        rows = select((file.name[len(prefix) :] for file in images), part, where)
        images = [images[row] for row in rows]
        number = {name: i for i, name in enumerate(self.class_names)}
        self._labels = np.array([number[_class(file.name, prefix)] for file in images], np.int32)
        self._names = np.array([os.fsencode(file.name) for file in images])
        self._fingerprint = digest("folder", *self.class_names, paths.fingerprint(images))

    def text(self, i: int) -> str:
        """None: captions come with a captions file, see `input_pipeline.sources.captions`."""
        return ""

    def describe(self, i: int) -> str:
        return f"{self.root}/{os.fsdecode(self._names[i])}"


def split_folders(names: list[str]) -> list[str]:
    """The top folders that are splits: named like one and with images in folders, so a class may be called train."""
    nested = {name.split("/")[0] for name in names if name.count("/") >= 2}
    return [split for split in SPLITS if split in nested]


def _within(images: list[paths.File], prefix: str) -> list[paths.File]:
    """The images in a class folder below the prefix."""
    return [file for file in images if file.name.startswith(prefix) and "/" in file.name[len(prefix) :]]


def _class(name: str, prefix: str) -> str:
    return name[len(prefix) :].split("/")[0]


def _list_images(root: str, where: str) -> list[paths.File]:
    """The images below the root. Raises UserError where none is in a folder."""
    try:
        files = paths.list_tree(root)
    except UserError as error:
        raise UserError(f"{where}: {error}; {LAYOUT}") from error
    images = [file for file in files if file.name.lower().endswith(IMAGE_ENDINGS)]
    if not _within(images, ""):
        found = f"{len(images)} images directly in it" if images else f"{len(files)} files, none of them an image"
        raise UserError(f"{where}: found {found if files else 'it empty'}; {LAYOUT}")
    return images


def _check_classes(images: list[paths.File], splits: list[str], chosen: str, where: str) -> None:
    """Raises UserError where train and the split beside it have different class folders."""
    other = next((split for split in splits if split != "train"), None) if chosen == "train" else chosen
    if "train" not in splits or other in (None, "train"):
        return
    train, held = (
        {_class(file.name, f"{split}/") for file in _within(images, f"{split}/")} for split in ("train", other)
    )
    if train == held:
        return
    differences = [
        f"only in {split}/: {', '.join(sorted(names)[:10])}{' ...' if len(names) > 10 else ''}"
        for split, names in (("train", train - held), (other, held - train))
        if names
    ]
    raise UserError(
        f"{where}: train/ has {len(train)} class folders with images and {other}/ has {len(held)}, which differ: "
        f"{'; '.join(differences)}. Give both the same class folders"
    )
