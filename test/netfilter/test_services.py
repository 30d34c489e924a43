"""Scenarios of routing, dispatching and zones that need packets: one firewall, a port for each of them.

Numbers are those of the observable scenarios in routing-chaining-nat.md 9, dispatch-service-session.md
10, zones-rules.md 11 and kzorp.md 11.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import struct
from collections import Counter

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
    net,
    network,
    policy,
)

__all__ = ["net"]
pytestmark = pytest.mark.netns

POLICY = policy("""
    def service(name, port, router, **more):
        Service(name, PlugProxy, router=router, **more)
        Rule(proto=6, dst_port=port, service=name)

    service("port", 1002, TransparentRouter(8080))
    service("address", 1003, TransparentRouter(forge_addr=TRUE))
    service("exact", 1004, TransparentRouter(forge_addr=TRUE, forge_port=Z_PORT_EXACT))
    service("group", 1005, TransparentRouter(forge_addr=TRUE, forge_port=Z_PORT_GROUP))
    service("random", 1006, TransparentRouter(forge_addr=TRUE, forge_port=Z_PORT_RANDOM))
    service("fixed", 1007, TransparentRouter(forge_port=40000))
    service("directed", 1011, DirectedRouter(SockAddrInet("10.2.0.2", 7)))
    service("same_port", 1012, DirectedRouter(SockAddrInet("10.2.0.2", 0)))
    service("snat", 1026, TransparentRouter(), snat_policy="hosts")
    service("nat46", 1031, TransparentRouter(), dnat_policy="to_six")
    Service("chainer", TransparentChainer(), PlugProxy)
    Rule(proto=6, dst_port=1131, service="chainer")
    Service("own", PlugProxy, router=DirectedRouter(SockAddrInet("10.2.0.2", 7)))
    Rule(proto=6, dst_port=3128, dst_iface="fc", service="own")
    PFService("ping")
    DenyService("no_echo", ipv4_setting=DenyIPv4.ICMP_PORT_UNREACHABLE)
    Rule(proto=1, service="ping")
    Rule(proto=1, icmp_type=8, service="no_echo")
    """, """
    NATPolicy("hosts", nat=GeneralNAT([
        (InetSubnet("10.1.0.0/24"), InetSubnet("10.2.0.2/32"), InetSubnet("10.3.0.0/24"))]))
    NATPolicy("to_six", nat=NAT46())
    """)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    """The network, with an instance and its packet rules."""
    with network(tmp_path_factory.mktemp("services")) as made:
        made.firewall.configure("nft")
        made.firewall.sysctl("net.ipv4.icmp_ratelimit", "0")
        made.daemon = made.firewall.start_zorp(POLICY)
        yield made


def visit(net, target, port, *, server=None, server_port=None, source=None):
    """Connect to a target and let bytes pass; return whom the server saw, and whom the client."""
    listening = net.server.listen(server or target, server_port or port)
    with net.client.connect(target, port, source=source) as client:
        connection, _ = listening.accept()
        client.sendall(b"ping")
        assert connection.recv(4) == b"ping"
        connection.sendall(b"pong")
        assert client.recv(4) == b"pong"
        seen = connection.getpeername()[:2], client.getpeername()[:2]
    listening.close()
    return seen


FAMILIES = pytest.mark.parametrize(("client", "server"), [(CLIENT, SERVER), (CLIENT6, SERVER6)], ids=["ipv4", "ipv6"])


# ---------------------------------------------------------------------------- routing-chaining-nat.md

@FAMILIES
def test_routing_2_the_port_of_the_router_replaces_the_client_s(gateway, client, server):
    seen_by_server, seen_by_client = visit(gateway, server, 1002, server_port=8080)
    assert seen_by_server[0] in (FIREWALL_OUTSIDE, FIREWALL_OUTSIDE6)
    assert seen_by_client == (server, 1002)


@FAMILIES
def test_routing_3_the_server_sees_the_client_s_address_from_another_port(gateway, client, server):
    seen, _ = visit(gateway, server, 1003, source=(client, 20_003))
    assert seen[0] == client
    assert seen[1] != 20_003


@FAMILIES
def test_routing_4_the_server_sees_the_client_s_address_and_port(gateway, client, server):
    seen, _ = visit(gateway, server, 1004, source=(client, 20_004))
    assert seen == (client, 20_004)


def test_routing_5_a_port_of_the_same_group_is_taken_where_the_client_s_is_occupied(gateway):
    # given somebody on the firewall who has that address and port
    with gateway.firewall.socket(CLIENT) as occupied:
        occupied.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        occupied.setsockopt(socket.SOL_IP, socket.IP_TRANSPARENT, 1)
        occupied.bind((CLIENT, 600))
        # when the client comes from that port
        (address, port), _ = visit(gateway, SERVER, 1005, source=(CLIENT, 600))
        # then the server sees a port of its kind
        assert address == CLIENT
        assert 512 <= port <= 1023
        assert port != 600


@FAMILIES
def test_routing_6_random_ports_do_not_follow_the_client_s(gateway, client, server):
    seen = [visit(gateway, server, 1006, source=(client, 20_100 + number))[0] for number in range(20)]
    assert {address for address, _ in seen} == {client}
    ports = [port for _, port in seen]
    assert all(1024 <= port <= 65_535 for port in ports)
    steps = Counter(after - before for before, after in itertools.pairwise(ports))
    assert max(steps.values()) < 5


def test_routing_7_a_forged_port_without_the_address_is_the_firewall_s(gateway):
    seen, _ = visit(gateway, SERVER, 1007)
    assert seen == (FIREWALL_OUTSIDE, 40_000)


def test_routing_11_a_directed_router_leads_there_whatever_the_client_asked_for(gateway):
    mark = gateway.daemon.log.mark()
    _, seen_by_client = visit(gateway, "198.51.100.9", 1011, server=SERVER, server_port=7)
    assert seen_by_client == ("198.51.100.9", 1011)
    gateway.daemon.log.wait_for("core.session", 3, "Server connection established", after=mark,
                                server_address=f"AF_INET({SERVER}:7)")


def test_routing_12_port_0_is_the_client_s_choice(gateway):
    visit(gateway, "198.51.100.9", 1012, server=SERVER)


def test_routing_26_a_net_is_mapped_host_by_host_towards_the_servers_it_names(gateway):
    gateway.client.run("ip", "addr", "replace", "10.1.0.7/24", "dev", "c0")
    gateway.server.run("ip", "addr", "replace", "10.2.0.3/24", "dev", "s0")
    # a server that the translation names sees the mapped host, another one the firewall
    assert visit(gateway, SERVER, 1026, source=("10.1.0.7", 0))[0][0] == "10.3.0.7"
    assert visit(gateway, "10.2.0.3", 1026, source=("10.1.0.7", 0))[0][0] == FIREWALL_OUTSIDE


def test_routing_31_an_ipv4_destination_becomes_an_ipv6_server(gateway):
    gateway.server.run("ip", "addr", "replace", "64:ff9b::c000:221/128", "dev", "s0", "nodad")
    gateway.firewall.run("ip", "-6", "route", "replace", "64:ff9b::/96", "via", SERVER6)
    seen_by_server, seen_by_client = visit(gateway, "192.0.2.33", 1031, server="64:ff9b::c000:221")
    assert seen_by_server[0] == FIREWALL_OUTSIDE6
    assert seen_by_client == ("192.0.2.33", 1031)


# ---------------------------------------------------------------------------- dispatch-service-session.md

@FAMILIES
def test_dispatch_31_a_transparent_chainer_makes_a_transparent_service(gateway, client, server):
    assert visit(gateway, server, 1131)[1] == (server, 1131)


def test_dispatch_37_without_ipv6_on_the_host_rules_serve_ipv4(net):
    # given a host that has no IPv6
    net.firewall.configure("nft", "families: [4]\n")
    net.firewall.sysctl("net.ipv6.conf.all.disable_ipv6", "1")
    # when an instance with rules starts
    net.firewall.start_zorp(policy("Service('web', PlugProxy)\nRule(dst_port=80, proto=6, service='web')"))
    # then it serves IPv4
    assert visit(net, SERVER, 80)[0][0] == FIREWALL_OUTSIDE


# ---------------------------------------------------------------------------- zones-rules.md

def test_zones_19_and_20_only_the_present_addresses_of_the_interface_are_served(gateway):
    # given a rule for the addresses of the interface to the client
    gateway.server.listen(SERVER, 7).answer_all(b"hello")
    assert connected(gateway.client, [("10.1.0.1", 3128), (FIREWALL_OUTSIDE, 3128)], within_s=0.5) == [
        ("10.1.0.1", 3128)]
    # when it gets another one instead of an old one
    gateway.firewall.run("ip", "addr", "add", "10.1.0.9/24", "dev", "fc")
    # then that is served, without a reload, and no longer when it is gone
    wait_until(lambda: connected(gateway.client, [("10.1.0.9", 3128)], within_s=0.5), "the new address")
    gateway.firewall.run("ip", "addr", "del", "10.1.0.9/24", "dev", "fc")
    assert connected(gateway.client, [("10.1.0.9", 3128)], within_s=0.5) == []


def icmp_answer(namespace, kind: int) -> tuple[int, int]:
    """Send an echo or timestamp request to the server; return type and code of what comes back."""
    packet = struct.pack("!BBHHH", kind, 0, 0, 0x5A0B, kind) + bytes(12)
    total = sum(struct.unpack(f"!{len(packet) // 2}H", packet))
    checksum = 0xFFFF - (total % 0xFFFF)
    with namespace.socket(SERVER, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        raw.sendto(packet[:2] + struct.pack("!H", checksum) + packet[4:], (SERVER, 0))
        while packet[4:8] not in (answer := raw.recv(2_048)[20:]):
            pass                     # about something else
    return answer[0], answer[1]


def test_zones_21_echo_requests_are_refused_and_other_messages_pass(gateway):
    # echo gets "port unreachable", a timestamp request its reply
    assert icmp_answer(gateway.client, 8) == (3, 3)
    assert icmp_answer(gateway.client, 13) == (14, 0)


def test_zones_32_the_narrower_rule_serves_whichever_instance_started_first(net):
    # given an instance for everybody, started first, and one for a single client
    net.firewall.configure("nft")
    net.client.run("ip", "addr", "add", "10.1.0.3/24", "dev", "c0")
    body = "Service('web', PlugProxy, router=DirectedRouter(SockAddrInet('10.2.0.2', {})))\nRule(dst_port=80, {})"
    net.firewall.start_zorp(policy(body.format(81, "service='web'"), instance="b"), instance="b", load=False)
    net.firewall.start_zorp(policy(body.format(82, "src_subnet='10.1.0.3/32', service='web'"), instance="a"),
                            instance="a")
    # then each client is served by the instance of its best rule
    visit(net, SERVER, 80, server_port=81)
    visit(net, SERVER, 80, server_port=82, source=("10.1.0.3", 0))


# ---------------------------------------------------------------------------- kzorp.md

PIDS = """
from Zorp.Core import *
from Zorp.Plug import *
import os

