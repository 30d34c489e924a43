"""What `kzorp` prints of zones, services, rules and listeners: the lines of the original.

Everything is made of descriptions and of counters by (kind, instance, name); nothing is asked
here.  The same zone in several instances is printed once.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from Zorp.rules.description import (
    DenyData,
    ForwardData,
    InstanceDescription,
    NatData,
    ServiceData,
    ZoneData,
)
from Zorp.rules.engine import NetData, RuleData

ZONE, SERVICE, RULE = "zone", "service", "rule"
Counters = Mapping[tuple[str, str, str], int]        # (kind, instance, name or rule id); zones have no instance

_DENY_IPV4 = {
    "DROP": "Drop", "TCP_RESET": "TCP reset", "ICMP_NET_UNREACHABLE": "Network unreachable",
    "ICMP_HOST_UNREACHABLE": "Host unreachable", "ICMP_PROTO_UNREACHABLE": "Proto unreachable",
    "ICMP_PORT_UNREACHABLE": "Port unreachable", "ICMP_NET_PROHIBITED": "Network prohibited",
    "ICMP_HOST_PROHIBITED": "Host prohibited", "ICMP_ADMIN_PROHIBITED": "Administratively prohibited",
}
_DENY_IPV6 = {
    "DROP": "Drop", "TCP_RESET": "TCP reset", "ICMP_NO_ROUTE": "No route",
    "ICMP_ADMIN_PROHIBITED": "Administratively prohibited", "ICMP_ADDR_UNREACHABLE": "Address unreachable",
    "ICMP_PORT_UNREACHABLE": "Port unreachable",
}
_PROTOCOLS = {1: "ICMP", 6: "TCP", 17: "UDP"}
_DIMENSIONS = {                                       # in the order of the original: name printed -> our name
    "reqid": "reqid", "src_iface": "iface", "src_ifgroup": "ifgroup", "proto": "proto", "proto_type": "proto_type",
    "proto_subtype": "proto_subtype", "src_port": "src_port", "dst_port": "dst_port", "src_subnet": "src_subnet",
    "src_zone": "src_zone", "dst_subnet": "dst_subnet", "dst_iface": "dst_iface", "dst_ifgroup": "dst_ifgroup",
    "dst_zone": "dst_zone",
}


@dataclass(frozen=True)
class HostState:
    """What there is to show."""

    instances: tuple[InstanceDescription, ...] = ()   # in upload order, host names not resolved
    counters: Counters = field(default_factory=dict)
    addresses: Mapping[str, list[str]] = field(default_factory=dict)     # of host names

    def zones(self) -> list[ZoneData]:
        """Return the zones of all instances, equal ones once."""
        return list(dict.fromkeys(zone for instance in self.instances for zone in instance.zones))

    def count(self, kind: str, instance: str, name: object) -> int:
        return self.counters.get((kind, instance, str(name)), 0)


# ---------------------------------------------------------------------------- values

def zone_value(zone: ZoneData, state: HostState) -> dict:
    return {"name": zone.name, "admin_parent": zone.parent, "count": state.count(ZONE, "", zone.name),
            "ranges": [range_text(net) for net in zone.nets], "hostnames": list(zone.hostnames),
            "disputed": [range_text(net) for net in zone.disputed]}


def service_value(instance: str, service: ServiceData, state: HostState) -> dict:
    value = {"name": service.name, "instance": instance, "flags": _flags(service), "type": "Service",
             "count": state.count(SERVICE, instance, service.name)}
    if isinstance(service, ForwardData):
        value["type"] = "PFService"
        value["router_dst"] = None if service.router is None else _endpoint(*service.router)
        value["snat"], value["dnat"] = ([nat_text(entry) for entry in entries]
                                        for entries in (service.snat, service.dnat))
    elif isinstance(service, DenyData):
        value.update(type="DenyService", deny_ipv4=_DENY_IPV4[service.ipv4], deny_ipv6=_DENY_IPV6[service.ipv6])
    return value


def _flags(service: ServiceData) -> list[str]:
    if isinstance(service, ForwardData):
        return [*(["transparent"] if service.router is None else []), *(["forge_addr"] if service.forge_addr else []),
                "logging"]
    return ["logging"] if not isinstance(service, DenyData) or service.logging else []


def rule_value(instance: str, rule: RuleData, state: HostState) -> dict:
    return {"rule_id": rule.rule_id, "service": rule.service, "count": state.count(RULE, instance, rule.rule_id),
            **{shown: list(map(_dimension_value, [ours] * len(values), values))
               for shown, ours in _DIMENSIONS.items() if (values := getattr(rule, ours))}}


def _dimension_value(dimension: str, value: object) -> object:
    if dimension == "proto":
        return _PROTOCOLS.get(value, str(value))
    return _address_and_mask(value) if isinstance(value, NetData) else value


def bind_values(instance: InstanceDescription) -> list[dict]:
    return [{"instance": instance.instance, "protocol": listener.protocol, "address": listener.address,
             "port": listener.port} for listener in instance.listeners]


def _endpoint(address: str, port: int) -> str:
    return f"{address}:{port}"


def _address_and_mask(net: NetData) -> tuple[str, str]:
    width = 32 if net.family == socket.AF_INET else 128
    mask = ((1 << net.bits) - 1) << (width - net.bits)
    return _address(net.family, net.network), _address(net.family, mask)


def _address(family: int, value: int) -> str:
    return socket.inet_ntop(family, value.to_bytes(4 if family == socket.AF_INET else 16, "big"))


def range_text(net: NetData) -> str:
    """Return address/netmask."""
    return "/".join(_address_and_mask(net))


def nat_text(entry: NatData) -> str:
    """Return a NAT entry; a destination that is everything is left out."""
    destination = f" dst {_span(entry.destination)}" if entry.destination.bits else ""
    return f"src {_span(entry.source)}{destination} mapped to {_span(entry.translated)}"


def _span(net: NetData) -> str:
    width = 32 if net.family == socket.AF_INET else 128
    last = net.network + (1 << (width - net.bits)) - 1
    first = _address(net.family, net.network)
    return first if last == net.network else f"({first} - {_address(net.family, last)})"


# ---------------------------------------------------------------------------- lines

def zone_line(value: dict) -> str:
    return f"Zone name='{value['name']}', admin_parent='{value['admin_parent']}' count='{value['count']}'"


def zone_lines(values: Iterable[dict]) -> Iterator[str]:
    for value in values:
        yield zone_line(value)
        yield from (f"        range '{text}'" for text in value["ranges"])
        yield from (f"        disputed '{text}'" for text in value["disputed"])


def service_lines(values: Iterable[dict]) -> Iterator[str]:
    for value in values:
        yield (f"Service name='{value['name']}', flags='{','.join(value['flags'])}', type='{value['type']}', "
               f"count='{value['count']}'")
        if value.get("router_dst") is not None:
            yield f"        router_dst='{value['router_dst']}'"
        for side in ("snat", "dnat"):
            yield from (f"        {side.upper()}:  {text}" for text in value.get(side, ()))
        if "deny_ipv4" in value:
            yield f"        deny_ipv4='{value['deny_ipv4']}'"
            yield f"        deny_ipv6='{value['deny_ipv6']}'"


def dispatcher_lines(values: Iterable[dict]) -> Iterator[str]:
    for value in values:
        yield f"Dispatcher name='{value['name']}'"
        yield f"        num_rules='{len(value['rules'])}'"
        yield ""
        for rule in value["rules"]:
            yield f"        rule_id='{rule['rule_id']}', service='{rule['service']}', count='{rule['count']}'"
            yield from (f"           {name}={rule[name]!r}" for name in _DIMENSIONS if name in rule)
            yield ""


def bind_lines(values: Iterable[dict]) -> Iterator[str]:
    for value in values:
        yield (f"Bind instance='{value['instance']}' protocol='{value['protocol']}', address='{value['address']}', "
               f"port='{value['port']}'")


def parse_address(text: str) -> tuple[int, int]:
    """Return (family, host order integer) of an address; raises ValueError."""
    address = ipaddress.ip_address(text)
    return int(socket.AF_INET if address.version == 4 else socket.AF_INET6), int(address)
