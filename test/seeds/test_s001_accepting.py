"""S001, accepting incoming connections: from the open port to the running proxy."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from test.seeds import POLICIES, covers
from test.support.daemon import ROOT
from test.support.gateway import Gateway, Server, ended, exchange
from test.support.ports import free_port


@pytest.fixture
def server():
    with Server() as running:
        yield running


@pytest.fixture
def gateway(server):
    """The paper's policy: chain 0 is a simple listener, chain 1 decides by zones."""
    with Gateway(POLICIES / "s001_listeners.policy", server_port=server.port) as running:
        yield running


ONE = """
    from Zorp.Core import *
    from Zorp.Plug import *
    from Zorp.Dispatch import ZD_PRI_RELATED
    from Zorp.Session import MasterSession, StackedSession

    Zone("office", ["127.0.0.0/24"])
    Zone("internet", ["0.0.0.0/0"])

    class Observed(PlugProxy):
        def config(self):
            PlugProxy.config(self)
            SEEN.setdefault("sessions", []).append(self.session)
            SEEN.setdefault("proxies", []).append(self)
    $before

    def gateway():
        $service
        $dispatcher
"""
_SERVICE = 'Service("svc", Observed, router=DirectedRouter(SockAddrInet("127.0.0.1", $server_port)))'
_DISPATCHER = 'Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", 50080), ZD_PROTO_TCP), service="svc")'


def one(before="", service=_SERVICE, dispatcher=_DISPATCHER, **values):
    """A gateway whose only service shows its sessions in SEEN."""
    text = ONE.replace("$before", before).replace("$service", service).replace("$dispatcher", dispatcher)
    return Gateway(text, **values)


@covers("S001-1", "S001-2")
def test_several_ports_are_opened_through_dispatchers(zorp, server):
    # given two dispatchers, one of them with two addresses
    daemon = zorp("""
        from Zorp.Core import *
        from Zorp.Plug import *
        Zone("internet", ["0.0.0.0/0"])
        def intra():
            Service("plug", PlugProxy, router=DirectedRouter(SockAddrInet("127.0.0.1", $server_port)))
            Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", $port), ZD_PROTO_TCP), service="plug")
            Dispatcher([DBSockAddr(SockAddrInet("127.0.0.1", $second), ZD_PROTO_TCP),
                        DBSockAddr(SockAddrInet("127.0.0.2", $second), ZD_PROTO_TCP)], service="plug")
        """, server_port=server.port, second=free_port())
    # then all three places answer
    for where in (("127.0.0.1", daemon.port), ("127.0.0.1", daemon.values["second"]),
                  ("127.0.0.2", daemon.values["second"])):
        with socket.create_connection(where, 10) as client:
            assert exchange(client) == b"ping"


@covers("S001-3", "S001-6")
def test_expected_connections_go_to_who_waits_for_them(server):
    # given a listener, and on the same address somebody with the priority of a running proxy
    with one(server_port=server.port) as gateway:
        taken = []
        names = gateway.names
        bind = names["DBSockAddr"](names["SockAddrInet"]("127.0.0.1", 50080), names["ZD_PROTO_TCP"])

        def expected(stream, client_address, client_local, client_listen):
            taken.append(client_address)
            stream.close()
            return True

        related = names["Dispatch"]("svc/related", bind, gateway.policy.ZD_PRI_RELATED, expected, {})
        # when a client comes
        assert ended(gateway.connect())
        # then the one with the lower number has it; without that one the listener does
        assert len(taken) == 1
        related.destroy()
        client = gateway.connect()
        assert exchange(client) == b"ping"
        client.close()


@covers("S001-4")
def test_a_second_flow_of_a_client_joins_its_running_plug(server):
    with one("Observed.secondary_mask = 0xD", server_port=server.port) as gateway:
        # given a running plug, when the same client opens another connection to the same target
        first = gateway.connect()
        assert exchange(first) == b"ping"
        second = gateway.connect()
        assert exchange(second) == b"ping"
        # then no second proxy was started
        assert len(gateway.seen["proxies"]) == 1
        first.close()
        second.close()


