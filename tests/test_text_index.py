"""All texts as token ids against a plain loop, and the cache: found again, keyed on all it depends on, shared."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from test_size_index import Member, Threads

from input_pipeline import size_index
from input_pipeline.errors import DecodeError, UserError
from input_pipeline.sources import open_source
from input_pipeline.text import encode, open_tokenizer
from input_pipeline.text_index import check_distinct, check_missing, read_texts

BYTES = open_tokenizer("bytes")


class Captions:
    """Texts in memory that count how often they are read; an exception in the place of a text is raised."""

    class_names = ()

    def __init__(self, texts, name="captions"):
        self.texts, self.name, self.reads = list(texts), name, 0

    def __len__(self):
        return len(self.texts)

    def text(self, i):
        self.reads += 1
        if isinstance(self.texts[i], Exception):
            raise self.texts[i]
        return self.texts[i]

    def describe(self, i):
        return f"image {i}"

    def fingerprint(self):
        return self.name


def mixed(count=700, seed=0):
    """Texts of 0 to 30 letters, many of them equal, some broken."""
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(list("ab C"), rng.integers(0, 4 if i % 2 else 31))) for i in range(count)]
    for i in rng.choice(count, count // 50, replace=False):
        texts[i] = DecodeError("broken")
    return texts


def read(texts, folder, group=None, **options):
    source = texts if isinstance(texts, Captions) else Captions(texts)
    options = dict(max_tokens=12, lower=True, progress=False, cache_dir=folder) | options
    return read_texts(source, options.pop("tokenizer", BYTES), group=group, **options)


def plain(texts, max_tokens=12, lower=True):
    """Ids of each text, their numbers, and how many were cut, by a plain loop."""
    ids, cut = [], 0
    for text in texts:
        found, was_cut = ([], False) if isinstance(text, Exception) else encode(BYTES, text, max_tokens, lower)
        ids.append(found)
        cut += was_cut
    first = [text for k, text in enumerate(ids) if text and text not in ids[:k]]
    return ids, [first.index(text) if text else -1 for text in ids], cut


def same(a, b):
    assert a.tokens.dtype == b.tokens.dtype and a.starts.dtype == b.starts.dtype == np.int64
    for x, y in ((a.tokens, b.tokens), (a.starts, b.starts), (a.numbers, b.numbers)):
        np.testing.assert_array_equal(x, y)
    assert a.cut == b.cut and a.numbers.dtype == b.numbers.dtype == np.int32


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("lower", [False, True])
def test_texts_are_those_of_a_plain_loop(threads, lower, tmp_path):
    texts = mixed()
    ids, numbers, cut = plain(texts, lower=lower)
    assert cut > 100 and max(numbers) < len(texts) / 1.3 and numbers.count(-1) > 14
    for found in (read(texts, tmp_path, lower=lower, num_threads=threads), read(texts, tmp_path, lower=lower)):
        assert [found.ids(i).tolist() for i in range(len(found))] == ids and found.ids(0).dtype == np.int32
        assert found.numbers.tolist() == numbers and found.cut == cut
        assert found.lengths.tolist() == list(map(len, ids)) and found.lengths.dtype == np.int64
        assert found.missing.tolist() == [i for i, text in enumerate(ids) if not text]
        assert found.tokens.dtype == np.uint16
        same(pickle.loads(pickle.dumps(found)), found)


def test_equal_numbers_are_equal_ids_and_nothing_else(tmp_path):
    texts = ["b", "a", "ab", "a", "", "A", "aba"[:2], "b b", "b  b"]
    assert read(texts, tmp_path).numbers.tolist() == [0, 1, 2, 1, -1, 1, 2, 3, 3]
    assert read(["same beginning 1", "same beginning 2"], tmp_path / "cut").numbers.tolist() == [0, 0]


@pytest.mark.parametrize("size, dtype", [(256, np.uint8), (257, np.uint16), (65_536, np.uint16), (65_537, np.uint32)])
def test_tokens_take_no_more_memory_than_the_vocabulary_needs(size, dtype, tmp_path):
    class Last:
        vocab_size, end = size, None

        def __call__(self, text):
            return [0, size - 1]

        def fingerprint(self):
            return f"last {size}"

    found = read(["a", "b"], tmp_path, tokenizer=Last())
    assert found.tokens.dtype == dtype and found.ids(1).tolist() == [0, size - 1]


def test_found_again_for_the_same_texts_and_settings_only(tmp_path):
    source = Captions(mixed())
    first = read(source, tmp_path)
    same(read(source, tmp_path), first)
    assert source.reads == len(source)

    class Other(type(BYTES)):
        def fingerprint(self):
            return "other"

    for k, options in enumerate((dict(max_tokens=13), dict(lower=False), dict(tokenizer=Other())), start=2):
        read(source, tmp_path, **options)
        assert source.reads == k * len(source) and len(list(tmp_path.iterdir())) == k
    read(Captions(mixed(), name="other data"), tmp_path)
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", b"something else"])
def test_a_damaged_or_foreign_cache_file_is_made_anew(damage, tmp_path):
    source = Captions(mixed())
    wanted = read(source, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage)
    same(read(source, tmp_path), wanted)
    stored = dict(np.load(path))
    for change in (dict(tokens=stored["tokens"][1:]), dict(states=stored["states"][1:])):
        np.savez(path, **stored | change)
        same(read(source, tmp_path), wanted)
    np.savez(path, tokens=stored["tokens"])
    same(read(source, tmp_path), wanted)
    assert source.reads == 5 * len(source)


def test_unreachable_texts_are_missing_and_tried_again(tmp_path):
    source = Captions(["one", OSError("network"), DecodeError("broken"), "two"])
    assert read(source, tmp_path).missing.tolist() == [1, 2] and not list(tmp_path.iterdir())
    source.texts[1] = "back"
    assert read(source, tmp_path).missing.tolist() == [2] and len(list(tmp_path.iterdir())) == 1


def test_the_cache_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("NAVIT_JAX_CACHE", str(tmp_path))
    read(["one"], None)
    assert [path.parent for path in tmp_path.glob("*/*.npz")] == [tmp_path / "texts"]


def test_what_is_missing_or_cut_is_logged(tmp_path, caplog):
    texts = ["x" * 30, "fine", *[""] * 11, DecodeError("no"), OSError("no"), "y" * 12]
    read(Captions(texts), tmp_path)
    messages = [record.getMessage() for record in caplog.records]
    assert messages[:10] == [f"no text, left out: image {i} (missing or empty)" for i in range(2, 12)]
    assert messages[10:] == [
        "13 of 16 images have no text",
        *(f"text is cut: image {i}" for i in (0, 15)),
        "2 of 16 texts are longer than 12 tokens and are cut",
    ]
    caplog.clear()
    read(Captions(["y" * 12] * 11, name="eleven"), tmp_path)
    assert len(caplog.records) == 11 and "image 10" not in caplog.text
    caplog.clear()
    read(Captions([DecodeError("no"), OSError("no"), "fine"]), tmp_path)
    assert "image 0 (unreadable)" in caplog.text and "image 1 (unreachable)" in caplog.text


def test_above_the_share_the_run_stops(tmp_path):
    source = Captions(["one", "", "three", "four"])
    texts = read(source, tmp_path)
    check_missing(texts, source, "tar=X", 0.25)
    with pytest.raises(UserError, match=r"1 of 4 images in tar=X .*max_bad_share=0.24; the first is image 1"):
        check_missing(texts, source, "tar=X", 0.24)
    none = Captions(["", ""])
    with pytest.raises(UserError, match="folder=X has no captions, .*data.text_field names .*captions.csv"):
        check_missing(read(none, tmp_path), none, "folder=X", 1.0)
    broken = Captions([DecodeError("the text is a dict of raw"), ""], name="broken")
    with pytest.raises(UserError, match="hf=X has no captions, .* the text is a dict of raw"):
        check_missing(read(broken, tmp_path), broken, "hf=X", 1.0)


def test_texts_that_are_all_equal_are_refused(tmp_path):
    beginning = "a photo of "
    for texts in ([beginning + "cats", beginning + "dogs", ""], ["same"] * 3):
        found = read(Captions(texts, name=texts[0]), tmp_path)
        with pytest.raises(UserError, match=r"all [23] texts in tar=X are equal.*max_tokens=12.*text_field"):
            check_distinct(found, "tar=X", 12)
    for texts in (["one", "", "two", "one"], ["alone", ""]):
        check_distinct(read(Captions(texts, name="fine" + texts[0]), tmp_path), "tar=X", 12)


def test_the_embedded_sets_have_texts(tmp_path):
    shapes = open_source("shapes", "validation")
    found = read_texts(shapes, BYTES, max_tokens=64, lower=True, cache_dir=tmp_path)
    assert not len(found.missing) and found.cut == 0 and 100 < found.numbers.max() < 2 * 8 * 6 * 3
    assert bytes((found.ids(7)[:-1] - 1).tolist()).decode() == shapes.text(7)
    digits = read_texts(open_source("digits", "validation"), BYTES, max_tokens=64, lower=True, cache_dir=tmp_path)
    assert digits.numbers.max() == 9


# --- several processes, played by threads


def together(sources, folders, tokenizers=None):
    """What `read_texts` returns or raises in each process."""
    threads = Threads(len(sources))

    def one(rank):
        tokenizer = tokenizers[rank] if tokenizers else BYTES
        try:
            return read(sources[rank], folders[rank], Member(threads, rank), tokenizer=tokenizer, num_threads=2)
        except UserError as error:
            return error

    with ThreadPoolExecutor(len(sources)) as pool:
        return list(pool.map(one, range(len(sources))))


@pytest.mark.parametrize("count, texts", [(2, 703), (3, 601), (4, 3), (3, 1)])
def test_processes_read_a_part_each_and_all_have_the_whole(count, texts, tmp_path):
    texts = mixed(texts)
    sources = [Captions(texts) for _ in range(count)]
    wanted = read(texts, tmp_path / "alone")
    for _ in range(2):
        for found in together(sources, [tmp_path / "shared"] * count):
            same(found, wanted)
    reads = [source.reads for source in sources]
    assert sum(reads) == len(texts) and max(reads) == -(-len(texts) // count)
    assert len(list((tmp_path / "shared").iterdir())) == 1


@pytest.mark.parametrize("holder", [0, 2])
def test_a_cache_in_one_process_alone_is_used(holder, tmp_path):
    folders = [tmp_path / str(rank) for rank in range(3)]
    wanted = read(mixed(), folders[holder])
    sources = [Captions(mixed()) for _ in range(3)]
    for found in together(sources, folders):
        same(found, wanted)
    assert sources[holder].reads == 0 and all(source.reads for source in sources if source is not sources[holder])
    for folder in folders:
        same(read(sources[holder], folder), wanted)
    assert sources[holder].reads == 0


def test_a_text_that_one_process_cannot_reach_keeps_all_from_writing(tmp_path):
    sources = [Captions(["one", "", OSError("network"), "two"]) for _ in range(2)]
    for found in together(sources, [tmp_path] * 2):
        assert found.missing.tolist() == [1, 2]
    assert not list(tmp_path.iterdir())


def test_only_the_first_process_logs(tmp_path, caplog):
    together([Captions(["one", "", "x" * 30]) for _ in range(3)], [tmp_path] * 3)
    assert len(caplog.records) == 4 and caplog.messages[-2] == "text is cut: image 2"


def test_processes_with_other_data_or_another_tokenizer_are_told_so_in_all_of_them(tmp_path):
    sources = [Captions(mixed()), Captions(mixed()), Captions(mixed(), name="copy")]
    errors = together(sources, [tmp_path] * 3)
    assert all(isinstance(error, UserError) and "process 2 (700) other" in str(error) for error in errors)

    class Other(type(BYTES)):
        def fingerprint(self):
            return "other"

    errors = together([Captions(mixed()) for _ in range(3)], [tmp_path] * 3, [BYTES, Other(), BYTES])
    assert all(isinstance(e, UserError) and "the same tokenizer: that of process 1 " in str(e) for e in errors)
    assert not list(tmp_path.iterdir()) and size_index.cache_dir("texts") != tmp_path
