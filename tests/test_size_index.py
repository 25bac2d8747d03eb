"""The size index against a full decode, and its cache: found again, keyed on the data, never half written."""

import functools
import io
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from input_pipeline import size_index
from input_pipeline.decode import decode
from input_pipeline.errors import DecodeError, UserError
from input_pipeline.size_index import HEAD, cache_dir, sizes, write_cached
from input_pipeline.sources import Record, open_source


class Files:
    """Encoded images in memory that count how often they are read; `partial` ones can give their beginning alone."""

    class_names = ("only",)

    def __init__(self, files, name="files", partial=False):
        self.files, self.name, self.reads, self.heads = files, name, 0, 0
        if partial:
            self.head = self._head

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        self.reads += 1
        if isinstance(self.files[i], Exception):
            raise self.files[i]
        return Record(self.files[i], 0)

    def _head(self, i, num_bytes):
        self.heads += 1
        return self[i].data[:num_bytes]

    def describe(self, i):
        return str(i)

    def known_sizes(self):
        return None

    def fingerprint(self):
        return self.name


def encoded(height, width, format="JPEG", noise=False, **options):
    pixels = np.random.default_rng(0).integers(0, 256 if noise else 1, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@functools.cache
def mixed():
    return (
        *(encoded(10 + i % 50, 7 + i) for i in range(300)),
        encoded(20, 30, exif=rotated()),
        encoded(20, 30, "PNG"),
        encoded(20, 30, "WEBP", exif=rotated()),
        np.zeros((8, 9, 3), np.uint8),
    )


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("threads", [1, 4])
def test_sizes_are_those_of_the_decoded_images(partial, threads, tmp_path):
    files = mixed()[:-1] if partial else mixed()
    found = sizes(Files(files, partial=partial), tmp_path, num_threads=threads, progress=False)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, [decode(data).shape[:2] for data in files])


def test_large_files_are_read_from_their_beginning_where_that_is_enough(tmp_path):
    first = [encoded(300, 301, noise=True, quality=95), encoded(200, 201, "PNG", noise=True)]
    whole = [
        encoded(300, 302, "WEBP", noise=True, lossless=True, exif=rotated()),
        encoded(150, 151, "TIFF", noise=True),
    ]
    late = encoded(40, 50)  # 130 KB of application segments before the size
    late = late[:2] + (b"\xff\xe2\xff\xff" + bytes(65533)) * 2 + late[2:]
    assert min(map(len, [*first, *whole, late])) > HEAD
    source = Files([*first, *whole, late], partial=True)
    found = sizes(source, tmp_path, num_threads=1)
    assert found.tolist() == [[300, 301], [200, 201], [302, 300], [150, 151], [40, 50]]
    assert source.heads == 5 and source.reads == source.heads + 3


def test_found_again_without_reading(tmp_path):
    source = Files(mixed())
    first = sizes(source, tmp_path)
    reads = source.reads
    np.testing.assert_array_equal(sizes(source, tmp_path), first)
    assert source.reads == reads == len(source)
    sizes(Files(mixed(), name="other data"), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_unreadable_headers_are_zero_and_kept_unreachable_ones_are_not(tmp_path):
    broken = [encoded(5, 6), b"no image", DecodeError("no image in the record")]
    assert sizes(Files(broken), tmp_path).tolist() == [[5, 6], [0, 0], [0, 0]]
    assert len(list(tmp_path.iterdir())) == 1
    away = Files([encoded(5, 6), OSError("network")], name="away")
    assert sizes(away, tmp_path).tolist() == [[5, 6], [0, 0]]
    away.files[1] = encoded(7, 8)
    assert sizes(away, tmp_path).tolist() == [[5, 6], [7, 8]]


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"something else"])
def test_a_damaged_or_foreign_cache_file_is_made_anew(damage, tmp_path):
    source = Files(mixed())
    wanted = sizes(source, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage)
    np.testing.assert_array_equal(sizes(source, tmp_path), wanted)
    np.save(path, wanted[:3])
    np.testing.assert_array_equal(sizes(source, tmp_path), wanted)
    np.testing.assert_array_equal(np.load(path), wanted)


