"""Checkpoints of a run: asynchronous, atomic, the last k and the best; and their parameters for another run.

Orbax writes into a temporary folder and renames it, so a killed process leaves the earlier checkpoints whole. Its
`CheckpointManager` deletes in place, where a kill leaves half of a checkpoint that looks whole; so this is its
`AsyncCheckpointer`, and what goes is renamed first. What a checkpoint must match to be used is in `compatibility`.
"""

import logging
import math
import os
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from input_pipeline.errors import UserError
from navit_jax import checkpoint_files as files
from navit_jax.compatibility import check_compatible, differences, init_from, named_leaves, nested, to_json

__all__ = ["Checkpoints", "check_compatible", "find_checkpoint", "init_from", "restore_params"]

Tree = Any
_PARTIAL = (".orbax-checkpoint-tmp", ".deleted")  # unfinished saves and deletions
_FAILURES = (OSError, ValueError, jax.errors.JaxRuntimeError)  # tensorstore reports a full disk as a ValueError
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


_copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state))


class Checkpoints:
    """The checkpoints of one run, FOLDER/STEP.

    folder: `checkpoints` in the run's folder. keep_last: how many of the newest stay. best_metric: the key of `metrics`
    whose largest finite value marks one more to keep; "": none. Every process of a run makes the same calls. Raises
    UserError if the folder cannot be made.
    """

    def __init__(self, folder: epath.PathLike, keep_last: int, best_metric: str) -> None:
        if keep_last < 1:
            raise UserError(f"keep_checkpoints is {keep_last}; expected 1 or more: the last one is what resumes.")
        self.root = files.absolute(folder)
        self._keep_last, self._best_metric = keep_last, best_metric
        self._saving, self._swept = None, False
        # Asked to make its folders in the background, Orbax takes 5 minutes to report one that it cannot make.
        options = ocp.AsyncOptions(create_directories_asynchronously=False)
        self._checkpointer = ocp.AsyncCheckpointer(files.handler(), async_options=options)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"Cannot make {self.root}: {error}. Name a folder that you can write to.") from error

    def save(self, step: int, state: Tree, meta: dict, metrics: dict | None = None) -> bool:
        """Start to write a checkpoint; when it returns, `state` may be donated. False: the step is there already.

        state: dict {params, opt, step, ema (None or absent where none is kept)} of arrays. meta: JSON, its tuples come
        back as lists. metrics: numbers by name, for the best. Waits for the save before this one and raises its
        UserError; raises UserError, too, if the disk has no room for the state.
        """
        self.wait()
        if not self._swept:  # not when opened: an evaluation must not touch what a running trainer writes
            self._sweep()
        if step in files.steps(self.root):
            return False
        numbers = {name: float(value) for name, value in (metrics or {}).items() if math.isfinite(value)}
        text = {"meta": to_json(meta), "metrics": numbers, "best_metric": self._best_metric}
        _check_room(self.root, step, state)
        if jax.default_backend() == "cpu":  # there Orbax holds the buffers: a step that donates them would wait for it
            state = _copy(state)
        arrays = ocp.args.PyTreeSave(nested(named_leaves(state)))
        items = ocp.args.Composite(state=arrays, meta=ocp.args.JsonSave(text))
        self._saving = step
        try:
            self._checkpointer.save(self.root / str(step), args=items)
        except _FAILURES as error:
            self._fail(error)
        return True

    def latest(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return max(files.steps(self.root), default=None)

    def best(self) -> int | None:
        """The step with the largest `best_metric`, the later of equals; None if no checkpoint has it."""
        return files.best(self.root, self._best_metric)

    def restore(self, step: int, like: Tree) -> tuple[Tree, dict]:
        """(state, meta) of a step, with the structure, shapes, dtypes and shardings of `like`.

        like: tree of arrays or jax.ShapeDtypeStructs (no sharding: the default device). Raises UserError naming what
        the checkpoint lacks, has besides, or holds in another shape or dtype.
        """
        self.wait()
        path = self.root / str(step)
        wrong = differences(files.saved_arrays(path), named_leaves(like))
        if wrong:
            raise UserError(
                f"The checkpoint {path} does not fit this run:\n{wrong}\nUse the config that it was made with."
            )
        abstract = nested(named_leaves(jax.tree.map(_abstract, like)))
        leaves = named_leaves(files.read_arrays(path, abstract, ocp.checkpoint_utils.construct_restore_args(abstract)))
        state = jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in named_leaves(like)])
        return state, self.restore_meta(step)

    def restore_meta(self, step: int) -> dict:
        """The meta of a step, without its arrays."""
        return files.read_text(self.root / str(step))["meta"]

    def wait(self) -> None:
        """Wait for the save under way, then drop what need not stay. Raises UserError if it could not be written."""
        try:
            self._checkpointer.wait_until_finished()
        except _FAILURES as error:
            self._fail(error)
        if self._saving is not None:
            self._saving = None
            self._prune()

    def close(self) -> None:
        """Wait as `wait` does, and release the threads."""
        self.wait()
        self._checkpointer.close()

    def _fail(self, error: Exception) -> None:
        step, self._saving = self._saving, None
        self._sweep()
        last = self.latest()
        kept = "No earlier one exists." if last is None else f"The earlier ones are whole, the last of step {last}."
        raise UserError(
            f"The checkpoint of step {step} could not be written to {self.root}: {files.cause(error)}. {kept} "
            "Free space there or correct its permissions; the same command then resumes."
        ) from error

    def _prune(self) -> None:
        keep = {*files.steps(self.root)[-self._keep_last :], files.best(self.root, self._best_metric)}
        for step in set(files.steps(self.root)) - keep if jax.process_index() == 0 else ():
            doomed = self.root / f"{step}.deleted"  # a kill while its files go must not leave half of a checkpoint
            (self.root / str(step)).rename(doomed)
            files.remove(doomed)

    def _sweep(self) -> None:
        """Remove what a killed or failed process left unfinished."""
        self._swept = True
        for path in self.root.iterdir() if jax.process_index() == 0 and self.root.is_dir() else ():
            if any(mark in path.name for mark in _PARTIAL):
                files.remove(path)


