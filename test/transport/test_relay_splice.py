"""The relay once bytes move inside the kernel: nothing lost, nothing invented, no circles, pipes go back."""

from __future__ import annotations

import errno
import os
import random
import socket
import threading
import time

import pytest

from test.support.ends import reset, tcp_pair
from test.support.relays import PATIENCE_S, Running, received
from Zorp.transport import pipes as pipes_module
from Zorp.transport import relay as relay_module
from Zorp.transport.pipes import PipePool
from Zorp.transport.relay import End, RelaySettings

DATA = random.Random(1).randbytes(6_000_000)


def fill(sock):
    """Send until the other end takes no more; return the number of bytes."""
    sock.setblocking(False)
    sent = 0
    deadline_s = time.monotonic() + PATIENCE_S
    quiet_since_s = time.monotonic()
    while time.monotonic() - quiet_since_s < 0.3:
        assert time.monotonic() < deadline_s
        try:
            sent += sock.send(DATA[sent % 1000:sent % 1000 + 65536])
            quiet_since_s = time.monotonic()
        except BlockingIOError:
            time.sleep(0.01)
    sock.settimeout(PATIENCE_S)
    return sent


@pytest.fixture
def pool(monkeypatch):
    """A pool of its own for each test."""
    own = PipePool(most=4)
    monkeypatch.setattr(relay_module, "pipes", own)
    return own


@pytest.fixture(params=[tcp_pair, socket.socketpair], ids=["tcp", "local"])
def relay(request, pool):
    started = []

    def start(**settings):
        started.append(Running(RelaySettings(**settings), request.param))
        return started[-1]

    yield start
    for running in started:
        running.close()


def open_pipes(pool):
    return pool._open - len(pool._idle)


def test_every_byte_arrives_both_ways(relay, pool):
    # given a relay whose peers both send a lot at the same time
    running = relay(half_close=True)
    senders = [threading.Thread(target=send_and_finish, args=(end, data))
               for end, data in ((running.client, DATA), (running.server, DATA[::-1]))]
    from_client = []
    reader = threading.Thread(target=lambda: from_client.append(received(running.server, len(DATA) + 1)))
    for thread in (*senders, reader):
        thread.start()
    # when both have sent everything
    from_server = received(running.client, len(DATA) + 1)
    reader.join(PATIENCE_S)
    # then each got exactly that, the counts agree, and no pipe is missing
    assert from_client == [DATA]
    assert from_server == DATA[::-1]
    assert running.result() is End.FINISHED
    assert (running.relay.to_server.bytes, running.relay.to_client.bytes) == (len(DATA), len(DATA))
    assert [(near.bytes_recvd, near.bytes_sent) for near in running.near] == [(len(DATA), len(DATA))] * 2
    assert running.relay.to_server.is_long
    assert open_pipes(pool) == 0


def send_and_finish(sock, data):
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def test_sockets_are_blocking_again_afterwards(relay):
    running = relay()
    running.make_long()
    assert not os.get_blocking(running.near[0].fileno())
    running.client.close()
    running.result()
    assert all(os.get_blocking(near.fileno()) for near in running.near)


def test_bytes_in_the_pipe_wait_for_the_sink_without_turning_in_circles(relay):
    # given a long relay whose server reads nothing, while the client has more to send
    running = relay()
    running.make_long()
    sent = fill(running.client)
    # when time passes
    clock = time.pthread_getcpuclockid(running.thread.ident)
    cpu_s = time.clock_gettime(clock)
    time.sleep(0.5)
    # then it does not work, and what was read and not sent is one pipe at most
    assert time.clock_gettime(clock) - cpu_s < 0.2
    to_server = running.relay.to_server
    assert to_server.waiting
    assert to_server.bytes - running.near[1].bytes_sent <= pipes_module.PIPE_BYTES
    # and the other way is not held up
    running.server.sendall(b"answer")
    assert received(running.client, 6) == b"answer"
    # and everything arrives once the server reads
    assert len(received(running.server, sent)) == sent


