"""What happens to a packet whose address host names of several zones share, by definition: slow and obvious."""

from __future__ import annotations

import ipaddress
import itertools

from test.support import best_match
from test.support.packet_model import CLOSED
from test.support.random_policies import Oracle


def by_definition(descriptions, answers, packet):
    """Return (instance, rule id), None or CLOSED: what all zones that addresses may be in agree upon.

    descriptions: with those addresses of host names that only one zone has.
    """
    found = []
    for order, description in enumerate(descriptions):
        sides = [_possible_zones(description, answers, packet.family, address) for address in (packet.src, packet.dst)]
        winners = [_winner(description, order, packet._replace(src_zone=src, dst_zone=dst))
                   for src, dst in itertools.product(*sides)]
        if any(winners):
            best = min(filter(None, winners))
            found.append((best, all(one == best for one in winners)))
    if not found:
        return None
    (_, rule_id, _, instance), is_agreed = min(found)
    return (instance, rule_id) if is_agreed else CLOSED


def _possible_zones(description, answers, family, address):
    """Return the zone that has an address, and those whose names share it with another zone."""
    text = str(ipaddress.IPv4Address(address) if family == 2 else ipaddress.IPv6Address(address))
    named = [zone.name for zone in description.zones if any(text in answers[name] for name in zone.hostnames)]
    is_static = any(net[1:] == (address, 32 if family == 2 else 128) and net.family == family
                    for zone in description.zones for net in zone.nets if net not in zone.addresses)
    return [Oracle._zone(description, family, address), *(named if len(named) > 1 and not is_static else ())]


def _winner(description, order, packet):
    ranked = best_match.ranking(description.rules, packet, description.parents())
    if not ranked:
        return ()
    scores, rule = ranked[0]
    return tuple(-score for score in scores), rule.rule_id, order, description.instance
