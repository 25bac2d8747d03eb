"""Captioned folders: what is one example, how they split, and every kind of bad line counted, listed and left out."""

import csv
import io
import json
import pickle

import numpy as np
import pytest
from picture_files import picture, write

from configs import navit_clip_quickstart
from input_pipeline import stream
from input_pipeline.errors import UserError
from input_pipeline.sources import open_source
from input_pipeline.sources.captions import CAPTION_FILES
from input_pipeline.sources.problems import check_share, report


def lines(rows, ending, columns=("file_name", "text")) -> bytes:
    """Rows as a captions file of this ending, written by other code than reads them."""
    if ending == "jsonl":
        return b"".join(json.dumps(dict(zip(columns, row, strict=False))).encode() + b"\n" for row in rows)
    file = io.StringIO(newline="")
    csv.writer(file).writerows([columns, *rows])
    return file.getvalue().encode()


def examples(source) -> list[tuple[bytes, str]]:
    return sorted((source[i].data, source.text(i)) for i in range(len(source)))


def opened(root, split="train", **options):
    return open_source(f"folder={root}", split, **{"hold_out": False} | options)


@pytest.mark.parametrize("name", CAPTION_FILES)
@pytest.mark.parametrize("direct", [False, True])
def test_a_row_is_an_example(name, direct, tmp_path, caplog):
    write(tmp_path, ["1.png", "deep/in folders/é.png", "deep/3.JPG"])
    rows = [
        ("1.png", 'two "quoted", words'),
        ("./deep/in folders/é.png", " über\nall "),
        ("deep/3.JPG", "third"),
        ("1.png", "another text of the first"),
    ]
    (tmp_path / name).write_bytes(lines(rows, name.rpartition(".")[2]))
    source = opened(f"{tmp_path}/{name}" if direct else tmp_path)
    assert [(source[i].data, source.text(i)) for i in range(len(source))] == [
        (picture(0), 'two "quoted", words'),
        (picture(1), "über\nall"),
        (picture(2), "third"),
        (picture(0), "another text of the first"),
    ]
    assert source.class_names == () and all(source[i].label == -1 for i in range(4))
    assert source.describe(3) == source.describe(0) == f"{tmp_path}/1.png"
    assert source.head(1, 20) == picture(1)[:20] and source.known_sizes() is None
    assert source.problems.total() == 0 and source.listed == 4 and not caplog.records
    numbers = source.image_numbers()
    assert numbers.dtype == np.int32 and numbers[0] == numbers[3] and len(set(numbers.tolist())) == 3
    copy = pickle.loads(pickle.dumps(source))
    assert examples(copy) == examples(source) and copy.fingerprint() == source.fingerprint()
    with pytest.raises(IndexError):
        source[4]


def test_named_columns_and_classes(tmp_path):
    write(tmp_path, ["1.png", "2.png", "3.png", "4.png"])
    columns = ("kind", "alt", "text", "file_name")
    rows = [
        ("10", "one", "-", "1.png"),
        ("9", "two", "-", "2.png"),
        ("", "three", "-", "3.png"),
        ("9", "four", "-", "4.png"),
    ]
    (tmp_path / "captions.csv").write_bytes(b"\xef\xbb\xbf" + lines(rows, "csv", columns))
    source = opened(tmp_path, text_field="alt", label_field="kind")
    assert [source.text(i) for i in range(4)] == ["one", "two", "three", "four"]
    assert source.class_names == ("9", "10") and [source[i].label for i in range(4)] == [1, 0, -1, 0]
    assert opened(tmp_path, text_field="alt").class_names == ()
    assert opened(tmp_path, text_field="alt").fingerprint() != source.fingerprint()
    (tmp_path / "captions.csv").unlink()
    rows = [
        {"file_name": "1.png", "caption": ["a", "b"], "label": "zebra"},
        {"file_name": "2.png", "caption": "7", "label": "ant"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)))
    source = opened(tmp_path)
    assert [source.text(0), source.text(1)] == ["a", "7"]
    assert source.class_names == ("ant", "zebra") and [source[0].label, source[1].label] == [1, 0]
    assert opened(tmp_path, label_field="").class_names == ()


