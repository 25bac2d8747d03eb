"""The height and width of every image of a source, read once and kept in the user's cache.

Packing is planned on sizes, so they must be known before any pixel is read. A header read costs 0.02-0.07 ms an image:
about a minute for 1.3 M local files, which is why the result is kept under the source's fingerprint, where every run
on the same data finds it. Each host keeps its own copy: sizes are facts of the data and come out equal everywhere.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from input_pipeline.decode import header_size
from input_pipeline.errors import DecodeError

if TYPE_CHECKING:  # the sources keep their own indices through this file
    from input_pipeline.sources.base import Source

VERSION = 1  # part of the key: raise it when `header_size` gives other sizes for the same bytes
HEAD = 65536  # bytes that hold the header of nearly every JPEG and PNG
CHUNK = 256  # images a task


def cache_dir(name: str) -> Path:
    """The folder `name` of the user's cache, ~/.cache/navit_jax unless NAVIT_JAX_CACHE says otherwise; not created."""
    return Path(os.environ.get("NAVIT_JAX_CACHE") or "~/.cache/navit_jax").expanduser() / name


def write_cached(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Writes a cache file whole or not at all; a cache that cannot be written costs time later, so it only warns."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        logging.getLogger(__name__).warning("cache not written (%s); NAVIT_JAX_CACHE names another folder", error)


def sizes(
    source: "Source", cache_dir: str | Path | None = None, num_threads: int = 8, progress: bool = True
) -> np.ndarray:
    """Heights and widths [N, 2] int32 in pixels after EXIF rotation; (0, 0) where the header cannot be read.

    cache_dir: where results are kept; None: `sizes` in the user's cache. A source that knows its sizes is neither read
    nor cached, and a result with unreachable images (not merely broken ones) is not kept.
    """
    known = source.known_sizes()
    if known is not None:
        return np.asarray(known, np.int32)
    key = hashlib.blake2b(f"{VERSION} {source.fingerprint()}".encode(), digest_size=16).hexdigest()
    path = (_default_folder() if cache_dir is None else Path(cache_dir)) / f"{key}.npy"
    cached = _load(path, len(source))
    if cached is not None:
        return cached
    found, unreachable = _read_sizes(source, num_threads, progress)
    if not unreachable:
        write_cached(path, lambda file: np.save(file, found))
    return found


def _default_folder() -> Path:
    return cache_dir("sizes")


def _load(path: Path, images: int) -> np.ndarray | None:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == (images, 2) and found.dtype == np.int32 else None


def _read_sizes(source: "Source", num_threads: int, progress: bool) -> tuple[np.ndarray, int]:
    """Sizes [N, 2], and how many images could not be reached."""
    from tqdm import tqdm

    found, unreachable = np.zeros((len(source), 2), np.int32), 0

    def read(start: int) -> int:
        failed = 0
        for i in range(start, min(start + CHUNK, len(found))):
            try:
                found[i] = _size(source, i)
            except DecodeError:
                pass
            except OSError:
                failed += 1
        return failed

    bar = tqdm(total=len(found), desc="image sizes (once)", unit="image", delay=2, disable=not progress)
    with bar, ThreadPoolExecutor(max(num_threads, 1)) as pool:
        for failed in pool.map(read, range(0, len(found), CHUNK)):
            unreachable += failed
            bar.update(min(CHUNK, len(found) - bar.n))
    return found, unreachable


def _size(source: "Source", i: int) -> tuple[int, int]:
    """From the first bytes where the source can give them alone and they suffice, else from the whole image."""
    head = getattr(source, "head", None)
    if head is not None:
        start = head(i, HEAD)
        try:
            return header_size(start, complete=len(start) != HEAD)
        except DecodeError:
            if len(start) != HEAD:
                raise
    return header_size(source[i].data)
