"""Which rule wins: the worked cases of zones-rules 8 and 9, and the scenarios of 11, with real zones."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from test.support import best_match
from test.support.zones import (
    address, define_services, log_lines, matching, no_zones, packet, winner,
)
from Zorp import Globals
from Zorp.Rule import PortRange, Rule
from Zorp.SockAddr import SockAddrUnix
from Zorp.Zone import Zone

__all__ = ["log_lines", "no_zones"]
pytestmark = pytest.mark.usefixtures("no_zones")

TREE = {       # name: (last part of the net in 10.99.101 and 10.99.201, prefix length, parent)
    "A": (0, 25, None), "AA": (0, 28, "A"), "AAA": (0, 30, "AA"), "AAZ": (4, 30, "AA"),
    "AB": (64, 28, "A"), "ABA": (64, 30, "AB"), "ABZ": (68, 30, "AB"),
    "AY": (80, 28, "A"), "AYZ": (84, 30, "AY"), "AZ": (16, 28, "A"), "AZZ": (20, 30, "AZ"),
    "Z": (128, 25, None), "ZA": (128, 28, "Z"), "ZZ": (144, 28, "Z"), "ZZZ": (148, 30, "ZZ"),
}
FIRST_SIX = (0, 0, 0, 0, 0, 0)


@pytest.fixture
def tree(no_zones):
    """The zones of the original's query tests."""
    Zone("internet", "0.0.0.0/0")
    for name, (last, bits, parent) in TREE.items():
        Zone(name, [f"10.99.{third}.{last}/{bits}" for third in (101, 201)], admin_parent=parent)
    define_services("s", *(f"s{number}" for number in range(1, 10)))


def rule(number, **conditions):
    return Rule(rule_id=number, service=f"s{number}", **conditions)


def scores_of(src_score, dst_score=0, first=FIRST_SIX):
    return (*first, src_score, dst_score)


# ------------------------------------------------------------------ zones-rules 8: interfaces

@pytest.fixture
def interface_rules(tree):
    rule(1, iface=("dummy0", "dummy1"))
    rule(2, ifgroup=1)


def test_interface_name(interface_rules):
    assert matching("1.2.3.4", "5.6.7.8", iface="dummy0", ifgroup=2) == {1: (2, 0, 0, 0, 0, 0, 0, 0)}


def test_interface_group(interface_rules):
    assert matching("1.2.3.4", "5.6.7.8", iface="dummy3", ifgroup=1) == {2: (1, 0, 0, 0, 0, 0, 0, 0)}


def test_interface_of_no_rule(interface_rules):
    assert winner("1.2.3.4", "5.6.7.8", iface="dummy2", ifgroup=0) is None


def test_interface_conditions_do_not_match_local_traffic(interface_rules):
    assert winner("1.2.3.4", "5.6.7.8") is None


def test_a_rule_without_conditions_takes_the_interface_of_no_rule(interface_rules):
    rule(3)
    assert matching("1.2.3.4", "5.6.7.8", iface="dummy2", ifgroup=0) == {3: (0,) * 8}


def test_interface_sums_and_request_ids(tree):
    rule(1, iface="dummy0", ifgroup=2)
    rule(2, iface="dummy0", ifgroup=9, reqid=(5, 6))
    assert matching("1.2.3.4", "5.6.7.8", iface="dummy0", ifgroup=2, reqids=(6,)) == {
        2: (6, 0, 0, 0, 0, 0, 0, 0), 1: (3, 0, 0, 0, 0, 0, 0, 0)}
    assert matching("1.2.3.4", "5.6.7.8", iface="dummy0", ifgroup=2) == {
        1: (3, 0, 0, 0, 0, 0, 0, 0), 2: (2, 0, 0, 0, 0, 0, 0, 0)}


@pytest.fixture
def destination_interface_rules(tree):
    rule(1, dst_iface=("dummy0", "dummy1"))
    rule(2, dst_ifgroup=1)
    rule(3)


