"""Checkpoints of a run: asynchronous, atomic, the last k and the best; and their parameters for another run.

Orbax writes into a temporary folder and renames it, so a killed process leaves the earlier checkpoints whole. Its
`CheckpointManager` deletes in place, where a kill leaves half of a checkpoint that looks whole; so this is its
`AsyncCheckpointer`, and what goes is renamed first. What a disk breaks later is seen by `checkpoint_integrity`, and
the checkpoint before it is used. What a checkpoint must match to be used is in `compatibility`.
"""

import contextlib
import logging
import math
import os
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from input_pipeline.errors import UserError
from navit_jax import checkpoint_files as files
from navit_jax import checkpoint_integrity as integrity
from navit_jax.compatibility import check_compatible, init_from, named_leaves, nested, to_json

__all__ = ["Checkpoints", "check_compatible", "find_checkpoint", "init_from", "is_run", "restore_params"]

Tree = Any
_PARTIAL = (".orbax-checkpoint-tmp", ".deleted")  # unfinished saves and deletions
_FAILURES = (OSError, ValueError, jax.errors.JaxRuntimeError)  # tensorstore reports a full disk as a ValueError
_THERE = "there"
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
        options = ocp.AsyncOptions(
            create_directories_asynchronously=False,
            barrier_sync_fn=self._together,
            post_finalization_callback=lambda: integrity.record(self._unfinished(), jax.process_count()),
        )
        self._checkpointer = ocp.AsyncCheckpointer(integrity.telling(files.handler()), async_options=options)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"Cannot make {self.root}: {error}. Name a folder that you can write to.") from error

    def save(self, step: int, state: Tree, meta: dict, metrics: dict | None = None) -> bool:
        """Start to write a checkpoint; when it returns, `state` may be donated. False: the step is there already.

        state: dict {params, opt, step, ema (None or absent where none is kept)} of arrays. meta: JSON, its tuples come
        back as lists. metrics: numbers by name, for the best. Waits for the save before this one and raises its
        UserError; raises UserError, too, if the disk has no room for the state. A failure of one process is raised in
        all of them.
        """
        self.wait()
        if not self._swept:  # not when opened: an evaluation must not touch what a running trainer writes
            self._sweep()
        words = integrity.agree(_THERE if step in files.steps(self.root) else _no_room(self.root, step, state))
        if words[0] == _THERE:
            return False
        if any(words):
            raise UserError(next(word for word in words if word))
        numbers = {name: float(value) for name, value in (metrics or {}).items() if math.isfinite(value)}
        text = {"meta": to_json(meta), "metrics": numbers, "best_metric": self._best_metric, "checksums": True}
        if jax.default_backend() == "cpu":  # there Orbax holds the buffers: a step that donates them would wait for it
            state = _copy(state)
        arrays = ocp.args.PyTreeSave(nested(named_leaves(state)))
        items = ocp.args.Composite(state=arrays, meta=ocp.args.JsonSave(text))
        self._saving = step
        try:
            self._checkpointer.save(self.root / str(step), args=items)
        except _FAILURES as error:
            self._fail(error, in_background=False)
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
        the checkpoint lacks, has besides, or holds in another shape or dtype, and what is damaged.
        """
        self.wait()
        path = self.root / str(step)
        if not path.exists():
            raise UserError(f"No checkpoint at {path}; there are the steps {files.steps(self.root)}.")
        return integrity.first_whole([path], lambda path: files.read_like(path, like))[1]

    def restore_newest(
        self, like: Tree, check: Callable[[dict], None] | None = None, read_only: bool = False
    ) -> tuple[int, Tree, dict] | None:
        """(step, state, meta) of the newest checkpoint that is whole; None if there is no checkpoint.

        like: as of `restore`. check: called with the meta before arrays are read, raises where it does not fit.
        A damaged one is said aloud and renamed STEP.damaged, so that its step can be saved again; read_only: not
        renamed. Raises UserError if all are damaged (none is renamed), and what `restore` and `check` raise.
        """
        self.wait()
        paths = integrity.agreed_paths(self.root, files.steps(self.root)[::-1])
        if not paths:
            return None
        path, (state, meta), damaged = integrity.first_whole(paths, lambda path: files.read_like(path, like, check))
        if not read_only:
            integrity.set_aside(list(damaged))
        integrity.say(damaged, path, "" if read_only else "renamed {}.damaged, ")
        return int(path.name), state, meta

    def restore_meta(self, step: int) -> dict:
        """The meta of a step, without its arrays."""
        return files.read_text(self.root / str(step))["meta"]

    def wait(self) -> None:
        """Wait for the save under way, then drop what need not stay. Raises UserError if it could not be written."""
        try:
            self._checkpointer.wait_until_finished()
        except _FAILURES as error:
            self._fail(error, in_background=True)
        if self._saving is not None:
            self._saving = None
            self._prune()

    def close(self) -> None:
        """Wait as `wait` does, and release the threads."""
        self.wait()
        self._checkpointer.close()

    def _unfinished(self) -> epath.Path:
        return self._checkpointer.get_temporary_path(self.root / str(self._saving)).get()

    def _together(self, *, key: str, timeout_ms: int) -> None:
        """In Orbax's thread of each process: when all is written, and again when process 0 has renamed it."""
        said = ""
        if "async_write_complete" in key:
            try:
                integrity.record_share(self._unfinished(), jax.process_index(), jax.process_count())
            except Exception as error:  # whatever it is, the others wait to hear of it
                said = files.cause(error)
        integrity.all_well(said, timeout_ms)

    def _fail(self, error: Exception, in_background: bool) -> None:
        step, self._saving = self._saving, None
        for _ in range(8):  # Orbax keeps further failures of the same save for the next one
            with contextlib.suppress(*_FAILURES):
                self._checkpointer.wait_until_finished()
                break
        if in_background and not isinstance(error, integrity.Told):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 could not rename; the others wait for it
                integrity.agree(files.cause(error), timeout_ms=60_000)
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


