"""Which zone an address belongs to: the narrowest net around it, and names resolved to addresses.

Theory of operation
    Zones register their static nets while a policy loads.  The first look-up afterwards
    compiles them into one PrefixTable per family; a look-up takes the present tables with one
    attribute read and never waits.

    Zones may also name hosts.  Resolving is another process's business: whoever knows the
    addresses gives them to feed(), which makes new tables and puts them in place in one step.
    Every resolved address is a full-length net, so it wins over every wider static net.  Three
    rules settle conflicts:

        a static net of full length keeps its address;
        an address resolved for names of two zones belongs to neither of them; it is disputed;
        two names of one zone may share addresses.

    Who moves a name to the address of another one takes that address out of a zone, and must not
    take it out of a refusal as well.  So claimants() tells the zones that a disputed address may
    be in, and whoever decides about connections permits only what is permitted whichever of them
    it is (Zorp.rules.engine, agreed()).

    A name keeps its last addresses until feed() gives it others, so a resolver that stops
    answering takes nothing away from anybody.

    IPv4-mapped IPv6 addresses (::ffff:a.b.c.d) are looked up as the IPv4 address, and nets of
    such addresses are registered as IPv4 nets; otherwise a dual-stack peer would escape every
    IPv4 zone.

Not accepted from the DNS
    Unspecified, loopback, multicast and broadcast addresses, addresses of the firewall itself,
    and more than MAX_ADDRESSES_PER_NAME per name: a name server could otherwise hand out rights
    over the firewall, or fill our memory.
"""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from Zorp.Constants import AF_INET, AF_INET6, CORE_ERROR, CORE_INFO, CORE_POLICY
from Zorp.Log import log
from Zorp.transport.hostaddr import is_for_one_remote_host
from Zorp.zones.prefix_table import PrefixTable, prefix_table

MAX_ADDRESSES_PER_NAME = 256
_WIDTH = {AF_INET: 32, AF_INET6: 128}
_MOST_SHOWN = 8                   # addresses of one dispute in the log
_MAPPED = 0xFFFF                  # RFC 4291, 2.5.5.2: the upper 96 bits of ::ffff:0:0/96

Net = tuple[int, int, int]        # family, network in host order, prefix length


def unmapped_address(family: int, address: int) -> tuple[int, int]:
    """Return (family, host order integer), IPv4-mapped IPv6 addresses as IPv4."""
    if family == AF_INET6 and address >> 32 == _MAPPED:
        return AF_INET, address & 0xFFFFFFFF
    return family, address


def unmapped_net(family: int, network: int, bits: int) -> Net:
    """Return (family, network, prefix length), nets of IPv4-mapped IPv6 addresses as IPv4 nets."""
    if family == AF_INET6 and bits >= 96 and network >> 32 == _MAPPED:
        return AF_INET, network & 0xFFFFFFFF, bits - 96
    return family, network, bits


@dataclass(frozen=True, slots=True)
class _Tables:
    """Everything a look-up needs; replaced as a whole."""

    inet: PrefixTable
    inet6: PrefixTable
    resolved_inet: dict            # host order integer -> zone
    resolved_inet6: dict
    disputed: dict                 # (family, host order integer) -> zones


class _Resolved(NamedTuple):
    """What the addresses of host names amount to."""

    inet: dict                     # host order integer -> zone
    inet6: dict
    disputed: dict                 # (family, host order integer) -> zones, by name


