"""Zones: look-up, administrative tree, names, and what is refused while a policy loads."""

import inspect
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from test.support.zones import address, log_lines, no_zones, zone_name
from Zorp.Base import BaseZone
from Zorp.Config import config
from Zorp.Exceptions import PolicyError, ZoneException
from Zorp.SockAddr import SockAddrUnix
from Zorp.Subnet import InetSubnet, Subnet
from Zorp.Zone import (
    AbstractZone, Inet6Zone, InetRootZone, InetZone, RootZone, Zone, check_zones, inet_root_zone, root_zone,
)

__all__ = ["log_lines", "no_zones"]
pytestmark = pytest.mark.usefixtures("no_zones")


# ------------------------------------------------------------------ look-up (zones-rules 3.3, 8, 11)

def test_scenario_1_the_narrowest_net_names_the_zone():
    Zone("net10", "10.0.0.0/8")
    Zone("host", "10.0.0.25/32")
    assert zone_name("10.0.0.25") == "host"
    assert zone_name("10.0.0.26") == "net10"


def test_the_lookup_tests_of_the_original():
    Zone("internet", "0.0.0.0/0")
    Zone("root", "10.0.0.1/32")
    Zone("non_root", "20.0.0.1/32", admin_parent="internet")
    assert [zone_name(a) for a in ("10.0.0.1", "20.0.0.1", "30.0.0.0", "255.255.255.255")] == [
        "root", "non_root", "internet", "internet"]
    assert zone_name("2001:db8::1") is None


def test_without_a_zone_for_everything_unknown_addresses_have_no_zone():
    Zone("root", "10.0.0.1/32")
    assert zone_name("10.0.0.2") is None
    assert Zone.lookup(address("10.0.0.2")) is None


def test_the_administrative_tree_does_not_decide_the_lookup():
    Zone("narrow", "10.1.0.0/16")
    Zone("wide", "10.0.0.0/8", admin_parent="narrow")
    assert zone_name("10.1.2.3") == "narrow"


def test_families_never_mix():
    Zone("four", "0.0.0.0/0")
    Zone("six", "::/0")
    assert zone_name("10.1.2.3") == "four"
    assert zone_name("2001:db8::1") == "six"


def test_scenario_33_mapped_addresses_are_looked_up_as_ipv4():
    Zone("six", "::/0")
    Zone("office", "10.0.0.0/8")
    Zone("mapped", "::ffff:192.0.2.0/120")
    assert zone_name("::ffff:10.0.0.5") == "office"
    assert zone_name("::ffff:11.0.0.5") is None
    assert zone_name("192.0.2.9") == "mapped"


def test_host_bits_of_a_subnet_do_not_matter():
    Zone("office", "10.1.2.3/16")
    assert zone_name("10.1.200.1") == "office"


def test_a_subnet_is_looked_up_by_its_first_address():
    zone = Zone("office", "10.1.0.0/16")
    assert Zone.lookup(InetSubnet("10.1.7.0/24")) is zone
    assert Zone.lookup(Subnet.create("10.0.0.0/8")) is None


def test_an_address_that_is_no_ip_address_has_no_zone():
    Zone("all", ["0.0.0.0/0", "::/0"])
    assert Zone.lookup(SockAddrUnix("/run/x")) is None
    assert Zone.lookupByStaticAddress(SockAddrUnix("/run/x")) is None
    assert Zone.lookupByStaticAddressExactly(SockAddrUnix("/run/x")) is None


def test_a_zone_defined_after_a_lookup_is_found():
    Zone("all", "0.0.0.0/0")
    assert zone_name("10.0.0.1") == "all"
    Zone("ten", "10.0.0.0/8")
    assert zone_name("10.0.0.1") == "ten"


def test_static_and_exact_lookups():
    host, net = Zone("host", ["10.0.0.1", "2001:db8::1/128"]), Zone("net", "10.0.0.0/24")
    assert Zone.lookupByStaticAddress(address("10.0.0.7")) is net
    assert Zone.lookupByStaticAddress(address("::ffff:10.0.0.7")) is net
    assert Zone.lookupByStaticAddressExactly(address("10.0.0.1")) is host
    assert Zone.lookupByStaticAddressExactly(address("2001:db8::1")) is host
    assert Zone.lookupByStaticAddressExactly(address("10.0.0.7")) is None


def test_lookup_by_name_under_both_spellings():
    zone = Zone("office", "10.0.0.0/8")
    assert Zone.lookupByName("office") is zone
    assert Zone.lookup_by_name("office") is zone
    assert Zone.lookupByName("nosuch") is None


