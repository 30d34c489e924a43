"""The chains decide as the daemon does: random policies, random packets, both asked."""

import pytest

from test.support.disputes import by_definition
from test.support.packet_model import CLOSED, Model
from test.support.random_policies import Generator, Oracle
from Zorp.netfilter.compiler import compile_plan
from Zorp.netfilter.evaluator import Evaluator
from Zorp.netfilter.instance_zones import InstanceZones
from Zorp.netfilter.site import Site


def compare(seed: int, packets: int) -> int:
    """Ask both about packets of one random set of policies; return how many matched a rule."""
    generator = Generator(seed)
    descriptions = generator.instances()
    model = Model(compile_plan(descriptions, Site(split_above=generator.random.choice((1, 8, 1_000)))))
    oracle = Oracle(descriptions)
    matched = 0
    for _ in range(packets):
        packet = generator.packet()
        expected = oracle.best(packet)
        rule, _ = model.rule_of(packet)
        assert (rule and (rule.instance, rule.rule_id)) == expected, f"seed {seed}: {packet}"
        if rule is not None:
            assert not model.is_late(rule, packet, begins=True)
            must_not_begin = rule.kind == "forward" and packet.proto == 6
            assert model.is_late(rule, packet, begins=False) == must_not_begin, f"seed {seed}: {packet}"
        matched += expected is not None
    return matched


@pytest.mark.parametrize("seed", range(60))
def test_chains_decide_as_the_engine(seed):
    compare(seed, 60)


def compare_disputes(seed: int, packets: int) -> tuple[int, int]:
    """Ask the chains, kzorpd and the definition where names share addresses; return how many (pass, are closed)."""
    generator = Generator(seed)
    named, answers = generator.named_instances()
    zones = [InstanceZones(description) for description in named]
    for one in zones:
        one.feed(answers)
    descriptions = [one.described() for one in zones]
    model = Model(compile_plan(descriptions, Site(split_above=generator.random.choice((1, 8, 1_000)))))
    evaluator = Evaluator(list(zip(named, zones, strict=True)))
    matched = closed = 0
    for _ in range(packets):
        packet = generator.packet()
        expected = by_definition(descriptions, answers, packet)
        rule, _ = model.rule_of(packet)
        assert (rule if rule in (None, CLOSED) else (rule.instance, rule.rule_id)) == expected, f"seed {seed}: {packet}"
        verdict = evaluator.evaluate(packet)
        told = CLOSED if verdict.disputed else (verdict.instance, verdict.rule_id) if verdict.rule_id else None
        assert told == expected, f"seed {seed}: {packet}"
        matched += expected not in (None, CLOSED)
        closed += expected == CLOSED
    return matched, closed


@pytest.mark.parametrize("seeds", [range(start, 60, 4) for start in range(4)], ids=str)
def test_where_names_share_addresses_only_what_all_their_zones_agree_upon_passes(seeds):
    matched, closed = map(sum, zip(*(compare_disputes(seed, 60) for seed in seeds), strict=True))
    assert matched > 200
    assert closed >= 20


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_packets():
    matched = sum(compare(seed, 100) for seed in range(1_000, 2_000))
    assert matched > 30_000              # else the comparison says little