@covers("S001-5", "S001-14", "S001-26")
def test_every_connection_has_a_session_of_its_own(server, gateway):
    # when two clients come
    clients = [gateway.connect(), gateway.connect()]
    assert [exchange(client) for client in clients] == [b"ping", b"ping"]
    # then each has its own master session and id, and a stacked one for the proxy
    first, second = gateway.seen["sessions"]
    assert first.getMasterSession() is not second.getMasterSession()
    assert first.session_id != second.session_id
    session_types = {type(session).__name__ for session in (first, second)}
    assert session_types == {"StackedSession"}
    for client in clients:
        client.close()


@covers("S001-7", "S001-9", "S001-11", "S001-12", "S001-13")
def test_accepted_is_told_who_came_and_where_to(server):
    # given a dispatcher with an accepted() of its own
    before = """
    class Telling(Dispatcher):
        def accepted(self, stream, client_address, client_local, client_listen):
            SEEN["accepted"] = (stream, client_address, client_local, client_listen)
            return Dispatcher.accepted(self, stream, client_address, client_local, client_listen)
    """
    with one(before, dispatcher=_DISPATCHER.replace("Dispatcher(", "Telling(", 1), server_port=server.port) as gateway:
        # when a client comes that meant to reach another address
        client = gateway.connect(to=("192.0.2.80", 8080), source="127.0.0.5")
        assert exchange(client) == b"ping"
        # then the stream is the session's, and the addresses are the client's, the original one, and the listener's
        stream, client_address, client_local, client_listen = gateway.seen["accepted"]
        assert stream is gateway.seen["sessions"][0].client_stream
        assert (client_address.ip_s, client_address.port) == ("127.0.0.5", client.getsockname()[1])
        assert (client_local.ip_s, client_local.port) == ("192.0.2.80", 8080)
        assert client_listen.sa.port == 50080
        client.close()


@covers("S001-8")
def test_every_listener_and_receiver_is_a_dispatcher(gateway):
    # given the three listeners and the three receivers
    names = [f"{prefix}{kind}" for kind in ("Listener", "Receiver") for prefix in ("", "Zone", "CSZone")]
    # then each is a dispatcher, and accepted() comes from there
    base = gateway.names["Dispatcher"].__mro__[-2]
    for name in names:
        assert issubclass(gateway.names[name], base)
        assert callable(gateway.names[name].accepted)


@covers("S001-15", "S001-22", "S001-25")
def test_the_session_knows_the_client(server, gateway):
    # when a client comes from the office
    client = gateway.connect(source="127.0.0.5")
    assert exchange(client) == b"ping"
    # then the master session has its address, port and zone
    master = gateway.seen["sessions"][0].getMasterSession()
    assert type(master).__name__ == "MasterSession"
    assert (master.client_address.ip_s, master.client_address.port) == ("127.0.0.5", client.getsockname()[1])
    assert master.client_zone.getName() == "office"
    client.close()


@covers("S001-16")
def test_a_simple_listener_starts_the_same_service_always(server, gateway):
    # when two clients come to it
    for source in ("127.0.0.5", "127.0.0.6"):
        client = gateway.connect(source=source)
        assert exchange(client) == b"ping"
        client.close()
    # then both get the one service
    assert gateway.seen["services"] == ["office_fixed", "office_fixed"]


ZONE_PAIRS = {
    "named pair": ("127.0.0.5", "127.2.0.1", "office_dmz"),
    "child of a named zone": ("127.0.1.5", "127.2.0.1", "office_dmz"),
    "other server": ("127.0.0.5", "192.0.2.1", "any"),
    "other client": ("127.8.0.1", "127.2.0.1", "any"),
}


