"""From a config to its streams: the training rows and the evaluation rows, over the same planner and builder."""

import dataclasses
import functools
import logging
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from input_pipeline import dry_run, packing, pairing
from input_pipeline.budget import Sampler
from input_pipeline.errors import UserError
from input_pipeline.loader import Loader
from input_pipeline.rows import RowBuilder
from input_pipeline.size_index import Group
from input_pipeline.size_index import sizes as read_sizes
from input_pipeline.sources import Source, open_source
from input_pipeline.sources.problems import check_share, report
from input_pipeline.text import Tokenizer, from_config, table_size
from input_pipeline.text_index import Texts, check_distinct, check_missing, read_texts

log = logging.getLogger(__name__)
_EXACT_IMAGES = 2_000_000  # up to here an epoch or example count is converted to steps by planning all of it


@dataclasses.dataclass(frozen=True)
class Images:
    """A source with the sizes of its images, [N, 2] int32 (height, width); 0 for images that are left out.

    Left out are unreadable headers and, in a contrastive run, images without text. texts, tokenizer: of that run.
    files: [N] int32, equal for the examples that are one image with several texts; None: no two are.
    """

    source: Source
    sizes: np.ndarray
    classes: int
    texts: Texts | None = None
    tokenizer: Tokenizer | None = None
    files: np.ndarray | None = None


def open_images(config: ConfigDict, split: str, group: Group | None = None) -> Images:
    """The images of `train` or `eval`. Raises UserError when too many cannot be used, or the tokenizer cannot.

    group: the processes of the run, which read the headers and the texts together.
    """
    data = config.data
    spec = (data.eval_source or data.source) if split == "eval" else data.source
    name = data.eval_split if split == "eval" else data.train_split
    fields = {field: data[field] for field in ("image_field", "label_field", "text_field", "multi_label")}
    source = open_source(spec, name, **fields, hold_out=not data.eval_source)
    if lead := group is None or group.rank == 0:
        report(source, spec)
    if config.objective == "contrastive" or not spec.startswith("tar="):  # a label needs no text, with image or without
        check_share(source, spec, data.max_bad_share)
    if not len(source):
        raise UserError(f"{spec} has no images in its split {name!r}")
    sizes = read_sizes(source, group=group)
    bad = np.flatnonzero(sizes.min(axis=1) == 0)
    for i in bad[:10] if lead else ():
        log.warning("unreadable header, left out: %s", source.describe(int(i)))
    if len(bad) > data.max_bad_share * len(sizes):
        raise UserError(
            f"{len(bad)} of {len(sizes)} images in {spec} have an unreadable header, above data.max_bad_share="
            f"{data.max_bad_share:g}; the first is {source.describe(int(bad[0]))}. Remove them or raise "
            "--config.data.max_bad_share."
        )
    files = source.image_numbers() if hasattr(source, "image_numbers") else None
    images = Images(source, sizes, len(source.class_names), files=files)
    return _with_texts(config, images, spec, split, group) if config.objective == "contrastive" else images


def _with_texts(config: ConfigDict, images: Images, spec: str, split: str, group: Group | None) -> Images:
    """The images that have a text. A held-out set of classes without any text stays whole, for zero-shot alone."""
    text, source = config.text, images.source
    tokenizer = from_config(text)
    table_size(text, tokenizer.vocab_size)  # refused before all texts are read
    texts = read_texts(source, tokenizer, max_tokens=text.max_tokens, lower=text.lower, group=group)
    if split == "eval" and images.classes and not texts.lengths.any():
        return dataclasses.replace(images, tokenizer=tokenizer)
    check_missing(texts, source, spec, config.data.max_bad_share)
    if split == "train":
        check_distinct(texts, spec, text.max_tokens)
    sizes = np.where(texts.lengths[:, None] > 0, images.sizes, 0)
    return dataclasses.replace(images, sizes=sizes, texts=texts, tokenizer=tokenizer)


def match_classes(train: Images, held_out: Images) -> Images:
    """The held-out images with the training set's classes. Raises UserError where they are others.

    Classes that were only counted ('0', '1', ...) may end earlier there. A contrastive run learns none: any will do.
    """
    if train.texts is not None:
        return held_out
    ours, theirs = train.source.class_names, held_out.source.class_names
    if not ours:
        raise UserError(
            "the training set has no classes: --config.data.label_field names the field that holds the label"
        )
    counted = all(name == str(i) for i, name in enumerate(ours))
    if ours != theirs and not (counted and theirs == ours[: len(theirs)]):
        only = sorted(set(ours) - set(theirs))[:5], sorted(set(theirs) - set(ours))[:5]
        raise UserError(
            f"the held-out set's {len(theirs)} classes are not the training set's {len(ours)}: only in training "
            f"{only[0]}, only held out {only[1]}. Both need the same classes in the same order."
        )
    return dataclasses.replace(held_out, classes=len(ours))


def patch_size(config: ConfigDict) -> int:
    """Pixels a patch side, of `model.patch_size` or, where that is 0, of `model.variant`."""
    try:
        size = config.model.patch_size or int(config.model.variant.split("/")[1])
        if size > 0:
            return size
    except (IndexError, ValueError):
        pass
    raise UserError(f"model.variant is {config.model.variant!r}; expected a size and a patch, such as B/16") from None


