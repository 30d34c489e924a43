"""The PROXY protocol, versions 1 and 2: who the client of a relayed connection really is.

Theory of operation
    A load balancer puts one header in front of the client's bytes.  The caller collects what it
    receives and gives all of it to parse(), until that answers something else than None, "more
    bytes needed"; Header.consumed then tells where the client's own bytes begin.  How TCP cut
    the bytes never changes the answer.  write() makes the header for the other direction.

    A header may also say that it knows nothing (UNKNOWN, LOCAL, an unspecified family, local
    sockets); source and destination are None then and the connection's own addresses count.

    Refused with WireError, after which the connection must be closed without an answer: bytes
    that are no header, addresses that do not fit their family, numbers with leading zeros,
    lines of more than 107 bytes, reserved values, lengths that do not add up, a datagram
    header (our listeners are streams), more than V2_BODY_BYTES of extensions.

    The grammar is that of "The PROXY protocol, Versions 1 & 2" by W. Tarreau: 2.1 for version 1,
    2.2 for version 2.

On purpose not as the document says
    IPv4-mapped IPv6 addresses come out as the IPv4 addresses they carry, so that rules for
    IPv4 hold for them.  The CRC32c extension is not verified: the peer is trusted by address.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from typing import NamedTuple

from Zorp.wire.errors import WireError

V1_LINE_BYTES = 107                  # with CRLF, the longest that TCP6 can be
V2_BODY_BYTES = 4096                 # ours: addresses and extensions; the length field could say 65535
V2_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"

_V1_START = b"PROXY "
_PORT = rb"(0|[1-9][0-9]{0,4})"
_V1_LINE = re.compile(rb"PROXY TCP(4|6) ([0-9a-fA-F:.]{2,45}) ([0-9a-fA-F:.]{2,45}) " + _PORT + b" " + _PORT)
_V1_UNKNOWN = re.compile(rb"PROXY UNKNOWN(?: [^\r\n]*)?")

_V2_FIXED = struct.Struct(">12sBBH")
_V2_PORTS = struct.Struct(">HH")
_V2_EXTENSION = struct.Struct(">BH")
_V2_LOCAL, _V2_PROXY = 0x20, 0x21    # version and command in one octet
_V2_UNSPECIFIED, _V2_TCP4, _V2_TCP6, _V2_UNIX_STREAM = 0x00, 0x11, 0x21, 0x31
_V2_ADDRESS_BYTES = {_V2_UNSPECIFIED: 0, _V2_TCP4: 4, _V2_TCP6: 16, _V2_UNIX_STREAM: 108}

Endpoint = tuple[str, int]           # IP address as text, port


class Header(NamedTuple):
    """What a header said.  source, destination: None when it names none; consumed: its length in bytes."""

    source: Endpoint | None
    destination: Endpoint | None
    consumed: int


def parse(data: bytes) -> Header | None:
    """Return the header that `data` begins with, or None when it is not complete; raises WireError."""
    if data[:1] == V2_SIGNATURE[:1]:
        return _parse_v2(data)
    if not _V1_START.startswith(data[:len(_V1_START)]):
        raise WireError("Not a PROXY protocol header; data='%s'", data[:V1_LINE_BYTES])
    return _parse_v1(data)


def _parse_v1(data: bytes) -> Header | None:
    end = data.find(b"\n", 0, V1_LINE_BYTES)
    if end < 0:
        if len(data) < V1_LINE_BYTES:
            return None
        raise WireError("PROXY protocol line too long; line='%s'", data[:V1_LINE_BYTES])
    line = data[:end - 1]
    if data[end - 1:end] != b"\r" or b"\r" in line:
        raise WireError("PROXY protocol line does not end with CR LF; line='%s'", data[:end])
    if _V1_UNKNOWN.fullmatch(line):
        return Header(None, None, end + 1)
    fields = _V1_LINE.fullmatch(line)
    if fields is None:
        raise WireError("Invalid PROXY protocol line; line='%s'", line)
    version = int(fields[1])
    try:
        source = _text_endpoint(version, fields[2], fields[4])
        destination = _text_endpoint(version, fields[3], fields[5])
    except ValueError:
        raise WireError("Invalid address in PROXY protocol line; line='%s'", line) from None
    return Header(source, destination, end + 1)


def _text_endpoint(version: int, host: bytes, port: bytes) -> Endpoint:
    address = ipaddress.ip_address(host.decode("ascii"))
    if address.version != version or int(port) > 0xFFFF:
        raise ValueError
    return _endpoint(address, int(port))


def _endpoint(address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> Endpoint:
    return str(getattr(address, "ipv4_mapped", None) or address), port


def _parse_v2(data: bytes) -> Header | None:
    if not data.startswith(V2_SIGNATURE[:len(data)]):
        raise WireError("Not a PROXY protocol header; data='%s'", data[:len(V2_SIGNATURE)])
    if len(data) < _V2_FIXED.size:
        return None
    _, command, family, length = _V2_FIXED.unpack_from(data)
    if command not in (_V2_LOCAL, _V2_PROXY):
        raise WireError("Invalid version or command in PROXY protocol header; value='0x%02x'", command)
    if length > V2_BODY_BYTES:
        raise WireError("PROXY protocol header too long; length='%d', max='%d'", length, V2_BODY_BYTES)
    end = _V2_FIXED.size + length
    if command == _V2_PROXY and family not in _V2_ADDRESS_BYTES:
        raise WireError("Invalid address family or transport in PROXY protocol header; value='0x%02x'", family)
    if len(data) < end:
        return None
    if command == _V2_LOCAL:
        return Header(None, None, end)
    return _v2_addresses(family, bytes(data[_V2_FIXED.size:end]), end)


def _v2_addresses(family: int, body: bytes, consumed: int) -> Header:
    size = _V2_ADDRESS_BYTES[family]
    has_ports = family in (_V2_TCP4, _V2_TCP6)
    addresses_end = 2 * size + (_V2_PORTS.size if has_ports else 0)
    if len(body) < addresses_end:
        raise WireError("PROXY protocol header too short for its addresses; length='%d'", len(body))
    _check_extensions(body[addresses_end:])
    if not has_ports:
        return Header(None, None, consumed)
    source_port, destination_port = _V2_PORTS.unpack_from(body, 2 * size)
    return Header(_endpoint(ipaddress.ip_address(body[:size]), source_port),
                  _endpoint(ipaddress.ip_address(body[size:2 * size]), destination_port), consumed)


def _check_extensions(rest: bytes) -> None:
    """Walk over the extensions, which nobody here needs, to see that they fill their place exactly."""
    position = 0
    while position < len(rest):
        if len(rest) - position < _V2_EXTENSION.size:
            raise WireError("Incomplete extension in PROXY protocol header; length='%d'", len(rest))
        _, length = _V2_EXTENSION.unpack_from(rest, position)
        position += _V2_EXTENSION.size + length
    if position != len(rest):
        raise WireError("Extension reaches over the end of the PROXY protocol header; length='%d'", len(rest))


def write(version: int, source: Endpoint | None, destination: Endpoint | None) -> bytes:
    """Return a header of version 1 or 2.

    Without both endpoints it says that nothing is known.  Where one is IPv4 and the other
    IPv6, the IPv4 address is written as a mapped one, because a header has one family.
    Raises ValueError for text that is no IP address or a port outside 0 to 65535.
    """
    if version not in (1, 2):
        raise ValueError(f"no such version of the PROXY protocol: {version}")
    if source is None or destination is None:
        return b"PROXY UNKNOWN\r\n" if version == 1 else _V2_FIXED.pack(V2_SIGNATURE, _V2_PROXY, _V2_UNSPECIFIED, 0)
    hosts = [ipaddress.ip_address(host) for host, _ in (source, destination)]
    ports = [port for _, port in (source, destination)]
    if any(getattr(host, "scope_id", None) for host in hosts):
        raise ValueError(f"an interface means nothing to others: {hosts}")
    if not all(0 <= port <= 0xFFFF for port in ports):
        raise ValueError(f"no such port: {ports}")
    if hosts[0].version != hosts[1].version:
        hosts = [_mapped(host) if host.version == 4 else host for host in hosts]
    if version == 1:
        return b"PROXY TCP%d %s %s %d %d\r\n" % (hosts[0].version, *(str(host).encode() for host in hosts), *ports)
    family = _V2_TCP4 if hosts[0].version == 4 else _V2_TCP6
    body = hosts[0].packed + hosts[1].packed + _V2_PORTS.pack(*ports)
    return _V2_FIXED.pack(V2_SIGNATURE, _V2_PROXY, family, len(body)) + body


def _mapped(host: ipaddress.IPv4Address) -> ipaddress.IPv6Address:
    return ipaddress.IPv6Address(bytes(10) + b"\xff\xff" + host.packed)
