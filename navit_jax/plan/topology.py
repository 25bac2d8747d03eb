"""Devices of a machine that is not here: TPU slices as the compiler in `libtpu` knows them, and virtual CPU devices.

A TPU's compiler runs on any Linux machine, so a program is compiled for a pod before a chip of it is rented. Both kinds
need settings that JAX reads once, when it first computes, hence `prepare`.
"""

import contextlib
import importlib.util
import math
import os
import re
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from input_pipeline.errors import UserError
from navit_jax.plan.chips import CHIPS, Chip

# Without these the compiler asks the cloud's metadata server what TPU this is, waits, and complains on stderr; and it
# locks out every other process that uses it, although nothing here touches a TPU.
_SETTINGS = dict(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5litepod-8") | dict(
    TPU_STDERR_LOG_LEVEL="3", TPU_MIN_LOG_LEVEL="3", TF_CPP_MIN_LOG_LEVEL="3", ALLOW_MULTIPLE_LIBTPU_LOAD="1"
)
EXAMPLES = "v5e:16x16, v6e:4x8, v5p:4x4x4, v4:2x2x1, cpu:8"


@dataclass(frozen=True)
class Target:
    """name: as given, 'v5e:16x16'. shape: chips along each axis. chip: None for CPU devices."""

    name: str
    shape: tuple[int, ...]
    chip: Chip | None

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def parse(name: str) -> Target:
    """The machine of a name such as 'v5e:16x16' or 'cpu:8'. Raises UserError for others."""
    kind, _, layout = name.partition(":")
    if not re.fullmatch(r"\d+(x\d+)*", layout) or kind not in (*CHIPS, "cpu"):
        raise UserError(
            f"--plan={name}: expected a kind of machine, {', '.join(CHIPS)} or cpu, a colon, and how many chips lie "
            f"along each axis, such as {EXAMPLES}."
        )
    shape, chip = tuple(int(n) for n in layout.split("x")), CHIPS.get(kind)
    axes = chip.axes if chip else 1
    if len(shape) != axes or min(shape) < 1:
        raise UserError(
            f"--plan={name}: {kind} needs {axes} size{'s' * (axes > 1)} of 1 or more behind the colon, found {layout}. "
            f"Such as {EXAMPLES}."
        )
    return Target(name, shape, chip)


def prepare(target: Target) -> None:
    """Settings that only work before JAX first computes in this process: call it first.

    Everything that does run, runs on the CPU: a machine with an accelerator keeps it free. Raises UserError where a TPU
    is planned without `libtpu`, or JAX has already computed on fewer CPU devices than the target has.
    """
    if target.chip:
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                f"--plan={target.name} needs the TPU compiler, which runs on Linux without a TPU: "
                'pip install "jax[tpu]"'
            )
        for setting, value in _SETTINGS.items():
            os.environ.setdefault(setting, value)
    jax.config.update("jax_platforms", "cpu")
    if not target.chip and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has computed already; there may be enough
            jax.config.update("jax_num_cpu_devices", target.count)
    if not target.chip and len(jax.devices("cpu")) < target.count:
        raise UserError(
            f"--plan={target.name}: this process already runs on {len(jax.devices('cpu'))} CPU devices. Unset "
            f"XLA_FLAGS, or set it to --xla_force_host_platform_device_count={target.count}."
        )


def devices_for(target: Target | str) -> list[jax.Device]:
    """The target's devices, to be compiled for and not computed on, one a chip; CPU devices do compute.

    Raises UserError for a shape that the compiler refuses.
    """
    target = parse(target) if isinstance(target, str) else target
    if not target.chip:
        return jax.devices("cpu")[: target.count]
    options = dict(chip_config_name="megacore") if target.name.startswith("v4") else {}  # two cores as one device
    if max(target.shape) <= 2:  # part of a host; a whole one's block is assumed otherwise
        options["chips_per_host_bounds"] = [*target.shape, 1][:3]
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=target.name, **options)
    except (RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"--plan={target.name}: the TPU compiler refuses this: {reason}") from error
    return list(found.devices)
