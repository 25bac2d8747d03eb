"""The height and width of every image of a source, read once and kept in the user's cache.

Packing is planned on sizes, so they must be known before any pixel is read. A header read costs 0.02-0.07 ms an image:
about a minute for 1.3 M local files, which is why the result is kept under the source's fingerprint, where every run
on the same data finds it. The processes of a run read a part each and share the result; a host whose cache folder is
its own keeps a copy.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

import numpy as np

from input_pipeline.decode import header_size
from input_pipeline.errors import DecodeError, UserError

if TYPE_CHECKING:  # the sources keep their own indices through this file
    from input_pipeline.sources.base import Source

VERSION = 1  # part of the key: raise it when `header_size` gives other sizes for the same bytes
HEAD = 65536  # bytes that hold the header of nearly every JPEG and PNG
CHUNK = 256  # images a task


class Group(Protocol):
    """The processes that build an index together; all make the same calls."""

    rank: int
    count: int

    def gather(self, x: np.ndarray) -> np.ndarray:
        """Everyone's `x`, [count, ...], in the order of their ranks; of one shape and dtype everywhere."""


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
    source: "Source",
    cache_dir: str | Path | None = None,
    num_threads: int = 8,
    progress: bool = True,
    group: Group | None = None,
) -> np.ndarray:
    """Heights and widths [N, 2] int32 in pixels after EXIF rotation; (0, 0) where the header cannot be read.

    cache_dir: where results are kept; None: `sizes` in the user's cache. A source that knows its sizes is neither read
    nor cached, and a result with unreachable images (not merely broken ones) is not kept. group: the processes that all
    call this; each reads its part, the first shows progress and writes, and all return the same. Raises UserError in
    all of them where they do not have the same data.
    """
    key = hashlib.blake2b(f"{VERSION} {source.fingerprint()}".encode(), digest_size=16)
    check_same(source, key.digest(), group)
    known = source.known_sizes()
    if known is not None:
        return np.asarray(known, np.int32)
    path = (_default_folder() if cache_dir is None else Path(cache_dir)) / f"{key.hexdigest()}.npy"
    cached = _load(path, len(source))
    if everyone(cached is not None, group):
        return cached
    found, unreachable = _read_together(source, cached, num_threads, progress, group)
    if not unreachable:
        keep(path, lambda file: np.save(file, found), group)
    return found


def check_same(source: "Source", key: bytes, group: Group | None) -> None:
    """Raises UserError in all processes where their keys differ.

    Plans are made on sizes and texts alone: processes that see other data would train on other rows without a word.
    """
    if group is None:
        return
    keys = group.gather(np.frombuffer(key, np.uint8))
    counts = group.gather(np.array(len(source), np.int64))
    others = np.flatnonzero((keys != keys[0]).any(axis=1))
    if len(others):
        named = ", ".join(f"{r} ({counts[r]})" for r in others[:8]) + (", ..." if len(others) > 8 else "")
        raise UserError(
            f"the processes do not see the same data: process 0 has {counts[0]} images, and process {named} other "
            "images or other versions of them. Every host needs the same files with the same modification times (copy "
            "them with rsync -a or cp -a), or one shared folder."
        )


def everyone(yes: bool, group: Group | None) -> bool:
    """Whether it holds in all processes."""
    return yes if group is None else bool(group.gather(np.array(yes)).all())


def keep(path: Path, write: Callable[[BinaryIO], None], group: Group | None) -> None:
    """Written by process 0, then by those that do not find its file: their folder is not the same one."""
    lead = group is None or group.rank == 0
    if lead:
        write_cached(path, write)
    everyone(True, group)
    if not lead and not path.exists():
        write_cached(path, write)


def my_part(items: int, group: Group) -> tuple[int, int, int]:
    """The items of the largest part, and where this process's part starts and stops."""
    part = -(-items // group.count)
    return part, min(group.rank * part, items), min((group.rank + 1) * part, items)


def _default_folder() -> Path:
    return cache_dir("sizes")


def _load(path: Path, images: int) -> np.ndarray | None:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == (images, 2) and found.dtype == np.int32 else None


def _read_together(
    source: "Source", cached: np.ndarray | None, num_threads: int, progress: bool, group: Group | None
) -> tuple[np.ndarray, int]:
    """Sizes [N, 2] and how many images nobody could reach; a process that has them cached gives its part of that."""
    if group is None:
        return _read_sizes(source, 0, len(source), num_threads, progress)
    part, start, stop = my_part(len(source), group)
    if cached is None:
        mine, unreachable = _read_sizes(source, start, stop, num_threads, progress and group.rank == 0)
    else:
        mine, unreachable = cached[start:stop], 0
    padded = np.zeros((part, 2), np.int32)
    padded[: stop - start] = mine
    found = group.gather(padded).reshape(-1, 2)[: len(source)]
    return found, int(group.gather(np.array(unreachable, np.int64)).sum())


def _read_sizes(source: "Source", first: int, stop: int, num_threads: int, progress: bool) -> tuple[np.ndarray, int]:
    """Sizes [stop - first, 2], and how many of these images could not be reached."""
    from tqdm import tqdm

    found, unreachable = np.zeros((stop - first, 2), np.int32), 0

    def read(start: int) -> int:
        failed = 0
        for i in range(start, min(start + CHUNK, stop)):
            try:
                found[i - first] = _size(source, i)
            except DecodeError:
                pass
            except OSError:
                failed += 1
        return failed

    bar = tqdm(total=len(found), desc="image sizes (once)", unit="image", delay=2, disable=not progress)
    with bar, ThreadPoolExecutor(max(num_threads, 1)) as pool:
        for failed in pool.map(read, range(first, stop, CHUNK)):
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