@covers("S001-17")
@pytest.mark.parametrize(("source", "destination", "expected"), ZONE_PAIRS.values(), ids=ZONE_PAIRS)
def test_a_zone_listener_decides_by_client_and_server(server, gateway, source, destination, expected):
    # when a client of some zone wants to reach some address
    client = gateway.connect(to=(destination, 80), source=source, chain=1)
    assert exchange(client) == b"ping"
    # then the service is the one of the pair of zones, or of the parents, or of the stars
    assert gateway.seen["services"] == [expected]
    client.close()


@covers("S001-18", "S001-33", "S001-34")
def test_the_router_runs_before_the_proxy(server):
    # given a router that tells when it runs, and a proxy that looks at its work in config()
    before = """
    class Telling(DirectedRouter):
        def routeConnection(self, session):
            DirectedRouter.routeConnection(self, session)
            SEEN["routed"] = (session.target_address[0].port, session.target_local.ip_s)

    class Looking(PlugProxy):
        def config(self):
            PlugProxy.config(self)
            SEEN["seen"] = (self.session.target_address[0].port, self.session.target_local.ip_s)
    """
    service = ('Service("svc", Looking, router=Telling(SockAddrInet("127.0.0.1", $server_port), forge_addr=TRUE))')
    with one(before, service, server_port=server.port) as gateway:
        # when a client comes
        client = gateway.connect(source="127.0.0.5")
        assert exchange(client) == b"ping"
        # then both addresses of the server side stood in the session before the proxy was asked
        assert gateway.seen["routed"] == gateway.seen["seen"] == (server.port, "127.0.0.5")
        client.close()


@covers("S001-19")
def test_a_service_that_may_not_leave_the_client_s_zone_is_refused(server, gateway):
    # when a client comes from a zone without the service in its list
    client = gateway.connect(source="127.7.0.1")
    # then it is closed and the log says what was not permitted
    assert ended(client)
    gateway.logged.wait_for("Outbound service not permitted; service='office_fixed'")
    gateway.logged.wait_for("DAC policy violation")
    assert server.peers == []


@covers("S001-20", "S001-40")
def test_the_service_starts_the_proxy_by_making_one(server):
    # given a service class and a proxy class of the site
    before = """
    class Starting(Service):
        def startInstance(self, session):
            SEEN["started"] = session
            return Service.startInstance(self, session)

    class Made(PlugProxy):
        def __init__(self, session):
            SEEN["made"] = session
            PlugProxy.__init__(self, session)
    """
    service = _SERVICE.replace("Service(", "Starting(", 1).replace("Observed", "Made")
    with one(before, service, server_port=server.port) as gateway:
        # when a client comes
        client = gateway.connect()
        assert exchange(client) == b"ping"
        # then the service was given the session and the proxy class one stacked on it
        assert gateway.seen["started"] is gateway.seen["made"].getMasterSession()
        assert gateway.seen["made"].owner is gateway.seen["started"]
        client.close()


@covers("S001-21")
def test_a_service_holds_everything_in_one_place(gateway):
    # given a service of the policy
    service = gateway.service("office_fixed")
    # then it knows what its connections are made of
    parts = ("name", "proxy_class", "snat_policy", "dnat_policy", "authentication_policy", "router", "chainer")
    for attribute in parts:
        assert hasattr(service, attribute)


@covers("S001-23")
def test_the_session_knows_the_server_after_the_connection(server):
    # given a proxy that looks when it ends
    before = """
    class Looking(PlugProxy):
        def shutdown(self):
            SEEN["server"] = (self.session.server_address.ip_s, self.session.server_address.port,
                              self.session.server_zone.getName(), self.session.server_local.port)
    """
    with one(before, _SERVICE.replace("Observed", "Looking"), server_port=server.port) as gateway:
        # when a client has been served
        client = gateway.connect()
        assert exchange(client) == b"ping"
        client.close()
        gateway.logged.wait_for("Ending proxy instance")
        # then address, port and zone of the server are there, and our own port towards it
        assert gateway.seen["server"] == ("127.0.0.1", server.port, "office", server.peers[0][1])


