"""Which processes make up this run: named by flags, or found in what the launcher left in the environment.

jax's own detection knows where process 0 is; this decides when to ask it. Left alone it waits for processes that were
never started (a shell inside a Slurm allocation), takes one GPU of a node that runs one process, and asks the network
on machines that are no cluster. So a run of one process is recognised here first, without touching a device or a
network. MPI goes before Slurm: under both, Slurm describes the daemons of `mpirun`. Where a cluster is found, jax's own
classes for it are asked; they have no public name, `jax.distributed.initialize()` tells nobody the address it found.
"""

import glob
import os
import re
from typing import NamedTuple

from input_pipeline.errors import UserError

_PORT = "8476"


class Cluster(NamedTuple):
    """The processes of a run. coordinator: HOST:PORT of process 0. local_devices: which GPUs of the host are this
    process's, [] for all that it can see. found_by: for messages."""

    coordinator: str
    processes: int
    index: int
    local_devices: list[int]
    found_by: str


def find(coordinator: str = "", num_processes: int = -1, process_id: int = -1) -> Cluster | None:
    """The run that this process belongs to; None: it is alone.

    coordinator alone replaces the address found. All three: nothing is looked for. Raises UserError where they
    contradict each other or the environment lacks what is needed.
    """
    if num_processes != -1 or process_id != -1:
        return _given(coordinator, num_processes, process_id)
    if "OMPI_COMM_WORLD_SIZE" in os.environ:
        found = _open_mpi(coordinator)
    elif "SLURM_JOB_ID" in os.environ and "SLURM_STEP_NODELIST" in os.environ:
        found = _slurm(coordinator)
    elif _has_tpu():
        found = _tpu(coordinator)
    else:
        found = None
    if found is None and coordinator:
        raise UserError(
            f"--coordinator={coordinator} was given, but neither Slurm, Open MPI nor a TPU pod says how many processes "
            "there are. Give --num_processes=N and --process_id=0..N-1, too."
        )
    return found


def _given(coordinator: str, num_processes: int, process_id: int) -> Cluster | None:
    flags = f"--coordinator={coordinator} --num_processes={num_processes} --process_id={process_id}"
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise UserError(f"{flags}: expected --num_processes=N of 1 or more and --process_id from 0 to N-1, both given")
    if num_processes == 1:
        return None
    if not coordinator:
        raise UserError(f"{flags}: several processes need --coordinator=HOST:PORT, where process 0 runs")
    return Cluster(_address(coordinator), num_processes, process_id, [], "flags")


def _address(given: str) -> str:
    host, colon, port = given.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
        raise UserError(f"--coordinator={given}: expected HOST:PORT of process 0, such as 10.0.0.1:{_PORT}")
    return given


def _open_mpi(coordinator: str) -> Cluster | None:
    """Open MPI 5 no longer says where its first process is; on one host that does not matter."""
    env, count = os.environ, _number("OMPI_COMM_WORLD_SIZE", "Open MPI")
    if count == 1:
        return None
    index, local = _number("OMPI_COMM_WORLD_RANK", "Open MPI"), _number("OMPI_COMM_WORLD_LOCAL_RANK", "Open MPI")
    local_count = int(env.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1))
    if coordinator:
        address = _address(coordinator)
    elif "OMPI_MCA_orte_hnp_uri" in env:
        from jax._src.clusters import OmpiCluster

        address = OmpiCluster.get_coordinator_address(None, env.get("JAX_COORDINATOR_PORT"))
    elif local_count == count:
        name = env.get("PMIX_NAMESPACE", "0")  # the same in all processes of this mpirun
        address = f"127.0.0.1:{61440 + sum(map(ord, name)) * 31 % 4096}"
    else:
        raise UserError(
            f"Open MPI started {count} processes on several hosts and does not say where process 0 is. Give "
            f"--coordinator=HOST:{_PORT} with the first host."
        )
    return Cluster(address, count, index, _local_gpus(local, local_count), "Open MPI")


def _slurm(coordinator: str) -> Cluster | None:
    """A step of `srun`. SLURM_NTASKS is the allocation's in an interactive shell, SLURM_STEP_NUM_TASKS the step's."""
    count = _number("SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS", "Slurm")
    if count == 1:
        return None
    index, local = _number("SLURM_PROCID", "Slurm"), _number("SLURM_LOCALID", "Slurm")
    port = os.environ.get("JAX_COORDINATOR_PORT")
    if coordinator:
        address = _address(coordinator)
    else:
        from jax._src.clusters import SlurmCluster

        address = SlurmCluster.get_coordinator_address(None, port)
    return Cluster(address, count, index, _local_gpus(local, _tasks_on_node()), "Slurm")


def _tasks_on_node() -> int:
    """This node's of SLURM_STEP_TASKS_PER_NODE, which is written like 4(x2),3."""
    spans = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    counts = [int(tasks) for tasks, times in spans for _ in range(int(times or 1))]
    return counts[min(int(os.environ.get("SLURM_NODEID", 0)), len(counts) - 1)]


def _local_gpus(local: int, processes: int) -> list[int]:
    """A process's equal share of the host's GPUs; [] (all it sees) where it is alone or was given its own already."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = len(glob.glob("/dev/nvidia[0-9]*")) if visible is None else len([v for v in visible.split(",") if v])
    share = count // max(processes, 1)
    return [] if processes == 1 or not share else list(range(local * share, (local + 1) * share))


def _has_tpu() -> bool:
    """Chips that jax may use: a TPU host's program told to use the CPU is alone."""
    platforms = os.environ.get("JAX_PLATFORMS", "tpu")
    return "tpu" in platforms and bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def _tpu(coordinator: str) -> Cluster | None:
    """GKE names the hosts of a slice in the environment, Google Cloud in its metadata server."""
    try:
        from jax._src.clusters import GceTpuCluster, GkeTpuCluster

        kind = next((kind for kind in (GkeTpuCluster, GceTpuCluster) if kind.is_env_present()), None)
        if kind is None or kind.get_process_count() == 1:
            return None
        port = os.environ.get("JAX_COORDINATOR_PORT")
        address = _address(coordinator) if coordinator else kind.get_coordinator_address(60, port)
        return Cluster(address, kind.get_process_count(), kind.get_process_id(), [], "the TPU pod")
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise UserError(
            f"this host has TPU chips, but which others belong to the run could not be found ({error}). Name the run "
            "with --coordinator=HOST:PORT --num_processes=N --process_id=I, or --num_processes=1 --process_id=0 for "
            "this host alone."
        ) from error


def _number(name: str, launcher: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise UserError(
            f"{launcher} started this process, but {name} is {value!r}: expected a number. Name the run with "
            "--coordinator=HOST:PORT --num_processes=N --process_id=I."
        )
    return int(value)
