"""Rules while a policy loads: keywords, what is refused, ids, the set (zones-rules 6)."""

import pytest

from test.support.zones import define_services, log_lines, no_zones, winner
from Zorp import Globals
from Zorp.rules import conditions
from Zorp.Exceptions import PolicyError
from Zorp.Rule import PortRange, Rule, RuleSet
from Zorp.rules.conditions import group_names
from Zorp.rules.engine import NetData
from Zorp.Subnet import Inet6Subnet, InetDomain, InetSubnet
from Zorp.Zone import Zone

__all__ = ["log_lines", "no_zones"]


@pytest.fixture(autouse=True)
def services_and_zones(no_zones):
    define_services("s", "t")
    Zone("office", "10.0.0.0/8")
    Zone("lab", "10.1.0.0/16", admin_parent="office")


@pytest.fixture
def groups(monkeypatch):
    monkeypatch.setattr(group_names, "_aliases", {"inside": 7})


# ------------------------------------------------------------------ keywords

V4, V6 = 2, 10
TEN, SIX = NetData(V4, 10 << 24, 8), NetData(V6, 0x20010DB8 << 96, 32)
CONDITIONS = {
    "nothing": ({}, {}),
    "one number": ({"dst_port": 80}, {"dst_port": ((80, 80),)}),
    "a numeric text": ({"src_port": "80"}, {"src_port": ((80, 80),)}),
    "a port range": ({"dst_port": PortRange(1, 65535)}, {"dst_port": ((1, 65535),)}),
    "ports of every form":
        ({"dst_port": [80, "443", PortRange(1, 2), 80]}, {"dst_port": ((80, 80), (443, 443), (1, 2))}),
    "scenario 15, a port text with a range": ({"dst_port": "80:90"}, {"dst_port": ((80, 90),)}),
    "a port list": ({"dst_port": "1024:2048,8080"}, {"dst_port": ((1024, 2048), (8080, 8080))}),
    "a generator": ({"dst_port": (port for port in (1, 2))}, {"dst_port": ((1, 1), (2, 2))}),
    "subnets of both families": ({"src_subnet": ("10.0.0.0/8", "2001:db8::/32")}, {"src_subnet": (TEN, SIX)}),
    "subnet objects": ({"dst_subnet": [InetSubnet("10.9.8.7/8"), Inet6Subnet("2001:db8::1/32")]},
                       {"dst_subnet": (TEN, SIX)}),
    "an old domain": ({"src_subnet": InetDomain("10.0.0.0/8")}, {"src_subnet": (TEN,)}),
    "a single address": ({"src_subnet": "10.0.0.1"}, {"src_subnet": (NetData(V4, 0x0A000001, 32),)}),
    "a mapped subnet is an IPv4 one": ({"src_subnet": "::ffff:10.0.0.0/104"}, {"src_subnet": (TEN,)}),
    "a zone": ({"src_zone": "office"}, {"src_zone": ("office",)}),
    "zones": ({"dst_zone": ("office", "lab")}, {"dst_zone": ("office", "lab")}),
    "an interface": ({"iface": "eth0"}, {"iface": ("eth0",)}),
    "an alias": ({"src_iface": ["eth0", "eth1"]}, {"iface": ("eth0", "eth1")}),
    "alias and name are merged": ({"iface": "eth0", "src_iface": "eth1"}, {"iface": ("eth0", "eth1")}),
    "ICMP under both names": ({"icmp_type": 8, "icmp_code": (0, 1)}, {"proto_type": (8,), "proto_subtype": (0, 1)}),
    "groups as numbers and names": ({"src_ifgroup": ["inside", "3", 4]}, {"ifgroup": (7, 3, 4)}),
    "a group of the destination": ({"dst_ifgroup": "inside"}, {"dst_ifgroup": (7,)}),
    "a raw group": ({"ifgroup": 300}, {"ifgroup": (300,)}),
    "the rest": ({"reqid": 5, "proto": [6, 17], "dst_iface": "eth0"},
                 {"reqid": (5,), "proto": (6, 17), "dst_iface": ("eth0",)}),
}


@pytest.mark.parametrize(("keywords", "dimensions"), CONDITIONS.values(), ids=CONDITIONS)
def test_keywords_become_plain_data(keywords, dimensions, groups):
    assert Rule(service="s", **keywords).dimensions == dimensions


def test_an_empty_condition_restricts_nothing_and_is_reported(log_lines):
    rule = Rule(service="s", src_zone=(), dst_port=[])
    assert rule.dimensions == {}
    assert ("core.policy", 2, "Empty condition restricts nothing; dimension='src_zone'") in log_lines
    assert winner("192.0.2.1", "192.0.2.2") == "s"


