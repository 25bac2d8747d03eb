"""The token ids of every text of a source, made once and kept in the user's cache.

Texts are packed into rows planned on their lengths, so these must be known before a step is built; tokenising costs
5-50 us a text, and all ids of a million captions are 30 MB. So all are made at the start, by all processes of a run
together, and found again by every run on the same data with the same tokenizer. Equal texts get equal numbers here,
where all of them are seen: a step that held two of them would otherwise push an image away from its own caption.
"""

import dataclasses
import functools
import hashlib
import logging
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from input_pipeline import size_index
from input_pipeline.errors import DecodeError, UserError
from input_pipeline.size_index import Group
from input_pipeline.text import Tokenizer, encode

if TYPE_CHECKING:
    from input_pipeline.sources.base import Source

VERSION = 2  # part of the key: raise it when the same data gives other ids
CHUNK = 256  # texts a task
WHOLE, CUT, UNREADABLE, UNREACHABLE = range(4)  # what became of a text; an empty one is whole
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Texts:
    """The texts of a source as token ids, one for each of its N images.

    tokens: 1-D, all ids, text after text, in the smallest dtype that holds the vocabulary. starts: [N + 1] int64, where
    each begins; one without tokens is missing, empty or unreadable. numbers: [N] int32, equal for equal ids, from 0 in
    order of first appearance; -1 without tokens. cut: how many were longer than the limit.
    """

    tokens: np.ndarray
    starts: np.ndarray
    numbers: np.ndarray
    cut: int

    def __len__(self) -> int:
        return len(self.numbers)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, [N] int64; 0: none."""
        return np.diff(self.starts)

    @property
    def missing(self) -> np.ndarray:
        """Which images have no text, ascending."""
        return np.flatnonzero(self.lengths == 0)

    def ids(self, i: int) -> np.ndarray:
        """Token ids of text i, [lengths[i]] int32."""
        return self.tokens[self.starts[i] : self.starts[i + 1]].astype(np.int32)


class _Part(NamedTuple):
    """tokens: 1-D ids of consecutive texts; lengths, states: one a text, int64 and uint8."""

    tokens: np.ndarray
    lengths: np.ndarray
    states: np.ndarray


def read_texts(
    source: "Source",
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    lower: bool,
    cache_dir: str | Path | None = None,
    num_threads: int = 8,
    progress: bool = True,
    group: Group | None = None,
) -> Texts:
    """The ids of all texts of a source, at most `max_tokens` each; texts that cannot be read have none, and are logged.

    cache_dir: where results are kept; None: `texts` in the user's cache; one with unreachable texts is not kept. group:
    the processes that all call this; each reads its part, and all return the same. Raises UserError in all of them
    where they do not have the same data or the same tokenizer.
    """
    _check_same(source, tokenizer, group)
    settings = f"{VERSION} {source.fingerprint()} {tokenizer.fingerprint()} {max_tokens} {lower}"
    name = hashlib.blake2b(settings.encode(), digest_size=16).hexdigest()
    path = (size_index.cache_dir("texts") if cache_dir is None else Path(cache_dir)) / f"{name}.npz"
    found = _load(path, len(source))
    if not size_index.everyone(found is not None, group):
        read = functools.partial(_read_part, source, tokenizer, max_tokens, lower, num_threads)
        found = _read_together(read, len(source), found, progress, group)
        if not (found.states == UNREACHABLE).any():
            size_index.keep(path, lambda file: np.savez(file, **found._asdict()), group)
    starts = np.concatenate([[0], np.cumsum(found.lengths)])
    cut = int((found.states == CUT).sum())
    texts = Texts(found.tokens, starts, _number(found.tokens, starts), cut)
    if group is None or group.rank == 0:
        _report(source, texts, found.states, max_tokens)
    return texts


def check_missing(texts: Texts, source: "Source", where: str, max_share: float) -> None:
    """Raises UserError where more than this share of a source's images has no text; `where` names the source."""
    missing = texts.missing
    if len(missing) == len(texts):
        raise UserError(
            f"{where} has no captions, and a contrastive run needs one for each image: in tfds, array_record, hf and "
            "the JSON of tar data, --config.data.text_field names their field; a folder needs a captions.csv or "
            f"captions.jsonl with file_name and text.{_why(source, int(missing[0]))}"
        )
    if len(missing) > max_share * len(texts):
        raise UserError(
            f"{len(missing)} of {len(texts)} images in {where} have no caption that can be used, above "
            f"data.max_bad_share={max_share:g}; the first is {source.describe(int(missing[0]))}. Remove them or raise "
            "--config.data.max_bad_share."
        )


def _why(source: "Source", i: int) -> str:
    try:
        source.text(i)
        return ""
    except (DecodeError, OSError) as error:
        return f" {error}."


def check_distinct(texts: Texts, where: str, max_tokens: int) -> None:
    """Raises UserError where all texts are equal, and there are several."""
    if texts.numbers.max() == 0 and (count := int((texts.numbers == 0).sum())) > 1:
        raise UserError(
            f"all {count} texts in {where} are equal: every text masks every other, and nothing is learned. "
            f"Likely they differ only behind --config.text.max_tokens={max_tokens} tokens, or --config.data.text_field "
            "names a field that always holds the same."
        )


