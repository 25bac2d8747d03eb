"""A step's time from what each chip computes, reads and sends, at the rates of its data sheet: a roofline.

The rule: step = max(compute, memory, overlapped communication) + the communication that is waited for. Compute is the
compiled FLOPs at the peak, memory the traffic at HBM's bandwidth: a bound that a real step does not beat. The TPU
compiler's own cost model, which knows its kernels and the work beside matrix products, gives two to three times that
for these models; with it in place of compute and memory there is a second, more likely step. Neither is a measurement:
waits between hosts, input, and the interconnect's other users are in none of them.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from navit_jax.plan.chips import HOP_SECONDS, Chip
from navit_jax.plan.hlo import Collective
from navit_jax.plan.topology import Target

Coords = Sequence[Sequence[int]]  # of each device, in the program's order


@dataclass(frozen=True)
class Times:
    """Seconds of a step. core: work of the chip's core by the compiler's cost model. hidden: communication that runs
    beside other work; exposed: that is waited for.
    """

    compute: float
    memory: float
    core: float
    hidden: float
    exposed: float

    @property
    def step(self) -> float:
        return max(self.compute, self.memory, self.hidden) + self.exposed

    @property
    def likely(self) -> float:
        """The step by the compiler's cost model, which never is below the bound."""
        return max(self.core, self.compute, self.memory, self.hidden) + self.exposed

    @property
    def bound(self) -> str:
        """What takes longest."""
        names = dict(compute=self.compute, memory=self.memory, communication=self.hidden + self.exposed)
        return max(names, key=names.get)


def times(
    target: Target, coords: Coords, *, flops: float, traffic: float, cycles: float, found: Sequence[Collective]
) -> Times:
    """The estimate of a step from its FLOPs, bytes and cycles a chip, its collectives and where each device lies."""
    chip = target.chip
    parts = [_communication(target, coords, [c for c in found if c.overlapped == way]) for way in (True, False)]
    return Times(flops / chip.peak, traffic / chip.hbm_bandwidth, cycles / chip.clock, *parts)


def _communication(target: Target, coords: Coords, found: Sequence[Collective]) -> float:
    """Seconds of collectives one after the other; permutes in different directions of the torus run side by side."""
    total, ways = 0.0, defaultdict(float)
    for collective in found:
        places = [coords[i] for i in collective.members]
        if collective.kind == "collective-permute":
            way, seconds = _permute(target, places, collective.bytes)
            ways[way] += collective.count * seconds
        else:
            total += collective.count * _group(target, places, collective)
    return total + max(ways.values(), default=0.0)


def _group(target: Target, places: Coords, collective: Collective) -> float:
    """Seconds of one collective, its data split over rings along every axis on which the group's chips differ.

    An axis gives two links where its chips close a ring, else one, divided by the step between the group's chips, whose
    links the groups in between use too. Each chip on the longest way adds a hop; an all-reduce goes round twice.
    """
    bandwidth, hops, farthest = 0.0, 0, 1.0
    for axis, length in enumerate(target.shape):
        along = sorted({place[axis] for place in places})
        if len(along) == 1:
            continue
        stride = max(1, (along[-1] - along[0]) // (len(along) - 1))
        closed = closes(target.chip, length) and len(along) * stride == length
        bandwidth += (2 if closed else 1) * target.chip.link / stride
        hops += length // 2 if closed else along[-1] - along[0]
        farthest = max(farthest, len(along) / (4 if closed else 2))
    rounds = 2 if collective.kind == "all-reduce" else 1
    distance = farthest if collective.kind == "all-to-all" else 1.0  # its data passes through the chips in between
    return collective.sent * distance / bandwidth + rounds * hops * HOP_SECONDS


def _permute(target: Target, places: Coords, size: int) -> tuple[tuple[int, int], float]:
    """(axis and direction, seconds) of sending `size` bytes from the first place to the second over one link."""
    hops, way = 0, (0, 0)
    for axis, length in enumerate(target.shape):
        steps = places[1][axis] - places[0][axis]
        if closes(target.chip, length) and abs(steps) > length / 2:
            steps -= length if steps > 0 else -length
        if steps:
            hops, way = hops + abs(steps), (axis, 1 if steps > 0 else -1)
    return way, max(1, hops) * (size / target.chip.link + HOP_SECONDS)


def closes(chip: Chip, length: int) -> bool:
    """Whether an axis of this length is a ring."""
    return length >= chip.ring and length % chip.ring == 0
