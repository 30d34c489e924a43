"""IPv6 packets with an authentication header: what stands behind it is never judged by less than its own rules."""

from __future__ import annotations

import ipaddress
import socket

import pytest

from test.support.net import CLIENT6, SERVER6, net, policy
from test.support.packet_model import CLOSED, Model
from test.support.packets import authenticated
from Zorp.netfilter.compiler import compile_plan
from Zorp.netfilter.site import Site
from Zorp.rules.description import ForwardData, InstanceDescription
from Zorp.rules.engine import RuleData, Traffic

__all__ = ["net"]

AH, GRE = 51, 47
ADDRESSES = [int(ipaddress.ip_address(address)) for address in (CLIENT6, SERVER6)]


@pytest.mark.netns
@pytest.mark.parametrize("backend", ["nft", "legacy-restore"])
def test_what_a_proxy_gets_does_not_pass_behind_a_header(net, backend):
    # given a policy that forwards everything but port 80
    net.firewall.configure(backend)
    net.firewall.start_zorp(policy("""
        Service("web", PlugProxy)
        PFService("fwd", router=TransparentRouter(forge_addr=TRUE))
        Rule(proto=6, dst_port=80, service="web")
        Rule(service="fwd")
        """))
    with net.server.socket(SERVER6, socket.SOCK_RAW, AH) as behind, \
            net.server.socket(SERVER6, socket.SOCK_RAW, GRE) as other, \
            net.client.socket(CLIENT6, socket.SOCK_RAW, AH) as hidden, \
            net.client.socket(CLIENT6, socket.SOCK_RAW, GRE) as plain:
        # when a client sends a SYN for port 80 behind an authentication header, and something else
        syn = Traffic(int(socket.AF_INET6), *ADDRESSES, socket.IPPROTO_TCP, src_port=4000, dst_port=80)
        hidden.sendto(authenticated(syn), (SERVER6, 0))
        plain.sendto(b"0000", (SERVER6, 0))
        # then the server gets that, and not the SYN
        assert other.recv(99) == b"0000"
        behind.settimeout(0.2)
        with pytest.raises(TimeoutError):
            behind.recv(99)


def test_it_is_a_protocol_of_its_own_in_ipv4_only():
    rules = (RuleData(rule_id=1, service="fwd", proto=(AH,)), RuleData(rule_id=2, service="fwd"))
    model = Model(compile_plan([InstanceDescription(
        instance="i", zones=(), services=(ForwardData(name="fwd"),), rules=rules, listeners=())], Site()))
    assert model.rule_of(Traffic(int(socket.AF_INET), 1, 2, AH))[0].rule_id == 1
    assert model.rule_of(Traffic(int(socket.AF_INET6), 1, 2, AH))[0] == CLOSED
    assert model.rule_of(Traffic(int(socket.AF_INET6), 1, 2, GRE))[0].rule_id == 2
