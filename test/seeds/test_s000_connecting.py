"""S000, establishing server connections: when, where to and by whom the server is connected."""

from __future__ import annotations

import contextlib
import importlib
import socket
import time

import pytest

from test.seeds import POLICIES, covers
from test.support.gateway import Gateway, Server, ended, exchange
from test.support.ports import free_port

# One plug service named "plug"; $service is what a test wants to say about it.
PLUG = """
    from Zorp.Core import *
    from Zorp.Plug import *
    from Zorp.Proxy import Proxy
    from Zorp.Chainer import *
    from Zorp.Router import AbstractRouter

    Zone("firewall", ["127.0.0.0/24"])
    Zone("forbidden", ["127.9.0.0/16"])
    Zone("internet", ["0.0.0.0/0"])
    $before

    def gateway():
        Service("plug", $proxy_class, $service)
        Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", 50080), ZD_PROTO_TCP), service="plug")
"""

# A protocol of our own that names its server, as non-transparent HTTP does: its first line is the name.
NAMING = """
    class Naming(PlugProxy):
        def _engine_main(self):
            host, port = self._client.recv().decode().split(":")
            SEEN["connected"] = self._connect_server(host, int(port))
            self._client.send(b"1" if SEEN["connected"] else b"0")

        def setServerAddress(self, host, port):
            SEEN.setdefault("calls", []).append("setServerAddress")
            return PlugProxy.setServerAddress(self, host, port)

        def connectServer(self):
            SEEN.setdefault("calls", []).append("connectServer")
            return PlugProxy.connectServer(self)
"""


def plug(service="router=DirectedRouter(SockAddrInet('127.0.0.1', $server_port))", before="", proxy_class="PlugProxy",
         **values):
    """A gateway with one plug service; $names in `service` and `before` are replaced by values."""
    text = PLUG.replace("$service", service).replace("$before", before).replace("$proxy_class", proxy_class)
    return Gateway(text, **values)


@pytest.fixture
def server():
    with Server() as running:
        yield running


@covers("S000-1", "S000-11", "S000-13", "S000-27")
def test_a_started_proxy_takes_over_the_connection(server):
    # given a service that names no chainer
    with plug(server_port=server.port) as gateway:
        # when a client comes from an address of its own
        client = gateway.connect(source="127.0.0.5")
        # then the proxy carries its bytes, through a default chainer, and the server sees the firewall
        assert exchange(client) == b"ping"
        chainer = gateway.service("plug").chainer
        assert isinstance(chainer, gateway.names["ConnectChainer"])
        assert server.peers[0][0] == "127.0.0.1"
        client.close()


@covers("S000-4")
def test_the_proxy_decides_when_and_the_policy_layer_connects(server):
    # given a protocol that learns its server from the client
    with plug("router=InbandRouter()", NAMING, "Naming", server_port=server.port) as gateway:
        gateway.names["config"].options.permit_local_targets = True
        # when the client has not spoken, nothing is connected; when it has
        client = gateway.connect()
        gateway.logged.wait_for("calling event; __post_config__")
        assert server.peers == []
        client.sendall(b"127.0.0.1:%d" % server.port)
        assert client.recv(1) == b"1"
        # then the hint came first and the connection second
        assert gateway.seen["calls"] == ["setServerAddress", "connectServer"]


@covers("S000-5")
def test_a_hint_has_no_effect_when_the_policy_names_the_server(server):
    # given a router that names a server and may not be overridden
    with plug(before=NAMING, proxy_class="Naming", server_port=server.port) as gateway:
        # when the client asks for another one, where nobody listens
        client = gateway.connect()
        client.sendall(b"127.0.0.1:%d" % free_port())
        # then the policy's server is connected
        assert client.recv(1) == b"1"
        server.wait_for_peers(1)


