"""Bytes that a compiled step reads from and writes to a chip's main memory: an estimate from its text.

Every instruction outside fusions reads its operands and writes its results once, as often as the loops around it run. A
slice of a larger array counts at the slice's size, as does an update in place, or a scan over stacked layers would read
all of them for each. Arrays that a TPU program places in on-chip memory are free. What caches save is not known.
"""

from navit_jax.plan.hlo import executed, target
from navit_jax.plan.program import Op, Program, Shape, read

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota"} | {
    *("after-all", "partition-id", "replica-id", "optimization-barrier", "call-start", "async-start", "async-update"),
}
_FREE_CALLS = {"AllocateBuffer", "ConcatBitcast"}
_SLICES = {"dynamic-slice", "slice", "gather"}


def bytes_moved(text: str | Program) -> float:
    """Bytes a step between a chip and its main memory, reads and writes; of a conditional, the larger branch."""
    program = read(text) if isinstance(text, str) else text
    steps = executed(program, lambda step: _moved(program, step.computation, step.op), fused=False)
    return float(sum(_moved(program, step.computation, step.op) * step.times for step in steps))


def _moved(program: Program, computation: str, op: Op) -> int:
    if op.opcode in _FREE or op.opcode.endswith("-done") or target(op) in _FREE_CALLS:
        return 0
    operands = program.operands(computation, op)
    held = [shape for operand in operands for shape in operand.shapes]
    if op.opcode in ("copy-start", "slice-start"):  # of the result, one array is the source again, one a handle
        made = op.shapes[0] if op.opcode == "copy-start" else op.shapes[len(held)]
        return _main([made]) + (made.bytes if held[0].space == 0 else 0)
    if op.opcode in _SLICES:
        return _main(op.shapes) + (op.shapes[0].bytes if held[0].space == 0 else 0)
    if op.opcode in ("dynamic-update-slice", "scatter"):
        update = held[1] if op.opcode == "dynamic-update-slice" else held[-1]
        return _main([update]) + (update.bytes if held[0].space == 0 else 0)
    if op.opcode.removesuffix("-start") == "fusion":
        return _fusion(program, op, operands)
    return _main(held) + (0 if op.opcode.endswith("-start") else _main(op.shapes))


def _main(shapes: list[Shape] | tuple[Shape, ...]) -> int:
    return sum(shape.bytes for shape in shapes if shape.space == 0)


def _fusion(program: Program, op: Op, operands: list[Op]) -> int:
    inner = op.called["calls"]
    ops = program.computations[inner]
    reads = 0
    for i, operand in enumerate(operands):
        whole = _main(operand.shapes)
        reads += min(whole, _read(program, inner, i)) if whole else 0
    root = program.root(inner)
    made = [ops[name] for name in root.inputs] if root.opcode == "tuple" else [root]
    if sum(len(part.shapes) for part in made) != len(op.shapes):
        return reads + _main(op.shapes)
    places = iter(op.shapes)  # the fusion says where a result lies, the instructions inside do not
    writes = 0
    for part in made:
        shapes = [next(places) for _ in part.shapes]
        updated = _updated(program, inner, part)
        writes += min(_main(shapes), updated) if updated is not None else _main(shapes)
    return reads + writes


def _read(program: Program, computation: str, i: int) -> int:
    """Bytes that a fusion reads of its i-th parameter."""
    ops = program.computations[computation]
    parameter = program.parameters(computation)[i]
    names, waiting, total = set(), [parameter.name], 0
    while waiting:
        name = waiting.pop()
        names.add(name)
        for user in ops.values():
            if name not in user.inputs:
                continue
            if user.opcode in ("bitcast", "reshape", "copy") and user.name not in names:
                waiting.append(user.name)
            elif user.opcode in _SLICES and user.inputs[0] == name:
                total += user.shapes[0].bytes
            elif user.opcode == "fusion":
                total += sum(_read(program, user.called["calls"], n) for n, x in enumerate(user.inputs) if x == name)
            elif user.opcode == "dynamic-update-slice" and user.inputs[0] == name:
                continue
            elif user.opcode != "tuple":
                return sum(shape.bytes for shape in parameter.shapes)
    return total


def _updated(program: Program, computation: str, op: Op) -> int | None:
    """Bytes of the part that a fusion's result changes in place; None where it makes the whole array."""
    ops = program.computations[computation]
    while op.opcode in ("bitcast", "reshape", "copy", "convert") and op.inputs:
        op = ops[op.inputs[0]]
    if op.opcode == "parameter":
        return 0
    if op.opcode == "dynamic-update-slice":
        return sum(shape.bytes for shape in ops[op.inputs[1]].shapes)
    return None
