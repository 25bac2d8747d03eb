"""What a run says and checks before its first step and after its last."""

import json
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from configs.recipes import EMBEDDED
from input_pipeline.errors import UserError
from navit_jax import distributed, host_memory, navit, objectives


class _BarHandler(logging.Handler):
    """Log lines above the progress bar, not through it; those of other processes with their number."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if distributed.is_lead():
            tqdm.write(text)
        else:
            print(f"process {jax.process_index()}: {text}", file=sys.stderr, flush=True)


def open_workdir(given: str, name: str, must_exist: bool) -> Path:
    """The run's folder, made where it is new. Raises UserError if it cannot be written."""
    logging.basicConfig(handlers=[_BarHandler()], level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("navit_jax.attention").setLevel(logging.INFO)  # which backend was chosen
    if "://" in given:
        raise UserError(f"--workdir={given}: runs are written to local folders, found an address")
    if not distributed.is_lead():  # the lead's words are enough; mistakes and warnings go to stderr
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    workdir = Path(given or _agreed(f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"))
    if must_exist and not workdir.is_dir():
        raise UserError(f"--eval_only found no folder {workdir}. Give --workdir of a run.")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".writable-{jax.process_index()}"  # not the process id: it is 1 in every container
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to the run's folder {workdir}: {error.strerror}. Give another with --workdir=PATH."
        ) from None
    warn_unused_accelerator()
    return workdir


def announce(workdir: Path, given: str) -> None:
    """Where the run is and how to resume it; once its config and its data have been found good."""
    command = [a for a in sys.argv if a != "--eval_only"] + ([] if given else [f"--workdir={workdir}"])
    print(f"run: {workdir}\nto resume: python {shlex.join(command)}", flush=True)


def check_shared(folder: str | os.PathLike) -> None:
    """Raises UserError, in all processes, where they do not see the same folder. Addresses are taken to be shared."""
    if jax.process_count() == 1 or "://" in str(folder):
        return
    probe = Path(folder) / f".shared-{_agreed(str(time.time_ns()))}"
    if distributed.is_lead():
        try:
            probe.parent.mkdir(parents=True, exist_ok=True)
            probe.touch()
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}. Name another folder.") from None
    distributed.gather(np.zeros(1))  # it is there now
    deadline = time.monotonic() + 10  # network file systems may show it late
    while not probe.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = np.flatnonzero(~distributed.gather(np.array(probe.exists())))
    if distributed.is_lead():
        probe.unlink(missing_ok=True)
    if len(blind):
        raise UserError(
            f"processes {blind.tolist()} do not see what process 0 writes to {folder}: checkpoints need a folder that "
            "all share. Give --workdir on a shared file system, or --checkpoints=gs://BUCKET/RUN."
        )


def _agreed(text: str) -> str:
    """Process 0's text, in every process; up to 256 bytes."""
    return distributed.broadcast(np.array(text.encode(), "S256")).item().decode()


def fit_schedule(optim: ConfigDict, total: int) -> None:
    """Shorten warm-up and cool-down that do not fit into a short run, and say so."""
    if optim.warmup_steps + optim.cooldown_steps > total:
        optim.warmup_steps, optim.cooldown_steps = (
            min(optim.warmup_steps, total // 10),
            min(optim.cooldown_steps, total // 3),
        )
        print(
            f"the run has only {total} steps: warm-up shortened to {optim.warmup_steps}, cool-down to "
            f"{optim.cooldown_steps}",
            flush=True,
        )


def write_config(workdir: Path, config: ConfigDict) -> None:
    """config.json, for people. Raises UserError where the disk is full."""
    if not distributed.is_lead():
        return
    try:
        (workdir / "config.json").write_text(config.to_json_best_effort(indent=1))
    except OSError as error:
        raise UserError(f"cannot write {workdir / 'config.json'}: {error.strerror}. Free space there.") from None


def warn_unused_accelerator() -> None:
    """Say so when jax computes on the CPU of a machine that has more."""
    if jax.default_backend() != "cpu" or os.environ.get("JAX_PLATFORMS") == "cpu":
        return
    for path, name, extra in (
        ("/dev/nvidia0", "GPU", "cuda13"),
        ("/dev/accel0", "TPU", "tpu"),
        ("/dev/vfio/0", "TPU", "tpu"),
    ):
        if Path(path).exists():
            print(
                f'warning: this machine has a {name} that jax does not use. pip install -U "jax[{extra}]"', flush=True
            )
            return


def describe(
    config: ConfigDict, rows: Any, held_out: int, objective: objectives.Objective, total: int, mesh: jax.sharding.Mesh
) -> None:
    """The run in a few lines: data, packing, model."""
    found, source, texts = rows.report, config.data.source, rows.text_plan
    if source in EMBEDDED:
        layout = "PATH/captions.csv: file_name,text" if texts else "PATH/class/image.jpg"
        own = f"{config_path()}:{'weights=PATH,' if config.name in ('finetune', 'probe') else ''}folder=PATH"
        print(f"data: the embedded set {source!r}; for your own: --config {own} ({layout})")
    print(
        f"      {len(rows.images.sizes)} training {'pairs' if texts else 'images'}, {held_out} held out, "
        f"{rows.images.classes} classes\n"
        f"rows: {rows.rows} a step of {rows.plan['length']} tokens and {rows.plan['slots']} slots; about "
        f"{found.images / found.rows:.1f} "
        f"images a row, {found.tokens / found.images:.0f} tokens an image, {100 * found.fill:.2f} % filled\n"
        f"{_texts(texts)}"
        f"model: {_size(config.model)}, {navit.count_params(objective.shapes) / 1e6:.1f} M parameters, "
        f"{jnp.dtype(objective.dtype).name} on "
        f"{_machines(mesh)}; {total} steps",
        flush=True,
    )


def _size(model: ConfigDict) -> str:
    usual = navit.variant(model.variant)
    size = usual | {name: model[name] for name in navit.OVERRIDES if model[name]}
    return model.variant if size == usual else "width {width}, {depth} layers, patches of {patch_size}".format(**size)


def _texts(plan: Any) -> str:
    if plan is None:
        return ""
    return (
        f"      texts in as many rows of {plan.length} tokens and {plan.slots} slots, {100 * plan.fill:.1f} % filled\n"
    )


def _machines(mesh: jax.sharding.Mesh) -> str:
    """8 cpu devices (data 2 x fsdp 4) of 2 processes."""
    text = f"{mesh.size} {jax.devices()[0].device_kind} device" + "s" * (mesh.size > 1)
    if mesh.size > 1:
        text += " (" + " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) + ")"
    return text + f" of {jax.process_count()} processes" * (jax.process_count() > 1)


def config_path() -> str:
    """The config file as the user gave it, without its argument."""
    given = next((b for a, b in zip(sys.argv, sys.argv[1:], strict=False) if a == "--config"), "")
    given = given or next((a.split("=", 1)[1] for a in sys.argv if a.startswith("--config=")), "configs/navit_b16.py")
    return given.split(":")[0]


def progress(start: int, total: int) -> tqdm:
    """The bar over the steps, in process 0."""
    hidden = not distributed.is_lead()
    return tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, mininterval=1.0, disable=hidden)


def compile_step(step: Any, *args: Any) -> Any:
    """The training step compiled ahead of its first call, saying how long it took."""
    start = time.perf_counter()
    print("compiling the step ...", end=" ", flush=True)
    compiled = step.lower(*args).compile()
    print(f"{time.perf_counter() - start:.1f} s", flush=True)
    host_memory.release()
    return compiled


def non_finite(workdir: Path, step: int, index: np.ndarray, sums: dict, names: Callable, last: int | None) -> UserError:
    """The error that stops a run whose numbers are not finite; the images of the batch go into a file.

    index: [B, K] of the batch, -1: empty. names: index -> name. last: step of the newest checkpoint.
    """
    images = index[index >= 0].tolist()
    path = workdir / "non_finite.json"
    if distributed.is_lead():
        path.write_text(json.dumps(dict(step=step, images=images, names=[names(i) for i in images]), indent=1))
    shown = ", ".join(map(str, images[:16])) + (", ..." if len(images) > 16 else "")
    again = "" if last is None else f" with --config.init_from={workdir}"
    return UserError(
        f"step {step}: loss {sums['loss']:g}, gradient norm {sums['grad_norm']:g}: not finite, nothing of it was "
        f"saved. Images of the batch (index in the source): [{shown}]; all, with names, in {path}. The last "
        f"checkpoint is {'none' if last is None else f'step {last}'}. Start a new run{again} and a lower "
        "--config.optim.lr, more warmup_steps or a clip_norm."
    )


def finish(workdir: Path, step: int, total: int) -> None:
    """The last lines: where everything lies."""
    if step < total:
        print(f"stopped at step {step} of {total} with a checkpoint; the same command with --workdir={workdir} goes on")
    else:
        pictures = ", ".join(path.name for path in sorted(workdir.glob("*.png")))
        print(f"done: metrics.jsonl, {pictures}, tensorboard/ and checkpoints/ are in {workdir}")


class StopSignal:
    """Turns SIGTERM and the first Ctrl-C into a request to save and stop; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before = {kind: signal.signal(kind, self._request) for kind in (signal.SIGTERM, signal.SIGINT)}

    def release(self) -> None:
        """Signals do again what they did before."""
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def _request(self, kind: int, frame: object) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, b"\nstopping after this step, with a checkpoint\n")  # print() may be what was interrupted
