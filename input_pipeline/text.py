"""From a string to token ids, with the same rules wherever a text comes from: captions, prompts, queries.

Three kinds of tokenizer and none of our own: bytes, which need no file and no library, and the two formats in which
tokenizers are handed around. A tokenizer is known by the hash of its file, so a changed vocabulary is seen even under
an old name; one that is pickled is read again by its path, because neither library's object is promised to travel.
"""

import hashlib
import json
import os
import string
import unicodedata
from typing import Any, Protocol

from ml_collections import ConfigDict

from input_pipeline.errors import DecodeError, UserError
from input_pipeline.sources import paths
from input_pipeline.sources.base import require

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
EXPECTED = "expected bytes, PATH/tokenizer.json (Hugging Face) or PATH.model (SentencePiece)"


class Tokenizer(Protocol):
    """Text to ids below `vocab_size`; thread-safe and picklable. end: the id that ends every text, if one does."""

    vocab_size: int
    end: int | None

    def __call__(self, text: str) -> list[int]: ...

    def fingerprint(self) -> str:
        """Changes when its ids do."""


def open_tokenizer(spec: str) -> Tokenizer:
    """A tokenizer from the setting `text.tokenizer`: bytes, a Hugging Face tokenizer.json or a SentencePiece *.model.

    Raises UserError for a file that is missing, of another kind or broken, and for a library that is not installed.
    """
    if spec == "bytes":
        return ByteTokenizer()
    where = f"text.tokenizer={spec!r}"
    for ending, kind in ((".json", HuggingFaceTokenizer), (".model", SentencePieceTokenizer)):
        if spec.endswith(ending):
            return kind(spec)
    inside = os.path.join(os.path.expanduser(spec), "tokenizer.json")
    hint = f"; did you mean {inside}?" if os.path.exists(inside) else ""
    raise UserError(f"{where}: {EXPECTED}{hint}")


def from_config(text: ConfigDict) -> Tokenizer:
    """The tokenizer of `config.text`, filled up where `text.pad` is an id. Errors: as `open_tokenizer`."""
    return filled(open_tokenizer(text.tokenizer), text.pad, text.max_tokens)


def filled(tokenizer: Tokenizer, pad: int, length: int) -> Tokenizer:
    """A tokenizer whose texts have `length` tokens or more, the last of them `pad`; itself where pad is negative.

    For towers that learned to read their padding, as SigLIP's: they pool its last position.
    """
    return Filled(tokenizer, pad, length) if pad >= 0 else tokenizer


def table_size(text: ConfigDict, vocab_size: int) -> int:
    """Rows of the token table that `config.text` asks for. Raises UserError where they are fewer than the tokens."""
    if 0 < text.vocab_size < vocab_size:
        raise UserError(
            f"text.vocab_size is {text.vocab_size}, but the tokenizer {text.tokenizer} has {vocab_size} tokens: the "
            f"table would lack rows. Set --config.text.vocab_size={vocab_size} or more, or 0: the tokenizer's."
        )
    return text.vocab_size or vocab_size


def encode(tokenizer: Tokenizer, text: str, max_tokens: int, lower: bool) -> tuple[list[int], bool]:
    """Token ids of a text, at most `max_tokens`, and whether it was cut; [] for an empty text.

    The text is normalised (Unicode NFC, one space for any white space, lower case where asked for); a cut one keeps its
    end id. Raises DecodeError for a string that is no valid Unicode, as JSON may hold.
    """
    text = unicodedata.normalize("NFC", text.lower() if lower else text)
    text = " ".join(text.split())
    if not text:
        return [], False
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DecodeError(f"a text that is no valid Unicode: {error}") from error
    ids = tokenizer(text)
    if len(ids) <= max_tokens:
        return ids, False
    return (ids[:max_tokens] if tokenizer.end is None else [*ids[: max_tokens - 1], tokenizer.end]), True


class ByteTokenizer:
    """UTF-8 bytes: id 0 ends a text, 1 + byte is a byte; see `Tokenizer`."""

    vocab_size = 257
    end = 0

    def __call__(self, text: str) -> list[int]:
        return [1 + byte for byte in text.encode()] + [self.end]

    def fingerprint(self) -> str:
        return "bytes"


class HuggingFaceTokenizer:
    """A tokenizer.json, with the special tokens that its own post-processor adds; see `Tokenizer`."""

    def __init__(self, path: str):
        self.path, where = path, f"text.tokenizer={path!r}"
        library = require("tokenizers", "tokenizers", where)
        data = _read(path, where)
        try:
            self._tokenizer = library.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises no kind of its own
            raise UserError(f"{where} is no Hugging Face tokenizer: {error}; {EXPECTED}") from error
        self._tokenizer.no_padding()  # files may ask for both, to lengths that are not ours
        self._tokenizer.no_truncation()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)  # ids may have holes
        probe = self._tokenizer.encode("a")
        self.end = probe.ids[-1] if probe.ids and probe.special_tokens_mask[-1] else None
        self._fingerprint = _hash("tokenizer.json", data)

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def fingerprint(self) -> str:
        return self._fingerprint

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)


class SentencePieceTokenizer:
    """A SentencePiece model; its end token, where it has one, follows every text. See `Tokenizer`.

    Beside a tokenizer_config.json of SigLIP's, texts lose their punctuation and capitals first, as that model's did.
    """

    def __init__(self, path: str):
        self.path, where = path, f"text.tokenizer={path!r}"
        self.plain = _is_siglip(path)
        library = require("sentencepiece", "sentencepiece", where)
        data = _read(path, where)
        self._tokenizer = library.SentencePieceProcessor()
        try:
            self._tokenizer.LoadFromSerializedProto(data)
            self.vocab_size = self._tokenizer.get_piece_size()
        except Exception as error:  # RuntimeError, and other kinds in other versions
            raise UserError(f"{where} is no SentencePiece model: {error}; {EXPECTED}") from error
        end = self._tokenizer.eos_id()
        self.end = end if end >= 0 else None
        self._fingerprint = _hash("sentencepiece without punctuation" if self.plain else "sentencepiece", data)

    def __call__(self, text: str) -> list[int]:
        if self.plain:
            text = " ".join(text.lower().translate(_NO_PUNCTUATION).split())
        ids = self._tokenizer.encode(text)
        return ids if self.end is None else [*ids, self.end]

    def fingerprint(self) -> str:
        return self._fingerprint

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)


class Filled:
    """See `filled`. A longer text stays as it is: whoever cuts it says so, and keeps its end."""

    def __init__(self, tokenizer: Tokenizer, pad: int, length: int):
        self.tokenizer, self.pad, self.length = tokenizer, pad, length
        self.vocab_size, self.end = max(tokenizer.vocab_size, pad + 1), tokenizer.end

    def __call__(self, text: str) -> list[int]:
        ids = self.tokenizer(text)
        return ids + [self.pad] * (self.length - len(ids))

    def fingerprint(self) -> str:
        return f"{self.tokenizer.fingerprint()} filled with {self.pad} to {self.length}"


def _is_siglip(path: str) -> bool:
    folder = os.path.dirname(os.path.expanduser(path))
    try:
        settings = json.loads(paths.read(os.path.join(folder, "tokenizer_config.json")))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and settings.get("tokenizer_class") == "SiglipTokenizer"


def _read(path: str, where: str) -> bytes:
    try:
        return paths.read(os.path.expanduser(path))
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error}; {EXPECTED}") from error


def _hash(kind: str, data: bytes) -> str:
    return f"{kind} {hashlib.blake2b(data, digest_size=16).hexdigest()}"
