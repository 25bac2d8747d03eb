"""Settings that are wrong by themselves, refused together before anything is opened.

What depends on the data (a row too short, classes that differ) is refused where it is found out.
"""

from ml_collections import ConfigDict

from input_pipeline import augment
from input_pipeline.errors import UserError


def check(config: ConfigDict) -> None:
    """Raises UserError that names every field out of its range, what it holds and what it may hold."""
    c, parts = config, config.optim.accumulate_steps
    drop, aug, scores = c.drop, c.augment, ("top1", "top5", "ece", "map")
    budgets = c.eval.token_budgets
    best, text, cached = c.best_metric, c.text, c.contrastive.cache_parts
    rules = [
        ("data.decode", c.data.decode in ("fast", "full"), "fast or full"),
        ("data.bits", c.data.bits in (8, 16), "8 or 16"),
        ("data.channels", c.data.channels >= 1, "1 or more"),
        ("data.max_bad_share", 0 <= c.data.max_bad_share <= 1, "a share from 0 to 1"),
        ("data.num_workers", c.data.num_workers >= 0, "0 or more"),
        ("packing.row_length", c.packing.row_length >= 1, "1 or more"),
        ("packing.rows_per_step", c.packing.rows_per_step >= 1, "1 or more"),
        ("packing.open_rows", c.packing.open_rows >= 1, "1 or more"),
        ("packing.images_per_row", c.packing.images_per_row >= 0, "1 or more, or 0 to choose"),
        ("resolution.min_side", c.resolution.min_side > 0, "above 0"),
        ("resolution.std", c.resolution.std > 0, "above 0"),
        ("drop.rate", 0 <= drop.rate < 1, "a share from 0 to below 1"),
        ("drop.min_rate", 0 <= drop.min_rate < 1, "a share from 0 to below 1"),
        ("drop.max_rate", 0 < drop.max_rate <= 1, "a share above 0, to 1"),
        ("drop.end_rate", 0 <= drop.end_rate < 1, "a share from 0 to below 1"),
        ("drop.tau_examples", drop.tau_examples != 0, "another number than 0; negative decreases"),
        ("augment.mixup", aug.mixup >= 0, "0 or more"),
        ("augment.mixup", not aug.mixup or c.objective != "contrastive",
         "0, as a blend of two images has no text and the objective is contrastive"),
        ("augment.erasing", 0 <= aug.erasing <= 1, "a share from 0 to 1"),
        ("augment.randaugment_ops", aug.randaugment_ops >= 0, "0 or more"),
        ("optim.accumulate_steps", parts >= 1 and c.packing.rows_per_step % max(1, parts) == 0,
         f"a divisor of packing.rows_per_step={c.packing.rows_per_step}"),
        ("optim.ema_decay", 0 <= c.optim.ema_decay < 1, "a share from 0 to below 1"),
        ("eval.token_budgets", len(budgets) > 0 and all(b >= 1 for b in budgets), "one or more numbers of tokens"),
        ("eval.fewshot_shots", all(s >= 1 for s in c.eval.fewshot_shots), "numbers of images, 1 or more each"),
        ("log_every_steps", c.log_every_steps >= 1, "1 or more"),
        ("objective", c.objective in ("supervised", "contrastive"), "supervised or contrastive"),
        ("text.max_tokens", text.max_tokens >= 1, "1 or more"),
        ("text.row_length", text.row_length >= 0, "1 or more, or 0 to choose"),
        ("text.texts_per_row", text.texts_per_row >= 0, "1 or more, or 0 to choose"),
        ("contrastive.loss", c.contrastive.loss in ("softmax", "sigmoid"), "softmax or sigmoid"),
        ("contrastive.block", c.contrastive.block >= 1, "1 or more"),
        ("contrastive.cache_parts", cached >= 1 and c.packing.rows_per_step % max(1, cached) == 0,
         f"a divisor of packing.rows_per_step={c.packing.rows_per_step}"),
        ("text.vocab_size", text.vocab_size >= 0, "1 or more, or 0 for the tokenizer's"),
        ("loss.kind", not (c.data.multi_label and c.loss.kind == "softmax"), "sigmoid, as data.multi_label is set"),
        ("best_metric", not best or best.startswith(("fewshot/", "zeroshot/", "retrieval/")) or best in
         [f"eval/{s}@{b}" for s in scores for b in budgets], f"such as eval/top1@{max(budgets, default=256)}"),
    ]  # fmt: skip
    wrong = [(name, expected) for name, fine, expected in rules if not fine]
    if wrong:
        raise UserError("\n".join(f"{name} is {_value(c, name)!r}; expected {expected}." for name, expected in wrong))
    augment.check(aug, c.data.channels, c.data.bits)


def _value(config: ConfigDict, name: str) -> object:
    for part in name.split("."):
        config = config[part]
    return config
