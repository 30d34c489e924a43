"""Rules that restrict by host name and are named for it when a policy is loaded (Zorp.rules.by_name)."""

import pytest

from test.support.zones import log_lines, no_zones
from Zorp import Globals
from Zorp.Rule import Rule
from Zorp.rules.by_name import Strictness, hanging_on_names
from Zorp.rules.description import ZoneData, parse_net
from Zorp.rules.engine import RuleData
from Zorp.Service import DenyService
from Zorp.Zone import Zone

__all__ = ["log_lines", "no_zones"]

ZONES = (
    ZoneData(name="internet", nets=(parse_net("0.0.0.0/0"),)), ZoneData(name="office", nets=(parse_net("10.0.0.0/8"),)),
    ZoneData(name="partners"), ZoneData(name="bad", parent="partners", hostnames=("b.test",)),
    ZoneData(name="good", hostnames=("g.test",)))
SERVICES = {"fwd": Strictness.FORWARDED, "web": Strictness.PROXIED, "no": Strictness.REFUSED}


def hanging(*rules):
    """[(rule, zone, rule instead)] of rules given as (service, conditions), numbered from 1."""
    described = [RuleData(rule_id=number, service=service, **conditions)
                 for number, (service, conditions) in enumerate(rules, start=1)]
    return [(found.rule.rule_id, found.zone, found.broader.rule_id)
            for found in hanging_on_names(described, SERVICES, ZONES)]


@pytest.mark.parametrize(("strict", "broad"), [
    (("no", {"dst_zone": ("bad",)}), ("web", {})),
    (("no", {"dst_zone": ("partners",)}), ("fwd", {"dst_zone": ("internet",)})),
    (("web", {"src_zone": ("bad",)}), ("fwd", {"src_zone": ("internet",)})),
    (("no", {"src_zone": ("office",), "dst_zone": ("bad",)}), ("web", {"src_zone": ("office",)})),
    (("no", {"dst_zone": ("bad",), "dst_port": ((80, 80),)}), ("web", {"dst_port": ((1, 1024),)})),
    (("no", {"dst_zone": ("bad",)}), ("web", {"dst_subnet": (parse_net("192.0.2.0/24"),)})),
    (("no", {"src_zone": ("office",), "dst_zone": ("bad",)}), ("web", {"src_subnet": (parse_net("10.0.0.0/8"),)})),
])
def test_a_restriction_that_a_broader_rule_replaces_is_found(strict, broad):
    assert hanging(strict, broad) == [(1, "bad", 2)]
    assert hanging(broad, strict) == [(2, "bad", 1)]


HARMLESS = {
    "permitted by name": [("web", {"dst_zone": ("bad",)}), ("no", {})],
    "as strict": [("no", {"dst_zone": ("bad",)}), ("no", {})],
    "by addresses": [("no", {"dst_zone": ("internet",)}), ("web", {})],
    "another port": [("no", {"dst_zone": ("bad",), "dst_port": ((80, 80),)}), ("web", {"dst_port": ((25, 25),)})],
    "another protocol": [("no", {"dst_zone": ("bad",), "proto": (17,)}), ("web", {"proto": (6,)})],
    "others by name, too": [("no", {"dst_zone": ("bad",)}), ("web", {"dst_zone": ("good",)})],
    "other clients": [("no", {"src_zone": ("office",), "dst_zone": ("bad",)}), ("web", {"src_zone": ("internet",)})],
}


@pytest.mark.parametrize("rules", HARMLESS.values(), ids=HARMLESS)
def test_what_a_name_without_address_cannot_open_is_not_reported(rules):
    assert hanging(*rules) == []


def test_the_load_of_a_policy_names_rules_hosts_and_remedy(no_zones, log_lines):
    # given a host name that may not be reached where everything else may
    Zone("internet", "0.0.0.0/0")
    Zone("bad", hostnames="b.example")
    Globals.services.update(web=object(), no=DenyService.__new__(DenyService))
    Rule(rule_id=1, service="web", dst_zone="internet")
    Rule(rule_id=7, service="no", dst_zone="bad")
    # when the rules are complete
    Globals.rules.check()
    # then there is one line
    (line,) = [text for _, _, text in log_lines if text.startswith("Rule restricts by host name")]
    assert "rule_id='7', service='no'" in line
    assert "zone='bad', hostname='b.example', instead='1', its_service='web'" in line
