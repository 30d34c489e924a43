"""Every form of the zone constructor, from 0.6 to 7.0 (zones-rules 3.1, 4.1, 4.4; legacy 3.1)."""

import pytest

from test.support.zones import log_lines, no_zones, zone_name
from Zorp.Exceptions import PolicyError
from Zorp.Subnet import InetDomain, InetSubnet
from Zorp.Zone import InetZone, Zone, dac_enforced
from Zorp.zones.forms import read_zone_call

__all__ = ["log_lines", "no_zones"]
pytestmark = pytest.mark.usefixtures("no_zones")

KNOWN = {"parent", "world"}
NET = "10.1.0.0/16"

# name -> positional arguments, keywords, what they mean beyond the defaults
CALLS = {
    "name alone": (("n",), {}, {"addrs": ()}),
    "keyword addr": (("n",), {"addr": NET}, {}),
    "keyword addrs": (("n",), {"addrs": [NET]}, {"addrs": [NET], "may_be_classic": False}),
    "no address": (("n", None), {}, {"addrs": None}),
    "0.6: address and netmask":
        (("n", "10.20.0.0", "255.255.0.0", None), {"outbound_services": ["*"], "inbound_services": ["*"]},
         {"addrs": "10.20.0.0/16", "inbound_services": ("*",), "outbound_services": ("*",)}),
    "3.9.0: lists, parent, umbrella, inherited name":
        (("n", NET, ["in.web"], ["out"], "parent", 1, 1), {},
         {"inbound_services": ("in.web",), "outbound_services": ("out",), "admin_parent": "parent", "umbrella": True,
          "inherit_name": True}),
    "3.9.0: domain as seventh":
        (("n", NET, ["web"], ["web"], None, 0, InetDomain, 1), {},
         {"inbound_services": ("web",), "outbound_services": ("web",), "domain": InetDomain, "inherit_name": True}),
    "lists: a star": (("n", NET, ["*"]), {}, {"inbound_services": ("*",)}),
    "lists: a service without a dot": (("n", NET, ["web"]), {}, {"inbound_services": ("web",)}),
    "lists: nothing may enter":
        (("n", NET, [], ["web"]), {}, {"inbound_services": (), "outbound_services": ("web",)}),
    "lists: only outbound": (("n", NET, None, ("a.b",)), {}, {"outbound_services": ("a.b",)}),
    "lists: dotted services, parent behind them":
        (("n", NET, ["a.b"], None, "parent"), {}, {"inbound_services": ("a.b",), "admin_parent": "parent"}),
    "lists: dotted services, outbound by keyword":
        (("n", NET, ["a.b"]), {"outbound_services": []}, {"inbound_services": ("a.b",), "outbound_services": ()}),
    "lists: dotted services, umbrella by keyword":
        (("n", NET, ["a.b"]), {"umbrella": 0}, {"inbound_services": ("a.b",)}),
    "lists: a star as text": (("n", NET, "*"), {}, {"inbound_services": ("*",)}),
    "3.9.8: parent third": (("n", NET, "parent"), {}, {"admin_parent": "parent", "may_be_classic": False}),
    "3.9.8: parent third, then nothing":
        (("n", NET, "parent", None, None), {}, {"admin_parent": "parent", "may_be_classic": False}),
    "5.0: one host name": (("n", NET, "gw.example"), {}, {"hostnames": "gw.example"}),
    "5.0: host names":
        (("n", NET, ["gw.example", "a.b"], "parent"), {},
         {"hostnames": ["gw.example", "a.b"], "admin_parent": "parent"}),
    "5.0: no host names": (("n", NET, (), "parent"), {}, {"admin_parent": "parent"}),
    "5.0: nothing, then the parent": (("n", NET, None, "parent"), {}, {"hostnames": None, "admin_parent": "parent"}),
    "5.0: host name without a dot by keyword":
        (("n", ()), {"hostnames": ["gateway"]}, {"addrs": (), "hostnames": ["gateway"]}),
}
DEFAULTS = {"name": "n", "addrs": NET, "hostnames": (), "admin_parent": None, "inbound_services": None,
            "outbound_services": None, "umbrella": False, "domain": None, "inherit_name": False}


@pytest.mark.parametrize(("args", "keywords", "meaning"), CALLS.values(), ids=CALLS)
def test_each_form_is_read_as_its_release_read_it(args, keywords, meaning):
    read = read_zone_call(args, keywords, KNOWN)
    expected = DEFAULTS | meaning
    assert {name: getattr(read, name) for name in expected} == expected


