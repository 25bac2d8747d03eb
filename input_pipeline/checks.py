"""Settings that are wrong by themselves, refused together before anything is opened.

What depends on the data (a row too short, classes that differ) is refused where it is found out.
"""

import os

from ml_collections import ConfigDict

from input_pipeline import augment
from input_pipeline.errors import UserError

Rule = tuple[str, bool, str]  # a field, whether it is fine, what it may hold
RECALLS = [f"retrieval/{side}_r{k}" for side in ("t2i", "i2t") for k in (1, 5, 10)]


def check(config: ConfigDict) -> None:
    """Raises UserError that names every field out of its range, what it holds and what it may hold."""
    rules = _rules(config) + _text_rules(config) + _objective_rules(config)
    wrong = [(name, expected) for name, fine, expected in rules if not fine]
    if wrong:
        raise UserError(
            "\n".join(f"{name} is {_value(config, name)!r}; expected {expected}." for name, expected in wrong)
        )
    augment.check(config.augment, config.data.channels, config.data.bits)


def _rules(c: ConfigDict) -> list[Rule]:
    drop, aug, parts, budgets = c.drop, c.augment, c.optim.accumulate_steps, c.eval.token_budgets
    group, fewest = c.packing.rows_per_group, 4 if c.model.merge else 1
    return [
        ("data.decode", c.data.decode in ("fast", "full"), "fast or full"),
        ("data.bits", c.data.bits in (8, 16), "8 or 16"),
        ("data.channels", c.data.channels >= 1, "1 or more"),
        ("data.max_bad_share", 0 <= c.data.max_bad_share <= 1, "a share from 0 to 1"),
        ("data.num_workers", c.data.num_workers >= 0, "0 or more"),
        ("packing.row_length", c.packing.row_length >= 1, "1 or more"),
        ("packing.rows_per_step", c.packing.rows_per_step >= 1, "1 or more"),
        ("packing.rows_per_group", group == 0 or group >= 1 and c.packing.rows_per_step % group == 0,
         f"a divisor of packing.rows_per_step={c.packing.rows_per_step}, or 0 to choose"),
        ("packing.look_ahead", c.packing.look_ahead >= 1, "1 or more"),
        ("packing.images_per_row", c.packing.images_per_row >= 0, "1 or more, or 0 to choose"),
        ("resolution.min_side", c.resolution.min_side > 0, "above 0"),
        ("resolution.std", c.resolution.std > 0, "above 0"),
        ("drop.kind", drop.kind == "none" or not c.model.merge, "none: model.merge joins whole squares of patches"),
        ("drop.rate", 0 <= drop.rate < 1, "a share from 0 to below 1"),
        ("drop.min_rate", 0 <= drop.min_rate < 1, "a share from 0 to below 1"),
        ("drop.max_rate", 0 < drop.max_rate <= 1, "a share above 0, to 1"),
        ("drop.end_rate", 0 <= drop.end_rate < 1, "a share from 0 to below 1"),
        ("drop.tau_examples", drop.tau_examples != 0, "another number than 0; negative decreases"),
        ("augment.mixup", aug.mixup >= 0, "0 or more"),
        ("augment.erasing", 0 <= aug.erasing <= 1, "a share from 0 to 1"),
        ("augment.randaugment_ops", aug.randaugment_ops >= 0, "0 or more"),
        ("optim.accumulate_steps", parts >= 0 and c.packing.rows_per_step % max(1, parts) == 0,
         f"a divisor of packing.rows_per_step={c.packing.rows_per_step}, or 0 to choose"),
        ("optim.ema_decay", 0 <= c.optim.ema_decay < 1, "a share from 0 to below 1"),
        ("optim.layer_decay", 0 < c.optim.layer_decay <= 1, "a factor above 0, to 1"),
        ("eval.token_budgets", len(budgets) > 0 and all(b >= fewest for b in budgets),
         f"one or more numbers of tokens, each {fewest} or more"),
        ("eval.fewshot_shots", all(s >= 1 for s in c.eval.fewshot_shots), "numbers of images, 1 or more each"),
        ("log_every_steps", c.log_every_steps >= 1, "1 or more"),
        ("objective", c.objective in ("supervised", "contrastive"), "supervised or contrastive"),
        ("loss.kind", not (c.data.multi_label and c.loss.kind == "softmax"), "sigmoid, as data.multi_label is set"),
    ]  # fmt: skip


