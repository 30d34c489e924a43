"""Reasons why rules lose agree with the decision, and read well."""

import pytest

from test.support.best_match import ranking, traffic
from test.support.random_policies import Generator
from Zorp.rules.engine import RuleData
from Zorp.rules.explanation import COMPONENTS, conditions, lost_by, unmet


@pytest.mark.parametrize("seed", range(12))
def test_a_rule_has_no_unmet_condition_exactly_when_it_matches(seed):
    generator = Generator(seed)
    for description in generator.instances():
        names = [zone.name for zone in description.zones] or [None]
        for _ in range(30):
            packet = generator.packet()._replace(src_zone=generator.random.choice(names),
                                                 dst_zone=generator.random.choice(names))
            matching = {rule.rule_id for _, rule in ranking(description.rules, packet, description.parents())}
            explained = {rule.rule_id for rule in description.rules
                         if not unmet(rule, packet, description.parents())}
            assert explained == matching


def test_the_component_that_decided_is_named():
    assert lost_by((0, 1, 0, 0, 0, 2, 5, 5), (0, 1, 0, 0, 0, 1, 9, 9)) == "destination port"
    assert lost_by((1,) * 8, (1,) * 8) is None


def test_words():
    rule = RuleData(rule_id=1, service="web", dst_port=((80, 80), (8000, 8099)), src_zone=("office",))
    packet = traffic("10.1.0.2", "192.0.2.1", proto=6, dst_port=443, src_zone="lab")
    assert conditions(rule, "destination port") == "dst_port=80,8000:8099"
    assert conditions(rule, COMPONENTS[0]) == "anything"
    assert unmet(rule, packet, {"office": None, "lab": None}) == [
        "destination port: dst_port=80,8000:8099, the connection has 443",
        "source address: src_zone=office, the connection has 10.1.0.2 in zone lab"]
