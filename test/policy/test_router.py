"""Routers: target and source of server connections, seen by real servers on loopback."""

from __future__ import annotations

import socket
import types

import pytest

from test.support.chaining import address_of, asking, near_end
from test.support.gateway import Gateway, Server
from test.support.unprivileged import run_unprivileged
from Zorp.Constants import FALSE, TRUE, Z_PORT_ANY, Z_PORT_EXACT, Z_PORT_GROUP, Z_PORT_RANDOM
from Zorp.Exceptions import PolicyError
from Zorp.Router import AbstractRouter, DirectedRouter, InbandRouter, TransparentRouter
from Zorp.SockAddr import SockAddrInet, SockAddrInet6, SockAddrInetRange, SockAddrUnix
from Zorp.transport import connect as connecting

__all__ = ["asking"]


@pytest.fixture
def server():
    with Server() as running:
        yield running


def peer_of(asked, server, count=1):
    """Return what the server saw of the connection that `asked` makes."""
    assert asked.connect() is not None, asked.log.texts()
    return server.wait_for_peers(count)[count - 1]


# where to

def test_transparent_router_leads_to_the_original_destination(asking, server):
    """Scenario 1: the server sees the firewall's address."""
    # given a client that wanted the server
    asked = asking(TransparentRouter(), wanted=address_of(server))
    # when its proxy connects, then the server sees the firewall's own address and some port
    host, port = peer_of(asked, server)
    assert host == "127.0.0.1"
    assert port != 20000
    assert str(asked.session.server_address) == f"AF_INET(127.0.0.1:{server.port})"


def test_transparent_router_forces_the_port(asking, server):
    """Scenario 2."""
    asked = asking(TransparentRouter(server.port), wanted=SockAddrInet("127.0.0.1", 80))
    peer_of(asked, server)
    # the original destination itself is not touched
    assert asked.session.client_local.port == 80


def test_directed_router_leads_to_its_address_whatever_the_client_wanted(asking, server):
    """Scenario 11."""
    asked = asking(DirectedRouter(address_of(server)), wanted=SockAddrInet("192.0.2.80", 80))
    peer_of(asked, server)
    assert asked.log.find("Server connection established;")[0].text.count(
        f"server_address='AF_INET(127.0.0.1:{server.port})'") == 1


def test_directed_router_with_port_0_takes_the_port_that_the_client_wanted(asking, server):
    """Scenario 12."""
    router = DirectedRouter(SockAddrInet("127.0.0.1", 0))
    peer_of(asking(router, wanted=SockAddrInet("192.0.2.80", server.port)), server)
    # and the next client's port is not the first one's
    assert router.dest_addr[0].port == 0


def test_directed_router_copies_its_addresses(asking):
    address = SockAddrInet("127.0.0.1", 25)
    asked = asking(DirectedRouter([address]))
    asked.session.target_address[0].port = 26
    assert address.port == 25


def test_target_written_by_a_router_of_the_site(asking, server):
    """Custom routers call the base and set the target themselves."""

    class ByPort(AbstractRouter):
        def routeConnection(self, session):
            AbstractRouter.routeConnection(self, session)
            session.setTargetAddress(address_of(server))

    peer_of(asking(ByPort(FALSE, Z_PORT_ANY)), server)


@pytest.mark.parametrize(("router", "inband"), [
    (TransparentRouter(), FALSE), (TransparentRouter(overrideable=TRUE), TRUE), (InbandRouter(), TRUE),
    (DirectedRouter(SockAddrInet("127.0.0.1", 1)), FALSE),
    (DirectedRouter(SockAddrInet("127.0.0.1", 1), overrideable=TRUE), TRUE),
])
def test_hints_are_taken_only_where_the_router_says_so(asking, router, inband):
    asked = asking(router)
    before = asked.session.target_address
    assert asked.session.target_address_inband == inband
    # when the proxy gives a hint, then it is success in both cases, but only one changes the target
    assert asked.proxy.setServerAddress("192.0.2.1", 80)
    assert (asked.session.target_address != before) == bool(inband)


# where from

def test_forged_address_has_another_port_than_the_client_s(asking, server):
    """Scenario 3."""
    host, port = peer_of(asking(TransparentRouter(forge_addr=TRUE), wanted=address_of(server)), server)
    assert host == "127.0.0.5"
    assert port != 20000


def test_forged_address_and_exact_port(asking, server):
    """Scenario 4."""
    router = TransparentRouter(forge_addr=TRUE, forge_port=Z_PORT_EXACT)
    assert peer_of(asking(router, wanted=address_of(server)), server) == ("127.0.0.5", 20000)


def test_port_group_with_the_client_s_port_occupied(asking, server):
    """Scenario 5."""
    # given a client from port 600, and 600 taken for its address
    router = TransparentRouter(forge_addr=TRUE, forge_port=Z_PORT_GROUP)
    with socket.create_server(("127.0.0.5", 600)):
        asked = asking(router, client=SockAddrInet("127.0.0.5", 600), wanted=address_of(server))
        host, port = peer_of(asked, server)
    assert host == "127.0.0.5"
    assert 512 <= port <= 1023
    assert port != 600


