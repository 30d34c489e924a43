"""Forwarded connections when rules change, and the load dies, fails, or says what depends on the moment."""

from __future__ import annotations

import signal
import socket
import sys

import pytest

from test.support.net import CLIENT, SERVER, net, policy

__all__ = ["net"]
pytestmark = pytest.mark.netns

FORWARD = "PFService('fwd')\nRule(proto=6, dst_port={}, service='fwd')\n"
DIES = {"before connections are settled": ("setup_cli", "_settle_sessions", "os.kill(os.getpid(), 9)"),
        "before the state is stored": ("backend.Backend", "apply", "real(*arguments), os.kill(os.getpid(), 9)"),
        "because connections cannot be listed": ("sessions", "_entries", "open('/nowhere')")}


@pytest.fixture
def firewall(net):
    """The firewall, with one instance that is not started."""
    net.firewall.configure("nft")
    net.daemon = net.firewall.add_zorp(policy(FORWARD.format(80)))
    return net.firewall


def load_that_dies(firewall, point: str) -> int:
    """Run kzorp-setup load up to a point; return the exit status."""
    place, name, instead = DIES[point]
    program = (f"import os, sys\nfrom Zorp.netfilter import backend, sessions, setup_cli\nreal = {place}.{name}\n"
               f"{place}.{name} = lambda *arguments: ({instead})\nsys.exit(setup_cli.main())")
    return firewall.run(sys.executable, "-c", program, "--config-dir", str(firewall.directory), "load",
                        check=False).returncode


class Stream:
    """A connection from the client to the server."""

    def __init__(self, net, port: int) -> None:
        self._listening = net.server.listen(SERVER, port)
        self._client = net.client.connect(SERVER, port)
        self._server, _ = self._listening.accept()

    def passes(self) -> bool:
        """Return whether a byte of the client reaches the server."""
        try:
            self._client.sendall(b"x")
            self._server.settimeout(0.7)
            return self._server.recv(1) == b"x"
        except OSError:
            return False


@pytest.mark.parametrize("point", DIES)
def test_connections_of_a_load_that_dies_are_settled_by_the_next_one(net, firewall, point):
    # given a forwarded connection
    firewall.setup("load")
    stream = Stream(net, 80)
    assert stream.passes()
    # when a policy that permits it to nobody is loaded, and the load dies on its way
    net.daemon.write_policy(policy(FORWARD.format(81)))
    assert load_that_dies(firewall, point) in (-signal.SIGKILL, 1)
    assert stream.passes()
    # then the status tells
    status = firewall.setup("status", check=False)
    assert status.returncode == 1
    assert "in force\n" not in status.stdout
    # and the next load, to which the rules are in force already, ends the connection
    assert "unchanged" in (again := firewall.setup("load").stdout)
    assert "connections ended: 1" in again
    assert not stream.passes()
    assert firewall.setup("status").stdout == "in force\n"


def test_the_number_of_a_rule_whose_load_died_is_nobody_else_s(net, firewall):
    # given a load that died when the kernel had its rules, and a connection by its new one
    firewall.setup("load")
    net.daemon.write_policy(policy(FORWARD.format(81)))
    assert load_that_dies(firewall, "before the state is stored") == -signal.SIGKILL
    stream = Stream(net, 81)
    # when a third policy is loaded, with a rule for something else
    net.daemon.write_policy(policy(FORWARD.format(82)))
    firewall.setup("load")
    # then that rule has another number, and the connection is not its
    assert "index 3: forward intra" in firewall.setup("print").stdout
    assert not stream.passes()


DENY = "DenyService('no')\nRule(proto=6, dst_port=80, src_subnet='10.1.0.0/24', service='no')\n"
ELSEWHERE = "Rule(iface='eth9', proto=6, dst_port=9999, service='fwd')\n"


@pytest.mark.parametrize(("before", "after", "survives"), [
    (FORWARD.format(80) + ELSEWHERE, DENY, False),
    (FORWARD.format("80, iface='fc'"), DENY, True),       # came by fc perhaps, and the interface counts more
    (FORWARD.format("80, iface='fc'"), DENY.replace("dst_port=80", "dst_port=80, iface='fc'"), False),
    (FORWARD.format("80, src_zone='named'") + FORWARD.format(80).split("\n")[1] + "\n", DENY, False),
], ids=["a condition elsewhere", "its own condition", "both", "a host name elsewhere"])
def test_a_connection_is_uncertain_only_if_its_own_rule_depends_on_the_moment(net, firewall, before, after, survives):
    # given a forwarded connection
    zones = "Zone('named', hostnames=['a.example.com'])\n"
    net.daemon.write_policy(policy(before, zones))
    firewall.setup("load")
    stream = Stream(net, 80)
    # when a rule refuses what it is
    net.daemon.write_policy(policy(before + after, zones))
    firewall.setup("load")
    # then it ends, unless its own rule might still win
    assert stream.passes() == survives


def test_unanswered_datagrams_go_where_the_new_rule_leads(net, firewall):
    # given a one-way stream of datagrams that is translated
    def led_to(port):
        return policy(f"PFService('log', router=DirectedRouter(SockAddrInet('{SERVER}', {port})))\n"
                      "Rule(proto=17, dst_port=514, service='log')")

    net.daemon.write_policy(led_to(5140))
    firewall.setup("load")
    first, second, client = (namespace.socket(address, socket.SOCK_DGRAM) for namespace, address in (
        (net.server, SERVER), (net.server, SERVER), (net.client, CLIENT)))
    with first, second, client:
        first.bind((SERVER, 5140))
        second.bind((SERVER, 5141))
        client.connect(("10.2.0.99", 514))
        client.send(b"1")
        assert first.recv(9) == b"1"
        # when the rules lead elsewhere, and a datagram comes before connections are settled
        net.daemon.write_policy(led_to(5141))
        assert load_that_dies(firewall, "before connections are settled") == -signal.SIGKILL
        client.send(b"2")
        assert first.recv(9) == b"2"
        assert "connections ended: 1" in firewall.setup("load").stdout
        # then what follows goes there
        client.send(b"3")
        assert second.recv(9) == b"3"


def test_connections_that_the_site_hides_no_longer_are_decided_about(net, firewall):
    # given a connection that passes by the rules of the site
    firewall.more_settings = "bypass:\n  - {proto: tcp, dst_port: 8080}\n"
    firewall.iptables("-P", "FORWARD", "ACCEPT")
    firewall.setup("load")
    stream = Stream(net, 8080)
    firewall.setup("load")
    assert stream.passes()
    # when the site hides it no longer, and no rule permits it
    firewall.more_settings = ""
    firewall.setup("load")
    # then it does not pass any more
    assert not stream.passes()
