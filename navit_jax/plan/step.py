"""Compiles the real training step of a config for a target's devices, from shapes alone.

The step, its optimizer and its shardings are those of `train.py`; only the arrays are shapes. K and the tokens of an
image come from the data where it can be opened, since they decide the program's shape; otherwise from the config's
resolution and dropping over stand-in images, and the report says so.
"""

import itertools
import re
import textwrap
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import ShapeDtypeStruct
from jax.sharding import Mesh
from ml_collections import ConfigDict

from input_pipeline import stream
from input_pipeline.errors import UserError
from input_pipeline.packed import Batch, Packed, Pairs
from input_pipeline.packing import Planner
from input_pipeline.pairing import TextPlan
from input_pipeline.text import from_config
from input_pipeline.text_index import Texts
from navit_jax import objectives, optim, sharding, train_step

STAND_IN_CLASSES, STAND_IN_STEPS = 1000, 100_000
_ROWS = 300  # planned for the mean of images and useful FLOPs a row


@dataclass(frozen=True)
class Rows:
    """A step's rows as they will be on average.

    plan: options of the planner, with L and K. images, tokens and flops (useful, of training) are of one row.
    text_plan, vocab_size: of a contrastive run.
    """

    plan: dict
    classes: int
    soft: bool
    images: float
    tokens: float
    flops: float
    note: str
    text_plan: TextPlan | None = None
    vocab_size: int = 0


@dataclass(frozen=True)
class Compiled:
    """A compiled step. text: its program; none, and `error`, where it needs more memory than the chip has.

    memory: bytes a chip by name, from `memory_analysis`, with `peak`; with an error, what the compiler says of it.
    """

    config: ConfigDict
    mesh: Mesh
    state: dict
    text: str
    memory: dict[str, int]
    seconds: float
    error: str


class _NoSource:
    """Stands for a source of which only sizes and classes are known."""

    class_names = tuple(map(str, range(STAND_IN_CLASSES)))


