"""Each policy in policies/ has its plan beside it; `python -m test.netfilter.test_plan` writes them anew."""

import dataclasses
import functools
import pathlib
import random
import subprocess
import sys

import pytest

from test.support.daemon import ROOT
from test.support.packet_model import Model
from test.support.random_policies import Generator
from Zorp.netfilter.compiler import CompileError, IndexState, compile_plan
from Zorp.netfilter.plan import MAX_SET_NAME_BYTES
from Zorp.netfilter.site import Bypass, Marks, Site
from Zorp.rules.description import (
    DenyData,
    ForwardData,
    InstanceDescription,
    ListenerData,
    ProxyData,
    ZoneData,
    from_json,
    parse_net,
)
from Zorp.rules.engine import RuleData, Traffic

POLICIES = sorted((pathlib.Path(__file__).parent / "policies").glob("*.py"))
WEB, FWD, NO = ProxyData(name="web"), ForwardData(name="fwd"), DenyData(name="no")
LISTENERS = (ListenerData(6, "127.0.0.1", 50080), ListenerData(6, "::1", 50081))


@functools.cache
def description_of(policy):
    result = subprocess.run([sys.executable, str(ROOT / "sbin" / "zorp"), "--as", "instance", "--policy", str(policy),
                             "--describe", "--user", "0", "--group", "0"], capture_output=True, text=True, timeout=30)
    assert result.returncode == 0, result.stderr
    return dataclasses.replace(from_json(result.stdout), instance=policy.stem)


def plan_text(policy):
    return str(compile_plan([description_of(policy)], Site()))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda path: path.stem)
def test_plan(policy):
    assert plan_text(policy) == policy.with_suffix(".plan").read_text()


def instance(*rules, name="i", zones=(), services=(WEB, FWD, NO)):
    return InstanceDescription(instance=name, zones=zones, services=services, rules=rules, listeners=LISTENERS)


def levels(plan, name="ZORP", family=4):
    """Return how many chains follow each other at most, this one included."""
    return 1 + max((levels(plan, rule.target.values[0], family) for found in plan.table(family, "mangle").chains
                    if found.name == name for rule in found.rules if rule.target.what in ("goto", "jump")), default=0)


def test_the_way_to_a_rule_is_no_longer_than_nf_tables_follows():
    # given a rule with so many ports that the tree of questions would be deep, also for datagrams that come again
    listeners = tuple(ListenerData(17, address, 50_080) for address in ("127.0.0.1", "::1"))
    described = dataclasses.replace(instance(RuleData(rule_id=1, service="web", proto=(17,), dst_port=tuple(
        (port, port) for port in range(1, 4_000, 2)))), listeners=listeners)
    plan = compile_plan([described], Site(split_above=1))
    # then PREROUTING, a chain of the site and ours are at most the 16 that follow each other
    assert levels(plan) <= 14
    # and each port still finds it
    for port, found in ((1, True), (2, False), (1_999, True), (3_999, True), (4_001, False)):
        rule, _ = Model(plan).rule_of(Traffic(2, 1, 2, 17, src_port=1, dst_port=port))
        assert (rule is not None) == found


def test_the_number_that_means_every_protocol_is_refused():
    with pytest.raises(CompileError, match="rule 1: protocol 0 has no packet form"):
        compile_plan([instance(RuleData(rule_id=1, service="fwd", proto=(0,)))], Site())


def chain(plan, name, family=4):
    return [str(rule) for table in plan.tables if table.family == family for found in table.chains
            if found.name == name for rule in found.rules]


def indexes(plan):
    return {(rule.instance, rule.rule_id): rule.index for rule in plan.indexes}


# ---------------------------------------------------------------------------- whole plans

def test_order_of_rules_and_equal_input_change_nothing():
    # given random policies
    descriptions = Generator(5).instances()
    # when they are compiled twice
    first, second = (compile_plan(descriptions, Site()) for _ in range(2))
    # then the plans are equal, and so are their texts
    assert first == second
    assert str(first) == str(second)