class ZoneTable:
    """The nets of all zones.

    Any thread may look up or feed.  _nets_lock guards _nets, _resolved, _disputed and the making of
    _tables; look-ups read _tables without it, which is replaced and never changed.
    """

    def __init__(self) -> None:
        self._nets_lock = threading.Lock()
        self._nets: dict[Net, object] = {}                     # static net -> zone
        self._resolved: dict[str, frozenset] = {}              # host name -> {(family, host order integer)}
        self._names: dict[str, object] = {}                    # host name -> zone
        self._disputed: dict = {}                              # as of the last feed(), for the log
        self._tables: _Tables | None = None
        self.has_access_lists = False                          # some zone lists services; set while loading
        self.has_disputes = False                              # claimants() has something to say; read without lock

    # ------------------------------------------------------------------ filled while a policy loads

    def owner(self, net: Net):
        """Return the zone that has exactly this static net, or None."""
        return self._nets.get(net)

    def name_owner(self, hostname: str):
        """Return the zone that names this host, or None."""
        return self._names.get(hostname)

    def add(self, zone, nets: Iterable[Net], hostnames: Iterable[str]) -> None:
        """Register a zone; that no other zone has these nets and names is the caller's business."""
        with self._nets_lock:
            self._nets.update((net, zone) for net in nets)
            self._names.update((hostname, zone) for hostname in hostnames)
            self._tables = None

    def clear(self) -> None:
        """Forget all zones."""
        with self._nets_lock:
            self._nets.clear()
            self._names.clear()
            self._resolved.clear()
            self._disputed = {}
            self._tables = None
            self.has_access_lists = self.has_disputes = False

    # ------------------------------------------------------------------ look-ups

    def lookup(self, address):
        """Return the zone of a SockAddr, or of a Subnet's network address; None: no zone holds it."""
        value = getattr(address, "ip_int", None)
        if value is None and (value := getattr(address, "network_int", None)) is None:
            return None
        family = address.family
        tables = self._tables or self._compile()
        if family == AF_INET6 and value >> 32 != _MAPPED:
            return tables.resolved_inet6.get(value) or tables.inet6.lookup(value)
        value &= 0xFFFFFFFF
        return tables.resolved_inet.get(value) or tables.inet.lookup(value)

    def prefix_length(self, address) -> int:
        """Return the prefix length of the net by which lookup() finds a zone; -1: it finds none.  Not for hot code."""
        found = _number(address)
        if found is None:
            return -1
        family, value = unmapped_address(*found)
        tables, width = self._tables or self._compile(), _WIDTH[family]
        if value in (tables.resolved_inet if family == AF_INET else tables.resolved_inet6):
            return width
        return next((bits for bits in range(width, -1, -1)
                     if (family, value >> (width - bits) << (width - bits), bits) in self._nets), -1)

    def lookup_static(self, address):
        """As lookup(), but host names do not count."""
        found = _number(address)
        if found is None:
            return None
        family, value = unmapped_address(*found)
        tables = self._tables or self._compile()
        return (tables.inet if family == AF_INET else tables.inet6).lookup(value)

    def lookup_static_exactly(self, address):
        """Return the zone that has this address as a static net of full length, or None."""
        found = _number(address)
        if found is None:
            return None
        family, value = unmapped_address(*found)
        return self._nets.get((family, value, _WIDTH[family]))

    def claimants(self, address) -> tuple:
        """Return the zones that a disputed address may be in, apart from the one that lookup() tells; () for others."""
        tables = self._tables or self._compile()
        found = _number(address) if tables.disputed else None
        return tables.disputed.get(unmapped_address(*found), ()) if found is not None else ()

    def compile(self) -> None:
        """Make the tables now, so that no connection has to wait for them."""
        self._compile()

    def _compile(self) -> _Tables:
        with self._nets_lock:
            if self._tables is None:
                by_family: dict[int, dict] = {AF_INET: {}, AF_INET6: {}}
                for (family, network, bits), zone in self._nets.items():
                    by_family[family][network, bits] = zone
                self._tables = _Tables(*(prefix_table(by_family[family], _WIDTH[family]) for family in _WIDTH),
                                       *self._resolved_addresses())
                self.has_disputes = bool(self._tables.disputed)
            return self._tables

    # ------------------------------------------------------------------ resolved host names

    def feed(self, answers: Mapping[str, Iterable[str]]) -> list[str]:
        """Replace the addresses of the host names given, all in one step; return the names whose addresses changed.

        Addresses are texts of both families.  Names that no zone has are ignored.
        """
        fresh = {hostname.rstrip(".").lower(): addresses for hostname, addresses in answers.items()}
        fresh = {hostname: _acceptable(hostname, addresses) for hostname, addresses in fresh.items()}
        with self._nets_lock:
            changed = {hostname: (self._resolved.get(hostname, frozenset()), addresses, self._names[hostname])
                       for hostname, addresses in fresh.items()
                       if hostname in self._names and addresses != self._resolved.get(hostname, frozenset())}
            self._resolved.update((hostname, fresh[hostname]) for hostname in changed)
            disputed, before = {}, {}
            if changed:
                resolved = self._resolved_addresses()
                before, self._disputed = self._disputed, resolved.disputed
                disputed = resolved.disputed
                if self._tables is not None:
                    self._tables = _Tables(self._tables.inet, self._tables.inet6, *resolved)
                    self.has_disputes = bool(disputed)
        _report_disputes(before, disputed)
        for hostname, (former, after, zone) in changed.items():
            log(None, CORE_INFO, 4, "Addresses of a host name changed; zone='%s', host='%s', added='%s', removed='%s'",
                (zone.getName(), hostname, _texts(after - former), _texts(former - after)))
        return list(changed)

    def hostnames(self) -> tuple[str, ...]:
        """Return every host name that zones have: what a resolver must keep fresh."""
        return tuple(self._names)

    def resolved_nets(self) -> dict[Net, object]:
        """Return the nets of full length that zones have by their host names now, and these zones."""
        with self._nets_lock:
            resolved = self._resolved_addresses()
        return {(family, value, _WIDTH[family]): zone
                for family, zones in ((AF_INET, resolved.inet), (AF_INET6, resolved.inet6))
                for value, zone in zones.items()}

    def disputed_nets(self) -> dict[Net, tuple]:
        """Return the disputed addresses as nets of full length, and the zones whose names have them."""
        with self._nets_lock:
            disputed = self._resolved_addresses().disputed
        return {(family, value, _WIDTH[family]): zones for (family, value), zones in disputed.items()}

    def _resolved_addresses(self) -> _Resolved:
        """Return whose every resolved address is that no static net has."""
        owners: dict[tuple[int, int], set] = {}
        for hostname, addresses in self._resolved.items():
            for address in addresses:
                owners.setdefault(address, set()).add(self._names[hostname])
        resolved = _Resolved({}, {}, {})
        for (family, value), zones in owners.items():
            if (family, value, _WIDTH[family]) in self._nets:
                continue
            if len(zones) > 1:
                resolved.disputed[family, value] = tuple(sorted(zones, key=lambda zone: zone.getName()))
            else:
                (resolved.inet if family == AF_INET else resolved.inet6)[value] = next(iter(zones))
        return resolved


