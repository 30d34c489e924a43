"""Zones: named parts of the network, the "who" and "where to" of every access decision.

    Zone("office", ["10.1.0.0/16", "2001:db8:1::/48"])
    Zone("lab", "10.1.7.0/24", admin_parent="office")
    Zone("partners", hostnames="gateway.partner.example")

An address belongs to the zone with the narrowest net around it, wherever that zone stands in
the administrative tree.  The tree decides what a rule means: `src_zone="office"` includes the
zones below.

Zone takes the arguments of every release (Zorp.zones.forms tells them apart); InetZone and
Inet6Zone are the same class.

Access lists of old policies
    Up to release 3.9.6 zones listed the services that may leave (`outbound_services`) and
    enter (`inbound_services`) them, and a zone without a list permitted nothing unless a zone
    above it did; `umbrella` cuts a zone off from those above.  As soon as one zone of a policy
    has a list or an umbrella, dac_enforced() is true and the session asks
    isOutboundServicePermitted() of the client's zone at accept, and isInboundServicePermitted()
    of the server's before connecting.  `config.options.zone_dac`, "auto", "on" or "off",
    overrides the detection.

Classic zones
    A 3.9.0 zone with a list of addresses made hidden child zones `name-#0`, `name-#1`, ..., one
    per address, which give their parent's name.  So it is here for zones that have access lists
    and were written in that form.  In policies with access lists str() shows the address as
    3.9.0 did: `Zone(office, 10.1.0.0/16)`.

Deviations from the original
    Two zones of one name are refused, as up to 3.9.0; later releases merged them silently.  The
    same subnet twice in one zone counts once, with a warning.  admin_children is always filled.

Zones are made while a policy loads; afterwards everything here is read-only, except the
addresses of host names (Zorp.zones.table).
"""

from __future__ import annotations

import inspect

from Zorp import Globals
from Zorp.Base import BaseZone, ZoneDefinitionError, checked_name, hostnames_of, subnets_of
from Zorp.Config import config
from Zorp.Constants import CORE_DEBUG, CORE_INFO, CORE_POLICY, FALSE, TRUE, Z_ACCEPT, Z_REJECT
from Zorp.Exceptions import PolicyError, ZoneException
from Zorp.Log import log
from Zorp.zones.forms import read_zone_call
from Zorp.zones.table import ZoneTable, unmapped_net

__all__ = ["AbstractZone", "Inet6Zone", "InetRootZone", "InetZone", "RootZone", "Zone", "ZoneException",
           "inet_root_zone", "root_zone"]

_EVERY_SERVICE = "*"
_table = ZoneTable()


class AbstractZone(BaseZone):
    """A zone of no particular kind of address: the administrative tree and the access lists.

    Arguments:
        inbound_services, outbound_services: names of the services that may enter, may leave;
            "*" permits all.
        admin_parent: name of a zone that is defined already.
        umbrella: TRUE: zones above this one permit nothing here.
        inherit_name: TRUE: getName() is that of the parent.
    """

    def __init__(self, name, inbound_services=None, outbound_services=None, admin_parent=None, umbrella=0,
                 inherit_name=FALSE):
        super().__init__(name, admin_parent=admin_parent or None)
        self._set_access(inbound_services, outbound_services, umbrella, inherit_name)
        self.domain = None

    def _set_access(self, inbound, outbound, umbrella, inherit_name):
        if inbound or outbound is not None or umbrella:
            _table.has_access_lists = True
        self.inbound_services = {service: service for service in inbound or ()}
        self.outbound_services = {service: service for service in outbound or ()}
        self.umbrella = umbrella
        self.inherit_name = inherit_name
        self.cached_name = None
        for service in self.outbound_services:
            log(None, CORE_DEBUG, 5, "Outbound service; zone='%s', service='%s'", (self.name, service))
        for service in self.inbound_services:
            log(None, CORE_DEBUG, 5, "Inbound service; zone='%s', service='%s'", (self.name, service))

    def getName(self):
        """Return the name of the zone; for hidden zones the one they inherit."""
        if self.cached_name is None:
            inherits = self.inherit_name and self.admin_parent is not None
            self.cached_name = self.admin_parent.getName() if inherits else self.name
        return self.cached_name

    def isInboundServicePermitted(self, session):
        """Return Z_ACCEPT when the session's service may enter this zone by the access lists, else Z_REJECT."""
        return self._permitted("inbound_services", session.service.name)

    def isOutboundServicePermitted(self, session):
        """Return Z_ACCEPT when the session's service may leave this zone by the access lists, else Z_REJECT."""
        return self._permitted("outbound_services", session.service.name)

    def _permitted(self, direction, service):
        zone = self
        while zone is not None:
            listed = getattr(zone, direction)
            if service in listed or _EVERY_SERVICE in listed:
                return Z_ACCEPT
            zone = None if zone.umbrella else zone.admin_parent
        return Z_REJECT

    def isInside(self, names):
        """Return whether this zone or one above it has one of these names; a string is one name."""
        names = (names,) if isinstance(names, str) else names
        zone = self
        while zone is not None:
            if zone.name in names:
                return True
            zone = zone.admin_parent
        return False

    def buildKZorpMessage(self):
        """Return the zone and its subnets as a list of messages, plain dictionaries."""
        parent = self.admin_parent.name if self.admin_parent is not None else None
        return [{"message": "add zone", "name": self.name, "admin_parent": parent}] + [
            {"message": "add zone subnet", "zone": self.name, "family": int(subnet.family),
             "network": subnet.network_int, "bits": subnet.mask_bits} for subnet in self.subnets]

    def addAdminChild(self, child):
        """Add a zone below this one."""
        child.setAdminParent(self)

    def setAdminParent(self, parent):
        """Move this zone, with all below it, under another zone; raises PolicyError for one of its own descendants."""
        above = parent
        while above is not None:
            if above is self:
                raise PolicyError(f"A zone cannot stand below itself; zone='{self.name}', parent='{parent.name}'",
                                  remedy="choose a parent outside the zone")
            above = above.admin_parent
        if self.admin_parent is not None:
            self.admin_parent.admin_children.remove(self)
        self.admin_parent = parent
        if parent is not None:
            parent.admin_children.append(self)
        self._check_subtree_depth()

    def _check_subtree_depth(self):
        self.cached_name = None
        self._check_depth()
        for child in self.admin_children:
            child._check_subtree_depth()

    def iterAdminChildren(self, fn, parm=None):
        """Call fn(parm, self, child) for every zone directly below this one."""
        for child in list(self.admin_children):
            fn(parm, self, child)


