"""A host that writes its packet rules itself: listeners behind TPROXY and REDIRECT, and on interfaces."""

from __future__ import annotations

import pytest

from test.support.daemon import wait_until
from test.support.leaks import connected
from test.support.net import (
    CLIENT,
    CLIENT6,
    FIREWALL_OUTSIDE,
    FIREWALL_OUTSIDE6,
    SERVER,
    SERVER6,
    network,
    policy,
)

pytestmark = pytest.mark.netns

# legacy.md 3.2: chainers, and listeners by name; then the bindings to interfaces of later releases
POLICY = policy("""
    Service("web", TransparentChainer(), PlugProxy)
    Service("shown", PlugProxy, router=TransparentRouter(forge_addr=TRUE))
    Service("own", PlugProxy, router=DirectedRouter(SockAddrInet("10.2.0.2", 7)))
    Listener(SockAddrInet("10.1.0.1", 50080), "web", transparent=TRUE)
    Listener(SockAddrInet6("fd00:1::1", 50080), "web", transparent=TRUE)
    Listener(SockAddrInet("10.1.0.1", 50025), "shown", transparent=TRUE)
    Listener(SockAddrInet6("fd00:1::1", 50025), "shown", transparent=TRUE)
    Dispatcher(DBIface("fc", 3128, protocol=ZD_PROTO_TCP), service="own")
    Dispatcher(DBIfaceGroup(42, 3129, protocol=ZD_PROTO_TCP), service="own")
    """)
FAMILIES = pytest.mark.parametrize(
    ("family", "client", "server", "own", "outside"),
    [(4, CLIENT, SERVER, "10.1.0.1", FIREWALL_OUTSIDE), (6, CLIENT6, SERVER6, "fd00:1::1", FIREWALL_OUTSIDE6)])


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    """A firewall with the rules of the paper (S004) by hand: port 80 by REDIRECT, 81 and 25 by TPROXY."""
    with network(tmp_path_factory.mktemp("listeners")) as net:
        firewall = net.firewall
        for family, own in ((4, "10.1.0.1"), (6, "fd00:1::1")):
            firewall.run("ip", f"-{family}", "rule", "add", "fwmark", "0x80000000/0x80000000", "lookup", "100")
            firewall.run("ip", f"-{family}", "route", "add", "local", "default", "dev", "lo", "table", "100")
            for rule in ("-t nat -A PREROUTING -i fc -p tcp --dport 80 -j REDIRECT --to-ports 50080",
                         "-t mangle -A PREROUTING -m socket --transparent -j MARK --set-mark 0x80000000/0x80000000",
                         "-t mangle -A PREROUTING -m mark --mark 0x80000000/0x80000000 -j ACCEPT",
                         f"-t mangle -A PREROUTING -p tcp --dport 81 -j TPROXY --on-ip {own} --on-port 50080 "
                         "--tproxy-mark 0x80000000/0x80000000",
                         f"-t mangle -A PREROUTING -p tcp --dport 25 -j TPROXY --on-ip {own} --on-port 50025 "
                         "--tproxy-mark 0x80000000/0x80000000",
                         "-P FORWARD DROP"):
                firewall.iptables(*rule.split(), family=family)
        net.daemon = firewall.start_zorp(POLICY, load=False)
        yield net


def visit(net, address, port, **arguments):
    """Let a client connect; return whom the server sees, and whom the client sees."""
    listening = net.server.listen(address, port)
    with net.client.connect(address, port, **arguments) as client:
        connection, peer = listening.accept()
        client.sendall(b"ping")
        assert connection.recv(4) == b"ping"
        seen = peer, client.getpeername()[:2]
    listening.close()
    return seen


@FAMILIES
def test_legacy_2_a_redirected_connection_goes_where_it_was_going(gateway, family, client, server, own, outside):
    mark = gateway.daemon.log.mark()
    assert visit(gateway, server, 80) == (outside, (server, 80))
    gateway.daemon.log.wait_for("core.session", 5, "Starting service", after=mark, name="web")


@FAMILIES
def test_dispatch_31_a_diverted_connection_goes_where_it_was_going(gateway, family, client, server, own, outside):
    assert visit(gateway, server, 81) == (outside, (server, 81))


@FAMILIES
def test_routing_3_a_listener_s_service_shows_the_client_s_address(gateway, family, client, server, own, outside):
    assert visit(gateway, server, 25) == (client, (server, 25))


@FAMILIES
def test_dispatch_9_and_legacy_37_nobody_connects_to_a_transparent_listener_itself(
        gateway, family, client, server, own, outside):
    # given the next session's number
    visit(gateway, server, 81)
    mark = gateway.daemon.log.mark()
    # when a client connects to the listener's own address and port
    with gateway.client.connect(own, 50080) as direct:
        # then it is closed, with one line
        assert direct.recv(1) == b""
    gateway.daemon.log.wait_for("core.error", 1, "Transparent listener connected directly, dropping connection",
                                after=mark)
    # and without a session (anatomy 8): the next one has the next number
    visit(gateway, server, 81)
    gateway.daemon.log.wait_for("core.session", 3, "Starting proxy instance", after=mark)
    assert len(gateway.daemon.log.find("core.session", 3, "Starting proxy instance", after=mark)) == 1
    assert len(gateway.daemon.log.find("core.error", 1, "Transparent listener connected", after=mark)) == 1


def test_dispatch_27_an_interface_s_new_address_is_served_and_its_old_one_is_not(gateway):
    gateway.server.listen(SERVER, 7).answer_all(b"hello")
    served = [("10.1.0.1", 3128)]
    assert connected(gateway.client, [*served, (FIREWALL_OUTSIDE, 3128)], within_s=0.5) == served
    # when the interface gets an address, then it is served
    gateway.firewall.run("ip", "addr", "add", "10.1.0.9/24", "dev", "fc")
    wait_until(lambda: connected(gateway.client, [("10.1.0.9", 3128)]), "the new address", timeout_s=5)
    # and when it loses it, refused, wherever that address is then
    gateway.firewall.run("ip", "addr", "del", "10.1.0.9/24", "dev", "fc")
    gateway.firewall.run("ip", "addr", "add", "10.1.0.9/32", "dev", "lo")
    wait_until(lambda: not connected(gateway.client, [("10.1.0.9", 3128)]), "the refusal", timeout_s=5)
    # and not only because the queue of a listener that nobody serves is full
    wait_until(lambda: "10.1.0.9" not in gateway.firewall.run("ss", "-ltnH").stdout, "the end of the listener")


def test_dispatch_28_an_interface_that_joins_a_group_is_served(gateway):
    assert connected(gateway.client, [("10.1.0.1", 3129)]) == []
    gateway.firewall.run("ip", "link", "set", "fc", "group", "42")
    wait_until(lambda: connected(gateway.client, [("10.1.0.1", 3129)]), "the interface of the group", timeout_s=5)
