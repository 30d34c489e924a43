"""Which rule wins: the best match over all dimensions, found without asking rule by rule.

Theory of operation
    A rule set is compiled once.  Every rule is one bit of Python integers used as sets
    ("bitmaps"); bits ascend with the rule id, so the lowest bit of a set is the lowest id.

    The rule language has eight components, in order of precedence: incoming interface,
    protocol, ICMP type, ICMP code, source port, destination port, source address, destination
    address.  For the value that a packet has in one component, Levels lists the rules that
    match, grouped by score, best first.  A packet's winner follows from its Levels alone:
    intersect the unions, then walk the components in order and keep of the candidates those of
    the best score that still has any; the lowest bit of what is left wins.  That is the tuple
    comparison of the rule language, done on all rules at once.

    Levels are made when a value is first seen and kept in bounded memos.  Their keys are not
    the packet's values but classes of values that the rules cannot tell apart (the narrowest
    net that rules name, the elementary port interval, ...), so a peer can fill no memo by
    varying its port or address.  Three groups of components have a memo each (front: the first
    six; source; destination), and a fourth holds the winner per triple of Levels.  A decision
    on known ground therefore costs the same whatever the number of rules.

    An address that host names of several zones dispute (Zorp.zones.table) may be in any of them.
    agreed() tells what wins for all of these zones: whoever can move a name to the address of
    another one could otherwise lift a refusal that hangs on a zone.

Guarantees
    An engine never changes after it is built, apart from its memos.  Any thread may ask.  No
    names are resolved, no policy object is touched, nothing is logged here.

Deviations from the original
    Overlapping port ranges: the best score counts, not the first range that fits.
    ICMP type or code without a protocol: always the order above (the original's early exit made
    the winner depend on the order of upload).
"""

from __future__ import annotations

import itertools
import socket
import threading
from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from Zorp.zones.prefix_table import nested, prefix_table

_MEMO_BYTES = 32 << 20           # what the bitmaps of one memo may take; older entries are forgotten beyond
_MOST_COMBINATIONS = 256         # of zones of both sides that agreed() tries
_MEMO_ENTRIES = 16_384           # bound of every memo, whatever the size of its entries
PORTS = 65_536


class NetData(NamedTuple):
    """One net of a rule, as data."""

    family: int                  # socket.AF_INET or AF_INET6
    network: int                 # host order, no host bits
    bits: int                    # prefix length

    def __str__(self) -> str:
        width = 4 if self.family == socket.AF_INET else 16
        return f"{socket.inet_ntop(self.family, self.network.to_bytes(width, 'big'))}/{self.bits}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleData:
    """A rule as plain data: what the packet-rule compiler and the evaluation read.

    An empty dimension is no restriction.  Zones are names; ports are inclusive ranges.
    """

    rule_id: int
    service: str
    reqid: tuple[int, ...] = ()
    iface: tuple[str, ...] = ()
    ifgroup: tuple[int, ...] = ()
    proto: tuple[int, ...] = ()
    proto_type: tuple[int, ...] = ()
    proto_subtype: tuple[int, ...] = ()
    src_port: tuple[tuple[int, int], ...] = ()
    dst_port: tuple[tuple[int, int], ...] = ()
    src_subnet: tuple[NetData, ...] = ()
    src_zone: tuple[str, ...] = ()
    dst_subnet: tuple[NetData, ...] = ()
    dst_iface: tuple[str, ...] = ()
    dst_ifgroup: tuple[int, ...] = ()
    dst_zone: tuple[str, ...] = ()


DIMENSIONS = tuple(name for name in RuleData.__dataclass_fields__ if name not in ("rule_id", "service"))


