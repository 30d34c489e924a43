"""A forwarded connection begins with a SYN: connection tracking alone would let it begin anywhere.

To connection tracking the next packet of a TCP connection that it does not know, or does not know
any more, is the first of a new one, whichever side sends it.  Of a connection that was ended with
its rule that next packet may be the server's, which a rule for connections outwards permits.
"""

from __future__ import annotations

import contextlib
import socket
from typing import NamedTuple

import pytest
from pyroute2 import NFCTSocket

from test.support.net import CLIENT, CLIENT6, SERVER, SERVER6, net, policy

__all__ = ["net"]
pytestmark = pytest.mark.netns

OUTWARDS = """
config.options.rule_listen_port = 50080
PFService('out', router=TransparentRouter(forge_addr=TRUE))
PFService('in', router=TransparentRouter(forge_addr=TRUE))
Service('web', PlugProxy)
DenyService('no')
Rule(proto=6, dst_port=9000, service='out')
Rule(proto=6, iface='fs', service='out')
"""
INWARDS = "Rule(proto=6, dst_port=22, iface='fc', service='{}')\n"
FAMILIES = pytest.mark.parametrize(("client", "server"), [(CLIENT, SERVER), (CLIENT6, SERVER6)], ids=["ipv4", "ipv6"])


@pytest.fixture(params=("nft", "legacy-restore"))
def firewall(request, net):
    """The firewall, which forwards connections to port 22 of the server and everything of the server outwards."""
    net.firewall.configure(request.param)
    net.firewall.add_zorp(policy(OUTWARDS + INWARDS.format("in")))
    net.firewall.setup("load")
    return net.firewall


class Pair(NamedTuple):
    """Both ends of a connection; for `with`."""

    near: socket.socket
    far: socket.socket

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *exc_info) -> None:
        self.near.close()
        self.far.close()

    def passes(self) -> bool:
        """Return whether both ends hear each other."""
        self.near.sendall(b"there")
        assert self.far.recv(9) == b"there"
        self.far.sendall(b"back")
        return self.near.recv(9) == b"back"

    def hears_nothing(self, end: socket.socket) -> bool:
        """Return whether nothing has arrived at an end but, perhaps, a reset."""
        end.setblocking(False)
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            return end.recv(99) == b"nothing at all"
        return True


def pair(near, far, address: str, port: int) -> Pair:
    """Return a new connection from one namespace to an address of another."""
    with far.socket(address) as listening:
        listening.bind((address, port))
        listening.listen(1)
        made = near.connect(address, port)
        accepted, _ = listening.accept()
    accepted.settimeout(5)
    return Pair(made, accepted)


def both_ways_are_travelled(net, client: str) -> None:
    """Return when what either side sent before has passed the firewall or not: whatever follows on its way has."""
    with pair(net.server, net.client, client, 9000) as outwards:
        assert outwards.passes()


def forget_connections(firewall) -> None:
    """Let connection tracking of the firewall know no connection any more."""
    def flush() -> None:
        for family in (socket.AF_INET, socket.AF_INET6):
            with NFCTSocket(nfgen_family=family) as tracking:
                tracking.flush()

    firewall.inside(flush)


@FAMILIES
@pytest.mark.parametrize("service", ["no", "web"], ids=["denied", "proxied"])
def test_a_connection_that_ended_with_its_rule_does_not_come_back_by_a_rule_outwards(
        net, firewall, client, server, service):
    with pair(net.client, net.server, server, 22) as cut:
        assert cut.passes()
        # given a connection that was ended because its rule forwards no more
        firewall.daemons[0].write_policy(policy(OUTWARDS + INWARDS.format(service)))
        assert "connections ended: 1" in firewall.setup("load").stdout
        # when the server goes on to speak, which may connect outwards, and then the client
        cut.far.sendall(b"what was under way")
        both_ways_are_travelled(net, client)
        assert cut.hears_nothing(cut.near)
        with contextlib.suppress(ConnectionResetError):
            cut.near.sendall(b"commands")
        both_ways_are_travelled(net, client)
        # then neither hears the other
        assert cut.hears_nothing(cut.far)
        assert cut.hears_nothing(cut.near)


@FAMILIES
def test_a_connection_that_nobody_remembers_begins_anew_with_a_syn_or_not_at_all(net, firewall, client, server):
    # given a forwarded connection that connection tracking has forgotten
    with pair(net.client, net.server, server, 22) as forgotten:
        assert forgotten.passes()
        forget_connections(firewall)
        # when either side goes on
        forgotten.near.sendall(b"x")
        forgotten.far.sendall(b"y")
        both_ways_are_travelled(net, client)
        # then it is not forwarded, though rules permit both
        assert forgotten.hears_nothing(forgotten.far)
        assert forgotten.hears_nothing(forgotten.near)
    # and the next connection is
    with pair(net.client, net.server, server, 22) as anew:
        assert anew.passes()


@FAMILIES
def test_connections_that_are_remembered_go_on_when_rules_are_loaded_anew(net, firewall, client, server):
    # given a forwarded connection, silent while its rules go and others come
    with pair(net.client, net.server, server, 22) as kept:
        assert kept.passes()
        firewall.daemons[0].write_policy(policy(OUTWARDS + "Rule(proto=6, dst_port=(22, 23), service='in')\n"))
        assert "connections ended: 0" in firewall.setup("load").stdout
        # then it goes on, whoever speaks first
        kept.far.sendall(b"y")
        assert kept.near.recv(9) == b"y"
        assert kept.passes()


@FAMILIES
def test_an_open_site_does_not_take_up_what_a_rule_forwards_either(net, firewall, client, server):
    # given a site that forwards what no rule takes, and a connection that its connection tracking has forgotten
    firewall.more_settings = "default_deny: false\n"
    for family in (4, 6):
        firewall.iptables("-P", "FORWARD", "ACCEPT", family=family)
    firewall.setup("load")
    with pair(net.client, net.server, server, 22) as forgotten:
        assert forgotten.passes()
        forget_connections(firewall)
        # when the server goes on, then that is not forwarded
        forgotten.far.sendall(b"y")
        both_ways_are_travelled(net, client)
        assert forgotten.hears_nothing(forgotten.near)
