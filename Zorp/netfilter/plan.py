"""A plan: everything that the packet filter of a host should hold for Zorp, as values.

Theory of operation
    The compiler makes a Plan, back ends carry it to the kernel, tests compare its text.  Tests
    and targets say what is meant, not how iptables spells it (Zorp.netfilter.render does).
    All chains begin with ZORP, all sets with "zorp."; nothing else belongs to us but the hooks,
    the jumps from built-in chains into ours.

    str(plan) is deterministic: equal input gives equal text, so plans can be compared by eye,
    by diff and by hash.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

CHAIN_PREFIX = "ZORP"
SET_PREFIX = "zorp."
MAX_SET_NAME_BYTES = 31


class Test(NamedTuple):
    """One condition of a packet rule; all conditions of a rule must hold.

    what         value
    proto        IP protocol number
    iface        name of the incoming interface
    ifgroup      group of the incoming interface
    reqid        IPsec request id
    local        None: the destination is an address of the incoming interface
    src, dst     net as text
    set-src, set-dst   name of a set that holds the address
    origdst      net as text, of the connection's original destination
    sport, dport (low, high)
    syn          None: the TCP packet begins a connection: SYN, without ACK, RST and FIN
    icmp         (type, code); code None: any
    mark, connmark     (value, mask)
    state        connection state: NEW, INVALID
    direction    of the packet in its connection: ORIGINAL, REPLY
    known        None: an earlier packet of the connection has passed, so NAT is decided
    socket       None: a transparent socket of this host has the packet
    """

    what: str
    value: object = None
    negated: bool = False

    def __str__(self) -> str:
        return ("!" if self.negated else "") + self.what + _value_text(self.what, self.value)


class Target(NamedTuple):
    """What a packet rule does.

    what         values
    accept drop return masquerade   none
    jump goto    chain
    mark connmark   value, mask: the masked bits become value
    tproxy       address, port, value, mask
    dnat snat    address, port (0: unchanged)
    netmap       net as text
    reject       code as iptables spells it
    nflog        group, prefix
    """

    what: str
    values: tuple = ()

    def __str__(self) -> str:
        values = (f"{value:#x}" if place >= len(self.values) - 2 and self.what in _MARKING else str(value)
                  for place, value in enumerate(self.values))
        return " ".join((self.what, *values))


_MARKING = ("mark", "connmark", "tproxy")


def _value_text(what: str, value: object) -> str:
    if value is None:
        return ""
    if what in ("mark", "connmark"):
        return "={:#x}/{:#x}".format(*value)
    if what in ("sport", "dport"):
        low, high = value
        return f"={low}" if low == high else f"={low}-{high}"
    if what == "icmp":
        return f"={value[0]}" if value[1] is None else "={}/{}".format(*value)
    return f"={value}"


class Rule(NamedTuple):
    """A packet rule."""

    tests: tuple[Test, ...]
    target: Target

    def __str__(self) -> str:
        return " ".join((*map(str, self.tests), "->", str(self.target)))


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain of ours."""

    name: str
    rules: tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class Hook:
    """The jump from a built-in chain to one of ours."""

    builtin: str
    chain: str


@dataclass(frozen=True, slots=True)
class Table:
    """Our part of one table of one family."""

    family: int                              # 4 or 6
    name: str                                # mangle, nat, filter
    chains: tuple[Chain, ...]
    hooks: tuple[Hook, ...]


@dataclass(frozen=True, slots=True)
class Member:
    """A net in a set; nomatch: an exception inside a wider net."""

    net: str
    nomatch: bool = False

    def __str__(self) -> str:
        return self.net + (" nomatch" if self.nomatch else "")


@dataclass(frozen=True, slots=True)
class AddressSet:
    """A set of nets (ipset hash:net); the narrowest net around an address decides."""

    name: str
    family: int                              # 4 or 6
    members: tuple[Member, ...]
    about: str = ""                          # for the reader: which zones or rule


@dataclass(frozen=True, slots=True)
class IpRule:
    """A policy routing rule: packets with this mark are routed by this table."""

    family: int
    priority: int
    mark: int
    mask: int
    table: int
    iface: str = ""                          # incoming interface; empty: any

    def __str__(self) -> str:
        iface = f" iif {self.iface}" if self.iface else ""
        return (f"ip -{self.family} rule pref {self.priority}{iface} fwmark {self.mark:#x}/{self.mask:#x} "
                f"table {self.table}")


@dataclass(frozen=True, slots=True)
class Route:
    """The route that gives everything in a table to this host."""

    family: int
    table: int

    def __str__(self) -> str:
        return f"ip -{self.family} route local default dev lo table {self.table}"


@dataclass(frozen=True, slots=True)
class RuleIndex:
    """The number that stands for a rule of a policy in connection marks."""

    index: int
    key: str                                 # what the rule and its service say, hashed
    instance: str
    rule_id: int
    service: str
    kind: str                                # proxy, forward, deny
    service_key: str = ""                    # what the service says, hashed


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All of it."""

    tables: tuple[Table, ...]
    sets: tuple[AddressSet, ...]
    ip_rules: tuple[IpRule, ...]
    routes: tuple[Route, ...]
    indexes: tuple[RuleIndex, ...]
    warnings: tuple[str, ...] = ()

    def table(self, family: int, name: str) -> Table:
        """Return our part of one table; KeyError when the plan has none."""
        for table in self.tables:
            if (table.family, table.name) == (family, name):
                return table
        raise KeyError((family, name))

    def __str__(self) -> str:
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        yield from (f"warning: {warning}" for warning in self.warnings)
        for rule in self.indexes:
            yield f"index {rule.index}: {rule.kind} {rule.instance} rule {rule.rule_id} service {rule.service}"
        yield from map(str, (*self.ip_rules, *self.routes))
        for members in self.sets:
            yield f"set {members.name} inet{'6' if members.family == 6 else ''} ({members.about})"
            yield from (f"    {member}" for member in members.members)
        for table in self.tables:
            yield f"table {table.name} inet{'6' if table.family == 6 else ''}"
            yield from (f"  hook {hook.builtin} -> {hook.chain}" for hook in table.hooks)
            yield from _chain_lines(table.chains)


def _chain_lines(chains: Iterable[Chain]) -> Iterator[str]:
    for chain in chains:
        yield f"  {chain.name}"
        yield from (f"    {rule}" for rule in chain.rules)