def test_random_ports(asking, server):
    """Scenario 6."""
    router = TransparentRouter(forge_addr=TRUE, forge_port=Z_PORT_RANDOM)
    distances = set()
    for count in range(1, 21):
        client = SockAddrInet("127.0.0.5", 50000 + count)
        _, port = peer_of(asking(router, client=client, wanted=address_of(server)), server, count)
        assert 1024 <= port <= 65535
        distances.add(port - client.port)
    assert len(distances) > 15


@pytest.mark.parametrize("forge_addr", [FALSE, TRUE])
def test_numeric_port(asking, server, forge_addr):
    """Scenario 7: the number counts, with and without forge_addr."""
    router = TransparentRouter(forge_addr=forge_addr, forge_port=20321)
    expected = "127.0.0.5" if forge_addr else "127.0.0.1"
    assert peer_of(asking(router, wanted=address_of(server)), server) == (expected, 20321)


@pytest.mark.parametrize(("value", "means", "name"), [
    (TRUE, Z_PORT_EXACT, "Z_PORT_EXACT"), (True, Z_PORT_EXACT, "Z_PORT_EXACT"),
    (FALSE, Z_PORT_ANY, "Z_PORT_ANY"), (None, Z_PORT_ANY, "Z_PORT_ANY"), (False, Z_PORT_ANY, "Z_PORT_ANY"),
])
def test_truth_value_as_port_is_understood_with_a_warning(asking, value, means, name):
    """Scenario 8."""
    assert InbandRouter(forge_port=value).forge_port == means
    warning = asking.log.find("Unclear forge_port value;")[0]
    assert warning.arguments[:2] == (value, name)
    assert "test_router.py" in warning.text


def test_forge_port_true_behaves_as_the_exact_port(asking, server):
    """Scenario 8, at the server."""
    router = TransparentRouter(forge_port=TRUE)
    assert peer_of(asking(router, wanted=address_of(server)), server) == ("127.0.0.1", 20000)


@pytest.mark.parametrize("value", [70000, 65536, -5, -100, "any", 1.5, [1]])
def test_impossible_port_is_refused_at_load(value):
    """Scenario 9."""
    with pytest.raises(PolicyError, match=r"Invalid forge_port value \(.*\)") as refused:
        TransparentRouter(forge_port=value)
    assert str(value) in str(refused.value)


def test_impossible_port_that_a_site_s_class_sets_later_is_refused_at_the_connection(asking):
    router = TransparentRouter()
    router.forge_port = 70000
    with pytest.raises(ValueError, match="Invalid forge_port value"):
        asking(router)


def test_forging_without_privilege_fails_and_nothing_reaches_the_server(asking, server):
    """Scenario 10: the client's address is not one of the host's, and the process has no capabilities."""
    # given a client from elsewhere, and a service that forges
    asked = asking(TransparentRouter(forge_addr=TRUE), client=SockAddrInet("203.0.113.9", 20000),
                   wanted=address_of(server))
    # when the proxy connects in a process that may not do that

    def attempt():
        asked.connect()
        return [message.text for message in asked.log.find("Error binding socket;")], asked.verdict

    errors, verdict = run_unprivileged(attempt)
    # then it fails with an error, and the server never sees the firewall's address
    assert errors == ["Error binding socket; local='AF_INET(203.0.113.9:0)', error='Operation not permitted'"]
    assert verdict == "DENIED_BY_CONNECTION_FAIL"
    assert server.peers == []


def test_foreign_address_is_forged_with_privilege(asking):
    """The same with the right to do it: the socket carries the client's address (UDP needs no answer)."""
    asked = asking(TransparentRouter(forge_addr=TRUE), client=SockAddrInet("203.0.113.9", 20000))
    asked.master.protocol = 2
    stream = asked.connect()
    assert near_end(stream).ip_s == "203.0.113.9"


def test_wildcard_takes_the_family_of_the_server(asking):
    """A wish for a port alone must not bind the connection to the client's family."""
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        router = DirectedRouter(SockAddrInet6("::1", listener.getsockname()[1]), forge_port=21234)
        stream = asking(router).connect()
        assert near_end(stream).port == 21234


def test_forged_address_of_another_family_than_the_server_s_fails(asking):
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        router = DirectedRouter(SockAddrInet6("::1", listener.getsockname()[1]), forge_addr=TRUE)
        asked = asking(router)
        assert asked.connect() is None
    assert asked.log.find("Cannot connect from an address of another family than the server's;")
    assert asked.verdict == "DENIED_BY_CONNECTION_FAIL"


def test_ipv6_client_and_server(asking):
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        wanted = SockAddrInet6("::1", listener.getsockname()[1])
        asked = asking(TransparentRouter(forge_port=Z_PORT_EXACT), client=SockAddrInet6("::1", 20555), wanted=wanted)
        assert near_end(asked.connect()).port == 20555


