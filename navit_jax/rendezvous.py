"""How the processes of a run meet: each connects to process 0, which lets them go on when all have come.

It happens before `jax.distributed` starts because jax's client answers a missing process with abort() and a C++ stack.
The connections stay: `peers` watches them.
"""

import contextlib
import json
import selectors
import socket
import sys
import time
from collections.abc import Iterable
from typing import NamedTuple, NoReturn

from input_pipeline.errors import UserError


class Connection:
    """A connection to another process, and what came over it: JSON, a line a message."""

    def __init__(self, link: socket.socket, index: int = -1, name: str = "") -> None:
        self.link, self.index, self.name = link, index, name
        self.seen, self.left, self._rest = time.monotonic(), False, b""

    def say(self, **message: object) -> None:
        """Into the system's buffer; a peer that cannot take it is found gone by reading."""
        with contextlib.suppress(OSError):
            self.link.sendall(json.dumps(message).encode() + b"\n")

    def hear(self) -> list[dict] | None:
        """What has come (waits up to the connection's timeout); None: the connection is closed."""
        try:
            data = self.link.recv(65536)
        except (TimeoutError, BlockingIOError):
            return []
        except OSError:
            return None
        if not data:
            return None
        self.seen = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > 65536:
            return None
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None


def readable(peers: Iterable[Connection], timeout: float) -> list[Connection]:
    """Those from which something has come, or whose connection is closed; waits up to `timeout` seconds for one."""
    with selectors.DefaultSelector() as selector:  # select() fails in a process with 1024 open files
        for peer in peers:
            selector.register(peer.link, selectors.EVENT_READ, peer)
        return [key.data for key, _ in selector.select(timeout)]


class Place(NamedTuple):
    """Where and for whom: HOST, PORT of process 0; how many processes, which of them this is; the time to give up."""

    host: str
    port: int
    count: int
    index: int
    deadline: float

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def meet(address: str, count: int, index: int, timeout: float) -> tuple[list[Connection], int]:
    """Connections of process 0 to all others, of the others to process 0; and a free port of process 0 for jax.

    address: HOST:PORT where process 0 listens. timeout: seconds to wait for all. Raises UserError in every process that
    can be reached where some do not come, two are the same, or they disagree on their number.
    """
    host, port = address.rsplit(":", 1)
    place = Place(host.strip("[]"), int(port), count, index, time.monotonic() + timeout)
    if index:
        return _call(place)
    came = _listen(place)
    free = _free_port(place.host, place.port + 1)
    for peer in came:
        peer.say(port=free)
    return came, free


def _listen(place: Place) -> list[Connection]:
    came: dict[int, Connection] = {}
    try:
        server = _serve(place.host, place.port)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at {place} ({error.strerror}): another run may use this port. Give "
            "--coordinator=HOST:PORT with a free port of process 0's host."
        ) from None
    told = time.monotonic() + 10
    with server:
        while len(came) < place.count - 1:
            missing = [i for i in range(1, place.count) if i not in came]
            if time.monotonic() > told:
                told += 30
                print(
                    f"waiting at {place} for process {_listed(missing)} of {place.count}", file=sys.stderr, flush=True
                )
            if time.monotonic() > place.deadline:
                _refuse(
                    came.values(),
                    f"{len(came) + 1} of {place.count} processes came to {place}; missing: process {_listed(missing)}. "
                    "Start all of them at about the same time, with the same --coordinator and --num_processes, on "
                    "hosts that reach this address.",
                )
            _receive(server, came, place)
    return [came[i] for i in sorted(came)]


def _receive(server: socket.socket, came: dict[int, Connection], place: Place) -> None:
    """Let one more in, if it is one of ours; forget those that went away again."""
    for gone in readable(came.values(), 0):
        came.pop(gone.index).link.close()
    server.settimeout(0.2)
    try:
        link, _ = server.accept()
    except TimeoutError:
        return
    link.settimeout(5)
    peer = Connection(link)
    hello = (peer.hear() or [{}])[0]
    if hello.get("run") != "navit_jax":  # something else that tries ports
        return link.close()
    peer.index, peer.name, others = hello["index"], hello["host"], came.values()
    if hello["count"] != place.count:
        text = f"process {peer.index} was started with --num_processes={hello['count']}, process 0 with {place.count}"
        _refuse([*others, peer], f"{text}. Give every process the same number.")
    if peer.index in came or not 0 < peer.index < place.count:
        text = f"two processes were started as --process_id={peer.index} (one on {peer.name})"
        _refuse([*others, peer], f"{text}: each of 0 to {place.count - 1} must be given once.")
    came[peer.index] = peer


def _refuse(peers: Iterable[Connection], text: str) -> NoReturn:
    for peer in peers:
        peer.say(refused=text)
    raise UserError(text)


def _call(place: Place) -> tuple[list[Connection], int]:
    reason, speak = "nobody listens there", time.monotonic() + 10
    while time.monotonic() < place.deadline:
        if time.monotonic() > speak:
            speak += 30
            text = f"process {place.index} of {place.count} waits for process 0 at {place} ({reason})"
            print(text, file=sys.stderr, flush=True)
        try:
            peer = Connection(socket.create_connection((place.host, place.port), timeout=5), 0, place.host)
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(0.2)
            continue
        peer.say(run="navit_jax", index=place.index, count=place.count, host=socket.gethostname())
        answer = _answer(peer, place.deadline)
        if "refused" in answer:
            raise UserError(answer["refused"])
        if "port" in answer:
            return [peer], answer["port"]
        reason = "it closed the connection"
        peer.link.close()
        time.sleep(0.2)
    raise UserError(
        f"process {place.index} of {place.count} waited for process 0 at {place} ({reason}). Start all processes at "
        "about the same time, and see that this address is process 0's and can be reached from here."
    )


def _answer(peer: Connection, deadline: float) -> dict:
    """Process 0's word once all have come; waits a little longer than it does, so that its reason arrives."""
    peer.link.settimeout(1)
    while time.monotonic() < deadline + 5:
        heard = peer.hear()
        if heard is None or heard:
            return heard[0] if heard else {}
    return {}


def is_local(host: str) -> bool:
    """Whether only this host can be meant: then nothing listens to the outside."""
    return host in ("localhost", "127.0.0.1")


def _serve(host: str, port: int) -> socket.socket:
    if not is_local(host) and socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server((host if is_local(host) else "", port))


def _free_port(host: str, wanted: int) -> int:
    """`wanted`, next to the port that is open in firewalls, or any."""
    for port in (wanted, 0):
        try:
            with _serve(host, port) as server:
                return server.getsockname()[1]
        except (OSError, OverflowError):
            continue
    raise UserError("process 0 has no free port left")


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