@covers("S000-6")
def test_a_hint_is_used_when_the_policy_names_no_server(server):
    # given a router that leaves the server to the protocol
    with plug("router=InbandRouter()", NAMING, "Naming") as gateway:
        gateway.names["config"].options.permit_local_targets = True
        # when the client names one
        client = gateway.connect()
        client.sendall(b"127.0.0.1:%d" % server.port)
        # then that one is connected
        assert client.recv(1) == b"1"
        server.wait_for_peers(1)


@covers("S000-8", "S000-14", "S000-15", "S000-22")
def test_the_connection_follows_what_the_session_says(server):
    # given a router that writes the target into the session, and an own chainer that reads it there
    before = """
    class Here(AbstractRouter):
        def routeConnection(self, session):
            AbstractRouter.routeConnection(self, session)
            session.setTargetAddress(SockAddrInet("127.0.0.1", $server_port))

    class Watching(ConnectChainer):
        def chainParent(self, session):
            SEEN.setdefault("targets", []).append((session.target_address[0].port, session.target_local))
            return ConnectChainer.chainParent(self, session)
    """
    with plug("router=Here(FALSE, Z_PORT_ANY), chainer=Watching()", before, server_port=server.port) as gateway:
        # when a client comes
        client = gateway.connect()
        assert exchange(client) == b"ping"
        # then the chainer ran once and found both of the router's answers
        assert gateway.seen["targets"] == [(server.port, None)]
        client.close()


@covers("S000-9", "S000-10")
def test_a_stacked_proxy_gets_a_prepared_server_side(server):
    # given the session of a proxy that stands inside another one, as its parent prepares it
    with plug(server_port=server.port) as gateway:
        names = gateway.names
        parent = importlib.import_module("Zorp.Session").MasterSession()
        session = importlib.import_module("Zorp.Session").StackedSession(parent)
        session.client_stream, _upstream = names["streamPair"](socket.AF_UNIX, socket.SOCK_STREAM)
        session.server_stream, _downstream = names["streamPair"](socket.AF_UNIX, socket.SOCK_STREAM)
        prepared = session.server_stream
        # when its proxy connects
        child = gateway.policy.PlugProxy(session)
        connected = child.connectServer()
        # then it has no chainer and gets the prepared end, once, and nobody connects anywhere
        assert session.chainer is None
        assert connected is prepared
        assert child.connectServer() is None
        gateway.logged.wait_for("Internal error, stacked proxy reconnected to server multiple times")
        assert server.peers == []


@covers("S000-12")
def test_every_chainer_is_an_abstract_chainer():
    # given every name of the module that ends in Chainer
    with plug(server_port=1) as gateway:
        chainers = [value for name, value in vars(gateway.policy).items() if name.endswith("Chainer")]
        # then all are of one family
        assert len(chainers) >= 10
        assert all(issubclass(chainer, gateway.policy.AbstractChainer) for chainer in chainers)


@covers("S000-16", "S000-17", "S000-29", "S000-31")
def test_addresses_are_translated_before_the_connection(server):
    # given a translation that overrides a directed router
    service = ("router=DirectedRouter(SockAddrInet('192.0.2.1', $server_port)), dnat_policy='to_loopback'")
    before = """
    NATPolicy("to_loopback", GeneralNAT([(InetSubnet("0.0.0.0/0"), InetSubnet("192.0.2.0/24"),
                                          InetSubnet("127.0.0.0/24"))]))
    class Watching(PlugProxy):
        def shutdown(self):
            SEEN["zone"] = self.session.server_zone.getName()
    """
    with plug(service, before, "Watching", server_port=server.port) as gateway:
        # when a client comes
        client = gateway.connect()
        assert exchange(client) == b"ping"
        client.close()
        gateway.logged.wait_for("Ending proxy instance")
        # then the log tells of the mapping first, and the zone is the translated address's
        texts = gateway.logged.texts()
        mapped, connected = (next(i for i, text in enumerate(texts) if text.startswith(start))
                             for start in ("After NAT mapping", "Server connection established"))
        assert mapped < connected
        assert gateway.seen["zone"] == "firewall"