@dataclasses.dataclass(frozen=True)
class TrainStream:
    """The training rows: `loader(steps)` iterates them.

    plan: options of their `Planner`, with L, K and the capacity profile. text_plan: T and M, if it has texts.
    """

    images: Images
    sampler: Sampler
    builder: RowBuilder
    plan: dict
    rows: int
    text_plan: pairing.TextPlan | None = None

    def loader(
        self, steps: int, *, start: int = 0, snapshot: dict | None = None, local: Sequence[int] | None = None
    ) -> Loader:
        """Steps start..steps - 1; `snapshot` is the planner's behind step start - 1."""
        plan = self.plan | dict(snapshot=snapshot)
        return Loader(self.builder, plan, rows=self.rows, steps=steps, start=start, local=local)

    @functools.cached_property
    def report(self) -> dry_run.DryRun:
        """Fill and images a row, from planning the first images; nothing is read."""
        return dry_run.dry_run(self.sampler, dry_run.IMAGES, **self.plan)


def train_stream(config: ConfigDict, images: Images) -> TrainStream:
    """The training rows of a config; see `configs/base.py` for the fields."""
    sampler = Sampler(config, images.sizes, patch_size(config))
    length, rows = config.packing.row_length, config.packing.rows_per_step
    if sampler.largest_kept > length:
        raise UserError(
            f"packing.row_length={length} is too small for one image: resolution.max_side="
            f"{config.resolution.max_side} at patch {sampler.patch} gives up to {sampler.largest_kept} tokens. Set "
            f"--config.packing.row_length={sampler.largest_kept} or lower --config.resolution.max_side."
        )
    plan = dry_run.plan_options(config, [sampler], length, rows)
    texts, files, text_plan = images.texts, images.files, None
    if texts is not None:
        text_plan = pairing.choose(dry_run.windows(config, sampler), plan, texts, rows, dry_run.IMAGES, config.text)
    options = dict(classes=images.classes, texts=texts, files=files, text_plan=text_plan)
    builder = RowBuilder(images.source, sampler, config, length=length, slots=plan["slots"], **options)
    return TrainStream(images, sampler, builder, plan, rows, text_plan)


def _different(images: Images) -> np.ndarray:
    """The numbers of all images, of those with several texts the first that can be used, if any can."""
    if images.files is None:
        return np.arange(len(images.sizes))
    order = np.argsort(images.sizes.min(axis=1) == 0, kind="stable")
    return np.sort(order[np.unique(images.files[order], return_index=True)[1]])


def eval_rows(config: ConfigDict) -> int:
    """B in evaluation."""
    return config.eval.rows_per_step or config.packing.rows_per_step


def eval_loader(
    config: ConfigDict,
    images: Images,
    budget: int,
    *,
    indices: np.ndarray | None = None,
    local: Sequence[int] | None = None,
) -> Loader:
    """Every image once (or `indices`), at most `budget` tokens each, whole steps with empty rows at the end.

    local: which of a step's rows this process builds; None: all.
    """
    return eval_loaders(config, [(images, budget, indices)], local)[0]


def eval_loaders(
    config: ConfigDict, wanted: Sequence[tuple[Images, int, np.ndarray | None]], local: Sequence[int] | None = None
) -> list[Loader]:
    """Evaluation rows for each (images, budget, indices); with one L, K and capacity, so the model compiles once."""
    patch, rows = patch_size(config), eval_rows(config)
    length = max(config.packing.row_length, *(budget for _, budget, _ in wanted))
    samplers = [
        Sampler(config, images.sizes, patch, budget, _chosen(config, images) if indices is None else indices)
        for images, budget, indices in wanted
    ]
    common, loaders = dry_run.plan_options(config, samplers, length, rows), []
    for sampler, (images, _, _) in zip(samplers, wanted, strict=True):
        plan = common | dict(stop=len(sampler.indices))
        count = sum(1 for _ in packing.Planner(sampler, **plan))
        builder = RowBuilder(images.source, sampler, config, length=length, slots=plan["slots"], classes=images.classes)
        loaders.append(Loader(builder, plan, rows=rows, steps=-(-count // rows), local=local))
    return loaders


def _chosen(config: ConfigDict, images: Images) -> np.ndarray:
    """The numbers of the images to evaluate."""
    indices, most = _different(images), config.eval.max_examples
    if 0 < most < len(indices):  # spread over the set, which may be sorted
        indices = indices[np.arange(most) * len(indices) // most]
    return indices


def total_steps(config: ConfigDict, stream: TrainStream) -> int:
    """Training steps from `total_steps`, `total_examples` or `total_epochs`, the latter two by planning dry."""
    if config.total_steps > 0:
        return config.total_steps
    examples = config.total_examples or round(config.total_epochs * len(stream.images.sizes))
    if examples < 1:
        raise UserError("a run needs a length: set --config.total_steps, total_examples or total_epochs")
    if examples <= _EXACT_IMAGES:
        planner = packing.Planner(stream.sampler, stop=examples, **stream.plan)
        return max(1, sum(1 for _ in planner) // stream.rows)
    # Too many to plan: eight windows spread over the run (token dropping may be scheduled) give rows an image.
    starts, window = np.linspace(0, examples - dry_run.IMAGES, 8).astype(np.int64), dry_run.IMAGES
    runs = [dry_run.dry_run(lambda p, s=s: stream.sampler(p + s), window, **stream.plan) for s in starts]
    return max(1, round(examples * sum(r.rows for r in runs) / sum(r.images for r in runs) / stream.rows))


def fingerprint(images: Images) -> dict:
    """What the training rows depend on besides the config; `source` stands for names, sizes and times of its files."""
    sizes, found = images.sizes.astype(np.int64), {}
    if images.texts is not None:
        found = dict(tokenizer=images.tokenizer.fingerprint(), texts=int((images.texts.lengths > 0).sum()))
    return dict(source=images.source.fingerprint(), images=len(sizes), sizes=int(sizes.sum()), **found)
