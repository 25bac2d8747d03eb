"""Every kind of source on small data written here: splits, labels, texts, errors, and what workers need of a source."""

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from picture_files import picture, write
from PIL import Image

from configs import base
from input_pipeline import stream
from input_pipeline.decode import decode, header_size
from input_pipeline.errors import DecodeError, UserError
from input_pipeline.sources import Record, open_source, tar
from input_pipeline.sources.embedded import digits_split
from input_pipeline.sources.shapes import CLASS_NAMES


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NAVIT_JAX_CACHE", str(tmp_path / "cache"))


def example(i: int, **fields) -> bytes:
    from tensorflow_datasets.proto import tf_example_pb2

    proto = tf_example_pb2.Example()
    for name, value in ({"image": picture(i), "label": [i % 3], "caption": f"text {i}".encode()} | fields).items():
        if isinstance(value, bytes):
            proto.features.feature[name].bytes_list.value.append(value)
        elif value is not None:
            proto.features.feature[name].int64_list.value.extend(value)
    return proto.SerializeToString()


def write_array_record(path, records):
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def write_tar(path, samples, format=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=format) as shard:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))


def write_tfds(root, kind="array_record", name="tiny", label="class"):
    """A prepared TFDS dataset of 20 + 5 images in three shards, written without TensorFlow."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import dataset_info, example_serializer, file_adapters, naming, splits

    folder = root / name / "1.0.0"
    folder.mkdir(parents=True)
    one = tfds.features.ClassLabel(names=["a", "b", "c"])
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "label": {"class": one, "set": tfds.features.Sequence(one), "number": np.int64}[label],
            "text": tfds.features.Text(),
            "boxes": tfds.features.Sequence({"box": tfds.features.BBoxFeature()}),
        }
    )
    identity = dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name="test"
    )
    info = dataset_info.DatasetInfo(builder=identity, features=features)
    info.set_file_format(kind)
    adapter = file_adapters.ADAPTER_FOR_FORMAT[info.file_format]
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    infos = []
    for split, ids in {"train": range(20), "validation": range(20, 25)}.items():
        shards = np.array_split(ids, 3)
        template = naming.ShardedFileTemplate(
            dataset_name=name, data_dir=str(folder), split=split, filetype_suffix=kind
        )
        for k, shard in enumerate(shards):
            rows = [
                {
                    "image": picture(i),
                    "label": [i % 3, (i + 1) % 3] if label == "set" else i % 3,
                    "text": f"text {i}",
                    "boxes": [],
                }
                for i in map(int, shard)
            ]
            encoded = [(i, serializer.serialize_example(features.encode_example(row))) for i, row in enumerate(rows)]
            adapter.write_examples(template.sharded_filepath(shard_index=k, num_shards=3), encoded)
        lengths = [len(shard) for shard in shards]
        infos.append(splits.SplitInfo(name=split, shard_lengths=lengths, num_bytes=1, filename_template=template))
    info.set_splits(splits.SplitDict(infos))
    info.write_to_directory(str(folder))


def hugging_face(ids, label="class"):
    import datasets

    one = datasets.ClassLabel(names=["a", "b", "c"])
    kinds = {"class": one, "set": datasets.Sequence(one), "number": datasets.Value("int64")}
    features = datasets.Features(
        {"image": datasets.Image(), "label": kinds[label], "caption": datasets.Value("string")}
    )
    rows = [
        {
            "image": {"bytes": picture(i), "path": None},
            "label": [i % 3] if label == "set" else i % 3,
            "caption": f"text {i}",
        }
        for i in ids
    ]
    return datasets.Dataset.from_list(rows, features=features)


def make(kind, root) -> str:
    """Writes 20 training images or more of three classes in this kind; returns the spec."""
    if kind == "folder":
        write(root, [f"{split}/{i % 3}/{i}.png" for split in ("train", "val") for i in range(20)])
        return f"folder={root}"
    if kind == "tar":
        for shard in range(2):
            ids = range(10 * shard, 10 * shard + 10)
            pairs = [((f"{i}.png", picture(i)), (f"{i}.cls", b"%d" % (i % 3))) for i in ids]
            texts = [(f"{i}.txt", f"text {i}\n".encode()) for i in ids]
            write_tar(root / f"s{shard}.tar", [part for pair in pairs for part in pair] + texts)
        return f"tar={root}/s*.tar"
    if kind == "array_record":
        for shard in range(2):
            ids = range(10 * shard, 10 * shard + 10)
            write_array_record(root / f"s{shard}.array_record", [example(i) for i in ids])
        return f"array_record={root}/s*.array_record"
    if kind.startswith("tfds"):
        write_tfds(root, kind.partition(" ")[2])
        return f"tfds={root}/tiny/1.0.0"
    import datasets

    datasets.DatasetDict({"train": hugging_face(range(20)), "test": hugging_face(range(5))}).save_to_disk(root)
    return f"hf={root}"


KINDS = ["folder", "tar", "array_record", "tfds array_record", "tfds parquet", "hf"]
EMBEDDED = ["digits", "shapes", "photos"]


@pytest.mark.parametrize("kind", [*KINDS, *EMBEDDED])
def test_what_every_source_promises(kind, tmp_path):
    spec = kind if kind in EMBEDDED else make(kind, tmp_path)
    source = open_source(spec, "train")
    again, held = open_source(spec, "train"), open_source(spec, "validation")
    assert source.fingerprint() == again.fingerprint() != held.fingerprint()
    assert source.class_names == held.class_names and len(source.class_names) >= 2
    count = min(len(source), 40)
    records = [source[i] for i in range(count)]
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint() == source.fingerprint() and copy.class_names == source.class_names
    with ThreadPoolExecutor(4) as pool:
        for other in (list(pool.map(source.__getitem__, range(count))), [copy[i] for i in range(count)]):
            for a, b in zip(records, other, strict=True):
                assert a[1:] == b[1:] and np.array_equal(a.data, b.data)
    for i, record in enumerate(records):
        assert isinstance(record, Record) and type(record.label) is int
        assert 0 <= record.label < len(source.class_names)
        assert isinstance(source.describe(i), str) and source.text(i) == copy.text(i) == source.text(i).strip()
        assert bool(source.text(i)) == (kind != "folder")
        size = header_size(record.data)
        assert size == decode(record.data).shape[:2]
        assert source.known_sizes() is None or tuple(source.known_sizes()[i]) == size
        if hasattr(source, "head"):
            assert source.head(i, 30) == record.data[:30] and source.head(i, 10**6) == record.data
    with pytest.raises(IndexError):
        source[len(source)]


def content(source) -> set:
    return {bytes(source[i].data) for i in range(len(source))}


@pytest.mark.parametrize("kind", KINDS)
def test_records_are_what_was_written(kind, tmp_path):
    source = open_source(make(kind, tmp_path), "train")
    for k in range(len(source)):
        record = source[k]
        i = int(decode(record.data)[0, 0, 0])
        assert record.data == picture(i)
        assert source.class_names[record.label] in (str(i % 3), "abc"[i % 3])
        assert source.text(k) == ("" if kind == "folder" else f"text {i}")


@pytest.mark.parametrize("kind", ["folder", "tar", "array_record", "hf"])
def test_data_without_splits_keeps_a_fixed_tenth(kind, tmp_path):
    count = 150
    if kind == "folder":
        write(tmp_path, [f"{i % 3}/{i}.png" for i in range(count)])
        spec = f"folder={tmp_path}"
    elif kind == "tar":
        samples = [(f"{i}.png", picture(i)) for i in range(count)]
        write_tar(tmp_path / "s.tar", samples + [(f"{i}.cls", b"1") for i in range(count)])
        spec = f"tar={tmp_path}/s.tar"
    elif kind == "array_record":
        write_array_record(tmp_path / "s", [example(i) for i in range(count)])
        spec = f"array_record={tmp_path}/s"
    else:
        hugging_face(range(count)).save_to_disk(tmp_path)
        spec = f"hf={tmp_path}"
    train, held = open_source(spec, "train"), open_source(spec, "validation")
    assert content(train) | content(held) == {picture(i) for i in range(count)}
    assert not content(train) & content(held)
    assert 5 <= len(held) <= 27  # 0.001 quantiles of a tenth of 150
    assert train.class_names == held.class_names
    everything = open_source(spec, "validation", hold_out=False)
    assert len(everything) == count == len(content(everything))
    with pytest.raises(UserError, match="no split 'tran'.*expected train or validation"):
        open_source(spec, "tran")


def test_held_out_images_stay_so_when_others_come(tmp_path):
    write(tmp_path, [f"{i % 3}/{i}.png" for i in range(100)])
    before = open_source(f"folder={tmp_path}", "validation")
    before = {before.describe(i) for i in range(len(before))}
    write(tmp_path, [f"{i % 3}/new {i}.png" for i in range(100)])
    after = open_source(f"folder={tmp_path}", "validation")
    assert before < {after.describe(i) for i in range(len(after))}


# --- embedded sets


def test_the_digits_split_never_changes():
    train, held = digits_split("train"), digits_split("validation")
    assert len(train) == 1437 and len(held) == 360
    assert sorted([*train, *held]) == list(range(1797))
    name = hashlib.sha256(",".join(map(str, held)).encode()).hexdigest()
    assert name == "b8b19bd28b08a2c3032507b9a445d9d456703eb4c34d021f7817abb213378353"
    source = open_source("digits", "validation")
    assert np.bincount([source[i].label for i in range(360)]).tolist() == [36] * 10


def test_digits_are_scikit_learns_enlarged():
    from sklearn.datasets import load_digits

    source, data = open_source("digits", "train"), load_digits()
    sizes = source.known_sizes()
    side, aspect = np.sqrt(sizes.prod(axis=1)), sizes[:, 1] / sizes[:, 0]
    assert side.min() >= 31 and side.max() <= 97 and side.std() > 10
    assert abs(np.log(aspect)).max() < 0.45 and np.log(aspect).std() > 0.2
    for i in range(0, 1437, 100):
        record, row = source[i], digits_split("train")[i]
        assert record.label == data.target[row]
        assert (record.data == record.data[:, :, :1]).all()
        small = Image.fromarray(record.data[..., 0]).resize((8, 8), Image.BOX)
        assert np.corrcoef(np.asarray(small).ravel(), data.images[row].ravel())[0, 1] > 0.95


def test_shapes_have_the_aspect_that_their_class_says():
    source = open_source("shapes", "train")
    assert len(source) == 50_000 and len(open_source("shapes", "validation")) == 2000
    sizes = source.known_sizes()
    side, aspect = np.sqrt(sizes.prod(axis=1)), sizes[:, 1] / sizes[:, 0]
    assert 95 < side.min() < 98 and 318 < side.max() < 321
    assert 0.79 < abs(np.log(aspect)).max() < 0.81
    labels = [source[i].label for i in range(120)]
    assert set(labels) == set(range(6))
    for i in range(120):
        record = source[i]
        bright = record.data.max(axis=2) >= 100
        rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        kind, shape = CLASS_NAMES[record.label].split()
        wanted = {"round": 1.0, "wide": 1.8, "tall": 1 / 1.8}[kind]
        assert abs(np.log(width / height / wanted)) < 0.08
        filled = bright[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean()
        assert abs(filled - (np.pi / 4 if shape == "ellipse" else 1)) < 0.04
        share = max(height / bright.shape[0], width / bright.shape[1])
        assert 0.5 < share < 0.97
        assert ("large" in source.text(i)) == (share >= 0.75) or abs(share - 0.75) < 0.01
        assert record.data[~bright].max() < 48
        assert f"{kind} {shape}" in source.text(i)
        middle = (columns[0] + columns[-1]) / 2 / bright.shape[1]
        assert ("left" in source.text(i)) <= (middle < 0.44) and ("right" in source.text(i)) <= (middle > 0.56)


def test_no_shape_is_in_both_splits():
    train, held = open_source("shapes", "train"), open_source("shapes", "validation")
    assert not {held[i].data.tobytes() for i in range(100)} & {train[i].data.tobytes() for i in range(100)}


def test_photos_are_crops_of_very_different_aspects():
    from sklearn.datasets import load_sample_images

    source, photos = open_source("photos", "train"), load_sample_images().images
    assert len(source) == 16 and source.class_names == ("china", "flower")
    aspect = source.known_sizes()[:, 1] / source.known_sizes()[:, 0]
    assert aspect.max() / aspect.min() > 4
    for i in (0, 1):
        assert source[i].data.tobytes()[:90] in photos[source[i].label].tobytes()


# --- folders


def test_class_numbers_are_sorted_names_and_only_images_count(tmp_path, caplog):
    write(tmp_path, ["train/b é/1.JPG", "train/a/x/2.png", "train/.hidden/3.png", "train/a/.4.png", "val/a/5.png"])
    write(tmp_path, ["val/b é/6.webp", "train/a/notes.txt", "loose.png", "train/lost.png"])
    source = open_source(f"folder={tmp_path}", "train")
    assert source.class_names == ("a", "b é")
    names = sorted(os.path.relpath(source.describe(i), tmp_path) for i in range(len(source)))
    assert names == ["train/a/x/2.png", "train/b é/1.JPG"]
    assert "2 images are in no class folder" in caplog.text


def test_a_class_may_be_called_train(tmp_path):
    write(tmp_path, [f"{kind}/{i}.png" for kind in ("train", "bus") for i in range(30)])
    assert open_source(f"folder={tmp_path}", "train").class_names == ("bus", "train")


@pytest.mark.parametrize("held", ["val", "validation", "valid", "test"])
def test_names_of_the_held_out_folder(held, tmp_path):
    write(tmp_path, ["train/a/1.png", "train/b/2.png", f"{held}/a/3.png", f"{held}/b/4.png"])
    source = open_source(f"folder={tmp_path}", "validation")
    assert len(source) == 2 and f"/{held}/" in source.describe(0)
    with pytest.raises(UserError, match=f"no split 'extra', only train, {held}"):
        open_source(f"folder={tmp_path}", "extra")


def test_validation_is_preferred_to_test(tmp_path):
    write(tmp_path, [f"{split}/a/1.png" for split in ("train", "val", "test")])
    assert "/val/" in open_source(f"folder={tmp_path}", "validation").describe(0)
    assert "/test/" in open_source(f"folder={tmp_path}", "test").describe(0)


def test_a_lone_train_folder_gives_up_a_tenth(tmp_path):
    write(tmp_path, [f"train/{i % 2}/{i}.png" for i in range(100)])
    train, held = (open_source(f"folder={tmp_path}", split) for split in ("train", "validation"))
    assert len(train) + len(held) == 100 and len(held) > 2
    assert len(open_source(f"folder={tmp_path}", "train", hold_out=False)) == 100


def test_links_are_followed_to_classes_and_not_in_circles(tmp_path):
    write(tmp_path / "real", ["1.png"])
    (tmp_path / "base/a").mkdir(parents=True)
    write(tmp_path / "base", ["a/2.png"])
    (tmp_path / "base/b").symlink_to(tmp_path / "real")
    (tmp_path / "base/a/again").mkdir()
    (tmp_path / "base/a/again/loop").symlink_to(tmp_path / "base")
    source = open_source(f"folder={tmp_path}/base", "train", hold_out=False)
    assert source.class_names == ("a", "b") and len(source) == 2


def test_a_folder_whose_data_changes_has_another_fingerprint(tmp_path):
    write(tmp_path, ["train/a/1.png", "train/b/2.png", "val/a/1.png", "val/b/2.png"])
    seen = {open_source(f"folder={tmp_path}", split).fingerprint() for split in ("train", "val")}
    assert len(seen) == 2

    def changed():
        seen.add(open_source(f"folder={tmp_path}", "train").fingerprint())
        return len(seen)

    (tmp_path / "train/a/1.png").write_bytes(picture(9))
    assert changed() == 3
    os.utime(tmp_path / "train/a/1.png", (1, 1))
    assert changed() == 4
    (tmp_path / "train/a/1.png").rename(tmp_path / "train/a/3.png")
    assert changed() == 5
    (tmp_path / "val/a/1.png").write_bytes(picture(9))
    assert changed() == 5


def test_an_image_that_vanished_is_an_error_of_that_image_alone(tmp_path):
    write(tmp_path, ["train/a/1.png", "train/b/2.png"])
    source = open_source(f"folder={tmp_path}", "train", hold_out=False)
    (tmp_path / "train/a/1.png").unlink()
    with pytest.raises(OSError, match=r"1\.png"):
        source[0]
    assert source[1].label == 1


@pytest.mark.parametrize(
    "names,message",
    [
        ([], "found it empty; expected images in one folder a class"),
        (["a.txt"], "found 1 files, none of them an image"),
        (["1.png", "2.png"], "found 2 images directly in it"),
        (["train/a/1.png", "val/b/1.png"], "differ: only in train/: a; only in val/: b"),
        (["train/a/1.png", "train/b/1.png", "val/a/1.png"], "train/ has 2 .* val/ has 1, .*only in train/: b"),
        (["a/4.png"], "no image is left in the part that is held out"),
    ],
)
def test_mistakes_in_folders(names, message, tmp_path):
    write(tmp_path, names)
    with pytest.raises(UserError, match=message):
        open_source(f"folder={tmp_path}", "validation")


def test_a_missing_folder_and_a_file_instead(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist; expected images in one folder a class"):
        open_source(f"folder={tmp_path}/nowhere", "train")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        open_source(f"folder={tmp_path}/file", "train")


# --- behind a scheme: fsspec's in-memory file system stands for gs:// and s3://


@pytest.fixture
def memory():
    import fsspec

    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/", recursive=True)


def test_a_remote_folder(memory):
    for i in range(60):
        memory.pipe(f"/data/{i % 3}/{i}.png", picture(i))
    memory.pipe("/data/readme.txt", b"")
    train, held = (open_source("folder=memory://data", split) for split in ("train", "validation"))
    assert content(train) | content(held) == {picture(i) for i in range(60)}
    assert train.head(0, 20) == train[0].data[:20]
    assert train.fingerprint() == open_source("folder=memory://data", "train").fingerprint()
    memory.rm(train.describe(0).removeprefix("memory:/"))
    with pytest.raises(OSError):
        train[0]
    memory.cat_file = lambda *a, **k: 1 / 0  # a driver's own kind of error
    with pytest.raises(OSError, match="memory://data/.*division"):
        train[1]
    del memory.cat_file
    for spec in ("folder=memory://nowhere", "tar=memory://nowhere/*.tar"):
        with pytest.raises(UserError, match="does not exist|matches no file"):
            open_source(spec, "train")


def test_remote_shards(memory, tmp_path):
    make("tar", tmp_path)
    for k in range(2):
        memory.pipe(f"/shards/s{k}.tar", (tmp_path / f"s{k}.tar").read_bytes())
    source = open_source("tar=memory://shards/s*.tar", "train", hold_out=False)
    assert content(source) == {picture(i) for i in range(20)} and source.text(0) == "text 0"


def test_a_scheme_without_its_driver(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match="pip install gcsfs"):
        open_source("folder=gs://bucket/data", "train")
    with pytest.raises(UserError, match="unknown scheme zz"):
        open_source("folder=zz://bucket/data", "train")


# --- tar shards


def test_labels_and_texts_of_tar_samples(tmp_path):
    long = "folder/" + "x" * 150
    samples = [
        ("a.jpg", picture(0)),
        ("a.json", json.dumps({"kind": 2, "caption": "a cat"}).encode()),
        ("b.cls", b"1\n"),
        ("b.txt", b" two words \n"),
        ("b.npy", b"features, not the image"),
        ("b.png", picture(1)),
        (f"{long}.seg.png", b"mask"),
        (f"{long}.PNG", picture(2)),
        ("note.txt", b"no image"),
    ]
    write_tar(tmp_path / "s.tar", samples)
    source = open_source(f"tar={tmp_path}/*.tar", "train", label_field="kind", hold_out=False)
    assert [source[i] for i in range(len(source))] == [
        Record(picture(0), 2),
        Record(picture(1), 1),
        Record(picture(2), -1),
    ]
    assert [source.text(i) for i in range(3)] == ["a cat", "two words", ""]
    assert source.class_names == ("0", "1", "2")
    assert source.describe(2).endswith(f"s.tar:{long}")


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tar_dialects(format, tmp_path):
    write_tar(tmp_path / "s.tar", [(f"{'d' * 90}/{'n' * 80}.png", picture(3))], format)
    source = open_source(f"tar={tmp_path}/s.tar", "train", hold_out=False)
    assert source[0].data == picture(3) and "n" * 80 in source.describe(0)


def test_named_and_multiple_classes(tmp_path):
    labels = {"a": ["dog", "cat"], "b": [], "c": "cat", "d": None}
    samples = [
        part
        for key, label in labels.items()
        for part in ((f"{key}.png", picture(0)), (f"{key}.json", json.dumps({"label": label}).encode()))
    ]
    write_tar(tmp_path / "s.tar", samples)
    spec = f"tar={tmp_path}/s.tar"
    with pytest.raises(UserError, match="the label 'dog': expected a number, or a name listed in classes.txt"):
        open_source(spec, "train", multi_label=True, hold_out=False)
    (tmp_path / "classes.txt").write_text("cat\ndog\nowl\n")
    source = open_source(spec, "train", multi_label=True, hold_out=False)
    assert [source[i].label for i in range(4)] == [(1, 0), (), (0,), -1]
    assert source.class_names == ("cat", "dog", "owl")
    with pytest.raises(UserError, match=r"has 2 labels \[1, 0\].*data.multi_label=True"):
        open_source(spec, "train", hold_out=False)[0]
    (tmp_path / "classes.txt").write_text("cat\n\ncat")
    with pytest.raises(UserError, match="none twice"):
        open_source(spec, "train", hold_out=False)


def test_shards_are_indexed_once_and_again_when_they_change(tmp_path, monkeypatch):
    spec = make("tar", tmp_path)
    before = open_source(spec, "train", hold_out=False)
    with monkeypatch.context() as patch:
        patch.setattr(tar, "_scan", lambda *a: pytest.fail("indexed again"))
        again = open_source(spec, "train", hold_out=False)
        assert [again[i] for i in range(20)] == [before[i] for i in range(20)]
    write_tar(tmp_path / "s1.tar", [("z.png", picture(50)), ("z.cls", b"0")])
    after = open_source(spec, "train", hold_out=False)
    assert len(after) == 11 and after.fingerprint() != before.fingerprint()
    for path in (tmp_path / "cache/tar").iterdir():
        path.write_bytes(b"not an index")
    assert len(open_source(spec, "train", hold_out=False)) == 11


def test_mistakes_in_shards(tmp_path):
    make("tar", tmp_path)
    whole = (tmp_path / "s0.tar").read_bytes()

    def refused(name, data, message):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message):
            open_source(f"tar={tmp_path}/{name}", "train")

    with tarfile.open(tmp_path / "z.tar.gz", "w:gz") as shard:
        shard.add(tmp_path / "s0.tar")
    refused("z.tar.gz", (tmp_path / "z.tar.gz").read_bytes(), "z.tar.gz is compressed.*unpack")
    refused("cut.tar", whole[:5000], "cut.tar is not a whole tar file")
    refused("cut2.tar", whole[: 512 + 10], "cut2.tar is not a whole tar file")
    refused("text.tar", b"hello" * 1000, "text.tar is not a whole tar file")
    refused("empty.tar", b"", "empty.tar is not a whole tar file")
    write_tar(tmp_path / "none.tar", [("a.txt", b"")])
    refused("none.tar", (tmp_path / "none.tar").read_bytes(), "no sample with an image among 1 shards")
    write_tar(tmp_path / "json.tar", [("a.png", picture(0)), ("a.json", b"{")])
    refused("json.tar", (tmp_path / "json.tar").read_bytes(), "json.tar:a has a .json or .cls file that cannot be read")
    (tmp_path / "classes.txt").write_text("only\n")
    refused("s0.tar", whole, "label 2, but classes.txt names 1 classes")
    with pytest.raises(UserError, match=r"matches no file.*\[0-9\]\[0-9\]"):
        open_source(f"tar={tmp_path}/s{{000..010}}.tar", "train")


# --- ArrayRecord


def test_classes_of_array_records(tmp_path):
    write_array_record(tmp_path / "s", [example(i, label=[0, 5] if i else []) for i in range(4)])
    spec = f"array_record={tmp_path}/s"
    source = open_source(spec, "train", multi_label=True, hold_out=False)
    assert [source[i].label for i in range(4)] == [(), (0, 5), (0, 5), (0, 5)]
    assert source.class_names == tuple("012345")
    with pytest.raises(UserError, match="has 2 labels"):
        open_source(spec, "train", hold_out=False)[1]
    (tmp_path / "classes.txt").write_text("a\nb\n")
    named = open_source(spec, "train", multi_label=True, hold_out=False)
    assert named.class_names == ("a", "b")
    with pytest.raises(DecodeError, match="there are 2 classes, from 0 to 1"):
        named[1]
    unlabeled = open_source(spec, "train", label_field="", hold_out=False)
    assert unlabeled[1].label == -1 and unlabeled.class_names == ()


def test_classes_are_counted_once(tmp_path, monkeypatch):
    spec = make("array_record", tmp_path)
    first = open_source(spec, "train")
    monkeypatch.setattr(type(first), "_labels", lambda self: pytest.fail("counted again"))
    assert open_source(spec, "train").class_names == first.class_names == ("0", "1", "2")


def test_mistakes_in_array_records(tmp_path):
    spec = make("array_record", tmp_path)
    with pytest.raises(UserError, match="no field 'picture', only caption, image, label: set data.image_field"):
        open_source(spec, "train", image_field="picture")
    with pytest.raises(UserError, match="no field 'tag', only .*set data.label_field \\(\"\": no labels\\)"):
        open_source(spec, "train", label_field="tag")
    (tmp_path / "bad").write_bytes(b"hello" * 100)
    with pytest.raises(UserError, match="not readable as ArrayRecord"):
        open_source(f"array_record={tmp_path}/bad", "train")
    write_array_record(tmp_path / "other", [b"\xff\xff\xff\xff" * 9] * 3)
    with pytest.raises(UserError, match="no tf.train.Example protos"):
        open_source(f"array_record={tmp_path}/other", "train")
    write_array_record(tmp_path / "holes", [example(0), example(1, image=None)])
    with pytest.raises(DecodeError, match="no image in field 'image'"):
        open_source(f"array_record={tmp_path}/holes", "train", hold_out=False)[1]


# --- TFDS


@pytest.mark.parametrize("kind", ["array_record", "parquet"])
def test_slices_of_tfds(kind, tmp_path):
    write_tfds(tmp_path, kind)
    spec = f"tfds={tmp_path}/tiny/1.0.0"
    for split, ids in {
        "train": range(20),
        "validation": range(20, 25),
        "train[:25%]": range(5),
        "train[5:16]": range(5, 16),
        "train[10:]": range(10, 20),
        "train[:3]+train[12:15]": [0, 1, 2, 12, 13, 14],
        "train[1:3]+validation": [1, 2, *range(20, 25)],
    }.items():
        source = open_source(spec, split)
        assert [source.text(i) for i in range(len(source))] == [f"text {i}" for i in ids], split
        assert source.class_names == ("a", "b", "c")
    assert "tensorflow" not in sys.modules


def test_tfds_by_name_and_version(tmp_path, monkeypatch):
    write_tfds(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for name in ("tiny", "tiny:1.0.0", str(tmp_path / "tiny/1.0.0")):
        assert len(open_source(f"tfds={name}", "train")) == 20


def test_other_labels_of_tfds(tmp_path):
    write_tfds(tmp_path, label="set")
    write_tfds(tmp_path, name="numbers", label="number")
    sets = open_source(f"tfds={tmp_path}/tiny/1.0.0", "train", multi_label=True)
    assert sets[4].label == (1, 2) and sets.class_names == ("a", "b", "c")
    numbers = open_source(f"tfds={tmp_path}/numbers/1.0.0", "train")
    assert numbers[4].label == 1 and numbers.class_names == ("0", "1", "2")
    assert open_source(f"tfds={tmp_path}/tiny/1.0.0", "train", label_field="")[0].label == -1


def test_mistakes_with_tfds(tmp_path, monkeypatch):
    write_tfds(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))

    def refused(name, message, split="train", **fields):
        with pytest.raises(UserError, match=message):
            open_source(f"tfds={name}", split, **fields)

    build = f"tfds build mnist --file_format=array_record --data_dir={tmp_path}"
    refused("mnist", f"mnist is not prepared in {tmp_path}; .*pip install tensorflow.*{build}")
    refused("mnistt", "did you mean mnist?.*tfds build mnistt")
    refused("tiny", r"no split 'test', only train \(20\), validation \(5\), or a slice", split="test")
    refused("tiny", "no field 'img', only boxes, image, label, text: set data.image_field", image_field="img")
    info = tmp_path / "tiny/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    refused("tiny", "tfrecord, which has no random access: convert it with `tfds convert_format")


# --- Hugging Face


def test_hugging_face_folders_and_labels(tmp_path):
    hugging_face(range(6), "set").save_to_disk(tmp_path / "sets")
    sets = open_source(f"hf={tmp_path}/sets", "train", multi_label=True, hold_out=False)
    assert sets[4] == Record(picture(4), (1,)) and sets.text(4) == "text 4" and sets.class_names == ("a", "b", "c")
    hugging_face(range(6), "number").save_to_disk(tmp_path / "numbers")
    numbers = open_source(f"hf={tmp_path}/numbers", "train", hold_out=False)
    assert numbers[4].label == 1 and numbers.class_names == ("0", "1", "2")


def test_hugging_face_reads_what_load_dataset_understands(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    write(
        tmp_path / "data", [f"{split}/{kind}/{i}.png" for split in ("train", "test") for kind in "ab" for i in (1, 2)]
    )
    source = open_source(f"hf={tmp_path}/data", "validation")
    assert source.class_names == ("a", "b") and len(source) == 4
    assert source[3].data == (tmp_path / "data/test/b/2.png").read_bytes() and source[3].label == 1


def test_hugging_face_arrays_keep_their_type(tmp_path):
    import datasets

    pixels = np.arange(2 * 4 * 3 * 5, dtype=np.uint16).reshape(2, 4, 3, 5) * 500
    features = datasets.Features(
        {"image": datasets.Array3D((4, 3, 5), "uint16"), "label": datasets.ClassLabel(names=["a"])}
    )
    rows = [{"image": image, "label": 0} for image in pixels]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path)
    source = open_source(f"hf={tmp_path}", "train", hold_out=False)
    np.testing.assert_array_equal(decode(source[1].data, channels=5, bits=16), pixels[1])


def test_mistakes_with_hugging_face(tmp_path, monkeypatch):
    spec = make("hf", tmp_path / "d")
    with pytest.raises(UserError, match="no such folder.*save_to_disk"):
        open_source("hf=user/name", "train")
    with pytest.raises(UserError, match="no split 'dev', only train, test"):
        open_source(spec, "dev")
    with pytest.raises(UserError, match="no field 'img', only caption, image, label"):
        open_source(spec, "train", image_field="img")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be opened as a Hugging Face dataset"):
        open_source(f"hf={tmp_path}/empty", "train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        open_source(spec, "train")


# --- texts


def tagged(i: int) -> dict:
    """Another text beside the caption, absent from the first record and in one of Latin-1."""
    return {"alt": {0: None, 5: "café".encode("latin-1")}.get(i, f" other {i}\n".encode())}


def write_texts(kind, root) -> str:
    """12 images, each with the texts `text i` and `other i` (field alt)."""
    ids = range(12)
    if kind == "array_record":
        write_array_record(root / "s", [example(i, **tagged(i)) for i in ids])
        return f"array_record={root}/s"
    if kind == "tar":
        jsons = [json.dumps({"caption": f"text {i}", "alt": f" other {i}\n"}).encode() for i in ids]
        jsons[0], jsons[5] = b'{"caption": "text 0"}', '{"caption": "text 5", "alt": "café"}'.encode("latin-1")
        write_tar(root / "s.tar", [part for i in ids for part in ((f"{i}.png", picture(i)), (f"{i}.json", jsons[i]))])
        return f"tar={root}/s.tar"
    data = hugging_face(ids).add_column("alt", [None if i == 0 else f" other {i}\n" for i in ids])
    data.save_to_disk(root)
    return f"hf={root}"


@pytest.mark.parametrize("kind", ["tar", "array_record", "hf"])
def test_a_named_text_field_and_its_mistakes(kind, tmp_path):
    spec = write_texts(kind, tmp_path)
    plain = open_source(spec, "train", label_field="", hold_out=False)
    named = open_source(spec, "train", label_field="", text_field="alt", hold_out=False)
    assert [plain.text(i) for i in range(5)] == [f"text {i}" for i in range(5)]
    assert [named.text(i) for i in range(5)] == ["", *(f"other {i}" for i in range(1, 5))]
    assert plain.fingerprint() != named.fingerprint()
    assert [plain[i] for i in range(12)] == [named[i] for i in range(12)]
    if kind != "hf":  # Arrow checks its strings
        with pytest.raises(DecodeError, match="the text is not UTF-8"):
            named.text(5)
    with pytest.raises(UserError, match="no .* field 'titel'.*set data.text_field|no field 'titel', only alt, caption"):
        open_source(spec, "train", text_field="titel", label_field="", hold_out=False)


def test_a_named_text_field_of_tfds(tmp_path):
    write_tfds(tmp_path)
    source = open_source(f"tfds={tmp_path}/tiny/1.0.0", "train", text_field="text")
    assert source.text(3) == "text 3"
    with pytest.raises(UserError, match="no field 'caption', only boxes, image, label, text: set data.text_field"):
        open_source(f"tfds={tmp_path}/tiny/1.0.0", "train", text_field="caption")
    with pytest.raises(DecodeError, match="the text is a dict of box: expected a string"):
        open_source(f"tfds={tmp_path}/tiny/1.0.0", "train", text_field="boxes").text(0)


def test_a_txt_file_is_preferred_to_the_json_unless_a_field_is_named(tmp_path):
    described = json.dumps({"text": ["one", "two"], "n": 7}).encode()
    both = [("a.png", picture(0)), ("a.txt", b"\xef\xbb\xbf from txt\r\n"), ("a.json", described)]
    write_tar(tmp_path / "s.tar", [*both, ("b.png", picture(1)), ("b.txt", b"caf\xe9")])
    spec = f"tar={tmp_path}/s.tar"
    plain = open_source(spec, "train", hold_out=False)
    assert plain.text(0) == "from txt"
    with pytest.raises(DecodeError, match="s.tar:b: the text is not UTF-8"):
        plain.text(1)
    assert plain[1].data == picture(1)
    named = open_source(spec, "train", text_field="text", hold_out=False)
    assert [named.text(0), named.text(1)] == ["one", ""]
    with pytest.raises(DecodeError, match="the text is 7: expected a string"):
        open_source(spec, "train", text_field="n", hold_out=False).text(0)


def test_tar_texts_without_an_image_and_doubled_names_are_counted(tmp_path, caplog):
    good = [part for i in range(20) for part in ((f"{i}.png", picture(i)), (f"{i}.txt", b"text %d" % i))]
    stray = [("x.txt", b"stray"), ("y.json", b'{"caption": "stray"}'), ("meta.json", b'{"n": 3}'), ("bad.json", b"{")]
    write_tar(tmp_path / "a.tar", [*good, *stray, ("odd.json", b"[1]"), ("z.cls", b"1")])
    write_tar(tmp_path / "b.tar", [*good, ("3.txt", b"another"), ("4.PNG", picture(40))])
    for _ in range(2):  # from the index in the cache as well
        source = open_source(f"tar={tmp_path}/*.tar", "train", hold_out=False)
        assert source.problems.counts == {tar.NO_IMAGE: 2, tar.DOUBLED: 2} and source.listed == 44
        assert source.problems.first[tar.NO_IMAGE] == [f"{tmp_path}/a.tar:x", f"{tmp_path}/a.tar:y"]
        assert source.problems.first[tar.DOUBLED] == [f"{tmp_path}/b.tar:3.txt", f"{tmp_path}/b.tar:4.PNG"]
        assert len(source) == 40 and source.text(23) == "another" and source[24].data == picture(40)
    config = base.get_config()
    config.data.update(source=f"tar={tmp_path}/*.tar", label_field="", max_bad_share=0.05)
    assert len(stream.open_images(config, "train").sizes)
    assert f"2 {tar.NO_IMAGE}: {tmp_path}/a.tar:x, {tmp_path}/a.tar:y" in caplog.text
    config.objective = "contrastive"
    with pytest.raises(UserError, match=r"4 of 44 rows and files in tar=.*2 texts without an image: .*a\.tar:x"):
        stream.open_images(config, "train")
    config.data.max_bad_share = 0.1
    assert stream.open_images(config, "train").texts is not None


def test_only_the_first_ten_of_all_shards_are_listed(tmp_path):
    for k in range(3):
        stray = [(f"{k}{i}.txt", b"stray") for i in range(6)]
        write_tar(tmp_path / f"{k}.tar", [(f"p{k}.png", picture(k)), *stray])
    problems = open_source(f"tar={tmp_path}/*.tar", "train", hold_out=False).problems
    assert problems.total() == 18
    assert problems.first[tar.NO_IMAGE] == [f"{tmp_path}/{k}.tar:{k}{i}" for k in range(2) for i in range(6)][:10]


def test_a_text_that_is_no_string_in_a_tars_json_is_missing_alone(tmp_path):
    texts = [b'{"text": {"raw": "x"}}', b'{"text": 7}', *(b'{"text": "%d"}' % i for i in range(8))]
    write_tar(
        tmp_path / "s.tar",
        [part for i, text in enumerate(texts) for part in ((f"{i}.png", picture(i)), (f"{i}.json", text))],
    )
    config = base.get_config()
    config.data.update(source=f"tar={tmp_path}/s.tar", eval_source="digits", label_field="", max_bad_share=0.2)
    config.objective = "contrastive"
    assert stream.open_images(config, "train").texts.missing.tolist() == [0, 1]
    config.data.max_bad_share = 0.1
    with pytest.raises(UserError, match="2 of 10 images in tar=.*have no caption that can be used"):
        stream.open_images(config, "train")


def test_the_first_of_several_captions_is_the_text(tmp_path):
    import datasets

    rows = [
        {"image": {"bytes": picture(i), "path": None}, "several": [f"a {i}", f"b {i}"], "nested": {"text": ["c"]}}
        for i in range(3)
    ]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "several": datasets.Sequence(datasets.Value("string")),
            "nested": {"text": datasets.Sequence(datasets.Value("string"))},
        }
    )
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path)

    def open_named(name):
        return open_source(f"hf={tmp_path}", "train", label_field="", text_field=name, hold_out=False)

    assert open_named("several").text(2) == "a 2" and open_named("nested").text(0) == "c"
    assert open_named("").text(0) == ""


def test_texts_need_no_image(tmp_path, monkeypatch):
    shapes = open_source("shapes", "train")
    wanted = shapes.text(7)
    monkeypatch.setattr(type(shapes), "_ground", lambda *a: pytest.fail("drawn"))
    assert shapes.text(7) == wanted
    source = open_source(write_texts("hf", tmp_path / "hf"), "train", hold_out=False)
    monkeypatch.setattr(type(source), "_read", lambda *a: pytest.fail("read"))
    assert source.text(7) == "text 7"
    (tmp_path / "tar").mkdir()
    source = open_source(write_texts("tar", tmp_path / "tar"), "train", hold_out=False)
    lengths, read = [], tar.paths.read
    monkeypatch.setattr(tar.paths, "read", lambda path, start, size: lengths.append(size) or read(path, start, size))
    assert source.text(7) == "text 7" and lengths == [len('{"caption": "text 7", "alt": " other 7\\n"}')]


# --- the setting itself


@pytest.mark.parametrize(
    "spec,message",
    [
        ("digit", "did you mean digits.*expected one of digits | shapes"),
        ("foldr=/x", "did you mean folder"),
        ("folder", "folder needs to know where"),
        ("tar=", "tar needs to know where"),
        ("digits=3", "digits takes no value"),
        ("", "expected one of digits"),
        (os.path.dirname(__file__), "a folder of images is given as folder="),
    ],
)
def test_mistakes_in_the_setting(spec, message):
    with pytest.raises(UserError, match=message):
        open_source(spec, "train")


@pytest.mark.parametrize("kind", EMBEDDED)
def test_splits_of_embedded_sets(kind):
    with pytest.raises(UserError, match=f"{kind} has no split 'test': expected train or validation"):
        open_source(kind, "test")


@pytest.mark.parametrize("spec", [*EMBEDDED, "folder=/x"])
def test_one_class_an_image_is_not_multi_label(spec):
    with pytest.raises(UserError, match="one class an image: data.multi_label needs"):
        open_source(spec, "train", multi_label=True)


def test_sources_start_neither_jax_nor_tensorflow_nor_grain():
    code = (
        "import sys; from input_pipeline import decode, size_index; from input_pipeline.sources import open_source\n"
        "size_index.sizes(open_source('digits', 'train')); decode.decode(open_source('photos', 'train')[0].data)\n"
        "print([m for m in ('jax', 'tensorflow', 'grain', 'tensorflow_datasets', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
