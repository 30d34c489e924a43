"""The relay by itself: ends, waiting, and that it never turns in circles."""

from __future__ import annotations

import socket

import pytest

from test.support.ends import flood
from test.support.relays import Running
from Zorp.transport.pipes import PIPE_BYTES
from Zorp.transport.relay import End, RelaySettings


@pytest.fixture
def relay():
    """Return a function that starts a relay with these settings."""
    started = []

    def start(callbacks=None, **settings):
        started.append(Running(RelaySettings(**settings), **(callbacks or {})))
        return started[-1]

    yield start
    for running in started:
        running.close()


def test_ends_when_either_side_ends(relay):
    running = relay()
    running.client.sendall(b"last words")
    running.client.close()
    assert running.result() is End.FINISHED
    assert running.server.recv(100) == b"last words"


def test_half_close_waits_for_both(relay):
    running = relay(half_close=True)
    running.client.shutdown(socket.SHUT_WR)
    assert running.server.recv(1) == b""
    running.server.sendall(b"answer")
    assert running.client.recv(100) == b"answer"
    assert running.end is None
    running.server.close()
    assert running.result() is End.FINISHED


def test_side_that_hung_up_costs_no_time(relay):
    # given a client that is gone altogether, in a relay that still waits for the server
    running = relay(half_close=True, idle_ms=400)
    running.client.close()
    # when nothing happens any more
    assert running.result() is End.TIMED_OUT
    # then the relay slept
    assert running.cpu_s < 0.1


def test_answer_to_a_client_that_is_gone_is_a_failure_of_the_client(relay):
    running = relay(half_close=True)
    running.client.close()
    assert running.server.recv(1) == b""
    running.server.sendall(b"answer")
    assert running.result() is End.CLIENT_FAILED


def test_abort_from_another_thread(relay):
    running = relay()
    running.near[0].abort()
    assert running.result() is End.STOPPED


def test_no_more_is_read_than_the_sink_takes(relay):
    # given a server that reads nothing
    running = relay()
    running.client.settimeout(0.3)
    flood(running.client)
    # then the relay holds at most one read, or one pipe
    assert running.relay.to_server.bytes - running.near[1].bytes_sent <= PIPE_BYTES
    # and everything arrives once it does
    sent = running.near[0].bytes_recvd
    assert sent > 65536
    while running.server.recv(1 << 20) and running.near[1].bytes_sent < sent:
        pass


def test_a_full_sink_that_is_shut_is_a_failure(relay):
    # given a server that reads nothing, until nothing more can be sent to it
    running = relay(half_close=True)
    running.client.settimeout(0.3)
    flood(running.client)
    # when it shuts its end down, and what it has not read still fills the connection
    running.server.shutdown(socket.SHUT_RDWR)
    # then the relay does not wait for room
    assert running.result() is End.SERVER_FAILED


def test_counts_are_those_of_the_streams(relay):
    running = relay()
    running.client.sendall(b"12345")
    assert running.server.recv(5) == b"12345"
    running.server.sendall(b"123")
    assert running.client.recv(3) == b"123"
    running.client.close()
    running.result()
    assert (running.relay.to_server.bytes, running.relay.to_client.bytes) == (5, 3)
    assert [(near.bytes_recvd, near.bytes_sent) for near in running.near] == [(5, 3), (3, 5)]


def test_statistics_end_the_relay(relay):
    running = relay({"on_stats": lambda: False}, stats_reads=2)
    running.client.sendall(b"1")
    assert running.server.recv(1) == b"1"
    running.client.sendall(b"2")
    assert running.result() is End.REFUSED
    assert running.server.recv(1) == b"2"