class Traffic(NamedTuple):
    """What the rules see of a connection: its first packet, original direction, before any NAT."""

    family: int                          # socket.AF_INET or AF_INET6, of both addresses
    src: int                             # host order
    dst: int
    proto: int                           # IP protocol number
    src_port: int = 0                    # 0 unless TCP or UDP
    dst_port: int = 0
    proto_type: int = -1                 # -1 unless ICMP
    proto_subtype: int = -1
    iface: str | None = None             # None: local traffic, or unknown; interface conditions fail
    ifgroup: int | None = None
    reqids: tuple[int, ...] = ()
    dst_on_iface: bool = False           # the destination is an address of the incoming interface
    src_zone: str | None = None
    dst_zone: str | None = None


class Levels:
    """The rules that match one class of values, by score, best first; `number` is its own alone."""

    __slots__ = ("by_score", "number", "union")
    _numbers = itertools.count()

    def __init__(self, by_score: Iterable[tuple[object, int]]) -> None:
        self.number = next(self._numbers)
        self.by_score = tuple(pair for pair in by_score if pair[1])
        self.union = 0
        for _, bitmap in self.by_score:
            self.union |= bitmap

    def best_of(self, candidates: int) -> int:
        """Return those candidates, all of `union`, that have the best score any of them has."""
        for _, bitmap in self.by_score[:-1]:
            if kept := candidates & bitmap:
                return kept
        return candidates


class Memo:
    """Results by key, forgotten all at once when they become too many.

    Any thread may call.  _values_lock guards replacing and filling _values; get() reads without
    it, because a dictionary look-up sees an entry whole or not at all, and a lost entry is only
    computed again.
    """

    __slots__ = ("_limit", "_values", "_values_lock", "get")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values: dict = {}
        self._values_lock = threading.Lock()
        self.get = self._values.get          # None: not remembered

    def __len__(self) -> int:
        return len(self._values)

    def put(self, key, value) -> None:
        with self._values_lock:
            if len(self._values) >= self._limit:
                self._values.clear()
            self._values[key] = value


def _index(rules: Sequence[RuleData], dimension: str) -> dict[object, int]:
    """Return value -> bitmap of the rules that name it in this dimension."""
    named: dict[object, int] = defaultdict(int)
    for bit, rule in enumerate(rules):
        for value in getattr(rule, dimension):
            named[value] |= 1 << bit
    return dict(named)


def _without(rules: Sequence[RuleData], *dimensions: str) -> int:
    """Return the bitmap of the rules that say nothing in any of these dimensions."""
    return sum(1 << bit for bit, rule in enumerate(rules) if not any(getattr(rule, name) for name in dimensions))


class Values:
    """A component of plain values: protocol, ICMP type, ICMP code."""

    def __init__(self, rules: Sequence[RuleData], dimension: str) -> None:
        self.named = _index(rules, dimension)
        self.free = _without(rules, dimension)
        self.classes = {value: value for value in self.named}        # value: its class; not here: None

    def levels(self, value: int | None) -> list[tuple[int, int]]:
        return [(1, self.named.get(value, 0)), (0, self.free)]


class Ports:
    """A component of port ranges; a single port beats a range."""

    def __init__(self, rules: Sequence[RuleData], dimension: str) -> None:
        self.named = _index(rules, dimension)
        self.free = _without(rules, dimension)
        self._wide = sorted((low, high, bitmap) for (low, high), bitmap in self.named.items() if low != high)
        self._lows = [low for low, _, _ in self._wide]
        edges = sorted({0, PORTS} | {edge for low, high in self.named for edge in (low, high + 1)})
        self._first_of_class = edges[:-1]
        self.classes = array("H")            # port: its class
        for number, (first, after) in enumerate(itertools.pairwise(edges)):
            self.classes.extend([number] * (after - first))

    def classes_within(self, low: int, high: int) -> range:
        """Return the classes that make up a range which some rule names."""
        return range(self.classes[low], self.classes[high] + 1)

    def first_port(self, class_: int) -> int:
        return self._first_of_class[class_]

    def levels(self, class_: int) -> list[tuple[int, int]]:
        port = self._first_of_class[class_]
        single = self.named.get((port, port), 0)
        wide = 0
        for _, high, bitmap in self._wide[:bisect_right(self._lows, port)]:
            if port <= high:
                wide |= bitmap
        return [(2, single), (1, wide & ~single), (0, self.free)]


