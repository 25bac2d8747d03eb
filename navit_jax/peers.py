"""A process of a run notices when another is gone, and ends with one line that says which and what to do.

jax's own client ends the others by abort() with a C++ stack when process 0 dies, and needs its whole heartbeat limit to
notice any other. Here a killed process is noticed at once (its connection to process 0 closes, which tells the others)
and one that hangs after `SILENCE` seconds, whatever the main thread waits for. The exit status is 75 (EX_TEMPFAIL) when
a process was lost, so that launchers can start the same command again, or that of the process that had an error.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time

from navit_jax.rendezvous import Connection, readable

LOST = 75
SILENCE = 15.0  # below jax's limit, so that this report comes first
_PING = 1.0  # seconds
_ADVICE = "The same command, in all processes, resumes from the last checkpoint."


class Peers:
    """Watches the connections of a run from now on, in a thread; it ends this process when another is lost.

    connections: process 0's to all others, or another's to process 0.
    """

    def __init__(self, connections: list[Connection], count: int, index: int) -> None:
        self._peers, self._count, self._index = connections, count, index
        self._closing, self._all_left = False, threading.Event()
        for peer in connections:
            peer.link.settimeout(5)
            peer.seen = time.monotonic()
        # Put to sleep in its handler, jax's abort() leaves the report to the thread: 6 s, the signal's number.
        libc = ctypes.CDLL(None)
        libc.signal(int(signal.SIGABRT), ctypes.cast(libc.sleep, ctypes.c_void_p))
        threading.Thread(target=self._guard, daemon=True, name="peers").start()

    def fail(self, text: str, code: int) -> None:
        """Tell the others that this process leaves with an error and this exit status; call `leave` next."""
        self._closing = True
        for peer in self._peers:
            peer.say(error=text.split("\n")[0][:500], code=code)

    def close(self, timeout: float = 10.0) -> None:
        """Wait until all have come so far (seconds), so that nobody's leaving looks like a loss."""
        if self._index == 0:
            self._all_left.wait(timeout)
        for peer in self._peers:
            peer.say(bye=1)
        if self._index:
            self._all_left.wait(timeout)
        self._closing = True

    def _guard(self) -> None:
        try:
            self._watch()
        except Exception as error:  # unwatched, a process would wait for ever
            self._stop(f"its watch of the others failed ({type(error).__name__}: {error})", LOST)

    def _watch(self) -> None:
        last = time.monotonic()
        while self._peers:
            for peer in self._peers:
                peer.say(ping=1)
            for peer in readable(self._peers, _PING):
                self._take(peer)
            now = time.monotonic()
            for peer in self._peers:
                if now - last > _PING + 4:  # it was this process that stood still
                    peer.seen = now
                if now - peer.seen > SILENCE and not peer.left:
                    self._lost(peer, f"has not been heard from for {SILENCE:.0f} s (it hangs, or the network is down)")
            last = now
        self._all_left.set()

    def _take(self, peer: Connection) -> None:
        messages = peer.hear()
        if messages is None:
            self._peers = [other for other in self._peers if other is not peer]
            if not peer.left:
                self._lost(peer, "is gone (killed, out of memory, or its machine is down)")
        for message in messages or []:
            if "bye" in message:
                peer.left = True
            if "stop" in message:
                self._stop(message["stop"], message["code"])
            if "error" in message:
                self._lost(peer, f"stopped with an error: {message['error']}", message["code"])
        if all(other.left for other in self._peers):
            self._all_left.set()

    def _lost(self, peer: Connection, what: str, code: int = LOST) -> None:
        text = f"process {peer.index} (on {peer.name}) {what}"
        for other in self._peers:
            if other is not peer:
                other.say(stop=text, code=code)
        self._stop(text, code)

    def _stop(self, text: str, code: int) -> None:
        if self._closing:
            return
        advice = f". {_ADVICE}" if code == LOST else ""
        error = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what C++ still has to say would follow
        os.write(error, f"\nprocess {self._index} of {self._count} stops: {text}{advice}\n".encode())
        leave(code)


def leave(code: int) -> None:
    """End this process now, from any thread: a clean exit waits for collectives and services that never return."""
    for child in multiprocessing.active_children():  # the readers of data
        child.kill()
    flush = threading.Thread(target=_flush, daemon=True)  # another thread may hold the buffer
    flush.start()
    flush.join(1.0)
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
