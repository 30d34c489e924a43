"""ConnectChainer and the connect procedure: order, log, access control, limits, stop requests."""

from __future__ import annotations

import socket
import struct
import threading
import time
import types

import pytest

from test.support.chaining import address_of, asking, near_end
from test.support.deaf import silent_server, unused_port
from test.support.gateway import Server, exchange
from test.support.zones import no_zones
from Zorp import Globals
from Zorp.Attach import Attach
from Zorp.Chainer import AbstractChainer, ConnectChainer
from Zorp.Config import config
from Zorp.Constants import (
    FALSE,
    TRUE,
    Z_KEEPALIVE_CLIENT,
    Z_KEEPALIVE_SERVER,
    Z_PORT_EXACT,
    ZD_PROTO_AUTO,
    ZD_PROTO_TCP,
    ZD_PROTO_UDP,
)
from Zorp.Exceptions import DACException, PolicyError
from Zorp.NAT import NATPolicy, StaticNAT
from Zorp.Resolver import DNSResolver, HashResolver, ResolverPolicy
from Zorp.Router import DirectedRouter, InbandRouter, TransparentRouter
from Zorp.SockAddr import SockAddrInet, SockAddrInet6, SockAddrInetRange, SockAddrUnix
from Zorp.transport.connect import Connector
from Zorp.Zone import Zone

__all__ = ["asking", "no_zones"]

DEADLINE_S = 10


@pytest.fixture
def server():
    with Server() as running:
        yield running


@pytest.fixture(autouse=True)
def own_registries(no_zones, monkeypatch):
    monkeypatch.setattr(Globals, "nat_policies", {})
    for name in ("permit_local_targets", "permit_own_listeners"):
        monkeypatch.setattr(config.options, name, FALSE)


# one connection

def test_established_line_names_and_statistics(asking, server):
    # given a server in a zone
    Zone("servers", "127.0.0.0/8")
    asked = asking(wanted=address_of(server))
    # when the proxy connects
    stream = asked.connect()
    # then the session knows the server, the master too, and the line says it
    for level in (asked.session, asked.master):
        assert str(level.server_address) == f"AF_INET(127.0.0.1:{server.port})"
        assert str(level.server_zone) == "Zone(servers)"
        assert level.server_local == near_end(stream)
    assert stream.name == f"{asked.session.session_id}/server"
    assert asked.log.find("Server connection established;")[0].text == (
        f"Server connection established; server_fd='{stream.fd}', server_address='AF_INET(127.0.0.1:{server.port})', "
        f"server_zone='Zone(servers)', server_local='{near_end(stream)}', server_protocol='TCP'")
    assert exchange(stream.sock) == b"ping"


def test_order_of_the_log_lines(asking, server):
    asked = asking(wanted=address_of(server))
    asked.connect()
    steps = ["Connecting to remote host;", "Initiating connection;", "Established connection;",
             "Server connection established;"]
    texts = asked.log.texts()
    places = [next(i for i, text in enumerate(texts) if text.startswith(step)) for step in steps]
    assert places == sorted(places)
    assert asked.log.has("Connecting to remote host; protocol='%d', local='%s', remote='%s'",
                         (1, "NULL", f"AF_INET(127.0.0.1:{server.port})"))
    assert asked.log.has("Initiating connection; from='%s', to='%s'", ("NULL", f"AF_INET(127.0.0.1:{server.port})"))


def test_refused_connection_has_its_reason(asking):
    """Scenario 35."""
    with unused_port() as port:
        asked = asking(wanted=SockAddrInet("127.0.0.1", port))
        assert asked.connect() is None
    assert asked.log.has("Connection to remote end failed; local='%s', remote='%s', error='%s'",
                         ("NULL", f"AF_INET(127.0.0.1:{port})", "Connection refused"))
    assert asked.log.find("Server connection failure;")[0].text == (
        f"Server connection failure; server_address='AF_INET(127.0.0.1:{port})', server_zone='None', "
        "server_local='None', server_protocol='TCP'")
    assert asked.verdict == "DENIED_BY_CONNECTION_FAIL"
    assert asked.session.server_stream is None


