"""Reads a compiled program, the optimized HLO text of a CPU, GPU or TPU, into its instructions.

Text, because it is what `compiled.as_text()` gives publicly on every platform, also for machines that are not there.
Only what counting needs is read: result types with their memory space, operands, called computations, attributes.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([0-9,<=]*)\](?:\{([^{}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-$<>]+) \(.*\{\s*$")
_CALLED = re.compile(r"\b(body|condition|calls|to_apply|true_computation|false_computation)=%?([^,\s}]+)")
_ASSIGNMENT = re.compile(r"^\s+(ROOT )?%?([\w.\-$<>]+) = ")


class Shape(NamedTuple):
    """An array's type; space: the layout's memory space, 0 for main memory (HBM), 1 for a TPU's on-chip memory."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> int:
        bits = BITS.get(self.dtype) or (0 if self.dtype in BITS else int(re.sub(r"\D*(\d+).*", r"\1", self.dtype)))
        return prod(self.dims) * bits // 8


@dataclass(frozen=True, eq=False)
class Op:
    """One instruction. shapes: its result's arrays, a tuple's flattened. inputs: names of operands. rest: the text
    behind the operands: attributes, metadata, backend_config. literal: what stands in the parentheses.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    inputs: tuple[str, ...]
    literal: str
    rest: str
    root: bool

    @cached_property
    def called(self) -> dict[str, str]:
        """Names of the computations that it calls, by attribute: body, condition, calls, to_apply ..."""
        named = dict(
            re.findall(r"\b(body|condition|calls|to_apply|true_computation|false_computation)=%?([^,\s}]+)", self.rest)
        )
        found = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        return named | {f"branch {i}": b.strip(" %") for i, b in enumerate(found[1].split(",") if found else [])}

    @property
    def branches(self) -> list[str]:
        return [b for name, b in self.called.items() if name.startswith("branch") or name.endswith("_computation")]

    def number(self, attribute: str) -> int | None:
        """The whole number of an attribute, `name=3`; None without it."""
        found = re.search(rf"\b{attribute}=(-?\d+)", self.rest)
        return int(found[1]) if found else None

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """The numbers of an attribute, `name={0,1}`; () without it."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.rest)
        return tuple(int(n) for n in found[1].split(",") if n) if found else ()


@dataclass(frozen=True)
class Program:
    """computations: their instructions by name, in the order of execution; entry: the first one's name.

    devices: on how many it runs.
    """

    computations: dict[str, dict[str, Op]]
    entry: str
    devices: int

    def root(self, computation: str) -> Op:
        """The instruction whose result is the computation's."""
        return next(op for op in self.computations[computation].values() if op.root)

    def operands(self, computation: str, op: Op) -> list[Op]:
        """The instructions that made an instruction's operands."""
        return [self.computations[computation][name] for name in op.inputs]

    def parameters(self, computation: str) -> list[Op]:
        """A computation's parameters in the order of their numbers."""
        found = [op for op in self.computations[computation].values() if op.opcode == "parameter"]
        return sorted(found, key=lambda op: int(op.literal))


def read(text: str) -> Program:
    """The program of `compiled.as_text()`. Raises ValueError for a text without an entry computation."""
    computations, entry, current = {}, "", {}
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif _ASSIGNMENT.match(line):
            op = _op(line)
            current[op.name] = op
    if not entry:
        raise ValueError("no HLO program: there is no ENTRY computation in the text")
    header = text[: text.find("\n")]
    sizes = [re.search(rf"{name}=(\d+)", header) for name in ("replica_count", "num_partitions")]
    return Program(computations, entry, prod(int(n[1]) for n in sizes if n))


def _op(line: str) -> Op:
    head = _ASSIGNMENT.match(line)
    end = _closing(line, head.end()) if line[head.end()] == "(" else line.index(" ", head.end())
    open_at = line.index("(", end)
    close_at = _closing(line, open_at)
    literal = line[open_at + 1 : close_at - 1]
    shapes = tuple(_shape(*found) for found in _SHAPE.findall(line[head.end() : end]))
    inputs = () if line[end:open_at].strip() == "constant" else tuple(re.findall(r"%([\w.\-$<>]+)", literal))
    return Op(head[2], line[end:open_at].strip(), shapes, inputs, literal, line[close_at:], bool(head[1]))


def _closing(line: str, start: int) -> int:
    """Where the parenthesis at `start` ends."""
    depth = 0
    for found in re.compile(r"[()]").finditer(line, start):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.end()
    return len(line)


def _shape(dtype: str, dims: str, layout: str) -> Shape:
    space = re.search(r"S\((\d+)\)", layout)
    return Shape(dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d), int(space[1]) if space else 0)
