"""Where a dispatcher listens: an address, an interface, or a group of interfaces.

Theory of operation
    A policy makes these objects and hands them to dispatchers as `bindto`; a session shows the
    one it came through as `client_listen`.  They open nothing.  The dispatch table shares one
    socket between registrations whose key() is equal; a key is plain frozen data, so the
    worker can also ask its master for a listening socket by key.

    A DBSockAddr made with port 0 gets the real port in its `sa` once the socket is bound.

Deviations
    A bad `ip` of DBIface is a ValueError; the original ended the process.
"""

from __future__ import annotations

import abc
import re
import socket
from typing import NamedTuple

from Zorp.Constants import AF_INET, ZD_PROTO_AUTO, ZD_PROTO_NAME
from Zorp.Exceptions import PolicyError
from Zorp.language import arguments
from Zorp.SockAddr import SockAddrInet, SockAddrType

ZD_BIND_SOCKADDR = 1
ZD_BIND_IFACE = 2
ZD_BIND_IFACE_GROUP = 3

_GROUP_NAMES_FILE = "/etc/iproute2/rt_ifgroup"       # lines: hexadecimal number, name
_C_INTEGER = re.compile(r"\s*(?:0[xX](?P<hex>[0-9a-fA-F]+)|0(?P<octal>[0-7]+)|(?P<decimal>[0-9]+))\s*", re.ASCII)
_INTERFACE_NAME = re.compile(r"[^\s/\0]{1,15}")

__all__ = ["BindKey", "DBIface", "DBIfaceGroup", "DBIfaceGroupType", "DBIfaceType", "DBSockAddr",
           "DBSockAddrType", "DispatchBindType", "protocol_name"]


class BindKey(NamedTuple):
    """What makes two binds the same socket.  Plain data: equal, hashable, can be sent."""

    kind: int                 # 1 address, 2 interface, 3 interface group
    protocol: int             # ZD_PROTO_...
    family: int
    place: str                # the address; "iface ip"; the number of the group
    port: int


def protocol_name(protocol) -> str:
    """Return "AUTO", "TCP" or "UDP", or "Unknown(n)"."""
    if isinstance(protocol, int) and 0 <= protocol < len(ZD_PROTO_NAME):
        return ZD_PROTO_NAME[protocol]
    return f"Unknown({protocol})"


class DispatchBindType(abc.ABC):
    """Base of the three bind objects.  `protocol` may be changed until a dispatcher uses it."""

    type = 0
    protocol = ZD_PROTO_AUTO

    @abc.abstractmethod
    def key(self) -> BindKey:
        """Return what this bind stands for now."""

    @abc.abstractmethod
    def format(self):
        """Return the text that logs and thread names use."""

    def __eq__(self, other):
        return isinstance(other, DispatchBindType) and self.key() == other.key()

    def __hash__(self):
        return hash(self.key())

    def __repr__(self):
        return str(self)


class DBSockAddr(DispatchBindType):
    """One IPv4 or IPv6 address and port; port 0 means any free one.

    Raises ValueError "Expected SockAddr" for anything else.
    """

    type = ZD_BIND_SOCKADDR

    def __init__(self, sa, protocol=ZD_PROTO_AUTO):
        if not isinstance(sa, SockAddrType) or sa.family not in (socket.AF_INET, socket.AF_INET6):
            raise PolicyError("Expected SockAddr", remedy="give DBSockAddr a SockAddrInet or SockAddrInet6")
        self.sa = sa
        self.protocol = _checked_protocol(protocol)

    def key(self) -> BindKey:
        return BindKey(self.type, self.protocol, int(self.sa.family), self.sa.ip_s, self.sa.port)

    def format(self):
        return f"SA(proto={self.protocol},addr={self.sa})"

    def __str__(self):
        return f"SockAddrInet({self.sa})"


