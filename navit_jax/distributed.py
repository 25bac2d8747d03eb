"""Several processes as one run: joined at the start, heard from while they work, left together.

jax's own error handling ends the others of a lost process with a C++ stack, or late: `rendezvous` and `peers` meet and
watch beside it, over their own connections. Everything here does nothing in a run of one process, the laptop's case:
it touches no network and starts no thread.
"""

import contextlib
import sys
import time
import traceback
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from input_pipeline.errors import UserError
from navit_jax import cluster, rendezvous
from navit_jax.peers import LOST, Peers, leave

__all__ = ["LOST", "broadcast", "gather", "group", "initialize", "is_lead", "session", "shutdown"]

HEARTBEAT = 20  # seconds until jax's service gives up a process; `peers` is quicker
_VERDICT = 3.0  # seconds until the loss of a process, which breaks collectives at once, has also been reported
_peers: Peers | None = None


@contextlib.contextmanager
def session(
    coordinator: str = "", num_processes: int = -1, process_id: int = -1, *, timeout: float = 300.0, debug: bool = False
) -> Iterator[None]:
    """A run from joining to leaving; wrap everything that touches jax in it. Arguments as in `initialize`.

    Alone it does nothing. Of several processes each ends with one line on stderr when another is lost (status 75) or
    fails (that one's status); its own error is printed here, told to the others, and ends it at once with 2 for a
    UserError, 130 when interrupted, 1 otherwise. debug: tracebacks of UserErrors, too.
    """
    initialize(coordinator, num_processes, process_id, timeout=timeout)
    try:
        yield
    except BaseException as error:
        if _peers is None or (isinstance(error, SystemExit) and not error.code):
            raise
        _fail(error, debug)
    finally:
        shutdown()


def initialize(coordinator: str = "", num_processes: int = -1, process_id: int = -1, *, timeout: float = 300.0) -> None:
    """Joins the run's processes, named by all three arguments or found (TPU pod, GKE, Slurm, Open MPI), if there are
    several.

    coordinator: HOST:PORT of process 0; alone it replaces the address found. timeout: seconds in which all processes
    must come. Call it before anything touches a device. Raises UserError for arguments that contradict each other and
    where not all come: which address, how many came, who is missing.
    """
    global _peers
    found = cluster.find(coordinator, num_processes, process_id)
    if found is None:
        return
    connections, port = rendezvous.meet(found.coordinator, found.processes, found.index, timeout)
    peers = Peers(connections, found.processes, found.index)
    host = found.coordinator.rsplit(":", 1)[0]
    # Its SIGTERM handler would swallow the signal until the trainer has its own.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator_address=f"{host}:{port}",
        coordinator_bind_address=f"{host if rendezvous.is_local(host) else '[::]'}:{port}",
        num_processes=found.processes,
        process_id=found.index,
        local_device_ids=found.local_devices or None,
        cluster_detection_method="deactivate",
        initialization_timeout=60,
        heartbeat_timeout_seconds=HEARTBEAT,
    )
    _peers = peers


def shutdown() -> None:
    """Leaves the run when all are ready to: a common call, after which nothing may be computed. Nothing when alone."""
    global _peers
    if _peers is not None:
        jax.distributed.shutdown()
        _peers.close()
        _peers = None


def _fail(error: BaseException, debug: bool) -> None:
    """Ends this process for its own error, unless that is how another's loss looks from here."""
    codes = {UserError: 2, KeyboardInterrupt: 130, SystemExit: getattr(error, "code", 1)}
    code = next((code for kind, code in codes.items() if isinstance(error, kind)), None)
    if code is None or error.__context__ is not None:  # a save that fails for it raises a UserError, too
        time.sleep(_VERDICT)
    if isinstance(error, UserError) and not debug:
        print(f"error: {error}", file=sys.stderr)
    elif not isinstance(error, KeyboardInterrupt | SystemExit):
        traceback.print_exception(error)
    code = code if isinstance(code, int) else 1
    _peers.fail(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}", code)
    leave(code)


class Group:
    """The run's processes as `input_pipeline` sees them, which knows no jax; `group()` makes it."""

    def __init__(self) -> None:
        self.rank, self.count = jax.process_index(), jax.process_count()

    def gather(self, x: np.ndarray) -> np.ndarray:
        return gather(x)


def group() -> Group | None:
    """For `stream.open_images(..., group=)`; None in a run of one process."""
    return Group() if jax.process_count() > 1 else None


def is_lead() -> bool:
    """Whether this is process 0, the one that logs and writes."""
    return jax.process_index() == 0


def broadcast(x: np.ndarray) -> np.ndarray:
    """Process 0's value everywhere. x: of the same shape and dtype in every process; every process must call this."""
    if jax.process_count() == 1:
        return np.asarray(x)
    flat, restore = _as_bytes(x)
    return restore(multihost_utils.broadcast_one_to_all(flat))


def gather(x: np.ndarray) -> np.ndarray:
    """Everyone's value [processes, ...] everywhere. x: of the same shape and dtype in every process; all call this."""
    if jax.process_count() == 1:
        return np.asarray(x)[None]
    flat, restore = _as_bytes(x)
    return restore(multihost_utils.process_allgather(flat), len_first=jax.process_count())


def _as_bytes(x: np.ndarray) -> tuple:
    """`x` as bytes [n] uint8, and the function back: jax would cut float64 and int64 to 32 bits."""
    x = np.asarray(x)
    shape, dtype = x.shape, x.dtype

    def restore(flat: np.ndarray, len_first: int | None = None) -> np.ndarray:
        first = () if len_first is None else (len_first,)
        return np.frombuffer(np.asarray(flat).tobytes(), dtype).reshape(first + shape).copy()

    return np.ascontiguousarray(x).reshape(-1).view(np.uint8), restore
