"""Chainers of release 1, alone and in services written as then; and what sites made of them."""

from __future__ import annotations

import inspect
import os
import socket
import types

import pytest

from test.support.chaining import address_of, asking
from test.support.deaf import unused_port
from test.support.gateway import Gateway, Server, ended, exchange
from test.support.logged import captured_log
from test.support.zones import no_zones
from Zorp.Chainer import (
    AbstractChainer,
    ConnectChainer,
    DirectedChainer,
    FailoverChainer,
    InbandChainer,
    TransparentChainer,
)
from Zorp.Config import config
from Zorp.Constants import FALSE, TRUE, Z_PORT_ANY, ZD_PROTO_TCP
from Zorp.Exceptions import PolicyError
from Zorp.NAT import NATPolicy, StaticNAT
from Zorp.Resolver import HashResolver, ResolverPolicy
from Zorp.Router import DirectedRouter, InbandRouter, TransparentRouter
from Zorp.SockAddr import SockAddrInet, SockAddrUnix
from Zorp.Stream import Stream

__all__ = ["asking", "no_zones"]

ELSEWHERE = SockAddrInet("192.0.2.1", 80)


@pytest.fixture(autouse=True)
def own_zones(no_zones):
    """No zone is known."""


@pytest.fixture
def server():
    with Server() as running:
        yield running


def alone(asking, chainer, **more):
    """A session whose service has nothing but this chainer, which is its router too."""
    return asking(chainer.fitting_router(), chainer, **more)


# the four classes

def test_directed_chainer(asking, server):
    chainer = DirectedChainer(address_of(server))
    assert alone(asking, chainer, wanted=ELSEWHERE).connect() is not None
    server.wait_for_peers(1)


def test_directed_chainer_beside_another_router(asking, server):
    """The chainer's own target holds."""
    assert asking(TransparentRouter(), DirectedChainer(address_of(server)), wanted=ELSEWHERE).connect() is not None
    server.wait_for_peers(1)


def test_directed_chainer_as_a_router(asking, server):
    """Scenario 21: a shipped example passed it as router=."""
    assert asking(DirectedChainer(address_of(server)), ConnectChainer(), wanted=ELSEWHERE).connect() is not None
    server.wait_for_peers(1)


def test_transparent_chainer_with_a_forced_port(asking, server):
    """Scenario 20."""
    chainer = TransparentChainer(None, 0, server.port)
    assert alone(asking, chainer, wanted=SockAddrInet("127.0.0.1", 80)).connect() is not None
    server.wait_for_peers(1)
    chainer = TransparentChainer()
    assert alone(asking, chainer, wanted=address_of(server)).connect() is not None
    server.wait_for_peers(2)


@pytest.mark.parametrize("make", [
    lambda address, *more: DirectedChainer(address, *more), lambda address, *more: TransparentChainer(*more),
    lambda address, *more: FailoverChainer([address], *more)])
def test_source_address(asking, server, make):
    """`local` gives the IP address only; a true forge_addr means the client's and wins."""
    local = SockAddrInet("127.0.0.77", 1)
    for count, (arguments, expected) in enumerate(
            [((local,), "127.0.0.77"), ((local, 1), "127.0.0.5"), ((None, 1), "127.0.0.5"), ((), "127.0.0.1")], 1):
        chainer = make(address_of(server), *arguments)
        assert alone(asking, chainer, wanted=address_of(server)).connect() is not None
        host, port = server.wait_for_peers(count)[-1]
        assert host == expected
        assert port != 1


def test_inband_chainer(asking, server, monkeypatch):
    monkeypatch.setattr(config.options, "permit_local_targets", TRUE)
    resolver = ResolverPolicy(None, HashResolver({"mail.example": "127.0.0.1"}))
    asked = alone(asking, InbandChainer(), resolver_policy=resolver)
    assert asked.connect("mail.example", server.port) is not None
    server.wait_for_peers(1)
    # a name that nobody knows
    assert alone(asking, InbandChainer(), resolver_policy=resolver).connect("other.example", 25) is None
    # and no name at all
    asked = alone(asking, InbandChainer(), resolver_policy=resolver)
    assert asked.connect() is None
    assert asked.log.has("Server connection failure, no destination;", ())


