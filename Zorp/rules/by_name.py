"""Rules that restrict by host name what another rule lets pass.

Theory of operation
    A zone has the addresses that its host names are known to have; a name that was never looked
    up, does not exist, or has not been answered for longer than the grace (zone_dns_grace) has
    none.  What is permitted by such a name is not permitted then, which is safe.  What is refused
    by it, or kept for a proxy, is whatever the other rules say, and no program can do better: all
    addresses might be the name's, and whoever runs the name's servers could close the site by
    silence.  So each such rule is named when a policy is loaded or checked.

    A rule hangs on a name when it asks for a zone with host names, or for one above it, and a
    less strict rule may take the same packets if the address is outside.  Strict is a refusal,
    less so a proxy, least what is forwarded.  Where it cannot be told cheaply whether two rules
    meet, they do: a warning too many is better than a hole.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from Zorp.rules.description import ZoneData
from Zorp.rules.engine import RuleData

_PLAIN = ("proto", "proto_type", "proto_subtype")
_RANGES = ("src_port", "dst_port")
_FEW = 16                        # ports of a rule that are looked up one by one


class Strictness(enum.IntEnum):
    """What a service does with connections."""

    FORWARDED = 0                # by the packet filter alone
    PROXIED = 1
    REFUSED = 2


class Hanging(NamedTuple):
    """A rule that restricts by host name, and one that takes its packets while the name has no address."""

    rule: RuleData
    zone: str                    # the zone that names the host
    hostname: str
    broader: RuleData


def hanging_on_names(rules: Sequence[RuleData], strictness: Mapping[str, Strictness],
                     zones: Iterable[ZoneData]) -> Iterator[Hanging]:
    """Yield each rule that restricts by host name, once, with the first zone and rule that make it do so.

    strictness: of every service that a rule has.
    """
    known = _Zones(zones)
    outside = {side: _ByPort([rule for rule in rules if _may_hold_outside(rule, side, known)])
               for side in ("src", "dst")}
    for rule in rules:
        for side in ("src", "dst"):
            zone = known.named_below(getattr(rule, f"{side}_zone"))
            broader = next((other for other in outside[side].near(rule)
                            if strictness[other.service] < strictness[rule.service]
                            and _may_meet(rule, other, side, known)), None) if zone is not None else None
            if broader is not None:
                yield Hanging(rule, zone.name, zone.hostnames[0], broader)
                break


class _ByPort:
    """Rules by the destination ports that they ask for: thousands of rules mostly ask for a port each."""

    def __init__(self, rules: Sequence[RuleData]) -> None:
        self._all = rules
        self._of_port: dict[int, list[RuleData]] = {}
        self._of_many: list[RuleData] = []
        for rule in rules:
            ports = _few_ports(rule)
            for port in ports:
                self._of_port.setdefault(port, []).append(rule)
            if not ports:
                self._of_many.append(rule)

    def near(self, rule: RuleData) -> Iterator[RuleData]:
        """Yield at least those that have a port in common with `rule`, or ask for none."""
        ports = _few_ports(rule)
        if not ports:
            return iter(self._all)
        return itertools.chain(self._of_many, *(self._of_port.get(port, ()) for port in ports))


def _few_ports(rule: RuleData) -> list[int]:
    """Return the destination ports of a rule, nothing when they are all or many."""
    if sum(last - first + 1 for first, last in rule.dst_port) > _FEW:
        return []
    return [port for first, last in rule.dst_port for port in range(first, last + 1)]


class _Zones:
    """What rules can mean by zones."""

    def __init__(self, zones: Iterable[ZoneData]) -> None:
        self._zones = {zone.name: zone for zone in zones}
        self._below: dict[str, list[ZoneData]] = {name: [] for name in self._zones}
        for zone in self._zones.values():
            above: str | None = zone.name
            while above is not None:
                self._below[above].append(zone)
                above = self._zones[above].parent

    def named_below(self, names: Iterable[str]) -> ZoneData | None:
        """Return a zone with host names that is among these or below them."""
        return next((zone for name in names for zone in self._below[name] if zone.hostnames), None)

    def have_nets(self, names: Iterable[str]) -> bool:
        """Return whether an address can be in these zones without having a name."""
        return any(zone.nets for name in names for zone in self._below[name])

    def have_common(self, some: Iterable[str], others: Iterable[str]) -> bool:
        """Return whether an address can be in both."""
        first, second = ({zone.name for name in names for zone in self._below[name]} for names in (some, others))
        return not first.isdisjoint(second)


def _may_meet(rule: RuleData, other: RuleData, side: str, zones: _Zones) -> bool:
    """Return whether packets that a rule is meant for may be taken by one that holds outside, while a name is unknown.

    side: where the name stands.
    """
    for dimension in _PLAIN:
        mine, others = getattr(rule, dimension), getattr(other, dimension)
        if mine and others and not set(mine) & set(others):
            return False
    for dimension in _RANGES:
        mine, others = getattr(rule, dimension), getattr(other, dimension)
        if mine and others and not any(low <= last and first <= high for low, high in mine for first, last in others):
            return False
    opposite = "dst" if side == "src" else "src"
    mine, others = getattr(rule, f"{opposite}_zone"), getattr(other, f"{opposite}_zone")
    has_more = any(getattr(one, dimension) for one in (rule, other)
                   for dimension in (f"{opposite}_subnet", "dst_iface", "dst_ifgroup")
                   if opposite == "dst" or not dimension.startswith("dst_i"))
    return has_more or not (mine and others) or zones.have_common(mine, others)


def _may_hold_outside(rule: RuleData, side: str, zones: _Zones) -> bool:
    """Return whether the conditions of a rule on one side can hold for an address that no host name has."""
    asked = getattr(rule, f"{side}_zone")
    others = getattr(rule, f"{side}_subnet") or (side == "dst" and (rule.dst_iface or rule.dst_ifgroup))
    return bool(others) or not asked or zones.have_nets(asked)
