"""Packets that the rules hand to a log group (NFLOG), read from the kernel.

Theory of operation
    The kernel copies the beginning of each packet to one netlink socket, with the prefix of the
    rule.  Packets that did not fit into it are counted by the kernel only, so a gap is told
    (take_loss) without a number.

    A packet is taken apart as far as the log lines need: addresses, protocol, ports.  It comes
    from anybody: what is cut short or makes no sense has ports 0, or is left out.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

from Zorp.netfilter.netlink import ACK, HEADER, NetfilterSocket, attribute, attributes

_PACKET, _CONFIG = 0x400, 0x401              # subsystem 4
_CONFIG_COMMAND, _CONFIG_MODE, _CONFIG_TIMEOUT, _CONFIG_THRESHOLD = 1, 2, 4, 5
_COMMAND_BIND = 1
_COPY_PACKET = 2
_PACKET_HEADER, _PAYLOAD, _PREFIX = 1, 9, 10
_COPIED_BYTES = 128
_THRESHOLD = 32                              # packets that it may collect
_TIMEOUT_CS = 10                             # hundredths of a second that the kernel may collect packets
_RCVBUF_BYTES = 4 << 20
_ANSWER_S = 2.0
_GENERAL = struct.Struct("!BBH")             # family, version, group
_WITH_PORTS = frozenset({6, 17})
_V6_EXTENSIONS = frozenset({0, 43, 60})      # hop-by-hop, routing, destination options
_V6_FRAGMENT = 44


class LogGroupError(Exception):
    """The log group cannot be read; `str()` says why."""


@dataclass(frozen=True, slots=True)
class LoggedPacket:
    """One packet; ports are 0 without TCP and UDP."""

    prefix: str
    family: int
    protocol: int
    source: str
    source_port: int
    destination: str
    destination_port: int


class LogGroup:
    """The packets of one log group of this network namespace."""

    def __init__(self, group: int) -> None:
        """Raises LogGroupError, for example when another program reads the group."""
        try:
            self._socket = NetfilterSocket(receive_bytes=_RCVBUF_BYTES, answer_s=_ANSWER_S)
            for what, value in ((_CONFIG_COMMAND, struct.pack("!B", _COMMAND_BIND)),
                                (_CONFIG_MODE, struct.pack("!IBB", _COPIED_BYTES, _COPY_PACKET, 0)),
                                (_CONFIG_TIMEOUT, struct.pack("!I", _TIMEOUT_CS)),
                                (_CONFIG_THRESHOLD, struct.pack("!I", _THRESHOLD))):
                general = _GENERAL.pack(socket.AF_UNSPEC, 0, group)
                list(self._socket.request(_CONFIG, ACK, general + attribute(what, value)))
        except OSError as problem:
            raise LogGroupError(f"Packet log group cannot be read; group='{group}', "
                                f"error='{problem.strerror or problem}'") from None

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        """Let go of the group."""
        self._socket.close()

    def read(self) -> list[LoggedPacket]:
        """Return packets that have come, some of them if they are many."""
        return [packet for kind, message in self._socket.arrived()
                if kind == _PACKET and (packet := read_packet(message)) is not None]

    def take_loss(self) -> bool:
        """Return whether packets were lost since the last call."""
        lost, self._socket.has_lost = self._socket.has_lost, False
        return lost


def read_packet(message: bytes) -> LoggedPacket | None:
    """Return the packet in a netlink message; None when it is no IP packet."""
    found = dict(attributes(message, HEADER.size + _GENERAL.size))
    prefix = found.get(_PREFIX, b"").rstrip(b"\0").decode("ascii", "replace")
    payload = found.get(_PAYLOAD, b"")
    version = payload[0] >> 4 if payload else 0
    if version == 4 and len(payload) >= 20:
        return _ipv4(prefix, payload)
    if version == 6 and len(payload) >= 40:
        return _ipv6(prefix, payload)
    return None


def _ipv4(prefix: str, packet: bytes) -> LoggedPacket:
    length = (packet[0] & 15) * 4
    is_first = not int.from_bytes(packet[6:8], "big") & 0x1FFF
    ports = _ports(packet[9], packet, length) if is_first else (0, 0)
    return LoggedPacket(prefix, int(socket.AF_INET), packet[9], socket.inet_ntop(socket.AF_INET, packet[12:16]),
                        ports[0], socket.inet_ntop(socket.AF_INET, packet[16:20]), ports[1])


def _ipv6(prefix: str, packet: bytes) -> LoggedPacket:
    protocol, position = packet[6], 40
    while (protocol in _V6_EXTENSIONS or protocol == _V6_FRAGMENT) and position + 8 <= len(packet):
        protocol, position = packet[position], position + (8 if protocol == _V6_FRAGMENT
                                                           else packet[position + 1] * 8 + 8)
    source_port, destination_port = _ports(protocol, packet, position)
    return LoggedPacket(prefix, int(socket.AF_INET6), protocol, socket.inet_ntop(socket.AF_INET6, packet[8:24]),
                        source_port, socket.inet_ntop(socket.AF_INET6, packet[24:40]), destination_port)


def _ports(protocol: int, packet: bytes, position: int) -> tuple[int, int]:
    if protocol in _WITH_PORTS and 20 <= position <= len(packet) - 4:
        return struct.unpack_from("!HH", packet, position)
    return 0, 0
