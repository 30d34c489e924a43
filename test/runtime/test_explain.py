"""zorp --explain: what a policy does with a connection, and why."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from test.support.tree import ROOT
from Zorp.Constants import ZD_PROTO_TCP, ZD_PROTO_UDP
from Zorp.runtime.explain import QuestionError, read_question

POLICY = """
from Zorp.Core import *
from Zorp.Plug import *
Zone("internet", "0.0.0.0/0")
Zone("intranet", "10.0.0.0/8")
Zone("office", "10.1.0.0/16", admin_parent="intranet")
Zone("dmz", "10.2.0.0/16", admin_parent="intranet")

class OfficePlug(PlugProxy):
    def config(self):
        PlugProxy.config(self)

NATPolicy("hide", StaticNAT(SockAddrInet("192.0.2.1", 0)))

def intra():
    Service("web", OfficePlug, snat_policy="hide", max_instances=100)
    Service("strict", PlugProxy, router=DirectedRouter(SockAddrInet("192.0.2.80", 25)), limit_target_zones_to="dmz")
    DenyService("no")
    Rule(rule_id=10, src_zone="intranet", dst_zone="internet", dst_port=80, service="web")
    Rule(rule_id=11, src_zone="office", dst_zone="internet", dst_port=80, service="web")
    Rule(rule_id=12, src_zone="office", dst_zone="internet", dst_port=443, service="web")
    Rule(rule_id=14, src_zone="office", dst_port=25, service="no")
    Dispatcher(DBSockAddr(SockAddrInet("10.1.0.1", 2525), ZD_PROTO_TCP), "strict")
"""


@pytest.fixture
def explain(tmp_path):
    path = tmp_path / "policy.py"
    path.write_text(textwrap.dedent(POLICY))

    def run(question, *arguments):
        return subprocess.run(
            [sys.executable, str(ROOT / "sbin/zorp"), "--as", "intra", "--policy", str(path), "--user",
             str(os.getuid()), "--explain", question, *arguments], capture_output=True, text=True, timeout=30,
            check=False)
    run.path = path
    return run


def test_a_connection_is_explained_with_the_rules_that_lost(explain):
    explained = explain("tcp 10.1.0.2 203.0.113.80:80 eth1")
    assert explained.returncode == 0, explained.stderr
    path = explain.path
    assert explained.stdout == f"""\
TCP 10.1.0.2:1024 -> 203.0.113.80:80 on eth1
client zone: office (10.1.0.0/16) inside intranet
server zone: internet (0.0.0.0/0)
taken by: the rules of the policy
rule: 11 ({path}:20), service web
    it asks for destination port: dst_port=80; source address: src_zone=office; destination address: dst_zone=internet
    it matches, too, but lost: 10 ({path}:19), service web
        less specific in source address: it asks for src_zone=intranet, rule 11 for src_zone=office
    it does not match: 12 ({path}:21), service web
        destination port: dst_port=443, the connection has 80
    it does not match: 14 ({path}:22), service no
        destination port: dst_port=25, the connection has 80
service: web ({path}:16), a proxy serves
    proxy: OfficePlug, built on PlugProxy, config at {path}:10
    router: TransparentRouter, the server that the client addressed
    chainer: ConnectChainer
    server: 203.0.113.80:80 in zone internet (0.0.0.0/0)
    snat_policy: hide (StaticNAT)
    max_instances: 100
