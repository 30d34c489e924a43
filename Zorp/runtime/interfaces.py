"""Interfaces of the host and their IPv4 addresses, for binds that name an interface or a group.

Theory of operation
    A snapshot is Zorp.transport.interfaces' dump.  Watch owns a netlink socket that becomes
    readable when any interface or address changes; the loop of the worker then takes another
    snapshot and compares.  Changes come in bursts, so everything that waits is read before one
    comparison.
"""

from __future__ import annotations

import ipaddress
import pathlib
import socket

from Zorp.acceptance.binds import DBIface
from Zorp.Log import log
from Zorp.transport.interfaces import Snapshot

_RTMGRP_LINK = 1
_RTMGRP_IPV4_IFADDR = 0x10
_ANY = "0.0.0.0"


def addresses_of(bind, snapshot: Snapshot) -> list[str]:
    """The addresses that a DBIface or DBIfaceGroup means now; none when the interface is not there."""
    if isinstance(bind, DBIface):
        found = _texts(snapshot, bind.iface)
        return [address for address in found if bind.ip_s in (_ANY, address)]
    names = sorted(name for name, group in snapshot.groups.items() if group == bind.group)
    return [address for name in names for address in _texts(snapshot, name)]


def _texts(snapshot: Snapshot, name: str) -> list[str]:
    own = snapshot.addresses.get(name, frozenset())
    return [str(ipaddress.IPv4Address(number)) for family, number in sorted(own) if family == socket.AF_INET]


def log_changes(before: Snapshot, after: Snapshot) -> None:
    """Say what came, went and changed."""
    for name in before.groups.keys() - after.groups.keys():
        log(None, "core.info", 4, "Interface removed; if_name='%s'", (name,))
    for name in sorted(after.groups):
        if name not in before.groups:
            log(None, "core.info", 4, "Interface added; if_index='%d', if_name='%s', if_flags='%d'",
                (_index(name), name, _flags(name)))
        elif before.groups[name] != after.groups[name]:
            log(None, "core.debug", 4, "Interface removed from group; group='0x%x', name='%s'",
                (before.groups[name], name))
            log(None, "core.debug", 4, "Interface added to group; group='0x%x', name='%s'", (after.groups[name], name))
    for name in sorted(before.addresses.keys() | after.addresses.keys()):
        had, has = set(_texts(before, name)), set(_texts(after, name))
        for address in sorted(has - had):
            log(None, "core.info", 4, "Address added to interface; if_name='%s', if_addr='%s'", (name, address))
        for address in sorted(had - has):
            log(None, "core.info", 4, "Address removed from interface; if_name='%s', if_addr='%s'", (name, address))


def _index(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:                      # gone again
        return 0


def _flags(name: str) -> int:
    try:
        return int(pathlib.Path("/sys/class/net", name, "flags").read_text("ascii"), 16)
    except (OSError, ValueError):        # gone again, or out of reach in a new root
        return 0


class Watch:
    """Becomes readable when something changes; for the loop of the worker."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
        self._socket.bind((0, _RTMGRP_LINK | _RTMGRP_IPV4_IFADDR))

    def fileno(self) -> int:
        return self._socket.fileno()

    def drain(self) -> None:
        """Forget the notes that wait; ENOBUFS, notes lost, means the same: look again."""
        try:
            while self._socket.recv(65_536):
                pass
        except OSError:
            return