def test_every_diversion_is_followed_by_a_drop():
    for policy in POLICIES:
        for table in compile_plan([description_of(policy)], Site()).tables:
            for found in table.chains:
                if any(rule.target.what == "tproxy" for rule in found.rules):
                    assert str(found.rules[-1]) == "-> drop"


def test_names_fit_the_kernel():
    plan = compile_plan([description_of(policy) for policy in POLICIES], Site(export_zone_sets=True))
    assert max(len(members.name) for members in plan.sets) <= MAX_SET_NAME_BYTES
    assert len({members.name for members in plan.sets}) == len(plan.sets)
    assert max(len(found.name) for table in plan.tables for found in table.chains) <= 28


def named(*addresses, inner="10.1.0.64/26", site=None):
    """Return the plan for a zone whose host name has these addresses, inside a zone of nets, with a zone in it."""
    nets = tuple(map(parse_net, addresses))
    zones = (ZoneData(name="office", nets=(parse_net("10.1.0.0/24"),)),
             ZoneData(name="guests", nets=(parse_net(inner),)),
             ZoneData(name="partner", hostnames=("partner.test",), nets=nets, addresses=nets))
    rules = [RuleData(rule_id=number, service="fwd", src_zone=(zone,))
             for number, zone in enumerate(("office", "partner"), 1)]
    return compile_plan([instance(*rules, zones=zones)], site or Site())


def test_addresses_of_host_names_change_members_and_neither_names_nor_rules():
    some, others = named("192.0.2.1/32"), named("192.0.2.2/32", "10.1.0.5/32")
    assert some.sets != others.sets
    assert [found.name for found in some.sets] == [found.name for found in others.sets]
    assert some.tables == others.tables


def test_nets_of_zones_change_the_names_of_sets():
    # given a zone without host names, with other nets than before
    office, other = (ZoneData(name="office", nets=(parse_net(net),)) for net in ("10.1.0.0/24", "10.2.0.0/24"))
    rule = RuleData(rule_id=1, service="fwd", src_zone=("office",))
    plans = [compile_plan([instance(rule, zones=(zone,))], Site(export_zone_sets=True)) for zone in (office, other)]
    # then old and new set can stand side by side, and those that the site uses keep their names
    names = [{found.name for found in plan.sets} for plan in plans]
    assert names[0] & names[1] == {f"zorp.{kind}{family}.office" for kind in ("exact", "tree") for family in (4, 6)}
    # and where hosts are named, any zone that is said otherwise changes the names of all
    assert not ({found.name for found in named().sets} & {found.name for found in named(inner="10.1.0.0/26").sets})


def test_names_of_sets_do_not_depend_on_the_order_of_instances():
    # given zones of one name in two instances
    rule = RuleData(rule_id=1, service="fwd", src_zone=("office",))
    both = [instance(rule, name=name, zones=(ZoneData(name="office", nets=(parse_net(net),)),))
            for name, net in (("a", "10.1.0.0/24"), ("b", "10.2.0.0/24"))]
    sets = {frozenset(compile_plan(found, Site()).sets) for found in (both, both[::-1])}
    assert len(sets) == 1
    # then what is left of one instance has the names that it had
    assert set(compile_plan(both[1:], Site()).sets) < sets.pop()


def test_without_rules_nothing_is_forwarded():
    assert chain(compile_plan([], Site()), "ZORP_FORWARD")[-1] == "-> drop"


def test_marks_can_be_moved():
    # given other software's marks where ours usually are
    site = Site(marks=Marks(divert=0x10, own=0x20, connection_shift=12))
    # when a policy with all kinds of services is compiled
    text = str(compile_plan([description_of(POLICIES[-1])], site))
    # then our bits are elsewhere
    assert "connmark 0x1000 0xfffff000" in text
    assert "fwmark 0x10/0x10" in text
    assert "0x80000000/0xc0000000 -> goto ZORP_DENY" in text
    assert "/0xfffff " not in text


