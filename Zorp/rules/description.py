"""What an instance wants from the packet filter, as plain data that another process can check.

Theory of operation
    The process that loads a policy has no rights over the packet filter, and the process that
    has them never loads a policy.  Between the two goes an InstanceDescription, as JSON text:
    zones, rules, services and the addresses that rule listeners have.  Zorp.runtime.describe
    makes one from a loaded policy; Zorp.netfilter compiles several of them.

    from_json() trusts nothing: sizes, kinds, ranges, names and every reference between the parts
    are checked, and whatever is wrong becomes one DescriptionError that says in which instance
    and which rule, zone or service.  What it returns needs no further check.

No policy object, socket or file is touched here.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import re
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from Zorp.rules.engine import DIMENSIONS, NetData, RuleData, depths_of

VERSION = 1
MAX_BYTES = 128 << 20            # of the JSON text
MAX_NAME_BYTES = 1023
MAX_ZONES = 16_384
MAX_NETS = 1_000_000             # of all zones together
MAX_RULES = 65_535
MAX_SERVICES = 65_535
MAX_VALUES = 4_096               # of one dimension of a rule, or of one NAT list
MAX_DEPTH = 31                   # of the zone tree
MAX_LISTENERS = 64

_INSTANCE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.#-]{0,254}")
_IFACE = re.compile(r"[^\s/]{1,15}")
_U32 = 0xFFFFFFFF
_WIDTH = {socket.AF_INET: 32, socket.AF_INET6: 128}

DENY_IPV4 = ("DROP", "TCP_RESET", "ICMP_NET_UNREACHABLE", "ICMP_HOST_UNREACHABLE", "ICMP_PROTO_UNREACHABLE",
             "ICMP_PORT_UNREACHABLE", "ICMP_NET_PROHIBITED", "ICMP_HOST_PROHIBITED", "ICMP_ADMIN_PROHIBITED")
DENY_IPV6 = ("DROP", "TCP_RESET", "ICMP_NO_ROUTE", "ICMP_ADMIN_PROHIBITED", "ICMP_ADDR_UNREACHABLE",
             "ICMP_PORT_UNREACHABLE")


class DescriptionError(ValueError):
    """A description that cannot be used; `str()` names the instance and the object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ZoneData:
    """A zone: its own nets, not those of the zones below it."""

    name: str
    parent: str | None = None
    nets: tuple[NetData, ...] = ()
    hostnames: tuple[str, ...] = ()
    addresses: tuple[NetData, ...] = ()      # those of `nets` that host names have at present; no policy says them
    disputed: tuple[NetData, ...] = ()       # that its host names have at present, and those of other zones, too


