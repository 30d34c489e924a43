"""Compiled policies in a real kernel: a client, a firewall and a server in namespaces of their own."""

import errno
import pathlib
import re
import socket
import subprocess
import sys

import pytest

from test.support.daemon import ROOT, wait_until
from test.support.net import (
    CLIENT,
    CLIENT6,
    FIREWALL_OUTSIDE,
    FIREWALL_OUTSIDE6,
    SERVER,
    SERVER6,
    net,
    policy,
)
from Zorp.transport.connect import IP_TRANSPARENT

__all__ = ["net"]
pytestmark = [pytest.mark.netns, pytest.mark.timeout(120)]
BACKENDS = ("nft", "legacy-restore")
SILENCE_S = 1.2                  # a second SYN has been sent by then

PLUG_PORT_80 = policy("""
    Service("web", PlugProxy)
    Rule(proto=6, dst_port=80, service="web")
    """)

UDP_PORT_53 = policy("""
    class QuickPlug(PlugProxy):
        def config(self):
            self.timeout = 1000

    Service("dns", QuickPlug)
    Rule(proto=17, dst_port=53, service="dns")
    """)


@pytest.fixture(params=BACKENDS)
def backend(request, net):
    """Both kinds of iptables."""
    net.firewall.configure(request.param)
    return request.param


def is_silent(namespace, address, port, **arguments):
    try:
        namespace.connect(address, port, timeout_s=SILENCE_S, **arguments).close()
    except TimeoutError:
        return True
    return False


def error_of_connect(namespace, address, port):
    try:
        namespace.connect(address, port, timeout_s=SILENCE_S).close()
    except OSError as problem:
        return problem.errno
    return 0


def echo(client, connection):
    """Check that both ends are connected with each other."""
    client.sendall(b"ping")
    assert connection.recv(4) == b"ping"
    connection.sendall(b"pong")
    assert client.recv(4) == b"pong"


# ---------------------------------------------------------------------------- proxies

@pytest.mark.parametrize(("address", "seen_from"), [(SERVER, FIREWALL_OUTSIDE), (SERVER6, FIREWALL_OUTSIDE6)])
def test_scenario_1_proxy_sees_the_server_s_address_and_so_does_the_client(net, backend, address, seen_from):
    # given a rule for port 80 with a proxy
    daemon = net.firewall.start_zorp(PLUG_PORT_80)
    server = net.server.listen(address, 80)
    # when the client connects to the server
    client = net.client.connect(address, 80)
    connection, peer = server.accept()
    # then bytes pass, the client sees the server's address, the server the firewall's
    echo(client, connection)
    assert client.getpeername()[0] == address
    assert peer == seen_from
    # and the proxy was asked for the server's address
    started = daemon.log.wait_for("core.session", 3, "Starting proxy instance")
    assert started.fields["client_local"].endswith(f"({address}:80)")


def test_scenario_2_without_a_rule_there_is_no_answer(net, backend):
    net.firewall.start_zorp(PLUG_PORT_80)
    server = net.server.listen(SERVER, 81)
    assert is_silent(net.client, SERVER, 81)
    assert server.nobody_came()


def test_scenario_18_without_its_processes_connections_are_dropped(net, backend):
    # given an instance that was killed
    daemon = net.firewall.start_zorp(PLUG_PORT_80)
    server = net.server.listen(SERVER, 80)
    worker = pathlib.Path(f"/proc/{daemon.worker_pid()}")
    daemon.end()
    wait_until(lambda: not worker.exists(), "the end of the worker")
    # then a new connection is neither answered nor forwarded
    assert is_silent(net.client, SERVER, 80)
    assert server.nobody_came()


def test_scenario_20_a_load_with_an_error_leaves_the_old_rules(net, backend):
    # given rules that are loaded
    daemon = net.firewall.start_zorp(PLUG_PORT_80)
    server = net.server.listen(SERVER, 80)
    # when a policy is loaded that is wrong, or cannot be compiled
    for text, complaint in ((policy("Rule(service='nothing')"), "No valid service was specified"),
                            (policy("DenyService('no')\nRule(service='no', proto_subtype=1)"), "ICMP code without")):
        daemon.write_policy(text)
        refused = net.firewall.setup("load", check=False)
        assert refused.returncode == 1
        assert complaint in refused.stderr
    # then packets are treated as before
    echo(net.client.connect(SERVER, 80), server.accept()[0])
    daemon.write_policy(PLUG_PORT_80)
    assert net.firewall.setup("status").stdout == "in force\n"


