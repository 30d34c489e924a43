"""S003, module Chainer of the first generation: chainers that decide and connect."""

from __future__ import annotations

import importlib
import inspect
import socket

import pytest

from test.seeds import POLICIES, covers
from test.support.gateway import Gateway, Server, ended, exchange
from test.support.ports import free_port

CHAINER = """
    from Zorp.Core import *
    from Zorp.Plug import *
    from Zorp.Chainer import *

    Zone("firewall", ["127.0.0.0/24"])
    Zone("forbidden", ["127.9.0.0/16"])
    Zone("internet", ["0.0.0.0/0"])
    $before

    class Looking(PlugProxy):
        def config(self):
            PlugProxy.config(self)
            SEEN["session"] = self.session

    def gateway():
        Service("svc", $chainer, $proxy_class)
        Listener(SockAddr("127.0.0.1", 50080), "svc")
"""


def chained(chainer, before="", proxy_class="Looking", **values):
    """A gateway with one service of the old order: name, chainer, proxy."""
    text = CHAINER.replace("$before", before).replace("$chainer", chainer).replace("$proxy_class", proxy_class)
    return Gateway(text, **values)


@pytest.fixture
def server():
    with Server() as running:
        yield running


@pytest.fixture
def printed(server):
    """The policy of the paper: chains are directed, transparent, failover."""
    with Gateway(POLICIES / "s003_chainers.policy", server_port=server.port, dead_port=free_port()) as running:
        yield running


@covers("S003-1", "S003-3")
def test_the_module_has_every_chainer(printed):
    # given the module
    module = _module("Chainer")
    # then the module has them, all of one family
    for name in ("DirectedChainer", "FailoverChainer", "InbandChainer", "TransparentChainer"):
        assert issubclass(getattr(module, name), module.AbstractChainer)


@covers("S003-2", "S003-4", "S003-5")
def test_a_stacked_proxy_takes_the_prepared_end_or_its_own_chainer(server, printed):
    # given a proxy inside another one, once as its parent prepares it and once with a chainer of its own
    session = _module("Session").StackedSession(_master())
    session.client_stream, _ = printed.names["streamPair"](socket.AF_UNIX, socket.SOCK_STREAM)
    session.server_stream, _ = printed.names["streamPair"](socket.AF_UNIX, socket.SOCK_STREAM)
    chained = _module("Session").StackedSession(_master(), _module("Chainer").AbstractChainer())
    # then the first has no chainer and takes what the old name says too
    assert session.chainer is None
    assert printed.names["PlugProxy"](session).connectServer() is session.server_fd is session.server_stream
    # and the second, like a proxy on top, asks its chainer
    chained.client_stream, _ = printed.names["streamPair"](socket.AF_UNIX, socket.SOCK_STREAM)
    asked = []
    chained.chainer.chainParent = asked.append
    printed.names["PlugProxy"](chained).connectServer()
    assert asked == [chained]


def _module(name):
    return importlib.import_module(f"Zorp.{name}")


def _master():
    return _module("Session").MasterSession()


@covers("S003-6", "S003-8", "S003-9")
def test_the_abstract_chainer_is_an_interface(printed):
    # given the base class
    abstract = printed.names["AbstractChainer"]
    # then its two methods have the reference's arguments, and the first is left to others
    assert list(inspect.signature(abstract.connectServer).parameters)[:4] == ["self", "session", "host", "port"]
    assert list(inspect.signature(abstract.establishConnection).parameters) == ["self", "session", "local", "remote"]
    with pytest.raises(NotImplementedError):
        abstract().connectServer(_master(), "", 0)


OWN = """
    class Own(AbstractChainer):
        def connectServer(self, session, host, port):
            stream = self.establishConnection(session, None, SockAddr("$host", $server_port))
            SEEN["stream"] = (stream, stream.fd)
            return stream
"""


@covers("S003-9", "S003-12")
def test_an_own_chainer_connects_through_establish_connection(server):
    # given a chainer of a site that has only the old method
    with chained("Own()", OWN, server_port=server.port, host="127.0.0.1") as gateway:
        # when a client comes
        client = gateway.connect()
        assert exchange(client) == b"ping"
        # then what it got is the server's stream, with the number of a descriptor
        stream, fd = gateway.seen["stream"]
        assert stream is gateway.seen["session"].server_stream
        assert isinstance(fd, int)
        client.close()


