"""What a rule set is reported for: rules that can never win, and conditions with surprising weight."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from test.policy.test_rule_engine import PACKET, PARENTS, RULES
from test.support import best_match
from test.support.zones import define_services, log_lines, no_zones
from Zorp import Globals
from Zorp.Rule import PortRange, Rule
from Zorp.rules.engine import RuleData, RuleEngine
from Zorp.rules.lint import shadowed
from Zorp.Zone import Zone

__all__ = ["log_lines", "no_zones"]


def pairs(*conditions):
    """{loser: winner} for rules 1, 2, ... with these conditions."""
    rules = [RuleData(rule_id=number, service="s", **each) for number, each in enumerate(conditions, 1)]
    return {loser.rule_id: winner.rule_id for loser, winner in shadowed(RuleEngine(rules, PARENTS))}


def port(*ranges):
    return {"dst_port": tuple(pair if isinstance(pair, tuple) else (pair, pair) for pair in ranges)}


CASES = {
    "equal rules": (({}, {}), {2: 1}),
    "equal conditions": ((port(80), port(80)), {2: 1}),
    "the lower id says more": ((port(80, 443), port(80)), {2: 1}),
    "the higher id says more": ((port(80), port(80, 443)), {}),
    "single ports beat a range of them": ((port((80, 81)), port(80, 81)), {1: 2}),
    "a range with one port left over": ((port((80, 82)), port(80, 81)), {}),
    "narrower is not shadowed by wider": (({}, port(80)), {}),
    "wider is not shadowed by narrower": ((port(80), {}), {}),
    "more zones": (({"src_zone": ("a", "b")}, {"src_zone": ("b",)}), {2: 1}),
    "a zone above is less specific": (({"src_zone": ("root",)}, {"src_zone": ("a",)}), {}),
    "subnets and zones": (({"src_subnet": (best_match.subnet("10.0.0.0/8"),), "src_zone": ("a",)},
                           {"src_zone": ("a",)}), {2: 1}),
    "another interface": (({"iface": ("eth0",)}, {"iface": ("eth1",)}), {}),
    "interface and group": (({"iface": ("eth0",), "ifgroup": (1,)}, {"ifgroup": (1,)}), {2: 1}),
    "higher in an earlier component, wider later":
        (({"src_port": ((5, 5), (6, 6))}, {"src_port": ((5, 6),), "dst_zone": ("a",)}), {2: 1}),
    "higher in an earlier component, but not for all destinations":
        (({"src_port": ((5, 5), (6, 6)), "dst_zone": ("a",)}, {"src_port": ((5, 6),)}), {}),
    "one of three": ((port(80), {"proto": (6,)}, port(80)), {3: 1}),
    "many ports, the same range": ((port((0, 65535), *range(100)), port((0, 65535), *range(100))), {2: 1}),
}


@pytest.mark.parametrize(("rules", "losers"), CASES.values(), ids=CASES)
def test_which_rules_can_never_win(rules, losers):
    assert pairs(*rules) == losers


@settings(max_examples=200, deadline=None)
@given(RULES, st.lists(PACKET, min_size=1, max_size=20))
def test_a_rule_reported_as_shadowed_never_wins(rules, packets):
    unique = {rule.rule_id: rule for rule in rules}.values()
    engine = RuleEngine(unique, PARENTS)
    losers = {loser.rule_id for loser, _ in shadowed(engine)}
    for packet in packets:
        winner = engine.best(packet)
        assert winner is None or winner.rule_id not in losers


@settings(max_examples=100, deadline=None)
@given(RULES)
def test_a_repeated_rule_is_always_reported(rules):
    unique = {rule.rule_id: rule for rule in rules}.values()
    for rule in unique:
        repeated = RuleData(**{name: getattr(rule, name) for name in RuleData.__dataclass_fields__} | {"rule_id": 99})
        losers = [loser.rule_id for loser, _ in shadowed(RuleEngine([*unique, repeated], PARENTS))]
        assert 99 in losers


# ------------------------------------------------------------------ what the log says at the end of a load

@pytest.fixture
def policy(no_zones):
    define_services("s", "t")
    Zone("office", "10.0.0.0/8")


def texts(log_lines):
    return [(tag, level, text) for tag, level, text in log_lines if tag == "core.policy"]


def test_a_shadowed_rule_is_reported_once_with_its_winner(policy, log_lines):
    winner, loser = Rule(rule_id=3, service="s", dst_port=80), Rule(rule_id=7, service="t", dst_port=80)
    Globals.rules.check()
    assert texts(log_lines) == [
        ("core.policy", 2, f"Rule can never win; rule_id='7', service='t', place='{loser.place}', "
                           f"winner='3', instead='s', winner_place='{winner.place}'")]


def test_many_shadowed_rules_are_counted(policy, log_lines):
    for number in range(1, 106):
        Rule(rule_id=number, service="s")
    Globals.rules.check()
    assert len(texts(log_lines)) == 101
    assert texts(log_lines)[-1][2] == "More rules can never win; number='4'"


def test_a_net_for_everyone_is_reported_where_zones_compete(policy, log_lines):
    Rule(rule_id=1, service="s", src_subnet="0.0.0.0/0")
    Globals.rules.check()
    assert texts(log_lines) == []
    Rule(rule_id=2, service="t", src_zone="office")
    Globals.rules.check()
    assert texts(log_lines) == [
        ("core.policy", 3, "Subnet of length 0 outranks every zone condition; rule_id='1', dimension='src_subnet'")]


def test_request_ids_are_reported_because_nothing_here_knows_them(policy, log_lines):
    Rule(service="s", reqid=(5, 6))
    Globals.rules.check()
    assert texts(log_lines) == [
        ("core.policy", 2, "Conditions on IPsec request ids do not match here; reqids='5,6'")]


def test_a_rule_set_without_surprises_is_counted_and_nothing_else(policy, log_lines):
    Rule(service="s", dst_port=PortRange(1, 1024))
    Globals.rules.check()
    assert log_lines == [("core.info", 4, "Rules compiled; rules='1', zones='1'")]
