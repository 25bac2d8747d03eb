"""Which evaluations a run has: functions of its parameters, made before training, so that mistakes show before it.

Rows come opened and planned from the caller; this half of the library knows no sources.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from input_pipeline.errors import UserError
from navit_jax.evaluators import classification, fewshot, retrieval, zeroshot
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


def default_metric(config: ConfigDict) -> str:
    """The score whose best checkpoint is kept where the config names none, without its budget."""
    if config.objective == "contrastive":
        return "retrieval/t2i_r1"
    return "eval/map" if config.data.multi_label else "eval/top1"


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

    images: the held-out ones, with `source`, `texts` (None: no retrieval) and `tokenizer`. Zero-shot needs classes and
    prompts. Raises UserError where neither can be done, and for prompts that cannot be used.
    """
    options, found = place._asdict(), []
    names, texts = images.source.class_names, images.texts
    sentences = zeroshot.templates(config.eval.prompts, config.data.eval_source or config.data.source) if names else ()
    if texts is not None:
        ids = [texts.ids(i) for i in range(len(texts.numbers))]
        found.append(
            lambda params: retrieval.run(
                forward, forward_texts, params, loaders, ids=ids, numbers=texts.numbers, **options
            )
        )
    if sentences:
        found.append(_zeroshot(config, forward, forward_texts, loaders, images, sentences, options))
    if not found:
        raise UserError(
            "nothing to evaluate: the held-out images have no texts for retrieval, and zero-shot needs their classes "
            "and prompts. Name a file of prompts in --config.eval.prompts, or another --config.data.eval_source."
        )
    return found


def _zeroshot(
    config: ConfigDict,
    forward: Forward,
    forward_texts: ForwardTexts,
    loaders: Mapping[int, Rows],
    images: Any,
    sentences: Sequence[str],
    options: dict,
) -> Evaluation:
    names = images.source.class_names
    text = dict(max_tokens=config.text.max_tokens, lower=config.text.lower)
    ids = zeroshot.tokenize(zeroshot.prompts(sentences, names), images.tokenizer, **text)
    options = options | dict(num_classes=len(names), multi_label=config.data.multi_label)
    options |= dict(probabilities=config.contrastive.loss)

    def run(params: Any) -> dict[str, float]:
        scale, bias = float(jnp.exp(params["logit_scale"])), float(params.get("logit_bias", 0.0))
        return zeroshot.run(forward, forward_texts, params, loaders, ids=ids, scale=scale, bias=bias, **options)

    return run


def few_shot(
    config: ConfigDict,
    forward: Forward,
    loaders: Sequence[Rows],
    chosen_CS: np.ndarray,
    classes: int,
    place: Place,
) -> Evaluation:
    """A linear probe on a few images a class; loaders: of the images chosen_CS, and of those to classify."""
    options = dict(shots=config.eval.fewshot_shots, ridge=config.eval.fewshot_ridge, num_classes=classes)
    return lambda params: fewshot.run(forward, params, *loaders, place.put, chosen_CS=chosen_CS, **options)