def _text_rules(c: ConfigDict) -> list[Rule]:
    text, scale, cached = c.text, c.contrastive.init_scale, c.contrastive.cache_parts
    return [
        ("text.max_tokens", text.max_tokens >= 1, "1 or more"),
        ("text.row_length", text.row_length >= 0, "1 or more, or 0 to choose"),
        ("text.texts_per_row", text.texts_per_row >= 0, "1 or more, or 0 to choose"),
        ("contrastive.loss", c.contrastive.loss in ("softmax", "sigmoid"), "softmax or sigmoid"),
        ("contrastive.block", c.contrastive.block >= 1, "1 or more"),
        ("contrastive.cache_parts", cached >= 1 and c.packing.rows_per_step % max(1, cached) == 0,
         f"a divisor of packing.rows_per_step={c.packing.rows_per_step}"),
        ("text.vocab_size", text.vocab_size >= 0, "1 or more, or 0 for the tokenizer's"),
        ("text.pool", text.pool in ("last", "map", "mean"), "last, map or mean"),
        ("contrastive.embed_dim", c.contrastive.embed_dim >= 1, "1 or more"),
        ("contrastive.init_scale", 0 < scale <= c.contrastive.max_scale,
         f"above 0, to contrastive.max_scale={c.contrastive.max_scale:g}"),
    ]  # fmt: skip


def _objective_rules(c: ConfigDict) -> list[Rule]:
    """What the objective decides: scores there are, and what a loss over pairs has no meaning for."""
    kind = {"supervised": "eval", "contrastive": "zeroshot"}.get(c.objective)
    if kind is None:
        return []
    scores = [f"{kind}/{score}" for score in ("top1", "map" if c.data.multi_label else "top5")]
    scores = (RECALLS if kind == "zeroshot" else []) + scores
    scores = [f"{score}@{budget}" for score in scores for budget in reversed(c.eval.token_budgets)]
    scores += [f"fewshot/top1@{shots}shot" for shots in c.eval.fewshot_shots]
    example = f"a score of this run, {c.objective}, such as {scores[0] if scores else kind + '/top1@256'}"
    best = ("best_metric", not c.best_metric or c.best_metric in scores, example)
    if c.objective == "supervised":
        return [best]
    parts, prompts = c.optim.accumulate_steps, c.eval.prompts
    return [
        best,
        ("augment.mixup", not c.augment.mixup,
         "0, as a blend of two images has no text and the objective is contrastive"),
        ("optim.accumulate_steps", parts <= 1,
         "1 with a contrastive loss: its parts would see only their own negatives, which is another loss than the "
         f"whole step's. Set --config.optim.accumulate_steps=1 --config.contrastive.cache_parts={parts}: as little "
         "memory, the same gradient"),
        ("loss.label_smoothing", not c.loss.label_smoothing, "0, as the objective is contrastive and has no labels"),
        ("eval.prompts", prompts in ("", "none") or os.path.isfile(os.path.expanduser(prompts)),
         "a file that exists, a sentence a line with {} for the class; or none"),
        ("data.source", not c.data.source.startswith("tfds=imagenet2012"),
         "images with texts, as the objective is contrastive: ImageNet has labels and no texts. It can be "
         "data.eval_source, for zero-shot"),
    ]  # fmt: skip


def _value(config: ConfigDict, name: str) -> object:
    for part in name.split("."):
        config = config[part]
    return config
