"""The kernel's connections: begins and ends as they happen, and the list.

Theory of operation
    ConnectionEvents is a netlink socket that gets a message for every connection that is
    confirmed and every one that ends.  Most of them are not ours: the mark is looked for in the
    raw message first, and only connections of the class that was asked for are decoded (with
    pyroute2).  The socket never blocks; when the kernel could not put a message into it, the
    reader is told once (EventsLost) and has to look at the list.

    connections() is a whole conversation with the kernel, for seldom use.

`net.netfilter.nf_conntrack_acct` must be 1 for connections to count bytes: count_bytes().
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket, nfct_msg

_NETLINK_NETFILTER = 12
_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP = 270, 1
_GROUP_NEW, _GROUP_DESTROY = 1, 3
_NEW, _DESTROY = 0x100, 0x102            # subsystem 1, message 0 and 2
_SO_RCVBUFFORCE = 33
_RCVBUF_BYTES = 8 << 20
_DATAGRAM_BYTES = 1 << 16
_BATCH = 512                             # datagrams per read(), so that the loop turns
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_MARK = 8                                # CTA_MARK
_TYPE_MASK = 0x3FFF
_ACCOUNTING = "/proc/sys/net/netfilter/nf_conntrack_acct"


class ConntrackError(Exception):
    """The kernel's connections cannot be watched or listed; `str()` says why."""


class EventsLost(Exception):
    """There were more events than the socket holds; some are gone."""


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
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _NETLINK_NETFILTER)
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RCVBUF_BYTES)
            self._socket.bind((0, 0))
            for group in (_GROUP_NEW, _GROUP_DESTROY):
                self._socket.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
        except OSError as problem:
            raise ConntrackError(f"Connections cannot be watched; error='{problem.strerror}'") from None

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        """Stop watching."""
        self._socket.close()

    def read(self) -> list[Event]:
        """Return events that have come, some of them if they are many.  Raises EventsLost once per gap."""
        events: list[Event] = []
        for _ in range(_BATCH):
            try:
                data = self._socket.recv(_DATAGRAM_BYTES)
            except BlockingIOError:
                break
            except OSError as problem:
                if problem.errno == errno.ENOBUFS:
                    raise EventsLost from None
                raise
            events.extend(self._events(data))
        return events

    def _events(self, data: bytes) -> Iterator[Event]:
        for kind, message in messages(data):
            if kind not in (_NEW, _DESTROY) or mark_of(message) & self._mask != self._mark:
                continue
            decoded = nfct_msg(message)
            decoded.decode()
            connection = _connection(decoded)
            if connection is not None:
                yield Event(kind == _DESTROY, connection)


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (type, message with its header) of the netlink messages in a datagram."""
    position = 0
    while position + _HEADER.size <= len(data):
        length, kind = _HEADER.unpack_from(data, position)[:2]
        if length < _HEADER.size or position + length > len(data):
            return
        yield kind, data[position:position + length]
        position += length + 3 & ~3


def attributes(message: bytes, position: int) -> Iterator[tuple[int, bytes]]:
    """Yield (type, value) of the netlink attributes from a position on."""
    while position + _ATTRIBUTE.size <= len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, position)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _TYPE_MASK, message[position + _ATTRIBUTE.size:position + length]
        position += length + 3 & ~3


def mark_of(message: bytes) -> int:
    """Return the connection mark in a message, 0 when it has none."""
    return next((int.from_bytes(value, "big") for kind, value in attributes(message, _HEADER.size + 4)
                 if kind == _MARK), 0)


def connections(mark: int, mask: int) -> list[Connection]:
    """Return the connections whose mark has `mark` in the bits of `mask`.  Raises ConntrackError."""
    found = []
    try:
        with NFCTSocket() as kernel:
            for message in kernel.dump(mark=mark, mark_mask=mask):
                connection = _connection(message)
                if connection is not None and connection.mark & mask == mark:
                    found.append(connection)
    except (OSError, NetlinkError) as problem:
        raise ConntrackError(f"Connections cannot be listed; error='{problem}'") from None
    return found


def _connection(message) -> Connection | None:
    """Return the connection in a decoded message; None when it lacks its addresses."""
    family = message["nfgen_family"]
    original, reply = message.get_attr("CTA_TUPLE_ORIG"), message.get_attr("CTA_TUPLE_REPLY")
    if original is None or reply is None or family not in (socket.AF_INET, socket.AF_INET6):
        return None
    protocol = original.get_attr("CTA_TUPLE_PROTO")
    prefix = "CTA_PROTO_ICMP_" if family == socket.AF_INET else "CTA_PROTO_ICMPV6_"
    return Connection(
        number=message.get_attr("CTA_ID") or 0, family=family, protocol=protocol.get_attr("CTA_PROTO_NUM"),
        original=_endpoints(original, family), reply=_endpoints(reply, family), mark=message.get_attr("CTA_MARK") or 0,
        icmp=tuple(protocol.get_attr(prefix + part) or 0 for part in ("TYPE", "CODE", "ID")),
        sent=_counters(message.get_attr("CTA_COUNTERS_ORIG")),
        received=_counters(message.get_attr("CTA_COUNTERS_REPLY")))


def _endpoints(direction, family: int) -> Endpoints:
    addresses, protocol = direction.get_attr("CTA_TUPLE_IP"), direction.get_attr("CTA_TUPLE_PROTO")
    version = "CTA_IP_V4_" if family == socket.AF_INET else "CTA_IP_V6_"
    return Endpoints(addresses.get_attr(version + "SRC"), protocol.get_attr("CTA_PROTO_SRC_PORT") or 0,
                     addresses.get_attr(version + "DST"), protocol.get_attr("CTA_PROTO_DST_PORT") or 0)


def _counters(counters) -> tuple[int, int]:
    if counters is None:
        return 0, 0
    return counters.get_attr("CTA_COUNTERS_BYTES") or 0, counters.get_attr("CTA_COUNTERS_PACKETS") or 0