def wish(router, client=None, snat_policy=None):
    """Return (local address as text or None, loose, random) of a routed session."""
    session = types.SimpleNamespace(
        client_address=client or SockAddrInet("127.0.0.5", 600), client_local=SockAddrInet("127.0.0.1", 1),
        target_local=None, service=types.SimpleNamespace(snat_policy=snat_policy), setTargetAddress=lambda target: None,
        target_address=())
    router.routeConnection(session)
    local = session.target_local
    return local and str(local), session.target_local_loose, session.target_local_random


@pytest.mark.parametrize(("forge_port", "port", "loose", "unpredictable"), [
    (Z_PORT_ANY, 0, FALSE, FALSE), (Z_PORT_GROUP, 600, TRUE, FALSE), (Z_PORT_EXACT, 600, FALSE, FALSE),
    (Z_PORT_RANDOM, 600, TRUE, TRUE), (4711, 4711, FALSE, FALSE),
])
def test_table_of_ports(forge_port, port, loose, unpredictable):
    plain = (f"AF_INET(0.0.0.0:{port})" if port else None, loose, unpredictable)
    forged = (f"AF_INET(127.0.0.5:{port})", loose, unpredictable)
    assert wish(TransparentRouter(forge_port=forge_port)) == plain
    assert wish(TransparentRouter(forge_addr=TRUE, forge_port=forge_port)) == forged
    # and an SNAT policy gets the client's address as input
    assert wish(TransparentRouter(forge_port=forge_port), snat_policy=object()) == forged


def test_wildcard_of_an_ipv6_client():
    assert wish(TransparentRouter(forge_port=4711), SockAddrInet6("::1", 600))[0] == "AF_INET6(:::4711)"


def test_client_of_no_internet_family():
    with pytest.raises(ValueError, match=r"Invalid client_address type \(unix\)"):
        wish(TransparentRouter(forge_port=4711), SockAddrUnix("/x"))


def test_local_address_that_was_set_before_stays_when_the_router_has_no_wish():
    session = types.SimpleNamespace(
        client_address=SockAddrInet("127.0.0.5", 600), target_local="earlier",
        service=types.SimpleNamespace(snat_policy=None))
    InbandRouter().routeConnection(session)
    assert session.target_local == "earlier"
    assert session.target_address_inband


# constructors

def test_positional_order_of_arguments():
    router = TransparentRouter(8080, TRUE, TRUE, Z_PORT_GROUP)
    assert (router.forced_port, router.forge_addr, router.overrideable, router.forge_port) == (
        8080, TRUE, TRUE, Z_PORT_GROUP)
    address = SockAddrInet("127.0.0.1", 25)
    router = DirectedRouter(address, TRUE, TRUE, Z_PORT_EXACT)
    assert (list(router.dest_addr), router.forge_addr, router.overrideable, router.forge_port) == (
        [address], TRUE, TRUE, Z_PORT_EXACT)
    router = InbandRouter(TRUE, Z_PORT_RANDOM)
    assert (router.forge_addr, router.forge_port) == (TRUE, Z_PORT_RANDOM)


@pytest.mark.parametrize("value", ["127.0.0.1", None, ["127.0.0.1"], 25])
def test_directed_router_refuses_what_is_no_address(value):
    with pytest.raises(PolicyError, match="Invalid dest_addr value"):
        DirectedRouter(value)


@pytest.mark.parametrize("value", [-1, 65536, "80"])
def test_transparent_router_refuses_an_impossible_port(value):
    with pytest.raises(PolicyError, match="Invalid forced_port value"):
        TransparentRouter(value)


def test_range_of_ports_as_destination_is_an_address():
    assert len(DirectedRouter(SockAddrInetRange("127.0.0.1", 5000, 5010)).dest_addr) == 1


def test_foreign_means_what_bind_may_refuse():
    assert connecting.Source(socket.AF_INET, ("203.0.113.9", 0)).foreign
    assert not connecting.Source(socket.AF_INET, ("0.0.0.0", 0)).foreign


OPEN = """
    from Zorp.Core import *
    from Zorp.Plug import *

    Zone("office", "127.0.0.0/8"$lists)

    def gateway():
        Service("open", PlugProxy, router=InbandRouter())
        Service("limited", PlugProxy, router=InbandRouter(), limit_target_zones_to="office")
        Service("directed", PlugProxy, router=DirectedRouter(SockAddrInet("127.0.0.1", 25)))
        Service("overrideable", PlugProxy, router=TransparentRouter(overrideable=TRUE))
    """


@pytest.mark.parametrize(("lists", "reported"), [("", ["open", "overrideable"]), (", inbound_services=['*']", [])])
def test_services_that_are_open_to_everywhere_are_reported_at_load(lists, reported):
    with Gateway(OPEN, lists=lists) as gateway:
        lines = gateway.logged.find("Clients of the service may name any server")
    assert [line.arguments[0] for line in lines] == reported
