"""When the mark of a fast sender is raised and lowered, without a network."""

from __future__ import annotations

import math
import socket

import pytest

from test.support.ends import tcp_pair
from Zorp.transport.moderation import FAST, MARK_BYTES, PATIENCE_S, PAYS, PROOF_BYTES, Moderation

QUICK_S = PROOF_BYTES / FAST / 2         # for PROOF_BYTES
SLOW_S = PROOF_BYTES / FAST * 2


class Socket:
    """Notes the marks it is given."""

    def __init__(self, problem=None):
        self.marks = []
        self._problem = problem

    def setsockopt(self, level, option, value):
        assert (level, option) == (socket.SOL_SOCKET, socket.SO_RCVLOWAT)
        if self._problem is not None:
            raise self._problem
        self.marks.append(value)


class Direction:
    """A direction that carries `chunk` after `chunk` and takes `seconds` for each."""

    def __init__(self, sock=None):
        self.now_s = 100.0
        self.sock = sock or Socket()
        self.moderation = Moderation(self.sock, lambda: self.now_s)
        self._total = 0

    def carry(self, chunk, seconds, times=1):
        for _ in range(times):
            self.now_s += seconds
            self._total += chunk
            self.moderation.carried(self._total)


def test_a_fast_direction_gets_a_mark():
    direction = Direction()
    direction.carry(PROOF_BYTES // 8, QUICK_S / 8, times=7)
    assert direction.sock.marks == []
    assert direction.moderation.due_s == math.inf
    direction.carry(PROOF_BYTES // 8, QUICK_S / 8)
    assert direction.sock.marks == [MARK_BYTES]
    assert direction.moderation.due_s == direction.now_s + PATIENCE_S


def test_a_slow_direction_never_gets_one():
    direction = Direction()
    direction.carry(PROOF_BYTES // 8, SLOW_S / 8, times=1000)
    assert direction.sock.marks == []


def test_a_direction_that_becomes_fast_gets_one():
    direction = Direction()
    direction.carry(PROOF_BYTES // 8, SLOW_S / 8, times=100)
    direction.carry(PROOF_BYTES // 8, QUICK_S / 8, times=16)
    assert direction.sock.marks == [MARK_BYTES]


def test_every_arrival_is_patience_anew():
    direction = Direction()
    direction.carry(PROOF_BYTES, QUICK_S)
    direction.carry(MARK_BYTES, PATIENCE_S / 2, times=10)
    assert direction.moderation.due_s == direction.now_s + PATIENCE_S
    assert direction.sock.marks == [MARK_BYTES]


def test_lowered_it_must_prove_itself_with_twice_as_much():
    direction = Direction()
    for doublings in range(5):
        # given a mark that was raised after this proof, and no sooner
        direction.carry(PROOF_BYTES, QUICK_S, times=2 ** doublings - 1)
        assert direction.moderation.due_s == math.inf
        direction.carry(PROOF_BYTES, QUICK_S)
        assert direction.moderation.due_s < math.inf
        # when it is lowered at once
        direction.moderation.lower()
        assert direction.moderation.due_s == math.inf
    assert direction.sock.marks == [MARK_BYTES, 1] * 5


def test_a_mark_that_paid_leaves_the_proof_short():
    direction = Direction()
    # given a direction whose proof has become longer
    direction.carry(PROOF_BYTES, QUICK_S)
    direction.moderation.lower()
    direction.carry(PROOF_BYTES, QUICK_S, times=2)
    # when the mark carries a lot before it is lowered
    direction.carry(2 * PROOF_BYTES, PATIENCE_S / 2, times=PAYS)
    direction.moderation.lower()
    # then the first proof will do again
    direction.carry(PROOF_BYTES, QUICK_S)
    assert direction.sock.marks == [MARK_BYTES, 1] * 2 + [MARK_BYTES]


def test_bursts_of_any_size_wait_seldom():
    """Of what a sender sends in bursts, waiting at the end of each, at most one in a few dozen MiB waits in vain."""
    for burst in (PROOF_BYTES, 3 * PROOF_BYTES, 10 * PROOF_BYTES, 50 * PROOF_BYTES):
        direction = Direction()
        for _ in range(200):
            direction.carry(PROOF_BYTES // 4, QUICK_S / 4, times=4 * burst // PROOF_BYTES)
            direction.now_s += 0.1
            direction.moderation.lower()
        waits = direction.sock.marks.count(1)
        assert waits <= 10 or 200 * burst / waits >= PAYS * PROOF_BYTES, burst


def test_lowering_what_is_not_raised_does_nothing():
    direction = Direction()
    direction.moderation.lower()
    direction.carry(PROOF_BYTES, QUICK_S)
    assert direction.sock.marks == [MARK_BYTES]


def test_a_socket_without_a_mark_is_asked_once():
    direction = Direction(Socket(OSError(92, "Protocol not available")))
    direction.carry(PROOF_BYTES, QUICK_S)
    direction.sock._problem = None
    direction.carry(PROOF_BYTES, QUICK_S, times=100)
    direction.moderation.lower()
    assert direction.sock.marks == []


def test_a_closed_socket_is_no_matter():
    with socket.socket() as sock:
        direction = Direction(sock)
        direction.carry(PROOF_BYTES, QUICK_S)
    direction.moderation.lower()
    assert direction.moderation.due_s == math.inf


@pytest.mark.parametrize("buffer_bytes", [4096, 65536, 1 << 20])
def test_the_kernel_keeps_a_mark_below_what_the_buffer_holds(buffer_bytes):
    """What a relay relies on: a mark above what the peer may send would be reached never."""
    far, near = tcp_pair()
    with far, near:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, MARK_BYTES)
        mark = near.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT)
        assert mark <= near.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2
