"""Compiled policies in a real kernel: zones and sets, and rules that are not ours."""

import errno
import re
import socket

import pytest

from test.support.daemon import wait_until
from test.support.kernel import backend, echo, errors_of_connect, is_silent
from test.support.net import CLIENT6, SERVER, SERVER6, net, policy

__all__ = ["backend", "net"]
pytestmark = pytest.mark.netns

ZONES = "Zone('internet', ['0.0.0.0/0', '::/0'])\nZone('office', '10.1.0.0/24')\nZone('lab', '10.1.0.64/26'{})"


def zone_policy(zones, zone):
    return policy(f"PFService('fwd')\nRule(dst_port=700, src_zone='{zone}', service='fwd')", zones)


@pytest.mark.parametrize(("parent", "passes"), [("", False), (", admin_parent='office'", True)],
                         ids=["scenario_13_no_parent", "scenario_14_child"])
def test_zone_inside_another(net, backend, parent, passes):
    net.client.run("ip", "addr", "add", "10.1.0.66/24", "dev", "c0")
    net.firewall.load_policy(zone_policy(ZONES.format(parent), "office"))
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
    net.firewall.load_policy(zone_policy(ZONES.format(""), "internet"))
    server, six = net.server.listen(SERVER, 700), net.server.listen(SERVER6, 700)
    # then only those outside are in the zone of everything
    assert is_silent(net.client, SERVER, 700)
    echo(net.client.connect(SERVER, 700, source=("200.0.0.1", 0)), server.accept()[0])
    echo(net.client.connect(SERVER6, 700, source=(CLIENT6, 0)), six.accept()[0])


def test_scenario_34_new_address_of_an_interface_counts_at_once(net, backend):
    # given a rule for the addresses of the interface to the client
    net.firewall.load_policy(policy(
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
    net.firewall.load_policy(zone_policy(ZONES.format(""), "office"))
    loaded = state()
    net.firewall.setup("unload")
    # then they were there, and everything is as before
    assert any("ZORP_EVAL" in line for line in loaded[0])
    after = state()
    assert [line for line in after[0] if line.startswith("-A")] == [line for line in before[0] if line.startswith("-A")]
    assert not any("ZORP" in line for line in after[0])
    assert after[1:] == before[1:]


def test_drift_is_reported_and_repaired(net, backend):
    net.firewall.load_policy(zone_policy(ZONES.format(""), "office"))
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
    net.firewall.load_policy(zone_policy(f"Zone('many', [{nets}])", "many"))
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
    assert errors_of_connect(net.client, [(SERVER, 701)]) == {(SERVER, 701): errno.ECONNREFUSED}
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
