"""Real processes with jax: values go round; one that is killed or fails ends all; all leave in peace."""

import signal
import time

import numpy as np
import pytest
from processes import Processes

from navit_jax import distributed

JAX = """
import jax
from navit_jax import distributed
"""
STEPS = """
import signal, os
with distributed.session(address, count, index):
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    x = jax.make_array_from_process_local_data(rows, np.ones((jax.local_device_count(), 4), np.float32))
    add = jax.jit(lambda x, step: (x * step).sum(), out_shardings=jax.NamedSharding(mesh, jax.P()))
    for step in range(10**9):
        if step == 5:
            print("ready", flush=True)
        if step > 5:
            {event}
        assert float(add(x, step)) == 4 * jax.device_count() * step
"""


def last_line(error):
    return error.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "victim, event",
    [
        (1, "time.sleep(0.01)"),
        pytest.param(0, "time.sleep(0.01)", marks=pytest.mark.slow),
        (0, "time.sleep(60)"),
        pytest.param(1, "time.sleep(60)", marks=pytest.mark.slow),
    ],
)
def test_one_is_killed_while_the_other_computes_or_waits(victim, event):
    with Processes(2, STEPS.format(event=event), JAX) as run:
        run.wait_ready()
        time.sleep(0.3)
        start, index = time.monotonic(), 1 - victim
        run.all[victim].kill()
        status, _, error = run.end(index)
        assert status == 75, error
        assert last_line(error).startswith(f"process {index} of 2 stops: process {victim} (on ")
        assert "stack trace" not in error and len(error.splitlines()) < 12
        assert time.monotonic() - start < 20


@pytest.mark.slow
def test_what_failed_in_all_processes_is_told_from_what_failed_in_one():
    body = """
    with distributed.session(address, count, index):
        assert failed_everywhere(KeyError(index))
        if index:
            assert not failed_everywhere(ValueError("here alone"))
        else:
            time.sleep(11)
    """
    with Processes(2, body, JAX + "from navit_jax.checkpoint_integrity import failed_everywhere") as run:
        for index in range(2):
            status, out, error = run.end(index)
            assert status == 0 and out == "left\n", error


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_hanging_process_in_a_run_of_jax(victim):
    with Processes(2, STEPS.format(event="time.sleep(0.01)"), JAX) as run:
        run.wait_ready()
        start = time.monotonic()
        run.all[victim].send_signal(signal.SIGSTOP)
        status, _, error = run.end(1 - victim, timeout=60)
        assert status == 75 and "has not been heard from for 15 s" in last_line(error)
        assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "error, status, said",
    [
        ("UserError('the folder is gone')", 2, "the folder is gone"),
        pytest.param("KeyError('x')", 1, "KeyError: 'x'", marks=pytest.mark.slow),
    ],
)
def test_an_error_of_one_process_ends_all(error, status, said):
    event = f"if index == 1: raise {error}"
    with Processes(2, STEPS.format(event=event), JAX) as run:
        own, other = run.end(1), run.end(0)
        assert (own[0], other[0]) == (status, status)
        assert last_line(own[2]) == (f"error: {said}" if status == 2 else said)
        assert ("Traceback" in own[2]) == (status == 1)
        assert last_line(other[2]).endswith(f"stopped with an error: {said}")


def test_values_go_round_unchanged_and_all_leave_in_peace():
    body = """
    with distributed.session(address, count, index):
        assert jax.process_count() == count and distributed.is_lead() == (index == 0)
        assert distributed.group().rank == index and distributed.group().count == count
        def value(i):
            return [
                np.float64(i + 1) / 3, np.array([2**40 + i, -i]), np.zeros((0, 2), np.int16),
                np.arange(6, dtype=np.float32).reshape(2, 3).T * (i + 0.1), np.array(b"step %d" % i, "S8"),
            ]
        for n, x in enumerate(value(index)):
            x, all_values = np.asarray(x), np.stack([value(i)[n] for i in range(count)])
            lead = np.asarray(value(0)[n])
            for found, wanted in ((distributed.group().gather(x), all_values), (distributed.broadcast(x), lead)):
                assert found.dtype == wanted.dtype and found.shape == wanted.shape, (n, found, wanted)
                assert found.tobytes() == np.ascontiguousarray(wanted).tobytes(), (n, found, wanted)
        time.sleep(0.5 * index)
    """
    with Processes(2, body, JAX) as run:
        for index in range(2):
            status, out, error = run.end(index)
            assert (status, error) == (0, "") and out.endswith("left\n")


def test_values_of_one_process():
    x = np.array([1 / 3, 2**40])
    assert distributed.is_lead() and distributed.group() is None
    np.testing.assert_array_equal(distributed.broadcast(x), x)
    np.testing.assert_array_equal(distributed.gather(x), x[None])


@pytest.mark.slow
def test_a_mistake_that_is_only_how_the_loss_of_another_looks_is_not_reported_as_one():
    body = """
    with distributed.session(address, count, index):
        distributed.gather(np.zeros(1))
        print("ready", flush=True)
        try:
            while True:
                distributed.gather(np.zeros(1))
        except jax.errors.JaxRuntimeError as error:
            raise UserError("could not save") from error
    """
    with Processes(2, body, JAX) as run:
        run.wait_ready()
        run.all[1].kill()
        status, _, error = run.end(0)
        assert status == 75 and "process 1 (on " in last_line(error) and "could not save" not in error
