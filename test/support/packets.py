"""IP packets as bytes, and an interface that they come in by.

    frame_of(traffic, target=mac, source=mac) -> bytes      the first packet of a connection: SYN, datagram, ...
    Wire(namespace, device)                                 .send(frame) from that device

Checksums are right: connection tracking takes other packets for no connection's.
"""

from __future__ import annotations

import socket
import struct

from test.support.net import Namespace
from Zorp.rules.engine import Traffic

_ETHERTYPE = {socket.AF_INET: 0x0800, socket.AF_INET6: 0x86DD}
_BYTES = {socket.AF_INET: 4, socket.AF_INET6: 16}
_SYN = 2
_ICMP6 = 58


def frame_of(traffic: Traffic, target: bytes, source: bytes) -> bytes:
    """Return an Ethernet frame with the first packet of a connection; target, source: MAC addresses."""
    return target + source + struct.pack("!H", _ETHERTYPE[traffic.family]) + packet_of(traffic)


def authenticated(traffic: Traffic) -> bytes:
    """Return what follows the IP header of a packet whose payload stands behind an authentication header."""
    width = _BYTES[traffic.family]
    addresses = traffic.src.to_bytes(width, "big") + traffic.dst.to_bytes(width, "big")
    return struct.pack("!BBHII12x", traffic.proto, 4, 0, 256, 1) + _payload(traffic, addresses)


def packet_of(traffic: Traffic) -> bytes:
    """Return the IP packet."""
    width = _BYTES[traffic.family]
    addresses = traffic.src.to_bytes(width, "big") + traffic.dst.to_bytes(width, "big")
    payload = _payload(traffic, addresses)
    if traffic.family == socket.AF_INET6:
        return struct.pack("!IHBB", 6 << 28, len(payload), traffic.proto, 64) + addresses + payload
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0, 64, traffic.proto, 0) + addresses
    return _with_checksum(header, 10, b"") + payload


def _payload(traffic: Traffic, addresses: bytes) -> bytes:
    size = {socket.IPPROTO_TCP: 20, socket.IPPROTO_UDP: 9}.get(traffic.proto, 8)
    pseudo = addresses + struct.pack("!II", size, traffic.proto)      # both families add up alike
    ports = struct.pack("!HH", max(traffic.src_port, 0), max(traffic.dst_port, 0))
    if traffic.proto == socket.IPPROTO_TCP:
        return _with_checksum(ports + struct.pack("!IIBBHHH", 1, 0, 5 << 4, _SYN, 1024, 0, 0), 16, pseudo)
    if traffic.proto == socket.IPPROTO_UDP:
        return _with_checksum(ports + struct.pack("!HH", size, 0) + b"?", 6, pseudo)
    if traffic.proto == {socket.AF_INET: socket.IPPROTO_ICMP, socket.AF_INET6: _ICMP6}[traffic.family]:
        echo = struct.pack("!BBHHH", traffic.proto_type, traffic.proto_subtype, 0, 1, 1)
        return _with_checksum(echo, 2, pseudo if traffic.proto == _ICMP6 else b"")
    return bytes(size)


def _with_checksum(data: bytes, at: int, pseudo: bytes) -> bytes:
    covered = pseudo + data + b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(covered) // 2}H", covered))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return data[:at] + struct.pack("!H", 0xFFFF - total or 0xFFFF) + data[at + 2:]


class Wire:
    """A device of a namespace, as something to put frames on."""

    def __init__(self, namespace: Namespace, device: str) -> None:
        self._socket = namespace.inside(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
        self._socket.bind((device, 0))
        self.mac = self._socket.getsockname()[4]

    def send(self, frame: bytes) -> None:
        self._socket.send(frame)

    def close(self) -> None:
        self._socket.close()
