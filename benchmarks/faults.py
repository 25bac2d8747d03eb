"""Kill a run of several processes at random moments, again and again, and compare what comes out with one left alone.

    python -m benchmarks.faults --kills 20 [--processes 2] [--devices 1] [--seed 0] [--json FILE]

Each round starts the same command, as a user would, and does one of: SIGKILL to one process, to all of them, SIGTERM to
one, or SIGKILL to all and then damage to a file of the newest checkpoint (cut, deleted, or a byte changed). The moment
is anywhere between the first import and the last save. A round that comes to the run's end is compared and a new run
begins. What counts: the sequence of losses is that of the undisturbed run to the last bit, nothing hangs, and the
survivors of a lost process stop by themselves.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks import common

ROOT = Path(__file__).parents[1]
KILL_ONE, KILL_ALL, TERM_ONE = "SIGKILL to one process", "SIGKILL to all", "SIGTERM to one process"
DAMAGE = "SIGKILL to all, newest checkpoint damaged"
KINDS = (KILL_ONE, KILL_ALL, TERM_ONE, DAMAGE)
LOST = 75  # exit status of a process whose peer was lost
LIMIT = 300  # seconds after which a start or a stop counts as a hang
RUN = dict(total_steps=400, log_every_steps=1, checkpoint_every_steps=10, keep_checkpoints=3)
MODEL = {"model.width": 32, "model.depth": 2, "model.heads": 2, "model.mlp_dim": 64, "packing.row_length": 32}
OTHER = {"packing.rows_per_step": 8, "eval.rows_per_step": 8, "eval.max_examples": 64, "optim.warmup_steps": 2}


@dataclass
class Round:
    """What was done and what followed. moment: seconds after the launch. step: the last in the log when it was done.

    stopped: seconds until all processes had ended. status: the launcher's. resumed: the step that the next start went
    on from, 0 for none. repeated: steps trained twice. fell_back: a damaged checkpoint was named and an older one used.
    """

    kind: str
    moment: float
    step: int = 0
    stopped: float = 0.0
    status: int = 0
    resumed: int = -1
    repeated: int = 0
    fell_back: bool = False


def main(argv: Sequence[str]) -> int:
    """Runs the campaign and prints its table; 1 if a sequence of losses differed."""
    parser = argparse.ArgumentParser(prog="benchmarks.faults", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=1, help="virtual CPU devices of each process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="also write the rounds here")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rounds, same = campaign(args, Path(folder))
    print(f"{table(rounds)}\n\n{common.machine()}; {common.versions('jax', 'orbax-checkpoint')}")
    print(f"\n{same.count(True)} of {len(same)} runs have the losses of the undisturbed one to the last bit")
    if args.json:
        Path(args.json).write_text(json.dumps(dict(rounds=[asdict(r) for r in rounds], identical=same), indent=1))
    return int(not all(same))


def campaign(args: argparse.Namespace, folder: Path) -> tuple[list[Round], list[bool]]:
    """(rounds, whether each finished run had the right losses)."""
    rng, rounds, same = random.Random(args.seed), [], []
    print("a run that nobody disturbs ...", flush=True)
    began = time.monotonic()
    launch(args, folder / "whole").wait(timeout=LIMIT)
    whole, length = losses(folder / "whole"), time.monotonic() - began
    if sorted(whole) != list(range(1, RUN["total_steps"] + 1)):
        raise RuntimeError(f"the undisturbed run did not finish:\n{(folder / 'whole.out').read_text()[-2000:]}")
    workdir, last, bar = folder / "run0", None, tqdm(total=args.kills, unit="kill")
    while len(rounds) < args.kills:
        kind = KINDS[len(rounds)] if len(rounds) < len(KINDS) else rng.choice(KINDS)
        found = disturb(args, workdir, Round(kind, rng.uniform(1, length)), rng)
        note_start(workdir, last)
        if found is not None:
            rounds.append(found)
            bar.update()
        last = found
        if finished(workdir):
            same.append(losses(workdir) == whole)
            workdir, last = folder / f"run{len(same)}", None
    bar.close()
    launch(args, workdir).wait(timeout=LIMIT)
    note_start(workdir, last)
    return rounds, [*same, losses(workdir) == whole]


def disturb(args: argparse.Namespace, workdir: Path, found: Round, rng: random.Random) -> Round | None:
    """One start of the run, hit at its moment; None if it had ended before."""
    process, began = launch(args, workdir), time.monotonic()
    while time.monotonic() - began < found.moment and process.poll() is None:
        time.sleep(0.01)
    found.step, hit = max(losses(workdir), default=0), time.monotonic()
    victims = sorted(trainers(process).values())
    if process.poll() is not None or not victims or finished(workdir):
        process.wait(timeout=LIMIT)
        return None
    for pid in [rng.choice(victims)] if found.kind in (KILL_ONE, TERM_ONE) else victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM if found.kind == TERM_ONE else signal.SIGKILL)
    process.wait(timeout=LIMIT)
    found.stopped, found.status = time.monotonic() - hit, process.returncode
    if found.kind == DAMAGE:
        damage(workdir, rng)
    return found


def note_start(workdir: Path, before: Round | None) -> None:
    """What a start said of the state that the round before it had left, if it came so far."""
    out = out_of(workdir).read_text()
    if before and before.resumed < 0 and "compiling" in out:
        match = re.search(r"resumed at step (\d+)", out)
        before.resumed = int(match[1]) if match else 0
        before.repeated = max(0, before.step - before.resumed)
        before.fell_back = "DAMAGED" in out


def launch(args: argparse.Namespace, workdir: Path) -> subprocess.Popen:
    """The run's command, its output in WORKDIR.out."""
    overrides = [f"--config.{name}={value}" for name, value in (RUN | MODEL | OTHER).items()]
    command = ["train.py", "--config=configs/quickstart.py", f"--workdir={workdir}", "--config.eval.token_budgets=16,"]
    start = ["launch/local.py", f"--processes={args.processes}", f"--devices={args.devices}", "--", sys.executable]
    with open(out_of(workdir), "w") as out:
        return subprocess.Popen([sys.executable, *start, *command, *overrides], cwd=ROOT, stdout=out, stderr=out)


