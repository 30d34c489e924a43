"""A relay whose source has a raised mark: nothing waits for long, nothing is missed, nothing turns in circles."""

from __future__ import annotations

import random
import select
import socket
import threading
import time

import pytest

from test.support.daemon import wait_until
from test.support.ends import reset, tcp_pair
from test.support.relays import Running, received
from Zorp.transport import moderation as moderation_module
from Zorp.transport import relay as relay_module
from Zorp.transport.moderation import MARK_BYTES, Moderation
from Zorp.transport.relay import End, RelaySettings

LONG_S = 1000.0                          # patience that no test has: whatever arrives was told of by the kernel
SHORT_S = 0.05
DATA = random.Random(3).randbytes(1 << 20)
FEW = DATA[:1000]                        # far below the mark


class NotedModeration(Moderation):
    """Keeps all marks that were set, of all directions."""

    marks: list[int] = []

    def _set_mark(self, count):
        self.marks.append(count)
        return super()._set_mark(count)


class CountedPoll:
    """As select.poll(), and counts."""

    polls = 0
    real = select.poll

    def __init__(self):
        self._poll = self.real()
        self.register, self.unregister = self._poll.register, self._poll.unregister

    def poll(self, *wait_ms):
        type(self).polls += 1
        return self._poll.poll(*wait_ms)


@pytest.fixture
def marks(monkeypatch):
    """The marks that were set; the proof is short, and any speed is fast."""
    monkeypatch.setattr(NotedModeration, "marks", [])
    monkeypatch.setattr(relay_module, "Moderation", NotedModeration)
    monkeypatch.setattr(moderation_module, "PROOF_BYTES", len(DATA))
    monkeypatch.setattr(moderation_module, "FAST", 0.0)
    return NotedModeration.marks


@pytest.fixture
def patience(monkeypatch):
    """Return a function that sets for how long bytes may stay below the mark."""
    return lambda seconds: monkeypatch.setattr(moderation_module, "PATIENCE_S", seconds)


@pytest.fixture
def moderated(marks):
    """Return a function that starts a relay with a raised mark towards the server."""
    started = []

    def start(pair=tcp_pair, **settings):
        running = Running(RelaySettings(**settings), pair)
        started.append(running)
        running.carry(DATA)              # as much as the proof is
        wait_until(lambda: MARK_BYTES in marks, "the mark is raised")
        return running

    yield start
    for running in started:
        running.close()


def mark_of(stream):
    return stream.sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT)


# what wakes the relay at once

def test_end_of_file_wakes_with_bytes_below_the_mark(moderated, patience, marks):
    patience(LONG_S)
    running = moderated(half_close=True)
    assert mark_of(running.near[0]) > 1
    running.client.sendall(FEW)
    running.client.shutdown(socket.SHUT_WR)
    assert received(running.server, len(FEW) + 1) == FEW
    # and the other half of the connection goes on
    running.server.sendall(b"answer")
    assert received(running.client, 6) == b"answer"
    running.server.close()
    assert running.result() is End.FINISHED
    assert marks == [MARK_BYTES, 1]


def test_reset_wakes_with_bytes_below_the_mark(moderated, patience):
    patience(LONG_S)
    running = moderated()
    running.client.sendall(FEW)
    reset(running.client)
    assert running.result() is End.CLIENT_FAILED


def test_a_sink_that_is_reset_wakes(moderated, patience):
    patience(LONG_S)
    running = moderated()
    running.client.sendall(FEW)
    reset(running.server)
    assert running.result() is End.SERVER_FAILED


def test_stop_wakes_with_bytes_below_the_mark(moderated, patience):
    patience(LONG_S)
    running = moderated()
    running.client.sendall(FEW)
    running.relay.stop()
    assert running.result() is End.STOPPED


def test_a_receive_buffer_below_the_mark_stalls_nothing(moderated, patience):
    # given a connection whose buffer never holds as much as the mark says
    def small_pair():
        far, near = tcp_pair()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        return far, near

    patience(LONG_S)
    running = moderated(small_pair, half_close=True)
    # when more than that comes
    sender = threading.Thread(target=lambda: (running.client.sendall(DATA), running.client.shutdown(socket.SHUT_WR)))
    sender.start()
    # then all of it is moved
    assert received(running.server, len(DATA) + 1) == DATA
    sender.join()


# what does not

def test_the_last_bytes_of_a_burst_arrive_without_a_close(moderated, patience, marks):
    patience(SHORT_S)
    running = moderated(idle_ms=60_000)
    began_s = time.monotonic()
    running.client.sendall(FEW)
    assert received(running.server, len(FEW)) == FEW
    assert time.monotonic() - began_s < 10
    assert marks == [MARK_BYTES, 1]
    assert running.end is None


def test_an_urgent_byte_below_the_mark_holds_up_nothing(moderated, patience):
    patience(SHORT_S)
    running = moderated()
    assert running.client.send(b"abc!", socket.MSG_OOB) == 4
    running.client.sendall(FEW)
    assert received(running.server, 3 + len(FEW)) == b"abc" + FEW


def test_the_other_direction_does_not_keep_bytes_below_the_mark(moderated, patience):
    # given a server that never stops talking
    patience(SHORT_S)
    running = moderated()
    arrived = threading.Event()

    def talk():
        while not arrived.is_set():
            running.server.sendall(b".")
            assert running.client.recv(1) == b"."

    talker = threading.Thread(target=talk)
    talker.start()
    # when bytes stay below the mark of the other way
    running.client.sendall(FEW)
    try:
        assert received(running.server, len(FEW)) == FEW
    finally:
        arrived.set()
        talker.join()