def test_scenario_21_reloads_without_change_lose_no_connection(net, backend):
    # given a server that answers everybody, and rules
    daemon = net.firewall.start_zorp(PLUG_PORT_80)
    net.server.listen(SERVER, 80).answer_all(b"hello")
    # when packet rules are loaded again and again, and the daemon reloads, while clients connect
    for number in range(6):
        loading = subprocess.Popen(["ip", "netns", "exec", net.firewall.name, *setup_command(net)],
                                   stdout=subprocess.PIPE, text=True)
        if number % 3 == 0:
            daemon.reload()
        while loading.poll() is None:
            with net.client.connect(SERVER, 80) as client:
                assert client.recv(5) == b"hello"
        # then nothing has changed, and no connection failed
        assert loading.stdout.read().startswith("unchanged")


def setup_command(net):
    return [sys.executable, str(ROOT / "sbin" / "kzorp-setup"), "--config-dir", str(net.firewall.directory), "load"]


def test_scenario_30_server_on_the_firewall_makes_no_loop(net, backend):
    # given a server on the firewall itself, and a rule for everybody
    daemon = net.firewall.start_zorp(PLUG_PORT_80)
    server = net.firewall.listen(FIREWALL_OUTSIDE, 80)
    # when a client connects to it
    client = net.client.connect(FIREWALL_OUTSIDE, 80)
    connection, _ = server.accept()
    # then it is reached through one session of the proxy
    echo(client, connection)
    assert len(daemon.log.find("core.session", 3, "Starting proxy instance")) == 1


def test_scenario_31_nobody_connects_to_the_rule_listener_directly(net, backend):
    daemon = net.firewall.start_zorp(PLUG_PORT_80)
    port = rule_port(net)
    with net.firewall.connect("127.0.0.1", port) as client:
        assert client.recv(1) == b""
    daemon.log.wait_for("core.error", 1, "Transparent listener connected directly, dropping connection")


def rule_port(net):
    return int(re.search(r"--on-port (\d+)", net.firewall.iptables("-t", "mangle", "-S"))[1])


def test_scenario_32_accepted_marks_do_not_hang_connections(net, backend):
    # given a host whose accepted sockets inherit marks
    net.firewall.sysctl("net.ipv4.tcp_fwmark_accept", "1")
    net.firewall.start_zorp(PLUG_PORT_80)
    # then the check says so, and connections work for both families
    assert "accepted sockets inherit the mark" in net.firewall.setup("check").stdout
    for address in (SERVER, SERVER6):
        server = net.server.listen(address, 80)
        echo(net.client.connect(address, 80), server.accept()[0])


@pytest.mark.parametrize(("address", "seen_from"), [(SERVER, FIREWALL_OUTSIDE), (SERVER6, FIREWALL_OUTSIDE6)])
def test_scenario_35_datagrams_are_answered_from_the_address_that_was_asked(net, backend, address, seen_from):
    # given a proxy for UDP and a server that answers in upper case
    daemon = net.firewall.start_zorp(UDP_PORT_53)
    server = net.server.answer_datagrams(address, 53)
    with net.client.socket(address, socket.SOCK_DGRAM) as client:
        # when a client asks twice
        for question in (b"one", b"two"):
            client.sendto(question, (address, 53))
            answer, answerer = client.recvfrom(100)
            # then the answers come from where it asked
            assert (answer, answerer[:2]) == (question.upper(), (address, 53))
        # and both questions went through one session
        started = daemon.log.find("core.session", 3, "Starting proxy instance")
        assert [line.fields["client_local"].partition("(")[2] for line in started] == [f"{address}:53)"]
        assert set(server.peers) == {seen_from}
        # and when the session is gone, a later question of the same client begins another
        daemon.log.wait_for("core.session", 4, "Ending proxy instance")
        client.sendto(b"three", (address, 53))
        assert client.recv(100) == b"THREE"
    assert len(daemon.log.find("core.session", 3, "Starting proxy instance")) == 2


