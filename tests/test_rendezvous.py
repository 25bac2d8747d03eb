"""How processes meet: all or none, and those who came are told why not."""

import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from processes import free_port

from input_pipeline.errors import UserError
from navit_jax import rendezvous


def meet(places, timeout=10, port=None):
    """What each of (count, index, seconds to wait before) gets or is told."""
    address = f"127.0.0.1:{port or free_port()}"

    def one(place):
        count, index, delay = place
        time.sleep(delay)
        try:
            return rendezvous.meet(address, count, index, timeout)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(one, places))


@pytest.mark.parametrize("late", [0, 1])
def test_all_meet_whoever_comes_last(late):
    found = meet([(3, index, 0.5 if index == late else 0) for index in range(3)])
    assert [peer.index for peer in found[0][0]] == [1, 2]
    assert all([peer.index for peer in links] == [0] for links, _ in found[1:])
    assert len({port for _, port in found}) == 1
    for index, (links, _) in enumerate(found):
        for peer in links:
            peer.say(index=index)
    for links, _ in found:
        for peer in links:  # each connection leads to the process that it says
            assert peer.hear() == [{"index": peer.index}]
            peer.link.close()


def test_all_who_came_are_told_who_is_missing():
    for text in meet([(4, 0, 0), (4, 2, 0)], timeout=1):
        assert re.search(r"2 of 4 processes came to 127.0.0.1:\d+; missing: process 1, 3\. Start all", text)


def test_a_process_without_the_first_gives_up_and_names_the_address():
    start = time.monotonic()
    (text,) = meet([(2, 1, 0)], timeout=1)
    assert re.search(r"process 1 of 2 waited for process 0 at 127.0.0.1:\d+ \(Connection refused\)", text)
    assert time.monotonic() - start < 5


def test_two_of_the_same_number_and_two_opinions_on_the_count():
    for text in meet([(3, 0, 0), (3, 1, 0), (3, 1, 0.3)], timeout=5):
        assert "two processes were started as --process_id=1" in text
    for text in meet([(3, 0, 0), (2, 1, 0)], timeout=5):
        assert "process 1 was started with --num_processes=2, process 0 with 3" in text


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        (text,) = meet([(2, 0, 0)], port=other.getsockname()[1])
    assert "cannot listen at 127.0.0.1:" in text and "Give --coordinator=HOST:PORT" in text


def test_strangers_are_not_let_in_and_one_who_left_may_come_again():
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(meet, [(3, 0, 0), (3, 1, 1.5), (3, 2, 1.5)], port=port)
        time.sleep(0.3)
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"[1, 2]\n", b""):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(words)
        with socket.create_connection(("127.0.0.1", port)) as early:
            early.sendall(b'{"run": "navit_jax", "index": 1, "count": 3, "host": "early"}\n')
            time.sleep(0.3)
        first, second, third = found.result()
    assert [peer.index for peer in first[0]] == [1, 2] and first[0][0].name == socket.gethostname()
    for links, _ in (first, second, third):
        for peer in links:
            peer.link.close()