def test_site_hides_traffic_before_evaluation():
    site = Site(bypass=(Bypass(iface="mgmt"), Bypass(proto=6, dst="10.0.0.1/32", dst_port=(22, 22))))
    plan = compile_plan([instance(RuleData(rule_id=1, service="web"))], site)
    assert chain(plan, "ZORP")[-2:] == ["state=NEW -> jump ZORP_BYPASS", "-> jump ZORP_EVAL"]
    assert chain(plan, "ZORP_BYPASS") == ["iface=mgmt -> goto ZORP_BYPASSED",
                                          "proto=6 dport=22 dst=10.0.0.1/32 -> goto ZORP_BYPASSED"]
    assert chain(plan, "ZORP_BYPASS", family=6) == ["iface=mgmt -> goto ZORP_BYPASSED"]


# ---------------------------------------------------------------------------- indexes

def test_rule_keeps_its_index_and_a_new_one_gets_a_fresh_number():
    # given a plan of two rules
    kept, gone = RuleData(rule_id=1, service="web"), RuleData(rule_id=2, service="no", proto=(6,))
    before = compile_plan([instance(kept, gone)], Site())
    state = IndexState.of(before, IndexState())
    # when one is replaced
    new = RuleData(rule_id=2, service="no", proto=(17,))
    after = compile_plan([instance(kept, new)], Site(), state)
    # then the other keeps its index, and the new one does not inherit that of the old
    assert indexes(before) == {("i", 1): 1, ("i", 2): 2}
    assert indexes(after) == {("i", 1): 1, ("i", 2): 3}
    # and without a change nothing changes, also over a text
    again = IndexState.from_json(IndexState.of(after, state).to_json())
    assert compile_plan([instance(kept, new)], Site(), again) == after


def test_indexes_go_round_without_taking_one_in_use():
    rules = [RuleData(rule_id=number, service="web", src_port=((number, number),)) for number in (1, 2, 3)]
    first = compile_plan([instance(rules[0])], Site(), IndexState({}, 65_534))
    assert indexes(first) == {("i", 1): 65_535}
    second = compile_plan([instance(*rules)], Site(), IndexState.of(first, IndexState({}, 65_534)))
    assert indexes(second) == {("i", 1): 65_535, ("i", 2): 1, ("i", 3): 2}


@pytest.mark.parametrize("text", ["", "[]", '{"last": 1}', '{"last": 1, "indexes": {"a": 1, "b": 1}}',
                                  '{"last": 1, "indexes": {"a": 70000}}', '{"last": -1, "indexes": {}}'])
def test_spoilt_index_table_is_noticed(text):
    with pytest.raises(ValueError, match="rule indexes"):
        IndexState.from_json(text)


# ---------------------------------------------------------------------------- what cannot be

REFUSED = {
    "code without type": (RuleData(rule_id=5, service="no", proto_subtype=(1,)), "rule 5: an ICMP code without a type"),
    "any type": (RuleData(rule_id=5, service="no", proto_type=(255,)), "rule 5: ICMP type 255"),
    "wildcard interface": (RuleData(rule_id=5, service="no", iface=("eth+",)), "rule 5: interface name 'eth+'"),
    "option as interface": (RuleData(rule_id=5, service="no", dst_iface=("-j",)), "rule 5: interface name '-j'"),
    "too many to be listed": (RuleData(rule_id=5, service="no", reqid=tuple(range(4096)), ifgroup=tuple(range(4096)),
                                       iface=tuple(f"i{n}" for n in range(4096))), "rule 5: too many combinations"),
    "too many destinations": (RuleData(rule_id=5, service="no", dst_ifgroup=tuple(range(4096)),
                                       dst_iface=tuple(f"i{n}" for n in range(4096))), "rule 5: too many combinations"),
    "too many contradictions": (RuleData(
        rule_id=5, service="no", iface=tuple(f"i{n}" for n in range(4096)),
        dst_iface=tuple(f"j{n}" for n in range(4096))), "rule 5: too many combinations"),
    "too many ICMP codes": (RuleData(rule_id=5, service="no", proto=(1,), proto_type=(1,) * 4096,
                                     proto_subtype=(1,) * 4096), "rule 5: too many combinations"),
    "too many": (RuleData(rule_id=5, service="no", src_port=tuple((n, n) for n in range(200)),
                          dst_port=tuple((n, n) for n in range(200))), "rule 5: too many combinations"),
}


