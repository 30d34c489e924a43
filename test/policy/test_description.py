"""Descriptions of instances: what survives the way through text, and what is refused with whose name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from Zorp.rules.description import (
    DenyData,
    DescriptionError,
    ForwardData,
    InstanceDescription,
    ListenerData,
    NatData,
    ProxyData,
    ZoneData,
    from_json,
    parse_net,
    to_json,
)
from Zorp.rules.engine import RuleData

FULL = InstanceDescription(
    instance="intra",
    zones=(ZoneData(name="internet", nets=(parse_net("0.0.0.0/0"), parse_net("::/0"))),
           ZoneData(name="lab", parent="internet", nets=(parse_net("10.1.0.64/26"),), hostnames=("a.example",))),
    services=(ProxyData(name="web"), DenyData(name="no", logging=False, ipv4="TCP_RESET", ipv6="ICMP_NO_ROUTE"),
              ForwardData(name="fwd", router=("10.2.0.2", 7000), forge_addr=True,
                          snat=(NatData(*map(parse_net, ("10.0.0.0/8", "0.0.0.0/0", "192.0.2.0/24"))),))),
    rules=(RuleData(rule_id=7, service="web", iface=("eth0",), ifgroup=(3,), proto=(6,), dst_port=((80, 80), (90, 99)),
                    src_zone=("lab",), dst_subnet=(parse_net("2001:db8::/32"),), reqid=(1,), dst_iface=("eth1",)),
           RuleData(rule_id=9, service="no", proto_type=(8,), proto_subtype=(0,))),
    listeners=(ListenerData(6, "127.0.0.1", 50080), ListenerData(6, "::1", 0)))


def test_text_and_back():
    assert from_json(to_json(FULL)) == FULL


def changed(path, value):
    """Return FULL as decoded JSON with one place replaced."""
    description = json.loads(to_json(FULL))
    place = description
    for step in path[:-1]:
        place = place[step]
    if value is DELETED:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(description)


DELETED = object()
REFUSED = {
    "version": (("version",), 2, "version 2"),
    "instance": (("instance",), "-A ZORP", "invalid instance name '-A ZORP'"),
    "missing": (("zones",), DELETED, "zones is missing"),
    "unknown field": (("rules", 0, "dst_prt"), [1], "rule 7: unknown field 'dst_prt'"),
    "zone parent": (("zones", 1, "parent"), "nowhere", "zone 'lab': parent 'nowhere'"),
    "zone below itself": (("zones", 0, "parent"), "internet", "zone 'internet': parent"),
    "zone net": (("zones", 1, "nets"), ["10.1.0.65/26"], "zone 'lab': a net was expected, not '10.1.0.65/26'"),
    "duplicate net": (("zones", 1, "nets"), ["0.0.0.0/0"],
                      "duplicate subnet detected; zone1='internet', zone2='lab'"),
    "service of rule": (("rules", 0, "service"), "x", "rule 7: unknown service 'x'"),
    "zone of rule": (("rules", 0, "src_zone"), ["x"], "rule 7: unknown zone 'x'"),
    "rule id": (("rules", 0, "rule_id"), 0, "a number from 1 to 4294967295"),
    "rule id twice": (("rules", 0, "rule_id"), 9, "rule id '9' given twice"),
    "empty dimension": (("rules", 0, "src_zone"), [], "rule 7: src_zone without a value"),
    "ports": (("rules", 0, "dst_port"), [[80, 79]], "rule 7: port range 80 to 79"),
    "port": (("rules", 0, "dst_port"), [[80, 70_000]], "rule 7: a number from 0 to 65535"),
    "iface": (("rules", 0, "iface"), ["eth0 -j ACCEPT"], "rule 7: invalid interface name"),
    "iface newline": (("rules", 0, "iface"), ["eth0\n"], "rule 7: invalid interface name"),
    "true is no number": (("rules", 0, "proto"), [True], "rule 7: a number from 0 to 255"),
    "kind": (("services", 0, "kind"), "shell", "service 'web': unknown kind"),
    "deny code": (("services", 1, "ipv6"), "ICMP_NET_UNREACHABLE", "service 'no': one of DROP"),
    "router": (("services", 2, "router"), ["10.2.0.2; reboot", 1], "service 'fwd': an address was expected"),
    "nat families": (("services", 2, "snat"), [["10.0.0.0/8", "::/0", "10.0.0.0/8"]], "service 'fwd': NAT entry"),
    "listener elsewhere": (("listeners", 0, "address"), "192.0.2.1", "listener: address 192.0.2.1 is not on loopback"),
    "not an object": (("zones", 0), "office", "an object was expected"),
}


@pytest.mark.parametrize(("path", "value", "text"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_refused_by_name(path, value, text):
    with pytest.raises(DescriptionError) as refused:
        from_json(changed(path, value))
    assert text in str(refused.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "null", "1" * 5_000, b"\xff\xfe"])
def test_what_is_no_description_is_refused(text):
    with pytest.raises(DescriptionError):
        from_json(text)


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                      lambda inner: (st.lists(inner, max_size=3)
                                     | st.dictionaries(st.text(max_size=5), inner, max_size=3)),
                      max_leaves=5)
PATHS = [path for path, _, _ in REFUSED.values()]


@given(st.sampled_from(PATHS), VALUES)
def test_any_value_anywhere_is_read_or_refused(path, value):
    try:
        description = from_json(changed(path, value))
    except DescriptionError:
        return
    assert from_json(to_json(description)) == description
