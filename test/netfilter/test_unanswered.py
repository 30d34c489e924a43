"""Connections that nobody has answered yet when their rule changes: what they are then is what they are translated as.

Connection tracking asks NAT once, about the first packet of a connection.  What a proxy did not
answer and the policy forwards afterwards must begin anew, or the server would see addresses that
the policy hides, and a DirectedRouter would not lead anywhere.
"""

from __future__ import annotations

import contextlib
import errno
import socket

import pytest

from test.support.daemon import wait_until
from test.support.leaks import Capture
from test.support.net import CLIENT, CLIENT6, FIREWALL_OUTSIDE, FIREWALL_OUTSIDE6, SERVER, SERVER6, net, policy

__all__ = ["net"]
pytestmark = pytest.mark.netns

_TRANSPARENT, _TRANSPARENT6 = (socket.SOL_IP, 19), (socket.IPPROTO_IPV6, 75)
LISTENERS = "config.options.rule_listen_port = 50080\n"
PROXIED = policy("Service('web', PlugProxy)\nRule(proto=(6, 17), dst_port=80, service='web')", LISTENERS)
FORWARDED = policy("PFService('fwd')\nRule(proto=(6, 17), dst_port=80, service='fwd')", LISTENERS)
FAMILIES = pytest.mark.parametrize(("own", "client", "server", "outside"), [
    ("127.0.0.1", CLIENT, SERVER, FIREWALL_OUTSIDE), ("::1", CLIENT6, SERVER6, FIREWALL_OUTSIDE6)],
    ids=["ipv4", "ipv6"])


@pytest.fixture(params=("nft", "legacy-restore"))
def firewall(request, net):
    """The firewall, with packet rules that lead to a proxy which is not started."""
    net.firewall.configure(request.param)
    net.firewall.add_zorp(PROXIED)
    net.firewall.setup("load")
    return net.firewall


def attempt(net, server: str) -> socket.socket:
    """Return a client's connection in the making."""
    made = net.client.socket(server)
    made.setblocking(False)
    assert made.connect_ex((server, 80)) == errno.EINPROGRESS
    return made


def is_reached(sock: socket.socket) -> bool:
    """Return whether a connection has been made."""
    with contextlib.suppress(OSError):
        return bool(sock.getpeername())
    return False


@contextlib.contextmanager
def deaf_proxy(net, own: str, server: str):
    """A listener for the proxied whose queue is full: it gets every SYN and answers none."""
    listening = net.firewall.socket(own)
    listening.setsockopt(*(_TRANSPARENT6 if ":" in own else _TRANSPARENT), 1)
    listening.bind((own, 50080))
    listening.listen(0)
    with listening, contextlib.ExitStack() as stack:
        waiting = stack.enter_context(attempt(net, server))
        wait_until(lambda: is_reached(waiting), "the connection that fills the queue")
        yield


@FAMILIES
def test_a_syn_that_the_proxy_did_not_answer_is_forwarded_as_the_new_rule_says(
        net, firewall, own, client, server, outside):
    # given a proxy that has got a client's SYN and does not answer
    listening = net.server.listen(server, 80)
    with deaf_proxy(net, own, server), Capture(net.server) as capture, attempt(net, server) as waiting:
        # when the rule becomes one that forwards
        firewall.daemons[0].write_policy(FORWARDED)
        firewall.setup("load")
        # then the client is served when it tries again, under the firewall's address and no other
        wait_until(lambda: is_reached(waiting), "the server's answer", timeout_s=20)
        assert listening.accept()[1] == outside
        assert {packet.source for packet in capture.arrived(80)} == {outside}


@FAMILIES
def test_datagrams_that_the_proxy_did_not_answer_pass_as_the_new_rule_says_or_not_at_all(
        net, firewall, own, client, server, outside):
    # given a client that talks to a proxy which never answers, and goes away
    listening = net.firewall.socket(own, socket.SOCK_DGRAM)
    listening.setsockopt(*(_TRANSPARENT6 if ":" in own else _TRANSPARENT), 1)
    listening.bind((own, 50080))
    receiving = net.server.socket(server, socket.SOCK_DGRAM)
    receiving.bind((server, 80))
    with receiving, net.client.socket(client, socket.SOCK_DGRAM) as sending:
        sending.bind((client, 4000))
        with listening:
            sending.sendto(b"1", (server, 80))
            assert listening.recv(9) == b"1"
        # when the rule becomes one that forwards, then what the client goes on to say is not forwarded untranslated
        firewall.daemons[0].write_policy(FORWARDED)
        firewall.setup("load")
        with Capture(net.server) as capture:
            sending.sendto(b"2", (server, 80))
            sending.sendto(b"3", (server, 80))
            # and is forwarded as soon as somebody looks after such connections
            firewall.setup("load")
            sending.sendto(b"4", (server, 80))
            text, peer = receiving.recvfrom(9)
            assert (text, *peer[:2]) == (b"4", outside, 4000)
            assert {packet.source for packet in capture.arrived()} == {outside}


def test_what_was_accepted_by_the_host_itself_is_not_lost_when_a_rule_forwards_it(net, firewall):
    # given datagrams to the firewall itself, which no rule takes and nobody answers
    firewall.iptables("-A", "INPUT", "-p", "udp", "--dport", "514", "-j", "ACCEPT")
    with firewall.socket("10.1.0.1", socket.SOCK_DGRAM) as receiving, \
            net.client.socket(CLIENT, socket.SOCK_DGRAM) as sending:
        receiving.bind(("10.1.0.1", 514))
        for text in (b"1", b"2"):
            sending.sendto(text, ("10.1.0.1", 514))
            assert receiving.recv(9) == text
        # when a rule forwards whatever goes to this port
        firewall.daemons[0].write_policy(FORWARDED.replace("dst_port=80", "dst_port=514"))
        firewall.setup("load")
        # then they go on to be received
        for text in (b"3", b"4"):
            sending.sendto(text, ("10.1.0.1", 514))
            assert receiving.recv(9) == text


def test_an_open_site_does_not_forward_untranslated_either(net, firewall):
    # given a site that forwards what no rule takes, and an unanswered stream of datagrams
    firewall.more_settings = "default_deny: false\n"
    firewall.iptables("-P", "FORWARD", "ACCEPT")
    firewall.setup("load")
    with net.server.socket(SERVER, socket.SOCK_DGRAM) as receiving, \
            net.client.socket(CLIENT, socket.SOCK_DGRAM) as sending:
        receiving.bind((SERVER, 514))
        sending.bind((CLIENT, 4000))
        sending.sendto(b"1", (SERVER, 514))
        assert receiving.recvfrom(9) == (b"1", (CLIENT, 4000))
        # when a rule forwards them under the firewall's address
        firewall.daemons[0].write_policy(FORWARDED.replace("dst_port=80", "dst_port=514"))
        firewall.setup("load")
        # then the server sees no other address any more
        with Capture(net.server) as capture:
            for text in (b"2", b"3"):
                sending.sendto(text, (SERVER, 514))
            firewall.setup("load")
            sending.sendto(b"4", (SERVER, 514))
            assert receiving.recvfrom(9) == (b"4", (FIREWALL_OUTSIDE, 4000))
            assert {packet.source for packet in capture.arrived()} == {FIREWALL_OUTSIDE}
