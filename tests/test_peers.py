"""When a process is killed, hangs or fails the others say so and stop; here without jax, which starts quickly."""

import signal
import textwrap
import time

import pytest
from processes import Processes

from navit_jax import peers

WATCH = """
from navit_jax import peers, rendezvous
peers.SILENCE, peers._PING = 3.0, 0.2
links, _ = rendezvous.meet(address, count, index, 20)
watch = peers.Peers(links, count, index)
print("ready", flush=True)
"""


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("kind, reason, limit", [("KILL", "is gone (killed", 10), ("STOP", "not been heard from", 15)])
def test_all_others_stop_when_one_is_killed_or_hangs(victim, kind, reason, limit):
    with Processes(3, WATCH + "time.sleep(60)") as run:
        run.wait_ready()
        time.sleep(0.5)
        start = time.monotonic()
        run.all[victim].send_signal(getattr(signal, f"SIG{kind}"))
        for index in {0, 1, 2} - {victim}:
            status, _, error = run.end(index)
            assert status == peers.LOST == 75
            (line,) = error.strip().splitlines()
            assert line.startswith(f"process {index} of 3 stops: process {victim} (on ")
            assert reason in line and "The same command, in all processes, resumes" in line
        assert time.monotonic() - start < limit
        if kind == "STOP":  # once it goes on it finds that the others did not wait
            run.all[victim].send_signal(signal.SIGCONT)
            assert run.end(victim)[0] == peers.LOST


@pytest.mark.parametrize("culprit", [0, 2])
def test_all_others_stop_with_the_status_of_one_that_fails(culprit):
    body = f"""
        if index == {culprit}:
            time.sleep(0.5)
            watch.fail("the disk is full\\nsecond line", 2)
            peers.leave(2)
        time.sleep(60)
    """
    with Processes(3, WATCH + textwrap.dedent(body)) as run:
        for index in {0, 1, 2} - {culprit}:
            status, _, error = run.end(index, timeout=20)
            assert status == 2
            text = f"process {index} of 3 stops: process {culprit} (on "
            assert error.strip().startswith(text) and error.strip().endswith("error: the disk is full")


def test_nobody_is_reported_when_all_leave_one_after_the_other():
    with Processes(
        3, WATCH + "time.sleep(0.3 * ((index + 1) % 3)); watch.close(); time.sleep(0.5 * (index == 2))"
    ) as run:
        for index in range(3):
            assert run.end(index, timeout=20) == (0, "ready\nleft\n", "")


def test_a_loss_is_noticed_by_a_process_with_many_open_files():
    files = """
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    held = [open("/dev/null") for _ in range(1100)]
    """
    with Processes(2, textwrap.dedent(files) + WATCH + "time.sleep(60)") as run:
        run.wait_ready()
        run.all[0].kill()
        status, _, error = run.end(1, timeout=20)
        assert status == peers.LOST and error.strip().startswith("process 1 of 2 stops: process 0 ")


def test_an_abort_leaves_the_report_to_the_watch():
    """As jax's client does it, from a thread of its own, when it finds process 0 gone before the watch does."""
    body = """
    import ctypes, threading
    if index:
        threading.Thread(target=ctypes.CDLL(None).abort).start()
    time.sleep(60)
    """
    with Processes(2, WATCH + textwrap.dedent(body)) as run:
        run.wait_ready()
        time.sleep(1)
        run.all[0].kill()
        status, _, error = run.end(1, timeout=20)
        assert status == peers.LOST and error.strip().startswith("process 1 of 2 stops: process 0 ")