def test_inband_chainer_does_not_lead_to_the_firewall(asking, server):
    asked = alone(asking, InbandChainer())
    assert asked.connect("127.0.0.1", server.port) is None
    assert asked.verdict == "DENIED_BY_POLICY"


def test_nat_holds_for_them_too(asking, server, monkeypatch):
    monkeypatch.setattr("Zorp.Globals.nat_policies", {})
    dnat = NATPolicy("dnat", StaticNAT(address_of(server)))
    snat = NATPolicy("snat", StaticNAT(SockAddrInet("127.0.0.88", 0)))
    chainer = DirectedChainer(ELSEWHERE)
    assert alone(asking, chainer, dnat_policy=dnat, snat_policy=snat).connect() is not None
    assert server.wait_for_peers(1)[0][0] == "127.0.0.88"


# FailoverChainer(hosts)

def test_failover_takes_turns_and_survives(asking, server):
    """Scenario 18, the chainer's part."""
    with Server(host="127.0.0.2") as other:
        chainer = FailoverChainer((address_of(server), address_of(other)))
        for _ in range(4):
            assert alone(asking, chainer).connect() is not None
        server.wait_for_peers(2)
        other.wait_for_peers(2)
        assert (len(server.peers), len(other.peers)) == (2, 2)
    # when one goes down
    for _ in range(2):
        assert alone(asking, chainer).connect() is not None
    server.wait_for_peers(4)


def test_failover_remembers_nothing_and_tries_each_once(asking):
    with unused_port() as port:
        hosts = [SockAddrInet("127.0.0.1", port), SockAddrInet("127.0.0.2", port)]
        asked = alone(asking, FailoverChainer(hosts))
        for count in (2, 4):
            assert asked.connect() is None
            assert len(asked.log.find("Server connection failure;")) == count
    assert not asked.log.find("Destination is down")


def test_failover_without_hosts(asking):
    asked = alone(asking, FailoverChainer([]))
    assert asked.connect() is None
    assert asked.log.has("Server connection failure, no destination;", ())


def test_failover_hooks_of_sites(asking, server):
    class Own(FailoverChainer):
        def getHostAddress(self):
            return self.hosts[-1]

        def nextHost(self):
            self.current_host = 0

    chainer = Own([ELSEWHERE, address_of(server)])
    assert alone(asking, chainer).connect() is not None
    server.wait_for_peers(1)
    assert chainer.current_host == 0


def test_failover_walks_around():
    hosts = [SockAddrInet("127.0.0.1", port) for port in (1, 2)]
    chainer = FailoverChainer(hosts=hosts)
    seen = []
    for _ in range(3):
        seen.append((chainer.current_host, chainer.getHostAddress()))
        chainer.nextHost()
    assert seen == [(0, hosts[0]), (1, hosts[1]), (0, hosts[0])]


def test_failover_refusal_ends_it_unless_the_site_says_otherwise(asking, server):
    from_zone = {"limit_target_zones_to": ("nowhere",)}
    chainer = FailoverChainer([address_of(server), address_of(server)])
    asked = alone(asking, chainer, **from_zone)
    assert asked.connect() is None
    assert len(asked.log.find("Outbound connection not permitted;")) == 1
    chainer.next_after_refusal = TRUE
    asked = alone(asking, chainer, **from_zone)
    assert asked.connect() is None
    assert len(asked.log.find("Outbound connection not permitted;")) == 3
    assert asked.verdict == "DENIED_BY_POLICY"


def test_today_s_form_has_the_old_names_over_the_session_s_targets(asking, server):
    chainer = FailoverChainer()
    asked = asking(DirectedRouter([address_of(server)]), chainer)
    assert asked.connect() is not None
    assert (chainer.current_host, str(chainer.getHostAddress())) == (0, str(address_of(server)))
    chainer.nextHost()
    assert chainer.current_host == 0
    assert chainer.fitting_router() is None
    with pytest.raises(TypeError):
        chainer.routeConnection(asked.session)