class Incoming:
    """The first component: request id 4, interface name 2, interface group 1, added up."""

    def __init__(self, rules: Sequence[RuleData]) -> None:
        self.reqids, self.names, self.groups = (_index(rules, name) for name in ("reqid", "iface", "ifgroup"))
        self.free = _without(rules, "reqid", "iface", "ifgroup")

    def class_of(self, iface: str | None, ifgroup: int | None, reqids: tuple[int, ...]) -> tuple | None:
        known = tuple(sorted({reqid for reqid in reqids if reqid in self.reqids})) if reqids and self.reqids else ()
        name, group = iface if iface in self.names else None, ifgroup if ifgroup in self.groups else None
        return (known, name, group) if known or name is not None or group is not None else None

    def levels(self, class_: tuple | None) -> list[tuple[int, int]]:
        if class_ is None:
            return [(0, self.free)]
        reqids, name, group = class_
        by_reqid = 0
        for reqid in reqids:
            by_reqid |= self.reqids[reqid]
        parts = ((4, by_reqid), (2, self.names.get(name, 0)), (1, self.groups.get(group, 0)))
        by_score = []
        for score in range(7, 0, -1):
            bitmap = -1
            for weight, matching in parts:
                bitmap &= matching if score & weight else ~matching
            by_score.append((score, bitmap))
        return [*by_score, (0, self.free)]


class Node:
    """A net that rules name: which rules, and the narrowest other named net around it."""

    __slots__ = ("around", "bits", "rules")

    def __init__(self, bits: int, rules: int, around: Node | None) -> None:
        self.bits, self.rules, self.around = bits, rules, around


