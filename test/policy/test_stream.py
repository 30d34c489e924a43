"""Streams as policies see them: addressing-helpers.md 6."""

from __future__ import annotations

import contextlib
import os
import socket
import threading

import pytest

from test.support.ends import reset, tcp_pair
from test.support.logged import captured_log
from Zorp.Stream import (
    G_IO_STATUS_AGAIN,
    G_IO_STATUS_EOF,
    G_IO_STATUS_ERROR,
    G_IO_STATUS_NORMAL,
    Stream,
    StreamException,
    streamPair,
)


@pytest.fixture
def pair():
    """Two streams that are joined."""
    with captured_log():
        near, far = streamPair(socket.AF_UNIX, socket.SOCK_STREAM)
        yield near, far
        near.close()
        far.close()


@contextlib.contextmanager
def connected():
    """A Stream on one side of a TCP connection, and the socket of the other."""
    far, near = tcp_pair()
    with captured_log(), far:
        far.settimeout(10)
        stream = Stream(near, "name")
        yield stream, far
        stream.close()


def status_of(call, *arguments):
    """Return the arguments of the exception that a call raises."""
    with pytest.raises(StreamException) as raised:
        call(*arguments)
    return raised.value.args


def test_status_numbers():
    assert (G_IO_STATUS_ERROR, G_IO_STATUS_NORMAL, G_IO_STATUS_EOF, G_IO_STATUS_AGAIN) == (0, 1, 2, 3)
    assert issubclass(StreamException, Exception)


def test_pair_is_joined_and_named(pair):
    near, far = pair
    assert (near.name, far.name) == ("streamPair/A", "streamPair/B")
    near.write("caf\xe9")
    assert far.read(100) == "caf\xe9"
    far.write(b"\xff")
    assert near.read(100) == "\xff"
    assert (near.bytes_sent, near.bytes_recvd, far.bytes_sent, far.bytes_recvd) == (4, 1, 1, 4)


def test_pair_that_cannot_be_made():
    with pytest.raises(OSError, match=r"^I/O error during socketpair\.$"):
        streamPair(socket.AF_INET, socket.SOCK_STREAM)


def test_descriptor_of_a_policy_s_own_is_taken_over():
    ours, theirs = socket.socketpair()
    with captured_log(), theirs:
        stream = Stream(ours.detach(), "mine")
        fd = stream.fd
        stream.write("x")
        assert theirs.recv(10) == b"x"
        assert int(stream) == fd
        stream.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
        # a second call does nothing
        stream.close()
        assert stream.fd == -1


def test_name(pair):
    near, _ = pair
    ours, _theirs = socket.socketpair()
    assert Stream(ours, "x" * 200).name == "x" * 127
    near.name = "x" * 200
    assert near.name == repr(near) == "x" * 127
    for wrong in (5, None, b"x"):
        with pytest.raises(TypeError, match=r"^Stream name is not a string$"):
            near.name = wrong


def test_unknown_attributes(pair):
    near, _ = pair
    with pytest.raises(AttributeError):
        near.nosuch  # noqa: B018
    with pytest.raises(AttributeError):
        near.nosuch = 1


def test_counters_and_descriptor_are_read_only(pair):
    near, _ = pair
    with pytest.raises(AttributeError):
        near.fd = 5


def test_keepalive_is_that_of_the_socket():
    with connected() as (stream, _):
        assert stream.keepalive == 0
        stream.keepalive = 3
        assert stream.keepalive == 1
        assert stream.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1


def test_read_gives_what_there_is_up_to_the_count(pair):
    near, far = pair
    far.write("abcdef")
    assert near.read(4) == "abcd"
    assert near.read(100) == "ef"


def test_read_waits_up_to_the_stream_s_timeout(pair):
    near, far = pair
    threading.Timer(0.05, far.write, ("late",)).start()
    assert near.read(100) == "late"
    near.timeout_ms = 20
    assert status_of(near.read, 1) == (G_IO_STATUS_ERROR, None)


