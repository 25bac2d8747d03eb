"""What a compiled step does on each chip: its collectives, matrix FLOPs and memory traffic, loops multiplied.

XLA's own `cost_analysis` counts a loop's body once, so an encoder run by a scan looks as cheap as one layer (12 layers:
8 for 100 million FLOPs), and it sees nothing inside custom calls. Here each instruction counts as often as the loops
around it run. Matrix products are counted and nothing else, as in every published MFU. Traffic is an estimate: what
each instruction outside fusions reads and writes in main memory, slices of larger arrays at the slice's size.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import NamedTuple

from navit_jax.plan.groups import members
from navit_jax.plan.program import Op, Program, Shape, read
from navit_jax.plan.trips import trip_count

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
Formula = Callable[[Op, list[Op]], float]  # of a custom call and the instructions that made its operands


class Step(NamedTuple):
    """An instruction in its computation, how often it runs a step, and the fusion or async-start around it."""

    op: Op
    computation: str
    times: int
    within: Op | None


class Collective(NamedTuple):
    """One collective instruction of the program.

    kind: one of `KINDS`. count: how often it runs a step. bytes: of one run, per chip: the whole array, before it is
    scattered or after it is gathered. members: the devices of one group; of a permute, one pair. shapes: its arrays on
    a chip, as "f32[12,768]". overlapped: it is started and awaited apart, so that other work can run meanwhile. source:
    the operation in the user's program that it came from, where known.
    """

    kind: str
    count: int
    bytes: int
    members: tuple[int, ...]
    shapes: tuple[str, ...]
    overlapped: bool
    source: str

    @property
    def group(self) -> int:
        """Chips that take part together."""
        return len(self.members)

    @property
    def sent(self) -> float:
        """Bytes that each chip sends in one run, as a ring does it."""
        share = (self.group - 1) / self.group
        return self.bytes * {"all-reduce": 2 * share, "collective-permute": 1, "collective-broadcast": 1}.get(
            self.kind, share
        )


def executed(program: Program, weigh: Callable[[Step], float], *, fused: bool) -> Iterator[Step]:
    """Every instruction that runs in a step; of a conditional, the branch in which `weigh` adds up to most.

    fused: also those inside fusions. A loop whose trip count depends on data counts once; see `endless`.
    """
    return _walk(program, program.entry, 1, None, weigh, fused)


def _walk(
    program: Program, name: str, times: int, within: Op | None, weigh: Callable[[Step], float], fused: bool
) -> Iterator[Step]:
    for op in program.computations[name].values():
        yield Step(op, name, times, within)
        what = op.opcode.removesuffix("-start")
        if what == "while":
            trips = trip_count(program, name, op)
            inner = times * (1 if trips is None else trips)
            yield from _walk(program, op.called["body"], inner, within, weigh, fused)
        elif what == "conditional":
            ways = [list(_walk(program, branch, times, within, weigh, fused)) for branch in op.branches]
            yield from max(ways, key=lambda steps: sum(weigh(step) * step.times for step in steps))
        elif what in ("call", "async") or (what == "fusion" and fused):
            inside = op.called.get("calls") or op.called["to_apply"]
            yield from _walk(program, inside, times, within if op.opcode == "call" else op, weigh, fused)


def endless(text: str | Program) -> list[str]:
    """Loops that run as often as data says, which every figure here counts once."""
    program = _program(text)
    loops = [(name, op) for name, ops in program.computations.items() for op in ops.values() if op.opcode == "while"]
    return [op.name for name, op in loops if trip_count(program, name, op) is None]


def collectives(text: str | Program) -> list[Collective]:
    """The collectives that run in a step, one entry an instruction, those among one chip left out.

    A start and its end count once, and so do the parts into which a TPU cuts an overlapped one. Its all-reduce fused
    with the slice that each chip keeps is the reduce-scatter that it does.
    """
    program = _program(text)
    steps = executed(program, lambda step: float(_moves(program, step)), fused=True)
    found = [_collective(program, step) for step in steps if _moves(program, step)]
    return [collective for collective in found if collective.group > 1 and collective.count]


def by_kind(found: list[Collective]) -> dict[str, tuple[int, int, float]]:
    """{kind: (runs, bytes, bytes sent)} a step per chip."""
    kinds = sorted({c.kind for c in found}, key=KINDS.index)
    mine = {kind: [c for c in found if c.kind == kind] for kind in kinds}
    return {
        k: (sum(c.count for c in cs), sum(c.count * c.bytes for c in cs), sum(c.count * c.sent for c in cs))
        for k, cs in mine.items()
    }


def _kind(op: Op) -> str | None:
    kind = op.opcode.removesuffix("-start").removeprefix("ragged-")
    return kind if kind in KINDS else None


def _moves(program: Program, step: Step) -> int:
    """Bytes of a collective's whole array; 0 for other instructions and for later parts of the same collective."""
    kind, op = _kind(step.op), step.op
    if kind is None:
        return 0
    ops = program.computations[step.computation]
    if "chain_id=" in op.rest and not any('"AsyncCollectiveStart"' in other.rest for other in ops.values()):
        return 0
    held = sum(shape.bytes for name in op.inputs for shape in ops[name].shapes)
    return held * (len(members(op, program.devices)) if kind == "all-gather" else 1)


