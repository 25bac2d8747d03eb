"""How often a loop runs, from its compiled text.

The compiler's note says it on CPU and GPU. A TPU program carries no note, so the integers that the loop's condition
depends on are followed through condition and body until it stops: a few dozen integers for any encoder.
"""

import re

from navit_jax.plan.program import Op, Program

_MOST = 100_000


def trip_count(program: Program, computation: str, loop: Op) -> int | None:
    """How often a loop's body runs; None where that depends on data, or on more than integer arithmetic."""
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
    if noted:
        return int(noted[1])
    start = program.computations[computation][loop.inputs[0]]
    carried = {0: _Tuple(program, computation, start, {})}
    for trips in range(_MOST):
        go_on = _value(program, loop.called["condition"], program.root(loop.called["condition"]), carried)
        if not isinstance(go_on, bool):
            return None
        if not go_on:
            return trips
        body = loop.called["body"]
        after = _Tuple(program, body, program.root(body), carried)
        carried = {0: {i: after[i] for i in _read_by(program, loop)}}
    return None


def _read_by(program: Program, loop: Op) -> set[int]:
    """The carried elements that decide how long a loop runs: what its condition reads and what these come from."""
    found: set[int] = set()
    waiting = _elements(program, loop.called["condition"], [program.root(loop.called["condition"]).name])
    root = program.root(loop.called["body"])
    while waiting - found and root.opcode == "tuple":
        found |= waiting
        waiting = _elements(program, loop.called["body"], [root.inputs[i] for i in found])
    return found | waiting


def _elements(program: Program, computation: str, names: list[str]) -> set[int]:
    """Elements of the parameter that these instructions depend on."""
    ops, found, seen = program.computations[computation], set(), set()
    while names:
        op = ops[names.pop()]
        if op.name in seen:
            continue
        seen.add(op.name)
        if op.opcode == "get-tuple-element" and ops[op.inputs[0]].opcode == "parameter":
            found.add(op.number("index"))
        else:
            names.extend(op.inputs)
    return found


class _Tuple:
    """A tuple's elements as integers, looked up when asked for; None where they are no known integers."""

    def __init__(self, program: Program, computation: str, op: Op, parameters: dict):
        self.args = program, computation, op, parameters

    def __getitem__(self, i: int) -> int | None:
        program, computation, op, parameters = self.args
        if op.opcode != "tuple":
            return None
        return _value(program, computation, program.computations[computation][op.inputs[i]], parameters)


def _value(program: Program, computation: str, op: Op, parameters: dict) -> int | bool | None:
    """A scalar integer instruction's value, where the parameters' are known."""
    if op.opcode == "constant":
        return int(op.literal) if re.fullmatch(r"-?\d+", op.literal) else None
    if op.opcode == "parameter":
        return parameters.get(int(op.literal))
    operands = program.operands(computation, op)
    if op.opcode == "get-tuple-element":
        held = parameters.get(0) if operands[0].opcode == "parameter" else None
        return held[op.number("index")] if held is not None and not isinstance(held, int) else None
    values = [_value(program, computation, operand, parameters) for operand in operands]
    if op.opcode in ("fusion", "call"):
        inner = op.called.get("calls") or op.called["to_apply"]
        return _value(program, inner, program.root(inner), dict(enumerate(values)))
    if not values or any(value is None for value in values):
        return None
    return _scalar(op, values)


def _scalar(op: Op, values: list[int]) -> int | bool | None:
    a, b = values[0], values[-1]
    match op.opcode:
        case "copy" | "bitcast" | "convert" | "reshape":
            return a
        case "add":
            return a + b
        case "subtract":
            return a - b
        case "compare":
            direction = re.search(r"direction=(\w\w)", op.rest)[1]
            return dict(LT=a < b, LE=a <= b, GT=a > b, GE=a >= b, EQ=a == b, NE=a != b)[direction]
    return None