def test_nonblocking_read_does_not_wait(pair):
    near, far = pair
    assert near.nonblocking == 0
    near.nonblocking = 1
    assert near.nonblocking == 1
    assert status_of(near.read, 1) == (G_IO_STATUS_AGAIN, None)
    far.write("x")
    assert near.read(1) == "x"


def test_end_of_file(pair):
    near, far = pair
    far.write("last")
    far.close()
    assert near.read(100) == "last"
    assert status_of(near.read, 1) == (G_IO_STATUS_EOF, None)


def test_reset_is_an_error():
    with connected() as (stream, far):
        reset(far)
        assert status_of(stream.read, 1) == (G_IO_STATUS_ERROR, None)


@pytest.mark.parametrize("end", ["reset", "break_off"])
def test_pair_passes_a_reset_on(pair, end):
    """Local sockets carry none."""
    near, far = pair
    far.write("last")
    getattr(far, end)()
    far.close()
    assert near.read(100) == "last"
    assert status_of(near.read, 1) == (G_IO_STATUS_ERROR, None)


def test_end_that_nobody_holds_is_closed():
    with captured_log():
        near, far = streamPair(socket.AF_UNIX, socket.SOCK_STREAM)
        del far
        assert status_of(near.read, 1) == (G_IO_STATUS_EOF, None)
        near.reset()                                # there is nobody to be told


def test_write_that_fails(pair):
    near, far = pair
    far.close()
    with pytest.raises(OSError, match=r"^I/O error writing stream\.$"):
        near.write("x")


def test_what_is_no_byte_is_not_written(pair):
    near, far = pair
    with pytest.raises(UnicodeEncodeError):
        near.write("\u20ac")
    near.write("x")
    assert far.read(100) == "x"


def test_readline_needs_a_line_reader(pair):
    near, far = pair
    far.write("a\n")
    assert status_of(near.readline) == (G_IO_STATUS_ERROR, None)
    assert near.read(100) == "a\n"


def test_lines_and_blocks_may_be_mixed(pair):
    near, far = pair
    near.push_lines(4096)
    far.write("one\r\ntwo\nrest")
    assert near.readline() == "one"
    assert near.read(4) == "two\n"
    assert near.read(100) == "rest"


def test_pending_text_is_the_last_line(pair):
    near, far = pair
    near.push_lines(4096)
    far.write("one\nunfinished")
    far.close()
    assert [near.readline(), near.readline()] == ["one", "unfinished"]
    assert status_of(near.readline) == (G_IO_STATUS_EOF, None)


def test_after_a_line_that_is_too_long_all_reading_of_lines_fails(pair):
    near, far = pair
    near.push_lines(10)
    far.write("x" * 20 + "\nshort\n")
    for _ in range(3):
        assert status_of(near.readline) == (G_IO_STATUS_ERROR, None)


def test_line_that_comes_in_parts_is_not_lost_by_a_reader_that_does_not_wait(pair):
    near, far = pair
    near.push_lines(4096)
    near.nonblocking = 1
    far.write("par")
    assert status_of(near.readline) == (G_IO_STATUS_AGAIN, None)
    far.write("ts\n")
    assert near.readline() == "parts"


def test_closing_accounts():
    with captured_log() as log:
        near, far = streamPair(socket.AF_UNIX, socket.SOCK_STREAM)
        near.name = "svc/x:0/plug/client"
        near.write("12345")
        near.shutdown(socket.SHUT_WR)
        near.close()
        far.close()
    line, _ = log.find("accounting info; type='ZStreamFD', duration='0', ")
    assert (line.tag, line.level, line.session) == ("core.accounting", 4, "svc/x:0/plug/client")
    assert line.text.endswith("sent='5', received='0'")
    assert log.find("Shutdown channel; fd='")[0].text.endswith("mode='1'")
