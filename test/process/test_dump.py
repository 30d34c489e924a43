"""Sockets that write into the log what passes."""

import socket

import pytest

from Zorp import Log
from Zorp.process import dump
from Zorp.Stream import Stream


@pytest.fixture
def lines():
    """The texts of core.dump at a verbosity that the test sets; everything is put back afterwards."""
    before, found = Log.current_filter(), []
    Log.configure(sink=lambda tag, level, session, text: found.append(text) if tag == dump.CORE_DUMP else None)
    yield found
    Log.configure()
    Log.set_filter(before)


@pytest.mark.parametrize(("number", "texts"), [
    (6, 0), (7, 2), (9, 6)])
def test_what_is_written_at_which_level(lines, number, texts):
    Log.set_filter(Log.Filter(number, ""))
    ours, theirs = socket.socketpair()
    stream = Stream(ours, "x")
    with theirs:
        theirs.sendall(b"0123456789abcdef\x00\xff")
        assert stream.recv() == b"0123456789abcdef\x00\xff"
        stream.send(b"QUIT" * 5)
        assert theirs.recv(100) == b"QUIT" * 5
    stream.close()
    assert len(lines) == texts
    if number == 9:
        assert lines[1:3] == [
            "data line 0x0000: 30 31 32 33 34 35 36 37 38 39 61 62 63 64 65 66  0123456789abcdef",
            "data line 0x0010: 00 FF                                            .."]


def test_a_socket_of_a_kind_of_its_own_is_left_alone():
    class Special(socket.socket):
        pass

    with Special() as sock:
        assert dump.watched(sock) is sock
