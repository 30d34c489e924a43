"""Sets of addresses for zones and for lists of nets.

Theory of operation
    A zone condition of a rule means: the narrowest net around the address belongs to the zone,
    or to a zone below it.  As a set that is every net of those zones, and as exceptions the nets
    of other zones inside them; the kernel's hash:net takes the narrowest net, so an exception
    wins, and a net inside an exception wins again.  Nets that agree with the next wider one
    change nothing and are left out.

    hash:net cannot hold a net of length 0: it becomes its two halves, except where a zone owns
    a half itself, which then decides.

    Zones without nets have no set, unless they name hosts: their addresses come and go, and then
    only the members of a set shall change, never the rules.

    A set may stand for several zones (alternatives of one rule that score alike) and is named
    after its only zone, or by a hash of what it is.  Names have at most 31 bytes.

Names change with what a set means
    Rules in force name sets.  Were the nets of a zone exchanged under such a name, the old rules
    would meet the new zones until the new rules are in the kernel, and that is a policy nobody
    wrote: what moves from a zone that has a proxy to one that is forwarded would be forwarded.  So
    the name of a set that our rules use ends with a hash of its members.  Where an instance names
    hosts, the members come and go with their addresses; there the hash is one of all its zones
    as the policy says them, and members change under one name only when addresses do.

Disputed addresses
    An address that host names of several zones have belongs to none of them, and may be in any
    (Zorp.zones.table).  So there are two sets for a condition: of the addresses that are surely in
    these zones, below(), and of those that perhaps are, perhaps(); what is in the second only must
    meet neither the rule nor, unasked, what comes after it (Zorp.netfilter.entries).  Where fewer
    than two zones name hosts there can be no dispute, and one set does for both.

    Exported sets (export_zone_sets) are for rules that the site writes, and ours never use them:
    they keep their names, zorp.exact4.ZONE and zorp.tree4.ZONE, whatever their members, and hold
    what is surely in the zone.
"""

from __future__ import annotations

import hashlib
import ipaddress
import socket
from collections.abc import Iterable, Mapping

from Zorp.netfilter.plan import MAX_SET_NAME_BYTES, SET_PREFIX, AddressSet, Member
from Zorp.rules.description import InstanceDescription
from Zorp.rules.engine import NetData
from Zorp.zones.prefix_table import Net, nested, prefix_table

_WIDTH = {4: 32, 6: 128}
_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-")
_HASH_DIGITS = 12
_MOST_SPANS = 64                 # more are taken for one, from the first address to the last


def family_of(net: NetData) -> int:
    """Return 4 or 6."""
    return 4 if net.family == 2 else 6


def set_name(kind: str, text: str, content: str = "") -> str:
    """Return a name for a set: legible when the text permits it, else, or with `content`, with a hash at its end.

    Names of different (kind, text, content) differ; "~" occurs in hashed names only.
    """
    name = f"{SET_PREFIX}{kind}.{text}"
    if not content and len(name.encode("utf-8", "surrogatepass")) <= MAX_SET_NAME_BYTES and set(text) <= _PLAIN:
        return name
    digest = _hash((kind, text, content))
    room = MAX_SET_NAME_BYTES - len(f"{SET_PREFIX}{kind}.~") - _HASH_DIGITS
    legible = "".join(letter if letter in _PLAIN else "_" for letter in text)[:room]
    return f"{SET_PREFIX}{kind}.{legible}~{digest}"


def _halve_everything(members: dict[Net, bool], owners: Mapping[Net, str], zones: frozenset[str], width: int) -> None:
    """Replace the net of length 0, which hash:net refuses, by its halves."""
    if (0, 0) not in members:
        return
    del members[0, 0]
    for half in ((0, 1), (1 << (width - 1), 1)):
        if half in owners and owners[half] not in zones:
            members.pop(half, None)                  # nothing is left around it that it would be an exception to
        else:
            members[half] = False


