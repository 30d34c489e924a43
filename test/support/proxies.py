"""One connection through a proxy class, in this process: real sockets, real sessions.

    def test_something(serve):
        with serve(MyPlug) as session:
            session.client.sendall(b"x")
            assert session.server.recv(1) == b"x"
        assert session.verdict == "ACCEPTED"
        session.log.wait_for("Proxy ending")

serve(proxy_class, **service) makes a client connection on loopback, a listening socket for the
server side and the proxy between them, in a thread of its own.  Leaving the block closes both
ends and waits for the proxy's end.

    .client       socket of the client, ten seconds of patience
    .server       socket on which the proxy reached the server (waits for it)
    .proxy        the proxy object; .session its session, .master the client's session
    .log          test.support.logged.Logged
    .verdict      name of the final verdict; waits for the end of the session
    .wait_for_end()
"""

from __future__ import annotations

import contextlib
import socket
import threading
import types

import pytest

from test.support.ends import tcp_pair
from test.support.logged import captured_log
from Zorp.ProxyGroup import ProxyGroup
from Zorp.Session import MasterSession, StackedSession
from Zorp.SockAddr import SockAddrInet
from Zorp.Stream import Stream

PATIENCE_S = 10.0


class OneTarget:
    """A chainer that connects to one address; counts how often it was asked."""

    def __init__(self, address, failure=None):
        self.address = address
        self.failure = failure
        self.asked = 0

    def chainParent(self, session):
        """Return the Stream, None when nobody answers; raises the failure it was given."""
        self.asked += 1
        if self.failure is not None:
            raise self.failure
        session.setServerAddress(SockAddrInet(*self.address))
        try:
            return Stream(socket.create_connection(self.address), f"{session.session_id}/server")
        except OSError:
            return None


class Served:
    """One session of a proxy; see the module's docstring."""

    def __init__(self, proxy_class, log, *, failure=None, server_listens=True, start=True, **service):
        self.log = log
        self._ended = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(PATIENCE_S)
        self.chainer = OneTarget(self._listener.getsockname(), failure)
        if not server_listens:
            self._listener.close()
        self._server = None
        self.client, ours = tcp_pair()
        self.client.settimeout(PATIENCE_S)
        self.service = types.SimpleNamespace(**{
            "name": "test", "keepalive": 0, "chainer": self.chainer,
            "stopInstance": lambda session: self._ended.set(), **service})
        self.master = MasterSession(
            self.service, Stream(ours, "client"), SockAddrInet(*ours.getsockname()), None,
            SockAddrInet(*self.client.getsockname()))
        self.session = StackedSession(self.master, self.chainer)
        self.session.client_stream = self.master.client_stream
        self.proxy = proxy_class(self.session)
        if start:
            self.start()

    def start(self):
        """Start the proxy's thread."""
        assert ProxyGroup(1).start(self.proxy)
        self.master.release()

    @property
    def server(self):
        """The server's end of the proxy's connection."""
        if self._server is None:
            self._server = self._listener.accept()[0]
            self._server.settimeout(PATIENCE_S)
        return self._server

    @property
    def server_was_contacted(self):
        """True when a connection to the server was made; to be asked after the end."""
        self._listener.settimeout(0)
        try:
            self._server, _ = self._listener.accept()
        except BlockingIOError:
            return False
        return True

    def wait_for_end(self):
        """Wait until the session is over."""
        if not self._ended.wait(PATIENCE_S):
            pytest.fail("the session does not end:\n" + "\n".join(self.log.texts()))

    @property
    def verdict(self):
        """The name of the verdict with which the session ended."""
        self.wait_for_end()
        return str(self.master.verdict)

    def close(self):
        """Close the outer ends and wait for the proxy."""
        for end in (self.client, self._server):
            if end is not None:
                end.close()
        self.wait_for_end()
        self._listener.close()


@pytest.fixture
def serve():
    """Return a function: context manager for one session of a proxy class."""

    @contextlib.contextmanager
    def one_session(proxy_class, **options):
        with captured_log() as log:
            session = Served(proxy_class, log, **options)
            try:
                yield session
            finally:
                session.close()

    return one_session


def events_of(proxy_class, names):
    """Return a subclass that appends the names of its events to the list `calls` of the class."""

    class Recording(proxy_class):
        calls = []

    for name in names:
        def event(self, name=name):
            base = getattr(super(Recording, self), name, None)
            self.calls.append(name)
            if base is not None:
                base()

        setattr(Recording, name, event)
    return Recording


__all__ = ["PATIENCE_S", "OneTarget", "Served", "events_of", "serve"]