@covers("S000-18")
def test_a_forbidden_server_gets_no_packet(server):
    # given a service that may leave for one zone only, and a server in another
    service = ("router=DirectedRouter(SockAddrInet('127.9.0.1', $server_port)), limit_target_zones_to=('firewall',)")
    with Server(host="127.9.0.1") as forbidden, plug(service, server_port=forbidden.port) as gateway:
        # when a client comes
        client = gateway.connect()
        # then it is turned away by access control and the server never hears of it
        assert ended(client)
        gateway.logged.wait_for("DAC policy violation; info='DAC policy violation: Server connection is not permitted'")
        assert forbidden.peers == []


@contextlib.contextmanager
def _deaf_server():
    """A port that answers no new connection: its queue is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as stack:
        while True:
            filler = stack.enter_context(socket.socket())
            filler.settimeout(0.2)
            try:
                filler.connect(listener.getsockname())
            except TimeoutError:
                break
        yield listener.getsockname()[1]


@covers("S000-19", "S000-20", "S000-21")
def test_a_slow_server_delays_its_own_session_only(server):
    # given a service whose server does not answer, with an own deadline, and one whose server does
    before = """
    class Direct(DirectedRouter):
        def routeConnection(self, session):
            DirectedRouter.routeConnection(self, session)
            port = $deaf_port if session.client_address.ip_s == "127.0.0.9" else $server_port
            session.setTargetAddress(SockAddrInet("127.0.0.1", port))
    """
    service = "router=Direct(SockAddrInet('127.0.0.1', 1)), chainer=ConnectChainer(timeout_connect=3000)"
    with _deaf_server() as deaf, plug(service, before, deaf_port=deaf, server_port=server.port) as gateway:
        # when a client waits for the first one
        started = time.monotonic()
        waiting = gateway.connect(source="127.0.0.9")
        gateway.logged.wait_for("Initiating connection")
        # then another is served meanwhile
        client = gateway.connect()
        assert exchange(client) == b"ping"
        assert gateway.logged.find("Server connection failure") == []
        client.close()
        # and the first one's proxy is told of the failure when its time is over, not before
        assert ended(waiting)
        assert time.monotonic() - started >= 2.9
        gateway.logged.wait_for("Server connection failure")


@covers("S000-23", "S000-24")
def test_failover_takes_the_next_server(server):
    # given two servers, the first of them dead
    service = ("router=DirectedRouter((SockAddrInet('127.0.0.1', $dead_port), "
               "SockAddrInet('127.0.0.1', $server_port))),"
               " chainer=FailoverChainer()")
    with plug(service, server_port=server.port, dead_port=free_port()) as gateway:
        # when a client comes
        client = gateway.connect()
        # then the second one serves it
        assert exchange(client) == b"ping"
        client.close()


@covers("S000-24")
def test_failover_alternates_when_asked_to(server):
    # given two servers that live, tried round robin
    service = ("router=DirectedRouter((SockAddrInet('127.0.0.1', $other_port), "
               "SockAddrInet('127.0.0.1', $server_port))),"
               " chainer=FailoverChainer(round_robin=TRUE)")
    with Server() as other, plug(service, server_port=server.port, other_port=other.port) as gateway:
        # when four clients come one after the other
        for _ in range(4):
            client = gateway.connect()
            assert exchange(client) == b"ping"
            client.close()
        # then each server has had two
        assert (len(server.peers), len(other.peers)) == (2, 2)


@covers("S000-25")
def test_a_failed_server_is_tried_again_after_a_while(server):
    # given a server that is down at first, and a chainer that forgets after one second
    port = free_port()
    service = ("router=DirectedRouter((SockAddrInet('127.0.0.1', $first_port), "
               "SockAddrInet('127.0.0.1', $server_port))),"
               " chainer=FailoverChainer(timeout_state=1000)")
    with plug(service, server_port=server.port, first_port=port) as gateway:
        client = gateway.connect()
        assert exchange(client) == b"ping"
        client.close()
        failed = time.monotonic()
        # when it comes back
        with Server(port=port) as first:
            client = gateway.connect()
            assert exchange(client) == b"ping"
            remembered = not first.peers
            client.close()
            # then it is used again, though not before the time is over
            while not first.peers and time.monotonic() < failed + 10:
                client = gateway.connect()
                assert exchange(client) == b"ping"
                client.close()
                gateway.logged.wait_for("Ending proxy instance")
            assert first.peers
            assert remembered or time.monotonic() - failed > 1


@covers("S000-26")
def test_proxies_stand_side_by_side(server):
    # given a second proxy between the first one and the server
    before = """
    class Left(PlugProxy):
        def config(self):
            PlugProxy.config(self)
            SEEN["left"] = self.session.session_id

    class Right(PlugProxy):
        def config(self):
            PlugProxy.config(self)
            SEEN["right"] = self.session.session_id
    """
    service = ("router=DirectedRouter(SockAddrInet('127.0.0.1', $server_port)),"
               " chainer=SideStackChainer(Right)")
    with plug(service, before, "Left", server_port=server.port) as gateway:
        # when bytes pass
        client = gateway.connect()
        assert exchange(client) == b"ping"
        # then both have seen the session, and the log says how they were joined
        assert set(gateway.seen) == {"left", "right"}
        gateway.logged.wait_for("Side-stacking proxy instance")
        client.close()


ROUTERS = {
    "transparent": "TransparentRouter(forge_addr=TRUE)",
    "directed": "DirectedRouter(SockAddrInet('127.0.0.1', $server_port), forge_addr=TRUE)",
    "inband": "InbandRouter(forge_addr=TRUE)",
}


@covers("S000-28")
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_every_router_can_show_the_client_s_address(server, router):
    # given a router that forges, and a client with an address of its own
    with plug(f"router={router}", NAMING, "Naming", server_port=server.port) as gateway:
        gateway.names["config"].options.permit_local_targets = True
        client = gateway.connect(to=("127.0.0.1", server.port), source="127.0.0.77")
        client.sendall(b"127.0.0.1:%d" % server.port)
        # then the server sees that address
        assert client.recv(1) == b"1"
        assert server.wait_for_peers(1)[0][0] == "127.0.0.77"


@covers("S000-30", "S000-32", "S000-33", "S000-36")
def test_the_paper_s_pair_of_services_translates_both_ways():
    # given the paper's policy: each service positional, two NAT policies of pairs of domains
    with (Server(host="127.1.2.1") as server,
          Gateway(POLICIES / "s000_nat.policy", server_port=server.port) as gateway):
        # when a client of the intranet goes out, and one comes in to a public address
        outgoing = gateway.connect(source="127.0.0.37")
        assert exchange(outgoing) == b"ping"
        incoming = gateway.connect(to=("192.0.2.1", 80), source="127.0.0.38", chain=1)
        assert exchange(incoming) == b"ping"
        # then the source is mapped inside the smaller range, and the destination into the private one
        (first, _), (second, _) = server.peers
        assert (first, second) == ("127.1.1.5", "127.1.1.6")
        outgoing.close()
        incoming.close()


@covers("S000-34", "S000-35")
def test_a_cached_translation_is_decided_once(server):
    # given a translation that picks one of many addresses at random, and remembers
    choices = ", ".join(f"SockAddrInet('127.0.3.{n}', 0)" for n in range(1, 200))
    before = f"""
    NATPolicy("hide", nat=RandomNAT(({choices},)), cacheable=TRUE)
    """
    service = "router=DirectedRouter(SockAddrInet('127.0.0.1', $server_port)), snat_policy='hide'"
    with plug(service, before, server_port=server.port) as gateway:
        # when one client comes five times
        for _ in range(5):
            client = gateway.connect(source="127.0.0.5")
            assert exchange(client) == b"ping"
            client.close()
        # then it always has the same address, one of those
        hosts = {host for host, _ in server.peers}
        assert len(hosts) == 1
        assert hosts.pop().startswith("127.0.3.")
