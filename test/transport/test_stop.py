"""Stopping a relay from outside: it ends whatever it waits for, and no peer is told of an end before the reset."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from test.support.ends import flood, tcp_pair
from test.support.relays import Running
from Zorp.transport.relay import End, RelaySettings

QUIET_S = 0.3


@pytest.fixture
def relay():
    """Return a function that starts a relay of TCP connections."""
    started = []

    def start(**settings):
        started.append(Running(RelaySettings(**settings), tcp_pair))
        return started[-1]

    yield start
    for running in started:
        running.close()


def server_takes_nothing(relay):
    running = relay()
    fill(running.client, running.relay.to_server)
    return running


def nobody_takes_anything(relay):
    running = relay()
    fill(running.client, running.relay.to_server)
    fill(running.server, running.relay.to_client)
    return running


def server_has_ended_and_takes_nothing(relay):
    running = relay(half_close=True)
    running.server.shutdown(socket.SHUT_WR)
    assert running.client.recv(1) == b""
    fill(running.client, running.relay.to_server)
    return running


STATES = [server_takes_nothing, nobody_takes_anything, server_has_ended_and_takes_nothing]


def fill(sock, way):
    """Send until this way takes nothing more."""
    sock.settimeout(QUIET_S)
    flood(sock)
    while not way.waiting:               # the relay was only slow
        flood(sock)


def sees_an_end(sock):
    """Read everything that comes; True when the peer says that this was all."""
    sock.settimeout(QUIET_S)
    try:
        while sock.recv(1 << 20):
            pass
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize("state", STATES)
def test_a_peer_that_takes_nothing_is_told_of_no_end(relay, state):
    # given a relay that waits for peers which take nothing
    running = state(relay)
    # when it is stopped, and a peer reads everything before it is reset
    running.relay.stop()
    assert running.result() is End.STOPPED
    # then that does not look like a whole transfer
    assert not running.relay.said_all_to(running.near[1])
    assert not sees_an_end(running.server)


def test_the_rest_after_an_end_is_not_sent_when_the_relay_is_stopped(relay):
    # given a client that has ended, and a server that has not taken all of it yet
    running = server_takes_nothing(relay)
    running.client.close()
    # when the relay is stopped, then it ends, and the server is told of no end
    running.relay.stop()
    assert running.result() is End.STOPPED
    assert not sees_an_end(running.server)


@pytest.mark.parametrize("state", STATES)
def test_the_descriptor_of_the_alarm_does_not_stay(relay, state, monkeypatch):
    made = eventfds(monkeypatch)
    running = state(relay)
    running.relay.stop()
    running.result()
    assert len(made) == (state is not server_takes_nothing)
    for descriptor in made:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_a_stop_that_comes_before_the_alarm_is_heard(relay, monkeypatch):
    # given a relay that nothing can wake but its alarm, and a stop that is quicker than this
    running = relay()
    real = running.relay._hear_stop

    def late(poll):
        running.relay.stop()
        for way in (running.relay.to_server, running.relay.to_client):
            poll.unregister(way.source.fileno())
        real(poll)

    monkeypatch.setattr(running.relay, "_hear_stop", late)
    for sock in (running.client, running.server):
        sock.settimeout(QUIET_S)
        flood(sock)
    # then it ends, and neither a second stop nor one that comes too late is an error
    assert running.result() is End.STOPPED
    running.relay.stop()


@pytest.mark.parametrize("state", STATES)
def test_a_host_without_descriptors_does_not_keep_a_relay_from_being_stopped(relay, state, monkeypatch):
    monkeypatch.setattr(os, "eventfd", no_descriptors)
    running = state(relay)
    running.relay.stop()
    assert running.result() is End.STOPPED


def no_descriptors(*arguments):
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def eventfds(monkeypatch):
    """Return the list of those that will be made."""
    real, made = os.eventfd, []

    def counted(*arguments):
        made.append(real(*arguments))
        return made[-1]

    monkeypatch.setattr(os, "eventfd", counted)
    return made
