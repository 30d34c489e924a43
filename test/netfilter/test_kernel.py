"""Compiled policies in a real kernel: what goes to proxies. The client, the firewall and the server have namespaces."""

import pathlib
import re
import socket
import subprocess
import sys

import pytest

from test.support.daemon import ROOT, wait_until
from test.support.kernel import SILENCE_S, backend, echo, is_silent
from test.support.net import CLIENT, FIREWALL_OUTSIDE, FIREWALL_OUTSIDE6, SERVER, SERVER6, net, policy
from Zorp.transport.connect import IP_TRANSPARENT

__all__ = ["backend", "net"]
pytestmark = pytest.mark.netns

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
