"""A plan as text: memory, work, collectives and estimated speed per chip, and what would make it fit."""

from navit_jax.plan import hlo
from navit_jax.plan.planner import Plan, settings

_NAMES = dict(
    parameters="parameters",
    optimizer="optimizer state",
    average="moving average",
    batch="batch",
    activations="activations, temporaries, padding",
    program="program",
)


def report(plan: Plan) -> str:
    """The whole plan, one topic a paragraph."""
    parts = [_head(plan), _memory(plan)]
    if plan.program:
        parts += [_work(plan), _collectives(plan), _speed(plan)]
    if not plan.fits:
        parts.append(_advice(plan))
    return "\n\n".join(parts)


def _head(plan: Plan) -> str:
    c, mesh, rows = plan.config, plan.compiled.mesh, plan.rows
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    kind = plan.target.chip.kind if plan.target.chip else "virtual CPU device"
    lines = [
        f"{c.name}, {c.model.variant} in {c.model.dtype}, remat {c.model.remat}, on {plan.target.name}: {plan.chips} x "
        f"{kind}, mesh {axes}",
        f"{c.packing.rows_per_step} rows a step of {rows.plan['length']} tokens and {rows.plan['slots']} slots, "
        f"{c.packing.rows_per_step / (mesh.shape['data'] * mesh.shape['fsdp']):g} a chip; {rows.images:.2f} images a "
        f"row, {plan.images:.0f} a step",
        f"K and tokens are from {rows.note}",
        *(f"note: {note}" for note in plan.notes),
    ]
    return "\n".join(lines)


def _memory(plan: Plan) -> str:
    memory, chip = plan.memory, plan.target.chip
    if plan.compiled.error:
        memory = {name: memory[name] for name in ("parameters", "optimizer", "average", "batch") if name in memory}
    lines = [f"  {_NAMES[name]:<34}{size(memory[name]):>12}" for name in _NAMES if name in memory]
    peak = plan.compiled.memory["peak"]
    of = f" of {size(chip.hbm)} ({peak / chip.hbm:.0%})" if chip else ""
    if plan.compiled.error:
        lines.append(f"  does not fit: the compiler asks for {size(peak)}{of}")
    else:
        lines.append(f"  {'peak':<34}{size(peak):>12}{of}")
    return "\n".join(["memory a chip", *lines])


def _work(plan: Plan) -> str:
    unknown, loops = hlo.unknown_calls(plan.program) - _HARMLESS, hlo.endless(plan.program)
    lines = [
        "work a chip and step",
        f"  {plan.flops / 1e12:.4g} TFLOP of matrix products compiled, {plan.useful / 1e12:.4g} of them useful to real "
        f"tokens ({plan.useful / plan.flops:.0%})",
        f"  {plan.traffic / 1e9:.4g} GB from and to main memory, an estimate",
    ]
    if unknown:
        lines.append(f"  not counted: custom calls {', '.join(sorted(unknown))}")
    if loops:
        lines.append(f"  counted once, as data decides how often they run: loops {', '.join(loops)}")
    return "\n".join(lines)


_HARMLESS = {  # of the TPU compiler: they move or name memory
    *(
        "AllocateBuffer",
        "ConcatBitcast",
        "AsyncCollectiveStart",
        "AsyncCollectiveDone",
        "GatherScatterIndicesBitpacked",
    ),
    *("SliceToDynamic", "PadToStatic", "Sharding"),
}


def _collectives(plan: Plan) -> str:
    found = hlo.by_kind(plan.collectives)
    if not found:
        return "collectives a chip and step: none"
    lines = [f"  {kind:<22}{runs:>8}{size(held):>14}{size(sent):>14}" for kind, (runs, held, sent) in found.items()]
    return "\n".join([f"{'collectives a chip and step':<24}{'runs':>5}{'arrays':>14}{'sent':>14}", *lines])


def _speed(plan: Plan) -> str:
    if plan.times is None:
        return "no speed is estimated for CPUs: no data sheet states their rates"
    t, chip = plan.times, plan.target.chip
    lines = [
        f"{name:<14}{1e3 * s:>8.1f} ms a step {plan.images / s:>12,.0f} images/s   MFU {plan.mfu(s):.0%}"
        for name, s in (("at best", t.step), ("more likely", t.likely))
    ]
    return "\n".join(
        [
            "speed, estimated and not measured",
            *(f"  {line}" for line in lines),
            f"  compute {1e3 * t.compute:.1f} ms, memory {1e3 * t.memory:.1f} ms, communication "
            f"{1e3 * t.hidden:.1f} ms beside other work and {1e3 * t.exposed:.1f} ms waited for",
            "  at best: max(compute, memory, communication beside other work) + communication waited for, at",
            f"  {chip.peak / 1e12:g} TFLOP/s, {chip.hbm_bandwidth / 1e9:g} GB/s of memory, {chip.link / 1e9:g} GB/s a "
            f"link and direction ({chip.sheet})",
            f"  more likely: {1e3 * t.core:.1f} ms by the compiler's own cost model in place of compute and memory",
        ]
    )


def _advice(plan: Plan) -> str:
    lines = ["it does not fit as it is. Tried:"]
    for changes, attempt in plan.attempts:
        held = attempt.compiled.memory["peak"]
        outcome = f"fits, {size(held)} a chip" if attempt.fits else f"does not, {size(held)}"
        if attempt.fits and attempt.times:
            outcome += f"; {1e3 * attempt.times.likely:.0f} ms a step are likely"
        lines.append(f"  {settings(changes)}: {outcome}")
    if not plan.attempts or not plan.attempts[-1][1].fits:
        lines.append(
            "  Fewer rows a chip (packing.rows_per_step), a larger slice or a chip with more memory would help."
        )
    return "\n".join(lines)


def size(count: float) -> str:
    """1.50 GiB, 12.0 MiB."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.{2 if unit == 'GiB' else 1}f} {unit}"
    return f"{count:.0f} B"