@pytest.mark.parametrize(("iface", "group", "dst", "own", "number", "score"), [
    ("dummy0", 2, "10.99.201.1", True, 1, 64),
    ("dummy3", 1, "10.99.204.4", True, 2, 32),
    ("dummy4", 1, "10.99.203.3", False, 3, 0),
])
def test_destination_interface(destination_interface_rules, iface, group, dst, own, number, score):
    found = matching("1.2.3.4", dst, iface=iface, ifgroup=group, dst_on_iface=own)
    assert next(iter(found.items())) == (number, scores_of(0, score))


def test_destination_interface_and_group_together_score_three_times(tree):
    rule(1, dst_iface="dummy0", dst_ifgroup=2)
    assert matching("1.2.3.4", "10.99.201.1", iface="dummy0", ifgroup=2, dst_on_iface=True) == {1: scores_of(0, 96)}


# ------------------------------------------------------------------ zones-rules 8: ports, subnets, zones

@pytest.mark.parametrize(("port", "score"), [(10, 2), (63000, 1), (59999, None)])
def test_source_port(tree, port, score):
    rule(1, src_port=(10, PortRange(60000, 65535)))
    found = matching("1.2.3.4", "5.6.7.8", src_port=port)
    assert found == ({} if score is None else {1: (0, 0, 0, 0, score, 0, 0, 0)})


@pytest.mark.parametrize(("src", "scores"), [
    ("10.99.201.169", {1: 1056, 2: 800, 3: 1}),
    ("10.99.201.41", {2: 800, 4: 1}),
    ("10.99.101.169", {3: 1}),
])
def test_subnet_against_zone(tree, src, scores):
    rule(1, src_subnet="10.99.201.169/32")
    rule(2, src_subnet="10.99.201.0/24")
    rule(3, src_zone="Z")
    rule(4, src_zone="A")
    assert matching(src, "1.2.3.4") == {number: scores_of(score) for number, score in scores.items()}


@pytest.mark.parametrize(("src", "scores"), [
    ("10.99.201.66", {1: 1056, 2: 800, 4: 1}),
    ("10.99.101.137", {1: 2, 3: 1}),
])
def test_subnet_and_zone_of_one_rule_are_alternatives(tree, src, scores):
    rule(1, src_subnet="10.99.201.66/32", src_zone="ZA")
    rule(2, src_subnet="10.99.201.0/24")
    rule(3, src_zone="Z")
    rule(4, src_zone="A")
    assert matching(src, "1.2.3.4") == {number: scores_of(score) for number, score in scores.items()}


def test_ipv6_subnet_and_zone_add_up_and_none_is_no_service(tree):
    Zone("six", "2001:db8:cc:22::/64")
    rule(1, src_subnet="2001:db8:cc:22::bb:cc/128", src_zone="six")
    assert matching("2001:db8:cc:22::bb:cc", "2001:db8::1") == {1: scores_of(4129)}
    assert winner("2001:db8:11::aa", "2001:db8::1") is None


def test_longer_prefixes_win(tree):
    for number, bits in ((1, 24), (2, 30), (3, 31)):
        rule(number, src_subnet=f"1.2.3.0/{bits}")
    assert matching("1.2.3.1", "5.6.7.8") == {3: scores_of(1024), 2: scores_of(992), 1: scores_of(800)}


@pytest.mark.parametrize(("src", "scores"), [
    ("ffc0::1", {3: 4096, 4: 352}),
    ("ffc0::3", {4: 4128, 5: 4096}),
])
def test_mixed_families(tree, src, scores):
    rule(3, src_subnet=("2.0.0.0/8", "ffc0::1/127"))
    rule(4, src_subnet=("2.3.4.5", "ffc0::/10", "ffc0::3"))
    rule(5, src_subnet="ffc0::2/127")
    found = matching(src, "2001:db8::1")
    assert {number: found[number] for number in scores} == {n: scores_of(score) for n, score in scores.items()}
    assert next(iter(found)) == next(iter(scores))


