"""A session that waits for its server, for tests of routers, chainers and NAT: real sessions, real sockets.

    def test_something(asking):
        session = asking(router=DirectedRouter(SockAddrInet(server.host, server.port)))
        assert session.connect() is not None
        assert session.log.has(...)

asking(router=..., chainer=..., **service) makes a master session, the stacked session of a proxy
that does nothing by itself, routes it and hands back an Asking:

    .connect()        what the proxy's connectServer() gives: a Stream or None
    .session, .master, .proxy, .verdict
    .log              test.support.logged.Logged of the whole test
"""

from __future__ import annotations

import contextlib
import socket
import types

import pytest

from test.support.logged import captured_log
from Zorp.Chainer import ConnectChainer
from Zorp.Proxy import Proxy
from Zorp.Resolver import DNSResolver
from Zorp.Router import TransparentRouter
from Zorp.Session import MasterSession, StackedSession
from Zorp.SockAddr import SockAddrInet, from_sockaddr
from Zorp.Stream import streamPair

CLIENT = ("127.0.0.5", 20000)
PATIENCE_S = 10.0


class IdleProxy(Proxy):
    """A proxy that only connects when a test says so."""

    name = "idle"

    def _engine_main(self):
        """Do nothing."""


class Asking:
    """One session; see the module's docstring."""

    def __init__(self, log, router, chainer, client, wanted, **service):
        settings = {"name": "test", "keepalive": 0, "snat_policy": None, "dnat_policy": None,
                    "limit_target_zones_to": None, "resolver_policy": DNSResolver(), "encryption_policy": None,
                    "stopInstance": lambda session: None, **service}
        self.log = log
        self.service = types.SimpleNamespace(router=router, chainer=chainer, **settings)
        self._outer, inner = streamPair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.master = MasterSession(self.service, inner, wanted, None, client)
        self.session = StackedSession(self.master, chainer)
        self.session.client_stream = inner
        self._streams = [self._outer, inner]
        router.routeConnection(self.session)
        self.proxy = IdleProxy(self.session)

    def connect(self, host="", port=0):
        """Ask as an engine does: with a hint when the client named a host; return a Stream or None."""
        connected = self.proxy._connect_server(host, port)
        stream = self.session.server_stream if connected else None
        if stream is not None:
            self._streams.append(stream)
        return stream

    @property
    def verdict(self):
        """The name of the session's verdict so far."""
        return str(self.master.verdict)

    def close(self):
        """Close every stream."""
        for stream in self._streams:
            stream.close()


@pytest.fixture
def asking():
    """Return a function that makes an Asking."""
    with captured_log() as log, contextlib.ExitStack() as stack:

        def make(router=None, chainer=None, client=None, wanted=None, **service):
            made = Asking(log, router or TransparentRouter(), chainer or ConnectChainer(),
                          client or SockAddrInet(*CLIENT), wanted or SockAddrInet("127.0.0.1", 9), **service)
            stack.callback(made.close)
            return made

        make.log = log
        yield make


def address_of(server):
    """Return the SockAddr of a test.support.gateway.Server."""
    return SockAddrInet(server.host, server.port)


def near_end(stream):
    """Return the SockAddr of our end of a Stream."""
    return from_sockaddr(stream.sock.family, stream.sock.getsockname())