def test_silent_server_costs_the_timeout_and_the_log_names_it(asking):
    """Scenario 34, with a shorter time."""
    with silent_server() as address:
        asked = asking(chainer=ConnectChainer(timeout_connect=150), wanted=SockAddrInet(*address))
        started = time.monotonic()
        assert asked.connect() is None
        assert 0.14 < time.monotonic() - started < 10
    assert asked.log.find("Connection to remote end failed;")[0].text.endswith("error='connection timed out'")


def test_local_address_of_an_earlier_connection_is_forgotten(asking, server):
    # given a session that was connected
    asked = asking(wanted=address_of(server))
    asked.connect().close()
    # when its next connect fails
    with unused_port() as port:
        asked.session.setTargetAddress(SockAddrInet("127.0.0.1", port))
        asked.proxy._disconnect_server()
        assert asked.connect() is None
    # then nothing of the first one is shown with it
    assert asked.session.server_local is None
    assert asked.master.server_local is None


def test_keepalive_on_the_server_side_only(asking, server):
    """Scenario 36."""
    asked = asking(wanted=address_of(server), keepalive=Z_KEEPALIVE_SERVER)
    assert asked.connect().keepalive == 1
    asked = asking(wanted=address_of(server), keepalive=Z_KEEPALIVE_CLIENT)
    assert asked.connect().keepalive == 0


def test_tos_and_mark_of_the_proxy(asking, server):
    asked = asking(wanted=address_of(server))
    asked.proxy._vars = types.SimpleNamespace(server_local_tos=0x10, server_socket_mark=0x40000000)
    sock = asked.connect().sock
    assert sock.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) == 0x10
    assert sock.getsockopt(socket.SOL_SOCKET, 36) == 0x40000000
    assert asked.log.find("Setting socket ToS value;")


def test_range_of_local_ports(asking, server):
    class FromARange(ConnectChainer):
        def getNextTarget(self, session):
            return SockAddrInetRange("127.0.0.9", 25100, 25101), address_of(server)

    ports = [near_end(asking(chainer=FromARange()).connect()).port for _ in range(2)]
    assert sorted(ports) == [25100, 25101]
    asked = asking(chainer=FromARange())
    assert asked.connect() is None
    assert asked.log.find("SockAddrInetRange, could not find free port to bind; min_port='25100', max_port='25101'")


def test_tcp_server_of_a_udp_service(asking, server):
    """Scenario 40, the chainer's part: the protocol towards the server may be another."""
    chainer = ConnectChainer(ZD_PROTO_TCP)
    asked = asking(chainer=chainer, wanted=address_of(server))
    asked.master.protocol = ZD_PROTO_UDP
    assert exchange(asked.connect().sock) == b"ping"
    assert chainer.getProtocol() == ZD_PROTO_TCP
    assert asked.log.find("Server connection established;")[0].text.endswith("server_protocol='TCP'")
    asked.master.logVerdict()
    summary = asked.log.find("Connection summary;")[0].text
    assert "client_proto='UDP'" in summary
    assert "server_proto='TCP'" in summary


def test_local_server(asking, tmp_path):
    """A local socket has no zone and no port; only a service without a list of zones may reach it."""
    path = str(tmp_path / "server")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        router = DirectedRouter(SockAddrUnix(path))
        asked = asking(router)
        assert asked.connect() is not None
        assert str(asked.session.server_address) == f"AF_UNIX({path})"
        asked.master.logVerdict()
        summary = asked.log.find("Connection summary;")[0].text
        assert "server_address='(NULL)', server_port='0', server_zone='(NULL)'" in summary
        asked = asking(router, limit_target_zones_to=("servers",))
        assert asked.connect() is None
        assert asked.verdict == "DENIED_BY_POLICY"


# targets

def test_only_the_first_of_several_targets_is_used(asking, server):
    """Scenario 13."""
    with unused_port() as port:
        router = DirectedRouter([SockAddrInet("127.0.0.1", port), address_of(server)])
        assert asking(router).connect() is None
    assert server.peers == []


def test_no_target_at_all(asking):
    """Scenario 39."""
    asked = asking(InbandRouter())
    assert asked.connect() is None
    assert asked.log.has("Server connection failure, no destination;", ())
    assert asked.log.find("Traceback") == []
    assert asked.verdict == "DENIED_BY_CONNECTION_FAIL"