def adapt(config: ConfigDict, devices: Sequence[jax.Device]) -> tuple[ConfigDict, Mesh, list[str]]:
    """(the config as it will run there, its mesh, what was changed): whole rows a chip, the platform's dtype."""
    config, notes = config.copy_and_resolve_references(), []
    mesh = sharding.make_mesh(config.mesh, devices)
    ways, parts = mesh.shape["data"] * mesh.shape["fsdp"], objectives.parts(config)
    rows = config.packing.rows_per_step
    if rows % (ways * parts):
        config.packing.rows_per_step = -(-rows // (ways * parts)) * ways * parts
        notes.append(
            f"packing.rows_per_step={rows} does not divide over data x fsdp = {ways}{f' x {parts} parts' * (parts > 1)}"
            f": planned with {config.packing.rows_per_step}"
        )
    if config.model.dtype == "auto":
        config.model.dtype = "float32" if devices[0].platform == "cpu" else "bfloat16"
    return config, mesh, notes


def rows_of(config: ConfigDict) -> Rows:
    """K, images and useful FLOPs of a row: from the data, or from stand-ins where it cannot be opened."""
    try:
        images = stream.open_images(config, "train")
        note = f"the sizes of the {len(images.sizes)} training images of {config.data.source!r}"
    except (UserError, OSError, ImportError) as error:
        images = stream.Images(_NoSource(), _sizes(), STAND_IN_CLASSES, *_texts(config))
        note = (
            f"stand-in images, 1:2 to 2:1, of {STAND_IN_CLASSES} classes, as {config.data.source!r} cannot be opened "
            f"here ({textwrap.shorten(str(error), 120)})"
        )
    train = stream.train_stream(config, images)
    vocab_size = images.tokenizer.vocab_size if images.tokenizer else 0
    objective = objectives.make(config, images.classes, vocab_size)
    plans = list(itertools.islice(Planner(train.sampler, **train.plan), _ROWS))
    texts = [images.texts.lengths[train.sampler(p.positions).index] if images.texts else np.zeros(0) for p in plans]
    flops = np.mean([objective.flops(plan.keep, text) for plan, text in zip(plans, texts, strict=True)])
    mean_images, tokens = np.mean([len(plan.keep) for plan in plans]), np.mean([plan.keep.sum() for plan in plans])
    means = dict(images=float(mean_images), tokens=float(tokens), flops=float(flops))
    shape = dict(plan=train.plan, classes=images.classes, soft=train.builder.soft, text_plan=train.text_plan)
    return Rows(**shape, **means, vocab_size=vocab_size, note=note)


def _texts(config: ConfigDict) -> tuple:
    """Stand-in texts, each as long as it may be, and the tokenizer, which must be here; () in a run without texts."""
    if config.objective != "contrastive":
        return ()
    count, longest = len(_sizes()), config.text.max_tokens
    tokens, starts = np.zeros(count * longest, np.uint8), longest * np.arange(count + 1)
    return Texts(tokens, starts, np.arange(count, dtype=np.int32), 0), from_config(config.text)


def _sizes() -> np.ndarray:
    """[1000, 2] heights and widths of equal area, aspects evenly spread between 1:2 and 2:1 on a log scale."""
    aspect = 2 ** np.linspace(-1, 1, 1000)
    return np.round(500 * np.stack([aspect**0.5, aspect**-0.5], axis=1)).astype(np.int32)


def batch_shapes(config: ConfigDict, rows: Rows) -> Batch:
    """A step's batch as shapes."""
    b, length, slots = config.packing.rows_per_step, rows.plan["length"], rows.plan["slots"]
    values = stream.patch_size(config) ** 2 * config.data.channels
    labels = ((b, slots, rows.classes), np.float32) if rows.soft else ((b, slots), np.int32)
    dtype, pairs = np.uint16 if config.data.bits == 16 else np.uint8, None
    images = _packed(ShapeDtypeStruct((b, length, values), dtype), slots)._replace(capacity=rows.plan["capacity"])
    per_image = ShapeDtypeStruct((b, slots), np.int32)
    if rows.text_plan:
        per_text = ShapeDtypeStruct((b, rows.text_plan.slots), np.int32)
        texts = _packed(ShapeDtypeStruct((b, rows.text_plan.length), np.int32), rows.text_plan.slots)
        pairs = Pairs(texts, *[per_image, per_text] * 3)
    return Batch(images, ShapeDtypeStruct(*labels), per_image, pairs)


def _packed(values: ShapeDtypeStruct, slots: int) -> Packed:
    b, length = values.shape[:2]
    shapes = (b, length), (b, length, 3), (b, slots, 3)
    return Packed(values, *(ShapeDtypeStruct(shape, np.int32) for shape in shapes))


def lower(config: ConfigDict, mesh: Mesh, rows: Rows) -> tuple[jax.stages.Lowered, dict]:
    """(the training step, lowered for the mesh's devices, the state's shapes with their shardings)."""
    config = config.copy_and_resolve_references()
    total = config.total_steps or max(STAND_IN_STEPS, config.optim.warmup_steps + config.optim.cooldown_steps)
    config.optim.update(warmup_steps=min(config.optim.warmup_steps, total), cooldown_steps=0)
    objective = objectives.make(config, rows.classes, rows.vocab_size)
    tx, _ = optim.make_optimizer(config.optim, objective.shapes, total)
    ema = config.optim.ema_decay
    state = jax.eval_shape(lambda p: train_step.init_state(p, tx, bool(ema)), objective.shapes)
    places = sharding.state_shardings(mesh, state)
    options = dict(limit=objective.limit, ema_decay=ema, seed=config.seed)
    step = train_step.make_train_step(objective.gradient(mesh), tx, mesh, places, **options)
    host = ShapeDtypeStruct((mesh.size, 3), np.float32)
    state = jax.tree.map(lambda s, place: ShapeDtypeStruct(s.shape, s.dtype, sharding=place), state, places)
    return step.lower(state, batch_shapes(config, rows), host), state


def compile_step(config: ConfigDict, mesh: Mesh, rows: Rows) -> Compiled:
    """The step compiled for the mesh; a program that does not fit the chip's memory comes back with `error`."""
    start = time.perf_counter()
    lowered, state = lower(config, mesh, rows)
    try:
        with warnings.catch_warnings():  # a compilation cache cannot load programs for devices that are not here
            warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = over_memory(str(error))
        if needed is None:
            raise
        return Compiled(config, mesh, state, "", dict(peak=needed), time.perf_counter() - start, str(error))
    text = compiled.as_text()
    return Compiled(config, mesh, state, text, _memory(compiled), time.perf_counter() - start, "")


def over_memory(message: str) -> int | None:
    """Bytes that the compiler says it needs in a message that memory ran out; None for other messages."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    found = re.search(r"Used ([\d.]+)([KMGT]?) of", message) or re.search(r"\(([\d.]+)([KMGT]?)\) exceeds", message)
    return int(float(found[1]) * 1024 ** ("", "K", "M", "G", "T").index(found[2])) if found else 0


def _memory(compiled: Any) -> dict[str, int]:
    found = compiled.memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code")
    sizes = {name: int(getattr(found, f"{name}_size_in_bytes")) for name in names}
    held = sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"]
    return sizes | dict(peak=max(held, int(getattr(found, "peak_memory_in_bytes", 0))) + sizes["generated_code"])


def bytes_a_chip(tree: Any) -> int:
    """Bytes of a tree of shapes with shardings on one chip; of shapes without, everything."""

    def one(leaf: ShapeDtypeStruct) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        return int(np.prod(shape)) * np.dtype(leaf.dtype).itemsize

    return sum(one(leaf) for leaf in jax.tree.leaves(tree))