def find_checkpoint(path: epath.PathLike) -> epath.Path:
    """The checkpoint that a path means: itself, or of a run's folder the best, the latest where none was evaluated.

    Raises UserError if there is none.
    """
    path = files.absolute(path)
    if (path / "state").exists():
        return path
    root = path / "checkpoints" if (path / "checkpoints").exists() else path
    steps = files.steps(root)
    if not steps:
        raise UserError(f"No checkpoint in {path}; expected a run's folder, or one of its checkpoints/STEP.")
    best = files.best(root, files.read_text(root / str(steps[-1]))["best_metric"])
    return root / str(steps[-1] if best is None else best)


def restore_params(path: epath.PathLike) -> tuple[Tree, dict]:
    """(parameters, meta) of a run or of one checkpoint (`find_checkpoint`), for fine-tuning and evaluation.

    The parameters are nested dicts of numpy arrays, their moving average where one was kept; the devices that wrote
    them do not matter. Raises UserError if there is no checkpoint or it cannot be read.
    """
    path = find_checkpoint(path)
    saved = files.saved_arrays(path)
    part = "ema" if any(name.startswith("ema/") for name in saved) else "params"
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in saved.items() if name.startswith(f"{part}/")}
    abstract = nested(shapes)
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract)
    return files.read_arrays(path, abstract, as_numpy)[part], files.read_text(path)["meta"]


def _check_room(root: epath.Path, step: int, state: Tree) -> None:
    """Say so before a local disk fills, while nothing is half-written."""
    need = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(root).free if os.path.isdir(root) else need
    if free < need:
        raise UserError(
            f"No room for the checkpoint of step {step} in {root}: it needs {need / 1e9:.2f} GB, "
            f"{free / 1e9:.2f} GB are free. Earlier ones are whole. Free space there; the same command then resumes."
        )


def _abstract(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