@pytest.mark.parametrize("answer", [(None, None), ValueError("nothing")])
def test_getnexttarget_of_the_site_without_a_target(asking, answer):
    class Nothing(ConnectChainer):
        def getNextTarget(self, session):
            if isinstance(answer, Exception):
                raise answer
            return answer

    asked = asking(chainer=Nothing())
    assert asked.connect() is None
    assert asked.log.has("Server connection failure, no destination;", ())


def test_name_that_does_not_resolve(asking):
    """Scenario 37."""
    asked = asking(InbandRouter(), resolver_policy=ResolverPolicy(None, HashResolver({})))
    assert asked.connect("no.such.host", 80) is None
    assert asked.log.has("Error resolving hostname; host='%s'", ("no.such.host",))


LOCAL_TARGETS = ["127.0.0.1", "127.8.8.8", "0.0.0.0", "255.255.255.255", "224.0.0.1", "239.1.2.3",
                 "::1", "::", "ff02::1", "::ffff:127.0.0.1"]


@pytest.mark.parametrize("host", LOCAL_TARGETS)
def test_local_target_named_in_band_is_refused(asking, host):
    """Scenario 38."""
    asked = asking(InbandRouter())
    assert asked.connect(host, 80) is None
    assert asked.log.find("Connection refused; reason='Target named by the client is local,")
    assert asked.log.find("DAC policy violation;")
    assert asked.verdict == "DENIED_BY_POLICY"
    assert not asked.log.find("Initiating connection;")


def test_own_address_named_in_band_is_refused(asking):
    own = own_address()
    asked = asking(InbandRouter())
    assert asked.connect(own, 80) is None
    assert asked.verdict == "DENIED_BY_POLICY"


