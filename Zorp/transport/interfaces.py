"""The host's network interfaces: their names, groups and addresses, and where a connection came in.

Theory of operation
    One dump of links and one of addresses (rtnetlink(7)) make a snapshot.  A second netlink
    socket subscribes to changes; before a snapshot is used that socket is asked, without
    waiting, whether anything changed since.  So nobody needs a thread, answers are never older
    than the kernel's own notice, and a look-up normally costs one system call.

    The interface of an accepted connection is known to the kernel if the listening socket was
    told to remember it (remember_incoming_interface()) before the client came.

Guarantees
    Any thread may ask.  A host that cannot be asked has no interfaces: conditions on them
    then match nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass

_RTM_NEWLINK, _RTM_GETLINK, _RTM_NEWADDR, _RTM_GETADDR = 16, 18, 20, 22
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST_DUMP = 0x301
_CHANGES = 0x1 | 0x10 | 0x100                # RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
_IFLA_IFNAME, _IFLA_GROUP = 3, 27
_IFA_ADDRESS, _IFA_LOCAL = 1, 2              # on point-to-point links the first is the peer's
_DUMP_MS = 2000
_ANSWER_BYTES = 1 << 16

_MESSAGE = struct.Struct("=IHHII")           # length, type, flags, sequence, port id
_LINK = struct.Struct("=BxHiII")             # family, type, index, flags, change
_ADDRESS = struct.Struct("=BBBBi")           # family, prefix length, flags, scope, interface index
_ATTRIBUTE = struct.Struct("=HH")            # length, type
_GROUP = struct.Struct("=I")

_CONTROL = struct.Struct("@Nii")             # length, level, type of a control message
_INDEX = struct.Struct("@i")
_IP_PKTINFO, _IP_PKTOPTIONS = 8, 9
_IPV6_2292PKTOPTIONS, _IPV6_RECVPKTINFO, _IPV6_PKTINFO = 6, 49, 50
_OPTIONS_BYTES = 256


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The interfaces at one moment."""

    groups: dict[str, int]                                   # by interface name
    addresses: dict[str, frozenset[tuple[int, int]]]         # (family, host order integer), by interface name


class Interfaces:
    """The interfaces as they are now.

    _snapshot_lock guards _snapshot and _changes, and is held while the kernel is asked.
    """

    def __init__(self) -> None:
        self._snapshot_lock = threading.Lock()
        self._snapshot: Snapshot | None = None
        self._changes: socket.socket | None = None
        self._owner = 0                                      # process that opened _changes

    def group(self, name: str) -> int | None:
        """Return the group number of an interface, None when there is no such interface."""
        return self.current().groups.get(name)

    def addresses(self, name: str) -> frozenset[tuple[int, int]]:
        """Return the (family, host order integer) of every address configured on an interface."""
        return self.current().addresses.get(name, frozenset())

    def current(self) -> Snapshot:
        """Return a snapshot that is not older than the last change the kernel has announced."""
        with self._snapshot_lock:
            try:
                changed = self._have_changed()
                if self._snapshot is None or changed:
                    self._snapshot = take_snapshot()
                return self._snapshot
            except OSError:
                self._snapshot = None                        # better none than a wrong one
                return Snapshot({}, {})

    def _have_changed(self) -> bool:
        """Tell whether the kernel announced changes, and subscribe to them at first."""
        if self._changes is None or self._owner != os.getpid():
            changes = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
            changes.bind((0, _CHANGES))
            self._changes, self._owner = changes, os.getpid()
            return True
        changed = False
        while True:
            try:
                self._changes.recv(_ANSWER_BYTES)
            except BlockingIOError:
                return changed
            except OSError:                                  # ENOBUFS: more changes than the socket could hold
                changed = True
            changed = True


def take_snapshot() -> Snapshot:
    """Ask the kernel for all links and addresses; raises OSError."""
    names: dict[int, str] = {}
    groups: dict[str, int] = {}
    addresses: dict[str, set[tuple[int, int]]] = {}
    for body in _dump(_RTM_GETLINK, _RTM_NEWLINK):
        attributes = dict(_attributes(body[_LINK.size:]))
        name = attributes[_IFLA_IFNAME].rstrip(b"\0").decode(errors="surrogateescape")
        names[_LINK.unpack_from(body)[2]] = name
        groups[name] = _GROUP.unpack(attributes[_IFLA_GROUP])[0] if _IFLA_GROUP in attributes else 0
    for body in _dump(_RTM_GETADDR, _RTM_NEWADDR):
        family, _, _, _, index = _ADDRESS.unpack_from(body)
        attributes = dict(_attributes(body[_ADDRESS.size:]))
        own = attributes.get(_IFA_LOCAL, attributes.get(_IFA_ADDRESS))
        if own is not None and index in names:
            addresses.setdefault(names[index], set()).add((family, int.from_bytes(own, "big")))
    return Snapshot(groups, {name: frozenset(own) for name, own in addresses.items()})


def _dump(request: int, answer: int) -> Iterator[bytes]:
    """Yield the body of every message that answers a dump request; raises OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.settimeout(_DUMP_MS / 1000)                  # the kernel answers at once; this is for its defects
        netlink.send(_MESSAGE.pack(_MESSAGE.size + _LINK.size, request, _NLM_F_REQUEST_DUMP, 1, 0) + bytes(_LINK.size))
        while True:
            data = memoryview(netlink.recv(_ANSWER_BYTES))
            while len(data) >= _MESSAGE.size:
                length, kind, *_ = _MESSAGE.unpack_from(data)
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    raise OSError("the kernel refused to list its interfaces")
                if kind == answer:
                    yield bytes(data[_MESSAGE.size:length])
                data = data[_aligned(max(length, _MESSAGE.size)):]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (type, value) of the attributes of a message."""
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            return
        yield kind, data[_ATTRIBUTE.size:length]
        data = data[_aligned(length):]


def _aligned(length: int) -> int:
    return (length + 3) & ~3


interfaces = Interfaces()


def remember_incoming_interface(listener: socket.socket) -> None:
    """Make connections accepted from a socket know their interface; call it before listen().

    Does nothing where the kernel cannot: interface conditions match nothing then.
    """
    with contextlib.suppress(OSError):
        if listener.family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)
        else:
            listener.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)


def incoming_interface(sock: socket.socket) -> str | None:
    """Return the name of the interface through which an accepted connection came; None: unknown.

    A datagram session's socket carries the index, see Zorp.transport.datagrams.
    """
    if (index := getattr(sock, "interface_index", 0)):
        with contextlib.suppress(OSError):
            return socket.if_indextoname(index)
        return None
    if sock.family == socket.AF_INET6:
        level, option, wanted, offset = socket.IPPROTO_IPV6, _IPV6_2292PKTOPTIONS, _IPV6_PKTINFO, 16
    else:
        level, option, wanted, offset = socket.IPPROTO_IP, _IP_PKTOPTIONS, _IP_PKTINFO, 0
    try:
        data = sock.getsockopt(level, option, _OPTIONS_BYTES)
        while len(data) >= _CONTROL.size:
            length, _, kind = _CONTROL.unpack_from(data)
            if kind == wanted and length >= _CONTROL.size + offset + _INDEX.size:
                return socket.if_indextoname(_INDEX.unpack_from(data, _CONTROL.size + offset)[0])
            data = data[max((length + 7) & ~7, _CONTROL.size):]
    except OSError:
        pass                                                 # no such option, or the interface is gone
    return None
