"""Compiled policies in a real kernel: what is refused, with which error, and what is forwarded, for how long."""

import errno
import socket

import pytest

from test.support.kernel import SILENCE_S, backend, echo, errors_of_connect, is_silent
from test.support.net import CLIENT, FIREWALL_OUTSIDE, FIREWALL_OUTSIDE6, SERVER, SERVER6, net, policy

__all__ = ["backend", "net"]
pytestmark = pytest.mark.netns

IPV4_ERRORS = {
    "DROP": None, "TCP_RESET": errno.ECONNREFUSED, "ICMP_NET_UNREACHABLE": errno.ENETUNREACH,
    "ICMP_HOST_UNREACHABLE": errno.EHOSTUNREACH, "ICMP_PROTO_UNREACHABLE": errno.ENOPROTOOPT,
    "ICMP_PORT_UNREACHABLE": errno.ECONNREFUSED, "ICMP_NET_PROHIBITED": errno.ENETUNREACH,
    "ICMP_HOST_PROHIBITED": errno.EHOSTUNREACH, "ICMP_ADMIN_PROHIBITED": errno.EHOSTUNREACH,
}
IPV6_ERRORS = {
    "DROP": None, "TCP_RESET": errno.ECONNREFUSED, "ICMP_NO_ROUTE": errno.ENETUNREACH,
    "ICMP_ADMIN_PROHIBITED": errno.EACCES, "ICMP_ADDR_UNREACHABLE": errno.EHOSTUNREACH,
    "ICMP_PORT_UNREACHABLE": errno.ECONNREFUSED,
}


@pytest.mark.parametrize(("address", "family", "errors"), [(SERVER, 4, IPV4_ERRORS), (SERVER6, 6, IPV6_ERRORS)],
                         ids=["scenario_3_ipv4", "scenario_4_ipv6"])
def test_client_gets_the_error_of_the_setting(net, backend, address, family, errors):
    # given a port for each setting, behind the firewall and on it
    body = "".join(f"DenyService('{code}', ipv{family}_setting=DenyIPv{family}.{code})\n"
                   f"Rule(proto=6, dst_port={1000 + number}, service='{code}')\n"
                   for number, code in enumerate(errors))
    net.firewall.load_policy(policy(body))
    net.firewall.sysctl("net.ipv4.icmp_ratelimit", "0")
    net.firewall.sysctl("net.ipv6.icmp.ratelimit", "0")
    own = "10.1.0.1" if family == 4 else "fd00:1::1"
    targets = {(target, 1000 + number): code for target in (address, own) for number, code in enumerate(errors)}
    # when a client connects, then connect() fails as the setting says
    found = errors_of_connect(net.client, list(targets), silent=2)
    assert [(target, targets[target], error) for target, error in found.items()] == [
        (target, code, errors[code]) for target, code in targets.items()]


def test_scenario_5_reset_has_no_answer_for_udp(net, backend):
    net.firewall.load_policy(policy(
        "DenyService('no', ipv4_setting=DenyIPv4.TCP_RESET)\nRule(dst_port=53, service='no')"))
    with net.client.socket(SERVER, socket.SOCK_DGRAM) as client:
        client.settimeout(SILENCE_S)
        client.connect((SERVER, 53))
        client.send(b"?")
        with pytest.raises(TimeoutError):
            client.recv(1)


# ---------------------------------------------------------------------------- forwarded

@pytest.mark.parametrize(("address", "seen_from"), [(SERVER, FIREWALL_OUTSIDE), (SERVER6, FIREWALL_OUTSIDE6)])
def test_scenario_7_server_sees_the_firewall(net, backend, address, seen_from):
    net.firewall.load_policy(policy("PFService('fwd')\nRule(dst_port=700, service='fwd')"))
    server = net.server.listen(address, 700)
    client = net.client.connect(address, 700)
    connection, peer = server.accept()
    echo(client, connection)
    assert peer == seen_from


def test_scenario_8_forged_address_survives_the_site_s_masquerade(net, backend):
    net.firewall.iptables("-t", "nat", "-A", "POSTROUTING", "-j", "MASQUERADE")
    net.firewall.load_policy(policy(
        "PFService('fwd', router=TransparentRouter(forge_addr=TRUE))\nRule(dst_port=700, service='fwd')"))
    server = net.server.listen(SERVER, 700)
    client = net.client.connect(SERVER, 700)
    connection, peer = server.accept()
    echo(client, connection)
    assert peer == CLIENT


def test_scenario_9_directed_service_reaches_its_server(net, backend):
    net.firewall.load_policy(policy("PFService('fwd', router=DirectedRouter(SockAddrInet('10.2.0.2', 7000)))\n"
                                   "Rule(dst_port=700, service='fwd')"))
    server = net.server.listen(SERVER, 7000)
    client = net.client.connect("198.51.100.9", 700)
    connection, _ = server.accept()
    echo(client, connection)
    assert client.getpeername() == ("198.51.100.9", 700)


def test_scenario_10_ping_works(net, backend):
    net.firewall.load_policy(policy("PFService('ping')\nRule(proto=(1, 58), service='ping')"))
    for address in (SERVER, SERVER6):
        net.client.ping(address)
    with pytest.raises(TimeoutError):
        net.client.ping("10.2.0.99", timeout_s=SILENCE_S)