def own_address():
    """An address of this host that is not a loopback one, if it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("203.0.113.1", 9))
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]


def test_local_target_is_permitted_by_the_router_or_the_option(asking, server, monkeypatch):
    assert asking(InbandRouter(permit_local_targets=TRUE)).connect("127.0.0.1", server.port) is not None
    monkeypatch.setattr(config.options, "permit_local_targets", TRUE)
    assert asking(InbandRouter()).connect("127.0.0.1", server.port) is not None
    assert asking(TransparentRouter(overrideable=TRUE)).connect("127.0.0.1", server.port) is not None


def test_target_that_the_router_set_may_be_local(asking, server):
    """Only what the client named is suspect: a DirectedRouter may lead to a server on the firewall."""
    router = DirectedRouter(address_of(server), overrideable=TRUE)
    assert asking(router).connect() is not None
    asked = asking(router)
    assert asked.connect("127.0.0.2", server.port) is None
    assert asked.verdict == "DENIED_BY_POLICY"


def test_what_dnat_made_of_an_in_band_target_is_the_policy_s_choice(asking, server):
    dnat = NATPolicy("to-us", StaticNAT(address_of(server)))
    assert asking(InbandRouter(), dnat_policy=dnat).connect("203.0.113.80", 80) is not None


def test_addresses_of_one_in_band_name_are_tried_in_turn(asking, server, monkeypatch):
    """A dead first address does not hide a working second one; each has its share of the time."""
    monkeypatch.setattr(config.options, "permit_local_targets", TRUE)
    resolver = ResolverPolicy(None, HashResolver({"mail.example": ("127.0.0.1", "127.0.0.2", "127.0.0.3")}))
    with silent_server() as (_, port), Server(host="127.0.0.3", port=port) as good:
        asked = asking(InbandRouter(), ConnectChainer(timeout_connect=3000), resolver_policy=resolver)
        started = time.monotonic()
        assert asked.connect("mail.example", port) is not None
        assert 0.9 < time.monotonic() - started < 3
        good.wait_for_peers(1)
    # and none of them: one failure after the other
    asked = asking(InbandRouter(), resolver_policy=resolver)
    with unused_port() as port:
        assert asked.connect("mail.example", port) is None
    assert len(asked.log.find("Server connection failure;")) >= 3


# access control

def test_server_zone_decides(asking, server):
    """Scenarios 23 and 24: what is not permitted gets no packet."""
    Zone("dmz", "198.51.100.0/24")
    Zone("inner", "127.0.0.1/32", admin_parent="dmz")
    Zone("elsewhere", "127.0.0.2/32")
    permitted = {"limit_target_zones_to": ("dmz",)}
    assert asking(wanted=address_of(server), **permitted).connect() is not None
    server.wait_for_peers(1)
    asked = asking(wanted=SockAddrInet("127.0.0.2", server.port), **permitted)
    assert asked.connect() is None
    assert asked.log.find("Outbound connection not permitted;")
    assert asked.log.has("DAC policy violation; info='%s'",
                         ("DAC policy violation: Server connection is not permitted",))
    assert asked.verdict == "DENIED_BY_POLICY"
    assert str(asked.master.server_zone) == "Zone(elsewhere)"
    assert len(asked.log.find("Initiating connection;")) == 1        # the first session's


def test_inbound_services_of_the_server_s_zone(asking, server):
    """Scenario 23 with the zones of release 3.9.0."""
    Zone("servers", "127.0.0.0/8", inbound_services=["other"])
    asked = asking(wanted=address_of(server))
    assert asked.connect() is None
    assert asked.log.find("Inbound service not permitted;")
    assert server.peers == []


def test_zone_of_the_translated_address_decides(asking, server):
    """Scenario 25."""
    Zone("good", "127.0.0.1/32")
    Zone("bad", "192.0.2.0/24")
    permitted = {"limit_target_zones_to": ("good",)}
    into_good = NATPolicy("into-good", StaticNAT(address_of(server)))
    into_bad = NATPolicy("into-bad", StaticNAT(SockAddrInet("192.0.2.1", 80)))
    wanted = SockAddrInet("192.0.2.1", 80)
    assert asking(wanted=wanted, dnat_policy=into_good, **permitted).connect() is not None
    assert asking(wanted=address_of(server), dnat_policy=into_bad, **permitted).connect() is None


# loops

class ListeningTable:
    """A dispatch table that listens on one address."""

    def __init__(self, protocol, address):
        self.mine = (protocol, address)

    def listens_on(self, protocol, address):
        return (protocol, address) == self.mine


def test_own_listener_is_refused_as_server(asking, server, monkeypatch):
    """A service that leads back to a listener of the same instance would go round for ever."""
    monkeypatch.setattr(Globals, "dispatch_table", ListeningTable(ZD_PROTO_TCP, address_of(server)))
    asked = asking(wanted=address_of(server))
    assert asked.connect() is None
    assert asked.log.find("Connection refused; reason='Server is a listener of this firewall")
    assert asked.verdict == "DENIED_BY_POLICY"
    assert server.peers == []
    # unless the policy says that it is meant
    monkeypatch.setattr(config.options, "permit_own_listeners", TRUE)
    assert asking(wanted=address_of(server)).connect() is not None


def test_self_connection_is_refused(asking):
    """The client's own port as source and the same address as target: TCP would connect it to itself."""
    client = SockAddrInet("127.0.0.5", 20777)
    asked = asking(TransparentRouter(forge_addr=TRUE, forge_port=Z_PORT_EXACT), client=client, wanted=client)
    assert asked.connect() is None
    assert asked.log.find("Connection refused; reason='Server connection leads back to itself'")
    assert asked.verdict == "DENIED_BY_POLICY"


# PROXY protocol towards the server

def test_proxy_protocol_header_comes_first(asking):
    """Versions 1 and 2: the server learns the client and what it wanted, before any other byte."""
    received = []

    def serve(sock):
        received.append(sock.recv(200))

    with Server(serve) as server:
        router = DirectedRouter(address_of(server))
        wanted = SockAddrInet("192.0.2.80", 25)
        stream = asking(router, ConnectChainer(proxy_protocol=1), wanted=wanted).connect()
        wait_until(lambda: received)
        assert received.pop() == b"PROXY TCP4 127.0.0.5 192.0.2.80 20000 25\r\n"
        assert stream.bytes_sent == 0                   # the header is not the client's data
        asking(router, ConnectChainer(proxy_protocol=2), wanted=wanted).connect()
        wait_until(lambda: received)
        assert received.pop() == (b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c\x7f\x00\x00\x05\xc0\x00\x02\x50"
                                  + struct.pack(">HH", 20000, 25))