class Zone(AbstractZone):
    """A part of the network, known by its addresses.

    Arguments:
        name: unique; rules, services and logs use it.
        addrs: one subnet as text ("10.0.0.0/8", "2001:db8::/32", "192.0.2.1"), or a sequence;
            () makes a zone that is only a parent of others.  `addr` is the older name.
        hostnames: names whose addresses belong to the zone.
        admin_parent: name of a zone defined above.
        inbound_services, outbound_services, umbrella, inherit_name: access lists of policies
            up to 3.9.6; see the module.
        domain: accepted and kept.

    Raises ZoneException (also a PolicyError) when another zone has the name, a net or a host
    name; KeyError for an unknown parent; ValueError for an address that is none.
    """

    zone_subnet_tree = _table
    has_dynamic_subnet = False

    def __init__(self, *args, **keywords):
        call = read_zone_call(args, keywords, self.zones)
        name, hostnames = checked_name(call.name), hostnames_of(call.name, call.hostnames)
        subnets = self._unique(name, subnets_of(name, call.addrs))
        self._check_hostnames(hostnames)
        self.address = subnets[0] if call.may_be_classic and len(subnets) == 1 else None
        self._is_classic = call.may_be_classic
        hidden = subnets if call.carries_access_lists and call.may_be_classic and len(subnets) > 1 else []
        own = [] if hidden else subnets
        BaseZone.__init__(self, name, own, hostnames, call.admin_parent)
        self.domain = call.domain
        self._set_access(call.inbound_services, call.outbound_services, call.umbrella, call.inherit_name)
        _table.add(self, map(_net, own), hostnames)
        if hostnames:
            Zone.has_dynamic_subnet = True
        for number, subnet in enumerate(hidden):
            self.subZone(f"{name}-#{number}", subnet, name, call.domain)

    __init__.__signature__ = inspect.Signature([
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for name, default in (
            ("self", inspect.Parameter.empty), ("name", inspect.Parameter.empty), ("addrs", ()), ("hostnames", ()),
            ("admin_parent", None), ("inbound_services", None), ("outbound_services", None),
            ("addr", None), ("umbrella", 0), ("domain", None), ("inherit_name", FALSE))])

    def _unique(self, name, subnets):
        """Return the subnets without repetitions; raises ZoneException when another zone has one of them."""
        unique = {}
        for subnet in subnets:
            owner = _table.owner(_net(subnet))
            if owner is not None:
                raise ZoneDefinitionError(f"Zone with duplicate IP range; zone={owner}, other_place='{owner.place}'",
                                          remedy=f"take {subnet} out of it or out of zone '{name}'")
            if unique.setdefault(_net(subnet), subnet) is not subnet:
                log(None, CORE_POLICY, 2, "Subnet given twice, counted once; zone='%s', subnet='%s'", (name, subnet))
        return list(unique.values())

    def _check_hostnames(self, hostnames):
        for hostname in hostnames:
            owner = _table.name_owner(hostname)
            if owner is not None:
                raise ZoneDefinitionError(f"Zone with duplicate host name; hostname='{hostname}', zone={owner}, "
                                          f"other_place='{owner.place}'",
                                          remedy="a host name may stand in one zone only")

    def subZone(self, name, addr, admin_parent, domain=None):
        """Make the hidden zone of one address of this zone."""
        keywords = {} if domain is None else {"domain": domain}
        return Zone(name, addr=addr, admin_parent=admin_parent, inherit_name=TRUE, **keywords)

    def __str__(self):
        if self._is_classic and _table.has_access_lists:
            return f"Zone({self.getName()}, {self.address})"
        return f"Zone({self.getName()})"

    @staticmethod
    def lookup(addr):
        """Return the zone of a SockAddr, or of a Subnet's first address; None: no zone holds it."""
        return _table.lookup(addr)

    @staticmethod
    def lookupByStaticAddress(addr):
        """Return the zone by subnets alone, host names ignored; None: no zone holds the address."""
        return _table.lookup_static(addr)

    @staticmethod
    def lookupByStaticAddressExactly(addr):
        """Return the zone that was given exactly this address, with full prefix length; None: no zone was."""
        return _table.lookup_static_exactly(addr)

    @staticmethod
    def lookupByName(name):
        """Return the zone of this name, or None."""
        return Zone.zones.get(name)

    lookup_by_name = lookupByName

    @staticmethod
    def lookupByHostname(hostname):
        """Return the zone that names this host, or None."""
        return _table.name_owner(hostname.rstrip(".").lower())