def test_scenario_11_net_is_mapped_host_by_host(net, backend):
    net.client.run("ip", "addr", "add", "10.1.0.7/24", "dev", "c0")
    net.firewall.load_policy(policy(
        "PFService('fwd', snat_policy='map')\nRule(dst_port=700, service='fwd')",
        "NATPolicy('map', nat=GeneralNAT([(InetSubnet('10.1.0.0/24'), InetSubnet('0.0.0.0/0'), "
        "InetSubnet('192.0.2.0/24'))]))"))
    server = net.server.listen(SERVER, 700)
    client = net.client.connect(SERVER, 700, source=("10.1.0.7", 0))
    connection, peer = server.accept()
    echo(client, connection)
    assert peer == "192.0.2.7"


def test_scenario_19_connection_ends_with_its_rule(net, backend):
    # given a forwarded connection
    rules = "PFService('fwd')\nRule(dst_port=700, service='fwd')\n"
    daemon = net.firewall.load_policy(policy(rules + "Rule(dst_port=701, service='fwd')"))
    server = net.server.listen(SERVER, 700)
    client = net.client.connect(SERVER, 700)
    echo(client, server.accept()[0])
    # when its rule goes, and another stays
    daemon.write_policy(policy("PFService('fwd')\nRule(rule_id=2, dst_port=701, service='fwd')"))
    assert "forwarded connections ended: 1" in net.firewall.setup("load").stdout
    # then nothing passes any more, and the next attempt is refused
    client.sendall(b"more")
    with pytest.raises(TimeoutError):
        server.accepted[0].settimeout(SILENCE_S) or server.accepted[0].recv(1)
    assert is_silent(net.client, SERVER, 700)


@pytest.mark.parametrize("address", [SERVER, SERVER6])
def test_connection_goes_on_under_another_rule_of_the_same_service(net, backend, address):
    # given a forwarded connection
    daemon = net.firewall.load_policy(policy("PFService('fwd')\nRule(dst_port=700, service='fwd')"))
    server = net.server.listen(address, 700)
    client = net.client.connect(address, 700)
    echo(client, server.accept()[0])
    # when its rule is replaced by one that permits it, too
    daemon.write_policy(policy("PFService('fwd')\nRule(dst_port=(700, 701), service='fwd')"))
    assert "forwarded connections ended: 0" in net.firewall.setup("load").stdout
    # then it goes on, and ends when the new rule goes
    echo(client, server.accepted[0])
    daemon.write_policy(policy("PFService('fwd')\nRule(dst_port=701, service='fwd')"))
    assert "forwarded connections ended: 1" in net.firewall.setup("load").stdout
    client.sendall(b"more")
    assert is_silent(net.client, address, 700)


@pytest.mark.parametrize("change", [
    "PFService('fwd')\nDenyService('no')\nRule(dst_port=700, service='fwd')\nRule(dst_port=700, proto=6, service='no')",
    "PFService('fwd', router=DirectedRouter(SockAddrInet('10.2.0.2', 701)))\nRule(dst_port=700, service='fwd')"],
    ids=["refused_by_a_better_rule", "another_server"])
def test_connection_ends_when_it_would_be_treated_otherwise(net, backend, change):
    # given a forwarded connection
    daemon = net.firewall.load_policy(policy("PFService('fwd')\nRule(dst_port=700, service='fwd')"))
    server = net.server.listen(SERVER, 700)
    client = net.client.connect(SERVER, 700)
    echo(client, server.accept()[0])
    # when the policy now has something else for it
    daemon.write_policy(policy(change))
    assert "forwarded connections ended: 1" in net.firewall.setup("load").stdout


def test_index_that_nat_does_not_know_is_not_forwarded(net, backend):
    # given a service that is directed to a server, and packet rules caught in the middle of a change:
    # the mangle table gives an index away that the nat table has not heard of
    net.firewall.load_policy(policy("PFService('fwd', router=DirectedRouter(SockAddrInet('10.2.0.2', 7000)))\n"
                                   "Rule(dst_port=700, service='fwd')"))
    _head, *rules = net.firewall.iptables("-t", "mangle", "-S", "ZORP_R1").splitlines()
    number = next(number for number, rule in enumerate(rules, 1) if "CONNMARK" in rule)
    net.firewall.iptables("-t", "mangle", "-R", "ZORP_R1", str(number),
                          "-j", "CONNMARK", "--set-xmark", "0x40009/0xfffff")
    server = net.server.listen(SERVER, 700)
    # then a client does not get through to where it asked for
    assert is_silent(net.client, SERVER, 700)
    assert server.nobody_came()
    # and is served as soon as both agree, by the attempt that it makes next
    net.firewall.setup("load")
    directed = net.server.listen(SERVER, 7000)
    echo(net.client.connect(SERVER, 700), directed.accept()[0])


def test_hidden_traffic_is_the_site_s_business(net, backend):
    # given traffic that the site hides and permits itself, and a rule that refuses everything
    net.firewall.more_settings = ("bypass: [{proto: tcp, dst: 10.2.0.2/32, dst_port: 2222}]\n")
    net.firewall.iptables("-A", "FORWARD", "-p", "tcp", "-j", "ACCEPT")
    net.firewall.load_policy(policy("DenyService('no')\nRule(service='no')"))
    # then it passes, and nothing else does
    server, other = net.server.listen(SERVER, 2222), net.server.listen(SERVER, 2223)
    echo(net.client.connect(SERVER, 2222), server.accept()[0])
    assert is_silent(net.client, SERVER, 2223)
    assert other.nobody_came()