def out_of(workdir: Path) -> Path:
    return Path(f"{workdir}.out")


def trainers(launcher: subprocess.Popen) -> dict[int, int]:
    """Process ids of what `launch/local.py` started, by their number in the run."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            parent = int(re.search(r"PPid:\t(\d+)", (folder / "status").read_text())[1])
        except OSError:
            continue
        number = next((word.split("=")[1] for word in words if word.startswith("--process_id=")), None)
        if parent == launcher.pid and number is not None:
            found[int(number)] = int(folder.name)
    return found


def losses(workdir: Path) -> dict[int, float]:
    """Loss by step, as the run's log has them; a line that a kill cut is no line."""
    found = {}
    path = Path(workdir) / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "train/loss" in record:
            found[record["step"]] = record["train/loss"]
    return found


def steps_saved(workdir: Path) -> list[int]:
    """The checkpoints of a run, ascending."""
    return sorted(int(path.name) for path in Path(workdir).glob("checkpoints/*") if path.name.isdigit())


def finished(workdir: Path) -> bool:
    return "done:" in out_of(workdir).read_text()


def damage(workdir: Path, rng: random.Random) -> None:
    """Cut, delete or change a byte of a random file of the newest checkpoint, where an older one remains."""
    saved = steps_saved(workdir)
    if len(saved) < 2:
        return
    folder = Path(workdir) / "checkpoints" / str(saved[-1])
    path = rng.choice(sorted(p for p in (folder / "state").rglob("*") if p.is_file() and p.stat().st_size))
    size, how = path.stat().st_size, rng.choice(("cut", "delete", "change"))
    if how == "delete":
        path.unlink()
    elif how == "cut":
        os.truncate(path, rng.randrange(size))
    else:
        data = bytearray(path.read_bytes())
        data[rng.randrange(size)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)


def table(rounds: list[Round]) -> str:
    """The campaign in Markdown."""
    head = ("what was done", "times", "before step 1", "all stopped within, s (median, max)", "exit status")
    lines = []
    for kind in [kind for kind in KINDS if kind in {r.kind for r in rounds}]:
        mine = [r for r in rounds if r.kind == kind]
        stops, again = [r.stopped for r in mine], [r.repeated for r in mine if r.resumed >= 0] or [0]
        statuses = [r.status for r in mine]
        counts = ", ".join(f"{status} ({statuses.count(status)})" for status in sorted(set(statuses)))
        took = f"{statistics.median(stops):.1f}, {max(stops):.1f}"
        repeated = f"{statistics.median(again):.0f}, {max(again)}"
        early = sum(not r.step for r in mine)
        lines.append((kind, len(mine), early, took, counts, repeated, sum(r.fell_back for r in mine)))
    return common.markdown((*head, "steps repeated (median, max)", "fell back"), lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
