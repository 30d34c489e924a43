"""Rules that are meant to deny, and lose where they look narrower: the hole that nobody sees.

    Rule(src_zone="office", dst_port=22, service="ssh")
    Rule(src_zone="office.guests", service="no_guests")

The second one names fewer clients, yet guests reach ssh: the port is compared before the source.

Theory of operation
    Packets are made from what rules name: a port of each range, the first address of each net,
    an address of each zone.  For each denying rule and each permitting one that may meet it,
    the engine itself judges the packets that both match.  A hole is a packet that a permitting
    rule wins while the denying rule is narrower in a component that is compared later.  What is
    reported is therefore always true of a real packet: where a further rule closes the hole,
    or where an exception is narrower in all that it says, nothing is reported.

    Two kinds of denying rules are not narrower, because they mean "everybody else": nets of
    length 0, and zones that have such a net.

    It is sound and not complete: of each component a few packets are tried, each denying rule
    is reported once, and the work is bounded.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from Zorp.rules.engine import PORTS, NetData, RuleData, RuleEngine, Traffic
from Zorp.rules.explanation import COMPONENTS

_MOST_PAIRS = 100_000            # of rules that are compared by what they say
_MOST_PACKETS = 4_000            # that the engine is asked about
_MOST_VALUES = 8                 # of one component, in packets for one pair of rules
_INCOMING, _SOURCE, _DESTINATION = 0, COMPONENTS.index("source address"), COMPONENTS.index("destination address")
_PORT_COMPONENTS = (COMPONENTS.index("source port"), COMPONENTS.index("destination port"))
_PLAIN = ("proto", "proto_type", "proto_subtype")
_SOMEWHERE = NetData(socket.AF_INET, 0xC0000201, 32)    # an address where rules name none: 192.0.2.1
_UNPRIVILEGED = 1024


@dataclass(frozen=True)
class ZoneFacts:
    """What must be known of zones to make packets."""

    parents: Mapping[str, str | None]
    nets: Mapping[str, Sequence[NetData]]
    zone_at: Callable[[int, int], str | None]            # (family, address) -> name


class Hole(NamedTuple):
    """A packet of a denying rule that a permitting one gets."""

    denial: RuleData
    winner: RuleData
    decided_by: str                      # the component in which the winner says more
    narrower_in: str                     # the component in which the denying rule does


def holes(engine: RuleEngine, denying: Collection[str], zones: ZoneFacts) -> Iterator[Hole]:
    """Yield at most one Hole per rule whose service is in `denying`."""
    denials = [rule for rule in engine.rules if rule.service in denying and not rule.reqid]
    permits = [rule for rule in engine.rules if rule.service not in denying and not rule.reqid]
    budget = itertools.count(1)
    for denial in denials[:_MOST_PAIRS // max(1, len(permits))]:
        for permit in permits:
            if not _may_meet(denial, permit, zones.parents):
                continue
            packets = itertools.takewhile(lambda _: next(budget) <= _MOST_PACKETS, _packets(denial, permit, zones))
            found = next((hole for packet in packets if (hole := _hole(engine, denying, denial, packet, zones))), None)
            if found is not None:
                yield found
                break


def _hole(engine: RuleEngine, denying: Collection[str], denial: RuleData, packet: Traffic,
          zones: ZoneFacts) -> Hole | None:
    ranking = engine.ranking(packet)
    if not ranking or ranking[0][1].service in denying:
        return None
    best, winner = ranking[0]
    scores = next((scores for scores, rule in ranking if rule is denial), None)
    if scores is None or scores == best:
        return None
    wide = _everybody(denial, zones)
    decided = next(number for number, (mine, other) in enumerate(zip(scores, best, strict=True)) if mine != other)
    for number in range(decided + 1, len(COMPONENTS)):
        if scores[number] > best[number] and number not in wide and _is_narrower(number, denial, winner, zones):
            return Hole(denial, winner, COMPONENTS[decided], COMPONENTS[number])
    return None


def _is_narrower(component: int, denial: RuleData, winner: RuleData, zones: ZoneFacts) -> bool:
    """Say whether a better score means fewer packets: any net beats every zone, however large it is."""
    if component not in (_SOURCE, _DESTINATION):
        return True
    side = "src" if component == _SOURCE else "dst"
    nets, winning_zones = getattr(denial, f"{side}_subnet"), getattr(winner, f"{side}_zone")
    if not nets or not winning_zones or getattr(winner, f"{side}_subnet"):
        return True
    around = [net for zone in winning_zones for net in zones.nets.get(zone, ())]
    return all(any(_holds(outer, net) for outer in around) for net in nets)


def _holds(outer: NetData, inner: NetData) -> bool:
    shift = (32 if outer.family == socket.AF_INET else 128) - outer.bits
    return (outer.family == inner.family and outer.bits < inner.bits
            and outer.network >> shift == inner.network >> shift)


def _everybody(rule: RuleData, zones: ZoneFacts) -> set[int]:
    """Return the components in which the rule names all that there is, or all that nobody else names."""
    wide = set()
    for component, side in ((_SOURCE, "src"), (_DESTINATION, "dst")):
        nets = [*getattr(rule, f"{side}_subnet"),
                *(net for zone in getattr(rule, f"{side}_zone") for net in zones.nets.get(zone, ()))]
        if any(net.bits == 0 for net in nets):
            wide.add(component)
    for component, ranges in zip(_PORT_COMPONENTS, (rule.src_port, rule.dst_port), strict=True):
        if any(low <= 1 and high == PORTS - 1 for low, high in ranges):
            wide.add(component)
    return wide


# ---------------------------------------------------------------------------- packets of two rules

def _may_meet(one: RuleData, other: RuleData, parents: Mapping[str, str | None]) -> bool:
    """Say, quickly, whether some packet may match both."""
    for name in (*_PLAIN, "iface"):
        mine, others = getattr(one, name), getattr(other, name)
        if mine and others and not set(mine) & set(others):
            return False
    for name in ("src_port", "dst_port"):
        mine, others = getattr(one, name), getattr(other, name)
        if mine and others and not any(_common(mine, others)):
            return False
    return _zones_meet(one.src_zone, other.src_zone, one.src_subnet or other.src_subnet, parents) and _zones_meet(
        one.dst_zone, other.dst_zone, one.dst_subnet or other.dst_subnet or one.dst_iface or other.dst_iface
        or one.dst_ifgroup or other.dst_ifgroup, parents)


def _common(mine: Iterable[tuple[int, int]], others: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    return ((max(low, low2), min(high, high2)) for low, high in mine for low2, high2 in others
            if low <= high2 and low2 <= high)


def _zones_meet(mine: Sequence[str], others: Sequence[str], has_alternatives, parents) -> bool:
    if not mine or not others or has_alternatives:
        return True
    return any(inner in _upwards(outer, parents) or outer in _upwards(inner, parents)
               for inner in mine for outer in others)


def _upwards(zone: str | None, parents: Mapping[str, str | None]) -> Iterator[str]:
    while zone is not None:
        yield zone
        zone = parents.get(zone)


def _packets(denial: RuleData, permit: RuleData, zones: ZoneFacts) -> Iterator[Traffic]:
    """Yield packets that may match both rules; the engine says whether they do."""
    pair = denial, permit
    incoming = _incoming(denial, permit)
    plain = [_values(getattr(denial, name), getattr(permit, name), usual)
             for name, usual in zip(_PLAIN, (socket.IPPROTO_TCP, -1, -1), strict=True)]
    ports = [_ports(getattr(denial, name), getattr(permit, name)) for name in ("src_port", "dst_port")]
    sources, destinations = (list(_places(pair, side, zones)) for side in ("src", "dst"))
    for (iface, ifgroup), proto, kind, code, src_port, dst_port, src, dst in itertools.product(
            incoming, *plain, *ports, sources, destinations):
        if src[0] == dst[0]:
            yield Traffic(src[0], src[1], dst[1], proto, src_port, dst_port, kind, code, iface, ifgroup,
                          src_zone=src[2], dst_zone=dst[2])


def _incoming(denial: RuleData, permit: RuleData) -> list[tuple[str | None, int | None]]:
    """Return (name, group) of interfaces; which name has which group is not known, so one of both only."""
    names = [(name, None) for name in _values(denial.iface, permit.iface, None) if name is not None]
    groups = [(None, group) for group in _values(denial.ifgroup, permit.ifgroup, None) if group is not None]
    return [*names, *groups] or [(None, None)]


def _values(mine: Sequence, others: Sequence, usual) -> list:
    if mine and others:
        return [value for value in mine if value in others][:_MOST_VALUES]
    return list(mine or others or (usual,))[:_MOST_VALUES]


def _ports(mine: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]]) -> list[int]:
    ranges = _common(mine, others) if mine and others else mine or others or ((_UNPRIVILEGED, _UNPRIVILEGED),)
    edges = itertools.chain.from_iterable(ranges)
    return list(dict.fromkeys(edges))[:_MOST_VALUES]


def _places(pair: Sequence[RuleData], side: str, zones: ZoneFacts) -> Iterator[tuple[int, int, str | None]]:
    """Yield (family, address, its zone) for what the rules name, narrow nets first."""
    nets = [net for rule in pair for net in getattr(rule, f"{side}_subnet")]
    named = {zone for rule in pair for zone in getattr(rule, f"{side}_zone")}
    chosen = sorted(nets, key=lambda net: -net.bits)[:_MOST_VALUES]
    for zone in sorted(named, key=lambda zone: -len(list(_upwards(zone, zones.parents))))[:_MOST_VALUES]:
        chosen += [net for net in zones.nets.get(zone, ()) if zones.zone_at(net.family, net.network) == zone][:2]
    if not nets and not named:
        chosen = [_SOMEWHERE, NetData(socket.AF_INET6, 0x2001_0DB8 << 96 | 1, 128)]
    for net in chosen:
        yield net.family, net.network, zones.zone_at(net.family, net.network)
