"""Zones without services: what tools that read zone definitions need, and the base of Zone.

A zone has a name, subnets, host names and an administrative parent.  Names are registered in
`BaseZone.zones`, which is Globals.zones; only loading a policy writes it.
"""

from __future__ import annotations

from Zorp import Globals
from Zorp.Exceptions import PolicyError, ZoneException
from Zorp.Subnet import Subnet

__all__ = ["BaseZone", "BuiltinProxy"]


class BuiltinProxy:
    """Stands for the proxies of the core where there is no core."""


class BaseZone:
    """A named part of the network.

    Arguments:
        name: unique.
        addrs: one subnet as text, or a sequence of them; IPv4 and IPv6 may be mixed.
        hostnames: one host name or a sequence of them, whose addresses belong to the zone.
        admin_parent: name of a zone that is defined already.

    Raises ZoneException for a name that is taken, KeyError for an unknown parent, ValueError
    for a text that is not a subnet.
    """

    zones = Globals.zones

    def __init__(self, name, addrs=(), hostnames=(), admin_parent=None):
        if name in self.zones:
            raise ZoneException(f"Zone {name} duplicate name")
        self.name = name
        self.subnets = list(dict.fromkeys(Subnet.create(addr) for addr in _texts(addrs)))
        self.hostnames = _texts(hostnames)
        self.admin_children = []
        self.admin_parent = None if admin_parent is None else self.zones[admin_parent]
        if self.admin_parent is not None:
            self.admin_parent.admin_children.append(self)
        self.zones[name] = self

    def __str__(self):
        return f"Zone({self.name})"

    def getName(self):
        """Return the name of the zone."""
        return self.name

    def getDepth(self):
        """Return the number of administrative parents above this zone."""
        depth, zone = 0, self
        while zone.admin_parent is not None:
            depth, zone = depth + 1, zone.admin_parent
        return depth


def _texts(value):
    """Return one text or a sequence of texts as a tuple; nothing for None and the empty text."""
    if not value:
        return ()
    texts = (value,) if isinstance(value, str) else tuple(value)
    for text in texts:
        if not isinstance(text, str):
            raise PolicyError(f"Addresses and host names of a zone are texts; value={text!r}",
                              remedy="write them in quotes")
    return texts
