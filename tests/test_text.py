"""Tokenizers: the ids of each kind against its own library, what cutting keeps, and every way a file can be wrong."""

import pickle
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import base
from input_pipeline.errors import DecodeError, UserError
from input_pipeline.text import encode, filled, from_config, open_tokenizer

WORDS = ["a red dog", "a blue cat", "two red cats", "the dog and the cat"]


def hugging_face(path, start="", end="[END]", padding=False):
    """A word-level tokenizer.json with these special tokens; ids have a hole before the last."""
    tokenizers = pytest.importorskip("tokenizers")
    words = sorted({word for text in WORDS for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *words])} | {"[BEGIN]": 50, "[END]": 60}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["[BEGIN]", "[END]"])
    if start or end:
        template = " ".join(filter(None, [start, "$A", end]))
        special = [(name, vocabulary[name]) for name in (start, end) if name]
        made.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=special)
    if padding:
        made.enable_padding(length=20)
        made.enable_truncation(3)
    made.save(str(path))
    return str(path), vocabulary


def sentencepiece(path, **options):
    library = pytest.importorskip("sentencepiece")
    options = dict(vocab_size=30, hard_vocab_limit=False, minloglevel=2) | options
    with open(path, "wb") as file:
        library.SentencePieceTrainer.train(sentence_iterator=iter(WORDS * 20), model_writer=file, **options)
    return str(path)


@given(st.text())
def test_bytes_are_utf8_shifted_by_the_end(text):
    tokenizer = open_tokenizer("bytes")
    ids = tokenizer(text)
    assert ids[-1] == 0 and bytes(i - 1 for i in ids[:-1]).decode() == text
    assert max(ids) < tokenizer.vocab_size == 257


@pytest.mark.parametrize("padding", [False, True])
def test_a_hugging_face_tokenizer_with_its_own_special_tokens(padding, tmp_path):
    path, ids = hugging_face(tmp_path / "tokenizer.json", "[BEGIN]", padding=padding)
    tokenizer = open_tokenizer(path)
    assert tokenizer("the red fish and cat") == [50, ids["the"], ids["red"], 0, ids["and"], ids["cat"], 60]
    assert tokenizer.vocab_size == 61 and tokenizer.end == 60


@pytest.mark.parametrize("start, end", [("[BEGIN]", ""), ("", "")])
def test_a_tokenizer_without_an_end_is_cut_anywhere(start, end, tmp_path):
    path, ids = hugging_face(tmp_path / "tokenizer.json", start, end)
    tokenizer = open_tokenizer(path)
    wanted = ([50] if start else []) + [ids[word] for word in ("the", "dog", "and", "the", "cat")]
    assert tokenizer.end is None and tokenizer("the dog and the cat") == wanted
    assert encode(tokenizer, "the dog and the cat", 3, False) == (wanted[:3], True)


@pytest.mark.parametrize("eos", [1, -1])
def test_a_sentencepiece_model(eos, tmp_path):
    import sentencepiece as library

    path = sentencepiece(tmp_path / "text.model", eos_id=eos, bos_id=-1, unk_id=0)
    tokenizer, oracle = open_tokenizer(path), library.SentencePieceProcessor(model_file=path)
    for text in [*WORDS, "unknown: ø"]:
        assert tokenizer(text) == oracle.encode(text) + ([eos] if eos > 0 else [])
        assert oracle.decode(tokenizer(text)) == text or "ø" in text
    assert tokenizer.end == (eos if eos > 0 else None) and tokenizer.vocab_size == oracle.get_piece_size()


def test_siglips_sentencepiece_model_drops_punctuation(tmp_path):
    path = sentencepiece(tmp_path / "text.model", eos_id=1, bos_id=-1, unk_id=0)
    plain = open_tokenizer(path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "SiglipTokenizer"}')
    siglips = open_tokenizer(path)
    assert siglips("A red-dog , and... the CAT!") == plain("a reddog and the cat") and siglips("?!") == [1]
    assert siglips.fingerprint() != plain.fingerprint() and pickle.loads(pickle.dumps(siglips))("a.") == plain("a")
    for other in ('{"tokenizer_class": "T5Tokenizer"}', "[]", "{"):
        (tmp_path / "tokenizer_config.json").write_text(other)
        assert open_tokenizer(path).fingerprint() == plain.fingerprint()


def each(tmp_path):
    path, _ = hugging_face(tmp_path / "tokenizer.json")
    return [open_tokenizer(spec) for spec in ("bytes", path, sentencepiece(tmp_path / "text.model"))]


def test_tokenizers_travel_and_are_thread_safe(tmp_path):
    for tokenizer in each(tmp_path):
        wanted = [tokenizer(text) for text in WORDS]
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert [copy(text) for text in WORDS] == wanted and copy.fingerprint() == tokenizer.fingerprint()
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(tokenizer, WORDS * 50)) == wanted * 50