def test_server_that_takes_no_header(asking, server, monkeypatch):
    """A header that cannot be sent is a failed connect, and the stream is closed."""
    streams = []
    attach = AbstractChainer._attach

    def broken(self, *args):
        streams.append(attach(self, *args))
        streams[0].sock.shutdown(socket.SHUT_WR)
        return streams[0]

    monkeypatch.setattr(AbstractChainer, "_attach", broken)
    asked = asking(chainer=ConnectChainer(proxy_protocol=1), wanted=address_of(server))
    assert asked.connect() is None
    assert asked.log.find("Error sending PROXY protocol header; error='Broken pipe'")
    assert asked.session.server_local is None
    assert streams[0].fd == -1


def test_session_without_a_proxy(asking, server):
    asked = asking(wanted=address_of(server))
    asked.session.proxy = None
    with pytest.raises(TypeError, match="First argument must be a Proxy instance"):
        asked.session.chainer.chainParent(asked.session)


def test_proxy_protocol_needs_tcp(asking, server):
    asked = asking(chainer=ConnectChainer(proxy_protocol=1), wanted=address_of(server))
    asked.master.protocol = ZD_PROTO_UDP
    assert asked.connect() is None
    assert asked.log.find("PROXY protocol headers need a TCP connection;")


# stop requests

def test_stop_request_ends_a_pending_connect(asking):
    # given a session that waits for a silent server
    with silent_server() as address:
        asked = asking(wanted=SockAddrInet(*address))
        result = []
        thread = threading.Thread(target=lambda: result.append(asked.connect()))
        thread.start()
        wait_until(lambda: asked.proxy._connecting is not None)
        # when it is asked to stop
        asked.proxy.request_stop()
        thread.join(DEADLINE_S)
    # then the connect ends at once
    assert result == [None]
    assert asked.log.find("Connection to remote end failed;")[0].text.endswith("error='interrupted by a stop request'")
    assert asked.proxy._connecting is None


def test_stop_request_before_the_connect(asking, server):
    asked = asking(wanted=address_of(server))
    asked.proxy.request_stop()
    assert asked.connect() is None
    assert server.peers == []


# what sites write

def test_chain_parent_is_abstract(asking):
    with pytest.raises(NotImplementedError):
        AbstractChainer().chainParent(asking().session)


def test_overridden_steps_are_called(asking, server):
    """Sites override any of the steps; each sees what the one before decided."""
    calls = []

    class Watching(ConnectChainer):
        def getNextTarget(self, session):
            calls.append("getNextTarget")
            return ConnectChainer.getNextTarget(self, session)

        def connectTarget(self, session, target_local, target_remote):
            calls.append(("connectTarget", target_local, str(target_remote)))
            return ConnectChainer.connectTarget(self, session, target_local, target_remote)

        def establishConnection(self, session, local, remote):
            calls.append(("establishConnection", local, str(remote)))
            return ConnectChainer.establishConnection(self, session, local, remote)

    assert asking(chainer=Watching(), wanted=address_of(server)).connect() is not None
    there = f"AF_INET(127.0.0.1:{server.port})"
    assert calls == ["getNextTarget", ("connectTarget", None, there), ("establishConnection", None, there)]


def test_remote_address_is_not_changed(asking, server):
    remote = SockAddrInet("127.0.0.1", 0)
    asked = asking(wanted=SockAddrInet("192.0.2.1", server.port))
    assert ConnectChainer().establishConnection(asked.session, None, remote) is not None
    assert remote.port == 0


def test_exceptions_of_the_site_s_chainer_end_with_their_verdict(asking):
    class Refusing(ConnectChainer):
        def chainParent(self, session):
            raise DACException("not today")

    asked = asking(chainer=Refusing())
    assert asked.connect() is None
    assert asked.log.has("DAC policy violation; info='%s'", ("DAC policy violation: not today",))


# Attach

