"""Descriptions of instances and the settings of a host to a Plan.

Theory of operation
    compile_plan() is a pure function: equal input gives an equal plan.  What a packet meets:

        mangle PREROUTING -> ZORP
            packets of the proxies themselves that come back through lo: not ours
            packets that belong to a transparent socket: marked, delivered to it
            new connections that the site hides (ZORP_BYPASS): not evaluated
            ZORP_EVAL: new connections only; the first entry that matches goes to ZORP_R<index>
            ZORP_CLOSED: what zones that dispute an address do not agree upon (Zorp.netfilter.entries)
            ZORP_AGAIN: datagrams of a proxied client after the proxy's session has ended
        nat and filter: Zorp.netfilter.actions

    The rules of all instances form one pool.  A packet that no rule takes keeps a connection
    mark without a class, and ZORP_FORWARD drops it.

    To connection tracking a UDP client and its server stay one connection for as long as they
    talk; to a proxy they are a new session whenever the last one has timed out.  ZORP_AGAIN
    evaluates such datagrams like new ones, and diverts them, or they are not forwarded: NAT would
    not see them any more.  For the same reason a forwarded connection that is
    still unanswered, and so new to connection tracking, keeps its mark: if it shall have another
    rule with another translation, it is ended (Zorp.netfilter.sessions).

    An authentication header (AH) of IPv6 stands before what the rules are about.  The legacy
    tables look behind it, nf_tables does not: there a packet for a proxy would meet the rules for
    other protocols.  So it is dropped where it is seen; in IPv4 AH is a protocol of its own.

    Indexes of rules are stable: a rule that says the same as before keeps its index, a new one
    gets a number that was not used since the last wrap-around (IndexState), because connections
    that were marked with an index may live longer than its rule.

Errors
    CompileError, and nothing is compiled: half a policy is another policy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from Zorp.netfilter.actions import ACCEPT, DROP, RETURN, Actions, goto, jump, undecided
from Zorp.netfilter.entries import ICMP, OTHER, TCP, UDP, Instance, Unsupported, entries_of
from Zorp.netfilter.evaluation import CLOSED_CHAIN, Evaluation
from Zorp.netfilter.plan import Chain, Hook, IpRule, Plan, Route, Rule, RuleIndex, Table, Target, Test
from Zorp.netfilter.site import INDEX_BITS, Bypass, Site
from Zorp.netfilter.zonesets import SetRegistry
from Zorp.rules.description import DenyData, ForwardData, InstanceDescription, ListenerData, to_json
from Zorp.rules.engine import RuleData

MAX_INSTANCES = 256
_AUTHENTICATION = 51
_LAST_INDEX = (1 << INDEX_BITS) - 1


class CompileError(ValueError):
    """The policies of this host cannot become packet rules; `str()` is for the administrator."""


@dataclass(frozen=True, slots=True)
class IndexState:
    """The indexes of the last plan; what a reload hands to the next."""

    by_key: Mapping[str, int] = field(default_factory=dict)
    last: int = 0                            # the latest index that was given away
    reserved: Mapping[str, int] = field(default_factory=dict)    # of a plan that was begun and never confirmed

    def to_json(self) -> str:
        """Return the state as text."""
        return json.dumps({"last": self.last, "indexes": dict(self.by_key), "reserved": dict(self.reserved)},
                          sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> IndexState:
        """Return the state in a text; ValueError when it is none."""
        try:
            value = json.loads(text)
            by_key, reserved = ({str(key): _whole(index) for key, index in part.items()}
                                for part in (value["indexes"], value.get("reserved", {})))
            last = _whole(value["last"])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as problem:
            raise ValueError(f"not a table of rule indexes: {problem}") from None
        indexes = {*by_key.values(), *reserved.values()}
        if len(indexes) != len(by_key) + len(reserved) or not all(
                1 <= index <= _LAST_INDEX for index in (*indexes, last or 1)):
            raise ValueError("not a table of rule indexes: a number is wrong")
        return cls(by_key, last, reserved)

    @classmethod
    def of(cls, plan: Plan, before: IndexState) -> IndexState:
        """Return the state after a plan."""
        new = [rule.index for rule in plan.indexes if rule.key not in before.by_key]
        return cls({rule.key: rule.index for rule in plan.indexes}, new[-1] if new else before.last)

    def reserving(self, after: IndexState) -> IndexState:
        """Return this state with the indexes that another one is about to use: no other rule gets them then."""
        taken = set(self.by_key.values())
        return IndexState(self.by_key, after.last, {
            key: index for key, index in after.by_key.items() if key not in self.by_key and index not in taken})


def _whole(value: object) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no index")
    return value


def compile_plan(descriptions: Sequence[InstanceDescription], site: Site, state: IndexState | None = None) -> Plan:
    """Return the plan for these instances, which come in the order of their loading.

    Raises CompileError.
    """
    _check(descriptions)
    try:
        return _Compiler(descriptions, site, state or IndexState()).plan()
    except Unsupported as problem:
        raise CompileError(str(problem)) from None


def _check(descriptions: Sequence[InstanceDescription]) -> None:
    if len(descriptions) > MAX_INSTANCES:
        raise CompileError(f"{len(descriptions)} instances, at most {MAX_INSTANCES} are possible")
    names = [description.instance for description in descriptions]
    for name in names:
        if names.count(name) > 1:
            raise CompileError(f"instance '{name}' is described twice")
    for description in descriptions:
        proxied = {service.name for service in description.services
                   if not isinstance(service, (ForwardData, DenyData))}
        if any(rule.service in proxied for rule in description.rules):
            for listener in description.listeners:
                if not listener.port:
                    raise CompileError(
                        f"instance '{description.instance}': the port of its rule listener on {listener.address} is "
                        "not known; set config.options.rule_listen_port in the policy, or start the instance once")


class _Compiler:
    def __init__(self, descriptions: Sequence[InstanceDescription], site: Site, state: IndexState) -> None:
        self._descriptions, self._site, self._marks = descriptions, site, site.marks
        self._registry = SetRegistry()
        self._rules = self._numbered(state)
        by_rule = {(rule.instance, rule.rule_id): rule.index for rule, _ in self._rules}
        self._instances = [
            Instance.of(order, description, self._registry,
                        {rule.rule_id: by_rule[description.instance, rule.rule_id] for rule in description.rules})
            for order, description in enumerate(descriptions)]

    def plan(self) -> Plan:
        tables = [table for family in self._site.families for table in self._tables(family)]
        if self._site.export_zone_sets:
            for instance in self._instances:
                for family in self._site.families:
                    instance.zones.export(family)
        return Plan(tables=tuple(tables), sets=self._registry.all(), ip_rules=tuple(self._ip_rules()),
                    routes=tuple(Route(family, self._site.routing_table) for family in self._site.families),
                    indexes=tuple(rule for rule, _ in self._rules))

    # ---- indexes

    def _numbered(self, state: IndexState) -> list[tuple[RuleIndex, object]]:
        """Return (index, service) of every rule of every instance, in ascending order of indexes."""
        known = [(description, rule, description.service(rule.service)) for description in self._descriptions
                 for rule in description.rules]
        if len(known) > _LAST_INDEX:
            raise CompileError(f"{len(known)} rules in all instances, at most {_LAST_INDEX} are possible")
        keys = [_key(description.instance, rule, service) for description, rule, service in known]
        given = {**state.reserved, **state.by_key}
        used = set(given.values())
        free = _free_indexes(state.last, used, {given[key] for key in keys if key in given})
        numbered = []
        for (description, rule, service), key in zip(known, keys, strict=True):
            index = given.get(key) or next(free)
            numbered.append((RuleIndex(index, key, description.instance, rule.rule_id, rule.service,
                                       _kind(service), _key(description.instance, None, service)), service))
        return sorted(numbered, key=lambda pair: pair[0].index) if given else numbered

    # ---- tables

    def _tables(self, family: int) -> list[Table]:
        listeners: dict[tuple[str, int], ListenerData] = {}
        for description in self._descriptions:
            for listener in description.listeners:
                if (":" in listener.address) == (family == 6):
                    listeners.setdefault((description.instance, listener.protocol), listener)
        actions = Actions(family, self._site, self._rules, listeners)
        mangle = [*self._entrance(family), *self._evaluation(family), *actions.mangle()]
        if any(instance.zones.can_be_disputed for instance in self._instances):
            mangle.append(actions.closed(CLOSED_CHAIN))
        return [
            Table(family, "mangle", tuple(mangle), self._hooks(("PREROUTING", "ZORP"))),
            Table(family, "nat", (*actions.nat_prerouting(), *actions.nat_postrouting()),
                  self._hooks(("PREROUTING", "ZORP_PREROUTING"), ("POSTROUTING", "ZORP_POSTROUTING"))),
            Table(family, "filter", (*actions.filter_input(), *actions.filter_forward()),
                  self._hooks(("INPUT", "ZORP_INPUT"), ("FORWARD", "ZORP_FORWARD"))),
        ]

    def _hooks(self, *pairs: tuple[str, str]) -> tuple[Hook, ...]:
        return () if self._site.hooks == "none" else tuple(Hook(*pair) for pair in pairs)

    def _entrance(self, family: int) -> list[Chain]:
        marks = self._marks
        diverted = Test("mark", (marks.divert, marks.divert))
        rules = [
            Rule((Test("mark", (marks.own, marks.own)),), RETURN),
            Rule((Test("socket"),), Target("mark", (marks.divert, marks.divert))),
            Rule((diverted,), ACCEPT),
        ]
        entries = [entry for entry in self._site.bypass if entry.family in (None, family)]
        if not entries:
            return [Chain("ZORP", (*rules, Rule((), jump("ZORP_EVAL"))))]
        rules += [Rule((Test("state", "NEW"),), jump("ZORP_BYPASS")), Rule((), jump("ZORP_EVAL"))]
        passed = Chain("ZORP_BYPASSED", (Rule((), Target("connmark", (marks.bypass, marks.connection_mask))),
                                         Rule((), ACCEPT)))
        bypass = Chain("ZORP_BYPASS", tuple(Rule(_bypass_tests(entry), goto("ZORP_BYPASSED")) for entry in entries))
        return [Chain("ZORP", tuple(rules)), bypass, passed]

    def _evaluation(self, family: int) -> list[Chain]:
        branches, chains = [], []
        for protocol, name in ((TCP, "ZORP_TCP"), (UDP, "ZORP_UDP"), (ICMP[family], "ZORP_ICMP")):
            found = self._kind_of_traffic(family, protocol, name)
            if found:
                branches.append(Rule((Test("proto", protocol),), goto(name)))
                chains += found
            else:
                branches.append(Rule((Test("proto", protocol),), RETURN))
        others = self._kind_of_traffic(family, OTHER, "ZORP_OTHER")
        if others:
            branches.append(Rule((), goto("ZORP_OTHER")))
        later = Test("state", "NEW", negated=True)
        forwarded = Test("connmark", (self._marks.forward, self._marks.class_mask))
        first = [Rule((later,), RETURN), Rule((forwarded,), RETURN),
                 *([Rule((Test("proto", _AUTHENTICATION),), DROP)] if family == 6 else []),
                 Rule((), Target("connmark", (0, self._marks.connection_mask)))]
        again = self._udp_again() if any(chain.name == "ZORP_UDP" for chain in chains) else []
        if again:
            first.insert(0, Rule((Test("proto", UDP), Test("direction", "ORIGINAL"), *self._was_proxied()),
                                 goto(again[0].name)))
        return [Chain("ZORP_EVAL", (*first, *branches)), *chains, *others, *again]

    def _was_proxied(self) -> tuple[Test, Test]:
        marks = self._marks
        return (Test("connmark", (0, marks.class_mask)), Test("connmark", (0, marks.connection_mask), negated=True))

    def _udp_again(self) -> list[Chain]:
        """Return the chain for datagrams of a proxy's client whose session, and so its socket, is gone."""
        marks = self._marks
        if not any(listener.protocol == UDP for description in self._descriptions
                   for listener in description.listeners):
            return []
        return [Chain("ZORP_AGAIN", (Rule((), Target("connmark", (0, marks.connection_mask))),
                                     Rule((), jump("ZORP_UDP")),
                                     Rule((Test("connmark", (0, marks.connection_mask)),), undecided(marks))))]

    def _kind_of_traffic(self, family: int, kind: int | None, name: str) -> list[Chain]:
        entries = entries_of(self._instances, family, kind, self._registry)
        if not entries:
            return []
        evaluation = Evaluation(name, family, kind, registry=self._registry, most=self._site.split_above,
                                undecided=Test("connmark", (0, self._marks.connection_mask)))
        return evaluation.chains(entries)

    # ---- routing

    def _ip_rules(self) -> list[IpRule]:
        marks, site = self._marks, self._site
        rules = []
        for family in site.families:
            if site.accepts_marks:               # else replies of accepted sockets, which then bear the mark, stay here
                rules.append(IpRule(family, site.rule_priority - 1, marks.divert, marks.divert, 254, "lo"))
            rules.append(IpRule(family, site.rule_priority, marks.divert, marks.divert, site.routing_table))
        return rules


def _free_indexes(last: int, used: set[int], needed: set[int]):
    """Yield indexes that are free: upwards from the last one, then those whose rules are gone longest."""
    upwards = [*range(last + 1, _LAST_INDEX + 1), *range(1, last + 1)]
    yield from (index for index in upwards if index not in used)
    yield from (index for index in upwards if index in used and index not in needed)


def _kind(service: object) -> str:
    return "forward" if isinstance(service, ForwardData) else "deny" if isinstance(service, DenyData) else "proxy"


def _key(instance: str, rule: RuleData | None, service) -> str:
    """Return what tells a rule, with all it says and its service, or a service alone, from every other one."""
    alone = to_json(InstanceDescription(instance=instance, services=(service,), rules=(rule,) if rule else ()))
    return hashlib.sha256(alone.encode()).hexdigest()[:32]


def _bypass_tests(entry: Bypass) -> tuple[Test, ...]:
    tests = [("iface", entry.iface), ("proto", entry.proto), ("dport", entry.dst_port), ("src", entry.src),
             ("dst", entry.dst)]
    return tuple(Test(what, value) for what, value in tests if value not in (None, "") and
                 not (what in ("src", "dst") and value.endswith("/0")))
