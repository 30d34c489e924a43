"""Zones without services: what tools that read zone definitions need, and the base of Zone.

A zone has a name, subnets, host names and an administrative parent.  Names are registered in
`BaseZone.zones`, which is Globals.zones; only loading a policy writes it.

Nothing is registered before everything about the zone is known to be right.
"""

from __future__ import annotations

import re

from Zorp import Globals
from Zorp.Exceptions import PolicyError, ZoneException
from Zorp.language import arguments
from Zorp.language.caller import policy_caller
from Zorp.Subnet import Subnet

__all__ = ["BaseZone", "BuiltinProxy"]

MAX_DEPTH = 31                   # a root has depth 1; deeper zones would outweigh interfaces in the scores of rules
MAX_NAME_BYTES = 1023
_MAX_HOSTNAME = 253              # RFC 1035, 2.3.4, without the final dot
_HOSTNAME = re.compile(r"[^\s/,;:@*]+")


class ZoneDefinitionError(PolicyError, ZoneException):
    """A zone that contradicts what was defined before."""

    def __init__(self, problem, *, remedy):
        super().__init__(problem, remedy=remedy)
        self.detail = problem

    def __str__(self):
        return f"{self.problem}; {self.remedy}"


class UnknownZoneError(PolicyError, KeyError):
    """A zone name that is not defined; the only argument is that name, as of a KeyError."""

    def __init__(self, name, *, remedy):
        super().__init__(f"No zone was defined with that name; zone='{name}'", remedy=remedy)
        self.args = (name,)

    def __str__(self):
        return f"{self.problem}; {self.remedy}"


class BuiltinProxy:
    """Stands for the proxies of the core where there is no core."""


class BaseZone:
    """A named part of the network.

    Arguments:
        name: unique, not empty, at most 1023 bytes.
        addrs: one subnet as text, or a sequence of them; IPv4 and IPv6 may be mixed.
        hostnames: one host name or a sequence of them, whose addresses belong to the zone.
        admin_parent: name of a zone that is defined already, or that zone.

    Raises ZoneException (also a PolicyError) for a name that is taken, KeyError for an unknown
    parent, ValueError for a text that is not a subnet.
    """

    zones = Globals.zones

    def __init__(self, name, addrs=(), hostnames=(), admin_parent=None):
        self.name = checked_name(name)
        self.place = policy_caller()             # for those who say what is wrong with it
        self.subnets = subnets_of(name, addrs)
        self.hostnames = hostnames_of(name, hostnames)
        self.admin_children = []
        self.admin_parent = self._parent(admin_parent)
        self._check_depth()
        self._register()

    def _parent(self, parent):
        if parent is None or isinstance(parent, BaseZone):
            return parent
        if not isinstance(parent, str) or parent not in self.zones:
            raise UnknownZoneError(parent, remedy=f"define it above its child, zone '{self.name}'")
        return self.zones[parent]

    def _check_depth(self):
        depth = self.getDepth() + 1
        if depth > MAX_DEPTH:
            raise ZoneDefinitionError(f"Zone tree is too deep; zone='{self.name}', depth='{depth}'",
                                      remedy=f"at most {MAX_DEPTH} zones may stand above each other")

    def _register(self):
        if self.name in self.zones:
            raise ZoneDefinitionError(f"Zone {self.name} duplicate name; other_place='{self.zones[self.name].place}'",
                                      remedy="give each zone a name of its own")
        if self.admin_parent is not None:
            self.admin_parent.admin_children.append(self)
        self.zones[self.name] = self

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


def checked_name(name):
    """Return a zone's name; raises PolicyError for what cannot be one."""
    if not isinstance(name, str) or not 1 <= len(name.encode(errors="surrogateescape")) <= MAX_NAME_BYTES:
        raise PolicyError(f"Invalid zone name; name={name!r}", remedy=f"give a text of 1 to {MAX_NAME_BYTES} bytes")
    return name


def subnets_of(name, addrs):
    """Return the subnets that a zone was given, each once, in the order given; raises ValueError."""
    if addrs is None:
        return []
    single = isinstance(addrs, (str, bytes, Subnet))
    subnets = []
    remedy = f"zone '{name}': write address/bits in quotes"
    for item in (addrs,) if single else arguments.items(f"zone '{name}'", "addrs", addrs, remedy):
        if not isinstance(item, (str, Subnet)):
            raise PolicyError(f"Invalid subnet specification: value='{item}'", remedy=remedy)
        subnets.append(item if isinstance(item, Subnet) else Subnet.create(item))
    return subnets


def hostnames_of(name, hostnames):
    """Return a zone's host names as a tuple, lower case, without a final dot; raises PolicyError."""
    if not hostnames:
        return ()
    remedy = "give names as the DNS knows them, in quotes"
    texts = (hostnames,) if isinstance(hostnames, (str, bytes)) else arguments.items(
        f"zone '{name}'", "hostnames", hostnames, remedy)
    for text in texts:
        if not isinstance(text, str) or len(text) > _MAX_HOSTNAME or not _HOSTNAME.fullmatch(text):
            raise PolicyError(f"Invalid host name; zone='{name}', hostname={text!r}", remedy=remedy)
    return tuple(dict.fromkeys(text.rstrip(".").lower() for text in texts))
