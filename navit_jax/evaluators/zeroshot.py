"""Zero-shot classification: a class is the mean of the vectors of sentences that name it, and nothing is trained.

The scores are those of `classification`, over logits made of image and class vectors; so the two compare. Templates are
files of sentences and no code: `{}` is the class, any other brace is itself.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline import text
from input_pipeline.errors import UserError
from navit_jax.evaluators import classification, texts
from navit_jax.evaluators.outputs import Seen

log = logging.getLogger(__name__)
PROMPTS = Path(__file__).parent / "prompts"  # a file for each embedded set
_NAMES = classification.Names("zeroshot", "zeroshot_over_tokens", "Zero-shot, every token budget")
_BLOCK = 1024  # images whose logits are held at a time


def templates(spec: str, source_name: str) -> tuple[str, ...]:
    """Sentences with `{}` for the class; () turns zero-shot off.

    spec: `config.eval.prompts`, a file with a sentence a line (# begins a comment line); "": the own file of the
    embedded set `source_name`, () for any other source; "none": (). Raises UserError for a file that cannot be read,
    holds no sentence, or one without `{}`.
    """
    if spec == "none":
        return ()
    path = Path(spec).expanduser() if spec else PROMPTS / f"{source_name}.txt"
    if not spec and source_name not in {file.stem for file in PROMPTS.glob("*.txt")}:
        return ()
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"eval.prompts={path} cannot be read ({error}); expected a text file in UTF-8, a sentence a line with {{}} "
            "for the class, or none."
        ) from None
    found = {n: line.strip() for n, line in enumerate(lines, 1) if line.strip() and not line.lstrip().startswith("#")}
    if not found:
        raise UserError(f"eval.prompts={path} holds no sentence; expected one a line, such as: a photo of a {{}}")
    for n, line in found.items():
        if "{}" not in line:
            raise UserError(f"eval.prompts={path}, line {n}: {line!r} lacks {{}}, which the class replaces.")
    return tuple(found.values())


def prompts(sentences: Sequence[str], class_names: Sequence[str]) -> list[str]:
    """The sentences of class 0, of class 1, ...: C x P texts; underscores of a class are spaces. [] if either is."""
    return [line.replace("{}", name.replace("_", " ")) for name in class_names for line in sentences]


def tokenize(lines: Sequence[str], tokenizer: text.Tokenizer, *, max_tokens: int, lower: bool) -> list[np.ndarray]:
    """Token ids of `prompts`, int32 each, as captions become theirs; cut ones are logged: the class may be cut off."""
    ids, cut = zip(*(text.encode(tokenizer, line, max_tokens, lower) for line in lines), strict=True)
    if any(cut):
        log.warning(
            "%d of %d zero-shot prompts are longer than text.max_tokens=%d and are cut, the first is %r",
            *(sum(cut), len(cut), max_tokens, lines[cut.index(True)]),
        )
    return [np.array(of_one, np.int32) for of_one in ids]


def class_vectors(
    forward_texts: texts.ForwardTexts,
    params: Any,
    ids: Sequence[np.ndarray],
    put: Callable[[Any], Any],
    *,
    num_classes: int,
    rows: int,
    local: Sequence[int] | None = None,
) -> np.ndarray:
    """[C, E] float32 of length 1: the mean over a class's sentences, each of length 1 before.

    ids: tokens of `prompts`, C x P. The rest, and errors, as in `texts.encode`. Source: Radford et al. 2021 (CLIP),
    section 3.1.4.
    """
    z_NE = _unit(texts.encode(forward_texts, params, ids, put, rows=rows, local=local))
    return _unit(z_NE.reshape(num_classes, -1, z_NE.shape[1]).mean(1))


def run(
    seen: Mapping[int, Seen],
    forward_texts: texts.ForwardTexts,
    params: Any,
    put: Callable[[Any], Any],
    ids: Sequence[np.ndarray],
    *,
    num_classes: int,
    scale: float,
    bias: float,
    probabilities: str,
    multi_label: bool,
    rows: int,
    workdir: Path,
    local: Sequence[int] | None = None,
) -> dict[str, float]:
    """The scores of `classification` at each token budget, the keys of `seen`, as `zeroshot/top1@256`, ...

    seen: of `outputs.vectors`, of length 1, with sets of classes as labels where `multi_label`. ids: tokens of
    `prompts`. Logits are scale * cosine + bias, as in training; they matter for the calibration error alone.
    probabilities: of the loss, for it too. put, rows, local: of the texts; see `texts.encode`.
    Writes zeroshot_over_tokens.csv and .png into workdir. Raises UserError if no image has a label.
    """
    classes_CE = class_vectors(forward_texts, params, ids, put, num_classes=num_classes, rows=rows, local=local)
    found = {}
    for budget, one in seen.items():
        parts = []
        for start in range(0, len(one.index), _BLOCK):
            index, labels, z_NE = (x[start : start + _BLOCK] for x in (one.index, one.labels, one.kept[0]))
            parts.append(classification.judge(index, labels, scale * (z_NE @ classes_CE.T) + bias, probabilities))
        judged = (np.concatenate(field) for field in zip(*parts, strict=True))
        found[budget] = classification.scores(classification.Predictions(one, *judged))
    return classification.report(found, multi_label, workdir, _NAMES)


def _unit(z_NE: np.ndarray) -> np.ndarray:
    return z_NE / np.maximum(np.linalg.norm(z_NE, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
