"""The plan of a run: what its training step takes on each chip of a target, and what would make it fit.

Whether something fits is never computed from a formula: each suggestion was compiled too, and comes with the memory
that the compiler gave it. Compilations take half a minute to several, so at most `_ATTEMPTS` are tried, cheapest in
speed first, and those whose state alone is too large are left out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import jax
from ml_collections import ConfigDict

from input_pipeline import checks
from input_pipeline.errors import UserError
from navit_jax import navit, transformer
from navit_jax.plan import estimate, hlo, step, topology, traffic
from navit_jax.plan.program import Program, read

_ATTEMPTS = 4
_REMATS = tuple(transformer.REMAT)


def settings(changes: dict) -> str:
    """--config.model.remat=full --config.mesh.fsdp=8"""
    return " ".join(f"--config.{name}={value}" for name, value in changes.items())


Progress = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """One compiled configuration on one target. notes: what was changed to plan it. attempts: where it does not fit,
    the settings tried and their plans, the last of which fits if any does.
    """

    target: topology.Target
    config: ConfigDict
    coords: estimate.Coords
    rows: step.Rows
    compiled: step.Compiled
    notes: tuple[str, ...] = ()
    attempts: tuple[tuple[dict, "Plan"], ...] = ()

    @cached_property
    def program(self) -> Program | None:
        return read(self.compiled.text) if self.compiled.text else None

    @cached_property
    def collectives(self) -> list[hlo.Collective]:
        return hlo.collectives(self.program) if self.program else []

    @cached_property
    def flops(self) -> float:
        """Matrix FLOPs of the compiled program, per chip."""
        return hlo.flops(self.program) if self.program else 0.0

    @cached_property
    def traffic(self) -> float:
        """Bytes from and to main memory, per chip."""
        return traffic.bytes_moved(self.program) if self.program else 0.0

    @property
    def chips(self) -> int:
        return self.compiled.mesh.size

    @property
    def useful(self) -> float:
        """FLOPs that real tokens need, per chip; `navit.flops_forward` three times."""
        return self.rows.flops * self.config.packing.rows_per_step / self.chips

    @property
    def images(self) -> float:
        """Images a step, over all chips."""
        return self.rows.images * self.config.packing.rows_per_step

    @cached_property
    def memory(self) -> dict[str, int]:
        """Bytes a chip: what the state and the batch are by their shapes, the rest of the peak, and the peak."""
        state, mesh, peak = self.compiled.state, self.compiled.mesh, self.compiled.memory["peak"]
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        parts = dict(parameters=step.bytes_a_chip(state["params"]), optimizer=step.bytes_a_chip(state["opt"]))
        if "ema" in state:
            parts["average"] = step.bytes_a_chip(state["ema"])
        parts["batch"] = step.bytes_a_chip(step.batch_shapes(self.config, self.rows)) // ways
        parts["program"] = self.compiled.memory.get("generated_code", 0)
        return parts | dict(activations=max(0, peak - sum(parts.values())), peak=peak)

    @property
    def fits(self) -> bool:
        chip = self.target.chip
        return not self.compiled.error and (chip is None or self.compiled.memory["peak"] <= chip.hbm)

    @cached_property
    def times(self) -> estimate.Times | None:
        """The estimate; None where the program did not compile, and on CPUs, whose rates no data sheet states."""
        if self.target.chip is None or not self.program:
            return None
        work = dict(flops=self.flops, traffic=self.traffic, cycles=hlo.cycles(self.program))
        return estimate.times(self.target, self.coords, found=self.collectives, **work)

    def mfu(self, seconds: float) -> float:
        """Useful FLOPs of a step of that length against the peak."""
        return self.useful / (seconds * self.target.chip.peak)


def plan(config: ConfigDict, target: str, progress: Progress = print, *, attempts: int = _ATTEMPTS) -> Plan:
    """Compile the training step for a target such as 'v5e:16x16' or 'cpu:8', and others where it does not fit.

    Call it before JAX first computes. attempts: at most that many settings are tried to make it fit. Raises UserError
    for an unknown target, a config that is wrong by itself, and a mesh that does not suit the target.
    """
    where = topology.parse(target)
    navit.variant(config.model.variant)
    checks.check(config)
    topology.prepare(where)
    devices = topology.devices_for(where)
    adapted, mesh, notes = step.adapt(config, devices)
    rows = step.rows_of(adapted)
    found = _assess(where, adapted, mesh, rows, progress)
    tried: list[tuple[dict, Plan]] = []
    for changes in _candidates(found, tried) if not found.fits else ():
        if len(tried) == attempts:
            break
        changed = adapted.copy_and_resolve_references()
        changed.update_from_flattened_dict(changes)
        try:
            again, mesh, _ = step.adapt(changed, devices)
            attempt = _assess(where, again, mesh, rows, progress, f" with {settings(changes)}")
        except UserError:  # a mesh that does not divide some dimension
            continue
        tried.append((changes, attempt))
        if attempt.fits:
            break
    return Plan(where, adapted, found.coords, rows, found.compiled, tuple(notes), tuple(tried))


def _assess(
    target: topology.Target,
    config: ConfigDict,
    mesh: jax.sharding.Mesh,
    rows: step.Rows,
    progress: Progress,
    how: str = "",
) -> Plan:
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    progress(f"compiling the training step of {config.model.variant} for {target.name} ({axes}){how} ...")
    compiled = step.compile_step(config, mesh, rows)
    outcome = "it does not fit" if compiled.error else f"{compiled.memory['peak'] / 2**30:.2f} GiB a chip"
    progress(f"    {compiled.seconds:.0f} s: {outcome}")
    coords = [getattr(device, "coords", (i,)) for i, device in enumerate(mesh.devices.flat)]
    return Plan(target, config, coords, rows, compiled)


def _candidates(found: Plan, tried: list[tuple[dict, Plan]]) -> Iterator[dict]:
    """Settings that save memory, cheapest in speed first; a state of over half the memory is split before all else.

    tried: what was tried so far, which grows; the last candidate cuts the step into as many parts as what it tells.
    """
    config, mesh, hbm = found.config, found.compiled.mesh, found.target.chip.hbm
    state = step.bytes_a_chip(found.compiled.state)
    remats = [{"model.remat": remat} for remat in _REMATS[_REMATS.index(config.model.remat) + 1 :]]
    split = _split(found, state)
    sharded = {"mesh.fsdp": split, "mesh.data": -1} if split > mesh.shape["fsdp"] and state > 0.1 * hbm else {}
    most = sharded | (remats[-1] if remats else {})
    if state > 0.5 * hbm and sharded:
        yield from (sharded, *(sharded | remat for remat in remats))
    else:
        yield from remats
        if sharded:
            yield most
    last = tried[-1][1] if tried else found
    left = hbm - step.bytes_a_chip(last.compiled.state)
    before = config.optim.accumulate_steps or 1
    rows = config.packing.rows_per_step // (mesh.shape["data"] * mesh.shape["fsdp"] * before)
    needed = (last.compiled.memory["peak"] - step.bytes_a_chip(last.compiled.state)) / max(left, 1)
    parts = next((n for n in (2, 4, 8, 16, 32, 64) if n >= 1.2 * needed and rows % n == 0), 0)  # sums take some too
    if left > 0 and parts:
        yield most | {"optim.accumulate_steps": before * parts}


def _split(found: Plan, state: int) -> int:
    """Over how many chips the state is split so that it takes a quarter of a chip's memory at most, or all of them.

    Part of an axis of the slice, or everything: across axes the compiler cuts products into pieces (docs/scaling.md).
    """
    mesh, width = found.compiled.mesh, found.compiled.state["params"]["norm"]["scale"].shape[0]
    free = mesh.size // mesh.shape["tensor"]
    wanted = state * mesh.shape["fsdp"] / (found.target.chip.hbm / 4)
    along = [n for n in range(1, free + 1) if n == free or any(length % n == 0 for length in found.target.shape)]
    fits = [n for n in along if free % n == 0 and width % n == 0]
    return next((n for n in fits if n >= max(wanted, 2)), max(fits, default=1))