def is_run(path: epath.PathLike) -> bool:
    """Whether a path is a run's folder, the folder of its checkpoints or one of these; other weights are not."""
    path = files.absolute(path)
    return (path / "state").exists() or (path / "checkpoints").exists() or bool(files.steps(path))


def find_checkpoint(path: epath.PathLike) -> epath.Path:
    """The checkpoint that a path means: itself, or of a run's folder the best, the latest where none was evaluated.

    Of a run's folder the next best is taken, and said, where one is damaged. Every process makes the same call.
    Raises UserError if there is none, or none that is whole.
    """
    return _found(path, lambda path: None)[0]


def restore_params(path: epath.PathLike) -> tuple[Tree, dict]:
    """(parameters, meta) of a run or of one checkpoint (`find_checkpoint`), for fine-tuning and evaluation.

    The parameters are nested dicts of numpy arrays, their moving average where one was kept; the devices that wrote
    them do not matter. Raises UserError if there is no checkpoint or it cannot be read.
    """
    return _found(path, files.read_params)[1]


def _found(path: epath.PathLike, read: Callable) -> tuple[epath.Path, Any]:
    path = files.absolute(path)
    paths = [path]
    if not (path / "state").exists():
        root = path / "checkpoints" if (path / "checkpoints").exists() else path
        paths = integrity.agreed_paths(root, files.by_merit(root))
    if not paths:
        raise UserError(f"No checkpoint in {path}; expected a run's folder, or one of its checkpoints/STEP.")
    path, result, damaged = integrity.first_whole(paths, read)
    integrity.say(damaged, path, "")
    return path, result


def _no_room(root: epath.Path, step: int, state: Tree) -> str:
    """What to say before a local disk fills, while nothing is half-written; "" if there is room.

    Counts every array once: all processes write to the one file system that holds the folder.
    """
    need = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(root).free if os.path.isdir(root) else need
    if free >= need:
        return ""
    return (
        f"No room for the checkpoint of step {step} in {root}: it needs {need / 1e9:.2f} GB, "
        f"{free / 1e9:.2f} GB are free. Earlier ones are whole. Free space there; the same command then resumes."
    )