class Addresses:
    """The component of source or destination addresses: subnets, zones, and for destinations interfaces.

    Conditions of one rule are alternatives: any suffices, and the scores of those that match add
    up.  The score weighs the subnet above the interface above the zone, so levels are made by
    sorting rules by best subnet, within that by interface, within that by deepest zone.
    """

    def __init__(self, rules: Sequence[RuleData], side: str, parents: Mapping[str, str | None],
                 depths: Mapping[str, int], memo: Memo) -> None:
        self.subnets, self.zones = _index(rules, f"{side}_subnet"), _index(rules, f"{side}_zone")
        self.names = _index(rules, "dst_iface") if side == "dst" else {}
        self.groups = _index(rules, "dst_ifgroup") if side == "dst" else {}
        self.free = _without(rules, *([f"{side}_subnet", f"{side}_zone"] if side == "src" else
                                      ["dst_subnet", "dst_iface", "dst_ifgroup", "dst_zone"]))
        self._everyone = (1 << len(rules)) - 1
        self._subnet_weight = 128 if side == "dst" else 32
        self._inet, self._inet6 = self._nodes(socket.AF_INET, 32), self._nodes(socket.AF_INET6, 128)
        self._parents, self._depths = parents, depths
        self._nearest = {zone: self._nearest_named(zone) for zone in parents}
        self._memo = memo

    def _nodes(self, family: int, width: int):
        nodes: dict[tuple[int, int], Node] = {}
        named = {(net.network, net.bits): bitmap for net, bitmap in self.subnets.items() if net.family == family}
        for net, around in nested(named, width):
            nodes[net] = Node(net[1], named[net], nodes[around] if around else None)
        return prefix_table(nodes, width) if nodes else None

    def _nearest_named(self, zone: str | None) -> str | None:
        while zone is not None and zone not in self.zones:
            zone = self._parents.get(zone)
        return zone

    def classes_of(self, zones: Iterable[str | None]) -> list[str | None]:
        """Return one zone, or None, for all of these zones that rules cannot tell apart."""
        return list(dict.fromkeys(map(self._nearest.get, zones)))

    def levels_of(self, family: int, address: int, zone: str | None, local: tuple | None) -> Levels:
        """Return the Levels of an address in a zone; `local` is its local_class()."""
        table = self._inet if family == socket.AF_INET else self._inet6
        class_ = table.lookup(address) if table is not None else None, self._nearest.get(zone), local
        levels = self._memo.get(class_)
        if levels is None:
            levels = Levels(self._levels(class_))
            self._memo.put(class_, levels)
        return levels

    def local_class(self, iface: str | None, ifgroup: int | None) -> tuple | None:
        """Return what destination interface conditions can tell of an interface that owns the address."""
        name, group = iface if iface in self.names else None, ifgroup if ifgroup in self.groups else None
        return (name, group) if name is not None or group is not None else None

    def _levels(self, class_: tuple) -> list[tuple[int, int]]:
        node, zone, local = class_               # node or None, nearest named zone or None, (interface, group) or None
        by_score = []
        for subnet_score, in_subnet in self._by_subnet(node):
            for local_score, on_iface in self._by_interface(local):
                for zone_score, in_zone in self._by_zone(zone):
                    bitmap = in_subnet & on_iface & in_zone
                    if bitmap and (score := self._subnet_weight * subnet_score + 32 * local_score + zone_score):
                        by_score.append((score, bitmap))
        return [*by_score, (0, self.free)]

    def _by_subnet(self, node: Node | None) -> Iterator[tuple[int, int]]:
        rest = self._everyone
        while node is not None:
            yield node.bits + 1, node.rules & rest
            rest &= ~node.rules
            node = node.around
        yield 0, rest

    def _by_interface(self, local: tuple | None) -> Iterator[tuple[int, int]]:
        named, grouped = (self.names.get(local[0], 0), self.groups.get(local[1], 0)) if local else (0, 0)
        yield from ((3, named & grouped), (2, named & ~grouped), (1, grouped & ~named))
        yield 0, self._everyone & ~(named | grouped)

    def _by_zone(self, zone: str | None) -> Iterator[tuple[int, int]]:
        rest = self._everyone
        while zone is not None:
            yield self._depths[zone], self.zones[zone] & rest
            rest &= ~self.zones[zone]
            zone = self._nearest_named(self._parents.get(zone))
        yield 0, rest


def depths_of(parents: Mapping[str, str | None]) -> dict[str, int]:
    """Return the depth of every zone: 1 for a root, one more per step down."""
    depths: dict[str, int] = {}
    for zone in parents:
        path = []
        above: str | None = zone
        while above is not None and above not in depths:
            path.append(above)
            above = parents.get(above)
        depth = depths[above] if above is not None else 0
        for name in reversed(path):
            depth += 1
            depths[name] = depth
    return depths