# --- splits


@pytest.mark.parametrize("held", ["val", "validation", "valid", "test"])
def test_split_folders(held, tmp_path, caplog):
    for k, split in enumerate(("train", held)):
        write(tmp_path / split, ["images/1.png", "images/2.png"])
        rows = [("images/1.png", f"{split} one"), ("images/2.png", f"{split} two")]
        (tmp_path / split / f"metadata.{('csv', 'jsonl')[k]}").write_bytes(lines(rows, ("csv", "jsonl")[k]))
    for split, name in (("train", "train"), ("validation", held)):
        source = opened(tmp_path, split, hold_out=True)
        assert examples(source) == [(picture(0), f"{name} one"), (picture(1), f"{name} two")]
        assert f"/{name}/" in source.describe(0)
    with pytest.raises(UserError, match=f"no split 'extra', only train, {held}"):
        opened(tmp_path, "extra")
    assert not caplog.records
    (tmp_path / held / "metadata.jsonl").unlink()
    opened(tmp_path)
    assert f"/{held} has no captions file and is left out" in caplog.text


def test_a_tenth_of_the_images_is_held_out_with_all_their_captions(tmp_path):
    write(tmp_path, [f"{i}.png" for i in range(100)])
    rows = [(f"{i}.png", f"text {k} of {i}") for k in range(3) for i in range(100)]
    (tmp_path / "captions.csv").write_bytes(lines(rows, "csv"))
    train, held = (opened(tmp_path, split, hold_out=True) for split in ("train", "validation"))
    assert sorted(examples(train) + examples(held)) == sorted((picture(int(n[:-4])), text) for n, text in rows)
    images = [{data for data, _ in examples(source)} for source in (train, held)]
    assert not images[0] & images[1] and len(train) == 3 * len(images[0]) and 2 <= len(images[1]) <= 20
    assert train.fingerprint() != held.fingerprint()
    assert len(opened(tmp_path, "validation")) == 300
    direct = opened(f"{tmp_path}/captions.csv", "validation", hold_out=True)
    assert examples(direct) == examples(held)
    with pytest.raises(UserError, match="no split 'tran'"):
        opened(tmp_path, "tran", hold_out=True)


def test_a_captions_file_decides_what_a_folder_is(tmp_path, caplog):
    write(tmp_path, ["train/a/1.png", "train/b/2.png"])
    source = opened(tmp_path)
    assert source.class_names == ("a", "b") and source.text(0) == ""
    (tmp_path / "train/captions.csv").write_bytes(lines([("a/1.png", "one"), ("b/2.png", "two")], "csv"))
    source = opened(tmp_path)
    assert source.class_names == () and source.text(0) == "one"
    (tmp_path / "train/metadata.csv").write_bytes(lines([("a/1.png", "other")], "csv"))
    assert opened(tmp_path).text(0) == "one"
    assert "captions.csv, metadata.csv: captions.csv is used" in caplog.text


def test_the_fingerprint_follows_the_captions_and_the_images(tmp_path):
    write(tmp_path, ["1.png", "2.png", "3.png"])

    def fingerprint(rows, **options):
        (tmp_path / "captions.csv").write_bytes(lines(rows, "csv"))
        return opened(tmp_path, **options).fingerprint()

    rows = [("1.png", "one"), ("2.png", "two")]
    first = fingerprint(rows)
    assert fingerprint(rows) == first
    others = [fingerprint(rows[:1]), fingerprint([rows[0], ("2.png", "too")])]
    (tmp_path / "3.png").write_bytes(picture(9))
    assert fingerprint(rows) == first
    (tmp_path / "2.png").write_bytes(picture(9))
    assert len({first, fingerprint(rows), *others}) == 4