def test_bytes_come_one_by_one_after_the_mark_without_circles(moderated, patience, monkeypatch):
    patience(SHORT_S)
    monkeypatch.setattr(select, "poll", CountedPoll)
    running = moderated()
    # given a mark that was lowered
    running.carry(FEW)
    CountedPoll.polls = 0
    # when bytes trickle
    for _ in range(50):
        running.carry(b"x")
    # then each costs one poll()
    assert CountedPoll.polls <= 60


def test_silence_after_the_mark_costs_nothing(moderated, patience, monkeypatch, marks):
    patience(SHORT_S)
    monkeypatch.setattr(select, "poll", CountedPoll)
    running = moderated(idle_ms=500)
    CountedPoll.polls = 0
    assert running.result() is End.TIMED_OUT
    assert CountedPoll.polls <= 10
    assert marks == [MARK_BYTES, 1]


def test_a_sink_that_takes_nothing_wears_out_no_patience(moderated, patience, marks, monkeypatch):
    # given a moderated relay whose server does not read, so that it sleeps sooner or later
    patience(LONG_S)
    monkeypatch.setattr(select, "poll", CountedPoll)
    running = moderated(half_close=True)
    whole = DATA * 40
    sender = threading.Thread(target=lambda: (running.client.sendall(whole), running.client.shutdown(socket.SHUT_WR)))
    sender.start()
    before = -1
    while CountedPoll.polls != before or not running.relay.to_server.waiting:
        before = CountedPoll.polls
        time.sleep(0.4)
    # when that takes longer than bytes may stay below the mark, and something else wakes the relay
    running.relay.to_server.moderation.due_s = 0.0
    running.server.sendall(b"still here")
    assert received(running.client, 10) == b"still here"
    running.server.sendall(b"and now")
    assert received(running.client, 7) == b"and now"
    # then the mark stays
    assert marks == [MARK_BYTES]
    # and everything arrives
    assert received(running.server, len(whole) + 1) == whole
    sender.join()


# how it goes on

def test_as_long_as_bytes_come_the_mark_stays(moderated, patience, marks):
    patience(LONG_S)
    running = moderated()
    due_s = running.relay.to_server.moderation.due_s
    running.client.sendall(DATA * 2)
    wait_until(lambda: running.relay.to_server.moderation.due_s > due_s, "patience anew")
    assert marks == [MARK_BYTES]


def test_a_slow_sender_is_moderated_ever_seldomer(moderated, patience, marks):
    # given a sender of bursts too short for a mark, who waits after each until it has arrived
    patience(0.005)
    running = moderated()
    for _ in range(300):
        running.carry(DATA[:300_000])
    # then few of them had to wait for a mark
    assert marks.count(MARK_BYTES) <= 8


def test_every_byte_arrives_whatever_the_pauses(moderated, patience, marks):
    patience(0.001)
    running = moderated(half_close=True)
    chance = random.Random(4)
    pieces = [DATA[:chance.choice((1, 1000, 100_000, MARK_BYTES, len(DATA)))] for _ in range(100)]

    def send():
        for piece in pieces:
            running.client.sendall(piece)
            time.sleep(chance.choice((0, 0, 0, 0.001, 0.003)))
        running.client.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    whole = b"".join(pieces)
    assert received(running.server, len(whole) + 1) == whole
    sender.join()


def test_both_directions_are_moderated_at_once(moderated, patience, marks):
    patience(LONG_S)
    running = moderated(half_close=True)
    ends = ((running.client, DATA * 8), (running.server, DATA[::-1] * 8))
    senders = [threading.Thread(target=lambda end=end, data=data: (end.sendall(data), end.shutdown(socket.SHUT_WR)))
               for end, data in ends]
    from_client = []
    reader = threading.Thread(target=lambda: from_client.append(received(running.server, 9 * len(DATA))))
    for thread in (*senders, reader):
        thread.start()
    assert received(running.client, 9 * len(DATA)) == DATA[::-1] * 8
    reader.join()
    assert from_client == [DATA * 8]
    assert running.result() is End.FINISHED
    assert marks == [MARK_BYTES, MARK_BYTES, 1, 1]


# what is left behind

def test_the_mark_is_gone_when_the_relay_is(moderated, patience):
    patience(LONG_S)
    running = moderated()
    assert mark_of(running.near[0]) > 1
    running.server.close()
    assert running.result() is End.FINISHED
    assert [mark_of(near) for near in running.near] == [1, 1]


def test_local_sockets_move_as_ever(moderated, patience):
    patience(SHORT_S)
    running = moderated(socket.socketpair)
    running.carry(FEW)
    running.carry(DATA)


def test_patience_does_not_count_as_traffic(moderated, patience, marks):
    patience(SHORT_S)
    running = moderated(idle_ms=1000)
    began_s = time.monotonic()
    assert running.result() is End.TIMED_OUT
    assert running.relay.elapsed_s >= 1
    assert time.monotonic() - began_s < 10
    assert marks == [MARK_BYTES, 1]


def test_idle_time_below_the_patience(moderated, patience):
    patience(LONG_S)
    running = moderated(idle_ms=300)
    assert running.result() is End.TIMED_OUT
