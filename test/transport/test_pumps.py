"""Pumps through a child that reads nothing: what becomes of the connections is noticed all the same, and at no cost."""

from __future__ import annotations

import contextlib
import socket

import pytest

from test.support.ends import flood, reset, tcp_pair
from test.support.relays import PATIENCE_S, InThread
from Zorp.transport.pumps import through_child
from Zorp.transport.relay import End, RelaySettings
from Zorp.transport.stream import SocketStream


class Through(InThread):
    """A relay in a thread: `client`, `server` and the two ends of the child belong to the test."""

    def __init__(self, pair, **settings):
        outer, inner = [pair() for _ in range(2)], [socket.socketpair() for _ in range(2)]
        (self.client, near_client), (self.server, near_server) = outer
        (self.child_client, to_child), (self.child_server, from_child) = inner
        self.near = [SocketStream(sock) for sock in (near_client, near_server, to_child, from_child)]
        self.begin(through_child(*self.near, RelaySettings(half_close=True, **settings)))

    def close(self):
        self.relay.stop()
        for end in (self.child_client, self.child_server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self.thread.join(PATIENCE_S)
        for end in (self.client, self.server, self.child_client, self.child_server, *self.near):
            end.close()


@pytest.fixture
def through():
    started = []

    def start(pair=tcp_pair, **settings):
        started.append(Through(pair, **settings))
        return started[-1]

    yield start
    for running in started:
        running.close()


def fill(*ends):
    for end in ends:
        end.settimeout(0.3)
        flood(end)


@pytest.mark.parametrize(("side", "expected"), [("client", End.CLIENT_FAILED), ("server", End.SERVER_FAILED)])
def test_a_connection_that_is_reset_ends_the_relay_though_the_child_reads_nothing(through, side, expected):
    # given a child that takes nothing more of what one side sends
    running = through()
    fill(getattr(running, side))
    # when that side is reset, then the relay does not wait for the child
    reset(getattr(running, side))
    assert running.result() is expected


def test_a_client_that_is_reset_after_its_end_ends_the_relay(through):
    running = through()
    running.client.shutdown(socket.SHUT_WR)
    assert running.child_client.recv(1) == b""
    reset(running.client)
    assert running.result() is End.CLIENT_FAILED


def test_a_half_closed_client_costs_no_time_while_the_child_reads_nothing(through):
    running = through(idle_ms=500)
    fill(running.client)
    running.client.shutdown(socket.SHUT_WR)
    assert running.result() is End.TIMED_OUT
    assert running.cpu_s < 0.1


def test_a_client_that_hung_up_costs_no_time_while_the_child_reads_nothing(through):
    # given a local client that is gone; nothing of that is an error
    running = through(socket.socketpair, idle_ms=500)
    fill(running.client)
    running.client.close()
    assert running.result() is End.TIMED_OUT
    assert running.cpu_s < 0.1


def test_a_relay_that_only_waits_for_the_child_is_stopped(through):
    running = through()
    fill(running.client, running.server)
    running.relay.stop()
    assert running.result() is End.STOPPED