REFUSED = {
    "both names of the address": ((), {"name": "n", "addr": NET, "addrs": NET}, "got both 'addr' and 'addrs'"),
    "no name": ((), {"addrs": NET}, "missing required argument: 'name'"),
    "unknown keyword": (("n",), {"address": NET}, "unexpected keyword argument 'address'"),
    "twice": (("n", NET), {"addr": NET}, "got multiple values for argument 'addrs'"),
    "too many": (("n", NET, "a.b", None, None, None, None), {}, "takes at most 6 positional arguments"),
}


@pytest.mark.parametrize(("args", "keywords", "text"), REFUSED.values(), ids=REFUSED)
def test_calls_that_no_release_took_are_type_errors(args, keywords, text):
    with pytest.raises(TypeError, match=text):
        Zone(*args, **keywords)


@pytest.mark.parametrize("mask", ["255.0.255.0", "0.0.0.255", "255.255.255.256"])
def test_a_netmask_must_be_one(mask):
    with pytest.raises(PolicyError, match="Invalid netmask"):
        Zone("n", "10.0.0.0", mask)


@pytest.mark.parametrize(("mask", "bits"), [("255.255.255.255", 32), ("255.254.0.0", 15), ("0.0.0.0", 0)])
def test_netmasks_of_the_first_releases(mask, bits):
    assert Zone("n", "10.0.0.0", mask).subnets[0].mask_bits == bits


def test_a_parent_may_be_the_zone_itself_as_in_the_first_releases():
    parent = InetZone("office", "10.20.0.0", "255.255.0.0", None)
    child = InetZone("lab", "10.20.7.0", "255.255.255.0", parent)
    assert child.admin_parent is parent


def test_subnet_objects_are_addresses_too():
    Zone("office", [InetSubnet("10.1.0.0/16"), "2001:db8::/32"])
    assert zone_name("10.1.0.1") == zone_name("2001:db8::1") == "office"


# ------------------------------------------------------------------ hidden zones and names of 3.9.0

def test_scenario_25_both_nets_of_a_classic_zone_may_use_its_services_under_its_name():
    # given a zone of 3.9.0 with two nets
    office = InetZone("office", ["10.1.0.0/24", "10.2.0.0/24"], outbound_services=["s"])
    for place, text in enumerate(("10.1.0.7", "10.2.0.7")):
        # then each address is in a hidden zone that gives its parent's name and takes its permissions
        hidden = Zone.lookupByName(f"office-#{place}")
        assert zone_name(text) == hidden.name == f"office-#{place}"
        assert hidden.getName() == "office"
        assert hidden.admin_parent is office
        assert hidden.isInside("office")
    assert str(Zone.lookupByName("office-#0")) == "Zone(office, 10.1.0.0/24)"
    assert str(office) == "Zone(office, None)"


def test_a_list_of_one_address_is_like_the_address():
    InetZone("office", ["10.1.0.0/24"], outbound_services=["s"])
    assert list(Zone.zones) == ["office"]
    assert str(Zone.lookupByName("office")) == "Zone(office, 10.1.0.0/24)"


def test_new_policies_have_no_hidden_zones_and_plain_names():
    office = InetZone("office", ["10.1.0.0/24", "10.2.0.0/24"])
    assert list(Zone.zones) == ["office"]
    assert str(office) == "Zone(office)"


def test_a_zone_of_the_transition_releases_keeps_all_its_nets():
    office = Zone("office", addrs=["10.1.0.0/24", "2001:db8::/48"], inbound_services=["*"], outbound_services=["*"])
    assert zone_name("2001:db8::1") == "office"
    assert str(office) == "Zone(office)"
    assert dac_enforced()


def test_an_inherited_name_is_the_parents():
    Zone("office", "10.0.0.0/8")
    child = InetZone("part", "10.1.0.0/16", admin_parent="office", inherit_name=1)
    assert child.getName() == "office"
    assert child.name == "part"


def test_services_are_logged_while_loading(log_lines):
    InetZone("office", "10.1.0.0/16", ["web"], "mail")
    assert log_lines == [
        ("core.debug", 5, "Outbound service; zone='office', service='mail'"),
        ("core.debug", 5, "Inbound service; zone='office', service='web'")]
