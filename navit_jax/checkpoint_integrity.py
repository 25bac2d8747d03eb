"""What a checkpoint was when it was written, file by file with size and CRC-32, and what all processes say about it.

The record is made of what the disk holds, in Orbax's thread while training goes on, and before the rename that makes
a folder a checkpoint: killed at any moment, there is none without its record. Each process takes an equal share of
the files. CRC-32 finds every change within 32 neighbouring bits and misses one other in 4 billion. To record 0.35 GB
takes 0.10 s of one core, 1 GB 0.32 s, in the background, and as much again to verify before a restore (jax 0.10.2,
two CPU cores, files in the page cache: the disk or network sets the pace of any that are not).
"""

import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from input_pipeline.errors import UserError
from navit_jax.checkpoint_files import Damaged, cause, read_text, remove

RECORD = "checksums.json"  # all files, but for those in the shares of several processes, checksums.I.json
# Orbax writes these between the record and the rename; no restore reads them.
_NOT_READ = ("_CHECKPOINT_METADATA", "commit_success.txt")
_turns = itertools.count()


class Told(OSError):
    """What a process could not do, in its words; raised in all of them."""


def agree(said: str = "", timeout_ms: int = 600_000) -> list[str]:
    """What every process says, in their order; each waits for the last one. Every process makes the same calls.

    Goes through the coordinator, so that it works beside a training step: a collective on the devices must not run in
    another thread than the steps. Raises JaxRuntimeError if a process does not come in time.
    """
    if jax.process_count() == 1:
        return [said]
    from jax._src import distributed  # nothing public talks to others outside the devices; Orbax does the same

    client, turn, me = distributed.global_state.client, next(_turns), jax.process_index()
    client.key_value_set(f"navit_jax/{turn}/{me:06d}", f"={said}")
    client.wait_at_barrier(f"navit_jax/{turn}", timeout_ms)
    everyone = sorted(client.key_value_dir_get(f"navit_jax/{turn}/"))
    if turn:  # whoever came to this barrier has read what was said at the one before
        client.key_value_delete(f"navit_jax/{turn - 1}/{me:06d}")
    return [text[1:] for _, text in everyone]


def all_well(said: str = "", timeout_ms: int = 600_000) -> None:
    """Raise Told in every process if one of them has a failure to say."""
    failures = [f"process {i}: {text}" for i, text in enumerate(agree(said, timeout_ms)) if text]
    if failures:
        raise Told("; ".join(failures[:3]))


def failed_everywhere(error: BaseException) -> bool:
    """Whether no process got further than this one, so that all can still save together what they have."""
    try:
        return all(agree(f"{type(error).__name__}: {error}", timeout_ms=10_000))
    except jax.errors.JaxRuntimeError:
        return False


class _Write:
    """What Orbax awaits of a save: its own futures, and that the other processes have written, too."""

    def __init__(self, futures: Sequence[Any]) -> None:
        self.futures = futures

    def result(self, timeout: float | None = None) -> None:
        said = ""
        try:
            for future in self.futures:
                future.result(timeout=timeout)
        except Exception as error:
            if jax.process_count() == 1:
                raise
            said = cause(error)
        all_well(said, int(1000 * (timeout or 600)))


def telling(handler: ocp.CompositeCheckpointHandler) -> ocp.CompositeCheckpointHandler:
    """The handler, such that a process that cannot write tells the others instead of leaving them at a barrier."""
    async_save = handler.async_save

    async def save(directory: epath.Path, args: ocp.args.Composite) -> list[_Write]:
        return [_Write(await async_save(directory, args=args) or [])]

    handler.async_save = save  # not a subclass: Orbax knows its handlers by their very class
    return handler


def record_share(unfinished: epath.Path, process: int, processes: int) -> None:
    """Record the arrays' files that are this process's share, once all are written."""
    sums = _sums(unfinished, _array_files(unfinished)[process::processes])
    (unfinished / f"checksums.{process}.json").write_text(json.dumps(sums))


def record(unfinished: epath.Path, processes: int) -> None:
    """Record all the rest and the shares themselves: the last thing before the rename, by one process."""
    shared = set(_array_files(unfinished)) if processes > 1 else set()
    rest = [n for n in _files(unfinished) if n.split("/")[-1] not in _NOT_READ and n not in shared]
    written = {"processes": processes, "files": _sums(unfinished, rest)}
    (unfinished / RECORD).write_text(json.dumps(written | {"crc": _own_sum(written)}))


