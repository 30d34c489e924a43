"""Rules of policies taken apart: from "the best match wins" to "the first match wins".

Theory of operation
    A rule scores a packet in eight components, and some components take alternatives that add
    up.  Every way in which a rule can score becomes one entry: a conjunction of tests with a
    fixed score.  A packet that a rule gives the score s matches the entry of s, and no entry of
    that rule with more.  So, with all entries of all instances sorted by score (descending), rule
    id and order of instances, the first entry that matches belongs to the rule that wins.

    Alternatives that score alike (nets of one length, zones of one depth) become one test on a
    set, which keeps the number of entries small.

    Whether an address is in a zone can be disputed (Zorp.netfilter.zonesets).  Then each entry
    with a condition on zones has another one right behind it, which asks for what is perhaps in
    these zones and leads to CLOSED.  So a packet meets a rule only when no zone that its addresses
    may be in gives it another one; the evaluation at accept, agreed() of the engine, says the same.

    Entries are made per family and per kind of traffic: TCP, UDP, ICMP, everything else.  That
    answers what the packet filter cannot test: a rule with ports matches TCP and UDP only, and
    port 0 stands for traffic without ports; ICMP types exist in ICMP only.

Errors
    What has no packet form raises Unsupported with instance, rule and remedy; nothing is
    approximated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from Zorp.netfilter.plan import Test
from Zorp.netfilter.site import is_exact_iface
from Zorp.netfilter.zonesets import SetRegistry, ZoneSets, family_of
from Zorp.rules.description import InstanceDescription
from Zorp.rules.engine import NetData, RuleData, depths_of

TCP, UDP = 6, 17
ICMP = {4: 1, 6: 58}
OTHER = None                     # kind of traffic: every protocol but the three above
MAX_ENTRIES = 200_000            # of all rules, per family and kind of traffic
MAX_ENTRIES_PER_RULE = 10_000
MAX_WAYS = 2 * MAX_ENTRIES       # that are looked at, with those that no packet can go
MAX_WAYS_PER_RULE = 100_000
CLOSED = 0                       # the index of entries that let nothing pass; those of rules begin at 1
_ANY_PROTOCOL = 0                # what "-p 0" means; no packet of IPv4 or IPv6 has this number itself
_ANY_ICMP_TYPE = 255             # what the ICMP match takes for "any type"


class Unsupported(ValueError):
    """A rule that cannot be compiled; `str()` is for the administrator."""


class Entry(NamedTuple):
    """One way in which a rule matches."""

    tests: frozenset[Test]           # without those on protocol of the kind of traffic, and destination port
    ports: tuple[int, int] | None    # destination ports; None: any
    index: int                       # of the rule, in the plan; or CLOSED


Score = tuple[int, ...]
_Ways = list[tuple[int, frozenset[Test]]]          # score and tests of each way to match a component
_NOTHING: _Ways = [(0, frozenset())]


@dataclass(frozen=True, slots=True)
class Instance:
    """One instance while it is compiled."""

    order: int                       # of loading; decides between equal scores and ids
    description: InstanceDescription
    zones: ZoneSets
    depths: dict[str, int]
    indexes: dict[int, int]          # rule id -> index

    @classmethod
    def of(cls, order: int, description: InstanceDescription, registry: SetRegistry,
           indexes: dict[int, int]) -> Instance:
        return cls(order, description, ZoneSets(description, registry), depths_of(description.parents()), indexes)


def entries_of(instances: Iterable[Instance], family: int, kind: int | None, registry: SetRegistry) -> list[Entry]:
    """Return the entries of all rules for one family (4, 6) and kind of traffic, the first that matches wins."""
    ranked: list[tuple] = []
    looked_at = 0
    for instance in instances:
        for rule in instance.description.rules:
            before = len(ranked)
            expansion = _Expansion(instance, rule, family, registry)
            for score, entry in expansion.entries(kind):
                looked_at += 1
                if looked_at > MAX_WAYS:
                    raise expansion.too_many()
                if entry is None:
                    continue
                ranked.append((tuple(-part for part in score), rule.rule_id, instance.order, len(ranked), entry))
                if len(ranked) - before > MAX_ENTRIES_PER_RULE or len(ranked) > MAX_ENTRIES:
                    raise expansion.too_many()
    ranked.sort()
    return [entry for *_, entry in ranked]


class _Expansion:
    """One rule, taken apart for one family."""

    def __init__(self, instance: Instance, rule: RuleData, family: int, registry: SetRegistry) -> None:
        self._instance, self._rule, self._family, self._registry = instance, rule, family, registry
        self._perhaps: dict[Test, Test] = {}             # test of a zone: the one that includes disputed addresses
        self._name = f"instance '{instance.description.instance}', rule {rule.rule_id}"
        for name in (*rule.iface, *rule.dst_iface):
            if not is_exact_iface(name):
                raise Unsupported(f"{self._name}: interface name '{name}' has no packet form; rename the interface")
        if _ANY_PROTOCOL in rule.proto:
            raise Unsupported(f"{self._name}: protocol {_ANY_PROTOCOL} has no packet form; take it out")

    def too_many(self) -> Unsupported:
        """Return the error for a rule with more alternatives than can be tried."""
        return Unsupported(f"{self._name}: too many combinations of alternatives; split it into several rules")

    def entries(self, kind: int | None) -> Iterator[tuple[Score, Entry | None]]:
        """Yield (score, entry) for every way in which the rule matches this kind of traffic.

        None stands for the entry of a way that contradicts itself.
        """
        traffic = list(itertools.islice(self._traffic(kind), MAX_WAYS_PER_RULE + 1))
        ports = self._ports(self._rule.dst_port, kind)
        sources = self._source()
        if not (traffic and ports and sources):
            return
        components = (self._incoming(), traffic, self._ports(self._rule.src_port, kind), ports, sources,
                      self._destination())
        if math.prod(map(len, components)) > MAX_WAYS_PER_RULE:
            raise self.too_many()
        ways = itertools.product(*components)
        index = self._instance.indexes[self._rule.rule_id]
        for incoming, (scores, traffic_tests), source_port, port, source, destination in ways:
            tests = incoming[1] | traffic_tests | source[1] | destination[1]
            if source_port[1] is not None:
                tests |= {Test("sport", source_port[1])}
            score = (incoming[0], *scores, source_port[0], port[0], source[0], destination[0])
            yield score, Entry(tests, port[1], index) if _can_hold(tests) else None
            if _can_hold(tests) and not self._perhaps.keys().isdisjoint(tests):
                yield score, Entry(frozenset(self._perhaps.get(test, test) for test in tests), port[1], CLOSED)

    # ---- components

    def _incoming(self) -> _Ways:
        rule = self._rule
        return self._sums([(4, [frozenset((Test("reqid", value),)) for value in rule.reqid]),
                           (2, [frozenset((Test("iface", value),)) for value in rule.iface]),
                           (1, [frozenset((Test("ifgroup", value),)) for value in rule.ifgroup])])

    def _traffic(self, kind: int | None) -> Iterator[tuple[tuple[int, int, int], frozenset[Test]]]:
        """Yield ((protocol, type, code scores), tests) for this kind of traffic."""
        rule = self._rule
        own = {TCP, UDP, ICMP[self._family]}
        if kind is OTHER:
            protocols = [frozenset((Test("proto", number),)) for number in rule.proto if number not in own]
        else:
            protocols = [frozenset()] if kind in rule.proto else []
        if not rule.proto:
            protocols = [frozenset()]
        has_type, has_code = bool(rule.proto_type), bool(rule.proto_subtype)
        if has_type or has_code:
            if kind != ICMP[self._family]:
                return
            self._check_icmp()
        for protocol in protocols:
            for number in rule.proto_type or (None,):
                for code in rule.proto_subtype or (None,):
                    icmp = frozenset((Test("icmp", (number, code)),)) if has_type else frozenset()
                    yield (int(bool(rule.proto)), int(has_type), int(has_code)), protocol | icmp

    def _check_icmp(self) -> None:
        if self._rule.proto_subtype and not self._rule.proto_type:
            raise Unsupported(f"{self._name}: an ICMP code without a type has no packet form; add icmp_type")
        if _ANY_ICMP_TYPE in self._rule.proto_type:
            raise Unsupported(f"{self._name}: ICMP type {_ANY_ICMP_TYPE} has no packet form; take it out")

    @staticmethod
    def _ports(ranges: tuple[tuple[int, int], ...], kind: int | None) -> list[tuple[int, tuple[int, int] | None]]:
        """Return (score, range) per alternative; for traffic without ports whatever holds port 0, without a range."""
        if not ranges:
            return [(0, None)]
        scored = [(2 if low == high else 1, (low, high)) for low, high in ranges]
        if kind in (TCP, UDP):
            return scored
        return [(score, None) for score, (low, _) in scored if low == 0]

    def _source(self) -> _Ways:
        rule = self._rule
        if not (rule.src_subnet or rule.src_zone):
            return _NOTHING
        return self._sums([*self._subnets("src", rule.src_subnet, 32), *self._zones("src", rule.src_zone)],
                          conditional=True)

    def _destination(self) -> _Ways:
        rule = self._rule
        if not (rule.dst_subnet or rule.dst_zone or rule.dst_iface or rule.dst_ifgroup):
            return _NOTHING
        local = Test("local")
        return self._sums([*self._subnets("dst", rule.dst_subnet, 128),
                           (64, [frozenset((local, Test("iface", name))) for name in rule.dst_iface]),
                           (32, [frozenset((local, Test("ifgroup", group))) for group in rule.dst_ifgroup]),
                           *self._zones("dst", rule.dst_zone)], conditional=True)

    def _sums(self, parts, *, conditional: bool = False) -> _Ways:
        """Return _sums() of these parts, before whose product is made its size is known."""
        parts = [part if isinstance(part, list) else [(part[0], tests) for tests in part[1]] for part in parts]
        if math.prod(len(part) + 1 for part in parts) > MAX_WAYS_PER_RULE:
            raise self.too_many()
        return _sums(parts, conditional=conditional)

    def _subnets(self, side: str, nets: tuple[NetData, ...], weight: int):
        """Yield one exclusive group: alternatives by prefix length; the longest that matches counts."""
        own = [net for net in nets if family_of(net) == self._family]
        levels = []
        for bits, level in _grouped(own, lambda net: net.bits):
            tests = frozenset((self._net_test(side, level),)) if bits else frozenset()
            levels.append((weight * (bits + 1), tests))
        if levels:
            yield levels

    def _net_test(self, side: str, nets: list[NetData]) -> Test:
        if len(nets) == 1:
            return Test(side, str(nets[0]))
        return Test(f"set-{side}", self._registry.nets(self._family, nets))

    def _zones(self, side: str, zones: tuple[str, ...]):
        """Yield one exclusive group: alternatives by depth; the deepest zone that matches counts."""
        levels = []
        for depth, names in _grouped(zones, self._instance.depths.__getitem__):
            members = self._instance.zones.below(names, self._family)
            if members is not None:
                test = Test(f"set-{side}", members)
                levels.append((depth, frozenset((test,))))
                if self._instance.zones.can_be_disputed:
                    self._perhaps[test] = Test(f"set-{side}", self._instance.zones.perhaps(names, self._family))
        if levels:
            yield levels


def _grouped(values, key):
    """Return [(key, values)] with the largest key first."""
    ordered = sorted(values, key=lambda value: (-key(value), value))
    return [(number, list(group)) for number, group in itertools.groupby(ordered, key)]


def _sums(parts, *, conditional: bool = False) -> _Ways:
    """Return every non-empty choice of at most one way per part, with scores added.

    A part is [(score, tests)].  Without any part: the one way that asks for nothing, or none at
    all when there are conditions that this family cannot meet.
    """
    groups = [[*part, None] for part in parts if part]
    if not groups:
        return [] if conditional else _NOTHING
    sums = []
    for choice in itertools.product(*groups):
        chosen = [way for way in choice if way is not None]
        if chosen:
            sums.append((sum(score for score, _ in chosen), frozenset().union(*(tests for _, tests in chosen))))
    return sums


def _can_hold(tests: frozenset[Test]) -> bool:
    """Return False when tests contradict each other: a packet has one incoming interface, of one group."""
    names = sum(test.what == "iface" for test in tests)
    groups = sum(test.what == "ifgroup" for test in tests)
    return names < 2 and groups < 2