def test_attach_as_custom_chainers_use_it(asking, server):
    asked = asking()
    attach = Attach(asked.proxy, ZD_PROTO_TCP, None, address_of(server))
    assert attach.local is None
    stream = attach.start()
    assert attach.local == near_end(stream)
    assert stream.keepalive == 1
    assert exchange(stream.sock) == b"ping"
    stream.close()


def test_attach_gives_none_when_nobody_answers(asking):
    with unused_port() as port:
        attach = Attach(asking().proxy, ZD_PROTO_TCP, None, SockAddrInet("127.0.0.1", port), timeout=1000)
        assert attach.start() is None
        assert attach.local is None


def test_attach_checks_its_arguments(asking, server):
    proxy = asking().proxy
    with pytest.raises(TypeError, match="First argument must be a Proxy instance"):
        Attach(object(), ZD_PROTO_TCP, None, address_of(server))
    for local, remote in ((None, None), ("127.0.0.1", address_of(server)), (None, "127.0.0.1")):
        with pytest.raises(TypeError, match="Local and remote arguments must be SockAddr or None"):
            Attach(proxy, ZD_PROTO_TCP, local, remote)


def test_lines_of_failures_before_the_connect(asking, server):
    proxy = asking().proxy
    with socket.create_server(("127.0.0.9", 25200)):
        assert Attach(proxy, ZD_PROTO_TCP, SockAddrInet("127.0.0.9", 25200), address_of(server)).start() is None
    assert asking.log.has("bind() failed; bind='%s', error='%s'",
                          ("AF_INET(127.0.0.9:25200)", "Address already in use"))
    assert asking.log.has("Error binding socket; local='%s', error='%s'",
                          ("AF_INET(127.0.0.9:25200)", "Address already in use"))
    attach = Attach(proxy, ZD_PROTO_TCP, None, address_of(server))
    attach._connector = Connector(9999, socket.SOCK_STREAM, None)
    assert attach.start() is None
    assert asking.log.find("Creating socket for connecting failed; family='2', type='stream',")
    assert Attach(proxy, ZD_PROTO_TCP, None, SockAddrInet("255.255.255.255", 1)).start() is None
    assert asking.log.find("connect() failed; fd='")


# constructors

def test_arguments_in_their_order():
    chainer = ConnectChainer(ZD_PROTO_TCP, 1500)
    assert (chainer.protocol, chainer.timeout_connect) == (ZD_PROTO_TCP, 1500)


@pytest.mark.parametrize("nothing", [None, 0])
def test_default_timeout_is_read_when_the_chainer_is_made(nothing, monkeypatch):
    monkeypatch.setattr(config.options, "timeout_server_connect", 4711)
    chainer = ConnectChainer(timeout_connect=nothing)
    monkeypatch.setattr(config.options, "timeout_server_connect", 1)
    assert chainer.timeout_connect == 4711
    assert chainer.protocol == ZD_PROTO_AUTO


@pytest.mark.parametrize("wrong", [
    {"timeout_connect": -1}, {"timeout_connect": "soon"}, {"protocol": 3}, {"protocol": "TCP"},
    {"proxy_protocol": 3}, {"proxy_protocol": 1, "protocol": ZD_PROTO_UDP},
])
def test_impossible_arguments_are_refused_at_load(wrong):
    with pytest.raises(PolicyError):
        ConnectChainer(**wrong)


def test_ipv6_addresses_of_the_client_in_a_header(asking):
    received = []
    with Server(lambda sock: received.append(sock.recv(200))) as server:
        asking(DirectedRouter(address_of(server)), ConnectChainer(proxy_protocol=1),
               client=SockAddrInet6("2001:db8::1", 1), wanted=SockAddrInet6("2001:db8::2", 25)).connect()
        wait_until(lambda: received)
    assert received == [b"PROXY TCP6 2001:db8::1 2001:db8::2 1 25\r\n"]


# helpers

def wait_until(condition):
    limit = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.002)


def test_dns_resolver_is_what_services_use(asking, server, monkeypatch):
    """An address as in-band name goes the same way."""
    monkeypatch.setattr(config.options, "permit_local_targets", TRUE)
    asked = asking(InbandRouter(), resolver_policy=ResolverPolicy(None, DNSResolver()))
    assert asked.connect("127.0.0.1", server.port) is not None
