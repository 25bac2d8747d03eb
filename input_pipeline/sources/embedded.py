"""Real images that come with scikit-learn, so that everything runs without a download.

The digits' split is a rule and not a file: of each class the 36 images whose index has the smallest hash are held out,
which is 360 of 1797 with every class equally often. It depends on the indices and labels alone, so it never changes.

The photographs are scikit-learn's `china.jpg` by Daniel Buechele (flickr.com/photos/danielbuechele/6061409035) and
`flower.jpg` by vultilion (flickr.com/photos/vultilion/6056698931), both CC BY 2.0: whoever publishes a picture made
from them names them.
"""

import functools
import hashlib
import importlib.util
from pathlib import Path

import numpy as np

from input_pipeline.errors import UserError
from input_pipeline.sources.base import Record, digest

VERSION = 1  # raise when the images change
HELD_OUT_PER_CLASS = 36
SPLITS = ("train", "validation")
KEY = 0xD1617


def _table(stream: int, rows: int, columns: int) -> np.ndarray:
    """Uniform numbers [rows, columns]; row i does not depend on how many there are."""
    return np.random.Generator(np.random.Philox(key=[KEY, stream])).random((rows, columns))


def _check_split(kind: str, split: str) -> None:
    if split not in SPLITS:
        raise UserError(f"data.source={kind} has no split {split!r}: expected {' or '.join(SPLITS)}")


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Grey values [1797, 8, 8] uint8 and labels [1797]."""
    # The file that `sklearn.datasets.load_digits` reads, whose import takes 2 s.
    folder = importlib.util.find_spec("sklearn").submodule_search_locations[0]
    table = np.loadtxt(Path(folder) / "datasets/data/digits.csv.gz", delimiter=",", dtype=np.int64)
    return np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8), table[:, -1]


@functools.cache
def digits_split(split: str) -> np.ndarray:
    """Indices into scikit-learn's digits, ascending: 1437 for train, 360 for validation."""
    labels = _digits()[1]
    order = [hashlib.blake2b(b"digits %d" % i, digest_size=8).digest() for i in range(len(labels))]
    held = [
        i
        for label in range(10)
        for i in sorted(np.flatnonzero(labels == label), key=order.__getitem__)[:HELD_OUT_PER_CLASS]
    ]
    return np.setdiff1d(np.arange(len(labels)), held) if split == "train" else np.sort(held)


class DigitsSource:
    """scikit-learn's 8x8 handwritten digits, each enlarged to its own size; see `input_pipeline.sources.base.Source`.

    The side (of the square of equal area) is 32 to 96 pixels, width over height 0.67 to 1.49. RGB.
    """

    class_names = tuple("0123456789")

    def __init__(self, split: str):
        _check_split("digits", split)
        self.split, self._rows = split, digits_split(split)
        side, aspect = _table(0, len(_digits()[0]), 2)[self._rows].T
        side, root = 32 + 64 * side, np.exp(0.2 * (2 * aspect - 1))
        self._sizes = np.rint(np.stack([side / root, side * root], axis=1)).astype(np.int32)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Record:
        import cv2

        row = self._rows[i]
        height, width = map(int, self._sizes[i])
        images, labels = _digits()
        grey = cv2.resize(images[row].astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
        pixels = np.rint(grey.clip(0, 255)).astype(np.uint8)
        return Record(np.repeat(pixels[:, :, None], 3, axis=2), int(labels[row]))

    def text(self, i: int) -> str:
        return f"a handwritten digit {_digits()[1][self._rows[i]]}"

    def describe(self, i: int) -> str:
        return f"digits[{self._rows[i]}]"

    def known_sizes(self) -> np.ndarray:
        return self._sizes

    def fingerprint(self) -> str:
        images, labels = _digits()
        return digest("digits", VERSION, self.split, hashlib.blake2b(images.tobytes() + labels.tobytes()).hexdigest())


@functools.cache
def _photos() -> tuple[np.ndarray, ...]:
    from sklearn.datasets import load_sample_images

    return tuple(load_sample_images().images)


class PhotosSource:
    """16 crops of two photographs, of very different aspects, for pictures in documents; the module names the authors.

    See `input_pipeline.sources.base.Source`. Both splits show the same photographs: this set is not for training.
    """

    class_names = ("china", "flower")

    def __init__(self, split: str):
        _check_split("photos", split)
        self.split = split
        area, aspect, y, x = _table(1 + SPLITS.index(split), 16, 4).T
        shape = np.array(_photos()[0].shape[:2])  # both are alike
        area, root = shape.prod() * (0.1 + 0.6 * area), np.exp(0.6 * (2 * aspect - 1))
        sizes = np.minimum(np.stack([np.sqrt(area) / root, np.sqrt(area) * root], axis=1), shape)
        self._sizes = np.rint(sizes).astype(np.int32)
        self._corners = (np.stack([y, x], axis=1) * (shape - self._sizes)).astype(np.int32)

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, i: int) -> Record:
        (top, left), (height, width) = self._corners[i], self._sizes[i]
        label = int(i) % 2
        return Record(_photos()[label][top : top + height, left : left + width].copy(), label)

    def text(self, i: int) -> str:
        return ("a photo of a palace in China", "a photo of a flower")[int(i) % 2]

    def describe(self, i: int) -> str:
        return f"photos {self.split}[{i}] ({self.class_names[int(i) % 2]})"

    def known_sizes(self) -> np.ndarray:
        return self._sizes

    def fingerprint(self) -> str:
        return digest("photos", VERSION, self.split)