def test_sixteen_small_segments_do_not_stop_the_relay(relay):
    # given a long relay
    running = relay()
    running.make_long()
    # when many small pieces come, more than a pipe has slots for
    pieces = [b"%04d" % number for number in range(2000)]
    sender = threading.Thread(target=lambda: [running.client.sendall(piece) for piece in pieces])
    sender.start()
    # then all of them arrive
    assert received(running.server, 8000) == b"".join(pieces)


def test_idle_time_ends_a_long_relay(relay):
    running = relay(idle_ms=300)
    running.make_long()
    assert running.result() is End.TIMED_OUT


def test_a_sink_that_takes_nothing_is_given_up_and_its_pipe_closed(relay, pool, monkeypatch):
    # given a long relay with bytes in a pipe, whose source then closes
    monkeypatch.setattr(relay_module, "DRAIN_MS", 200)
    running = relay()
    running.make_long()
    fill(running.client)
    assert open_pipes(pool) == 1
    # when the server closes its side and the client's bytes have nowhere to go
    running.server.shutdown(socket.SHUT_WR)
    # then the relay ends, and the pipe is closed: nobody else ever sees what is in it
    assert running.result() is End.CUT
    assert open_pipes(pool) == 0
    assert pool._idle == []


def test_abort_of_a_long_relay(relay, pool):
    running = relay()
    running.make_long()
    fill(running.client)
    for near in running.near:
        near.abort()
    assert running.result() is End.STOPPED
    assert open_pipes(pool) == 0


def test_a_peer_that_resets_is_told_apart(pool):
    # given a long relay
    running = Running(RelaySettings(), tcp_pair)
    running.make_long()
    # when the client resets its connection
    reset(running.client)
    # then it is the client that failed
    assert running.result() is End.CLIENT_FAILED
    assert open_pipes(pool) == 0
    running.close()


def test_without_a_pipe_the_relay_copies(relay, pool):
    # given a pool that has nothing left
    for _ in range(4):
        assert pool.take() is not None
    # when a lot is sent
    running = relay(half_close=True)
    sender = threading.Thread(target=send_and_finish, args=(running.client, DATA))
    sender.start()
    # then it arrives all the same
    assert received(running.server, len(DATA) + 1) == DATA
    assert open_pipes(pool) == 4


@pytest.mark.parametrize("failing_side", ["source", "sink"])
def test_what_cannot_be_spliced_is_copied(relay, pool, monkeypatch, failing_side):
    # given a socket on one side that splice() refuses
    running = relay(half_close=True)
    real, refused = os.splice, []

    def splice(source, target, count, flags):
        if (target if failing_side == "sink" else source) in (running.near[0].fileno(), running.near[1].fileno()):
            refused.append(count)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(source, target, count, flags=flags)

    monkeypatch.setattr(relay_module.os, "splice", splice)
    # when a lot is sent
    sender = threading.Thread(target=send_and_finish, args=(running.client, DATA))
    sender.start()
    # then it arrives, after one attempt
    assert received(running.server, len(DATA) + 1) == DATA
    assert len(refused) == 1
    assert running.near[1].bytes_sent == len(DATA)
    assert open_pipes(pool) == 0


def test_an_urgent_byte_is_left_out_and_ends_nothing(pool):
    """splice() stops before an urgent byte as if the file had ended there."""
    running = Running(RelaySettings(half_close=True), tcp_pair)
    try:
        for _ in range(3):
            running.make_long()
            assert running.client.send(b"abc!", socket.MSG_OOB) == 4
            running.client.sendall(DATA[:100_000])
            assert received(running.server, 100_003) == b"abc" + DATA[:100_000]
        running.client.shutdown(socket.SHUT_WR)
        assert running.server.recv(1) == b""
        running.server.sendall(b"answer")
        assert running.client.recv(100) == b"answer"
        running.server.close()
        assert running.result() is End.FINISHED
        assert running.cpu_s < 1
    finally:
        running.close()