def _report_disputes(before: Mapping, now: Mapping) -> None:
    """Log which addresses have become disputed and which are so no longer; one line per set of zones."""
    for level, tag, text, addresses, known in (
            (2, CORE_ERROR, "Host names of several zones have the same addresses, connections are refused unless all "
             "these zones permit them", now, before),
            (4, CORE_INFO, "Host names of several zones do not have the same addresses any more", before, now)):
        by_zones: dict[tuple, list] = {}
        for address, zones in addresses.items():
            if known.get(address) != zones:
                by_zones.setdefault(zones, []).append(address)
        for zones, found in by_zones.items():
            shown = _texts(sorted(found)[:_MOST_SHOWN]) + (",..." if len(found) > _MOST_SHOWN else "")
            log(None, tag, level, text + "; zones='%s', addresses='%s', count='%d'",
                (",".join(zone.getName() for zone in zones), shown, len(found)))


def _number(address) -> tuple[int, int] | None:
    """Return (family, host order integer) of a SockAddr or Subnet; None for what has no IP address."""
    value = getattr(address, "ip_int", None)
    if value is None:
        value = getattr(address, "network_int", None)
    return None if value is None else (address.family, value)


def _acceptable(hostname: str, addresses: Iterable[str]) -> frozenset:
    """Return {(family, integer)} of those addresses that a zone may have; the others are reported."""
    kept = set()
    for text in addresses:
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            address = None
        if address is not None and address.version == 6 and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        if address is None or len(kept) >= MAX_ADDRESSES_PER_NAME or not is_for_one_remote_host(address.packed):
            log(None, CORE_POLICY, 2, "Address of host name is not used; hostname='%s', address='%s'", (hostname, text))
        else:
            kept.add((AF_INET if address.version == 4 else AF_INET6, int(address)))
    return frozenset(kept)


def _texts(addresses: Iterable[tuple[int, int]]) -> str:
    return ",".join(str(ipaddress.IPv4Address(value) if family == AF_INET else ipaddress.IPv6Address(value))
                    for family, value in sorted(addresses))