class Told(PlugProxy):
    def config(self):
        PlugProxy.config(self)
        log(None, "core.info", 3, "Served; pid='%d'", (os.getpid(),))

def intra():
    Service("web", Told)
    Rule(proto=6, dst_port=80, service="web")
"""


def test_scenarios_16_and_17_processes_share_connections_and_replace_each_other(net):
    # given an instance of two processes
    net.firewall.configure("nft")
    daemon = net.firewall.start_zorp(PIDS, arguments=("--num-of-processes", "2"))
    targets = [(SERVER, 80), (SERVER6, 80)]
    for target in targets:
        net.server.listen(*target).answer_all(b"hello")

    def serve(times):
        """Return which processes served so many connections to each target."""
        mark = daemon.log.mark()
        for target in targets * times:
            with net.client.connect(*target, timeout_s=0.9) as client:
                assert client.recv(5) == b"hello"
        daemon.log.wait_for("core.info", 3, "Served", after=mark, count=times * len(targets))
        return {int(line.fields["pid"]) for line in daemon.log.find("core.info", 3, "Served", after=mark)}

    # when a hundred connections come, then both serve, each connection once and to its end
    workers = {daemon.worker_pid(0), daemon.worker_pid(1)}
    assert serve(50) == workers
    # when one is killed, then the other serves those that come
    killed = daemon.worker_pid(0)
    os.kill(killed, signal.SIGKILL)
    assert killed not in serve(20)
