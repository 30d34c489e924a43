"""What a kernel can do is tried out without changing this one's rules."""

import os
import subprocess

import pytest

from test.netfilter.test_plan import FWD, NO, WEB, instance
from test.support.net import Namespace
from Zorp.netfilter import preflight, probes
from Zorp.netfilter.compiler import compile_plan
from Zorp.netfilter.plan import Chain, Plan, Rule, Table, Target, Test
from Zorp.netfilter.probes import missing, probes_of
from Zorp.netfilter.site import Site
from Zorp.rules.description import ZoneData, parse_net
from Zorp.rules.engine import RuleData

ZONES = (ZoneData(name="office", nets=(parse_net("10.1.0.0/24"), parse_net("2001:db8::/32"))),)


def whole_plan():
    """Return a plan with all kinds of services and most conditions."""
    rules = [RuleData(rule_id=number, service=service.name, dst_port=((number, number),), src_zone=("office",))
             for number, service in enumerate((WEB, FWD, NO), 1)]
    rules += [RuleData(rule_id=4, service="no", proto=(1,), proto_type=(8,)),
              RuleData(rule_id=5, service="no", proto=(58,), proto_type=(128,)),
              RuleData(rule_id=6, service="web", reqid=(7,), ifgroup=(1,), dst_iface=("lo",), src_port=((1, 9),))]
    return compile_plan([instance(*rules, zones=ZONES)], Site())


@pytest.mark.netns
@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and packet rules need root")
@pytest.mark.parametrize("kind", ["nft", "legacy"])
def test_nothing_is_missing_here_and_nothing_is_left(kind):
    # given a namespace of its own
    namespace = Namespace(f"zorp-{os.urandom(4).hex()}-p")
    subprocess.run(["ip", "netns", "add", namespace.name], check=True)
    try:
        # when the kernel is tried out from there
        found = namespace.inside(lambda: missing(whole_plan(), kind))
        # then it can do everything, and neither rules nor sets have come about
        assert found == []
        assert "ZORP" not in namespace.run(f"iptables-{kind}-save").stdout
        assert namespace.run("ipset", "list", "-n").stdout == ""
        # and what it cannot do is found, here a target in a table that forbids it
        wrong = Plan(tables=(Table(4, "filter", (Chain("ZORP_X", (
            Rule((Test("proto", 6),), Target("tproxy", ("127.0.0.1", 1, 1, 1))),)),), ()),),
            sets=(), ip_rules=(), routes=(), indexes=())
        refused = namespace.inside(lambda: missing(wrong, kind))
        assert [(one.what, one.family, one.module) for one in refused] == [("tproxy", 4, "xt_TPROXY")]
    finally:
        subprocess.run(["ip", "netns", "del", namespace.name], check=True)


def test_every_kind_of_test_and_target_is_tried():
    tried = {(family, what) for what, family, _ in probes_of(whole_plan())}
    for what in ("socket", "tproxy", "mark", "connmark", "state", "set-src", "nflog", "reqid", "ifgroup", "local",
                 "sport", "dport", "icmp", "masquerade"):
        assert (4, what) in tried
        assert (6, what) in tried


def test_finding_names_the_command_that_repairs(monkeypatch):
    lacking = [probes.Missing("tproxy", 4, "No chain/target/match by that name"),
               probes.Missing("tproxy", 6, "No chain/target/match by that name"),
               probes.Missing("sets", 4, "listing sets: no such file")]
    monkeypatch.setattr(probes, "missing", lambda plan, kind: lacking)
    found = list(map(str, preflight.kernel_findings(whole_plan(), "nft")))
    assert found == [
        "error: the kernel refuses tproxy for IPv4: No chain/target/match by that name; "
        "repair: modprobe -a xt_TPROXY nft_compat",
        "error: the kernel refuses sets for IPv4: listing sets: no such file; repair: modprobe -a ip_set_hash_net"]


def test_without_rights_the_check_says_that_it_could_not_look(monkeypatch):
    def impossible(plan, kind):
        raise probes.ProbesImpossible("no network namespace can be made: Operation not permitted")

    monkeypatch.setattr(probes, "missing", impossible)
    finding, = preflight.kernel_findings(whole_plan(), "nft")
    assert not finding.is_error
    assert "was not tried out: no network namespace" in str(finding)
