"""Why a rule lost: in words, for whoever asks zorp --explain.

lost_by() compares two rules that both match, by the scores of Zorp.rules.engine; unmet() says
which conditions of a rule a packet does not meet.  Both look at one rule at a time and know the
meaning of the dimensions, not how the engine finds the winner.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator, Mapping

from Zorp.rules.engine import NetData, RuleData, Traffic

COMPONENTS = ("incoming interface", "protocol", "ICMP type", "ICMP code", "source port", "destination port",
              "source address", "destination address")
_CONDITIONS = (("reqid", "iface", "ifgroup"), ("proto",), ("proto_type",), ("proto_subtype",), ("src_port",),
               ("dst_port",), ("src_subnet", "src_zone"), ("dst_subnet", "dst_iface", "dst_ifgroup", "dst_zone"))


def lost_by(winner: tuple[int, ...], loser: tuple[int, ...]) -> str | None:
    """Return the first component in which the winner's scores are better; None: all are equal, the lower id won."""
    return next((name for name, best, other in zip(COMPONENTS, winner, loser, strict=True) if best != other), None)


def conditions(rule: RuleData, component: str) -> str:
    """Return what a rule asks for in a component, "anything" when it asks for nothing."""
    names = _CONDITIONS[COMPONENTS.index(component)]
    return " or ".join(f"{name}={_shown(name, getattr(rule, name))}" for name in names
                       if getattr(rule, name)) or "anything"


def unmet(rule: RuleData, traffic: Traffic, parents: Mapping[str, str | None]) -> list[str]:
    """Return what keeps the rule from matching, a text per component; empty: it matches."""
    met = _met(traffic, parents)
    problems = []
    for component, names in zip(COMPONENTS, _CONDITIONS, strict=True):
        asked = [name for name in names if getattr(rule, name)]
        if asked and not any(met[name](value) for name in asked for value in getattr(rule, name)):
            problems.append(f"{component}: {conditions(rule, component)}, the connection has "
                            f"{_has(component, traffic)}")
    return problems


def _met(traffic: Traffic, parents: Mapping[str, str | None]) -> dict[str, Callable[[object], bool]]:
    src_zones, dst_zones = set(_upwards(traffic.src_zone, parents)), set(_upwards(traffic.dst_zone, parents))
    return {
        "reqid": lambda value: value in traffic.reqids, "iface": lambda value: value == traffic.iface,
        "ifgroup": lambda value: value == traffic.ifgroup, "proto": lambda value: value == traffic.proto,
        "proto_type": lambda value: value == traffic.proto_type,
        "proto_subtype": lambda value: value == traffic.proto_subtype,
        "src_port": lambda value: value[0] <= traffic.src_port <= value[1],
        "dst_port": lambda value: value[0] <= traffic.dst_port <= value[1],
        "src_subnet": lambda net: _holds(net, traffic.family, traffic.src),
        "dst_subnet": lambda net: _holds(net, traffic.family, traffic.dst),
        "src_zone": lambda zone: zone in src_zones, "dst_zone": lambda zone: zone in dst_zones,
        "dst_iface": lambda value: traffic.dst_on_iface and value == traffic.iface,
        "dst_ifgroup": lambda value: traffic.dst_on_iface and value == traffic.ifgroup,
    }


def _upwards(zone: str | None, parents: Mapping[str, str | None]) -> Iterator[str]:
    while zone is not None:
        yield zone
        zone = parents.get(zone)


def _holds(net: NetData, family: int, address: int) -> bool:
    shift = (32 if net.family == socket.AF_INET else 128) - net.bits
    return net.family == family and address >> shift == net.network >> shift


def _has(component: str, traffic: Traffic) -> str:
    def address(value: int, zone: str | None) -> str:
        width = 4 if traffic.family == socket.AF_INET else 16
        text = socket.inet_ntop(traffic.family, value.to_bytes(width, "big"))
        return f"{text} in zone {zone}" if zone is not None else f"{text} in no zone"

    return {
        "incoming interface": traffic.iface or "an unknown one", "protocol": str(traffic.proto),
        "ICMP type": str(traffic.proto_type), "ICMP code": str(traffic.proto_subtype),
        "source port": str(traffic.src_port), "destination port": str(traffic.dst_port),
        "source address": address(traffic.src, traffic.src_zone),
        "destination address": address(traffic.dst, traffic.dst_zone),
    }[component]


def _shown(name: str, values: Iterable) -> str:
    if name.endswith("_port"):
        return ",".join(str(low) if low == high else f"{low}:{high}" for low, high in values)
    return ",".join(map(str, values))