@pytest.mark.parametrize(("arguments", "keywords"), [
    ((SockAddrInet("127.0.0.1", 1),), {}), (([SockAddrInet("127.0.0.1", 1)],), {}),
    (((SockAddrInet("127.0.0.1", 1),), None, 0), {}), ((), {"hosts": [SockAddrInet("127.0.0.1", 1)]}),
    ((SockAddrInet("127.0.0.1", 1),), {"local": None, "forge_addr": 0}),
])
def test_forms_of_release_1(arguments, keywords):
    chainer = FailoverChainer(*arguments, **keywords)
    assert list(chainer.hosts) == [SockAddrInet("127.0.0.1", 1)]
    assert (chainer.local, chainer.forge_addr, chainer.current_host) == (None, 0, 0)


@pytest.mark.parametrize(("arguments", "keywords"), [
    (([SockAddrInet("127.0.0.1", 1)],), {"round_robin": TRUE}),
    (([SockAddrInet("127.0.0.1", 1)],), {"timeout_connect": 5}),
    ((ZD_PROTO_TCP,), {"local": SockAddrInet("127.0.0.1", 0)}), ((), {"forge_addr": 1}),
    (([SockAddrInet("127.0.0.1", 1)], SockAddrInet("127.0.0.1", 0)), {"local": SockAddrInet("127.0.0.1", 0)}),
    ((), {"nonsense": 1}), (([SockAddrInet("127.0.0.1", 1)], None, 1), {"forge_addr": 1}),
])
def test_mixed_forms_are_refused_at_load(arguments, keywords):
    with pytest.raises(TypeError):
        FailoverChainer(*arguments, **keywords)


# constructors

def test_order_of_release_0_6(server):
    remote, local = address_of(server), SockAddrInet("127.0.0.77", 0)
    assert DirectedChainer(None, remote).remote is remote
    # two addresses are the later order
    chainer = DirectedChainer(remote, local)
    assert (chainer.remote, chainer.local) == (remote, local)


@pytest.mark.parametrize("make", [
    lambda: DirectedChainer(None), lambda: DirectedChainer("127.0.0.1"), lambda: InbandChainer("127.0.0.1"),
    lambda: TransparentChainer(forced_port=70000), lambda: TransparentChainer("127.0.0.1"),
    lambda: FailoverChainer(hosts=["127.0.0.1"]), lambda: FailoverChainer("127.0.0.1"),
])
def test_wrong_arguments_are_refused_at_load(make):
    with pytest.raises((PolicyError, TypeError)):
        make()


def test_router_attributes():
    for chainer in (TransparentChainer(), DirectedChainer(ELSEWHERE), InbandChainer(), FailoverChainer([ELSEWHERE])):
        assert (chainer.forge_addr, chainer.forge_port) == (0, Z_PORT_ANY)
        assert chainer.overrideable == isinstance(chainer, InbandChainer)
        assert list(inspect.signature(chainer.connectServer).parameters) == ["session", "host", "port"]


def test_old_forms_are_reported_with_their_place():
    with captured_log() as log:
        DirectedChainer(None, ELSEWHERE)
        FailoverChainer([ELSEWHERE])
        FailoverChainer()
        DirectedChainer(ELSEWHERE)
    lines = log.find("Old form of a chainer;")
    assert [line.arguments[0] for line in lines] == ["DirectedChainer(local, remote)", "FailoverChainer(hosts)"]
    assert all("test_chainer_first_generation.py" in line.text for line in lines)


# both APIs

def test_connect_server_of_the_site_gets_the_hint_of_the_proxy(asking, server):
    """Scenario 22, and the hint."""
    hints = []

    class Own(AbstractChainer):
        def connectServer(self, session, host, port):
            hints.append((host, port))
            return self.establishConnection(session, None, address_of(server))

    asked = asking(TransparentRouter(), Own(), wanted=ELSEWHERE)
    stream = asked.connect("mail.example", 25)
    assert isinstance(stream, Stream)
    asked.proxy._disconnect_server()
    asked.connect()
    assert hints == [("mail.example", 25), ("", 0)]


def test_access_rules_hold_for_chainers_of_the_site(asking, server):
    """Scenario 22."""

    class Own(AbstractChainer):
        def connectServer(self, session, host, port):
            return self.establishConnection(session, None, address_of(server))

    asked = asking(TransparentRouter(), Own(), limit_target_zones_to=("nowhere",))
    assert asked.connect() is None
    assert asked.verdict == "DENIED_BY_POLICY"
    assert server.peers == []


