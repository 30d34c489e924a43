"""Interfaces of the host and their IPv4 addresses, for binds that name an interface or a group.

Theory of operation
    snapshot() asks the kernel over netlink.  Watch owns a second netlink socket that becomes
    readable when any interface or address changes; the loop of the worker then asks again and
    compares.  Changes come in bursts, so everything that waits is read before one comparison.

Imported only by workers whose policy has such binds: pyroute2 costs a quarter of a second.
"""

from __future__ import annotations

import dataclasses
import socket

from pyroute2 import IPRoute

from Zorp.Bind import DBIface
from Zorp.Log import log

_RTMGRP_LINK = 1
_RTMGRP_IPV4_IFADDR = 0x10
_ANY = "0.0.0.0"


@dataclasses.dataclass(frozen=True, slots=True)
class Interface:
    """One interface as the kernel describes it."""

    name: str
    flags: int
    group: int
    addresses: tuple[str, ...]       # IPv4, sorted


def snapshot() -> dict[int, Interface]:
    """Return the interfaces of this moment by their number.  Raises OSError."""
    with IPRoute() as route:
        addresses: dict[int, list[str]] = {}
        for message in route.get_addr(family=socket.AF_INET):
            local = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
            addresses.setdefault(message["index"], []).append(local)
        return {link["index"]: Interface(link.get_attr("IFLA_IFNAME"), link["flags"], link.get_attr("IFLA_GROUP") or 0,
                                         tuple(sorted(addresses.get(link["index"], ()))))
                for link in route.get_links()}


def addresses_of(bind, interfaces: dict[int, Interface]) -> list[str]:
    """The addresses that a DBIface or DBIfaceGroup means now; none when the interface is not there."""
    if isinstance(bind, DBIface):
        found = [address for interface in interfaces.values() if interface.name == bind.iface
                 for address in interface.addresses]
        return [address for address in found if bind.ip_s in (_ANY, address)]
    return [address for interface in interfaces.values() if interface.group == bind.group
            for address in interface.addresses]


def log_changes(before: dict[int, Interface], after: dict[int, Interface]) -> None:
    """Say what came, went and changed."""
    for index in before.keys() - after.keys():
        log(None, "core.info", 4, "Interface removed; if_index='%d', if_name='%s'", (index, before[index].name))
    for index, new in after.items():
        old = before.get(index)
        fields = (index, new.name, new.flags)
        if old is None:
            log(None, "core.info", 4, "Interface added; if_index='%d', if_name='%s', if_flags='%d'", fields)
        elif (old.name, old.flags) != (new.name, new.flags):
            log(None, "core.info", 4, "Interface info updated; if_index='%d', if_name='%s', if_flags='%d'", fields)
        had = old.addresses if old is not None else ()
        for address in sorted(set(new.addresses) - set(had)):
            log(None, "core.info", 4, "Address added to interface; if_name='%s', if_addr='%s'", (new.name, address))
        for address in sorted(set(had) - set(new.addresses)):
            log(None, "core.info", 4, "Address removed from interface; if_name='%s', if_addr='%s'", (new.name, address))
        if old is not None and old.group != new.group:
            log(None, "core.debug", 4, "Interface removed from group; group='0x%x', name='%s'", (old.group, old.name))
            log(None, "core.debug", 4, "Interface added to group; group='0x%x', name='%s'", (new.group, new.name))


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