NETS = st.tuples(st.sampled_from(["10.0.0.0", "10.0.0.128", "10.0.1.0", "10.128.0.0", "::", "2001:db8::"]),
                 st.sampled_from([0, 8, 9, 16, 24, 25, 32]))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(NETS, max_size=20, unique=True))
def test_every_address_is_in_the_zone_of_the_longest_prefix(no_zones, nets):
    Zone.zones.clear()
    Zone.zone_subnet_tree.clear()
    subnets = {str(net): net for net in (Subnet.create(f"{text}/{bits}") for text, bits in nets)}
    unique = list({(net.network_int, net.family, net.mask_bits): net for net in subnets.values()}.values())
    zones = [Zone(str(number), str(net)) for number, net in enumerate(unique)]
    for text in ("10.0.0.1", "10.0.0.129", "10.0.1.5", "10.200.0.1", "192.0.2.1", "::1", "2001:db8::7", "ff::"):
        probe = address(text)
        holding = [zone for zone in zones if zone.subnets[0].contains(probe)]
        expected = max(holding, key=lambda zone: zone.subnets[0].mask_bits, default=None)
        assert Zone.lookup(probe) is expected


# ------------------------------------------------------------------ tree, names, attributes (3.2, 4.1)

def test_attributes_of_a_zone():
    parent = Zone("parent")
    zone = Zone("child", ["10.0.0.0/8", "2001:db8::/32"], admin_parent="parent")
    assert zone.name == zone.getName() == "child"
    assert [str(net) for net in zone.subnets] == ["10.0.0.0/8", "2001:db8::/32"]
    assert zone.admin_parent is parent
    assert parent.admin_children == [zone]
    assert (parent.getDepth(), zone.getDepth()) == (0, 1)
    assert zone.hostnames == ()
    assert str(zone) == "Zone(child)"
    assert Zone.zones == {"parent": parent, "child": zone}


def test_inet_zone_and_inet6_zone_are_the_same_class():
    assert InetZone is Zone
    assert Inet6Zone is Zone
    assert issubclass(Zone, AbstractZone)
    assert issubclass(Zone, BaseZone)


def test_is_inside_walks_up_and_takes_a_string_for_one_name():
    Zone("off")
    Zone("office", admin_parent="off")
    lab = Zone("lab", admin_parent="office")
    assert lab.isInside(["office"])
    assert lab.isInside("off")
    assert not Zone.lookupByName("off").isInside("office")


def test_a_zone_may_be_moved_but_not_below_itself():
    a, b, c = Zone("a"), Zone("b", admin_parent="a"), Zone("c", admin_parent="b")
    seen = []
    with pytest.raises(PolicyError, match="A zone cannot stand below itself; zone='a', parent='c'"):
        a.setAdminParent(c)
    a.addAdminChild(c)
    a.iterAdminChildren(lambda parm, parent, child: seen.append((parm, parent, child)), 7)
    assert seen == [(7, a, b), (7, a, c)]
    assert b.admin_children == []
    assert c.getDepth() == 1


def test_the_root_zones_of_old_policies():
    zone = Zone("office", "10.0.0.0/8")
    assert isinstance(root_zone, RootZone)
    assert isinstance(inet_root_zone, InetRootZone)
    assert isinstance(inet_root_zone, InetZone)
    assert str(inet_root_zone) == "Zone(inet-root)"
    root_zone.addZone(zone)
    assert root_zone.findZone(address("10.0.0.1")) is zone
    assert inet_root_zone.zones == [zone]
    with pytest.raises(ZoneException) as caught:
        root_zone.findZone(address("192.0.2.1", 25))
    assert str(caught.value) == "Zone not found: AF_INET(192.0.2.1:25)"
    with pytest.raises(ZoneException):
        root_zone.findZone(SockAddrUnix("/run/x"))


def test_the_signature_is_that_of_the_newest_release():
    names = list(inspect.signature(Zone.__init__).parameters)
    assert names[:7] == ["self", "name", "addrs", "hostnames", "admin_parent", "inbound_services", "outbound_services"]


# ------------------------------------------------------------------ refused while loading (3.1, 10, 11)

def test_scenario_4_a_net_of_another_zone_is_refused_whatever_its_host_bits():
    Zone("a", "192.168.22.0/24")
    with pytest.raises(ZoneException, match=r"Zone with duplicate IP range; zone=Zone\(a\)"):
        Zone("b", "192.168.22.15/24")
    assert "b" not in Zone.zones