@pytest.mark.parametrize(("rule", "text"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_packet_form_is_an_error(rule, text):
    with pytest.raises(CompileError) as refused:
        compile_plan([instance(rule)], Site())
    assert text in str(refused.value)
    assert "instance 'i'" in str(refused.value)


def test_unknown_port_is_an_error_for_proxies_only():
    unknown = dataclasses.replace(instance(RuleData(rule_id=1, service="web")),
                                  listeners=(ListenerData(6, "127.0.0.1", 0),))
    with pytest.raises(CompileError, match="rule_listen_port"):
        compile_plan([unknown], Site())
    compile_plan([dataclasses.replace(unknown, rules=(RuleData(rule_id=1, service="no"),))], Site())


# ---------------------------------------------------------------------------- zones with equal names

def test_instances_may_differ_about_a_zone():
    zones = [(ZoneData(name="office", nets=(parse_net(net),)),) for net in ("10.1.0.0/24", "10.2.0.0/24")]
    rule = RuleData(rule_id=1, service="web", src_zone=("office",))
    plan = compile_plan([instance(rule, name="a", zones=zones[0]), instance(rule, name="b", zones=zones[1])], Site())
    model = Model(plan)
    for src, name in (("10.1.0.2", "a"), ("10.2.0.2", "b")):
        packet = Traffic(2, int(parse_net(src).network), 1, 6, dst_port=80)
        assert model.rule_of(packet)[0].instance == name


# ---------------------------------------------------------------------------- cost

def test_first_packet_meets_few_rules_among_five_hundred():
    # given five hundred rules, most of them for a port of their own, as large sites have
    generator = random.Random(3)
    zones = (ZoneData(name="internet", nets=(parse_net("0.0.0.0/0"),)),
             *(ZoneData(name=f"z{n}", nets=(parse_net(f"10.{n}.0.0/16"),)) for n in range(40)))
    ports = generator.sample(range(1, 20_000), 450)
    rules = [RuleData(rule_id=n + 1, service="web", dst_port=((port, port),), src_zone=(f"z{n % 40}",),
                      dst_zone=("internet",)) for n, port in enumerate(ports)]
    rules += [RuleData(rule_id=451 + n, service="no", src_subnet=(parse_net(f"10.{n}.9.0/24"),)) for n in range(50)]
    model = Model(compile_plan([instance(*rules, zones=zones)], Site()))
    # when a packet for each port is evaluated
    tested = []
    for n, port in enumerate(ports):
        packet = Traffic(2, (10 << 24) + ((n % 40) << 16) + 5, 0xCB007101, 6, src_port=40_000, dst_port=port)
        rule, number = model.rule_of(packet)
        assert rule.rule_id == n + 1
        tested.append(number)
    # then a typical one meets fewer than twenty rules, and the whole plan stays small
    assert sum(tested) / len(tested) < 20
    assert sum(number <= 20 for number in tested) > 0.9 * len(tested)
    assert sum(len(found.rules) for table in model.plan.tables for found in table.chains) < 12_000


if __name__ == "__main__":
    for path in POLICIES:
        path.with_suffix(".plan").write_text(plan_text(path))