def test_a_remote_captioned_folder():
    import fsspec

    fs = fsspec.filesystem("memory")
    try:
        for split in ("train", "val"):
            for i in range(3):
                fs.pipe(f"/pairs/{split}/{i}.png", picture(i))
            fs.pipe(f"/pairs/{split}/captions.jsonl", lines([(f"{i}.png", f"{split} {i}") for i in range(3)], "jsonl"))
        assert examples(opened("memory://pairs")) == [(picture(i), f"train {i}") for i in range(3)]
        direct = opened("memory://pairs/val/captions.jsonl")
        assert examples(direct) == [(picture(i), f"val {i}") for i in range(3)]
    finally:
        fs.rm("/", recursive=True)


# --- bad input

CSV = b"""file_name,text,label
1.png,good one,
2.png,,
3.png
,no name,
1.png,caf\xe9,
1.png,good one,x
1.png, good one ,
gone.png,no image,
4.png,a cat, a dog,
5.png,"spread over
two lines",

1.png,good two,
"""
JSONL = rb"""{"file_name": "1.png", "text": "good one"}
{"file_name": "2.png", "text": ""}
{"file_name": "3.png", "text": null}
{"text": "no name"}
{"file_name": "1.png", "text": "good one"}
{"file_name": "1.png", "text": " good one\n"}
{"file_name": "gone.png", "text": "no image"}
["no object"]
{"file_name": "1.png", "text": "half
{"file_name": "1.png", "text": "half an emoji \ud83d"}
{"file_name": "5.png", "text": "spread over\ntwo lines"}

{"file_name": "1.png", "text": {"raw": "a dict"}}
{"file_name": "1.png", "text": 7}
{"file_name": "1.png", "text": NaN}
{"file_name": "1.png", "text": "good two"}
"""
WANTED = {
    "csv": (CSV, {"malformed rows": 2, "rows that are not UTF-8": 1, "rows without text": 2}),
    "jsonl": (
        JSONL + b'{"file_name": "2.png", "text": "caf\xe9"}\n',
        {"malformed rows": 6, "rows that are not UTF-8": 2, "rows without text": 2},
    ),
}


@pytest.mark.parametrize("ending", WANTED)
def test_each_kind_of_bad_input_is_counted_and_listed(ending, tmp_path, caplog):
    write(tmp_path, [f"{i}.png" for i in range(1, 7)])
    content, wanted = WANTED[ending]
    (tmp_path / f"captions.{ending}").write_bytes(content)
    source = opened(tmp_path)
    report(source, "folder=X")
    assert [source.text(i) for i in range(len(source))] == ["good one", "spread over\ntwo lines", "good two"]
    lonely = 4  # 2, 3, 4 and 6
    both = {"equal rows": 2, "captions whose image does not exist": 1, "images without a caption": lonely}
    assert source.problems.counts == wanted | both
    assert source.listed == sum(source.problems.counts.values()) + 3
    if ending == "jsonl":
        listed = source.problems.first["malformed rows"][-3:]
        assert (
            listed[0] == "line 13: the text is a dict of raw: expected a string"
            and "line 14: the text is 7" in listed[1]
        )
    assert "folder=X: 1 captions whose image does not exist: gone.png" in caplog.text
    assert "4 images without a caption: 2.png, 3.png, 4.png, 6.png" in caplog.text
    assert "2 equal rows: line" in caplog.text and "line 2" not in caplog.text.replace("line 2 (2.png)", "")
    assert caplog.messages[-1] == "folder=X: 1 of 2 images have several texts, and are as many examples"
    assert len(caplog.records) == len(source.problems.counts) + 1


def test_only_ten_of_a_kind_are_listed(tmp_path, caplog):
    write(tmp_path, ["0.png"])
    rows = [("0.png", "here"), *((f"gone{i:02}.png", "text") for i in range(25))]
    (tmp_path / "captions.csv").write_bytes(lines(rows, "csv"))
    report(opened(tmp_path), "folder=X")
    (record,) = caplog.records
    assert "25 captions whose image does not exist: gone00.png" in record.getMessage()
    assert "gone09.png, ..." in record.getMessage() and "gone10" not in record.getMessage()


