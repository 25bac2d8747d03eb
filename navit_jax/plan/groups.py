"""Which devices take part in a collective together, from the five ways in which programs write it."""

import re
from math import prod

import numpy as np

from navit_jax.plan.program import Op


def members(op: Op, devices: int) -> tuple[int, ...]:
    """The devices of the first group, in each of the ways in which a program writes its groups."""
    if op.opcode.startswith("collective-permute"):
        return tuple(int(n) for n in re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", op.rest).groups())
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", op.rest)
    if listed:
        return tuple(int(n) for n in listed[1].split(","))
    tiled = re.search(r"replica_groups=\[\d+,(\d+)\]<=(\S+)", op.rest)
    if tiled:
        return tuple(_counted(tiled[2])[: int(tiled[1])].tolist())
    mesh = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", op.rest)
    return _on_mesh(*mesh.groups()) if mesh else tuple(range(devices))


def _counted(text: str) -> np.ndarray:
    """[4,2]T(1,0): the numbers 0..7 as 4 x 2, transposed, in a row."""
    dims, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    numbers = np.arange(prod(int(n) for n in dims.split(","))).reshape([int(n) for n in dims.split(",")])
    return numbers.transpose([int(n) for n in order.split(",")]).ravel() if order else numbers.ravel()


def _on_mesh(axes: str, ids: str | None, used: str) -> tuple[int, ...]:
    """'a'=2,'b'=4 and {'b'}: along b at the start of a. 'b':(2)2 is the part of b in two that repeats twice."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    taken = {name: [0] for name in sizes}
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", used):
        stride = sizes[name] // (int(before) * int(size)) if size else 1
        taken[name] = [start + i * stride for start in taken[name] for i in range(int(size) if size else sizes[name])]
    numbers = (_counted(ids) if ids else np.arange(prod(sizes.values()))).reshape(list(sizes.values()))
    return tuple(numbers[np.ix_(*taken.values())].ravel().tolist())