REFUSED = {
    "scenario 16": ({"src_zone": "nosuch"}, "No zone was defined with that name; zone='nosuch'"),
    "zone of another type": ({"dst_zone": 7}, "No zone was defined with that name; zone='7'"),
    "scenario 17": ({"foo": 1}, "Unknown dimension 'foo'"),
    "internal name": ({"src_subnet6": "::/0"}, "Invalid dimension specification 'src_subnet6'"),
    "port of another type": ({"dst_port": 80.5}, "Integer port value expected; value='80.5'"),
    "a tuple of two in a list": ({"dst_port": [(80, 90)]}, r"Integer port value expected; value='\(80, 90\)'"),
    "port text": ({"dst_port": "http"}, "Integer port value expected; value='http'"),
    "empty port text": ({"dst_port": ""}, "Integer port value expected; value=''"),
    "range with a dash": ({"dst_port": "80,53-60"}, r"value='53-60'; .*'8000:8099' \(a range\)"),
    "range upside down":
        ({"dst_port": PortRange(90, 80)}, "Invalid port range; dimension='dst_port', low='90', high='80'"),
    "port too high": ({"src_port": 65536}, "Invalid port range"),
    "port negative": ({"src_port": -1}, "Invalid port range"),
    "range of texts": ({"src_port": PortRange("1", "2")}, "Integer port value expected"),
    "subnet of another type": ({"src_subnet": 10}, "Invalid subnet specification: value='10'"),
    "subnet text": ({"src_subnet": "10.0.0.0/33"}, "Invalid subnet specification"),
    "type too high": ({"icmp_type": 256}, "Integer value expected; dimension='icmp_type', value='256'"),
    "code too high": ({"proto_subtype": -1}, "Integer value expected; dimension='proto_subtype', value='-1'"),
    "protocol text": ({"proto": "tcp"}, "Integer value expected; dimension='proto', value='tcp'"),
    "interface too long": ({"iface": "x" * 16}, "Interface name expected"),
    "interface empty": ({"iface": ""}, "Interface name expected"),
    "interface with a slash": ({"dst_iface": "a/b"}, "Interface name expected"),
    "group name": ({"src_ifgroup": "outside"}, r"Valid group name expected; value='outside' \{'inside': 7\}"),
    "raw group name": ({"ifgroup": "inside"}, "Integer value expected; dimension='ifgroup', value='inside'"),
    "no service": ({"service": None}, "No valid service was specified for the rule; service='None'"),
    "unknown service": ({"service": "nosuch"}, "No valid service was specified for the rule; service='nosuch'"),
    "id zero": ({"rule_id": 0}, "Invalid rule id; rule_id='0'"),
    "id negative": ({"rule_id": -1}, "Invalid rule id"),
    "id too high": ({"rule_id": 1 << 32}, "Invalid rule id"),
    "id text": ({"rule_id": "1"}, "Invalid rule id"),
}


@pytest.mark.parametrize(("keywords", "text"), REFUSED.values(), ids=REFUSED)
def test_what_no_rule_can_say_is_refused_where_it_is_written(keywords, text, groups):
    with pytest.raises(PolicyError, match=text) as caught:
        Rule(**{"service": "s", **keywords})
    assert isinstance(caught.value, ValueError)
    assert Globals.rules is None


def test_a_refusal_names_the_rule():
    with pytest.raises(PolicyError) as caught:
        Rule(rule_id=7, service="s", dst_port=PortRange(90, 80))
    assert str(caught.value) == ("Invalid port range; dimension='dst_port', low='90', high='80'; "
                                 "in rule 7 for service 's': ports go from 0 to 65535, the lower one first")
    with pytest.raises(PolicyError, match="in rule without id for service 't': "):
        Rule(service="t", src_zone="nosuch")
    with pytest.raises(PolicyError, match="; in rule 8: give service= the name"):
        Rule(rule_id=8, dst_port=80)
    with pytest.raises(PolicyError, match="; give service= the name"):
        Rule(dst_port=80)


@pytest.mark.parametrize(("detect", "default", "text"), [
    ({"http": "s"}, None, "No such detector defined; detector='http'"),
    ([("http", "s")], "s", "No such detector defined; detector='http'"),
    ([("known", "nosuch")], None, "No such service defined; service='nosuch'"),
    ([("known", "s")], "nosuch", "No valid default service was specified for the rule; service='nosuch'"),
    ([("known", "s")], "s", "Protocol detection is not built yet"),
])
def test_detection_is_refused_with_the_text_of_what_is_missing(detect, default, text, monkeypatch):
    monkeypatch.setitem(Globals.detectors, "known", object())
    with pytest.raises(PolicyError, match=text):
        Rule(detect=detect, service=default)