def test_a_named_file_may_leave_images_out(tmp_path):
    write(tmp_path, ["1.png", "2.png"])
    (tmp_path / "train.csv").write_bytes(lines([("1.png", "one")], "csv"))
    assert opened(f"{tmp_path}/train.csv").problems.total() == 0
    (tmp_path / "captions.csv").write_bytes(lines([("1.png", "one")], "csv"))
    assert opened(tmp_path).problems.total() == 1


def test_above_the_share_the_run_stops(tmp_path):
    write(tmp_path, [f"{i}.png" for i in range(10)])
    rows = [(f"{i}.png", f"text {i}") for i in range(9)] + [("9.png", "")]
    (tmp_path / "captions.csv").write_bytes(lines(rows, "csv"))
    source = opened(f"{tmp_path}/captions.csv")
    check_share(source, "folder=X", 0.1)
    with pytest.raises(UserError, match=r"1 of 10 rows and files in folder=X.*max_bad_share=0.09: 1 rows without text"):
        check_share(source, "folder=X", 0.09)
    check_share(open_source("digits", "train"), "digits", 0.0)


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("captions.csv", b"", "has the columns none: expected file_name and text or caption"),
        ("captions.csv", b"name;text\n", "has the columns name;text: expected file_name and text or caption"),
        ("captions.csv", b"file_name,alt\n1.png,x\n", "has the columns file_name, alt: .*set data.text_field"),
        ("metadata.csv", b"image,size\n1.png,3\n", "rename the file if it does not hold captions"),
        ("captions.csv", b"caf\xe9,x\n", r"has the columns caf\?, x"),
        ("captions.csv", b"file_name,text\n", "no caption in .* can be used: 1 images without a caption"),
        (
            "captions.csv",
            b"file_name,text\nx/1.png,one\n",
            "can be used: 1 captions whose image does not exist: x/1.png",
        ),
        ("captions.csv", "file_name,text\n1.png,one\n".encode("utf-16"), "is UTF-16; expected UTF-8"),
        ("captions.csv", b"x" * 200_000, "has the columns none.*field larger"),
        ("captions.jsonl", b"", "has the columns none"),
        ("captions.jsonl", b"{\n{\n", "has the columns none: .*2 malformed rows: line 1"),
        ("captions.jsonl", b'{"file_name": "1.png", "alt": "x"}', "has the columns file_name, alt"),
        ("captions.jsonl", b'{"file_name": "1.png", "text": {"a": 1}}', "line 1: the text is a dict of a"),
    ],
)
def test_files_that_are_not_what_they_are_named_for(name, content, message, tmp_path):
    write(tmp_path, ["1.png"])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="(?i)" + message):
        opened(tmp_path)


def test_settings_that_do_not_fit(tmp_path):
    write(tmp_path, ["1.png"])
    (tmp_path / "captions.csv").write_bytes(lines([("1.png", "one")], "csv"))
    with pytest.raises(UserError, match="has the columns file_name, text: expected file_name and alt"):
        opened(tmp_path, text_field="alt")
    with pytest.raises(UserError, match="expected file_name and text or caption and kind"):
        opened(tmp_path, label_field="kind")
    with pytest.raises(UserError, match="multi_label"):
        opened(tmp_path, multi_label=True)
    with pytest.raises(UserError, match="No such file.*expected a captions file"):
        opened(f"{tmp_path}/nothing.csv")


def test_an_image_with_several_captions_is_evaluated_once(tmp_path):
    names = [f"{i}.png" for i in range(4)]
    write(tmp_path, names)
    rows = [(name, f"caption {k} of {name}") for k in range(3) for name in names]
    (tmp_path / "captions.csv").write_bytes(lines(rows, "csv"))
    config = navit_clip_quickstart.get_config(f"folder={tmp_path}")
    config.data.update(eval_source=config.data.source, label_field="")
    images = stream.open_images(config, "eval")
    (loader,) = stream.eval_loaders(config, [(images, 9, None)])
    seen = [i for batch, _ in loader for i in batch.index[batch.index >= 0].tolist()]
    assert len(images.sizes) == 12 and len(seen) == 4
    assert sorted(images.source.describe(i).rsplit("/")[-1].split()[0][:5] for i in seen) == names
