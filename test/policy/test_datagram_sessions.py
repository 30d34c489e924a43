"""The table of UDP sessions: which datagram goes where."""

from __future__ import annotations

import socket

import pytest

from test.support.logged import captured_log
from Zorp import Globals
from Zorp.acceptance.binds import DBSockAddr
from Zorp.acceptance.datagram_sessions import INBOX_DATAGRAMS, DatagramSessions, DatagramStream
from Zorp.acceptance.dispatch_table import Dispatch, DispatchTable
from Zorp.Constants import ZD_PROTO_UDP
from Zorp.SockAddr import SockAddrInet
from Zorp.Stream import StreamTimeout
from Zorp.transport import datagrams
from Zorp.transport.datagrams import Datagram, SessionSocket, session_socket, strays


@pytest.fixture
def listener():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_IP, 20, 1)
        sock.bind(("127.0.0.1", 0))
        yield sock


def sender(listener, *data):
    """Return a socket that has sent these datagrams to the listener."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    sock.settimeout(10)
    for each in data:
        sock.sendto(each, listener.getsockname())
    return sock


def test_queued_datagrams_of_a_pair_go_to_its_session_in_order(listener):
    # given three datagrams that wait before anybody looked
    sessions = DatagramSessions(transparent=False)
    with captured_log(), sender(listener, b"1", b"2", b"3") as client:
        stream, datagram = sessions.arrived(listener)
        assert datagram.source == client.getsockname()
        # then the other two are the session's already, before anybody serves it
        with pytest.raises(BlockingIOError):
            sessions.arrived(listener)
        # and a fourth goes to the session's own socket
        client.sendto(b"4", listener.getsockname())
        assert [stream.recv() for _ in range(4)] == [b"1", b"2", b"3", b"4"]
        with pytest.raises(BlockingIOError):
            sessions.arrived(listener)
        # answers come from the listener's address
        stream.send(b"answer")
        assert client.recvfrom(100) == (b"answer", listener.getsockname())
        stream.close()
        stream.close()
        assert sessions.number == 0


def test_datagrams_that_came_between_bind_and_connect_are_taken_out(listener):
    # given a session's socket that was bound and not connected when a stranger's datagram came
    with sender(listener) as client, sender(listener) as stranger:
        sock = SessionSocket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(listener.getsockname())
        stranger.sendto(b"stray", listener.getsockname())
        sock.interface_index = 0
        sock.connect(client.getsockname())
        datagram = Datagram(b"first", client.getsockname(), listener.getsockname(), 0)
        # then it comes out with its sender, and nothing is left
        assert strays(sock, datagram) == [Datagram(b"stray", stranger.getsockname(), listener.getsockname(), 0)]
        assert strays(sock, datagram) == []
        sock.close()


def test_what_waits_behind_another_pair_begins_no_second_session(listener):
    # given datagrams of two clients, interleaved
    sessions = DatagramSessions(transparent=False)
    with captured_log(), sender(listener, b"1") as one, sender(listener, b"a") as other:
        one.sendto(b"2", listener.getsockname())
        other.sendto(b"b", listener.getsockname())
        first, _ = sessions.arrived(listener)
        # then the second client's datagram was read on the way, and is waiting
        assert sessions.waiting
        second, datagram = sessions.arrived(listener)
        assert datagram.source == other.getsockname()
        # and the rest finds its sessions
        assert sessions.arrived(listener) is None
        assert sessions.arrived(listener) is None
        with pytest.raises(BlockingIOError):
            sessions.arrived(listener)
        assert [first.recv(), first.recv(), second.recv(), second.recv()] == [b"1", b"2", b"a", b"b"]
        assert sessions.number == 2
        first.close()
        second.close()


def test_strays_begin_sessions_of_their_own(listener, monkeypatch):
    sessions = DatagramSessions(transparent=False)
    with captured_log(), sender(listener, b"first") as client, sender(listener) as stranger:
        found = [Datagram(b"stray", stranger.getsockname(), listener.getsockname(), 0),
                 Datagram(b"second", client.getsockname(), listener.getsockname(), 0)]
        monkeypatch.setattr("Zorp.acceptance.datagram_sessions.strays",
                            lambda sock, datagram: [found.pop(0) for _ in found[:]])
        first, _ = sessions.arrived(listener)
        assert [first.recv(), first.recv()] == [b"first", b"second"]
        assert sessions.waiting
        other, datagram = sessions.arrived(listener)
        assert (other.recv(), datagram.source) == (b"stray", stranger.getsockname())
        assert not sessions.waiting
        first.close()
        other.close()


def test_stream_drops_what_another_sender_got_into_its_socket(listener):
    with sender(listener) as client, sender(listener) as stranger:
        sock = SessionSocket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(listener.getsockname())
        stranger.sendto(b"stray", listener.getsockname())
        sock.connect(client.getsockname())
        stream = DatagramStream(sock, "x", client.getsockname())
        client.sendto(b"mine", listener.getsockname())
        assert stream.recv() == b"mine"
        stream.close()


def test_inbox_is_bounded_and_closed_with_the_stream(listener):
    with sender(listener) as client:
        datagram = Datagram(b"", client.getsockname(), listener.getsockname(), 0)
        stream = DatagramStream(session_socket(socket.AF_INET, datagram, transparent=False), "x", datagram.source)
        assert [stream.give(b"x") for _ in range(INBOX_DATAGRAMS + 1)] == [True] * INBOX_DATAGRAMS + [False]
        stream.close()
        assert not stream.give(b"x")


def test_reading_respects_the_timeout_and_an_abort(listener):
    with sender(listener) as client:
        datagram = Datagram(b"", client.getsockname(), listener.getsockname(), 0)
        stream = DatagramStream(session_socket(socket.AF_INET, datagram, transparent=False), "x", datagram.source)
        stream.timeout_ms = 50
        with pytest.raises(StreamTimeout):
            stream.recv()
        stream.abort()
        assert stream.recv() == b""
        stream.close()


def test_socket_that_cannot_be_made_drops_the_datagram(listener, monkeypatch):
    def refuse(*arguments, **keywords):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("Zorp.acceptance.datagram_sessions.session_socket", refuse)
    sessions = DatagramSessions(transparent=False)
    with captured_log() as log, sender(listener, b"x"):
        assert sessions.arrived(listener) is None
    line = log.find("Error creating session socket, dropping packet; error='Too many open files'")[0]
    assert (line.tag, line.level, sessions.number) == ("core.error", 3, 0)


def test_datagram_forged_from_a_listener_of_this_process_begins_no_session(listener, monkeypatch):
    # given a process that listens here
    host, port = listener.getsockname()
    monkeypatch.setattr(Globals, "dispatch_table", DispatchTable())
    address = SockAddrInet(host, port)
    Dispatch("x", DBSockAddr(address, ZD_PROTO_UDP), 100, lambda *_: None).chain.bound([address])
    sessions = DatagramSessions(transparent=False)
    with captured_log() as log, sender(listener) as client:
        # when datagrams come that have its own address as their source
        for _ in range(2):
            listener.sendto(b"mine", listener.getsockname())
        assert [sessions.arrived(listener) for _ in range(2)] == [None] * 2
        # then no session would answer them, and the log says it, once
        assert sessions.number == 0
        line, = log.find("Datagram claims to come from a listener of this firewall, dropping packet;")
        assert line.text.endswith(f"client='{host}:{port}', suppressed='0'")
        # and whoever has another port is served
        client.sendto(b"question", listener.getsockname())
        stream, _ = sessions.arrived(listener)
        assert stream.recv() == b"question"
        stream.close()


def test_stream_that_cannot_be_made_leaves_no_socket_and_one_line(listener, monkeypatch):
    made = []

    def remember(*arguments, **keywords):
        made.append(session_socket(*arguments, **keywords))
        return made[-1]

    def refuse(*arguments):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("Zorp.acceptance.datagram_sessions.session_socket", remember)
    monkeypatch.setattr("os.eventfd", refuse)
    sessions = DatagramSessions(transparent=False)
    with captured_log() as log, sender(listener, b"1", b"2", b"3"):
        assert [sessions.arrived(listener) for _ in range(3)] == [None] * 3
    assert [sock.fileno() for sock in made] == [-1] * 3
    assert len(log.find("Error creating session socket, dropping packet; error='Too many open files'")) == 1


def test_addresses_of_both_families():
    v4 = bytes.fromhex("0200") if socket.htons(1) != 1 else bytes.fromhex("0002")
    assert datagrams._address(v4 + bytes.fromhex("0035c0000207") + bytes(8)) == ("192.0.2.7", 53)
    v6 = socket.AF_INET6.to_bytes(2, "little" if socket.htons(1) != 1 else "big")
    raw = v6 + bytes.fromhex("0035") + bytes(4) + socket.inet_pton(socket.AF_INET6, "2001:db8::7") + bytes(4)
    assert datagrams._address(raw) == ("2001:db8::7", 53, 0, 0)
