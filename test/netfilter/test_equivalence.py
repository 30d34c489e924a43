"""The chains decide as the daemon does: random policies, random packets, both asked."""

import pytest

from test.support.packet_model import Model
from test.support.random_policies import Generator, Oracle
from Zorp.netfilter.compiler import compile_plan
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
        matched += expected is not None
    return matched


@pytest.mark.parametrize("seed", range(60))
def test_chains_decide_as_the_engine(seed):
    compare(seed, 60)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_packets():
    matched = sum(compare(seed, 100) for seed in range(1_000, 2_000))
    assert matched > 30_000              # else the comparison says little