def test_the_fingerprint_is_of_the_content(tmp_path):
    (tmp_path / "other").mkdir()
    first = open_tokenizer(hugging_face(tmp_path / "tokenizer.json")[0])
    same = open_tokenizer(hugging_face(tmp_path / "other/name.json")[0])
    other = open_tokenizer(hugging_face(tmp_path / "tokenizer.json", "[BEGIN]")[0])
    model = open_tokenizer(sentencepiece(tmp_path / "text.model"))
    names = [tokenizer.fingerprint() for tokenizer in (first, other, model, open_tokenizer("bytes"))]
    assert first.fingerprint() == same.fingerprint() and len(set(names)) == 4


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(1, 20), st.booleans())
def test_cutting_keeps_the_end_and_the_beginning(text, max_tokens, lower):
    tokenizer = open_tokenizer("bytes")
    ids, cut = encode(tokenizer, text, max_tokens, lower)
    clean = " ".join(unicodedata.normalize("NFC", text.lower() if lower else text).split())
    whole = tokenizer(clean) if clean else []
    assert cut == (len(whole) > max_tokens) and len(ids) == min(len(whole), max_tokens)
    assert ids[:-1] == whole[: max(len(ids) - 1, 0)] and ids[-1:] == whole[-1:]


def test_equal_looking_texts_are_equal():
    tokenizer = open_tokenizer("bytes")
    assert encode(tokenizer, " Cafe\u0301\u00a0\n au\tlait ", 64, True) == (tokenizer("caf\u00e9 au lait"), False)
    assert encode(tokenizer, "A", 64, False) != encode(tokenizer, "A", 64, True)
    assert encode(tokenizer, " \n\u3000", 64, True) == ([], False)


@given(st.text(), st.integers(1, 20), st.sampled_from([0, 3, 400]))
def test_a_filled_text_ends_in_pads_and_is_else_the_same(text, length, pad):
    plain = open_tokenizer("bytes")
    (wanted, was_cut), (ids, cut) = (encode(t, text, length, True) for t in (plain, filled(plain, pad, length)))
    assert cut == was_cut and ids[: len(wanted)] == wanted
    assert ids[len(wanted) :] == [pad] * (length - len(wanted) if wanted else 0)  # an empty text stays none at all


def test_the_config_fills_texts(tmp_path):
    path, ids = hugging_face(tmp_path / "tokenizer.json", padding=True)
    config = base.text()
    config.update(tokenizer=path, max_tokens=5)
    plain = from_config(config)
    config.pad = 7
    tokenizer = from_config(config)
    assert encode(tokenizer, "a red dog", 5, True)[0] == [ids["a"], ids["red"], ids["dog"], 60, 7]
    assert encode(tokenizer, "the dog and the cat", 5, True) == (encode(plain, "the dog and the", 5, True)[0], True)
    assert (tokenizer.vocab_size, tokenizer.end, filled(plain, 99, 5).vocab_size) == (61, 60, 100)
    names = {t.fingerprint() for t in (plain, tokenizer, filled(plain, 8, 5), filled(plain, 7, 6))}
    assert len(names) == 4 and pickle.loads(pickle.dumps(tokenizer))("a cat") == tokenizer("a cat")


def test_a_string_that_is_no_unicode(tmp_path):
    for tokenizer in each(tmp_path):
        with pytest.raises(DecodeError, match="no valid Unicode"):
            encode(tokenizer, "half \ud83d", 64, True)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer.json", None, "cannot be read: .*No such file.*; expected bytes, PATH/tokenizer.json"),
        ("text.model", None, "cannot be read: .*No such file"),
        ("tokenizer.json", b"{}", "is no Hugging Face tokenizer: "),
        ("tokenizer.json", b"\xff\xfe", "is no Hugging Face tokenizer: "),
        ("tokenizer.json", b"", "is no Hugging Face tokenizer: "),
        ("text.model", b"hello", "is no SentencePiece model: "),
        ("text.model", b"", "is no SentencePiece model: "),
        ("vocab.txt", b"a\nb", "vocab.txt': expected bytes, PATH/tokenizer.json .* or PATH.model"),
    ],
)
def test_files_that_are_no_tokenizers(name, content, message, tmp_path):
    pytest.importorskip("tokenizers"), pytest.importorskip("sentencepiece")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_tokenizer(f"{tmp_path}/{name}")


def test_a_folder_is_told_what_lies_in_it(tmp_path):
    with pytest.raises(UserError, match="expected bytes, [^?]*$"):
        open_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=f"did you mean {tmp_path}/tokenizer.json?"):
        open_tokenizer(str(tmp_path))


@pytest.mark.parametrize("library, name", [("tokenizers", "tokenizer.json"), ("sentencepiece", "text.model")])
def test_a_library_that_is_not_installed(library, name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=f"pip install {library}"):
        open_tokenizer(str(tmp_path / name))
