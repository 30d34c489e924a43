"""max_session_time: a session that never falls silent ends all the same."""

import contextlib
import socket
import threading
import time

import pytest

from test.smtp.play import CLOSING
from test.support.daemon import wait_until
from test.support.ports import free_port
from Zorp.engine.session_time import SessionTimes

POLICY = """
    from Zorp.Core import *
    from Zorp.Plug import *
    from Zorp.Smtp import *

    class ShortPlug(PlugProxy):
        def config(self):
            PlugProxy.config(self)
            self.max_session_time = $allowed_ms

    class ShortMail(SmtpProxy):
        def config(self):
            SmtpProxy.config(self)
            self.max_session_time = $allowed_ms

    def intra():
        to_server = DirectedRouter(SockAddrInet("127.0.0.1", $server_port))
        Service("short", ShortPlug, router=to_server)
        Service("mail", ShortMail, router=to_server)
        Service("long", PlugProxy, router=to_server)
        for port, service in (($port, "short"), ($mail_port, "mail"), ($long_port, "long")):
            Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", port), ZD_PROTO_TCP), service=service)
    """
ALLOWED_MS = 1500


@pytest.fixture
def server():
    """A server that says what a mail server says first, then echoes, and never ends by itself."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def serve(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"220 server ready\r\n")
                while data := connection.recv(4096):
                    connection.sendall(data)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]


@pytest.fixture
def daemon(zorp, server):
    """An instance whose services `short` and `mail` allow ALLOWED_MS."""
    return zorp(POLICY, server_port=server, allowed_ms=ALLOWED_MS, mail_port=free_port(), long_port=free_port())


def test_a_session_that_is_never_silent_ends_when_its_time_is_up(daemon):
    # given two clients that go on talking, one of them of a service with a limit
    began = time.monotonic()
    with daemon.connect() as short, daemon.connect(daemon.values["long_port"]) as long:
        for client in (short, long):
            assert client.recv(100)
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while True:
                short.sendall(b"x")
                if not short.recv(100):
                    break
                long.sendall(b"y")
                assert long.recv(100)
        # then the limited one ends when its time is up, not before, and the log says why
        assert time.monotonic() - began >= ALLOWED_MS / 1000
        line = daemon.log.wait_for("core.session", 3, "Session takes too long, ending it")
        assert line.fields == {"max_session_time": str(ALLOWED_MS)}
        summary = daemon.log.wait_for("core.summary", 4, "Connection summary")
        assert (summary.fields["verdict"], summary.fields["info"]) == ("ACCEPTED", "max_session_time reached")
        assert not daemon.log.find("core.info", 2, "User initiated")
        # and the other goes on
        long.sendall(b"still")
        assert long.recv(100) == b"still"


def test_a_mail_client_is_told(daemon):
    with daemon.connect(daemon.values["mail_port"]) as client:
        assert client.makefile("rb").read() == f"220 server ready\r\n{CLOSING}\r\n".encode()


def test_a_negative_time_is_refused(zorp, server):
    daemon = zorp(POLICY, server_port=server, allowed_ms=-1, mail_port=free_port(), long_port=free_port())
    with daemon.connect() as client:
        assert client.recv(100) == b""
    daemon.log.wait_for("core.policy", 1, "Policy cannot be used",
                        error="max_session_time is negative; value=<27>-1<27>; give milliseconds, or 0 for no limit")


# ---------------------------------------------------------------- the clock

class Recorder:
    """Notes that its time is up."""

    def __init__(self, order: list) -> None:
        self.order = order

    def time_is_up(self) -> None:
        self.order.append(self)


def test_times_end_in_their_order_and_those_that_have_left_are_not_told():
    # given four, entered in another order than that of their ends, one of which leaves
    times, order = SessionTimes(), []
    late, early, never, last = (Recorder(order) for _ in range(4))
    times.enter(never, 60_000)
    times.leave(never)
    times.leave(never)
    times.enter(late, 400)
    times.enter(early, 100)
    times.enter(last, 600)
    # then the others are told, each once
    wait_until(lambda: len(order) >= 3, "the ends")
    assert order == [early, late, last]