@covers("S001-24", "S001-26", "S001-27", "S001-28", "S001-29", "S001-30")
def test_sessions_inherit_downwards_only(server, gateway):
    # given the session of a served client, with one below the proxy's and one below that
    client = gateway.connect(source="127.0.0.5")
    assert exchange(client) == b"ping"
    top = gateway.seen["sessions"][0]
    middle = type(top)(top)
    bottom = type(top)(middle)
    # when upper levels change something or add something
    top.note, middle.note, top.extra = "top", "middle", "from the top"
    # then the bottom sees the client, the middle's change and the addition; the owners are a chain
    assert (bottom.client_address.ip_s, bottom.note, bottom.extra) == ("127.0.0.5", "middle", "from the top")
    assert bottom.owner is middle
    assert middle.owner is top
    assert bottom.getMasterSession() is top.owner
    assert [type(session).__name__ for session in (top.owner, top)] == ["MasterSession", "StackedSession"]
    # and what the bottom writes goes nowhere else
    bottom.note = "bottom"
    assert (top.note, middle.note, bottom.note) == ("top", "middle", "bottom")
    client.close()


@covers("S001-32")
def test_every_router_is_an_abstract_router(gateway):
    # given the three routers
    names = gateway.names
    for name in ("TransparentRouter", "DirectedRouter", "InbandRouter"):
        # then all are of one family
        assert issubclass(names[name], names["AbstractRouter"])


ROUTES = {
    "transparent": ("TransparentRouter()", ("192.0.2.80", 8080), False),
    "transparent, other port": ("TransparentRouter(forced_port=25)", ("192.0.2.80", 25), False),
    "directed": ("DirectedRouter(SockAddrInet('198.51.100.1', 80))", ("198.51.100.1", 80), False),
    "inband": ("InbandRouter()", None, True),
}


@covers("S001-35", "S001-36", "S001-37")
@pytest.mark.parametrize(("router", "target", "inband"), ROUTES.values(), ids=ROUTES)
def test_routers_choose_the_server(router, target, inband):
    # given a proxy that tells the target and then gives up
    before = """
    class Looking(PlugProxy):
        def config(self):
            session = self.session
            SEEN["target"] = [(address.ip_s, address.port) for address in session.target_address]
            SEEN["inband"] = bool(session.target_address_inband)
            raise RuntimeError("seen enough")
    """
    with one(before, f'Service("svc", Looking, router={router})') as gateway:
        # when a client wants to reach some address
        client = gateway.connect(to=("192.0.2.80", 8080))
        assert ended(client)
        # then the router has named the server, or left it to the protocol
        assert gateway.seen == {"target": [target] if target else [], "inband": inband}


@covers("S001-38")
def test_translation_may_change_the_router_s_decision(server):
    # given a router that points into a range that is translated
    before = """
    NATPolicy("inwards", GeneralNAT([(InetSubnet("0.0.0.0/0"), InetSubnet("192.0.2.0/24"),
                                      InetSubnet("127.0.0.0/24"))]))
    """
    service = ('Service("svc", Observed, dnat_policy="inwards",'
               ' router=DirectedRouter(SockAddrInet("192.0.2.1", $server_port)))')
    with one(before, service, server_port=server.port) as gateway:
        # when a client comes, then the translated server serves it
        client = gateway.connect()
        assert exchange(client) == b"ping"
        client.close()


@covers("S001-39")
def test_a_service_refuses_more_connections_than_its_limit(server):
    # given a service for one connection at a time, and a client that holds it
    with one(service=_SERVICE.replace("Observed,", "Observed, max_instances=1,"), server_port=server.port) as gateway:
        first = gateway.connect()
        assert exchange(first) == b"ping"
        # when a second client comes
        assert ended(gateway.connect())
        # then the log says why; after the first has left a third is served
        gateway.logged.wait_for("Connection over permitted limits; info='Limit error: Instance limit reached'")
        first.close()
        gateway.logged.wait_for("Ending proxy instance")
        third = gateway.connect()
        assert exchange(third) == b"ping"
        third.close()