class DBIface(DispatchBindType):
    """Every IPv4 address of an interface, or `ip` alone, as long as the interface has it.

    Arguments:
        iface: name; it need not exist yet.
        port: 1 to 65535.
        ip: listen on this address of the interface only; "0.0.0.0" means on all.

    Raises ValueError: "Interface bound dispatches require a non-zero port", a bad ip or family.
    """

    type = ZD_BIND_IFACE

    def __init__(self, iface, port, family=AF_INET, protocol=ZD_PROTO_AUTO, ip="0.0.0.0"):
        _check_port(port, "Interface bound dispatches require a non-zero port", f"iface='{iface}'")
        _check_family(family, f"iface='{iface}'")
        if not isinstance(iface, str) or not _INTERFACE_NAME.fullmatch(iface):
            raise PolicyError(f"Invalid interface name; iface='{iface}'",
                              remedy="an interface name has 1 to 15 characters, none of them a blank or a slash")
        try:
            self._address = SockAddrInet(ip, port)
        except ValueError:
            raise PolicyError(f"Error parsing bind ip of dispatcher; interface='{iface}', ip='{ip}'",
                              remedy="give ip as a dotted IPv4 address") from None
        self.iface = iface
        self.port = port
        self.family = int(family)
        self.protocol = _checked_protocol(protocol)

    @property
    def ip(self):
        """The address in network order, read as a native integer, as SockAddrInet.ip is."""
        return self._address.ip

    @ip.setter
    def ip(self, value):
        self._address.ip = value

    @property
    def ip_s(self):
        """The address as dotted text."""
        return self._address.ip_s

    @ip_s.setter
    def ip_s(self, value):
        self._address.ip_s = value

    def key(self) -> BindKey:
        return BindKey(self.type, self.protocol, self.family, f"{self.iface} {self.ip_s}", self.port)

    def format(self):
        return (f"IFACE(proto={self.protocol},iface={self.iface},ip={self.ip_s},"
                f"port={self.port},family={self.family})")

    def __str__(self):
        return f"DBIface(iface={self.iface}, port={self.port})"


class DBIfaceGroup(DispatchBindType):
    """Every IPv4 address of every interface in a group, as long as it is there.

    Arguments:
        group: a number, a numeric text in any C base, or a name from /etc/iproute2/rt_ifgroup.
        port: 1 to 65535.

    Raises ValueError "Interface Group bound dispatches require a non-zero port" and RuntimeError
    "Error resolving interface group name".
    """

    type = ZD_BIND_IFACE_GROUP

    def __init__(self, group, port, family=AF_INET, protocol=ZD_PROTO_AUTO):
        _check_port(port, "Interface Group bound dispatches require a non-zero port", f"group='{group}'")
        _check_family(family, f"group='{group}'")
        self.group = _group_number(group)
        self.port = port
        self.family = int(family)
        self.protocol = _checked_protocol(protocol)

    def key(self) -> BindKey:
        return BindKey(self.type, self.protocol, self.family, str(self.group), self.port)

    def format(self):
        return f"IFGROUP(proto={self.protocol},iface_group=0x{self.group:x},port={self.port},family={self.family})"

    def __str__(self):
        return f"DBIfaceGroup(group={self.group}, port={self.port})"


DBSockAddrType = DBSockAddr
DBIfaceType = DBIface
DBIfaceGroupType = DBIfaceGroup


def _checked_protocol(protocol) -> int:
    if not isinstance(protocol, int) or not 0 <= protocol < len(ZD_PROTO_NAME):
        raise arguments.invalid("a bind object", "protocol", protocol, "give ZD_PROTO_TCP or ZD_PROTO_UDP")
    return int(protocol)


def _check_port(port, problem: str, where: str) -> None:
    if not isinstance(port, int) or not 0 < port <= 0xFFFF:
        raise PolicyError(f"{problem}; {where}, port='{port}'", remedy="give the port to listen on, 1 to 65535")


def _check_family(family, where: str) -> None:
    if family != AF_INET:
        raise PolicyError(f"Interface bound dispatches are IPv4 only; {where}, family='{family}'",
                          remedy="leave family out, or bind to a SockAddrInet6")


def _group_number(group) -> int:
    if isinstance(group, int) and 0 <= group < 1 << 32:
        return group
    if isinstance(group, str):
        if (number := _C_INTEGER.fullmatch(group)) is not None:
            return int(number["hex"] or number["octal"] or number["decimal"],
                       16 if number["hex"] else 8 if number["octal"] else 10)
        named = _named_groups().get(group)
        if named is not None:
            return named
    raise RuntimeError("Error resolving interface group name")


def _named_groups() -> dict[str, int]:
    groups = {}
    try:
        with open(_GROUP_NAMES_FILE, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                fields = line.split()
                if len(fields) >= 2 and re.fullmatch(r"(0[xX])?[0-9a-fA-F]+", fields[0]):
                    groups[fields[1]] = int(fields[0], 16)
    except OSError:
        return {}
    return groups
