"""S004, minimal configuration and KZorp: the packet filter does what the paper's rules and module did."""

from __future__ import annotations

import re
import socket

import pytest

from test.seeds import covers
from test.support.leaks import Capture, connected
from test.support.net import (
    CLIENT,
    FIREWALL_OUTSIDE,
    FIREWALL_OUTSIDE6,
    SERVER,
    SERVER6,
    network,
    policy,
)
from Zorp.netfilter.conntrack import connections

pytestmark = pytest.mark.netns

POLICY = policy("""
    Service("web", PlugProxy)
    PFService("forwarded")
    PFService("shown", router=TransparentRouter(forge_addr=TRUE))
    PFService("translated", dnat_policy="elsewhere")
    DenyService("refused", ipv4_setting=DenyIPv4.TCP_RESET, ipv6_setting=DenyIPv6.TCP_RESET)
    Rule(rule_id=10, proto=6, dst_port=80, src_zone="office", dst_zone="internet", service="web")
    Rule(rule_id=20, proto=6, dst_port=700, src_zone="office", service="forwarded")
    Rule(rule_id=21, proto=6, dst_port=701, src_zone="office", service="shown")
    Rule(rule_id=22, proto=6, dst_port=702, src_zone="office", service="translated")
    Rule(rule_id=30, proto=6, dst_port=23, src_zone="office", service="refused")
    """, """
    Zone("office", ["10.1.0.0/24", "fd00:1::/64"])
    Zone("lab", ["10.1.0.64/26"])
    Zone("forbidden", ["10.2.0.66/32"])
    Zone("internet", ["0.0.0.0/0", "::/0"])
    NATPolicy("elsewhere", nat=GeneralNAT([
        (InetSubnet("0.0.0.0/0"), InetSubnet("198.51.100.9/32"), InetSubnet("10.2.0.2/32"))]))
    """)
DIVERTED = "0x80000000/0x80000000"
FAMILIES = [(4, SERVER, FIREWALL_OUTSIDE), (6, SERVER6, FIREWALL_OUTSIDE6)]


@pytest.fixture(scope="module")
def firewall(tmp_path_factory):
    """A firewall whose site forwards one port by itself; .net are its neighbours."""
    with network(tmp_path_factory.mktemp("s004")) as net:
        net.firewall.configure("nft", "export_zone_sets: true\nbypass: [{proto: tcp, dst_port: 2222}]\n")
        for direction in ("--dport", "--sport"):
            net.firewall.iptables("-A", "FORWARD", "-p", "tcp", direction, "2222", "-j", "ACCEPT")
        net.firewall.start_zorp(POLICY)
        net.firewall.net = net
        yield net.firewall


def rules(firewall, table, family=4):
    """Return the rules of a table as iptables -S shows them."""
    return firewall.iptables("-t", table, "-S", family=family).splitlines()


def visit(firewall, address, port, *, server=None):
    """Let a client connect; return whom the server sees and whom the client sees."""
    net = firewall.net
    listening = net.server.listen(server or address, port)
    with net.client.connect(address, port) as client:
        connection, peer = listening.accept()
        client.sendall(b"ping")
        assert connection.recv(4) == b"ping"
        seen = peer, client.getpeername()[:2]
    listening.close()
    return seen


@covers("S004-1", "S004-2")
def test_the_policy_is_in_the_packet_filter_when_the_instance_serves(firewall):
    # then the kernel holds what the policy says
    assert firewall.setup("status").stdout == "in force\n"
    evaluated = [line for line in rules(firewall, "mangle") if "ZORP_" in line]
    for port in (80, 700, 701, 702, 23):
        assert any(f"--dport {port} " in line for line in evaluated), evaluated


@covers("S004-3", "S004-22")
def test_a_decision_is_a_drop_or_lets_the_site_s_rules_decide(firewall):
    # given a rule of the site for a port that the firewall's rules leave to it
    visit(firewall, SERVER, 2222)
    # then what no rule allows is dropped
    with Capture(firewall.net.server) as capture:
        assert connected(firewall.net.client, [(SERVER, 23), (SERVER, 81)]) == []
        assert capture.arrived() == []


@covers("S004-4")
def test_zones_are_sets_that_the_site_s_rules_can_ask(firewall):
    # given the sets of zones
    sets = firewall.run("ipset", "save").stdout
    assert "add zorp.exact4.office 10.1.0.0/24" in sets
    assert "add zorp.exact4.office 10.1.0.64/26 nomatch" in sets
    assert "add zorp.exact6.office fd00:1::/64" in sets
    # when the site counts a zone's packets
    rule = ("INPUT", "-p", "icmp", "-m", "set", "--match-set", "zorp.exact4.office", "src", "-j", "ACCEPT")
    firewall.iptables("-A", *rule)
    firewall.net.client.ping("10.1.0.1")
    # then its rule meets them
    assert re.search(r"-A INPUT .*zorp\.exact4\.office.* -c [1-9]", firewall.iptables("-S", "INPUT", "-v"))
    firewall.iptables("-D", *rule)


