"""Longest prefix match against the definition: try every net, take the longest that holds the address."""

from hypothesis import given
from hypothesis import strategies as st

from Zorp.zones.prefix_table import mask_of, nested, prefix_table


def nets_of(width):
    def masked(pair):
        return pair[0] & mask_of(pair[1], width), pair[1]

    anywhere = st.tuples(st.integers(0, (1 << width) - 1), st.integers(0, width)).map(masked)
    crowded = st.tuples(st.integers(0, 300), st.integers(width - 9, width)).map(masked)
    return st.dictionaries(anywhere | crowded, st.integers(1, 9), max_size=30)


def by_definition(nets, width, address):
    holding = [(bits, value) for (network, bits), value in nets.items() if address & mask_of(bits, width) == network]
    return max(holding)[1] if holding else None


def edges(nets, width):
    """Return the addresses at which an answer can change, and their neighbours."""
    for network, bits in nets:
        after = network + (1 << (width - bits))
        yield from (a for a in (network - 1, network, after - 1, after) if 0 <= a < 1 << width)


@given(st.data(), st.sampled_from([32, 128]))
def test_every_edge_of_every_net_is_looked_up_as_defined(data, width):
    nets = data.draw(nets_of(width))
    table = prefix_table(nets, width)
    probes = {0, (1 << width) - 1, *edges(nets, width), *data.draw(st.lists(st.integers(0, (1 << width) - 1)))}
    assert [table.lookup(a) for a in sorted(probes)] == [by_definition(nets, width, a) for a in sorted(probes)]


def test_a_table_without_nets_holds_no_address():
    assert prefix_table({}, 32).lookup(0) is None
    assert prefix_table({}, 128).lookup(1 << 127) is None


def test_the_whole_space_is_a_net():
    assert prefix_table({(0, 0): "internet"}, 32).lookup(0xFFFFFFFF) == "internet"


@given(nets_of(32))
def test_nesting_names_the_narrowest_net_around_each(nets):
    for (network, bits), outer in nested(nets, 32):
        around = [n for n in nets if n[1] < bits and network & mask_of(n[1], 32) == n[0]]
        assert outer == (max(around, key=lambda n: n[1]) if around else None)