@covers("S001-41")
def test_a_proxy_module_is_loaded_when_a_policy_asks_for_it():
    # when a policy loads the language without a protocol
    program = "import sys; from Zorp.Core import *; print('Zorp.Smtp' in sys.modules); import Zorp.Smtp; print('ok')"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    # then the protocol's module is not there until it is imported
    assert result.stdout.split() == ["False", "ok"]


@covers("S001-42")
def test_every_session_has_a_thread(server):
    # given a proxy that tells its thread
    before = """
    import threading
    class Telling(PlugProxy):
        def config(self):
            PlugProxy.config(self)
            SEEN.setdefault("threads", []).append((threading.get_ident(), threading.current_thread().name))
    """
    with one(before, _SERVICE.replace("Observed", "Telling"), server_port=server.port) as gateway:
        # when two clients are served at once
        clients = [gateway.connect(), gateway.connect()]
        assert [exchange(client) for client in clients] == [b"ping", b"ping"]
        # then each has a thread of its own
        assert len({ident for ident, _ in gateway.seen["threads"]}) == 2
        for client in clients:
            client.close()


@covers("S001-10")
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["TCP", "UDP"])
def test_tcp_and_udp_look_the_same(zorp, kind):
    # given a server of either protocol, and the same plug in front of it
    with socket.socket(socket.AF_INET, kind) as there:
        there.bind(("127.0.0.1", 0))
        there.settimeout(10)
        name = "TCP" if kind == socket.SOCK_STREAM else "UDP"
        daemon = zorp("""
            from Zorp.Core import *
            from Zorp.Plug import *

            def intra():
                Zone("all", ["0.0.0.0/0"])
                Service("plug", PlugProxy, router=DirectedRouter(SockAddrInet("127.0.0.1", $server_port)))
                Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", $port), ZD_PROTO_$name), service="plug")
            """, port=free_port(kind), name=name, server_port=there.getsockname()[1])
        if kind == socket.SOCK_STREAM:
            there.listen()
        with socket.socket(socket.AF_INET, kind) as client:
            client.settimeout(10)
            client.connect(("127.0.0.1", daemon.port))
            # when the client speaks
            client.send(b"ping")
            end = there.accept()[0] if kind == socket.SOCK_STREAM else there
            data, peer = end.recvfrom(100)
            # then it reaches the server, and the answer the client
            assert data == b"ping"
            end.send(b"pong") if kind == socket.SOCK_STREAM else end.sendto(b"pong", peer)
            assert client.recv(100) == b"pong"
            # and the log differs in the protocol's name only
            line = daemon.log.wait_for("core.session", 3, "Starting proxy instance")
            assert line.fields["client_protocol"] == name
        if kind == socket.SOCK_STREAM:
            end.close()


@covers("S001-31")
def test_the_verdict_of_a_child_reaches_its_parent(server):
    # given a proxy that stacks another and asks afterwards what that one said
    before = """
    from Zorp.AnyPy import *
    from Zorp.stacking.stacking import stack_object
    class Child(AnyPyProxy):
        def proxyThread(self):
            self.set_verdict(ANYPY_REJECT, "no good")
    class Parent(AnyPyProxy):
        def proxyThread(self):
            stacked = stack_object(self, Child, hears_verdicts=True)
            while stacked.server.recv(100):
                pass
            SEEN["verdict"] = (stacked.verdict.value, stacked.verdict.description)
    """
    with one(before, _SERVICE.replace("Observed", "Parent"), server_port=server.port) as gateway:
        # when the child has given its verdict
        client = gateway.connect()
        assert client.recv(1) == b""
        # then the parent knows it
        assert gateway.seen["verdict"] == (3, "no good")