@pytest.mark.parametrize(("src", "numbers"), [
    ("10.99.201.65", {1: 3, 2: 2, 3: 1}), ("10.99.201.69", {2: 2, 3: 1}), ("10.99.201.21", {3: 1}),
], ids=["depth", "sibling", "ancestor"])
def test_deeper_zones_win(tree, src, numbers):
    rule(1, src_zone="ABA")
    rule(2, src_zone="AB")
    rule(3, src_zone="A")
    assert matching(src, "1.2.3.4") == {number: scores_of(score) for number, score in numbers.items()}


# ------------------------------------------------------------------ zones-rules 8: precedence

FULL = {"iface": "dummy0", "proto": 6, "src_port": 6, "dst_port": 9, "src_subnet": "1.2.3.4/32",
        "dst_subnet": "10.99.201.1/32"}
FIRST_SIX_OF_FULL = (2, 1, 0, 0, 2, 2)


def without(*names, **instead):
    return {name: value for name, value in FULL.items() if name not in names} | instead


@pytest.mark.parametrize(("variant", "scores"), [
    (without("iface", ifgroup=2), (1, 1, 0, 0, 2, 2, 1056, 4224)),
    (without("dst_subnet", dst_zone="A"), (*FIRST_SIX_OF_FULL, 1056, 1)),
    (without("dst_subnet", dst_iface="dummy0"), (*FIRST_SIX_OF_FULL, 1056, 64)),
    (without("proto"), (2, 0, 0, 0, 2, 2, 1056, 4224)),
    (without("src_port", src_port=PortRange(1, 10)), (2, 1, 0, 0, 1, 2, 1056, 4224)),
    (without("dst_port"), (2, 1, 0, 0, 2, 0, 1056, 4224)),
    (without("src_subnet"), (*FIRST_SIX_OF_FULL, 0, 4224)),
], ids=str)
def test_the_full_rule_beats_each_variant(tree, variant, scores):
    # given a variant of lower id that says less in one component
    rule(1, **variant)
    rule(2, **FULL)
    found = matching("1.2.3.4", "10.99.201.1", 9, 6, iface="dummy0", ifgroup=2, dst_on_iface=True)
    assert list(found.items()) == [(2, (*FIRST_SIX_OF_FULL, 1056, 4224)), (1, scores)]


@pytest.mark.parametrize(("src", "dst", "narrow", "wide"), [
    ("10.99.201.169", "1.2.3.4",
     {"src_subnet": "10.99.201.169/32", "dst_subnet": "1.2.3.4/32"}, {"src_zone": "Z", "dst_subnet": "1.2.3.4/32"}),
    ("1.2.3.4", "10.99.201.169",
     {"src_subnet": "1.2.3.4/32", "dst_subnet": "10.99.201.169/32"}, {"src_subnet": "1.2.3.4/32", "dst_zone": "Z"}),
])
def test_a_host_beats_a_zone_on_either_side(tree, src, dst, narrow, wide):
    rule(1, **wide)
    rule(2, **narrow)
    found = matching(src, dst)
    assert list(found) == [2, 1]
    assert found[2] == scores_of(1056, 4224)


def test_all_dimensions_and_the_sum_of_subnet_and_zone(tree):
    rule(1, src_port=2, dst_port=5, src_subnet="10.99.201.5/32", src_zone="AAZ", dst_zone="ZZZ", proto=6)
    rule(2, src_port=2, dst_port=5, src_subnet="10.99.201.5/32", dst_zone="ZZZ", proto=6)
    found = matching("10.99.201.5", "10.99.101.149", 5, 2)
    assert list(found) == [1, 2]
    assert found[1] == (0, 1, 0, 0, 2, 2, 33 * 32 + 3, 3)


def test_zero_score_wins_when_nothing_else_matches(tree):
    rule(1, dst_port=81)
    rule(2)
    assert matching("1.2.3.4", "5.6.7.8", 80) == {2: (0,) * 8}