@covers("S003-10", "S003-11")
def test_establish_connection_checks_access(server):
    # given a service that may reach one zone, and a chainer that goes to another
    with chained("Own()", OWN, "Looking, limit_target_zones_to=('firewall',)",
                 server_port=server.port, host="127.9.0.1") as gateway:
        # when a client comes, then it is refused by access control
        assert ended(gateway.connect())
        gateway.logged.wait_for("DAC policy violation; info='DAC policy violation:")


@covers("S003-13", "S003-14", "S003-17", "S003-36")
def test_a_directed_chainer_connects_to_its_server(server, printed):
    # when a client comes that wanted something else
    client = printed.connect(to=("192.0.2.80", 80))
    # then the chainer's server serves it
    assert exchange(client) == b"ping"
    assert printed.service("inter_HTTP_dmz").chainer.remote.port == server.port
    client.close()


CONSTRUCTORS = {
    "DirectedChainer": ({"remote": "address"}, {"local": None, "forge_addr": 0}),
    "FailoverChainer": ({"hosts": "addresses"}, {"local": None, "forge_addr": 0}),
    "InbandChainer": ({}, {"local": None, "forge_addr": 0}),
    "TransparentChainer": ({}, {"local": None, "forge_addr": 0, "forced_port": 0}),
}


@covers("S003-15", "S003-16", "S003-21", "S003-22", "S003-27", "S003-32", "S003-33")
@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_chainers_have_the_reference_s_arguments_and_attributes(printed, name):
    # given the arguments of the reference in their order
    module = _module("Chainer")
    make = printed.names["SockAddrInet"]
    samples = {"address": make("127.0.0.1", 80), "addresses": [make("127.0.0.1", 80), make("127.0.0.2", 80)]}
    required, optional = CONSTRUCTORS[name]
    required = {argument: samples[sample] for argument, sample in required.items()}
    local = make("127.0.0.1", 0)
    # when it is made with what is required, by position and by keyword
    plain = getattr(module, name)(*required.values())
    full = getattr(module, name)(**required, local=local, forge_addr=1)
    positional = getattr(module, name)(*required.values(), local, 1)
    # then every argument is an attribute and the others have the reference's defaults
    for argument, default in optional.items():
        assert getattr(plain, argument) == default
    assert (full.local, full.forge_addr) == (positional.local, positional.forge_addr) == (local, 1)
    for argument, value in required.items():
        assert getattr(plain, argument) == value


@covers("S003-7", "S003-18")
def test_hints_mean_nothing_to_a_directed_chainer(server):
    # given a chainer that asks a directed one with nonsense
    before = """
    class Asking(DirectedChainer):
        def connectServer(self, session, host, port):
            return DirectedChainer.connectServer(self, session, "no.such.host.example", 1)
    """
    with chained("Asking(SockAddr('127.0.0.1', $server_port), forge_addr=1)", before,
                 server_port=server.port) as gateway:
        # when a client comes
        client = gateway.connect(source="127.0.0.44")
        # then its server is reached all the same, with the client's address as asked for
        assert exchange(client) == b"ping"
        assert server.peers[0][0] == "127.0.0.44"
        client.close()


@covers("S003-19", "S003-23")
def test_a_failover_chainer_goes_on_until_one_succeeds(server):
    # given three servers of which the last one lives
    chainer = ("FailoverChainer([SockAddr('127.0.0.1', $dead), SockAddr('127.0.0.1', $deader),"
               " SockAddr('127.0.0.1', $server_port)])")
    with chained(chainer, dead=free_port(), deader=free_port(), server_port=server.port) as gateway:
        # when a client comes, then that one serves it
        client = gateway.connect()
        assert exchange(client) == b"ping"
        client.close()


