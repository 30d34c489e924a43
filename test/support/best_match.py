"""The rule language by its definition: score every rule in every component, take the best.

Slow and obvious on purpose: the compiled evaluation is compared with this.
"""

from __future__ import annotations

import ipaddress
import socket

from Zorp.rules.engine import NetData, RuleData, Traffic


def subnet(text: str) -> NetData:
    net = ipaddress.ip_network(text)
    return NetData(socket.AF_INET if net.version == 4 else socket.AF_INET6, int(net.network_address), net.prefixlen)


def traffic(src: str, dst: str, **values) -> Traffic:
    a, b = ipaddress.ip_address(src), ipaddress.ip_address(dst)
    return Traffic(socket.AF_INET if a.version == 4 else socket.AF_INET6, int(a), int(b), **values)


def path_to_root(zone, parents):
    while zone is not None:
        yield zone
        zone = parents.get(zone)


def depth(zone, parents):
    return len(list(path_to_root(zone, parents)))


def incoming_score(rule, packet):
    if not (rule.reqid or rule.iface or rule.ifgroup):
        return 0
    score = 4 * any(reqid in rule.reqid for reqid in packet.reqids)
    score += 2 * (packet.iface in rule.iface) + (packet.ifgroup in rule.ifgroup)
    return score or None


def value_score(listed, value):
    if not listed:
        return 0
    return 1 if value in listed else None


def port_score(ranges, port):
    if not ranges:
        return 0
    return max((2 if low == high else 1 for low, high in ranges if low <= port <= high), default=None)


def subnet_score(subnets, family, address):
    width = 32 if family == socket.AF_INET else 128
    own_family = [net for net in subnets if net.family == family]
    return max((net.bits + 1 for net in own_family
                if net.network >> (width - net.bits) == address >> (width - net.bits)), default=0)


def zone_score(zones, zone, parents):
    return max((depth(name, parents) for name in path_to_root(zone, parents) if name in zones), default=0)


def address_score(rule, packet, parents, side):
    subnets, zones = getattr(rule, f"{side}_subnet"), getattr(rule, f"{side}_zone")
    names, groups = (rule.dst_iface, rule.dst_ifgroup) if side == "dst" else ((), ())
    if not (subnets or zones or names or groups):
        return 0
    score = (128 if side == "dst" else 32) * subnet_score(subnets, packet.family, getattr(packet, side))
    score += zone_score(zones, getattr(packet, f"{side}_zone"), parents)
    if packet.dst_on_iface:
        score += 32 * (2 * (packet.iface in names) + (packet.ifgroup in groups))
    return score or None


def scores(rule: RuleData, packet: Traffic, parents):
    """Return the eight scores of a rule, or None when it does not match."""
    parts = (
        incoming_score(rule, packet),
        value_score(rule.proto, packet.proto),
        value_score(rule.proto_type, packet.proto_type),
        value_score(rule.proto_subtype, packet.proto_subtype),
        port_score(rule.src_port, packet.src_port),
        port_score(rule.dst_port, packet.dst_port),
        address_score(rule, packet, parents, "src"),
        address_score(rule, packet, parents, "dst"),
    )
    return None if None in parts else parts


def ranking(rules, packet: Traffic, parents):
    """Return (scores, rule) of all rules that match, winner first."""
    matching = [(scores(rule, packet, parents), rule) for rule in rules]
    matching = [(tuple(score), rule) for score, rule in matching if score is not None]
    return sorted(matching, key=lambda entry: ([-part for part in entry[0]], entry[1].rule_id))


def best(rules, packet: Traffic, parents):
    ranked = ranking(rules, packet, parents)
    return ranked[0][1] if ranked else None
