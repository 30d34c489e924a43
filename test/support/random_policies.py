"""Random zones, rules and packets that have something to do with each other; the same seed gives the same ones."""

from __future__ import annotations

import dataclasses
import random
import socket

from Zorp.rules.description import (
    DenyData,
    ForwardData,
    InstanceDescription,
    ListenerData,
    ProxyData,
    ZoneData,
)
from Zorp.rules.engine import NetData, RuleData, RuleEngine, Traffic

_WIDTH = {socket.AF_INET: 32, socket.AF_INET6: 128}
_BASES = {socket.AF_INET: 10 << 24, socket.AF_INET6: 0x20010DB8 << 96}
_LENGTHS = {socket.AF_INET: (0, 1, 8, 16, 17, 24, 25, 26, 30, 32), socket.AF_INET6: (0, 1, 32, 48, 49, 64, 127, 128)}
_IFACES = ("eth0", "eth1", "eth2", "dmz")
_PORTS = (0, 21, 25, 80, 443, 8080, 65_535)


class Generator:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.groups = {iface: self.random.randrange(3) for iface in _IFACES}
        self._hosts: list[NetData] = []                  # addresses that host names have

    # ---- policies

    def instances(self) -> list[InstanceDescription]:
        zones = self.zones()
        result = []
        for number in range(self.random.choice((1, 1, 2, 3))):
            own = zones if self.random.random() < 0.7 else self.zones()
            result.append(self.instance(f"i{number}", own, self.random.choice((1, 5, 20, 60))))
        return result

    def instance(self, name: str, zones, rules: int) -> InstanceDescription:
        return InstanceDescription(
            instance=name, zones=zones,
            services=(ProxyData(name="web"), ForwardData(name="fwd"), DenyData(name="no")),
            rules=tuple(self.rule(rule_id, zones) for rule_id in sorted(self.random.sample(range(1, 200), rules))),
            listeners=(ListenerData(6, "127.0.0.1", 50080), ListenerData(6, "::1", 50080)))

    def net(self, family=None) -> NetData:
        family = family or self.random.choice((socket.AF_INET, socket.AF_INET, socket.AF_INET6))
        bits = self.random.choice(_LENGTHS[family])
        shift = _WIDTH[family] - bits
        return NetData(int(family), self.address(family) >> shift << shift, bits)

    def address(self, family) -> int:
        width = _WIDTH[family]
        if self.random.random() < 0.05:
            return self.random.getrandbits(width)
        low = sum(1 << bit for bit in (0, 1, 2, 6, 7, 8, 15, 16) if self.random.random() < 0.4)
        middle = (1 << (width // 2)) * self.random.choice((0, 0, 1))
        return _BASES[family] + low + (middle if family == socket.AF_INET6 else 0)

    def zones(self) -> tuple[ZoneData, ...]:
        zones: list[ZoneData] = []
        taken = set()
        for number in range(self.random.randrange(9)):
            nets = {self.net() for _ in range(self.random.randrange(4))} - taken
            taken |= nets
            parent = self.random.choice(zones).name if zones and self.random.random() < 0.6 else None
            zones.append(ZoneData(name=f"z{number}", parent=parent, nets=tuple(sorted(nets))))
        return tuple(zones)

    def named_instances(self) -> tuple[list[InstanceDescription], dict[str, list[str]]]:
        """Return instances() with host names in some zones, and the addresses of the names, which share many."""
        answers: dict[str, list[str]] = {}
        return [self._with_names(description, answers) for description in self.instances()], answers

    def host_or(self, family, address: int) -> int:
        """Return the address of a host name, where there are any, or the one given."""
        known = [host.network for host in self._hosts if host.family == family]
        return self.random.choice(known) if known and self.random.random() < 0.6 else address

    def _with_names(self, description: InstanceDescription, answers: dict[str, list[str]]) -> InstanceDescription:
        pool = [NetData(int(family), _BASES[family] + self.random.getrandbits(9), _WIDTH[family])
                for family in (socket.AF_INET, socket.AF_INET, socket.AF_INET6) for _ in range(3)]
        self._hosts += pool
        zones = []
        for zone in description.zones:
            count = self.random.randrange(3)
            names = [f"{zone.name}-{number}.{description.instance}.test" for number in range(count)]
            zones.append(dataclasses.replace(zone, hostnames=tuple(names)))
            for name in names:
                answers[name] = [str(net).partition("/")[0] for net in self.random.sample(pool, 4)]
        return dataclasses.replace(description, zones=tuple(zones))

    def rule(self, rule_id: int, zones) -> RuleData:
        names = [zone.name for zone in zones]
        makers = {
            "reqid": (0.05, lambda: self.random.randrange(1, 3)),
            "iface": (0.15, lambda: self.random.choice(_IFACES)),
            "ifgroup": (0.1, lambda: self.random.randrange(3)),
            "proto": (0.3, lambda: self.random.choice((1, 6, 6, 17, 47, 58))),
            "proto_type": (0.1, lambda: self.random.choice((0, 8, 128))),
            "src_port": (0.1, self.ports),
            "dst_port": (0.6, self.ports),
            "src_subnet": (0.3, self.net),
            "src_zone": (0.3 if names else 0, lambda: self.random.choice(names)),
            "dst_subnet": (0.3, self.net),
            "dst_iface": (0.08, lambda: self.random.choice(_IFACES)),
            "dst_ifgroup": (0.08, lambda: self.random.randrange(3)),
            "dst_zone": (0.3 if names else 0, lambda: self.random.choice(names)),
        }
        chosen = {}
        for dimension, (likelihood, make) in makers.items():
            if self.random.random() < likelihood:
                chosen[dimension] = tuple(dict.fromkeys(make() for _ in range(self.random.choice((1, 1, 2, 4)))))
        if "proto_type" in chosen and self.random.random() < 0.5:
            chosen["proto_subtype"] = (0, self.random.randrange(1, 4))
        return RuleData(rule_id=rule_id, service=self.random.choice(("web", "fwd", "no")), **chosen)

    def ports(self) -> tuple[int, int]:
        low = self.random.choice(_PORTS)
        return (low, low) if self.random.random() < 0.6 else (low, min(65_535, low + self.random.randrange(9_000)))

    # ---- packets

    def packet(self) -> Traffic:
        family = self.random.choice((socket.AF_INET, socket.AF_INET, socket.AF_INET6))
        proto = self.random.choice((6, 6, 6, 17, 1 if family == socket.AF_INET else 58, 47, 1, 58))
        values: dict = {}
        if proto in (6, 17):
            values = {"src_port": self.port(), "dst_port": self.port()}
        elif proto == {socket.AF_INET: 1, socket.AF_INET6: 58}[family]:
            values = {"proto_type": self.random.choice((0, 3, 8, 128)), "proto_subtype": self.random.randrange(4)}
        iface = self.random.choice((*_IFACES, "other"))
        reqids = (self.random.randrange(1, 4),) if self.random.random() < 0.1 else ()
        ends = (self.host_or(family, self.address(family)) for _ in range(2))
        return Traffic(int(family), *ends, proto, iface=iface,
                       ifgroup=self.groups.get(iface, 9), reqids=reqids, dst_on_iface=self.random.random() < 0.2,
                       **values)

    def port(self) -> int:
        if self.random.random() < 0.3:
            return self.random.randrange(65_536)
        return min(65_535, max(0, self.random.choice(_PORTS) + self.random.choice((0, 0, 0, -1, 1))))


class Oracle:
    """Which rule of several instances wins, by the engine of the daemon."""

    def __init__(self, descriptions) -> None:
        self._instances = [(description, RuleEngine(description.rules, description.parents()))
                           for description in descriptions]

    def best(self, packet: Traffic):
        """Return (instance name, rule id) or None."""
        found = []
        for order, (description, engine) in enumerate(self._instances):
            zoned = packet._replace(src_zone=self._zone(description, packet.family, packet.src),
                                    dst_zone=self._zone(description, packet.family, packet.dst))
            winner = engine.best(zoned)
            if winner is not None:
                scores, ranked = engine.ranking(zoned)[0]
                assert ranked is winner
                found.append((tuple(-score for score in scores), winner.rule_id, order, description.instance))
        return (min(found)[3], min(found)[1]) if found else None

    @staticmethod
    def _zone(description, family, address):
        best_bits, best = -1, None
        for zone in description.zones:
            for net in zone.nets:
                shift = _WIDTH[family] - net.bits
                if net.family == family and net.bits > best_bits and net.network >> shift == address >> shift:
                    best_bits, best = net.bits, zone.name
        return best


def shuffled(description: InstanceDescription, seed: int) -> InstanceDescription:
    """Return the same description with its rules in another order."""
    rules = list(description.rules)
    random.Random(seed).shuffle(rules)
    return dataclasses.replace(description, rules=tuple(rules))
