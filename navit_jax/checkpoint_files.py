"""What a checkpoint is on the disk, and how it is listed and read.

STEP/state holds the arrays (Orbax, zarr), STEP/meta/meta.json the rest: {meta, metrics, best_metric}, and
STEP/checksums.json what was written (`checkpoint_integrity`). STEP.damaged is one that was found broken. Neither
compression nor OCDBT: weights do not compress; 0.34 GB take 0.2 s of one core, against 1.6 s with both for 8 % less.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from input_pipeline.errors import UserError
from navit_jax.compatibility import differences, named_leaves, nested

Tree = Any


class Damaged(UserError):
    """A checkpoint that cannot be used; `what` is the file and what is wrong with it."""

    def __init__(self, path: epath.Path, what: str) -> None:
        super().__init__(f"Cannot read the checkpoint {path}: {what}. Name another.")
        self.what = what


def handler() -> ocp.CompositeCheckpointHandler:
    """How Orbax writes and reads the two items."""
    return ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False),
        meta=ocp.JsonCheckpointHandler(filename="meta.json"),
    )


def steps(root: epath.Path) -> list[int]:
    """The complete checkpoints under a folder, ascending; none if there is no folder."""
    paths = root.iterdir() if root.is_dir() else ()
    return sorted(int(p.name) for p in paths if p.name.isdigit() and ocp.utils.is_checkpoint_finalized(p))


def best(root: epath.Path, metric: str) -> int | None:
    """The step whose metric is largest, the later of equals; None if no checkpoint has it. Unreadable ones are none."""
    found = [(text["metrics"].get(metric), step) for step, text in _texts(root).items() if metric and text]
    return max(((value, step) for value, step in found if value is not None), default=(None, None))[1]


def by_merit(root: epath.Path) -> list[int]:
    """The steps in the order to use them in: by the last one's `best_metric` where evaluated, then the newest.

    What has no readable meta comes first: it might be the best, so its damage is to be said.
    """
    texts = _texts(root)
    metric = next((text["best_metric"] for _, text in sorted(texts.items(), reverse=True) if text), "")

    def merit(step: int) -> tuple[bool, float, int]:
        value = texts[step]["metrics"].get(metric) if texts[step] else None
        return not texts[step], -float("inf") if value is None else value, step

    return sorted(texts, key=merit, reverse=True)


def read_text(path: epath.Path) -> dict:
    """meta.json, read without Orbax. Raises Damaged if it cannot be read."""
    try:
        text = json.loads((path / "meta" / "meta.json").read_text())
        return {**text, "meta": text["meta"], "metrics": dict(text["metrics"]), "best_metric": text["best_metric"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(path, f"meta/meta.json: {type(error).__name__}: {error}") from error


def saved_arrays(path: epath.Path) -> dict[str, Any]:
    """Path in the state, shape and dtype of a checkpoint's arrays. Raises UserError if there is no checkpoint."""
    if not (path / "state").exists():
        raise UserError(f"No checkpoint at {path}; there are the steps {steps(path.parent)}.")
    with _reader(path) as reader:
        return named_leaves(reader.metadata(path).item_metadata["state"].tree)


def read_arrays(path: epath.Path, abstract: Tree, restore_args: Tree) -> Tree:
    """The arrays that `abstract` names, nested dicts both. Raises Damaged if they cannot be read."""
    state = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True)
    with _reader(path) as reader:
        return reader.restore(path, args=ocp.args.Composite(state=state))["state"]


def read_like(path: epath.Path, like: Tree, check: Callable[[dict], None] | None = None) -> tuple[Tree, dict]:
    """(state, meta) with the structure, shapes, dtypes and shardings of `like`; `check` sees the meta first.

    Raises UserError if the checkpoint holds other arrays, Damaged if it cannot be read.
    """
    meta = read_text(path)["meta"]
    if check:
        check(meta)
    wrong = differences(saved_arrays(path), named_leaves(like))
    if wrong:
        raise UserError(f"The checkpoint {path} does not fit this run:\n{wrong}\nUse the config that it was made with.")
    abstract = nested(named_leaves(jax.tree.map(_abstract, like)))
    leaves = named_leaves(read_arrays(path, abstract, ocp.checkpoint_utils.construct_restore_args(abstract)))
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in named_leaves(like)]), meta


def read_params(path: epath.Path) -> tuple[Tree, dict]:
    """(parameters as numpy arrays, their average where one was kept; meta). Raises Damaged if it cannot be read."""
    saved = saved_arrays(path)
    part = "ema" if any(name.startswith("ema/") for name in saved) else "params"
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in saved.items() if name.startswith(f"{part}/")}
    abstract = nested(shapes)
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract)
    return read_arrays(path, abstract, as_numpy)[part], read_text(path)["meta"]


def absolute(path: epath.PathLike) -> epath.Path:
    """Orbax takes absolute paths only; gs:// counts as one. Raises UserError if such a storage cannot be reached."""
    path = epath.Path(path).expanduser()
    if "://" in str(path):
        try:
            path.exists()
        except Exception as error:  # each storage's library has its own, and ImportError says which one to install
            raise UserError(f"Cannot reach {path}: {cause(error)}.") from error
    return path if path.is_absolute() else epath.Path(os.path.abspath(path))


def remove(path: epath.Path) -> None:
    """Delete a folder as far as it goes: a failed save may still be writing into it."""
    with contextlib.suppress(OSError):
        path.rmtree()


def cause(error: BaseException) -> str:
    """The storage's own words, in a line."""
    while error.__cause__:
        error = error.__cause__
    return str(error).split("\n")[0].split(" [source")[0].rstrip(".")[:400] or type(error).__name__


def _texts(root: epath.Path) -> dict[int, dict | None]:
    texts = {}
    for step in steps(root):
        try:
            texts[step] = read_text(root / str(step))
        except Damaged:
            texts[step] = None
    return texts


@contextlib.contextmanager
def _reader(path: epath.Path) -> Iterator[ocp.Checkpointer]:
    # Each process reads by itself: at Orbax's barrier, one that cannot read would leave the others waiting.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}, barrier_sync_key_prefix="read"
    )
    try:
        with ocp.Checkpointer(handler(), multiprocessing_options=alone) as reader:
            yield reader
    except Exception as error:  # Orbax raises the bare class for an array that it cannot read
        raise Damaged(path, cause(error)) from error


def _abstract(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
