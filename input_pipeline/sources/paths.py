"""Files on local disks and behind gs://, s3:// and the like: listed with sizes and times, read whole or in part.

Local paths use the operating system directly; everything with a scheme goes through fsspec, whose drivers (gcsfs, s3fs)
are the user's to install. A file is opened for each read: descriptors then need no cache, limit or lock, for 10 us.
"""

import glob
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from input_pipeline.errors import UserError
from input_pipeline.sources.base import digest

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

SCAN_THREADS = 16
DRIVERS = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "az": "adlfs", "abfs": "adlfs"}
STAMPS = ("mtime", "LastModified", "updated", "last_modified", "created", "etag", "ETag")


class File(NamedTuple):
    """name: path, relative to what was listed or whole; size in bytes; stamp: changes with the content."""

    name: str
    size: int
    stamp: str


def is_remote(path: str) -> bool:
    """Whether this is an address such as gs://... and not a local path."""
    return "://" in path


def filesystem(path: str) -> tuple["AbstractFileSystem", str]:
    """The fsspec file system of a path with a scheme, and the path inside it."""
    import fsspec

    scheme = path.split("://")[0]
    try:
        return fsspec.core.url_to_fs(path)
    except ImportError as error:
        driver = DRIVERS.get(scheme, "its fsspec driver")
        raise UserError(f"{path} needs {driver}: pip install {driver}") from error
    except ValueError as error:
        raise UserError(f"{path}: unknown scheme {scheme}://; expected a local path, gs:// or s3://") from error


def read(path: str, start: int = 0, length: int | None = None) -> bytes:
    """Bytes of a file from `start`: `length` of them, or fewer where the file ends; None: all. Raises OSError."""
    if is_remote(path):
        fs, inside = filesystem(path)
        try:
            return fs.cat_file(inside, start=start, end=None if length is None else start + length)
        except OSError:
            raise
        except Exception as error:  # each driver has kinds of its own for a failed request
            raise OSError(f"{path}: {error}") from error
    with open(path, "rb", buffering=0) as file:
        if length is None:
            file.seek(start)
            return file.read()
        return os.pread(file.fileno(), length, start)


def open_file(path: str) -> BinaryIO:
    """A local or remote file to read bytes from."""
    if is_remote(path):
        fs, inside = filesystem(path)
        return fs.open(inside, "rb")
    return open(path, "rb")


def list_tree(root: str) -> list[File]:
    """All files under a folder, by their names relative to it with forward slashes, sorted; hidden ones left out.

    Raises UserError where the folder does not exist. Links to folders are followed two levels deep (split and class).
    """
    if is_remote(root):
        fs, inside = filesystem(root)
        if not fs.exists(inside):
            raise UserError(f"{root} does not exist")
        base = inside.rstrip("/") + "/"
        found = [_remote_file(name[len(base) :], info) for name, info in fs.find(inside, detail=True).items()]
    else:
        root = os.path.expanduser(root)
        if not os.path.isdir(root):
            raise UserError(f"{root} {'is not a folder' if os.path.exists(root) else 'does not exist'}")
        found = list(_local_tree(root))
    return sorted(file for file in found if not any(part.startswith(".") for part in file.name.split("/")))


def _local_tree(root: str) -> Iterator[File]:
    folders, depth = [""], 0
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        while folders:
            scanned = list(pool.map(lambda folder, depth=depth: _scan(root, folder, depth < 2), folders))
            for files, _ in scanned:
                yield from files
            folders, depth = [folder for _, inner in scanned for folder in inner], depth + 1


def _scan(root: str, folder: str, follow: bool) -> tuple[list[File], list[str]]:
    files, folders = [], []
    with os.scandir(os.path.join(root, folder)) as entries:
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=follow):
                folders.append(name)
            elif entry.is_file():
                stat = entry.stat()
                files.append(File(name, stat.st_size, str(stat.st_mtime_ns)))
    return files, folders


def names_in(folder: str) -> set[str]:
    """Names of what lies directly in a folder; none where there is no such folder."""
    try:
        if is_remote(folder):
            fs, inside = filesystem(folder)
            return {name.rstrip("/").rpartition("/")[2] for name in fs.ls(inside, detail=False)}
        return set(os.listdir(os.path.expanduser(folder)))
    except (FileNotFoundError, NotADirectoryError):
        return set()


def match(pattern: str, kind: str) -> list[File]:
    """The files that a pattern matches, by whole path, sorted. Raises UserError where there are none."""
    if is_remote(pattern):
        fs, inside = filesystem(pattern)
        scheme = pattern.split("://")[0]
        found = fs.glob(inside, detail=True)
        files = [_remote_file(f"{scheme}://{name.lstrip('/')}", info) for name, info in found.items()]
    else:
        paths = glob.glob(os.path.expanduser(pattern), recursive=True)
        files = [File(p, os.path.getsize(p), str(os.stat(p).st_mtime_ns)) for p in paths if os.path.isfile(p)]
    if not files:
        hint = "; a range such as {000..099} is written [0-9][0-9][0-9]" if ".." in pattern and "{" in pattern else ""
        raise UserError(f"data.source={kind}={pattern} matches no file: expected a path, * and ? stand for any{hint}")
    return sorted(files)


def _remote_file(name: str, info: dict) -> File:
    stamp = next((str(info[key]) for key in STAMPS if info.get(key)), "")
    return File(name, int(info.get("size") or 0), stamp)


def fingerprint(files: list[File]) -> str:
    """Changes when one of the files does: its name, size or stamp."""
    return digest(*(f"{name}\t{size}\t{stamp}" for name, size, stamp in files))


def class_list(folder: str) -> tuple[str, ...] | None:
    """The lines of `classes.txt` in a folder: the class names, in the order of their numbers. None: no such file."""
    try:
        text = read(f"{folder}/classes.txt").decode()
    except FileNotFoundError:
        return None
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not names or len(set(names)) != len(names):
        raise UserError(f"{folder}/classes.txt has {len(names)} lines: expected class names, one a line, none twice")
    return names