def _collective(program: Program, step: Step) -> Collective:
    op, kind, around = step.op, _kind(step.op), step.within
    shapes = [shape for operand in program.operands(step.computation, op) for shape in operand.shapes]
    fused = around is not None and around.opcode == "fusion"
    if kind == "all-reduce" and fused and around.called["calls"].startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    named = re.search(r'op_name="([^"]*)"', op.rest) or (around and re.search(r'op_name="([^"]*)"', around.rest))
    return Collective(
        kind,
        step.times,
        _moves(program, step),
        members(op, program.devices),
        tuple(f"{s.dtype}[{','.join(map(str, s.dims))}]" for s in shapes),
        op.opcode.endswith("-start") or "chain_id=" in op.rest or (around is not None and not fused),
        named[1] if named else "",
    )


def flops(text: str | Program, formulas: Mapping[str, Formula] | None = None) -> float:
    """FLOPs of matrix products and convolutions in a step per chip (a multiply-add is 2), also inside fusions.

    formulas: of custom calls, {custom_call_target: (call, instructions of its operands) -> FLOPs}; cuBLAS products
    are known. `unknown_calls` names those that count as nothing.
    """
    program, known = _program(text), FORMULAS | dict(formulas or {})

    def of(step: Step) -> float:
        return _flops(program, step, known)

    return sum(of(step) * step.times for step in executed(program, of, fused=True))


def unknown_calls(text: str | Program, formulas: Mapping[str, Formula] | None = None) -> set[str]:
    """Targets of custom calls that run in a step and that no formula counts."""
    steps = executed(_program(text), lambda step: 1.0, fused=True)
    return {t for step in steps if (t := target(step.op))} - set(FORMULAS) - set(formulas or {})


def cycles(text: str | Program) -> float:
    """Clock cycles that the TPU compiler's own cost model gives a step, by the notes it leaves on instructions.

    They are undocumented, cover the work of the chip's core and no communication, and are 0 on other platforms.
    """
    noted = ((re.search(r'"estimated_cycles":"(\d+)"', step.op.rest), step.times) for step in
             executed(_program(text), lambda step: 1.0, fused=False))  # fmt: skip
    return float(sum(int(found[1]) * times for found, times in noted if found))


def target(op: Op) -> str | None:
    """What a custom call calls; None for other instructions."""
    found = re.search(r'custom_call_target="([^"]*)"', op.rest) if op.opcode == "custom-call" else None
    return found[1] if found else None


def _flops(program: Program, step: Step, formulas: Mapping[str, Formula]) -> float:
    op = step.op
    if op.opcode == "dot":
        left = program.operands(step.computation, op)[0].shapes[0].dims
        return 2.0 * prod(op.shapes[0].dims) * prod(left[i] for i in op.numbers("lhs_contracting_dims"))
    if op.opcode == "convolution":
        return _convolution(op, *(operand.shapes[0] for operand in program.operands(step.computation, op)))
    formula = formulas.get(target(op) or "")
    return formula(op, program.operands(step.computation, op)) if formula else 0.0


def _convolution(op: Op, left: Shape, right: Shape) -> float:
    """Products that meet no padding or dilation hole: a TPU writes batched matrix products as dilated convolutions."""
    ins, kernel, outs = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest).groups()
    size_of = [dict(zip(labels, s.dims)) for labels, s in ((ins, left), (kernel, right), (outs, op.shapes[0]))]
    space = sorted(label for label in ins if label.isdigit())
    window = {name: value.split("x") for name, value in re.findall(r"(\w+)=([\dx_\-]+)", _braces(op.rest, "window"))}
    used = 1
    for i, d in enumerate(space):
        at = {name: int(window[name][i]) if name in window else 1 for name in ("stride", "lhs_dilate", "rhs_dilate")}
        low = int(window["pad"][i].split("_")[0]) if "pad" in window else 0
        used *= _meetings(size_of[0][d], size_of[1][d], size_of[2][d], low, **at)
    groups = (op.number("feature_group_count") or 1) * (op.number("batch_group_count") or 1)
    return 2.0 * used * size_of[0]["b"] * size_of[0]["f"] * size_of[1]["o"] / groups


def _braces(text: str, name: str) -> str:
    found = re.search(rf"\b{name}=\{{([^}}]*)\}}", text)
    return found[1] if found else ""


def _meetings(ins: int, kernel: int, outs: int, low: int, *, stride: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """Pairs (output, kernel element) along one axis that meet an element of the input."""
    places = (o * stride + k * rhs_dilate - low for o in range(outs) for k in range(kernel))
    return sum(0 <= p <= (ins - 1) * lhs_dilate and p % lhs_dilate == 0 for p in places)


def _cublas(op: Op, operands: list[Op]) -> float:
    found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', op.rest)
    contracted = [int(n) for n in re.findall(r"\d+", found[1])] if found else []
    return 2.0 * prod(op.shapes[0].dims) * prod(operands[0].shapes[0].dims[i] for i in contracted)


FORMULAS: dict[str, Formula] = dict.fromkeys(("__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8"), _cublas)


def _program(text: str | Program) -> Program:
    return read(text) if isinstance(text, str) else text
