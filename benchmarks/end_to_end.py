"""Images a second of `train.py` on JPEGs, against what its parts allow: the step alone and the data's CPU time alone.

    python -m benchmarks.end_to_end [--json FILE] [--quick] [--lengths 256 1024] [--repeats 3]

Width 192, depth 12, 3 heads, patch 16, steps of 6144 tokens, AdamW, on generated JPEGs of about 500x400, sides
U(64, 256), beta dropping. A turn runs `train.py`, whose own log gives images/s (without compilation, the first
window left out), and then, in a process of its own, the parts: the loader, whose CPU-seconds an image are divided by
the cores, and the step on one batch that stays on the device. The peer is 1 / (step + data), both an image: a run that
keeps every core busy with these two and nothing else. A ratio of 1 is that; above it, a step leaves cores idle.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ml_collections import ConfigDict

from benchmarks import common
from benchmarks.jpeg_folder import jpeg_folder

ROOT = Path(__file__).parent.parent
TOKENS, STEPS, WINDOW = 6144, 20, 5
PARTS = "from benchmarks import end_to_end; from navit_jax import cli; cli.run(end_to_end.parts)"


def overrides(folder: Path, length: int, quick: bool) -> list[str]:
    """Flags of `train.py`."""
    rows = 2 if quick else TOKENS // length
    fields = {"data.eval_source": f"folder={folder}", "model.variant": "Ti/16", "augment.flip": False}
    fields |= {"packing.row_length": length, "packing.rows_per_step": rows, "drop.kind": "beta", "drop.mean_rate": 0.36}
    fields |= {"total_steps": 4 if quick else STEPS, "log_every_steps": 2 if quick else WINDOW, "optim.warmup_steps": 1}
    fields |= {"checkpoint_every_steps": 0, "eval_every_steps": 0, "eval.token_budgets": (64,), "eval.max_examples": 8}
    fields |= {"model.depth": 1, "model.width": 64, "model.heads": 1} if quick else {}
    config = f"--config={ROOT / 'configs/navit_s16.py'}:folder={folder}"
    return [config, *(f"--config.{name}={value}" for name, value in fields.items())]


def trained(flags: list[str]) -> dict:
    """`images_per_s`, `images` a step and the seconds a step waits for data, of a run of `train.py`."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, str(ROOT / "train.py"), *flags, f"--workdir={workdir}"]
        _run(command)
        lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    windows = [line for line in lines if "train/images_per_s" in line][1:]
    speed = statistics.median(line["train/images_per_s"] for line in windows)
    images = statistics.mean(line["train/images_per_s"] * line["time/step_s"] for line in windows)
    return dict(images_per_s=speed, images=images, wait=statistics.median(line["time/data_s"] for line in windows))


def measured_parts(flags: list[str]) -> dict:
    """What `parts` finds, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "parts.json"
        _run([sys.executable, "-c", PARTS, *flags], NAVIT_JAX_PARTS=str(result))
        return json.loads(result.read_text())


def _run(command: list[str], **env: str) -> None:
    done = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} ended with status {done.returncode}:\n{done.stderr[-3000:]}")


def parts(config: ConfigDict) -> None:
    """In the child: `data`, CPU-seconds an image of the loader, and `step`, seconds of one, into a JSON file."""
    import jax

    import train
    from benchmarks.input_pipeline import cpu_seconds
    from input_pipeline.size_index import cache_dir
    from navit_jax import console, distributed, sharding

    with distributed.session("", -1, -1, debug=False), tempfile.TemporaryDirectory() as workdir:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir("compilation")))
        run = train.build(config, Path(workdir))
        start, images, rows = cpu_seconds(), 0, config.packing.rows_per_step
        for batch, _ in run.rows.loader(max(4, run.total // 2)):
            images += int((batch.index >= 0).sum())
        found = dict(data=(cpu_seconds() - start) / images)
        host = sharding.put_host(run.mesh, (0.0, 0.0, False))
        on_device = jax.block_until_ready(sharding.put(run.mesh, batch, rows))
        step, times = console.compile_step(run.step, run.state, on_device, host), []
        for _ in range(run.total // 2 + 2):
            start = time.perf_counter()
            run.state, sums = step(run.state, on_device, host)
            jax.block_until_ready((run.state, sums))
            times.append(time.perf_counter() - start)
        found["step"] = statistics.median(times[2:])
        Path(os.environ["NAVIT_JAX_PARTS"]).write_text(json.dumps(found))


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=(256, 1024), help="tokens a row")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    folder, cores = jpeg_folder(*((16 if args.quick else 256), 400, 500)), common.cores()
    rows, lines = [], []
    for length in args.lengths:
        flags, turns = overrides(folder, length, args.quick), []
        for _ in range(1 if args.quick else args.repeats):
            whole, alone = trained(flags), measured_parts(flags)
            step, data = alone["step"] / whole["images"], alone["data"] / cores
            turns.append((1 / whole["images_per_s"], step + data, step, data, whole["wait"] / whole["images"]))
        pair = common.pair_of([turn[:2] for turn in turns])
        step, data, wait = (1e3 * statistics.median(values) for values in list(zip(*turns, strict=True))[2:])
        rows.append(common.row(f"sum of the parts L{length}", "images/s", 1 / pair.ours, 1 / pair.peer, pair.ratio))
        times = step, data, step + data, 1e3 * pair.ours, wait
        lines.append([length, *(f"{ms:.2f}" for ms in times), f"{1 / pair.ours:.1f}", f"**{pair.ratio:.3f}**"])
    print(common.header("jax", "flax", "grain", "simplejpeg", "opencv-python-headless", threads=cores))
    head = ["L", "step, ms/image", f"data, cpu-ms/image / {cores}", "sum", "train.py, ms/image", "of it waiting"]
    print(common.markdown([*head, "images/s", "ratio"], lines))
    common.write_rows(args.json, rows)


if __name__ == "__main__":
    main()