@pytest.mark.parametrize(("first", "second"), [
    ("192.168.22.31", "192.168.22.31/32"), ("0.0.0.0/0", "10.0.0.0/0"), ("2001:db8::/32", "2001:db8:1::/32"),
    ("10.0.0.0/8", "::ffff:10.0.0.0/104"),
])
def test_duplicate_nets(first, second):
    Zone("a", first)
    with pytest.raises(ZoneException, match="duplicate IP range"):
        Zone("b", ["172.16.0.0/12", second])


def test_the_same_network_with_another_prefix_is_another_net():
    Zone("a", "10.0.0.0/8")
    Zone("b", "10.0.0.0/16")
    assert zone_name("10.0.1.1") == "b"


def test_a_net_given_twice_in_one_zone_counts_once_with_a_warning(log_lines):
    zone = Zone("a", ["10.0.0.0/8", "10.0.0.1/8"])
    assert len(zone.subnets) == 1
    assert ("core.policy", 2, "Subnet given twice, counted once; zone='a', subnet='10.0.0.1/8'") in log_lines


def test_scenario_5_an_unknown_parent_is_refused_by_name():
    with pytest.raises(KeyError) as caught:
        Zone("child", "10.1.0.0/16", admin_parent="parent")
    assert caught.value.args == ("parent",)
    assert str(caught.value) == ("No zone was defined with that name; zone='parent'; "
                                 "define it above its child, zone 'child'")
    assert isinstance(caught.value, PolicyError)


def test_an_empty_parent_is_a_name_in_new_policies_and_none_in_old_ones():
    with pytest.raises(KeyError) as caught:
        Zone("a", addrs="10.0.0.0/8", admin_parent="")
    assert caught.value.args == ("",)
    assert InetZone("b", "10.0.0.0/8", admin_parent="").admin_parent is None


def test_a_name_used_twice_is_refused():
    Zone("a", "10.0.0.0/8")
    with pytest.raises(ZoneException, match="Zone a duplicate name") as caught:
        Zone("a", "10.1.0.0/16")
    assert isinstance(caught.value, PolicyError)
    assert zone_name("10.1.0.1") == "a"


@pytest.mark.parametrize(("first", "second"), [
    ({"name": "a", "addrs": "10.0.0.0/8"}, {"name": "a", "addrs": "10.1.0.0/16"}),
    ({"name": "a", "addrs": "10.0.0.0/8"}, {"name": "b", "addrs": ["10.1.0.0/16", "10.0.0.0/8"]}),
    ({"name": "a", "hostnames": "h.example"}, {"name": "b", "hostnames": "h.example"}),
], ids=["name", "net", "host name"])
def test_whoever_takes_what_another_zone_has_is_told_where_that_stands(first, second):
    zone = Zone(**first)
    assert zone.place.filename == __file__
    with pytest.raises(ZoneException, match=f"; .*other_place='{re.escape(__file__)}:{zone.place.line}'; "):
        Zone(**second)


def test_scenario_34_a_tree_of_32_levels_is_refused_naming_the_zone():
    Zone("z1")
    for number in range(2, 32):
        Zone(f"z{number}", admin_parent=f"z{number - 1}")
    with pytest.raises(PolicyError, match="Zone tree is too deep; zone='z32', depth='32'"):
        Zone("z32", admin_parent="z31")
    Zone("top")
    with pytest.raises(PolicyError, match="zone='z31'"):
        Zone.lookupByName("z1").setAdminParent(Zone.lookupByName("top"))


@pytest.mark.parametrize("name", ["", "x" * 1024, 7, None, b"office"])
def test_names_that_cannot_be(name):
    with pytest.raises(PolicyError, match="Invalid zone name"):
        Zone(name, "10.0.0.0/8")


@pytest.mark.parametrize("addrs", ["any", "10.0.0.0/33", "10.0.0.0/x", "10.0.0.256", "", [""], [7], b"10.0.0.0/8",
                                   "::g", "10.0.0.0/255.0.0.0"])
def test_addresses_that_are_none(addrs):
    with pytest.raises(ValueError, match="Invalid subnet specification"):
        Zone("a", addrs)
    assert Zone.zones == {}


def test_an_unknown_access_mode_is_refused():
    config.options.zone_dac = "yes"
    with pytest.raises(PolicyError, match="Unknown zone access mode; zone_dac='yes'"):
        check_zones()


def test_the_access_mode_is_reported_at_the_end_of_the_load(log_lines):
    Zone("a", "10.0.0.0/8")
    check_zones()
    assert log_lines == [("core.info", 6, "Service lists of zones; enforced='no', zone_dac='auto', zones='1'")]
    InetZone("b", "10.1.0.0/16", [], ["web"])
    check_zones()
    assert log_lines[-1] == ("core.info", 3, "Service lists of zones; enforced='yes', zone_dac='auto', zones='2'")