def test_chainer_of_the_site_that_never_calls_our_constructor(asking, server):
    class Own(AbstractChainer):
        def __init__(self, where):
            self.where = where

        def connectServer(self, session, host, port):
            return self.establishConnection(session, None, self.where)

    assert asking(TransparentRouter(), Own(address_of(server))).connect() is not None


def test_site_extends_a_class_by_connect_server(asking, server):
    """Overriding connectServer() and calling the base's: the way of release 1 to add something."""
    calls = []

    class Own(DirectedChainer):
        def connectServer(self, session, host, port):
            calls.append((host, port))
            return DirectedChainer.connectServer(self, session, host, port)

    asked = asking(InbandRouter(), Own(address_of(server)))
    asked.session.connect_hint = ("no.such.host", 1)
    assert asked.session.chainer.chainParent(asked.session) is not None
    assert calls == [("no.such.host", 1)]


def test_site_extends_a_class_by_both(asking, server):
    class Own(ConnectChainer):
        def chainParent(self, session):
            return ConnectChainer.chainParent(self, session)

        def connectServer(self, session, host, port):
            return ConnectChainer.connectServer(self, session, host, port)

    assert asking(DirectedRouter(address_of(server)), Own()).connect() is not None


def test_connect_server_of_the_base_calls_chain_parent(asking, server, monkeypatch):
    monkeypatch.setattr(config.options, "permit_local_targets", TRUE)
    resolver = ResolverPolicy(None, HashResolver({"mail.example": "127.0.0.1"}))
    for host in ("mail.example", SockAddrInet("127.0.0.1", 1), "127.0.0.1"):
        asked = asking(InbandRouter(), ConnectChainer(), resolver_policy=resolver if host == "mail.example" else (
            ResolverPolicy(None, HashResolver({"127.0.0.1": "127.0.0.1"}))))
        assert asked.session.chainer.connectServer(asked.session, host, server.port) is not None
    server.wait_for_peers(3)
    asked = asking(InbandRouter(), ConnectChainer(), resolver_policy=resolver)
    assert asked.session.chainer.connectServer(asked.session, "other.example", 25) is None


def test_hint_is_not_resolved_twice(asking, server):
    """A name might lead elsewhere the second time."""
    asked_for = []

    class Counting(HashResolver):
        def resolve(self, host, port):
            asked_for.append(host)
            return HashResolver.resolve(self, host, port)

    class Own(InbandChainer):
        def connectServer(self, session, host, port):
            return InbandChainer.connectServer(self, session, host, port)

    chainer = Own()
    asked = alone(asking, chainer, resolver_policy=ResolverPolicy(None, Counting({"mail.example": "203.0.113.1"})))
    chainer.timeout_connect = 1
    asked.connect("mail.example", 25)
    assert asked_for == ["mail.example"]


def test_neither_method_overridden(asking):
    session = asking().session
    for call in (lambda: AbstractChainer().chainParent(session),
                 lambda: AbstractChainer().connectServer(session, "", 0)):
        with pytest.raises(NotImplementedError):
            call()


@pytest.mark.parametrize("kind", ["descriptor", "socket", "stream"])
def test_what_connect_server_of_the_site_may_return(asking, server, kind):
    class Own(AbstractChainer):
        def connectServer(self, session, host, port):
            sock = socket.create_connection((server.host, server.port))
            if kind == "socket":
                return sock
            return os.dup(sock.fileno()) if kind == "descriptor" else Stream(sock, "mine")

    stream = asking(TransparentRouter(), Own()).connect()
    assert exchange(stream.sock) == b"ping"
    assert stream.fd == int(stream) == stream.fileno()


@pytest.mark.parametrize("value", ["yes", True, 1.5, object()])
def test_what_it_may_not_return(asking, value):
    class Own(AbstractChainer):
        def connectServer(self, session, host, port):
            return value

    asked = asking(TransparentRouter(), Own())
    assert asked.connect() is None
    assert asked.log.find("Chainer returned no stream;")