class RuleEngine:
    """A compiled rule set; see the module for how it decides."""

    def __init__(self, rules: Iterable[RuleData], parents: Mapping[str, str | None]) -> None:
        """Compile `rules`; `parents` names the administrative parent of every zone, None for a root.

        Of rules with equal id the one given first wins.
        """
        self.rules = tuple(sorted(rules, key=lambda rule: rule.rule_id))
        depths = depths_of(parents)
        self.incoming = Incoming(self.rules)
        self.values = tuple(Values(self.rules, name) for name in ("proto", "proto_type", "proto_subtype"))
        self.ports = tuple(Ports(self.rules, name) for name in ("src_port", "dst_port"))
        limit = max(256, min(_MEMO_ENTRIES, _MEMO_BYTES // (4 * (len(self.rules) // 8 + 64))))
        self.source = Addresses(self.rules, "src", parents, depths, Memo(limit))
        self.destination = Addresses(self.rules, "dst", parents, depths, Memo(limit))
        self.uses_destination_interface = bool(self.destination.names or self.destination.groups)
        self.uses_interface = bool(self.incoming.names or self.incoming.groups or self.uses_destination_interface)
        self._front_memo = Memo(limit)
        self._winners = Memo(_MEMO_ENTRIES)

    def best(self, traffic: Traffic) -> RuleData | None:
        """Return the rule that wins for this traffic; None: no rule matches."""
        front, source, destination = self._levels_of(traffic)
        key = front.number, source.number, destination.number
        winner = self._winners.get(key)
        if winner is None:
            winner = self._winner(front, source, destination)
            self._winners.put(key, winner)
        return winner or None

    def _winner(self, front: Levels, source: Levels, destination: Levels) -> RuleData | bool:
        candidates = source.union & destination.union & front.union
        if not candidates:
            return False
        candidates = destination.best_of(source.best_of(front.best_of(candidates)))
        return self.rules[(candidates & -candidates).bit_length() - 1]

    def _levels_of(self, traffic: Traffic) -> tuple[Levels, Levels, Levels]:
        (family, src, dst, proto, src_port, dst_port, proto_type, proto_subtype, iface, ifgroup, reqids,
         dst_on_iface, src_zone, dst_zone) = traffic
        protos, types, subtypes = self.values
        src_ports, dst_ports = self.ports
        key = (self.incoming.class_of(iface, ifgroup, reqids), protos.classes.get(proto), types.classes.get(proto_type),
               subtypes.classes.get(proto_subtype), src_ports.classes[src_port], dst_ports.classes[dst_port])
        front = self._front_memo.get(key)
        if front is None:
            front = self._front(key)
            self._front_memo.put(key, front)
        local = self.destination.local_class(iface, ifgroup) if dst_on_iface else None
        return (front, self.source.levels_of(family, src, src_zone, None),
                self.destination.levels_of(family, dst, dst_zone, local))

    def _front(self, key: tuple) -> Levels:
        """Return the rules by the scores of the first six components together, best first."""
        by_score: list[tuple[tuple, int]] = [((), (1 << len(self.rules)) - 1)]
        for component, class_ in zip((self.incoming, *self.values, *self.ports), key, strict=True):
            levels = [(score, bitmap) for score, bitmap in component.levels(class_) if bitmap]
            by_score = [((*scores, score), both) for scores, rules in by_score for score, bitmap in levels
                        if (both := rules & bitmap)]
        return Levels(by_score)

    def ranking(self, traffic: Traffic) -> list[tuple[tuple[int, ...], RuleData]]:
        """Return every rule that matches with its eight scores, the winner first: for explanations."""
        front, source, destination = self._levels_of(traffic)
        ranked = [((*scores, source_score, destination_score), bit)
                  for scores, first in front.by_score
                  for source_score, second in source.by_score
                  for destination_score, third in destination.by_score
                  for bit in _bits(first & second & third)]
        ranked.sort(key=lambda entry: ([-score for score in entry[0]], entry[1]))
        return [(scores, self.rules[bit]) for scores, bit in ranked]

    def agreed(self, traffic: Traffic, src_zones: Iterable[str | None],
               dst_zones: Iterable[str | None]) -> tuple[tuple[tuple[int, ...], RuleData] | None, bool]:
        """Return ((scores, rule) or None, is agreed): the best match with any of these zones, and whether all have it.

        More combinations of zones than _MOST_COMBINATIONS agree upon nothing.
        """
        sources, destinations = self.source.classes_of(src_zones), self.destination.classes_of(dst_zones)
        pairs = list(itertools.islice(itertools.product(sources, destinations), _MOST_COMBINATIONS))
        found = [next(iter(self.ranking(traffic._replace(src_zone=source, dst_zone=destination))), None)
                 for source, destination in pairs]
        best = min((one for one in found if one is not None), default=None,
                   key=lambda one: ([-score for score in one[0]], one[1].rule_id))
        is_agreed = len(pairs) == len(sources) * len(destinations) and all(one == best for one in found)
        return best, is_agreed


def _bits(bitmap: int) -> Iterator[int]:
    while bitmap:
        lowest = bitmap & -bitmap
        yield lowest.bit_length() - 1
        bitmap ^= lowest
