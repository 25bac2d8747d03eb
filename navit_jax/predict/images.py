"""What people have of an image, to the tokens that a model takes: opened, decoded, resized and cut, in threads.

An image becomes its tokens before it is planned into a row, unlike in training, where sizes are known beforehand: what
waits is then small (200 KB of 256 tokens, not a photograph), a bad image leaves no gap in a row, and a file is opened
once. Decoding is full, as in evaluation, never at half a JPEG's size.
"""

import io
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageOps

from input_pipeline import decode
from input_pipeline.budget import target_grid
from input_pipeline.errors import DecodeError, UserError
from input_pipeline.patches import patchify, resize
from input_pipeline.sources import paths
from navit_jax.positions import PositionConfig

EXPECTED = "expected a path, an encoded image's bytes, a PIL image, or an array [H, W] or [H, W, channels]"
MOST_TOKENS = 2**16  # of an image: 1 GB of float32 keys in a layer of a B
_LOCKS = [threading.Lock() for _ in range(64)]  # Pillow reads a file's pixels on first use: not in two threads at once


class Tokens(NamedTuple):
    """One image. values: [n, P] uint8 or uint16, row by row of its grid. grid: (rows, columns), n in all."""

    values: np.ndarray
    grid: tuple[int, int]


class Unreadable(NamedTuple):
    """What stands in the place of an image that could not be used. image: as it was given. reason: why, in words."""

    image: Any
    reason: str


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """How images become tokens.

    patch, channels, multiple: of the model; grids have multiples of `multiple` rows and columns. longest: patches a
    side that its position embedding knows; 0: any. max_tokens: of an image, which is enlarged to as many, unless
    enlarge is False and it is smaller. squash: to a square grid, whatever its aspect. bits: 8, or 16 to keep 16-bit
    images whole. background: 8-bit RGB behind transparent pixels. Raises UserError for a max_tokens that cannot be.
    """

    patch: int
    channels: int
    max_tokens: int
    multiple: int = 1
    longest: int = 0
    enlarge: bool = True
    squash: bool = False
    bits: int = 8
    background: tuple[int, int, int] = (255, 255, 255)
    max_pixels: int = 100_000_000

    def __post_init__(self):
        fewest, most = self.multiple**2, self.longest**2
        if not isinstance(self.max_tokens, int | np.integer) or isinstance(self.max_tokens, bool):
            raise UserError(f"max_tokens is {self.max_tokens!r}; expected a whole number, such as 256")
        if self.max_tokens < fewest:
            why = f": grids of this model have multiples of {self.multiple} rows and columns" * (self.multiple > 1)
            raise UserError(f"max_tokens is {self.max_tokens}; it must be at least {fewest}{why}")
        if self.max_tokens > MOST_TOKENS:
            raise UserError(f"max_tokens is {self.max_tokens}; it must be at most {MOST_TOKENS}")
        if most and self.max_tokens > most:
            raise UserError(
                f"max_tokens is {self.max_tokens}, but the position embedding of this model knows {self.longest} "
                f"patches a side: it must be at most {most}. For more, fine-tune with model.posemb_max="
                f"{math.ceil(self.max_tokens**0.5)} or model.posemb_beyond=interpolate."
            )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of so many pixels.

        The largest at its aspect within max_tokens and with no side above `longest`: a panorama has fewer tokens then.
        """
        unit, budget = self.patch * self.multiple, self.max_tokens // self.multiple**2
        longest = self.longest // self.multiple or budget
        if self.squash:
            rows = columns = min(longest, int(budget**0.5))
            return rows * self.multiple, columns * self.multiple
        rows, columns = (int(n) for n in target_grid(np.array([[height, width]]), np.array([budget]), unit)[0])
        own = -(-height // unit), -(-width // unit)
        if not self.enlarge and own[0] * own[1] <= rows * columns:
            rows, columns = own
        if max(rows, columns) > longest:
            scale = longest / max(height, width)
            rows, columns = (min(longest, math.ceil(side * scale)) for side in (height, width))
        return rows * self.multiple, columns * self.multiple

    def __call__(self, image: Any) -> Tokens | Unreadable:
        """The tokens of an image given in any form, or what is wrong with it."""
        try:
            options = dict(channels=self.channels, bits=self.bits, background=self.background)
            pixels = decode.decode(_opened(image), max_pixels=self.max_pixels, **options)
            rows, columns = self.grid(*pixels.shape[:2])
            pixels = resize(pixels, rows * self.patch, columns * self.patch)
            return Tokens(np.ascontiguousarray(patchify(pixels, self.patch)), (rows, columns))
        except (DecodeError, OSError) as error:
            return Unreadable(image, getattr(error, "strerror", None) or str(error))
        except MemoryError:
            return Unreadable(image, "not enough memory to decode it")


def longest_side(cfg: PositionConfig) -> int:
    """Patches a side that a model has positions for; 0: any number."""
    tabular = cfg.posemb in ("learned", "sinusoidal") and cfg.posemb_coords == "absolute"
    return cfg.posemb_max if tabular and cfg.posemb_beyond == "error" else 0


def _opened(image: Any) -> bytes | np.ndarray:
    """What `decode` takes. Raises OSError and DecodeError."""
    try:
        if isinstance(image, str | os.PathLike):
            return paths.read(os.path.expanduser(os.fspath(image)))
        if isinstance(image, bytes | bytearray | memoryview):
            return bytes(image)
        if isinstance(image, PillowImage.Image):
            with _LOCKS[id(image) // 64 % len(_LOCKS)]:
                return _from_pillow(image)
        if hasattr(image, "__array__"):
            return np.asarray(image)
    except OSError:
        raise
    except Exception as error:  # a name with a zero byte, a tensor on a device, Pillow's dozen kinds for a broken file
        raise DecodeError(str(error) or type(error).__name__) from error
    raise DecodeError(f"{type(image).__name__}: {EXPECTED}")


def _from_pillow(image: PillowImage.Image) -> bytes | np.ndarray:
    """Its pixels; modes with more to them (alpha, palettes, 16 bits) as a file, which says what they mean."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return np.asarray(image)
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I", "F"):
        image = image.convert("RGBA" if image.mode in ("PA", "La", "RGBa") else "RGB")
    file = io.BytesIO()
    kind = dict(format="TIFF") if image.mode == "F" else dict(format="PNG", compress_level=0)
    image.save(file, **kind)
    return file.getvalue()


def in_threads(work: Callable, images: Iterable, *, threads: int, ahead: int) -> Iterator:
    """work(image) of each, in order; at most `ahead` are under way, so no more of an iterator are read."""
    waiting: deque = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        for image in images:
            waiting.append(pool.submit(work, image))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def many(images: Any, answers: Callable[[Iterable], Iterator]) -> list | Iterator:
    """answers(images): a list where images have a length, else the iterator. UserError for one image alone."""
    one = isinstance(images, str | bytes | bytearray | memoryview | os.PathLike | PillowImage.Image)
    if one or getattr(images, "ndim", 4) < 4:
        raise UserError(f"expected several images, found one {type(images).__name__}: write [image], a list")
    if not isinstance(images, Iterable):
        raise UserError(f"expected a list or an iterator of images, found {type(images).__name__}; each is: {EXPECTED}")
    return list(answers(images)) if hasattr(images, "__len__") else answers(images)


def viewed(image: Any) -> np.ndarray | None:
    """An image in colour to look at, [H, W, 3] uint8; None where it has other channels or cannot be read."""
    try:
        return decode.decode(_opened(image))
    except (DecodeError, OSError):
        return None
