"""Datagrams of a listening socket, and the sockets of the sessions that they begin.

Theory of operation
    receive() reads one datagram with everything that says where it belongs: sender, the
    destination that the sender meant (the original one, also when the packet filter diverted it)
    and the interface.  session_socket() makes a socket bound to that destination and connected
    to the sender: the kernel prefers it to the listening one for whatever the pair sends later,
    and answers leave from the address that the client asked.

    Between bind() and connect() the new socket gets datagrams of other senders, too.  They lie in
    its queue in front of everything else: strays() takes them out, so that they can be treated as
    if the listening socket had got them.  Nothing is lost and nothing reaches a wrong session.

No log and no policy here.
"""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

from Zorp.transport.connect import IP_FREEBIND, IP_TRANSPARENT, IPV6_FREEBIND, IPV6_TRANSPARENT

DATAGRAM_BYTES = 65_535
_CONTROL_BYTES = 256
_MOST_STRAYS = 1000
_IP_PKTINFO, _IP_ORIGDSTADDR = 8, 20
_IPV6_PKTINFO, _IPV6_ORIGDSTADDR = 50, 74
_INDEX = struct.Struct("@i")
_PKTINFO_ADDRESS = slice(8, 12)              # of struct in_pktinfo: where the packet was addressed to
_PKTINFO6_ADDRESS, _PKTINFO6_INDEX = slice(0, 16), 16


class Datagram(NamedTuple):
    """One datagram.  Addresses are what socket calls take."""

    data: bytes
    source: tuple
    destination: tuple
    interface_index: int             # 0: not known


class SessionSocket(socket.socket):
    """A connected datagram socket that knows on which interface its first datagram came."""

    __slots__ = ("interface_index",)


def receive(listener: socket.socket) -> Datagram:
    """Return the next datagram of a listening socket; raises BlockingIOError when there is none, OSError."""
    data, control, _flags, source = listener.recvmsg(DATAGRAM_BYTES, _CONTROL_BYTES, socket.MSG_DONTWAIT)
    destination, index = None, 0
    for level, kind, value in control:
        if (level, kind) in ((socket.IPPROTO_IP, _IP_ORIGDSTADDR), (socket.IPPROTO_IPV6, _IPV6_ORIGDSTADDR)):
            destination = _address(value)
        elif (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
            index = _INDEX.unpack_from(value)[0]
        elif (level, kind) == (socket.IPPROTO_IPV6, _IPV6_PKTINFO):
            index = _INDEX.unpack_from(value, _PKTINFO6_INDEX)[0]
    return Datagram(data, source, destination or listener.getsockname(), index)


def _address(raw: bytes) -> tuple:
    """Return a struct sockaddr_in or sockaddr_in6 as socket calls take it."""
    port = int.from_bytes(raw[2:4], "big")
    if struct.unpack_from("=H", raw)[0] == socket.AF_INET:
        return socket.inet_ntop(socket.AF_INET, raw[4:8]), port
    flow, scope = struct.unpack_from("!I", raw, 4)[0], struct.unpack_from("=I", raw, 24)[0]
    return socket.inet_ntop(socket.AF_INET6, raw[8:24]), port, flow, scope


def session_socket(family: int, datagram: Datagram, *, transparent: bool) -> SessionSocket:
    """Return a socket for the pair of a datagram; raises OSError.

    transparent: the destination may be another host's address.
    """
    sock = SessionSocket(family, socket.SOCK_DGRAM)
    try:
        sock.interface_index = datagram.interface_index
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if transparent:
            level, options = ((socket.IPPROTO_IPV6, (IPV6_TRANSPARENT, IPV6_FREEBIND)) if family == socket.AF_INET6
                              else (socket.IPPROTO_IP, (IP_TRANSPARENT, IP_FREEBIND)))
            for option in options:
                sock.setsockopt(level, option, 1)
        sock.bind(datagram.destination)
        sock.connect(datagram.source)
    except BaseException:
        sock.close()
        raise
    return sock


def strays(sock: SessionSocket, datagram: Datagram) -> list[Datagram]:
    """Take out of a new session's socket what came before it was connected, of whichever sender."""
    found = []
    for _ in range(_MOST_STRAYS):
        try:
            data, source = sock.recvfrom(DATAGRAM_BYTES, socket.MSG_DONTWAIT)
        except OSError:
            break
        found.append(Datagram(data, source, datagram.destination, datagram.interface_index))
    return found