def test_chainer_that_asks_another_chainer(asking, server):
    """The mark that a connectServer() is running belongs to one chainer, not to the session."""

    class Inner(AbstractChainer):
        def connectServer(self, session, host, port):
            return self.establishConnection(session, None, address_of(server))

    inner = Inner()

    class Outer(AbstractChainer):
        def connectServer(self, session, host, port):
            return inner.chainParent(session)

    asked = asking(TransparentRouter(), Outer())
    assert asked.connect() is not None
    assert vars(asked.session)["chainers_connecting"] == ()


def test_unix_address_as_remote(asking, tmp_path):
    path = str(tmp_path / "server")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        assert alone(asking, DirectedChainer(SockAddrUnix(path))).connect() is not None


# in services

POLICY = """
    from Zorp.Core import *
    from Zorp.Plug import *

    InetZone("all", "0.0.0.0/0", inbound_services=["*"], outbound_services=["*"])

    class FingerLike(PlugProxy):
        pass

    def gateway():
        Service("svc", $arguments)
        Listener(SockAddrInet("127.0.0.1", 50079), "svc")
    """
FORMS = {
    "chainer second, proxy third": "DirectedChainer(SockAddrInet('127.0.0.1', $port)), PlugProxy",      # scenario 19
    "forced port": "TransparentChainer(None, 0, $port), PlugProxy",                                     # scenario 20
    "as router": "FingerLike, router=DirectedChainer(SockAddrInet('127.0.0.1', $port))",                # scenario 21
    "as chainer": "PlugProxy, chainer=DirectedChainer(SockAddrInet('127.0.0.1', $port))",
    "failover": "FailoverChainer((SockAddrInet('127.0.0.1', $port), SockAddrInet('127.0.0.1', $port))), PlugProxy",
    "today": "PlugProxy, router=DirectedRouter(SockAddrInet('127.0.0.1', $port)), chainer=FailoverChainer()",
}


@pytest.mark.parametrize("form", FORMS)
def test_service_in_each_form(server, form):
    """Scenarios 18 to 21: a client reaches the server."""
    arguments = FORMS[form].replace("$port", str(server.port))
    with Gateway(POLICY, arguments=arguments) as gateway:
        client = gateway.connect(to=("127.0.0.1", 80))
        assert exchange(client) == b"ping"
        client.close()
        server.wait_for_peers(1)


def test_failover_service_alternates(server):
    """Scenario 18."""
    with Server(host="127.0.0.2") as other:
        arguments = (f"FailoverChainer((SockAddrInet('127.0.0.1', {server.port}),"
                     f" SockAddrInet('127.0.0.2', {other.port}))), PlugProxy")
        with Gateway(POLICY, arguments=arguments) as gateway:
            for _ in range(4):
                client = gateway.connect(to=("127.0.0.1", 80))
                assert exchange(client) == b"ping"
                client.close()
            server.wait_for_peers(2)
            other.wait_for_peers(2)
            assert (len(server.peers), len(other.peers)) == (2, 2)
            # when one is down, then the other serves all
            other.close()
            for _ in range(2):
                client = gateway.connect(to=("127.0.0.1", 80))
                assert exchange(client) == b"ping"
                client.close()


def test_service_whose_servers_are_all_down():
    """Scenario 16: the client is closed."""
    with unused_port() as port:
        arguments = (f"PlugProxy, router=DirectedRouter([SockAddrInet('127.0.0.1', {port})]),"
                     " chainer=FailoverChainer()")
        with Gateway(POLICY, arguments=arguments) as gateway:
            assert ended(gateway.connect(to=("127.0.0.1", 80)))
            gateway.logged.wait_for("All destinations are down for two full iterations, giving up;")


def test_router_of_a_session_stand_in():
    """routeConnection() needs of a session what routers need."""
    session = types.SimpleNamespace(
        client_address=SockAddrInet("127.0.0.5", 1), client_local=SockAddrInet("127.0.0.1", 80), target_local=None,
        target_address=(), service=types.SimpleNamespace(snat_policy=None))
    session.setTargetAddress = lambda target: setattr(session, "target_address", (target,))
    TransparentChainer(None, 1, 8080).routeConnection(session)
    assert str(session.target_local) == "AF_INET(127.0.0.5:0)"
    assert [str(target) for target in session.target_address] == ["AF_INET(127.0.0.1:8080)"]
    assert session.target_address_inband == FALSE