def test_udp_is_the_daemon_s_decision(net, backend):
    # given a rule for a zone of clients, and packet rules of a wider one
    zones = "Zone('office', '{}')"
    body = "Service('dns', PlugProxy)\nRule(proto=17, dst_port=53, src_zone='office', service='dns')"
    daemon = net.firewall.start_zorp(policy(body, zones.format("10.9.0.0/24")), load=False)
    daemon.write_policy(policy(body, zones.format("10.1.0.0/24")))
    net.firewall.setup("load")
    server = net.server.answer_datagrams(SERVER, 53)
    # when a client asks that is in the zone for the packet filter only
    with net.client.socket(SERVER, socket.SOCK_DGRAM) as client:
        client.sendto(b"one", (SERVER, 53))
        # then the daemon refuses, and nothing reaches the server
        daemon.log.wait_for("core.policy", 1, "Connection denied by policy")
    assert server.peers == []
    # and once the daemon has the same policy, the same client is served
    daemon.reload()
    with net.client.socket(SERVER, socket.SOCK_DGRAM) as client:
        client.sendto(b"two", (SERVER, 53))
        assert client.recv(100) == b"TWO"


def test_datagrams_without_a_daemon_go_nowhere(net, backend):
    daemon = net.firewall.start_zorp(UDP_PORT_53)
    server = net.server.answer_datagrams(SERVER, 53)
    with net.client.socket(SERVER, socket.SOCK_DGRAM) as client:
        client.sendto(b"one", (SERVER, 53))
        assert client.recv(100) == b"ONE"
        # when the daemon is gone, in the middle of a conversation
        worker = pathlib.Path(f"/proc/{daemon.worker_pid()}")
        daemon.end()
        wait_until(lambda: not worker.exists(), "the end of the worker")
        # then neither this client nor another reaches the server
        client.settimeout(SILENCE_S)
        client.sendto(b"two", (SERVER, 53))
        with pytest.raises(OSError, match=r"timed out|refused"):
            client.recv(100)
    with net.client.socket(SERVER, socket.SOCK_DGRAM) as client:
        client.sendto(b"three", (SERVER, 53))
        client.settimeout(SILENCE_S)
        with pytest.raises(TimeoutError):
            client.recv(100)
    assert len(server.peers) == 1


def test_scenario_36_port_of_a_client_is_used_again(net, backend):
    net.firewall.start_zorp(PLUG_PORT_80)
    server = net.server.listen(SERVER, 80)
    for _ in range(2):
        client = net.client.connect(SERVER, 80, source=(CLIENT, 20_001))
        connection, _ = server.accept()
        echo(client, connection)
        connection.close()               # so the proxy closes first
        assert client.recv(1) == b""
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()


def test_scenario_38_two_instances_get_their_own_clients(net, backend):
    # given two instances with one rule each for port 80, for different zones
    zones = "Zone('near', '10.1.0.2/32')\nZone('far', '10.1.0.3/32')"
    net.client.run("ip", "addr", "add", "10.1.0.3/24", "dev", "c0")
    body = "Service('web', PlugProxy)\nRule(dst_port=80, src_zone='{}', service='web')"
    second = net.firewall.start_zorp(policy(body.format("far"), zones, instance="b"), instance="b", load=False)
    first = net.firewall.start_zorp(policy(body.format("near"), zones, instance="a"), instance="a")
    server = net.server.listen(SERVER, 80)
    # then each client comes to its instance, whichever started first
    for source, daemon in ((CLIENT, first), ("10.1.0.3", second)):
        before = daemon.log.mark()
        echo(net.client.connect(SERVER, 80, source=(source, 0)), server.accept()[0])
        started = daemon.log.wait_for("core.session", 3, "Starting proxy instance", after=before)
        assert source in started.fields["client_address"]
    assert len(first.log.find("core.session", 3, "Starting proxy instance")) == 1


# ---------------------------------------------------------------------------- refused

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
    net.firewall.start_zorp(policy(body))
    net.firewall.sysctl("net.ipv4.icmp_ratelimit", "0")
    net.firewall.sysctl("net.ipv6.icmp.ratelimit", "0")
    own = "10.1.0.1" if family == 4 else "fd00:1::1"
    for target in (address, own):
        for number, (code, expected) in enumerate(errors.items()):
            # when a client connects, then connect() fails as the setting says
            if expected is None:
                assert is_silent(net.client, target, 1000 + number)
                continue
            assert error_of_connect(net.client, target, 1000 + number) == expected, code