def _text(net: Net, width: int) -> str:
    family = socket.AF_INET if width == 32 else socket.AF_INET6
    return f"{socket.inet_ntop(family, net[0].to_bytes(width // 8, 'big'))}/{net[1]}"


class SetRegistry:
    """The sets of a plan; equal content under an equal name is one set."""

    def __init__(self) -> None:
        self._sets: dict[str, AddressSet] = {}
        self._changing: set[str] = set()                 # sets whose members come and go
        self._spans: dict[str, tuple[tuple[int, int], ...]] = {}

    def all(self) -> tuple[AddressSet, ...]:
        """Return the sets by name."""
        return tuple(self._sets[name] for name in sorted(self._sets))

    def spans(self, name: str) -> tuple[tuple[int, int], ...] | None:
        """Return (first, last) addresses around all that a set can hold; None: addresses of hosts come and go.

        The spans may hold more than the set does, never less.
        """
        if name in self._changing:
            return None
        if name not in self._spans:
            self._spans[name] = _spans_of(self._sets[name].members)
        return self._spans[name]

    def add(self, family: int, kind: str, text: str, members: tuple[Member, ...], about: str,
            *, content: str = "", changing: bool = False) -> str:
        """Register a set; return its name, another than usual when that stands for other addresses already.

        content: what the name shall change with; empty: with nothing.
        """
        name = set_name(f"{kind}{family}", text, content)
        if name in self._sets and self._sets[name].members != members:
            name = set_name(f"{kind}{family}", text, f"{content}\0{_text_of(members)}")
        self._sets.setdefault(name, AddressSet(name, family, members, about))
        if changing:
            self._changing.add(name)
        return name

    def nets(self, family: int, nets: Iterable[NetData]) -> str:
        """Return the name of a set of plain nets, all of them longer than 0."""
        members = tuple(Member(str(net)) for net in sorted(set(nets)))
        return self.add(family, "n", _hash(map(str, members)), members, "nets of rules")


def _text_of(members: Iterable[Member]) -> str:
    return ",".join(map(str, members)) or "-"


def _hash(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_DIGITS]


def _spans_of(members: Iterable[Member]) -> tuple[tuple[int, int], ...]:
    """Return spans around the members that are no exceptions."""
    nets = (ipaddress.ip_network(member.net) for member in members if not member.nomatch)
    spans: list[tuple[int, int]] = []
    for first, last in sorted((int(net.network_address), int(net.broadcast_address)) for net in nets):
        if spans and first <= spans[-1][1] + 1:
            spans[-1] = spans[-1][0], max(last, spans[-1][1])
        else:
            spans.append((first, last))
    return tuple(spans) if len(spans) <= _MOST_SPANS else ((spans[0][0], spans[-1][1]),)