PERMITTED by service web
"""


def test_an_answer_that_host_names_can_change_says_so(explain):
    # given zones of host names beside the others
    explain.path.write_text(explain.path.read_text().replace(
        'Zone("dmz"', 'Zone("partner", hostnames="gateway.partner.example")\nZone("dmz"'))
    # then every answer about a connection is conditional, and says who knows more
    permitted = explain("tcp 10.1.0.2 203.0.113.80:80 eth1")
    *_, doubt, last = permitted.stdout.splitlines()
    assert doubt.startswith("UNCERTAIN: host names are not resolved here; zones that have some: partner; ")
    assert "kzorp --evaluate" in doubt
    assert last == "PERMITTED by service web, unless a host name has one of these addresses"
    refused = explain("tcp 10.3.0.1 203.0.113.80:443").stdout.splitlines()
    assert refused[-1] == "REFUSED: no rule matches, unless a host name has one of these addresses"
    assert json.loads(explain("tcp 10.1.0.2 203.0.113.80:80", "--json").stdout)["unresolved_zones"] == ["partner"]


def test_what_the_server_sees_and_how_long_we_wait_is_explained(explain):
    # given a dispatcher whose service forges addresses and has times of its own
    explain.path.write_text(explain.path.read_text().replace(
        'Service("strict", PlugProxy, router=DirectedRouter(SockAddrInet("192.0.2.80", 25))',
        'Service("strict", PlugProxy, router=DirectedRouter(SockAddrInet("10.2.0.80", 25), forge_addr=TRUE, '
        'forge_port=Z_PORT_EXACT), chainer=FailoverChainer(timeout_connect=3000, timeout_state=30000), '
        'keepalive=Z_KEEPALIVE_BOTH'))
    lines = explain("tcp 203.0.113.7 10.1.0.1:2525").stdout.splitlines()
    # then the zone of the server is that of the server, and not that of our own address
    assert not [line for line in lines if line.startswith("server zone")]
    assert "zone of the address that the client connects to: office (10.1.0.0/16) inside intranet" in lines
    assert "    server: 10.2.0.80:25 in zone dmz (10.2.0.0/16) inside intranet" in lines
    # and all that the router and the chainer were told is there
    for line in ("        forge_addr: TRUE, the server sees the client's address", "        forge_port: Z_PORT_EXACT",
                 "        timeout_connect: 3000 ms", "        timeout_state: 30000 ms",
                 "    keepalive: of both connections"):
        assert line in lines
    assert lines[-1] == "PERMITTED by service strict"


@pytest.mark.parametrize(("question", "last"), {
    "no rule": ("tcp 10.3.0.1 203.0.113.80:443", "REFUSED: no rule matches"),
    "a service that denies": ("tcp 10.1.0.2 203.0.113.80:25", "REFUSED: service no denies"),
    "a server that is not permitted": (
        "tcp 10.1.0.7 10.1.0.1:2525",
        "REFUSED when it connects: service strict may not go to servers in zone internet"),
}.values())
def test_refusals(explain, question, last):
    assert explain(question).stdout.splitlines()[-1] == last


def test_the_same_for_programs(explain):
    answer = json.loads(explain("tcp 10.1.0.7 10.1.0.1:2525", "--json").stdout)
    assert answer["listener"]["class"] == "Dispatcher"
    assert answer["service"]["servers"][0]["zone"]["name"] == "internet"
    assert answer["refused"] is None
    assert answer["policy_file"] == str(explain.path)


def test_a_service_is_explained_with_the_rules_that_lead_to_it(explain):
    lines = explain("service web").stdout.splitlines()
    assert lines[0].startswith("service: web (")
    assert [line.split()[2] for line in lines if line.startswith("used by: ")] == ["10", "11", "12"]


@pytest.mark.parametrize(("question", "complaint"), {
    "no such service": ("service nope", "no such service: nope; the policy has: no, strict, web"),
    "no address": ("tcp x 10.1.0.1:80", "not an IP address: x"),
    "no port": ("tcp 10.1.0.2 10.1.0.1", "no port in 10.1.0.1"),
    "nonsense": ("what?", "write: tcp|udp CLIENT[:PORT] SERVER:PORT [INTERFACE], or: service NAME"),
    "families": ("tcp 10.1.0.2 [2001:db8::1]:80", "of different address families"),
}.values())
def test_questions_that_make_no_sense(explain, question, complaint):
    explained = explain(question)
    assert (explained.returncode, explained.stdout) == (1, "")
    assert complaint in explained.stderr


def test_a_policy_that_does_not_load_explains_nothing(explain):
    explain.path.write_text("broken(\n")
    explained = explain("service web")
    assert (explained.returncode, explained.stdout) == (2, "")
    assert f"{explain.path}:1: " in explained.stderr


@pytest.mark.parametrize(("text", "protocol", "client", "server"), [
    ("tcp 10.1.0.2 192.0.2.1:80", ZD_PROTO_TCP, ("10.1.0.2", 1024), ("192.0.2.1", 80)),
    ("UDP [2001:DB8::2]:53 [2001:db8::1]:53", ZD_PROTO_UDP, ("2001:db8::2", 53), ("2001:db8::1", 53)),
    ("tcp 2001:db8::2 [2001:db8::1]:25 eth0", ZD_PROTO_TCP, ("2001:db8::2", 1024), ("2001:db8::1", 25))])
def test_questions(text, protocol, client, server):
    arrival = read_question(text)
    assert (arrival.protocol, arrival.client, arrival.destination) == (protocol, client, server)


@pytest.mark.parametrize("text", ["", "tcp", "icmp 10.1.0.1 10.1.0.2:1", "tcp 10.1.0.1 10.1.0.2:99999",
                                  "tcp 10.1.0.1 10.1.0.2:0", "tcp 10.1.0.1 10.1.0.2:\N{ARABIC-INDIC DIGIT EIGHT}",
                                  "tcp [fe80::1%lo] [fe80::2%lo]:80", "tcp fe80::1%lo [fe80::2]:80"])
def test_no_questions(text):
    with pytest.raises(QuestionError):
        read_question(text)
