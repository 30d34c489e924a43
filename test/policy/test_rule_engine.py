"""The compiled evaluation decides exactly as the definition of the best match does."""

import ipaddress
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from test.support import best_match
from test.support.best_match import subnet, traffic
from Zorp.rules.engine import Memo, RuleData, RuleEngine, depths_of

PARENTS = {"root": None, "a": "root", "aa": "a", "aaa": "aa", "ab": "a", "b": "root", "other": None, "lone": "other"}
ADDRESSES = ["10.0.0.1", "10.0.0.2", "10.0.1.1", "10.1.0.1", "192.0.2.1", "0.0.0.0", "255.255.255.255"]
ADDRESSES6 = ["2001:db8::1", "2001:db8::2", "2001:db8:1::1", "::", "ffff::1"]


def subnets_around(addresses):
    def net(pair):
        return subnet(str(ipaddress.ip_network(pair, strict=False)))

    v4, v6 = [a for a in addresses if "." in a], [a for a in addresses if ":" in a]
    lengths4, lengths6 = [0, 8, 16, 23, 24, 30, 31, 32], [0, 32, 48, 126, 128]
    return st.tuples(st.sampled_from(v4), st.sampled_from(lengths4)).map(net) | st.tuples(
        st.sampled_from(v6), st.sampled_from(lengths6)).map(net)


def some(strategy, most=3):
    """Nothing, half of the time: a dimension without condition is the usual case."""
    return st.just(()) | st.lists(strategy, min_size=1, max_size=most, unique=True).map(tuple)


PORT = st.sampled_from([0, 1, 21, 79, 80, 81, 443, 65535])
PORT_RANGE = PORT.map(lambda port: (port, port)) | st.tuples(PORT, PORT).map(lambda pair: tuple(sorted(pair)))
NETS = subnets_around(ADDRESSES + ADDRESSES6)
ZONES = st.sampled_from(sorted(PARENTS))
IFACE, GROUP = st.sampled_from(["eth0", "eth1"]), st.sampled_from([0, 1, 2])
RULE = st.fixed_dictionaries({
    "reqid": some(st.integers(1, 3)), "iface": some(IFACE), "ifgroup": some(GROUP),
    "proto": some(st.sampled_from([1, 6, 17])), "proto_type": some(st.integers(0, 2)),
    "proto_subtype": some(st.integers(0, 2)), "src_port": some(PORT_RANGE), "dst_port": some(PORT_RANGE),
    "src_subnet": some(NETS), "src_zone": some(ZONES), "dst_subnet": some(NETS), "dst_zone": some(ZONES),
    "dst_iface": some(IFACE), "dst_ifgroup": some(GROUP),
})
PACKET_REST = st.fixed_dictionaries({
    "proto": st.sampled_from([1, 6, 17, 47]), "src_port": PORT, "dst_port": PORT,
    "proto_type": st.integers(-1, 2), "proto_subtype": st.integers(-1, 2),
    "iface": st.none() | IFACE | st.just("eth9"), "ifgroup": st.none() | GROUP | st.just(9),
    "reqids": st.lists(st.integers(1, 4), max_size=2).map(tuple), "dst_on_iface": st.booleans(),
    "src_zone": st.none() | ZONES, "dst_zone": st.none() | ZONES,
})
PACKET = st.one_of(*(st.builds(lambda src, dst, rest: traffic(src, dst, **rest), st.sampled_from(pool),
                               st.sampled_from(pool), PACKET_REST) for pool in (ADDRESSES, ADDRESSES6)))


def sparse(rule):
    """Drop all but a few dimensions, so that random rules match random packets often enough."""
    return st.sets(st.sampled_from(sorted(rule)), max_size=4).map(lambda kept: {name: rule[name] for name in kept})


RULES = st.lists(st.tuples(st.integers(1, 12), RULE.flatmap(sparse) | RULE), max_size=25).map(
    lambda pairs: [RuleData(rule_id=number, service=f"service {place}", **rule)
                   for place, (number, rule) in enumerate(pairs)])


@settings(max_examples=300, deadline=None)
@given(RULES, st.lists(PACKET, min_size=1, max_size=12))
def test_compiled_and_defined_best_match_agree(rules, packets):
    engine = RuleEngine(rules, PARENTS)
    for packet in packets * 2:                         # the second round is answered from the memos
        assert engine.best(packet) == best_match.best(rules, packet, PARENTS)
        assert engine.ranking(packet) == best_match.ranking(rules, packet, PARENTS)


def test_the_ranking_names_the_same_winner_as_the_decision():
    rules = [RuleData(rule_id=number, service="s", dst_port=((port, port + 9),)) for number, port in ((1, 75), (2, 80))]
    engine = RuleEngine(rules, {})
    packet = traffic("10.0.0.1", "10.0.0.2", proto=6, dst_port=80)
    assert engine.ranking(packet)[0][1] is engine.best(packet)


def test_an_empty_rule_set_decides_nothing():
    assert RuleEngine([], {}).best(traffic("10.0.0.1", "10.0.0.2", proto=6)) is None


@pytest.mark.parametrize("order", [1, -1], ids=["narrow first", "narrow last"])
def test_of_two_instances_the_narrower_rule_serves_whichever_came_first(order):
    """zones-rules 11, scenario 32."""
    # given two instances, each with its own rule 1 for port 80, one narrower by source
    wide = RuleData(rule_id=1, service="first/wide", dst_port=((80, 80),))
    narrow = RuleData(rule_id=1, service="second/narrow", dst_port=((80, 80),), src_subnet=(subnet("10.0.0.0/8"),))
    engine = RuleEngine([narrow, wide][::order], {})
    # then a client of the narrow source gets the narrow rule, any other the wide one
    assert engine.best(traffic("10.0.0.1", "192.0.2.1", proto=6, dst_port=80)) is narrow
    assert engine.best(traffic("192.0.2.7", "192.0.2.1", proto=6, dst_port=80)) is wide


def test_of_equal_rules_with_equal_ids_the_instance_uploaded_first_wins():
    first, second = (RuleData(rule_id=1, service=name) for name in ("first", "second"))
    assert RuleEngine([first, second], {}).best(traffic("10.0.0.1", "10.0.0.2", proto=6)) is first


def test_a_full_memo_starts_again_and_answers_stay_right():
    memo = Memo(2)
    for number in range(5):
        memo.put(number, str(number))
    assert memo.get(4) == "4"
    assert memo.get(0) is None


def test_peers_cannot_fill_the_memos_by_varying_what_no_rule_tells_apart():
    # given rules that know one port and one net
    rule = RuleData(rule_id=1, service="s", dst_port=((80, 80),), src_subnet=(subnet("10.0.0.0/8"),))
    engine = RuleEngine([rule], {})
    # when many addresses, ports and protocols come by
    for number in range(2000):
        engine.best(traffic(f"11.0.{number % 256}.1", "10.0.0.1", proto=number % 256, src_port=number, dst_port=number))
    # then only the classes of values that the rule distinguishes are remembered
    assert len(engine._front_memo) <= 2 * 3
    assert len(engine.source._memo) <= 2


def test_depth_counts_from_one_at_a_root_in_any_order_of_definition():
    assert depths_of({"c": "b", "b": "a", "a": None, "x": None}) == {"a": 1, "b": 2, "c": 3, "x": 1}


def test_a_subnet_prints_as_written_in_policies():
    assert str(subnet("10.1.0.0/16")) == "10.1.0.0/16"
    assert str(subnet("2001:db8::/32")) == "2001:db8::/32"
    assert subnet("10.1.0.0/16").family == socket.AF_INET