def test_collision_is_won_by_the_lowest_id(tree):
    for number in (3, 2, 4):
        rule(number)
    assert winner("1.2.3.4", "5.6.7.8") == "s2"


def test_an_empty_rule_set_is_no_service(tree):
    rule(1)
    Globals.rules = type(Globals.rules)()
    assert winner("1.2.3.4", "5.6.7.8") is None


# ------------------------------------------------------------------ zones-rules 7.3: consequences

@pytest.mark.parametrize(("weak", "strong"), [
    ({"proto": 6, "src_port": 6, "dst_port": 9, "src_subnet": "1.2.3.4/32"}, {"iface": "dummy0"}),
    ({"dst_subnet": "5.6.7.8/32", "dst_zone": "internet"}, {"src_zone": "internet"}),
    ({"src_zone": "internet"}, {"src_subnet": "0.0.0.0/0"}),
    ({}, {"dst_port": PortRange(0, 65535)}),
    ({"dst_port": 9}, {"src_port": PortRange(0, 65535)}),
    ({"src_port": 6}, {"proto": 6}),
], ids=["interface", "source before destination", "any subnet before a zone", "all ports before none",
        "source port before destination port", "protocol before ports"])
def test_precedence_of_components(tree, weak, strong):
    rule(1, **weak)
    rule(2, **strong)
    assert list(matching("1.2.3.4", "5.6.7.8", 9, 6, iface="dummy0", ifgroup=2)) == [2, 1]


def test_icmp_type_beats_code_whatever_the_order_of_rules(tree):
    rule(1, proto_subtype=0, proto=1)
    rule(2, proto_type=8, proto=1)
    icmp = {"protocol": 1, "proto_type": 8, "proto_subtype": 0}
    assert list(matching("1.2.3.4", "5.6.7.8", **icmp)) == [2, 1]


def test_a_type_without_protocol_loses_to_a_protocol(tree):
    rule(1, proto_type=8)
    rule(2, proto=1)
    assert winner("1.2.3.4", "5.6.7.8", protocol=1, proto_type=8, proto_subtype=0) == "s2"


def test_of_overlapping_port_ranges_the_best_counts(tree):
    rule(1, dst_port=(PortRange(70, 90), 80))
    assert matching("1.2.3.4", "5.6.7.8", 80) == {1: (0, 0, 0, 0, 0, 2, 0, 0)}
    assert matching("1.2.3.4", "5.6.7.8", 81) == {1: (0, 0, 0, 0, 0, 1, 0, 0)}


def test_a_range_with_port_zero_takes_protocols_without_ports(tree):
    rule(1, dst_port=PortRange(0, 10))
    assert winner("1.2.3.4", "5.6.7.8", protocol=47) == "s1"


# ------------------------------------------------------------------ zones-rules 9: the tutorial

@pytest.fixture
def tutorial(no_zones):
    define_services("read_only", "read_write")
    Rule(dst_port=21, service="read_only")
    Rule(dst_subnet="1.2.3.4/32", dst_port=21, service="read_write")
    Rule(src_subnet="10.10.0.0/16", dst_port=21, service="read_write")


@pytest.mark.parametrize(("src", "dst", "scores"), [
    ("10.9.0.1", "5.5.5.5", {1: (0, 0)}),
    ("10.9.0.1", "1.2.3.4", {2: (0, 4224), 1: (0, 0)}),
    ("10.10.3.3", "5.5.5.5", {3: (544, 0), 1: (0, 0)}),
    ("10.10.3.3", "1.2.3.4", {3: (544, 0), 2: (0, 4224), 1: (0, 0)}),
])
def test_scenario_14_the_tutorials_ftp_rules(tutorial, src, dst, scores):
    found = matching(src, dst, 21)
    assert list(found.items()) == [(n, (0, 0, 0, 0, 0, 2, *pair)) for n, pair in scores.items()]
    assert winner(src, dst, 21) == ("read_only" if list(scores) == [1] else "read_write")