def _check_same(source: "Source", tokenizer: Tokenizer, group: Group | None) -> None:
    if group is None:
        return
    size_index.check_same(source, hashlib.blake2b(source.fingerprint().encode(), digest_size=16).digest(), group)
    name = hashlib.blake2b(tokenizer.fingerprint().encode(), digest_size=16).digest()
    names = group.gather(np.frombuffer(name, np.uint8))
    others = np.flatnonzero((names != names[0]).any(axis=1))
    if len(others):
        raise UserError(
            f"the processes do not have the same tokenizer: that of process {', '.join(map(str, others[:8]))} is not "
            "process 0's. Every host needs the same file at text.tokenizer."
        )


def _load(path: Path, texts: int) -> _Part | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            found = _Part(**stored)
    except (OSError, ValueError, EOFError, TypeError, KeyError, zipfile.BadZipFile):
        return None
    shapes = found.lengths.shape == found.states.shape == (texts,)
    return found if shapes and found.tokens.shape == (found.lengths.sum(),) else None


def _read_together(
    read: Callable[[int, int, bool], _Part], texts: int, cached: _Part | None, progress: bool, group: Group | None
) -> _Part:
    """All texts from each process's part; a process that has them cached gives its part of that."""
    if group is None:
        return read(0, texts, progress)
    part, start, stop = size_index.my_part(texts, group)
    if cached is None:
        mine = read(start, stop, progress and group.rank == 0)
    else:
        ends = np.concatenate([[0], np.cumsum(cached.lengths)])
        tokens = cached.tokens[ends[start] : ends[stop]]
        mine = _Part(tokens, cached.lengths[start:stop], cached.states[start:stop])
    tokens = _gather(mine.tokens, int(group.gather(np.array(len(mine.tokens), np.int64)).max()), group)
    lengths, states = _gather(mine.lengths, part, group), _gather(mine.states, part, group)
    whole = np.concatenate([ids[: count.sum()] for ids, count in zip(tokens, lengths, strict=True)])
    return _Part(whole, lengths.ravel()[:texts], states.ravel()[:texts])


def _gather(x: np.ndarray, length: int, group: Group) -> np.ndarray:
    """Everyone's 1-D `x`, padded with zeros: [count, length]."""
    return group.gather(np.pad(x, (0, length - len(x))))


def _read_part(
    source: "Source",
    tokenizer: Tokenizer,
    max_tokens: int,
    lower: bool,
    num_threads: int,
    first: int,
    stop: int,
    progress: bool,
) -> _Part:
    from tqdm import tqdm

    dtype = np.min_scalar_type(max(tokenizer.vocab_size - 1, 0))

    def read(start: int) -> _Part:
        texts = [_read(source, tokenizer, max_tokens, lower, i) for i in range(start, min(start + CHUNK, stop))]
        ids = np.array([token for of_one, _ in texts for token in of_one], dtype)
        return _Part(ids, np.array([len(ids) for ids, _ in texts]), np.array([state for _, state in texts], np.uint8))

    parts = [_Part(np.zeros(0, dtype), np.zeros(0, np.int64), np.zeros(0, np.uint8))]
    bar = tqdm(total=stop - first, desc="texts to tokens (once)", unit="text", delay=2, disable=not progress)
    with bar, ThreadPoolExecutor(max(num_threads, 1)) as pool:
        for part in pool.map(read, range(first, stop, CHUNK)):
            parts.append(part)
            bar.update(len(part.lengths))
    return _Part(*map(np.concatenate, zip(*parts, strict=True)))


def _read(source: "Source", tokenizer: Tokenizer, max_tokens: int, lower: bool, i: int) -> tuple[list[int], int]:
    try:
        ids, cut = encode(tokenizer, source.text(i), max_tokens, lower)
    except DecodeError:
        return [], UNREADABLE
    except OSError:
        return [], UNREACHABLE
    return ids, CUT if cut else WHOLE


def _number(tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Numbers [N] int32 of equal texts; a dict of bytes does a million in under a second, exactly."""
    data, seen = tokens.tobytes(), {}
    ends = (starts * tokens.itemsize).tolist()
    numbers = [seen.setdefault(data[a:b], len(seen)) if b > a else -1 for a, b in zip(ends[:-1], ends[1:], strict=True)]
    return np.array(numbers, np.int32)


def _report(source: "Source", texts: Texts, states: np.ndarray, max_tokens: int) -> None:
    reasons = {UNREADABLE: "unreadable", UNREACHABLE: "unreachable"}
    for i in texts.missing[:10].tolist():
        log.warning("no text, left out: %s (%s)", source.describe(i), reasons.get(int(states[i]), "missing or empty"))
    if len(texts.missing):
        log.warning("%d of %d images have no text", len(texts.missing), len(texts))
    for i in np.flatnonzero(states == CUT)[:10].tolist():
        log.warning("text is cut: %s", source.describe(i))
    if texts.cut:
        log.warning("%d of %d texts are longer than %d tokens and are cut", texts.cut, len(texts), max_tokens)