def test_a_dictionary_of_detectors_is_deprecated(log_lines):
    with pytest.raises(PolicyError):
        Rule(detect={"http": "s"})
    assert log_lines == [("core.debug", 3, "Using dictionary in the detect parameter is deprecated, "
                                           "list should be used instead.")]


def test_the_group_table_is_read_when_a_name_is_used_and_may_be_missing(monkeypatch):
    def missing():
        raise FileNotFoundError

    monkeypatch.setattr(group_names, "_aliases", None)
    monkeypatch.setattr(conditions, "parseIfaceGroupAliases", missing)
    assert Rule(service="s", src_ifgroup="12").dimensions == {"ifgroup": (12,)}
    with pytest.raises(PolicyError, match=r"Valid group name expected; value='inside' \{\}"):
        Rule(service="s", src_ifgroup="inside")


# ------------------------------------------------------------------ ids and the set

def test_scenario_13_rules_without_ids_are_numbered_around_explicit_ones():
    first, second, third = Rule(service="s"), Rule(service="s", dst_port=1), Rule(service="s", rule_id=1)
    assert [rule.getId() for rule in (first, second, third)] == [2, 3, 1]
    assert [rule.getId() for rule in Globals.rules] == [1, 2, 3]
    assert Globals.rules.length == len(Globals.rules) == 3


def test_a_number_given_away_early_yields_to_a_later_explicit_id():
    first = Rule(service="s")
    assert first.getId() == 1
    second = Rule(service="t", rule_id=1)
    assert (first.getId(), second.getId()) == (2, 1)


def test_an_id_used_twice_is_refused():
    Rule(rule_id=5, service="s")
    with pytest.raises(PolicyError, match="Duplicate rule id found; id='5'"):
        Rule(rule_id=5, service="t")
    assert Globals.rules.length == 1


def test_rules_iterate_by_id_and_give_plain_data():
    Rule(rule_id=9, service="s", dst_port=80)
    Rule(rule_id=3, service="t", src_zone="office")
    assert [(data.rule_id, data.service) for data in Globals.rules.data()] == [(3, "t"), (9, "s")]
    assert Globals.rules.data()[0].src_zone == ("office",)
    assert repr(next(iter(Globals.rules))) == "Rule(rule_id=3, service='t', src_zone=('office',))"


def test_a_rule_as_messages():
    rule = Rule(rule_id=4, service="s", dst_port=80)
    assert rule.buildKZorpMessage("instance") == [
        {"message": "add rule", "dispatcher": "instance", "rule_id": 4, "service": "s",
         "dimensions": {"dst_port": ((80, 80),)}}]


def test_a_rule_added_after_a_decision_counts():
    Rule(service="s")
    assert winner("10.0.0.1", "192.0.2.1", 80) == "s"
    Rule(service="t", dst_port=80)
    assert winner("10.0.0.1", "192.0.2.1", 80) == "t"


def test_port_ranges_compare_by_value():
    assert PortRange(1, 2).getTuple() == (1, 2)
    assert PortRange(1, 2) == PortRange(1, 2) != PortRange(1, 3)
    assert len({PortRange(1, 2), PortRange(1, 2)}) == 1
    assert repr(PortRange(1, 2)) == "PortRange(1, 2)"


# ------------------------------------------------------------------ dictionaries of 3.9.0

def test_rule_dictionaries_make_a_set_of_their_own():
    # given the dictionaries of an NDimensionDispatcher
    descriptions = ({"dst_port": 443, "src_zone": ("lab",), "dst_zone": "office", "service": "s", "auth": "x"},
                    {"dst_port": "8443,9000:9010", "src_zone": "office", "service": "t", "rule_id": 12})
    before = [dict(description) for description in descriptions]
    # when they become a set
    rules = RuleSet.from_descriptions(descriptions)
    # then the dictionaries are untouched, and the rules of the instance too
    assert [dict(description) for description in descriptions] == before
    assert Globals.rules is None
    assert [rule.getId() for rule in rules] == [1, 12]
    assert rules.data()[1].dst_port == ((8443, 8443), (9000, 9010))


@pytest.mark.parametrize(("descriptions", "text"), [
    ([{"dst_port": 80}], "Service key not found in rule description"),
    ([{"service": "s", "reqid": 1}], "Dimension name='reqid' not found"),
    ([{"service": "s", "rule_id": 2}, {"service": "t", "rule_id": 2}], "Duplicated rule_id found; rule_id=2"),
    ([{"service": "nosuch"}], "No valid service was specified for the rule; service='nosuch'"),
])
def test_rule_dictionaries_that_are_refused(descriptions, text):
    with pytest.raises(ValueError, match=text):
        RuleSet.from_descriptions(descriptions)
