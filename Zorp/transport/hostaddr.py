"""What the kernel would do with a packet to an address: keep it, broadcast it or route it on.

Theory of operation
    One RTM_GETROUTE request per question (rtnetlink(7)), answered from the routing tables
    without sending anything.  This sees every way in which an address can be local (secondary
    addresses, whole local prefixes, 127.0.0.0/8) and is not fooled by
    net.ipv4.ip_nonlocal_bind, which makes a trial bind() succeed for any address.

    The question is asked without a packet mark, so the "everything is local" table that
    transparent proxying uses for marked packets does not matter.

    About 20 microseconds; for targets that a peer chose and for loop checks, not for every
    connection.  Addresses come and go, so nothing is remembered.  Any thread may call.
"""

from __future__ import annotations

import enum
import socket
import struct

_RTM_NEWROUTE = 24
_RTM_GETROUTE = 26
_NLM_F_REQUEST = 1
_RTA_DST = 1

_NLMSGHDR = struct.Struct("=IHHII")       # length, type, flags, sequence, port id
_RTMSG = struct.Struct("=BBBBBBBBI")      # family, dst_len, src_len, tos, table, protocol, scope, type, flags
_RTATTR = struct.Struct("=HH")            # length, type
_TYPE_OFFSET = _NLMSGHDR.size + 7         # of rtm_type in an answer
_ANSWER_BYTES = 4096
_MAPPED_PREFIX = bytes(10) + b"\xff\xff"  # RFC 4291, 2.5.5.2


class Delivery(enum.Enum):
    """Where a packet goes; the values are the kernel's route types."""

    ROUTED = 1
    LOCAL = 2
    BROADCAST = 3
    ANYCAST = 4
    MULTICAST = 5
    NOWHERE = 0               # no route, or one that refuses


def unmapped(packed: bytes) -> bytes:
    """Return the four octets of an IPv4-mapped IPv6 address, any other address as it is."""
    if len(packed) == 16 and packed.startswith(_MAPPED_PREFIX):
        return packed[12:]
    return packed


def delivery(packed: bytes) -> Delivery:
    """Tell what happens to packets for an address of 4 or 16 octets.

    Raises OSError when the kernel cannot be asked at all.
    """
    packed = unmapped(packed)
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    body = _RTMSG.pack(family, len(packed) * 8, 0, 0, 0, 0, 0, 0, 0)
    body += _RTATTR.pack(_RTATTR.size + len(packed), _RTA_DST) + packed
    request = _NLMSGHDR.pack(_NLMSGHDR.size + len(body), _RTM_GETROUTE, _NLM_F_REQUEST, 1, 0) + body
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.settimeout(1.0)           # the kernel answers within send(); this is for its defects
        netlink.send(request)
        answer = netlink.recv(_ANSWER_BYTES)
    kind = _NLMSGHDR.unpack_from(answer)[1]
    if kind != _RTM_NEWROUTE:
        return Delivery.NOWHERE
    try:
        return Delivery(answer[_TYPE_OFFSET])
    except ValueError:                    # blackhole, unreachable, prohibit, ...
        return Delivery.NOWHERE


def is_own_address(packed: bytes) -> bool:
    """True when this host itself would receive packets sent to the address (4 or 16 octets)."""
    return delivery(packed) is Delivery.LOCAL


def is_for_one_remote_host(packed: bytes) -> bool:
    """True for an address that can only belong to one other host.

    False for unspecified, loopback, multicast, broadcast and own addresses; IPv4-mapped IPv6
    addresses count as what they carry.  An address without a route is some other host's.
    """
    packed = unmapped(packed)
    if not any(packed) or (len(packed) == 4 and packed[0] in (0, 127)) or packed == bytes(15) + b"\x01":
        return False
    if packed[0] == 0xFF if len(packed) == 16 else 224 <= packed[0] < 240:
        return False
    if packed == b"\xff" * 4:
        return False
    return delivery(packed) in (Delivery.ROUTED, Delivery.NOWHERE)
