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
from input_pipeline.packed import Batch, Packed
from input_pipeline.packing import Planner
from navit_jax import losses, navit, optim, sharding, train_step

STAND_IN_CLASSES, STAND_IN_STEPS = 1000, 100_000
_ROWS = 300  # planned for the mean of images and useful FLOPs a row


@dataclass(frozen=True)
class Rows:
    """A step's rows as they will be on average.

    plan: options of the planner, with L and K. images, tokens and flops (useful, of training) are of one row.
    """

    plan: dict
    classes: int
    soft: bool
    images: float
    tokens: float
    flops: float
    note: str


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
    ways = mesh.shape["data"] * mesh.shape["fsdp"] * config.optim.accumulate_steps
    rows = config.packing.rows_per_step
    if rows % ways:
        config.packing.rows_per_step = -(-rows // ways) * ways
        parts = f" x {config.optim.accumulate_steps} parts" if config.optim.accumulate_steps > 1 else ""
        notes.append(
            f"packing.rows_per_step={rows} does not divide over data x fsdp = {ways // config.optim.accumulate_steps}"
            f"{parts}: planned with {config.packing.rows_per_step}"
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
        images = stream.Images(_NoSource(), _sizes(), STAND_IN_CLASSES)
        note = (
            f"stand-in images, 1:2 to 2:1, of {STAND_IN_CLASSES} classes, as {config.data.source!r} cannot be opened "
            f"here ({textwrap.shorten(str(error), 120)})"
        )
    train = stream.train_stream(config, images)
    model, _, _ = navit.for_classes(config, images.classes)
    plans = list(itertools.islice(Planner(train.sampler, **train.plan), _ROWS))
    flops = np.mean([3 * navit.flops_forward(model, plan.keep) for plan in plans])
    kept = [plan.keep for plan in plans]
    mean_images, tokens = np.mean([len(keep) for keep in kept]), np.mean([keep.sum() for keep in kept])
    return Rows(train.plan, images.classes, train.builder.soft, float(mean_images), float(tokens), float(flops), note)


def _sizes() -> np.ndarray:
    """[1000, 2] heights and widths of equal area, aspects evenly spread between 1:2 and 2:1 on a log scale."""
    aspect = 2 ** np.linspace(-1, 1, 1000)
    return np.round(500 * np.stack([aspect**0.5, aspect**-0.5], axis=1)).astype(np.int32)


def batch_shapes(config: ConfigDict, rows: Rows) -> Batch:
    """A step's batch as shapes."""
    b, length, slots = config.packing.rows_per_step, rows.plan["length"], rows.plan["slots"]
    values = stream.patch_size(config) ** 2 * config.data.channels
    labels = ((b, slots, rows.classes), np.float32) if rows.soft else ((b, slots), np.int32)
    images = Packed(
        ShapeDtypeStruct((b, length, values), np.uint16 if config.data.bits == 16 else np.uint8),
        ShapeDtypeStruct((b, length), np.int32),
        ShapeDtypeStruct((b, length, 3), np.int32),
        ShapeDtypeStruct((b, slots, 3), np.int32),
    )
    return Batch(images, ShapeDtypeStruct(*labels), ShapeDtypeStruct((b, slots), np.int32))


def lower(config: ConfigDict, mesh: Mesh, rows: Rows) -> tuple[jax.stages.Lowered, dict]:
    """(the training step, lowered for the mesh's devices, the state's shapes with their shardings)."""
    config = config.copy_and_resolve_references()
    total = config.total_steps or max(STAND_IN_STEPS, config.optim.warmup_steps + config.optim.cooldown_steps)
    config.optim.update(warmup_steps=min(config.optim.warmup_steps, total), cooldown_steps=0)
    _, graph, shapes = navit.for_classes(config, rows.classes)
    tx, _ = optim.make_optimizer(config.optim, shapes, total)
    ema = config.optim.ema_decay
    state = jax.eval_shape(lambda p: train_step.init_state(p, tx, bool(ema)), shapes)
    places = sharding.state_shardings(mesh, state)
    options = dict(accumulate=config.optim.accumulate_steps, ema_decay=ema, seed=config.seed)
    step = train_step.make_train_step(graph, tx, losses.make_loss(config.loss), mesh, places, **options)
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