InetZone = Zone
Inet6Zone = Zone


def _net(subnet):
    return unmapped_net(subnet.family, subnet.network_int, subnet.mask_bits)


def claimants(addr):
    """Return the zones whose host names dispute a SockAddr, which no zone has therefore; nearly always ()."""
    return _table.claimants(addr) if _table.has_disputes else ()


def dac_enforced():
    """Return whether the access lists of zones decide, in addition to rules and listeners."""
    mode = config.options.zone_dac
    return _table.has_access_lists if mode == "auto" else mode != "off"


def check_zones():
    """The end of a load, called by init(): compile the look-up, say which access mode is in force.

    Raises PolicyError for an unknown mode.
    """
    mode = config.options.zone_dac
    if mode not in ("auto", "on", "off"):
        raise PolicyError(f"Unknown zone access mode; zone_dac={mode!r}",
                          remedy="set config.options.zone_dac to 'auto', 'on' or 'off'")
    _table.compile()
    level = 3 if _table.has_access_lists or mode != "auto" else 6       # without lists there is nothing to know
    log(None, CORE_INFO, level, "Service lists of zones; enforced='%s', zone_dac='%s', zones='%d'",
        ("yes" if dac_enforced() else "no", mode, len(Globals.zones)))


class RootZone(AbstractZone):
    """Finds zones for policies that ask the module's root_zone; not a zone that rules could name."""

    def __init__(self, name):
        self.name = name
        self.domains, self.subnets = [], []
        self.admin_children, self.admin_parent = [], None
        self._set_access(None, None, 0, FALSE)

    def addZone(self, zone):
        """Kept for policies that call it; zones register themselves."""

    def addDomain(self, domain_zone):
        """Add a root zone for one kind of address."""
        self.domains.append(domain_zone)

    def findDomain(self, address):
        """Return the root zone that knows this kind of address; raises ZoneException."""
        for domain in self.domains:
            if domain.isMatchingAddress(address):
                return domain
        raise ZoneException(str(address))

    def findZone(self, address):
        """Return the zone of a SockAddr; raises ZoneException when no zone holds it."""
        return self.findDomain(address).findZone(address)


class InetRootZone(RootZone, Zone):
    """The zones of IP addresses."""

    address, _is_classic = None, False

    @property
    def zones(self):
        """All zones, in the order of their definition."""
        return list(Globals.zones.values())

    def isMatchingAddress(self, addr):
        """Return whether this is an IP address."""
        return hasattr(addr, "ip_int")

    def findZone(self, addr):
        """Return the zone of a SockAddr; raises ZoneException when no zone holds it."""
        zone = Zone.lookup(addr)
        if zone is None:
            raise ZoneException(str(addr))
        return zone


root_zone = RootZone("root")
inet_root_zone = InetRootZone("inet-root")
root_zone.addDomain(inet_root_zone)
Globals.parsed_callbacks.append(check_zones)
