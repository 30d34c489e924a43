"""The zones of a described instance: which zone an address is in, host names included.

The conflict rules between static nets and host names are those of Zorp.zones.table, which the
daemons use too, so packet rules and daemons agree.  One thread only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from Zorp.rules.description import InstanceDescription, ZoneData
from Zorp.rules.engine import NetData
from Zorp.SockAddr import from_ip_int
from Zorp.zones.table import ZoneTable


@dataclasses.dataclass(frozen=True, slots=True)
class _Named:
    """A zone as ZoneTable wants it."""

    name: str

    def getName(self) -> str:
        return self.name


Zoned = tuple[InstanceDescription, "InstanceZones"]


def zoned(descriptions: Iterable[InstanceDescription], addresses: Mapping[str, Iterable[str]]) -> list[Zoned]:
    """Return descriptions with their zones, which have these addresses of host names."""
    instances = [(description, InstanceZones(description)) for description in descriptions]
    for _, zones in instances:
        zones.feed(addresses)
    return instances


def described(instances: Iterable[Zoned]) -> list[InstanceDescription]:
    """Return the descriptions with the present addresses of host names."""
    return [zones.described() for _, zones in instances]


class InstanceZones:
    """The zones of one description."""

    def __init__(self, description: InstanceDescription) -> None:
        self._description = description
        self._table = ZoneTable()
        for zone in description.zones:
            self._table.add(_Named(zone.name), zone.nets, map(_canonical, zone.hostnames))

    def hostnames(self) -> tuple[str, ...]:
        """Return the host names that zones have, in lower case and without a final dot."""
        return self._table.hostnames()

    def feed(self, answers: Mapping[str, Iterable[str]]) -> bool:
        """Take the addresses of host names, as texts; return whether any changed."""
        return bool(self._table.feed(answers))

    def zone_of(self, family: int, address: int) -> str | None:
        """Return the name of the zone of an address in host order; None: no zone has it."""
        zone = self._table.lookup(from_ip_int(family, address, 0))
        return zone.name if zone is not None else None

    def prefix_length(self, family: int, address: int) -> int:
        """Return how narrow the net is by which an address in host order has its zone; -1: it has none."""
        return self._table.prefix_length(from_ip_int(family, address, 0))

    def claimants(self, family: int, address: int) -> tuple[str, ...]:
        """Return the names of the zones whose host names dispute an address in host order; nearly always ()."""
        return tuple(zone.name for zone in self._table.claimants(from_ip_int(family, address, 0)))

    def described(self) -> InstanceDescription:
        """Return the description with the present addresses of host names: whose they are, and which are disputed."""
        resolved: dict[str, list[NetData]] = {}
        disputed: dict[str, list[NetData]] = {}
        for net, zone in self._table.resolved_nets().items():
            resolved.setdefault(zone.name, []).append(NetData(*map(int, net)))
        for net, zones in self._table.disputed_nets().items():
            for zone in zones:
                disputed.setdefault(zone.name, []).append(NetData(*map(int, net)))
        if not resolved and not disputed:
            return self._description
        return dataclasses.replace(self._description, zones=tuple(
            _with_addresses(zone, resolved.get(zone.name, []), disputed.get(zone.name, []))
            for zone in self._description.zones))


def _with_addresses(zone: ZoneData, resolved: list[NetData], disputed: list[NetData]) -> ZoneData:
    addresses = tuple(sorted(resolved))
    return dataclasses.replace(zone, nets=(*zone.nets, *addresses), addresses=addresses,
                               disputed=tuple(sorted(disputed)))


def _canonical(hostname: str) -> str:
    return hostname.rstrip(".").lower()
