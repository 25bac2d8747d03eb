"""Which evaluations a run has: functions of its parameters, made before training, so that mistakes show before it.

Rows come opened and planned from the caller; this half of the library knows no sources.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from input_pipeline.errors import UserError
from navit_jax.evaluators import classification, fewshot, outputs, retrieval, zeroshot
from navit_jax.evaluators.outputs import Forward, Rows
from navit_jax.evaluators.texts import ForwardTexts

Evaluation = Callable[[Any], dict[str, float]]  # parameters -> scores


class Place(NamedTuple):
    """put: hands a process's rows to the devices. rows: B of a step. local: which of them this process builds.

    workdir: for tables and pictures.
    """

    put: Callable[[Any], Any]
    rows: int
    local: Sequence[int]
    workdir: Path


def default_metric(config: ConfigDict, images: Any) -> str:
    """The score whose best checkpoint is kept where the config names none, without its budget; images: held out."""
    if config.objective == "contrastive" and images.texts is not None:
        return "retrieval/t2i_r1"
    part = "zeroshot" if config.objective == "contrastive" else "eval"
    return f"{part}/map" if config.data.multi_label else f"{part}/top1"


def supervised(
    config: ConfigDict, forward: Forward, loaders: Mapping[int, Rows], classes: int, place: Place
) -> list[Evaluation]:
    """Accuracy at every token budget, the keys of `loaders`."""
    options = dict(multi_label=config.data.multi_label, probabilities=config.loss.kind, num_classes=classes)
    options |= dict(workdir=place.workdir)
    return [lambda params: classification.at_budgets(forward, params, loaders, place.put, **options)]


def contrastive(
    config: ConfigDict,
    forward: Forward,
    forward_texts: ForwardTexts,
    loaders: Mapping[int, Rows],
    images: Any,
    place: Place,
) -> list[Evaluation]:
    """Retrieval among the held-out pairs and zero-shot classification of their images, at every token budget.

    Both read the vectors of one pass over the images, so there is one evaluation. images: the held-out ones, with
    `source`, `texts` (None: no retrieval), `files` (see `retrieval.run`) and `tokenizer`. Zero-shot needs classes and
    prompts. Raises UserError where neither can be done, and for prompts that cannot be used.
    """
    sentences, scorers = _sentences(config, images), []
    options = dict(put=place.put, rows=place.rows, local=place.local, workdir=place.workdir)
    if images.texts is not None:
        scorers.append(functools.partial(retrieval.run, captions=images.texts, files=images.files, **options))
    if sentences:
        scorers.append(_zero_shot(config, images, sentences, options))
    if not scorers:
        raise UserError(
            "nothing to evaluate: the held-out images have no texts for retrieval, and zero-shot needs their classes "
            "and prompts. --config.data.label_field names the field of their classes, --config.eval.prompts a file of "
            "prompts; or name another --config.data.eval_source."
        )

    def run(params: Any) -> dict[str, float]:
        kinds = dict(multi_label=config.data.multi_label)
        seen = {b: outputs.vectors(forward, params, rows, place.put, **kinds) for b, rows in loaders.items()}
        return {name: value for score in scorers for name, value in score(seen, forward_texts, params).items()}

    return [run]


def _sentences(config: ConfigDict, images: Any) -> tuple[str, ...]:
    """The templates of zero-shot; (): it is off. Raises UserError where a file is named and there are no classes."""
    spec = config.eval.prompts
    if images.source.class_names:
        return zeroshot.templates(spec, config.data.eval_source or config.data.source)
    if spec in ("", "none"):
        return ()
    raise UserError(
        f"eval.prompts={spec} asks for zero-shot classification, but the held-out images have no classes: "
        f"--config.data.label_field, which is {config.data.label_field!r}, names the field that holds them. Set it, or "
        "--config.eval.prompts=none."
    )


def _zero_shot(config: ConfigDict, images: Any, sentences: Sequence[str], options: dict) -> Callable[..., dict]:
    """`zeroshot.run` but for (seen, forward_texts, params)."""
    names = images.source.class_names
    text = dict(max_tokens=config.text.max_tokens, lower=config.text.lower)
    options = options | dict(ids=zeroshot.tokenize(zeroshot.prompts(sentences, names), images.tokenizer, **text))
    options |= dict(num_classes=len(names), multi_label=config.data.multi_label)
    options |= dict(probabilities=config.contrastive.loss)

    def run(seen: Mapping[int, outputs.Seen], forward_texts: ForwardTexts, params: Any) -> dict[str, float]:
        scale, bias = float(jnp.exp(params["logit_scale"])), float(params.get("logit_bias", 0.0))
        return zeroshot.run(seen, forward_texts, params, scale=scale, bias=bias, **options)

    return run


def few_shot(
    config: ConfigDict, forward: Forward, loaders: Sequence[Rows], chosen_CS: np.ndarray, place: Place
) -> Evaluation:
    """A linear probe on a few images a class; loaders: of the images chosen_CS, and of those to classify."""
    options = dict(shots=config.eval.fewshot_shots, ridge=config.eval.fewshot_ridge)
    return lambda params: fewshot.run(forward, params, *loaders, place.put, chosen_CS=chosen_CS, **options)