@covers("S004-5", "S004-6")
@pytest.mark.parametrize(("service", "port", "kind"), [("web", 80, 0), ("forwarded", 700, 0x40000)])
def test_a_connection_bears_its_service_and_the_kind_of_it(firewall, service, port, kind):
    # given the number of a service's rule, as it is printed for the site's own rules
    index = int(re.search(rf"^index (\d+): .* service {service}$", firewall.setup("print").stdout, re.M)[1])
    net = firewall.net
    listening = net.server.listen(SERVER, port)
    with net.client.connect(SERVER, port) as client:
        listening.accept()
        # then the connection's mark is that number, and the kind of the service
        tracked = firewall.inside(lambda: connections(kind | index, 0xFFFFF))
        assert client.getsockname()[1] in [each.original.source_port for each in tracked]
    listening.close()


@covers("S004-7")
def test_a_pair_of_zones_without_a_rule_is_refused(firewall):
    firewall.net.server.run("ip", "addr", "replace", "10.2.0.66/24", "dev", "s0")
    with Capture(firewall.net.server) as capture:
        assert connected(firewall.net.client, [("10.2.0.66", 80)]) == []
        assert capture.arrived() == []


@covers("S003-30", "S004-8", "S004-11", "S004-12", "S004-28")
@pytest.mark.parametrize(("family", "server", "outside"), FAMILIES)
def test_a_connection_to_a_host_behind_the_firewall_is_the_proxy_s(firewall, family, server, outside):
    # given no rule of the administrator's that redirects
    # the server speaks with the firewall, the client with the server as it believes
    assert visit(firewall, server, 80) == (outside, (server, 80))


@covers("S004-9", "S004-10")
@pytest.mark.parametrize(("family", "server", "outside"), FAMILIES)
def test_packets_of_a_pfservice_pass_without_a_proxy(firewall, family, server, outside):
    started = len(firewall.daemons[0].log.find("core.session", 3, "Starting proxy instance"))
    assert visit(firewall, server, 700)[0] == outside
    assert visit(firewall, server, 701)[0] in (CLIENT, "fd00:1::2")
    assert len(firewall.daemons[0].log.find("core.session", 3, "Starting proxy instance")) == started


@covers("S004-9")
def test_packets_of_a_pfservice_are_translated(firewall):
    assert visit(firewall, "198.51.100.9", 702, server=SERVER)[1] == ("198.51.100.9", 702)


@covers("S004-13", "S004-14", "S004-15", "S004-16", "S004-17", "S004-18", "S004-20", "S004-23")
@pytest.mark.parametrize("family", [4, 6])
def test_the_rules_of_the_paper_are_there_in_both_families(firewall, family):
    mangle, filtering = rules(firewall, "mangle", family), rules(firewall, "filter", family)
    chain = [line for line in mangle if line.startswith("-A ZORP ")]

    def place(*words):
        found = [number for number, line in enumerate(chain) if all(word in line for word in words)]
        assert found, chain
        return found[0]

    # packets of a socket are marked, marked ones accepted, then come the site's bypasses, then evaluation
    assert "-A PREROUTING -j ZORP" in mangle
    order = [place("-m socket --transparent", "-j MARK", DIVERTED), place(f"--mark {DIVERTED}", "-j ACCEPT"),
             place("-j ZORP_BYPASS"), place("-j ZORP_EVAL")]
    assert order == sorted(order)
    assert any(line.startswith("-A ZORP_BYPASS ") and "--dport 2222" in line for line in mangle)
    # the diversion makes the same mark
    assert any("-j TPROXY" in line and f"--tproxy-mark {DIVERTED}" in line for line in mangle)
    # diverted and forwarded packets are accepted
    assert f"-A ZORP_INPUT -m mark --mark {DIVERTED} -j ACCEPT" in filtering
    assert any(line.startswith("-A ZORP_FORWARD -m connmark --mark 0x40000/0xc0000 -m conntrack ! --ctstate INVALID "
                               "-j ACCEPT") for line in filtering)


@covers("S004-21")
@pytest.mark.parametrize("family", [4, 6])
def test_nothing_else_is_opened(firewall, family):
    accepts = [line for line in rules(firewall, "filter", family) if line.startswith("-A ZORP") and "ACCEPT" in line]
    assert len(accepts) == 2


@covers("S004-24", "S004-25", "S004-26", "S004-27")
@pytest.mark.parametrize("family", ["-4", "-6"])
def test_marked_packets_are_routed_here_by_a_table_that_needs_no_name(firewall, family):
    assert "fwmark 0x80000000/0x80000000 lookup 100" in firewall.run("ip", "-N", family, "rule").stdout
    assert "local default dev lo" in firewall.run("ip", family, "route", "show", "table", "100").stdout


@covers("S004-29")
def test_a_transparent_socket_of_any_program_gets_its_packets(firewall):
    # given a program on the firewall that listens for clients of a server, as the proxy of a protocol with
    # data connections does for a server that will connect to the client
    for end, address in ((firewall.net.client, SERVER), (firewall.net.server, CLIENT)):
        with firewall.socket(address) as listening:
            listening.setsockopt(socket.SOL_IP, socket.IP_TRANSPARENT, 1)
            listening.bind((address, 20_020))
            listening.listen()
            # when somebody connects there
            with end.connect(address, 20_020) as connecting:
                # then it is that program's
                accepted, peer = listening.accept()
                assert peer == connecting.getsockname()
                accepted.close()
