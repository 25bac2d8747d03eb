"""What training steps take on TPU slices, from programs compiled for them; nothing runs on a TPU.

    python -m benchmarks.scaling --json scaling.json [--only TEXT] [--figure docs/scaling.png]

Needs `libtpu` (pip install "jax[tpu]"), no TPU. The table: four model sizes on three slices. Weak scaling: bytes that
each chip sends a step at 8, 64 and 256 chips with the same rows a chip. A plan takes half a minute to several; each is
written to the JSON file when it is done, and those already there are not compiled again.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import jax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from benchmarks import common
from configs import recipes
from navit_jax import plan
from navit_jax.plan import hlo, topology

# Rows a chip and whether the state is shared. B is copied to every chip; the others share their
# state over one axis of the slice: over all of a 4x4 the compiler cuts L/16's products into 16 pieces, and its cost
# model gives 245 ms a step instead of 120.
SIZES = {"B/16": (32, False), "L/16": (16, True), "So400m/14": (16, True), "g/14": (8, True)}
SLICES = ("v5e:4x4", "v5e:16x16", "v6e:16x16")
WEAK_SLICES = ("v5e:2x4", "v5e:8x8", "v5e:16x16")
WEAK = {  # of L/16, 8 rows a chip: name -> (fsdp for so many chips)
    "data only": lambda chips: 1,
    "fsdp 8 x data": lambda chips: 8,
    "fsdp only": lambda chips: chips,
}
SHORT = {kind: "".join(word[0] for word in kind.split("-")).upper() for kind in hlo.KINDS}  # all-reduce: AR
INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
COLOURS, MARKERS = ("#2f6fde", "#f28e2b", "#8c6d4f"), ("o", "s", "^")


def recipe(variant: str, chips: int, rows: int, fsdp: int) -> ConfigDict:
    """The ImageNet recipe of `configs` with rows of 256 tokens, sides up to 256 pixels, or 224 at patch 14."""
    config = recipes.navit(variant, variant, "imagenet2012", demo_steps=1, demo_lr=1e-3)
    config.resolution.max_side = 16 * int(variant.split("/")[1])
    config.packing.rows_per_step = rows * chips
    config.mesh.fsdp = fsdp
    return config


def cases() -> dict[str, tuple]:
    """{name: (kind, slice, variant, rows a chip, fsdp)}."""
    found = {}
    for where in SLICES:
        for variant, (rows, shared) in SIZES.items():
            fsdp = topology.parse(where).shape[0] if shared else 1
            found[f"{variant} {where}"] = ("table", where, variant, rows, fsdp)
    for name, fsdp in WEAK.items():
        for where in WEAK_SLICES:
            chips = topology.parse(where).count
            if name != "fsdp 8 x data" or chips > 8:  # at 8 chips it is the same as fsdp only
                found[f"weak {name} {where}"] = (name, where, "L/16", 8, fsdp(chips))
    return found


def measure(kind: str, where: str, variant: str, rows: int, fsdp: int) -> dict:
    """One plan as numbers: bytes, seconds, FLOPs, a chip and step."""
    chips = topology.parse(where).count
    found = plan.plan(recipe(variant, chips, rows, fsdp), where, attempts=0)
    result = dict(kind=kind, slice=where, variant=variant, rows=rows, fsdp=fsdp, chips=chips)
    result |= dict(fits=found.fits, memory=found.memory, hbm=found.target.chip.hbm, compiling=found.compiled.seconds)
    if found.times is None:
        return result
    t = found.times
    seconds = dataclasses.asdict(t) | dict(step=t.step, likely=t.likely)
    return result | dict(
        seconds=seconds,
        bound=t.bound,
        flops=found.flops,
        useful=found.useful,
        traffic=found.traffic,
        collectives=hlo.by_kind(found.collectives),
        images=found.images,
        images_per_s=[found.images / s for s in (t.step, t.likely)],
        mfu=[found.mfu(s) for s in (t.step, t.likely)],
    )


def table(results: dict[str, dict]) -> str:
    """The markdown table of model sizes and slices."""
    header = "model, slice | rows a chip, fsdp | memory, GiB | collectives, GB sent | compute / memory / "
    header += "communication (waited) / core, ms | step at best / likely, ms | images/s | MFU"
    lines = [_line(r) for name in cases() if (r := results.get(name)) and r["kind"] == "table"]
    return common.markdown(header.split(" | "), lines)


def _line(r: dict) -> list[str]:
    first = [f"{r['variant']}, {r['slice']}", f"{r['rows']}, {r['fsdp']}"]
    first.append(f"{r['memory']['peak'] / 2**30:.1f} of {r['hbm'] / 2**30:.1f}")
    if "seconds" not in r:
        return first + ["does not fit"] + [""] * 4
    sent = ", ".join(f"{SHORT[kind]} {v[2] / 1e9:.2f}" for kind, v in r["collectives"].items())
    s = {name: 1e3 * value for name, value in r["seconds"].items()}
    return first + [
        sent,
        f"{s['compute']:.1f} / {s['memory']:.1f} / {s['hidden'] + s['exposed']:.1f} ({s['exposed']:.1f}) / "
        f"{s['core']:.1f}",
        f"{s['step']:.0f} / {s['likely']:.0f}",
        " / ".join(f"{n:,.0f}" for n in r["images_per_s"]),
        " / ".join(f"{n:.0%}" for n in r["mfu"]),
    ]


def weak_table(results: dict[str, dict]) -> str:
    """GB that a chip sends a step, by kind of collective, at each number of chips."""
    rows = []
    for name in cases():
        r = results.get(name)
        if r and r["kind"] != "table" and "collectives" in r:
            kinds = ", ".join(f"{k} {v[2] / 1e9:.3f}" for k, v in r["collectives"].items())
            rows.append([r["kind"], r["chips"], f"{_sent(r) / 1e9:.3f}", kinds, f"{r['memory']['peak'] / 2**30:.1f}"])
    return common.markdown(("mesh", "chips", "GB sent a chip and step", "by kind", "memory, GiB"), rows)


def _sent(r: dict) -> float:
    return sum(v[2] for v in r["collectives"].values())


def draw(results: dict[str, dict], path: Path) -> None:
    """Left: bytes a chip sends over the number of chips. Right: what bounds each model's estimated step."""
    figure = Figure(figsize=(9.6, 3.9), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
    for (kind, _), colour, marker in zip(WEAK.items(), COLOURS, MARKERS, strict=True):
        mine = [r for r in results.values() if r["kind"] == kind]
        if kind == "fsdp 8 x data":
            mine += [r for r in results.values() if r["kind"] == "fsdp only" and r["chips"] == 8]
        found = sorted((r["chips"], _sent(r) / 1e9) for r in mine)
        left.plot(*zip(*found), color=colour, marker=marker, label=kind)
    left.set(xscale="log", xlabel="chips (v5e), 8 rows of 256 tokens each", ylabel="GB sent a chip and step")
    left.set_xticks([topology.parse(where).count for where in WEAK_SLICES], labels=["8", "64", "256"], minor=False)
    left.minorticks_off()
    left.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=9, labelcolor=INK)
    left.set_title("L/16: communication", color=INK, fontsize=11, loc="left")
    _bars(right, [r for name in cases() if (r := results.get(name)) and r["kind"] == "table" and "seconds" in r])
    for axes in (left, right):
        axes.tick_params(colors=MUTED, labelsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y" if axes is left else "x", color=GRID)
        axes.set_axisbelow(True)
    figure.savefig(path)


def _bars(axes: Axes, results: list[dict]) -> None:
    names = [f"{r['variant']}  {r['slice']}" for r in results]
    for i, (part, colour) in enumerate(zip(("compute", "memory", "communication"), COLOURS, strict=True)):
        ms = [1e3 * (r["seconds"].get(part) or r["seconds"]["hidden"] + r["seconds"]["exposed"]) for r in results]
        axes.barh([y + 0.26 * (i - 1) for y in range(len(names))], ms, 0.24, color=colour, label=part)
    for what, marker in (("step", "|"), ("likely", "D")):
        ms = [1e3 * r["seconds"][what] for r in results]
        label = dict(step="step at best", likely="step, likely")[what]
        axes.plot(ms, range(len(names)), marker, color=INK, ms=14 if marker == "|" else 4, label=label)
    axes.set_yticks(range(len(names)), labels=names)
    axes.invert_yaxis()
    axes.set_xlabel("ms a step, estimated")
    axes.legend(fontsize=9, labelcolor=INK, facecolor="white", edgecolor="white", framealpha=1)
    axes.set_title("What bounds the step", color=INK, fontsize=11, loc="left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="results, read first and added to")
    parser.add_argument("--only", default="", help="compile only the cases whose name holds this")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    results = json.loads(args.json.read_text()) if args.json.exists() else {}
    for name, case in cases().items():
        if args.only in name and name not in results:
            results[name] = measure(*case)
            args.json.write_text(json.dumps(results, indent=1))
            jax.clear_caches()
    print(f"{common.machine()}; {common.versions('jax', 'jaxlib', 'libtpu', 'flax')}\n")
    print(f"{table(results)}\n\n{weak_table(results)}")
    if args.figure:
        draw(results, args.figure)


if __name__ == "__main__":
    main()