class ZoneSets:
    """The zones of one instance, and the sets made of them so far."""

    def __init__(self, description: InstanceDescription, registry: SetRegistry) -> None:
        self._registry = registry
        self._parents = description.parents()
        self._children: dict[str, list[str]] = {}
        for zone, parent in self._parents.items():
            if parent is not None:
                self._children.setdefault(parent, []).append(zone)
        self._nets = {family: _Nets(description, family) for family in (4, 6)}
        self._names: dict[tuple[int, frozenset[str], bool], str | None] = {}
        self._named_hosts = frozenset(zone.name for zone in description.zones if zone.hostnames)
        self._zones_text = _without_addresses(description) if self._named_hosts else ""

    @property
    def can_be_disputed(self) -> bool:
        """True when several zones may have the same address by their host names."""
        return len(self._named_hosts) > 1

    def below(self, zones: Iterable[str], family: int) -> str | None:
        """Return the name of the set of these zones and all below them; None: no address is in it."""
        return self._name(frozenset(zones), family, is_perhaps=False)

    def perhaps(self, zones: Iterable[str], family: int) -> str | None:
        """As below(), with the addresses of which that is disputed."""
        return self._name(frozenset(zones), family, is_perhaps=self.can_be_disputed)

    def _name(self, wanted: frozenset[str], family: int, *, is_perhaps: bool) -> str | None:
        key = family, wanted, is_perhaps
        if key not in self._names:
            self._names[key] = self._make(family, wanted, is_perhaps=is_perhaps)
        return self._names[key]

    def export(self, family: int) -> None:
        """Register the exact set and the subtree set of every zone."""
        for zone in self._parents:
            for kind, zones in (("exact", frozenset((zone,))), ("tree", self._subtree(frozenset((zone,))))):
                members = self._nets[family].members(zones)
                self._registry.add(family, kind, zone, members, f"zone {zone}")

    def _make(self, family: int, wanted: frozenset[str], *, is_perhaps: bool) -> str | None:
        zones = self._subtree(wanted)
        members = self._nets[family].members(zones, is_perhaps=is_perhaps)
        if not members and not zones & self._named_hosts:
            return None
        names = sorted(wanted)
        about = ("perhaps " if is_perhaps else "") + "zone " + " or ".join(names)
        single, text = len(names) == 1, names[0] if len(names) == 1 else _hash(names)
        kind = ("p" if single else "pt") if is_perhaps else ("" if single else "t")
        return self._registry.add(family, kind, text, members, about, content=self._zones_text or _text_of(members),
                                  changing=bool(zones & self._named_hosts))

    def _subtree(self, wanted: frozenset[str]) -> frozenset[str]:
        found: set[str] = set()
        waiting = list(wanted)
        while waiting:
            zone = waiting.pop()
            if zone not in found:
                found.add(zone)
                waiting += self._children.get(zone, ())
        return frozenset(found)


def _without_addresses(description: InstanceDescription) -> str:
    """Return what a policy says about zones, as text, with the instance, whose sets are its own then."""
    zones = [(zone.name, zone.parent, [str(net) for net in zone.nets if net not in zone.addresses], zone.hostnames)
             for zone in description.zones]
    return repr((description.instance, zones))


class _Nets:
    """The nets of all zones of one family, and how they lie in each other."""

    def __init__(self, description: InstanceDescription, family: int) -> None:
        self._width = _WIDTH[family]
        self._owners: dict[Net, str] = {}
        self._disputes: dict[Net, set[str]] = {}
        self._of_zone: dict[str, list[Net]] = {}
        for zone in description.zones:
            for net in zone.nets:
                if family_of(net) == family:
                    self._owners[net.network, net.bits] = zone.name
            for net in zone.disputed:
                if family_of(net) == family:
                    self._disputes.setdefault((net.network, net.bits), set()).add(zone.name)
        for net, owner in self._owners.items():
            self._of_zone.setdefault(owner, []).append(net)
        self._around: dict[Net, Net | None] = {}
        self._inside: dict[Net, list[Net]] = {}
        for net, around in nested(self._owners, self._width):
            self._around[net] = around
            if around is not None:
                self._inside.setdefault(around, []).append(net)

    def members(self, zones: frozenset[str], *, is_perhaps: bool = False) -> tuple[Member, ...]:
        """Return the set of all addresses whose narrowest net belongs to one of these zones.

        Disputed addresses are in it when that is so for all zones that they may be in; is_perhaps:
        for one of them.
        """
        members: dict[Net, bool] = {}                # net -> is an exception
        for zone in zones:
            for net in self._of_zone.get(zone, ()):
                around = self._around[net]
                if around is None or self._owners[around] not in zones:
                    members[net] = False
                for inner in self._inside.get(net, ()):
                    if self._owners[inner] not in zones:
                        members[inner] = True
        if self._disputes:
            owners = prefix_table(self._owners, self._width)
            for net, claimants in self._disputes.items():
                belongs = owners.lookup(net[0]) in zones
                if is_perhaps and not belongs and claimants & zones:
                    members[net] = False
                elif not is_perhaps and belongs and claimants - zones:
                    members[net] = True
        _halve_everything(members, self._owners, zones, self._width)
        return tuple(Member(_text(net, self._width), exception) for net, exception in sorted(members.items()))
