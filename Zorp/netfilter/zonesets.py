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
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Mapping

from Zorp.netfilter.plan import MAX_SET_NAME_BYTES, SET_PREFIX, AddressSet, Member
from Zorp.rules.description import InstanceDescription
from Zorp.rules.engine import NetData
from Zorp.zones.prefix_table import Net, nested

_WIDTH = {4: 32, 6: 128}
_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-")
_HASH_DIGITS = 12


def family_of(net: NetData) -> int:
    """Return 4 or 6."""
    return 4 if net.family == 2 else 6


def set_name(kind: str, text: str) -> str:
    """Return a name for a set: legible when the text permits it, else with a hash at its end.

    Names of different (kind, text) differ; "~" occurs in hashed names only.
    """
    name = f"{SET_PREFIX}{kind}.{text}"
    if len(name.encode("utf-8", "surrogatepass")) <= MAX_SET_NAME_BYTES and set(text) <= _PLAIN:
        return name
    digest = hashlib.sha256(f"{kind}\0{text}".encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_DIGITS]
    room = MAX_SET_NAME_BYTES - len(f"{SET_PREFIX}{kind}.~") - _HASH_DIGITS
    legible = "".join(letter if letter in _PLAIN else "_" for letter in text)[:room]
    return f"{SET_PREFIX}{kind}.{legible}~{digest}"


def members_of(owners: Mapping[Net, bool], width: int) -> tuple[Member, ...]:
    """Return the set of all addresses whose narrowest net is mapped to True.

    owners: every net there is, (network, prefix length) to whether it is inside.
    """
    members: dict[Net, bool] = {}                    # net -> is an exception
    state: dict[Net, bool] = {}
    for net, around in nested(owners, width):
        inside = state[net] = owners[net]
        if inside == (state[around] if around is not None else False):
            continue
        members[net] = not inside
    _halve_everything(members, owners, width)
    return tuple(Member(_text(net, width), exception) for net, exception in sorted(members.items()))


def _halve_everything(members: dict[Net, bool], owners: Mapping[Net, bool], width: int) -> None:
    """Replace the net of length 0, which hash:net refuses, by its halves."""
    if (0, 0) not in members:
        return
    del members[0, 0]
    for half in ((0, 1), (1 << (width - 1), 1)):
        if half in owners and not owners[half]:
            members.pop(half, None)                  # nothing is left around it that it would be an exception to
        else:
            members[half] = False


def _text(net: Net, width: int) -> str:
    address = ipaddress.IPv4Address(net[0]) if width == 32 else ipaddress.IPv6Address(net[0])
    return f"{address}/{net[1]}"


class SetRegistry:
    """The sets of a plan; equal content under an equal name is one set."""

    def __init__(self) -> None:
        self._sets: dict[str, AddressSet] = {}

    def all(self) -> tuple[AddressSet, ...]:
        """Return the sets by name."""
        return tuple(self._sets[name] for name in sorted(self._sets))

    def add(self, family: int, kind: str, text: str, members: tuple[Member, ...], about: str) -> str:
        """Register a set; return its name, another than usual when that stands for other addresses already."""
        name = set_name(f"{kind}{family}", text)
        if name in self._sets and self._sets[name].members != members:
            name = set_name(f"{kind}{family}", f"{text}\0{','.join(map(str, members))}")
        self._sets.setdefault(name, AddressSet(name, family, members, about))
        return name

    def nets(self, family: int, nets: Iterable[NetData]) -> str:
        """Return the name of a set of plain nets, all of them longer than 0."""
        members = tuple(Member(str(net)) for net in sorted(set(nets)))
        return self.add(family, "n", _hash(map(str, members)), members, "nets of rules")


def _hash(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_DIGITS]


class ZoneSets:
    """The zones of one instance, and the sets made of them so far."""

    def __init__(self, description: InstanceDescription, registry: SetRegistry) -> None:
        self._registry = registry
        self._parents = description.parents()
        self._owners: dict[int, dict[Net, str]] = {4: {}, 6: {}}
        for zone in description.zones:
            for net in zone.nets:
                self._owners[family_of(net)][net.network, net.bits] = zone.name
        self._names: dict[tuple[int, frozenset[str]], str | None] = {}
        self._named_hosts = frozenset(zone.name for zone in description.zones if zone.hostnames)

    def below(self, zones: Iterable[str], family: int) -> str | None:
        """Return the name of the set of these zones and all below them; None: no address is in it."""
        wanted = frozenset(zones)
        key = family, wanted
        if key not in self._names:
            self._names[key] = self._make(family, wanted, self._subtree(wanted), "t")
        return self._names[key]

    def export(self, family: int) -> None:
        """Register the exact set and the subtree set of every zone."""
        for zone in self._parents:
            for kind, zones in (("exact", frozenset((zone,))), ("tree", self._subtree(frozenset((zone,))))):
                members = self._members(family, zones)
                self._registry.add(family, kind, zone, members, f"zone {zone}")

    def _make(self, family: int, wanted: frozenset[str], zones: frozenset[str], kind: str) -> str | None:
        members = self._members(family, zones)
        if not members and not zones & self._named_hosts:
            return None
        names = sorted(wanted)
        about = "zone " + " or ".join(names)
        return self._registry.add(family, "", names[0], members, about) if len(names) == 1 else \
            self._registry.add(family, kind, _hash(names), members, about)

    def _members(self, family: int, zones: frozenset[str]) -> tuple[Member, ...]:
        return members_of({net: owner in zones for net, owner in self._owners[family].items()}, _WIDTH[family])

    def _subtree(self, wanted: frozenset[str]) -> frozenset[str]:
        inside: dict[str, bool] = {}
        for zone, parent in self._parents.items():       # parents come before their children
            inside[zone] = zone in wanted or (parent is not None and inside[parent])
        return frozenset(zone for zone, is_in in inside.items() if is_in)