def test_scenario_5_reset_has_no_answer_for_udp(net, backend):
    net.firewall.start_zorp(policy(
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
    net.firewall.start_zorp(policy("PFService('fwd')\nRule(dst_port=700, service='fwd')"))
    server = net.server.listen(address, 700)
    client = net.client.connect(address, 700)
    connection, peer = server.accept()
    echo(client, connection)
    assert peer == seen_from


def test_scenario_8_forged_address_survives_the_site_s_masquerade(net, backend):
    net.firewall.iptables("-t", "nat", "-A", "POSTROUTING", "-j", "MASQUERADE")
    net.firewall.start_zorp(policy(
        "PFService('fwd', router=TransparentRouter(forge_addr=TRUE))\nRule(dst_port=700, service='fwd')"))
    server = net.server.listen(SERVER, 700)
    client = net.client.connect(SERVER, 700)
    connection, peer = server.accept()
    echo(client, connection)
    assert peer == CLIENT


def test_scenario_9_directed_service_reaches_its_server(net, backend):
    net.firewall.start_zorp(policy("PFService('fwd', router=DirectedRouter(SockAddrInet('10.2.0.2', 7000)))\n"
                                   "Rule(dst_port=700, service='fwd')"))
    server = net.server.listen(SERVER, 7000)
    client = net.client.connect("198.51.100.9", 700)
    connection, _ = server.accept()
    echo(client, connection)
    assert client.getpeername() == ("198.51.100.9", 700)


def test_scenario_10_ping_works(net, backend):
    net.firewall.start_zorp(policy("PFService('ping')\nRule(proto=(1, 58), service='ping')"))
    for address in (SERVER, SERVER6):
        net.client.ping(address)
    with pytest.raises(TimeoutError):
        net.client.ping("10.2.0.99", timeout_s=SILENCE_S)


def test_scenario_11_net_is_mapped_host_by_host(net, backend):
    net.client.run("ip", "addr", "add", "10.1.0.7/24", "dev", "c0")
    net.firewall.start_zorp(policy(
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
    daemon = net.firewall.start_zorp(policy(rules + "Rule(dst_port=701, service='fwd')"))
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
    daemon = net.firewall.start_zorp(policy("PFService('fwd')\nRule(dst_port=700, service='fwd')"))
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
    daemon = net.firewall.start_zorp(policy("PFService('fwd')\nRule(dst_port=700, service='fwd')"))
    server = net.server.listen(SERVER, 700)
    client = net.client.connect(SERVER, 700)
    echo(client, server.accept()[0])
    # when the policy now has something else for it
    daemon.write_policy(policy(change))
    assert "forwarded connections ended: 1" in net.firewall.setup("load").stdout


def test_index_that_nat_does_not_know_is_not_forwarded(net, backend):
    # given a service that is directed to a server, and packet rules caught in the middle of a change:
    # the mangle table gives an index away that the nat table has not heard of
    net.firewall.start_zorp(policy("PFService('fwd', router=DirectedRouter(SockAddrInet('10.2.0.2', 7000)))\n"
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


def test_scenario_37_expected_connection_to_a_client_is_delivered_to_the_proxy(net, backend):
    # given a proxied session, and the socket on which a proxy waits for the server's data connection:
    # on the client's address, as an FTP proxy makes it for a forged active-mode session
    net.firewall.start_zorp(PLUG_PORT_80)
    expecting = net.firewall.socket(CLIENT)
    expecting.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
    expecting.bind((CLIENT, 20_200))
    expecting.listen()
    at_client = net.client.listen(CLIENT, 20_200)
    # when the server connects to the client's address
    data = net.server.connect(CLIENT, 20_200, source=(SERVER, 20))
    # then the proxy has the connection, with both addresses as they were, and the client has none
    accepted, peer = expecting.accept()
    echo(data, accepted)
    assert peer == (SERVER, 20)
    assert accepted.getsockname() == (CLIENT, 20_200)
    assert at_client.nobody_came()
    # and nothing else of the server's reaches the client
    assert is_silent(net.server, CLIENT, 20_201)


def test_hidden_traffic_is_the_site_s_business(net, backend):
    # given traffic that the site hides and permits itself, and a rule that refuses everything
    net.firewall.more_settings = ("bypass: [{proto: tcp, dst: 10.2.0.2/32, dst_port: 2222}]\n")
    net.firewall.iptables("-A", "FORWARD", "-p", "tcp", "-j", "ACCEPT")
    net.firewall.start_zorp(policy("DenyService('no')\nRule(service='no')"))
    # then it passes, and nothing else does
    server, other = net.server.listen(SERVER, 2222), net.server.listen(SERVER, 2223)
    echo(net.client.connect(SERVER, 2222), server.accept()[0])
    assert is_silent(net.client, SERVER, 2223)
    assert other.nobody_came()


# ---------------------------------------------------------------------------- zones

ZONES = "Zone('internet', ['0.0.0.0/0', '::/0'])\nZone('office', '10.1.0.0/24')\nZone('lab', '10.1.0.64/26'{})"


def zone_policy(zones, zone):
    return policy(f"PFService('fwd')\nRule(dst_port=700, src_zone='{zone}', service='fwd')", zones)


@pytest.mark.parametrize(("parent", "passes"), [("", False), (", admin_parent='office'", True)],
                         ids=["scenario_13_no_parent", "scenario_14_child"])
def test_zone_inside_another(net, backend, parent, passes):
    net.client.run("ip", "addr", "add", "10.1.0.66/24", "dev", "c0")
    net.firewall.start_zorp(zone_policy(ZONES.format(parent), "office"))
    server = net.server.listen(SERVER, 700)
    echo(net.client.connect(SERVER, 700), server.accept()[0])
    if passes:
        echo(net.client.connect(SERVER, 700, source=("10.1.0.66", 0)), server.accept()[0])
    else:
        assert is_silent(net.client, SERVER, 700, source=("10.1.0.66", 0))


def test_scenario_15_everything_else_is_the_zone_of_length_0(net, backend):
    # given clients inside and outside of the zones with addresses of their own
    net.client.run("ip", "addr", "add", "200.0.0.1/32", "dev", "c0")
    net.firewall.run("ip", "route", "add", "200.0.0.1/32", "dev", "fc")
    net.firewall.start_zorp(zone_policy(ZONES.format(""), "internet"))
    server, six = net.server.listen(SERVER, 700), net.server.listen(SERVER6, 700)
    # then only those outside are in the zone of everything
    assert is_silent(net.client, SERVER, 700)
    echo(net.client.connect(SERVER, 700, source=("200.0.0.1", 0)), server.accept()[0])
    echo(net.client.connect(SERVER6, 700, source=(CLIENT6, 0)), six.accept()[0])


def test_scenario_34_new_address_of_an_interface_counts_at_once(net, backend):
    # given a rule for the addresses of the interface to the client
    net.firewall.start_zorp(policy(
        "PFService('fwd', router=DirectedRouter(SockAddrInet('10.2.0.2', 7000)))\nRule(dst_iface='fc', service='fwd')"))
    server = net.server.listen(SERVER, 7000)
    echo(net.client.connect("10.1.0.1", 700), server.accept()[0])
    assert is_silent(net.client, "10.1.0.9", 700)
    # when the interface gets another address
    net.firewall.run("ip", "addr", "add", "10.1.0.9/24", "dev", "fc")
    net.client.run("ip", "neigh", "flush", "dev", "c0")
    # then it matches without a reload
    echo(net.client.connect("10.1.0.9", 700), server.accept()[0])


# ---------------------------------------------------------------------------- own and foreign rules

def test_nothing_foreign_is_touched_and_unload_leaves_nothing(net, backend):
    # given rules and a set of the site
    net.firewall.run("ipset", "create", "site", "hash:ip")
    net.firewall.iptables("-t", "mangle", "-A", "PREROUTING", "-m", "set", "--match-set", "site", "src", "-j", "DROP")
    kind = "nft" if backend == "nft" else "legacy"

    def state():
        saved = net.firewall.run(f"iptables-{kind}-save").stdout + net.firewall.run(f"ip6tables-{kind}-save").stdout
        lines = [re.sub(r"\[.*\]", "", line) for line in saved.splitlines() if line[:1] in (":", "-")]
        return sorted(lines), net.firewall.run("ipset", "list", "-n").stdout, net.firewall.run("ip", "rule").stdout

    net.firewall.iptables("-t", "nat", "-L")
    before = state()
    # when rules are loaded and unloaded
    net.firewall.start_zorp(zone_policy(ZONES.format(""), "office"))
    loaded = state()
    net.firewall.setup("unload")
    # then they were there, and everything is as before
    assert any("ZORP_EVAL" in line for line in loaded[0])
    after = state()
    assert [line for line in after[0] if line.startswith("-A")] == [line for line in before[0] if line.startswith("-A")]
    assert not any("ZORP" in line for line in after[0])
    assert after[1:] == before[1:]


def test_drift_is_reported_and_repaired(net, backend):
    net.firewall.start_zorp(zone_policy(ZONES.format(""), "office"))
    # when somebody flushes a chain, destroys a set's content, or takes a jump out
    net.firewall.iptables("-t", "mangle", "-F", "ZORP_TCP")
    office = net.firewall.set_of("office")
    net.firewall.run("ipset", "flush", office)
    net.firewall.iptables("-D", "FORWARD", "-j", "ZORP_FORWARD")
    # then status says what, and a load repairs it
    status = net.firewall.setup("status", check=False)
    assert status.returncode == 1
    for text in ("table mangle: chain ZORP_TCP has other rules", f"set {office} has other members",
                 "FORWARD does not jump to ZORP_FORWARD once", "drifted"):
        assert text in status.stdout
    assert net.firewall.setup("load").stdout.startswith("loaded")
    assert net.firewall.setup("status").stdout == "in force\n"


def test_large_sets_are_loaded(net, backend):
    nets = ", ".join(f"'10.{a}.{b}.0/24'" for a in range(100, 120) for b in range(250))
    net.firewall.start_zorp(zone_policy(f"Zone('many', [{nets}])", "many"))
    many = net.firewall.run("ipset", "list", "-t", net.firewall.set_of("many")).stdout
    assert many.count("Number of entries: 5000") == 1
    wait_until(lambda: net.firewall.setup("status").stdout == "in force\n", "the state")


def test_python_iptables_loads_what_it_can(net):
    # given a legacy host that wants the library
    net.firewall.configure("legacy")
    zones = "Zone('near', '10.1.0.0/24')"
    daemon = net.firewall.start_zorp(policy("""
        Service('web', PlugProxy)
        PFService('fwd', router=DirectedRouter(SockAddrInet('10.2.0.2', 7000)))
        DenyService('no', logging=FALSE, ipv4_setting=DenyIPv4.TCP_RESET)
        Rule(proto=6, dst_port=80, src_zone='near', service='web')
        Rule(proto=6, dst_port=700, service='fwd')
        Rule(proto=6, dst_port=701, service='no')
        Rule(proto=17, dst_port=53, service='web')
        """, zones))
    # then all three kinds of services work
    web, app = net.server.listen(SERVER, 80), net.server.listen(SERVER, 7000)
    echo(net.client.connect(SERVER, 80), web.accept()[0])
    echo(net.client.connect(SERVER, 700), app.accept()[0])
    assert error_of_connect(net.client, SERVER, 701) == errno.ECONNREFUSED
    names = net.server.answer_datagrams(SERVER, 53)
    with net.client.socket(SERVER, socket.SOCK_DGRAM) as client:
        client.sendto(b"name", (SERVER, 53))
        assert client.recv(100) == b"NAME"
    assert len(names.peers) == 1
    # and what the library would spoil is refused with the rule's number, and the old rules stay in force
    for spoilt, what in (("DenyService('no')\nRule(rule_id=7, service='no')", "cannot log refused connections"),
                         ("PFService('fwd')\nRule(rule_id=7, reqid=5, service='fwd')", "cannot test IPsec request")):
        daemon.write_policy(policy(spoilt))
        refused = net.firewall.setup("load", check=False)
        assert refused.returncode == 1
        assert f"instance 'intra', rule 7: python-iptables {what}" in refused.stderr
        assert "backend: legacy-restore" in refused.stderr
    echo(net.client.connect(SERVER, 80), web.accept()[0])
    net.firewall.setup("unload")
    assert "ZORP" not in net.firewall.run("iptables-legacy-save").stdout