@pytest.mark.parametrize("clients", ["clients", ("clients",), ["clients"]])
def test_the_example_policy_gives_one_host_its_own_service(no_zones, clients):
    Zone("clients", "10.1.0.0/16")
    Zone("servers", "10.2.0.0/16")
    Zone("servers.plug", "10.2.0.9/32", admin_parent="servers")
    define_services("https", "plug")
    Rule(dst_port=443, src_zone=clients, dst_zone="servers", service="https")
    Rule(dst_port=443, src_zone=clients, dst_zone="servers.plug", service="plug")
    assert winner("10.1.0.1", "10.2.0.1", 443) == "https"
    assert matching("10.1.0.1", "10.2.0.9", 443) == {2: (0, 0, 0, 0, 0, 2, 1, 2), 1: (0, 0, 0, 0, 0, 2, 1, 1)}


# ------------------------------------------------------------------ zones-rules 11: observable scenarios

@pytest.fixture
def net10(no_zones):
    Zone("net10", "10.0.0.0/8")
    define_services("s", *(f"s{number}" for number in range(1, 10)))


def test_scenario_2_a_rule_without_zones_takes_addresses_without_zone(net10):
    rule(1)
    decision = Globals.rules.evaluate(packet("192.0.2.7", "192.0.2.8", 80))
    assert (decision.service_name, decision.rule_id, decision.client_zone) == ("s1", 1, None)


def test_scenario_3_a_zone_condition_fails_for_addresses_without_zone(net10):
    rule(1, src_zone="net10")
    assert winner("192.0.2.7", "10.0.0.1", 80) is None
    assert Globals.rules.zones_of(packet("192.0.2.7", "10.0.0.1")) == (None, Zone.lookupByName("net10"))


def test_scenario_6_a_parent_zone_includes_its_grandchildren_elsewhere(net10):
    Zone("child", "172.16.0.0/16", admin_parent="net10")
    grandchild = Zone("grandchild", "192.0.2.0/24", admin_parent="child")
    rule(1, src_zone="net10")
    decision = Globals.rules.evaluate(packet("192.0.2.7", "198.51.100.1"))
    assert (decision.service_name, decision.client_zone, decision.server_zone) == ("s1", grandchild, None)


def test_scenario_7_the_child_zone_has_its_own_service(net10):
    Zone("child", "10.1.0.0/16", admin_parent="net10")
    rule(1, src_zone="net10")
    rule(2, src_zone="child")
    assert (winner("10.1.0.1", "192.0.2.1"), winner("10.2.0.1", "192.0.2.1")) == ("s2", "s1")


def test_scenario_8_subnet_or_zone(net10):
    Zone("lab", "172.16.0.0/12")
    rule(1, src_subnet="10.1.0.0/16", src_zone="lab")
    assert [winner(src, "192.0.2.1") for src in ("10.1.0.1", "172.16.0.1", "10.2.0.1")] == ["s1", "s1", None]


def test_scenario_9_one_port_beats_a_range(net10):
    rule(1, dst_port=80)
    rule(2, dst_port=PortRange(1, 1000))
    assert [winner("10.0.0.1", "192.0.2.1", port) for port in (80, 81)] == ["s1", "s2"]


def test_scenario_10_any_subnet_beats_the_deepest_zone(net10):
    Zone("child", "10.1.0.0/16", admin_parent="net10")
    Zone("office", "10.1.1.0/24", admin_parent="child")
    rule(1, src_subnet="0.0.0.0/0")
    rule(2, src_zone="office")
    assert winner("10.1.1.1", "192.0.2.1") == "s1"


def test_scenario_11_an_interface_beats_everything_else(net10):
    rule(1, src_iface="eth0")
    rule(2, proto=6, src_port=1, dst_port=80, src_subnet="10.0.0.1/32", dst_subnet="192.0.2.1/32")
    assert winner("10.0.0.1", "192.0.2.1", 80, 1, iface="eth0", ifgroup=0) == "s1"
    assert winner("10.0.0.1", "192.0.2.1", 80, 1, iface="eth1", ifgroup=0) == "s2"


