"""Access lists of zones, as policies up to 3.9.6 wrote them (zones-rules 4.2, 4.4, 4.5)."""

import pytest

from test.support.zones import no_zones, session_of
from Zorp.Config import config
from Zorp.Constants import Z_ACCEPT, Z_REJECT
from Zorp.Zone import AbstractZone, InetZone, Zone, dac_enforced

__all__ = ["no_zones"]
pytestmark = pytest.mark.usefixtures("no_zones")


def may_enter(zone, service):
    return Zone.lookupByName(zone).isInboundServicePermitted(session_of(service)) == Z_ACCEPT


def may_leave(zone, service):
    return Zone.lookupByName(zone).isOutboundServicePermitted(session_of(service)) == Z_ACCEPT


def test_the_worked_example_of_inheritance_and_umbrella():
    InetZone("A", "10.0.0.0/8", inbound_services=["s1"])
    InetZone("B", "10.1.0.0/16", admin_parent="A")
    InetZone("C", "10.1.1.0/24", admin_parent="B")
    InetZone("D", "10.1.1.0/25", admin_parent="C", umbrella=1)
    InetZone("E", "10.1.1.128/25", admin_parent="C")
    assert [zone for zone in "ABCDE" if may_enter(zone, "s1")] == ["A", "B", "C", "E"]
    assert not any(may_leave(zone, "s1") for zone in "ABCDE")


def test_scenario_22_a_service_that_is_not_listed_may_not_leave():
    zone = InetZone("intra", "10.0.0.0/8", outbound_services=["intra_http"])
    assert zone.isOutboundServicePermitted(session_of("intra_http")) == Z_ACCEPT
    assert zone.isOutboundServicePermitted(session_of("intra_ftp")) == Z_REJECT


def test_scenario_23_a_zone_without_lists_and_without_parent_permits_nothing():
    InetZone("internet", "0.0.0.0/0", inbound_services=["*"])
    InetZone("servers", "192.0.2.0/24")
    assert may_enter("internet", "web")
    assert not may_enter("servers", "web")
    assert dac_enforced()


def test_scenario_24_an_umbrella_refuses_what_a_sibling_inherits():
    InetZone("parent", "10.0.0.0/8", ["*"], ["*"])
    InetZone("covered", "10.1.0.0/16", admin_parent="parent", umbrella=1)
    InetZone("open", "10.2.0.0/16", admin_parent="parent")
    assert (may_leave("covered", "s"), may_leave("open", "s")) == (False, True)


def test_scenario_26_stars_everywhere_behave_as_if_the_lists_were_absent():
    Zone("lan", addrs=["10.0.0.0/8"], inbound_services=["*"], outbound_services=["*"])
    assert may_enter("lan", "anything")
    assert may_leave("lan", "anything")


def test_hidden_zones_have_the_permissions_of_the_named_one_and_its_umbrella():
    InetZone("top", None, ["*"], ["*"])
    InetZone("covered", ["10.1.0.0/16", "10.2.0.0/16"], [], ["web"], "top", 1)
    assert may_leave("covered-#1", "web")
    assert not may_leave("covered-#1", "mail")
    assert not may_enter("covered-#0", "web")


def test_a_list_given_as_one_text_is_one_service():
    InetZone("lan", "10.0.0.0/8", outbound_services="web")
    assert may_leave("lan", "web")
    assert not may_leave("lan", "w")


@pytest.mark.parametrize(("keywords", "enforced"), [
    ({}, False), ({"inbound_services": []}, False), ({"inbound_services": ["web"]}, True),
    ({"outbound_services": []}, True), ({"outbound_services": None}, False), ({"umbrella": 1}, True),
    ({"umbrella": 0}, False),
], ids=str)
def test_what_turns_the_lists_on_for_the_whole_policy(keywords, enforced):
    InetZone("other", "192.0.2.0/24")
    InetZone("lan", "10.0.0.0/8", **keywords)
    assert dac_enforced() is enforced


@pytest.mark.parametrize(("mode", "enforced"), [("on", True), ("off", False), ("auto", True)])
def test_the_option_overrides_the_detection(mode, enforced):
    InetZone("lan", "10.0.0.0/8", ["*"], ["*"])
    config.options.zone_dac = mode
    assert dac_enforced() is enforced


def test_the_lists_can_be_enforced_where_no_zone_has_one():
    Zone("lan", "10.0.0.0/8")
    config.options.zone_dac = "on"
    assert dac_enforced()
    assert not may_leave("lan", "web")


def test_an_abstract_zone_takes_its_lists_in_the_order_of_3_9():
    Zone("top")
    zone = AbstractZone("abstract", ["in"], ["out"], "top", 1, 1)
    assert zone.getName() == "top"
    assert dac_enforced()
    assert may_enter("abstract", "in")
    assert may_leave("abstract", "out")
    assert not may_enter("abstract", "out")
    assert zone.inbound_services == {"in": "in"}
