"""The kernel's connections: begins and ends as they happen, and the list.

Theory of operation
    ConnectionEvents is a netlink socket that gets a message for every connection that is
    confirmed and every one that ends.  Most of them are not ours: the mark is looked for first,
    and only connections of the class that was asked for are taken apart.  That is done here,
    because pyroute2 needs fifteen times as long for a message, too much for one per connection.
    When the kernel could not put a message into the socket, the reader is told (has_lost) and
    has to look at the list.

    connections() is a whole conversation with the kernel, for seldom use.

`net.netfilter.nf_conntrack_acct` must be 1 for connections to count bytes: count_bytes().
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

from Zorp.netfilter.netlink import DUMP, HEADER, NetfilterSocket, attribute, attributes

_GROUP_NEW, _GROUP_DESTROY = 1, 3
_NEW, _DESTROY = 0x100, 0x102            # subsystem 1, message 0 and 2
_GET = 0x101
_RCVBUF_BYTES = 8 << 20
_GENERAL_BYTES = 4                       # family, version, resource id
_ORIGINAL, _REPLY, _MARK, _SENT, _RECEIVED, _ID, _MARK_MASK = 1, 2, 8, 9, 10, 12, 21       # CTA_...
_IP, _PROTO = 1, 2                       # CTA_TUPLE_...
_PROTOCOL, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3     # CTA_PROTO_...
_ICMP, _ICMPV6 = 4, 7                    # id, then type, then code
_WITH_PORTS = (b"\x06", b"\x11")         # TCP, UDP; other protocols have something else in their place
_PACKETS, _BYTES = 1, 2                  # CTA_COUNTERS_...
_ACCOUNTING = "/proc/sys/net/netfilter/nf_conntrack_acct"


class ConntrackError(Exception):
    """The kernel's connections cannot be watched or listed; `str()` says why."""


@dataclass(frozen=True, slots=True)
class Endpoints:
    """One direction; ports are 0 without TCP and UDP."""

    source: str
    source_port: int
    destination: str
    destination_port: int


@dataclass(frozen=True, slots=True)
class Connection:
    """One connection of the kernel."""

    number: int                          # the kernel's own, for as long as the connection lives
    family: int
    protocol: int
    original: Endpoints                  # as the client wished
    reply: Endpoints                     # as the server sees it, the other way round
    mark: int
    icmp: tuple[int, int, int] = (0, 0, 0)       # type, code, id
    sent: tuple[int, int] = (0, 0)       # bytes and packets of the client
    received: tuple[int, int] = (0, 0)   # of the server


@dataclass(frozen=True, slots=True)
class Event:
    """A connection began, or ended."""

    has_ended: bool
    connection: Connection


def count_bytes() -> None:
    """Let connections count bytes and packets.  Raises OSError."""
    with open(_ACCOUNTING, "r+", encoding="ascii") as file:
        if file.read().strip() == "0":
            file.seek(0)
            file.write("1")


class ConnectionEvents:
    """Begins and ends of connections whose mark has `mark` in the bits of `mask`."""

    def __init__(self, mark: int, mask: int) -> None:
        """Raises ConntrackError."""
        self._mark, self._mask = mark, mask
        try:
            self._socket = NetfilterSocket(receive_bytes=_RCVBUF_BYTES)
            for group in (_GROUP_NEW, _GROUP_DESTROY):
                self._socket.join(group)
        except OSError as problem:
            raise ConntrackError(f"Connections cannot be watched; error='{problem.strerror}'") from None

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        """Stop watching."""
        self._socket.close()

    def read(self) -> list[Event]:
        """Return events that have come, some of them if they are many; see take_loss()."""
        return [Event(kind == _DESTROY, connection) for kind, message in self._socket.arrived()
                if kind in (_NEW, _DESTROY) and mark_of(message) & self._mask == self._mark
                and (connection := read_connection(message)) is not None]

    def take_loss(self) -> bool:
        """Return whether events were lost since the last call."""
        lost, self._socket.has_lost = self._socket.has_lost, False
        return lost


def mark_of(message: bytes) -> int:
    """Return the connection mark in a message, 0 when it has none."""
    return next((int.from_bytes(value, "big") for kind, value in attributes(message, HEADER.size + _GENERAL_BYTES)
                 if kind == _MARK), 0)


def connections(mark: int, mask: int) -> list[Connection]:
    """Return the connections whose mark has `mark` in the bits of `mask`.  Raises ConntrackError."""
    wanted = b"".join(attribute(kind, value.to_bytes(4, "big")) for kind, value in ((_MARK, mark), (_MARK_MASK, mask)))
    try:
        with NetfilterSocket() as kernel:
            return [connection for _, message in kernel.request(_GET, DUMP, bytes(_GENERAL_BYTES) + wanted)
                    if mark_of(message) & mask == mark and (connection := read_connection(message)) is not None]
    except OSError as problem:
        raise ConntrackError(f"Connections cannot be listed; error='{problem.strerror or problem}'") from None


def read_connection(message: bytes) -> Connection | None:
    """Return the connection in a message of the kernel; None when it lacks its addresses."""
    family = message[HEADER.size] if len(message) > HEADER.size else socket.AF_UNSPEC
    found = dict(attributes(message, HEADER.size + _GENERAL_BYTES))
    if family not in (socket.AF_INET, socket.AF_INET6) or _ORIGINAL not in found or _REPLY not in found:
        return None
    original, protocol = _direction(found[_ORIGINAL], family)
    reply, _ = _direction(found[_REPLY], family)
    if original is None or reply is None:
        return None
    first = _ICMP if family == socket.AF_INET else _ICMPV6
    icmp_id, icmp_type, icmp_code = (int.from_bytes(protocol.get(first + part, b""), "big") for part in range(3))
    return Connection(
        number=int.from_bytes(found.get(_ID, b""), "big"), family=family,
        protocol=int.from_bytes(protocol.get(_PROTOCOL, b""), "big"), original=original, reply=reply,
        mark=int.from_bytes(found.get(_MARK, b""), "big"), icmp=(icmp_type, icmp_code, icmp_id),
        sent=_counters(found.get(_SENT, b"")), received=_counters(found.get(_RECEIVED, b"")))


def _direction(value: bytes, family: int) -> tuple[Endpoints | None, dict[int, bytes]]:
    """Return (endpoints, attributes of the protocol) of one direction."""
    parts = dict(attributes(value, 0))
    addresses, protocol = dict(attributes(parts.get(_IP, b""), 0)), dict(attributes(parts.get(_PROTO, b""), 0))
    source, destination, width = (1, 2, 4) if family == socket.AF_INET else (3, 4, 16)
    packed = addresses.get(source, b""), addresses.get(destination, b"")
    if len(packed[0]) != width or len(packed[1]) != width:
        return None, protocol
    source_port, destination_port = (int.from_bytes(protocol.get(port, b""), "big")
                                     if protocol.get(_PROTOCOL) in _WITH_PORTS else 0
                                     for port in (_SOURCE_PORT, _DESTINATION_PORT))
    return Endpoints(socket.inet_ntop(family, packed[0]), source_port,
                     socket.inet_ntop(family, packed[1]), destination_port), protocol


def _counters(value: bytes) -> tuple[int, int]:
    """Return (bytes, packets)."""
    counted = dict(attributes(value, 0))
    return int.from_bytes(counted.get(_BYTES, b""), "big"), int.from_bytes(counted.get(_PACKETS, b""), "big")
