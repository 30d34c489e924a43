"""What happens to a connection: the rules of all instances of a host together.

Every instance finds its own best rule (Zorp.rules.engine).  Between instances the order is that of
the packet filter: the better match, then the lower rule id, then the instance that stands first.

Where the zones of an address are disputed (Zorp.zones.table), what matches best with any of them
counts, and refuses unless its instance finds the same with all of them.

One thread only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from Zorp.netfilter.instance_zones import InstanceZones
from Zorp.rules.description import InstanceDescription
from Zorp.rules.engine import RuleEngine, Traffic


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rules say; None for what there is not."""

    client_zone: str | None
    server_zone: str | None
    instance: str | None = None
    service: str | None = None
    rule_id: int | None = None
    disputed: bool = False           # nothing may pass: zones that dispute an address do not agree


class Evaluator:
    """The instances of a host, given in upload order with their zones."""

    def __init__(self, instances: Sequence[tuple[InstanceDescription, InstanceZones]]) -> None:
        self._parts = [(number, description, zones, RuleEngine(description.rules, description.parents()))
                       for number, (description, zones) in enumerate(instances)]

    def evaluate(self, traffic: Traffic,
                 zones_in: Mapping[str, tuple[str | None, str | None]] | None = None) -> Verdict:
        """Return what a connection gets; the zones in `traffic` are not looked at.

        zones_in: instances to the zones of both sides there, None for what the addresses say.
        """
        found: Verdict | None = None
        best: list | None = None
        for number, description, zones, engine in self._parts:
            given = (zones_in or {}).get(description.instance, (None, None))
            here = (given[0] or zones.zone_of(traffic.family, traffic.src),
                    given[1] or zones.zone_of(traffic.family, traffic.dst))
            ranked, is_agreed = engine.agreed(traffic, *(
                (now,) if supposed else (now, *zones.claimants(traffic.family, address))
                for now, supposed, address in zip(here, given, (traffic.src, traffic.dst), strict=True)))
            if ranked is None:
                continue
            scores, rule = ranked
            key = [*(-score for score in scores), rule.rule_id, number]
            if best is None or key < best:
                best = key
                found = (Verdict(*here, description.instance, rule.service, rule.rule_id) if is_agreed
                         else Verdict(*here, disputed=True))
        if found is not None:
            return found
        supposed = (zones_in or {}).values()
        return Verdict(*(
            next((zones[end] for zones in supposed if zones[end]), None) or self.zone_of(traffic.family, address)
            for end, address in enumerate((traffic.src, traffic.dst))))

    def zone_of(self, family: int, address: int) -> str | None:
        """Return the name of the zone with the narrowest net around an address; of equals the first instance's."""
        known = [zones for _, _, zones, _ in self._parts if zones.zone_of(family, address)]
        if not known:
            return None
        narrowest = known[0] if len(known) == 1 else max(known, key=lambda zones: zones.prefix_length(family, address))
        return narrowest.zone_of(family, address)

    def claimants(self, family: int, address: int) -> tuple[str, ...]:
        """Return the names of the zones that dispute an address in the first instance with any; nearly always ()."""
        return next((names for _, _, zones, _ in self._parts if (names := zones.claimants(family, address))), ())