@dataclass(frozen=True, slots=True)
class NatData:
    """One entry of a NAT list: connections from source to destination, and the net that replaces one of them."""

    source: NetData
    destination: NetData
    translated: NetData


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyData:
    """A service that a proxy of the instance serves."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardData:
    """A service that the packet filter forwards (PFService)."""

    name: str
    router: tuple[str, int] | None = None    # address and port (0: the client's) to go to; None: as the client wished
    forge_addr: bool = False                 # the server sees the client's address
    snat: tuple[NatData, ...] = ()
    dnat: tuple[NatData, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DenyData:
    """A service that refuses (DenyService)."""

    name: str
    logging: bool = True
    ipv4: str = "DROP"                       # of DENY_IPV4
    ipv6: str = "DROP"                       # of DENY_IPV6


ServiceData = ProxyData | ForwardData | DenyData


@dataclass(frozen=True, slots=True)
class ListenerData:
    """Where the rules of the instance are served."""

    protocol: int                            # socket.IPPROTO_TCP or IPPROTO_UDP
    address: str
    port: int                                # 0: not known before the instance runs

    @property
    def family(self) -> int:
        return int(socket.AF_INET6 if ":" in self.address else socket.AF_INET)


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceDescription:
    """All of it for one instance."""

    instance: str
    zones: tuple[ZoneData, ...] = ()
    services: tuple[ServiceData, ...] = ()
    rules: tuple[RuleData, ...] = ()         # by ascending id
    listeners: tuple[ListenerData, ...] = ()

    def parents(self) -> dict[str, str | None]:
        """Return the administrative parent of every zone."""
        return {zone.name: zone.parent for zone in self.zones}

    def service(self, name: str) -> ServiceData:
        """Return the service of this name; KeyError when there is none."""
        return next(service for service in self.services if service.name == name)


def parse_net(text: str) -> NetData:
    """Return the net of "address/bits"; raises ValueError, also for host bits that are set."""
    net = ipaddress.ip_network(text)
    return NetData(int(socket.AF_INET if net.version == 4 else socket.AF_INET6), int(net.network_address),
                   net.prefixlen)


# ---------------------------------------------------------------------------- to text

def to_json(description: InstanceDescription) -> str:
    """Return the description as one line of JSON."""
    value = {
        "version": VERSION,
        "instance": description.instance,
        "zones": [{"name": zone.name, "parent": zone.parent, "nets": _texts(zone.nets),
                   "hostnames": list(zone.hostnames)} for zone in description.zones],
        "services": [_service_value(service) for service in description.services],
        "rules": [_rule_value(rule) for rule in description.rules],
        "listeners": [dataclasses.asdict(listener) for listener in description.listeners],
    }
    return json.dumps(value, separators=(",", ":"))


def _texts(nets: Iterable[NetData]) -> list[str]:
    return [str(net) for net in nets]


def _service_value(service: ServiceData) -> dict:
    value: dict = {"kind": _KIND_OF[type(service)], **dataclasses.asdict(service)}
    if isinstance(service, ForwardData):
        for side in ("snat", "dnat"):
            value[side] = [[str(entry.source), str(entry.destination), str(entry.translated)]
                           for entry in getattr(service, side)]
    return value


def _rule_value(rule: RuleData) -> dict:
    value: dict = {"rule_id": rule.rule_id, "service": rule.service}
    for dimension in DIMENSIONS:
        values = getattr(rule, dimension)
        if values:
            value[dimension] = _texts(values) if dimension.endswith("_subnet") else list(values)
    return value


_KIND_OF = {ProxyData: "proxy", ForwardData: "forward", DenyData: "deny"}


# ---------------------------------------------------------------------------- from text

def from_json(text: str | bytes) -> InstanceDescription:
    """Return the description in a JSON text, checked; raises DescriptionError for anything else."""
    if len(text) > MAX_BYTES:
        raise DescriptionError(f"description of {len(text)} bytes, at most {MAX_BYTES} are read")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise DescriptionError(f"not a description: {problem}") from None
    return _Reader().read(value)


def check(description: InstanceDescription) -> None:
    """Check what a program made, as if it had come as text; raises DescriptionError."""
    from_json(to_json(description))


class _Reader:
    """One pass over the decoded text; `_where` is the object that is being read."""

    def __init__(self) -> None:
        self._where = "description"

    def read(self, value: object) -> InstanceDescription:
        fields = self._fields(value, {"version", "instance", "zones", "services", "rules", "listeners"})
        if fields["version"] != VERSION:
            self._fail(f"version {fields['version']!r} is not {VERSION}; use programs of one release")
        instance = fields["instance"]
        if not isinstance(instance, str) or not _INSTANCE_NAME.fullmatch(instance):
            self._fail(f"invalid instance name {instance!r}")
        self._instance = f"instance '{instance}'"
        self._where = self._instance
        zones = tuple(map(self._zone, self._list(fields["zones"], MAX_ZONES, "zones")))
        self._check_zones(zones)
        services = tuple(map(self._service, self._list(fields["services"], MAX_SERVICES, "services")))
        self._where = self._instance
        self._unique("service", (service.name for service in services))
        known = frozenset(service.name for service in services)
        rules = tuple(self._rule(rule, known, frozenset(zone.name for zone in zones))
                      for rule in self._list(fields["rules"], MAX_RULES, "rules"))
        self._where = self._instance
        self._unique("rule id", (rule.rule_id for rule in rules))
        listeners = tuple(map(self._listener, self._list(fields["listeners"], MAX_LISTENERS, "listeners")))
        return InstanceDescription(instance=instance, zones=zones, services=services,
                                   rules=tuple(sorted(rules, key=lambda rule: rule.rule_id)), listeners=listeners)

    # ---- zones

    def _zone(self, value: object) -> ZoneData:
        self._where = self._instance
        fields = self._fields(value, {"name", "parent", "nets", "hostnames"})
        name = self._name(fields["name"])
        self._where = f"{self._instance}, zone '{name}'"
        parent = fields["parent"]
        hostnames = self._list(fields["hostnames"], MAX_VALUES, "hostnames")
        return ZoneData(name=name, parent=None if parent is None else self._name(parent),
                        nets=tuple(map(self._net, self._list(fields["nets"], MAX_NETS, "nets"))),
                        hostnames=tuple(map(self._name, hostnames)))

    def _check_zones(self, zones: tuple[ZoneData, ...]) -> None:
        self._where = self._instance
        self._unique("zone", (zone.name for zone in zones))
        if sum(len(zone.nets) for zone in zones) > MAX_NETS:
            self._fail(f"more than {MAX_NETS} nets")
        owners: dict[NetData, str] = {}
        seen: set[str] = set()
        for zone in zones:
            self._where = f"{self._instance}, zone '{zone.name}'"
            if zone.parent is not None and zone.parent not in seen:
                self._fail(f"parent '{zone.parent}' is not a zone before it")
            seen.add(zone.name)
            for net in zone.nets:
                if net in owners:
                    self._fail(f"duplicate subnet detected; zone1='{owners[net]}', zone2='{zone.name}', net='{net}'")
                owners[net] = zone.name
        for name, depth in depths_of({zone.name: zone.parent for zone in zones}).items():
            if depth > MAX_DEPTH:
                self._where = f"{self._instance}, zone '{name}'"
                self._fail(f"depth {depth}, at most {MAX_DEPTH} zones may stand above each other")

    # ---- services

    def _service(self, value: object) -> ServiceData:
        self._where = self._instance
        name = self._name(value.get("name") if isinstance(value, dict) else None)
        self._where = f"{self._instance}, service '{name}'"
        kind = value.get("kind")
        if kind == "proxy":
            self._fields(value, {"kind", "name"})
            return ProxyData(name=name)
        if kind == "forward":
            fields = self._fields(value, {"kind", "name", "router", "forge_addr", "snat", "dnat"})
            return ForwardData(
                name=name, router=self._router(fields["router"]), forge_addr=self._flag(fields["forge_addr"]),
                snat=self._nat(fields["snat"]), dnat=self._nat(fields["dnat"]))
        if kind == "deny":
            fields = self._fields(value, {"kind", "name", "logging", "ipv4", "ipv6"})
            return DenyData(name=name, logging=self._flag(fields["logging"]),
                            ipv4=self._choice(fields["ipv4"], DENY_IPV4), ipv6=self._choice(fields["ipv6"], DENY_IPV6))
        return self._fail(f"unknown kind of service {kind!r}")

    def _router(self, value: object) -> tuple[str, int] | None:
        if value is None:
            return None
        address, port = self._list(value, 2, "router", exactly=True)
        return self._address(address), self._number(port, 0, 65_535)

    def _nat(self, value: object) -> tuple[NatData, ...]:
        entries = []
        for item in self._list(value, MAX_VALUES, "NAT entries"):
            entry = NatData(*map(self._net, self._list(item, 3, "NAT entry", exactly=True)))
            if len({entry.source.family, entry.destination.family, entry.translated.family}) != 1:
                self._fail("NAT entry with nets of several families")
            entries.append(entry)
        return tuple(entries)

    # ---- rules

    def _rule(self, value: object, services: frozenset[str], zones: frozenset[str]) -> RuleData:
        self._where = self._instance
        rule_id = self._number(value.get("rule_id") if isinstance(value, dict) else None, 1, _U32)
        self._where = f"{self._instance}, rule {rule_id}"
        self._fields(value, {"rule_id", "service"}, frozenset(DIMENSIONS))
        service = self._name(value["service"])
        if service not in services:
            self._fail(f"unknown service '{service}'")
        dimensions = {}
        for dimension in DIMENSIONS:
            if dimension in value:
                read = getattr(self, _DIMENSION_READERS[dimension])
                dimensions[dimension] = tuple(map(read, self._list(value[dimension], MAX_VALUES, dimension)))
                if not dimensions[dimension]:
                    self._fail(f"{dimension} without a value would match everything")
        for zone in (*dimensions.get("src_zone", ()), *dimensions.get("dst_zone", ())):
            if zone not in zones:
                self._fail(f"unknown zone '{zone}'")
        return RuleData(rule_id=rule_id, service=service, **dimensions)

    def _u32(self, value: object) -> int:
        return self._number(value, 0, _U32)

    def _octet(self, value: object) -> int:
        return self._number(value, 0, 255)

    def _ports(self, value: object) -> tuple[int, int]:
        low, high = (self._number(port, 0, 65_535) for port in self._list(value, 2, "port range", exactly=True))
        if low > high:
            self._fail(f"port range {low} to {high}")
        return low, high

    def _iface(self, value: object) -> str:
        if not isinstance(value, str) or not _IFACE.fullmatch(value) or not value.isprintable():
            self._fail(f"invalid interface name {value!r}")
        return value

    def _listener(self, value: object) -> ListenerData:
        self._where = f"{self._instance}, listener"
        fields = self._fields(value, {"protocol", "address", "port"})
        if fields["protocol"] not in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
            self._fail(f"invalid protocol {fields['protocol']!r}")
        address = self._address(fields["address"])
        if not ipaddress.ip_address(address).is_loopback:
            self._fail(f"address {address} is not on loopback")
        return ListenerData(int(fields["protocol"]), address, self._number(fields["port"], 0, 65_535))

    # ---- values

    def _fail(self, problem: str):
        raise DescriptionError(f"{self._where}: {problem}")

    def _fields(self, value: object, needed: set[str], optional: frozenset[str] = frozenset()) -> dict:
        if not isinstance(value, dict):
            self._fail(f"an object was expected, not {type(value).__name__}")
        if missing := needed - value.keys():
            self._fail(f"{sorted(missing)[0]} is missing")
        if unknown := value.keys() - needed - optional:
            self._fail(f"unknown field {sorted(unknown)[0]!r}")
        return value

    def _list(self, value: object, most: int, what: str, *, exactly: bool = False) -> list:
        if not isinstance(value, list) or len(value) > most or (exactly and len(value) != most):
            self._fail(f"{what}: a list of {'' if exactly else 'at most '}{most} values was expected")
        return value

    def _name(self, value: object) -> str:
        if not isinstance(value, str) or not 1 <= len(value.encode("utf-8", "surrogatepass")) <= MAX_NAME_BYTES:
            self._fail(f"a name of 1 to {MAX_NAME_BYTES} bytes was expected, not {str(value)[:40]!r}")
        return value

    def _number(self, value: object, low: int, high: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self._fail(f"a number from {low} to {high} was expected, not {str(value)[:40]!r}")
        return value

    def _flag(self, value: object) -> bool:
        if not isinstance(value, bool):
            self._fail(f"true or false was expected, not {str(value)[:40]!r}")
        return value

    def _choice(self, value: object, choices: tuple[str, ...]) -> str:
        if value not in choices:
            self._fail(f"one of {', '.join(choices)} was expected, not {str(value)[:40]!r}")
        return value

    def _net(self, value: object) -> NetData:
        return self._ip(value, parse_net, "a net")

    def _address(self, value: object) -> str:
        return str(self._ip(value, ipaddress.ip_address, "an address"))

    def _ip(self, value: object, read: Callable, what: str):
        if isinstance(value, str) and len(value) <= 64 and "%" not in value:
            try:
                return read(value)
            except ValueError:
                pass
        return self._fail(f"{what} was expected, not {str(value)[:40]!r}")

    def _unique(self, what: str, values: Iterable) -> None:
        seen = set()
        for value in values:
            if value in seen:
                self._fail(f"{what} '{value}' given twice")
            seen.add(value)


_DIMENSION_READERS = {
    "reqid": "_u32", "iface": "_iface", "ifgroup": "_u32", "proto": "_octet", "proto_type": "_octet",
    "proto_subtype": "_octet", "src_port": "_ports", "dst_port": "_ports", "src_subnet": "_net", "src_zone": "_name",
    "dst_subnet": "_net", "dst_iface": "_iface", "dst_ifgroup": "_u32", "dst_zone": "_name",
}