def test_a_cache_that_cannot_be_written_only_warns(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert sizes(Files([encoded(5, 6)]), tmp_path / "file/inside").tolist() == [[5, 6]]
    assert "cache not written" in caplog.text and "NAVIT_JAX_CACHE" in caplog.text


def test_writing_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "name"
    write_cached(path, lambda file: file.write(b"first"))

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    write_cached(path, fail)
    assert path.read_bytes() == b"first" and os.listdir(path.parent) == ["name"]
    assert stat.S_ISREG(path.stat().st_mode)


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.delenv("NAVIT_JAX_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(cache_dir("sizes")) == "/home/someone/.cache/navit_jax/sizes"
    monkeypatch.setenv("NAVIT_JAX_CACHE", str(tmp_path))
    sizes(Files([encoded(5, 6)]))
    assert [path.parent for path in tmp_path.glob("*/*.npy")] == [tmp_path / "sizes"]


def test_known_sizes_are_neither_read_nor_kept(tmp_path):
    source = open_source("shapes", "validation")
    np.testing.assert_array_equal(sizes(source, tmp_path), source.known_sizes())
    assert not list(tmp_path.iterdir())


def test_a_folder_changed_on_disk_is_indexed_again(tmp_path):
    path = tmp_path / "data/train/a/1.jpg"
    path.parent.mkdir(parents=True)
    for shape in ((5, 6), (7, 8)):
        path.write_bytes(encoded(*shape))
        source = open_source(f"folder={tmp_path}/data", "train", hold_out=False)
        assert sizes(source, tmp_path / "cache").tolist() == [list(shape)]


class Threads:
    """Processes of a run, played by threads: `gather` meets at a barrier, and one that does not come is an error."""

    def __init__(self, count):
        self.count, self.values, self.barrier = count, [None] * count, threading.Barrier(count, timeout=10)

    def run(self, sources, folders):
        """What `sizes` returns or raises in each."""

        def one(rank):
            try:
                return sizes(sources[rank], folders[rank], num_threads=2, progress=False, group=Member(self, rank))
            except UserError as error:
                return error

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(one, range(self.count)))


class Member:
    def __init__(self, threads, rank):
        self.threads, self.rank, self.count = threads, rank, threads.count

    def gather(self, x):
        self.threads.values[self.rank] = np.array(x)
        self.threads.barrier.wait()
        values = [v.copy() for v in self.threads.values]
        self.threads.barrier.wait()
        assert len({(v.shape, v.dtype) for v in values}) == 1
        return np.stack(values)


@pytest.mark.parametrize("count, images", [(2, 303), (3, 301), (4, 3), (3, 1)])
def test_processes_read_a_part_each_and_all_have_the_whole(count, images, tmp_path):
    files = mixed()[:images]
    sources = [Files(files) for _ in range(count)]
    wanted = sizes(Files(files), tmp_path / "alone", progress=False)
    for found in Threads(count).run(sources, [tmp_path / "shared"] * count):
        np.testing.assert_array_equal(found, wanted)
        assert found.dtype == np.int32
    reads = [source.reads for source in sources]
    assert sum(reads) == images and max(reads) == -(-images // count)
    (kept,) = (tmp_path / "shared").iterdir()
    np.testing.assert_array_equal(np.load(kept), wanted)
    for found in Threads(count).run(sources, [tmp_path / "shared"] * count):
        np.testing.assert_array_equal(found, wanted)
    assert [source.reads for source in sources] == reads


def test_only_the_first_process_writes_into_a_shared_folder(tmp_path, monkeypatch):
    writers = []
    monkeypatch.setattr(
        size_index, "write_cached", lambda path, write: (writers.append(path), write_cached(path, write))
    )
    Threads(3).run([Files(mixed()) for _ in range(3)], [tmp_path] * 3)
    assert len(writers) == 1


@pytest.mark.parametrize("holder", [0, 2])
def test_a_cache_in_one_process_alone_is_used_and_nobody_waits_for_ever(holder, tmp_path):
    folders = [tmp_path / str(rank) for rank in range(3)]
    wanted = sizes(Files(mixed()), folders[holder], progress=False)
    sources = [Files(mixed()) for _ in range(3)]
    for found in Threads(3).run(sources, folders):
        np.testing.assert_array_equal(found, wanted)
    assert sources[holder].reads == 0 and all(source.reads for source in sources if source is not sources[holder])
    for folder in folders:  # each host keeps its own where the folder is not shared
        (kept,) = folder.iterdir()
        np.testing.assert_array_equal(np.load(kept), wanted)


def test_an_image_that_one_process_cannot_reach_keeps_all_from_writing(tmp_path):
    files = [encoded(5, 6), b"no image", OSError("network"), encoded(7, 8)]
    sources = [Files(files) for _ in range(2)]
    for found in Threads(2).run(sources, [tmp_path, tmp_path]):
        assert found.tolist() == [[5, 6], [0, 0], [0, 0], [7, 8]]
    assert not list(tmp_path.iterdir())
    for source in sources:
        source.files = [*files[:2], encoded(9, 10), files[3]]
    for found in Threads(2).run(sources, [tmp_path, tmp_path]):
        assert found.tolist() == [[5, 6], [0, 0], [9, 10], [7, 8]]
    assert len(list(tmp_path.iterdir())) == 1


def test_processes_with_other_data_are_told_so_in_all_of_them(tmp_path):
    sources = [Files(mixed()), Files(mixed()), Files(mixed()[:7], name="copy")]
    errors = Threads(3).run(sources, [tmp_path] * 3)
    assert all(isinstance(error, UserError) for error in errors)
    assert all("process 0 has 304 images, and process 2 (7)" in str(error) for error in errors)
    assert not any(source.reads for source in sources)


def test_processes_with_other_data_are_told_so_where_sizes_are_known(tmp_path):
    sources = [open_source("shapes", split) for split in ("train", "validation")]
    assert all(isinstance(error, UserError) for error in Threads(2).run(sources, [tmp_path] * 2))