def test_scenario_12_of_identical_rules_the_lower_id_serves(net10):
    Rule(rule_id=7, service="s7", dst_port=80)
    Rule(rule_id=3, service="s3", dst_port=80)
    decision = Globals.rules.evaluate(packet("10.0.0.1", "192.0.2.1", 80))
    assert (decision.rule_id, decision.service_name) == (3, "s3")


def test_scenario_15_a_port_text_takes_its_range(net10):
    rule(1, dst_port="80:90")
    assert [winner("10.0.0.1", "192.0.2.1", port) for port in (79, 80, 90, 91)] == [None, "s1", "s1", None]


def test_scenario_18_ipv4_subnets_do_not_match_ipv6(net10):
    rule(1, src_subnet="0.0.0.0/0")
    assert winner("2001:db8::1", "2001:db8::2") is None


def test_scenario_21_an_icmp_type_of_its_own(net10):
    rule(1, proto=1, icmp_type=8)
    assert winner("10.0.0.1", "192.0.2.1", protocol=1, proto_type=8, proto_subtype=0) == "s1"
    assert winner("10.0.0.1", "192.0.2.1", protocol=1, proto_type=13, proto_subtype=0) is None


def test_scenario_33_mapped_peers_are_ipv4_peers(net10):
    rule(1, src_zone="net10", src_subnet="10.0.0.0/24")
    decision = Globals.rules.evaluate(packet("::ffff:10.0.0.5", "::ffff:192.0.2.1", 80))
    assert (decision.service_name, decision.client_zone.name) == ("s1", "net10")


def test_classic_zones_match_by_their_parents_name(net10):
    Zone("office", ["172.16.0.0/16", "172.17.0.0/16"], ["*"], ["*"])
    rule(1, src_zone="office")
    decision = Globals.rules.evaluate(packet("172.17.0.1", "192.0.2.1"))
    assert (decision.service_name, decision.client_zone.getName()) == ("s1", "office")


def test_addresses_without_a_family_in_common_match_nothing(net10):
    rule(1)
    assert winner("10.0.0.1", "2001:db8::1") is None
    assert Globals.rules.evaluate(packet("10.0.0.1", "10.0.0.2")._replace(dst=SockAddrUnix("/run/x"))) is None
    assert Globals.rules.explain(packet("10.0.0.1", "2001:db8::1")) == []
    assert winner("::ffff:10.0.0.1", "2001:db8::1") == "s1"       # a native and a mapped address: both IPv6


@pytest.mark.parametrize(("src", "dst", "subnet"), [
    ("2001:db8::1", "::ffff:10.0.0.1", "::/96"), ("::ffff:10.0.0.1", "2001:db8::1", "0.0.0.0/0")])
def test_one_mapped_address_does_not_turn_the_other_into_ipv4(net10, src, dst, subnet):
    rule(1, dst_subnet=subnet)
    assert winner(src, dst) is None


def test_zones_defined_after_a_decision_count(net10):
    rule(1, src_zone="net10")
    assert winner("192.0.2.1", "198.51.100.1") is None
    Zone("child", "192.0.2.0/24", admin_parent="net10")
    assert winner("192.0.2.1", "198.51.100.1") == "s1"


def test_zones_resolved_from_names_count_in_rules(net10):
    Zone("partner", hostnames="h.example")
    rule(1, src_zone="partner")
    assert winner("198.51.100.5", "192.0.2.1") is None
    Zone.zone_subnet_tree.feed({"h.example": ["198.51.100.5"]})
    assert winner("198.51.100.5", "192.0.2.1") == "s1"