@covers("S003-20")
def test_a_failover_chainer_balances_the_load(server):
    # given two servers that live
    with Server() as other, chained(
            "FailoverChainer([SockAddr('127.0.0.1', $server_port), SockAddr('127.0.0.1', $other)])",
            server_port=server.port, other=other.port) as gateway:
        # when two clients come
        for _ in range(2):
            client = gateway.connect()
            assert exchange(client) == b"ping"
            client.close()
        # then they were not served by the same one
        assert (len(server.peers), len(other.peers)) == (1, 1)


@covers("S003-21", "S003-24", "S003-25")
def test_a_failover_chainer_walks_over_its_hosts(printed):
    # given one with three hosts
    module = _module("Chainer")
    hosts = [printed.names["SockAddrInet"]("127.0.0.1", port) for port in (1, 2, 3)]
    chainer = module.FailoverChainer(hosts)
    # when it walks once around and one further
    seen = []
    for _ in range(len(hosts) + 1):
        seen.append((chainer.current_host, chainer.getHostAddress().port))
        chainer.nextHost()
    # then the index wraps to the beginning
    assert seen == [(0, 1), (1, 2), (2, 3), (0, 1)]


@covers("S003-7", "S003-26", "S003-28")
def test_an_inband_chainer_connects_to_the_name_in_the_dialogue(server):
    # given a protocol that learns a name from its client, and a resolver that knows the name
    before = """
    ResolverPolicy("hosts", HashResolver({"mail.example": ("127.0.0.1",)}))

    class Naming(PlugProxy):
        def _engine_main(self):
            host, port = self._client.recv().decode().split(":")
            self._client.send(b"1" if self._connect_server(host, int(port)) else b"0")
    """
    with chained("InbandChainer()", before, "Naming, resolver_policy='hosts'", server_port=server.port) as gateway:
        gateway.names["config"].options.permit_local_targets = True
        # when the client names it
        client = gateway.connect()
        client.sendall(b"mail.example:%d" % server.port)
        # then that host and port are connected
        assert client.recv(1) == b"1"
        server.wait_for_peers(1)


@covers("S003-29", "S003-34", "S003-35")
def test_a_transparent_chainer_connects_to_the_original_destination(server, printed):
    # when a client comes through the transparent service that wanted the server
    client = printed.connect(to=("127.0.0.1", server.port), chain=1)
    # then it gets it
    assert exchange(client) == b"ping"
    client.close()


@covers("S003-32")
def test_a_transparent_chainer_can_force_the_port(server):
    # given one with a port of its own
    with chained("TransparentChainer(forced_port=$server_port)", server_port=server.port) as gateway:
        # when a client wanted another one, then the forced one is used
        client = gateway.connect(to=("127.0.0.1", 1))
        assert exchange(client) == b"ping"
        client.close()


@covers("S003-31")
def test_a_transparent_listener_that_is_addressed_directly_makes_no_loop(zorp):
    # given a transparent service on a port that clients can reach
    daemon = zorp("""
        from Zorp.Core import *
        from Zorp.Plug import *
        InetZone("all", "0.0.0.0/0", ["*"], ["*"])
        def intra():
            Service("http", TransparentChainer(), PlugProxy)
            Listener(SockAddrInet("127.0.0.1", $port), "http", transparent=TRUE)
        """)
    # when a client connects to that port itself
    client = daemon.connect()
    # then it is turned away before any session
    assert ended(client)
    daemon.log.wait_for("core.error", 1, "Transparent listener connected directly, dropping connection")
    assert daemon.log.find("core.session", 3, "Starting proxy instance") == []


@covers("S003-31")
def test_a_listener_without_that_protection_does_not_connect_to_itself(zorp):
    # given the same service on a listener that does not know it is for redirected clients
    daemon = zorp("""
        from Zorp.Core import *
        from Zorp.Plug import *
        InetZone("all", "0.0.0.0/0", ["*"], ["*"])
        def intra():
            Service("http", TransparentChainer(), PlugProxy)
            Listener(SockAddrInet("127.0.0.1", $port), "http")
        """)
    # when a client connects to that port itself
    client = daemon.connect()
    # then one session is refused and no second one begins
    assert ended(client)
    daemon.log.wait_for("core.summary", 4, "Connection summary")
    assert len(daemon.log.find("core.session", 3, "Starting proxy instance")) == 1
