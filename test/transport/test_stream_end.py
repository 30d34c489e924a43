"""How a connection ends: nothing that was sent is lost, and nobody waits for a reader who has gone."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from Zorp.transport import stream as streams
from Zorp.transport.stream import SocketStream

PATIENCE_S = 10.0
LAST_WORDS = b"221 closing"


@pytest.fixture
def pair():
    """The peer's socket and our stream, over TCP."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = socket.create_connection(listener.getsockname())
        stream = SocketStream(listener.accept()[0])
    peer.settimeout(PATIENCE_S)
    yield peer, stream
    peer.close()
    stream.close()


def end(stream):
    """End as a proxy does; return how long it took and whether it was in order."""
    began_s = time.monotonic()
    in_order = stream.end_reading()
    if in_order:
        stream.close()
    else:
        stream.reset()
    return time.monotonic() - began_s, in_order


def fill(sock):
    """Send until the other side has no more room."""
    sock.setblocking(False)
    try:
        while True:
            sock.send(bytes(1 << 16))
    except BlockingIOError:
        pass
    sock.settimeout(PATIENCE_S)


def test_a_silent_peer_costs_no_time_and_sees_the_end(pair):
    peer, stream = pair
    stream.send(LAST_WORDS)
    spent_s, in_order = end(stream)
    assert in_order
    assert spent_s < streams.DISCARD_MS / 1000
    assert peer.recv(100) == LAST_WORDS
    assert peer.recv(100) == b""


def test_bytes_that_nobody_read_do_not_destroy_our_last_words(pair):
    peer, stream = pair
    peer.sendall(b"x" * 1000)
    peer.shutdown(socket.SHUT_WR)
    stream.send(LAST_WORDS)
    assert end(stream)[1]
    assert peer.recv(100) == LAST_WORDS
    assert peer.recv(100) == b""


@pytest.mark.parametrize("aborted", [False, True])
def test_a_peer_that_was_stopped_by_a_full_window_learns_of_the_end_at_once(pair, aborted):
    # given a peer that is blocked in sending
    peer, stream = pair
    fill(peer)
    outcome = []

    def send():
        try:
            while True:
                peer.sendall(bytes(1 << 16))
        except OSError as problem:
            outcome.append(problem)

    sender = threading.Thread(target=send)
    sender.start()
    # when we leave
    if aborted:
        stream.abort()
    spent_s, _ = end(stream)
    # then it is told so, and we have not waited for it longer than agreed
    sender.join(3)
    assert not sender.is_alive()
    assert isinstance(outcome[0], (ConnectionResetError, BrokenPipeError))
    assert spent_s < 5                           # agreed is half a second, a full window costs a minute


def test_who_sends_without_end_is_cut_off(pair, monkeypatch):
    monkeypatch.setattr(streams, "DISCARD_MS", 100)
    peer, stream = pair
    peer.sendall(b"begin")
    gone = threading.Event()

    def trickle():
        try:
            while True:
                peer.sendall(b"x")
                time.sleep(0.01)                 # a peer that is never done
        except OSError:
            gone.set()

    sender = threading.Thread(target=trickle)
    sender.start()
    spent_s, in_order = end(stream)
    assert in_order
    assert spent_s < 5
    assert gone.wait(PATIENCE_S)
    sender.join(PATIENCE_S)


def test_after_the_peer_s_end_nothing_more_is_asked_of_the_kernel(pair, monkeypatch):
    peer, stream = pair
    peer.shutdown(socket.SHUT_WR)
    assert stream.recv() == b""
    monkeypatch.setattr(SocketStream, "_discard_once", lambda self: pytest.fail("there is nothing to read"))
    assert end(stream)[1]
    assert peer.recv(100) == b""


def test_an_aborted_connection_whose_peer_has_left_is_closed_in_order(pair):
    peer, stream = pair
    peer.shutdown(socket.SHUT_WR)
    stream.abort()
    assert end(stream)[1]
    assert peer.recv(100) == b""


def test_an_idle_peer_of_an_aborted_connection_sees_its_end(pair):
    peer, stream = pair
    stream.send(LAST_WORDS)
    assert peer.recv(100) == LAST_WORDS
    stream.abort()
    end(stream)
    assert peer.recv(100) == b""


def test_local_sockets_and_closed_ones(pair):
    ours, theirs = socket.socketpair()
    stream = SocketStream(ours)
    theirs.sendall(b"x")
    theirs.close()
    assert end(stream)[1]
    assert stream.end_reading()
