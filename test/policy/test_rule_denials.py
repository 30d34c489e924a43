"""Rules that are meant to deny and lose to a permitting one are named when the policy loads; others are not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from test.policy.test_rule_engine import PARENTS, RULES
from test.support.zones import log_lines, no_zones
from Zorp import Globals
from Zorp.Plug import PlugProxy
from Zorp.Rule import PortRange, Rule
from Zorp.rules.denials import ZoneFacts, holes
from Zorp.rules.engine import RuleEngine
from Zorp.Service import DenyService, Service
from Zorp.Zone import Zone

__all__ = ["log_lines", "no_zones"]

SSH = {"src_zone": "office", "dst_zone": "dmz", "dst_port": 22}
GUESTS = {"src_zone": "guests"}


@pytest.fixture
def policy(no_zones):
    Zone("internet", ["0.0.0.0/0", "::/0"])
    Zone("office", ["192.168.1.0/24", "fd00:1::/64"])
    Zone("guests", ["192.168.1.192/26"], admin_parent="office")
    Zone("dmz", "172.16.40.0/24")
    Service("permit", PlugProxy)
    DenyService("deny")


def permit(**conditions):
    return {"service": "permit", **conditions}


def deny(**conditions):
    return {"service": "deny", **conditions}


def warnings(log_lines, rules):
    made = [Rule(rule_id=number, **keywords) for number, keywords in enumerate(rules, 1)]
    Globals.rules.check()
    return made, [text for tag, level, text in log_lines if text.startswith("Deny rule loses")]


HOLES = {
    "a port weighs more than the clients": [permit(**SSH), deny(**GUESTS, dst_zone="dmz")],
    "an interface weighs more than all else": [permit(iface="eth1", dst_zone="dmz"), deny(**GUESTS, dst_port=22)],
    "a single port beats the range that has it": [permit(**SSH), deny(**GUESTS, dst_port=PortRange(0, 1023))],
    "a permission for everyone": [permit(dst_port=22), deny(**GUESTS)],
    "one port of several": [permit(**{**SSH, "dst_port": (80, 443)}), deny(**GUESTS, dst_port=80), deny(**GUESTS)],
    "a subnet of clients": [permit(**SSH), deny(src_subnet="192.168.1.200/32")],
    "the server is protected, but not against those with a port":
        [permit(src_zone="office", dst_port=22), deny(dst_zone="dmz")],
    "IPv6 clients only": [permit(**{**SSH, "dst_zone": "internet"}, proto=6), deny(src_subnet="fd00:1::5/128")],
}


@pytest.mark.parametrize("rules", HOLES.values(), ids=HOLES)
def test_a_denying_rule_with_a_hole_is_named_with_both_places(policy, log_lines, rules):
    made, found = warnings(log_lines, rules)
    denial = made[-1]
    assert len(found) == 1
    assert found[0].startswith(f"Deny rule loses to a permitting one; rule_id='{denial.rule_id}', service='deny', "
                               f"place='{denial.place}', winner='1', permits='permit', winner_place='{made[0].place}'")


INTENDED = {
    "as much is said": [permit(**SSH), deny(**GUESTS, dst_zone="dmz", dst_port=22)],
    "an exception that is narrower in all": [deny(**GUESTS), permit(**GUESTS, dst_zone="dmz", dst_port=22)],
    "an exception for a deeper zone": [deny(src_zone="office"), permit(**GUESTS, dst_port=22)],
    "all others": [permit(**SSH), deny()],
    "all others, by net": [permit(**SSH), deny(src_subnet="0.0.0.0/0")],
    "all others, by zone": [permit(dst_port=25, dst_zone="dmz"), deny(src_zone="internet")],
    "all others, by ports": [permit(src_zone="office"), deny(src_port=PortRange(0, 65535))],
    "they never meet": [permit(src_zone="dmz", dst_port=22), deny(**GUESTS)],
    "other ports": [permit(**SSH), deny(**GUESTS, dst_port=23)],
    "another rule closes the hole": [permit(**SSH), deny(**GUESTS, dst_port=22), deny(**GUESTS)],
    "a large net is not narrower than a zone": [permit(**SSH), deny(src_subnet="192.168.0.0/16")],
}


@pytest.mark.parametrize("rules", INTENDED.values(), ids=INTENDED)
def test_what_is_meant_is_not_reported(policy, log_lines, rules):
    assert warnings(log_lines, rules)[1] == []


@settings(max_examples=100, deadline=None)
@given(RULES, st.data())
def test_what_is_reported_is_true(rules, data):
    # given any rules, some of them for services that deny
    unique = list({rule.rule_id: rule for rule in rules}.values())
    services = sorted({rule.service for rule in unique})
    denying = set(data.draw(st.lists(st.sampled_from(services), max_size=2))) if services else set()
    # then each rule is named once at most, and it denies what its winner permits
    found = list(holes(RuleEngine(unique, PARENTS), denying, ZoneFacts(PARENTS, {}, lambda *_: "a")))
    assert len({hole.denial.rule_id for hole in found}) == len(found)
    assert all(hole.denial.service in denying and hole.winner.service not in denying for hole in found)
    assert all(hole.decided_by != hole.narrower_in for hole in found)