def problem(path: epath.Path, process: int = 0, processes: int = 1) -> str:
    """The first damage that this process finds in its share of a checkpoint's files: "FILE: what"; "" if none.

    A checkpoint without a record is of an earlier version: only what can be seen from its structure is looked at.
    """
    try:
        text = read_text(path)
        _json(path, "state/_METADATA")
        if not (path / RECORD).exists():
            return f"{RECORD}: missing" if text.get("checksums") else ""
        record = _json(path, RECORD)
        if _own_sum(record) != record["crc"]:
            return f"{RECORD}: its bytes changed"
        for name, was in _share(path, record, process, processes):
            wrong = _difference(path / name, *was)
            if wrong:
                return f"{name}: {wrong}"
    except Damaged as error:
        return error.what
    except (KeyError, TypeError, AttributeError) as error:
        return f"{RECORD}: not a record ({type(error).__name__}: {error})"
    return ""


def agreed_paths(root: epath.Path, steps: list[int]) -> list[epath.Path]:
    """As process 0 lists them: what the others see of a shared file system may be older."""
    return [root / str(step) for step in json.loads(agree(json.dumps(steps))[0])]


def first_whole(paths: list[epath.Path], read: Callable) -> tuple[epath.Path, Any, dict[epath.Path, str]]:
    """(path, what `read` makes of it, what is wrong with those before it), agreed by all processes."""
    damaged, me, processes = {}, jax.process_index(), jax.process_count()
    for path in paths:
        result, wrong = None, _first(agree(problem(path, me, processes)))
        if not wrong:
            try:
                result = read(path)
            except Damaged as error:
                wrong = error.what
            wrong = _first(agree(wrong))
        if not wrong:
            return path, result, damaged
        damaged[path] = wrong
    each = "\n".join(f"Cannot read the checkpoint {path}: {wrong}." for path, wrong in damaged.items())
    raise UserError(f"{each}\nName another, bring its files back from a copy, or start a new run in another --workdir.")


def _first(words: list[str]) -> str:
    return next((word for word in words if word), "")


def say(damaged: dict[epath.Path, str], used: epath.Path, done: str) -> None:
    """A line for each damaged checkpoint, from process 0. done: what was done with it, {} its name."""
    for path, wrong in damaged.items() if jax.process_index() == 0 else ():
        print(
            f"DAMAGED checkpoint {path}: {wrong}; {done.format(path.name)}step {used.name} is used instead", flush=True
        )


def set_aside(damaged: list[epath.Path]) -> None:
    """Rename STEP to STEP.damaged, where nothing lists or prunes it; no process goes on before process 0 is done.

    Raises UserError if that fails.
    """
    said = ""
    try:
        for path in damaged if jax.process_index() == 0 else ():
            aside = path.parent / f"{path.name}.damaged"
            remove(aside)
            path.rename(aside)
    except OSError as error:
        said = f"Cannot rename the damaged checkpoint {path}: {error}. Make {path.parent} writable."
    said = _first(agree(said))
    if said:
        raise UserError(said)


def _share(path: epath.Path, record: dict, process: int, processes: int) -> Iterator[tuple[str, list[int]]]:
    """What this process verifies: entries of the record and of as many writers' shares as fall to it."""
    yield from list(record["files"].items())[process::processes]
    writers = record["processes"] if record["processes"] > 1 else 0
    groups = min(writers, processes)
    for writer in range(process % groups, writers, groups) if groups else ():
        name = f"checksums.{writer}.json"
        wrong = _difference(path / name, *record["files"][name])
        if wrong:
            raise Damaged(path, f"{name}: {wrong}")
        readers = len(range(process % groups, processes, groups))
        yield from list(_json(path, name).items())[process // groups :: readers]


def _difference(file: epath.Path, size: int, crc: int) -> str:
    if not file.exists():
        return "missing"
    try:
        found = _sum(file)
    except OSError as error:
        return cause(error)
    if found[0] != size:
        return f"{found[0]} bytes, {size} were written"
    return "" if found[1] == crc else "its bytes changed since they were written (CRC-32)"


def _json(path: epath.Path, name: str) -> Any:
    try:
        return json.loads((path / name).read_text())
    except (OSError, ValueError) as error:
        raise Damaged(path, f"{name}: {type(error).__name__}: {cause(error)}") from error


def _sums(folder: epath.Path, names: list[str]) -> dict[str, tuple[int, int]]:
    state = _state(folder).name
    return {name: _sum(folder / name.replace("state/", f"{state}/", 1)) for name in names}


def _sum(file: epath.Path) -> tuple[int, int]:
    """(bytes, CRC-32)."""
    size = crc = 0
    with file.open("rb") as stream:
        while piece := stream.read(1 << 22):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return size, crc


def _own_sum(record: dict) -> int:
    return zlib.crc32(json.dumps([record["processes"], record["files"]]).encode())


def _state(folder: epath.Path) -> epath.Path:
    """The arrays' folder, which has a longer name until Orbax is done with it."""
    return next(p for p in folder.iterdir() if p.name.startswith("state"))


def _array_files(folder: epath.Path) -> list[str]:
    arrays = [p for p in _state(folder).iterdir() if p.is_dir()]
    return sorted(f"state/{array.name}/{file.name}" for array in arrays for file in array.iterdir())


def _files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name
