"""Texts of a model that a person calls: tokenized as in training, packed into rows of one static shape."""

from collections.abc import Callable, Sequence

import numpy as np

from input_pipeline import text
from input_pipeline.errors import DecodeError, UserError
from input_pipeline.packed import Packed
from input_pipeline.pairing import text_batches
from navit_jax import contrastive

ROWS, ROW_TOKENS = 4, 128


class Texts:
    """Of one model. tokenizer: as `text.tokenizer`, opened when the first text comes. lower: read in lower case."""

    def __init__(self, cfg: contrastive.TwoTowersConfig, tokenizer: str, lower: bool):
        self.cfg, self.spec, self.lower = cfg.text, tokenizer, lower
        self._tokenizer: text.Tokenizer | None = None
        self._last: tuple = ()

    def encode(self, texts: Sequence[str], launch: Callable[[Packed], tuple]) -> np.ndarray:
        """[n, D] float32 of length 1, in order. Raises UserError for what is no text and for one without tokens."""
        if isinstance(texts, str) or not all(isinstance(x, str) for x in texts):
            raise UserError("expected a list of texts, such as ['a cat', 'a dog']")
        length = -(-max(ROW_TOKENS, self.cfg.max_tokens) // 8) * 8
        shape = dict(length=length, slots=length // (self.cfg.max_tokens if self.cfg.pad >= 0 else 4))
        vectors_nD = np.zeros((len(texts), 0), np.float32)
        for packed, index_BM in text_batches([self._ids(x) for x in texts], ROWS, **shape):
            z_BMD = np.asarray(launch(packed)[0], np.float32)
            if not vectors_nD.size:
                vectors_nD = np.zeros((len(texts), z_BMD.shape[-1]), np.float32)
            vectors_nD[index_BM[index_BM >= 0]] = z_BMD[index_BM >= 0]
        return vectors_nD

    def class_vectors(
        self, classes: Sequence[str] | None, templates: Sequence[str], encode: Callable[[Sequence[str]], np.ndarray]
    ) -> tuple[tuple[str, ...], np.ndarray]:
        """(names, [C, D] of length 1): the mean of the sentences of each. Those of the last call are remembered.

        Source: Radford et al. 2021 (CLIP), section 3.1.4. Raises UserError where there are no classes or sentences.
        """
        if isinstance(classes, str) or not classes:
            raise UserError(
                "this model knows no classes of its own: name them, classes=['cat', 'dog'], of the command "
                "--classes=cat,dog"
            )
        names = tuple(map(str, classes))
        if isinstance(templates, str) or not templates or any("{}" not in line for line in templates):
            raise UserError(f"templates are {templates!r}; expected sentences with {{}} for the class, in a list")
        asked = (names, tuple(templates))
        if self._last[:1] != (asked,):
            lines = [line.replace("{}", name.replace("_", " ")) for name in names for line in templates]
            mean_CD = encode(lines).reshape(len(names), len(templates), -1).mean(axis=1)
            self._last = (asked, mean_CD / np.maximum(np.linalg.norm(mean_CD, axis=-1, keepdims=True), 1e-12))
        return names, self._last[1]

    def _ids(self, line: str) -> np.ndarray:
        try:
            ids, _ = text.encode(self._open(), line, self.cfg.max_tokens, self.lower)
        except DecodeError as error:
            raise UserError(f"{line!r}: {error}") from None
        if not ids:
            raise UserError("a text without any token: it needs at least one letter")
        return np.array(ids, np.int32)

    def _open(self) -> text.Tokenizer:
        if self._tokenizer is None:
            if not self.spec:
                raise UserError(
                    "the files of this model name no tokenizer: give one, navit_jax.load(..., tokenizer="
                    "'PATH/tokenizer.json'), of the command --tokenizer=PATH/tokenizer.json"
                )
            found = text.open_tokenizer(self.spec)
            if found.vocab_size > self.cfg.vocab_size:
                raise UserError(
                    f"the tokenizer {self.spec} has {found.vocab_size} tokens, the text tower {self.cfg.vocab_size}: "
                    "it is another model's"
                )
            self._tokenizer = text.filled(found, self.cfg.pad, self.cfg.max_tokens)
        return self._tokenizer