@pytest.fixture
def blocked(no_zones):
    """Two zones of one host name each, beside everything; services s1 to s9."""
    Zone("internet", "0.0.0.0/0")
    Zone("blocked", hostnames="a.example")
    Zone("others", hostnames="b.example")
    define_services(*(f"s{number}" for number in range(1, 10)))

    def feed(*addresses):
        Zone.zone_subnet_tree.feed({"a.example": ["198.51.100.5"], "b.example": addresses})
    return feed


@pytest.mark.parametrize("side", ["src_zone", "dst_zone"])
def test_a_name_that_moves_to_a_denied_address_does_not_lift_the_denial(blocked, side, log_lines):
    # given a rule that singles a host name out of what another rule permits
    rule(1, **{side: "internet"})
    rule(2, **{side: "blocked"})
    ends = ("198.51.100.5", "192.0.2.1")[::1 if side == "src_zone" else -1]
    blocked("198.51.100.6")
    assert winner(*ends) == "s2"
    # when the name of another zone resolves to the same address
    blocked("198.51.100.5")
    # then neither rule takes its connections, and the log says why
    assert winner(*ends) is None
    assert [text for _, _, text in log_lines if "internet,blocked,others" in text]
    # and what is not disputed goes on
    assert winner("192.0.2.2", "192.0.2.1") == "s1"
    blocked("198.51.100.7")
    assert winner(*ends) == "s2"


def test_a_disputed_address_gets_what_all_its_zones_agree_upon(blocked):
    rule(1, dst_port=25)
    rule(2, dst_zone=("blocked", "others"), dst_port=80)
    blocked("198.51.100.5")
    assert winner("192.0.2.1", "198.51.100.5", 25) == "s1"
    assert winner("192.0.2.1", "198.51.100.5", 80) is None           # it is in neither, as ever
    assert winner("192.0.2.1", "198.51.100.5", 81) is None


def test_a_zone_without_any_rule_keeps_its_disputed_hosts_out(blocked):
    rule(1, src_zone="internet")
    blocked("198.51.100.5")
    assert winner("198.51.100.5", "192.0.2.1") is None


# ------------------------------------------------------------------ the whole way against the definition

TEXTS = ["10.99.101.1", "10.99.101.70", "10.99.201.129", "10.99.201.149", "192.0.2.1", "10.99.101.21"]
CHOICES = st.fixed_dictionaries({}, optional={
    "src_zone": st.lists(st.sampled_from(["internet", *TREE]), min_size=1, max_size=2),
    "dst_zone": st.lists(st.sampled_from(["internet", *TREE]), min_size=1, max_size=2),
    "src_subnet": st.sampled_from(["0.0.0.0/0", "10.99.101.0/24", "10.99.201.129/32"]),
    "dst_subnet": st.sampled_from(["0.0.0.0/0", "10.99.201.0/24", "192.0.2.1"]),
    "dst_port": st.sampled_from([80, "80,443", PortRange(70, 90)]),
    "iface": st.sampled_from(["eth0", "eth1"]),
})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(st.lists(CHOICES, min_size=1, max_size=12), st.data())
def test_rules_with_real_zones_win_as_defined(tree, rules, data):
    Globals.rules = None
    for number, conditions in enumerate(rules, 1):
        Rule(rule_id=number, service="s", **conditions)
    parents = {name: zone.admin_parent.name if zone.admin_parent else None for name, zone in Globals.zones.items()}
    for src in TEXTS:
        dst, port = data.draw(st.sampled_from(TEXTS)), data.draw(st.sampled_from([80, 75, 443, 1]))
        iface = data.draw(st.sampled_from([None, "eth0"]))
        defined = best_match.best(Globals.rules.data(), best_match.traffic(
            src, dst, proto=6, dst_port=port, iface=iface, src_zone=Zone.lookup(address(src)).name,
            dst_zone=Zone.lookup(address(dst)).name), parents)
        decision = Globals.rules.evaluate(packet(src, dst, port, iface=iface))
        assert (decision.rule_id if decision else None) == (defined.rule_id if defined else None)

