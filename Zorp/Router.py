"""Routers: where a connection should go, and which local address it should come from.

    Service("web", HttpProxy, router=TransparentRouter(forge_addr=TRUE))
    Service("mail", SmtpProxy, router=DirectedRouter(SockAddrInet("10.0.0.1", 25)))

Theory of operation
    A router runs once per session, before its proxy exists: routeConnection(session) writes
    target_address, target_local and the switches beside them into the session; the chainer
    reads them when the proxy asks for its server.  Sites derive from the classes here, call
    the base method and then session.setTargetAddress().

    The local address is a wish that forge_addr and forge_port express together:

        forge_addr, or an SNAT policy       the client's address (SNAT translates it)
        only a forge_port                   the wildcard address of the client's family
        neither                             none: the kernel chooses

    What the router itself sets as target is also kept as target_address_routed, so that the
    chainer can tell it from a target that the peer named later (in-band).

    Routers are made while the policy loads and not changed afterwards; any thread may call.

What is said when the policy is loaded
    A service whose clients name the server themselves, and which neither zones nor
    limit_target_zones_to restrict, is open to everywhere: that is one line in the log.

Deviations
    A numeric forge_port counts without forge_addr too.  TRUE and FALSE as forge_port, found in
    old examples, mean Z_PORT_EXACT and Z_PORT_ANY and are reported while the policy loads;
    impossible values are refused there instead of at the first client.
"""

from __future__ import annotations

import socket

from Zorp import Globals
from Zorp.Constants import (
    CORE_POLICY,
    FALSE,
    TRUE,
    Z_PORT_ANY,
    Z_PORT_EXACT,
    Z_PORT_GROUP,
    Z_PORT_RANDOM,
)
from Zorp.Exceptions import PolicyError
from Zorp.language import arguments
from Zorp.language.caller import policy_caller
from Zorp.Log import log
from Zorp.SockAddr import SockAddr, SockAddrInet, SockAddrInet6
from Zorp.Zone import dac_enforced

_LARGEST_PORT = 65535

# forge_port: (loose, random); all of them start from the client's own port
_PORT_WISHES = {
    Z_PORT_GROUP: (TRUE, FALSE),
    Z_PORT_EXACT: (FALSE, FALSE),
    Z_PORT_RANDOM: (TRUE, TRUE),
}
# what old examples write: (meaning, its name)
_TRUTH_VALUES = {
    None: (Z_PORT_ANY, "Z_PORT_ANY"),
    FALSE: (Z_PORT_ANY, "Z_PORT_ANY"),
    TRUE: (Z_PORT_EXACT, "Z_PORT_EXACT"),
}


class AbstractRouter:
    """The base of all routers: chooses the local address.

    Arguments:
        forge_addr: TRUE: the server sees the client's address.
        forge_port: Z_PORT_ANY, Z_PORT_GROUP, Z_PORT_EXACT, Z_PORT_RANDOM, or a port from 2 to 65535.

    Raises ValueError while the policy loads: "Invalid forge_port value (<n>)".
    """

    permit_local_targets = FALSE
    overrideable = FALSE

    def __init__(self, forge_addr, forge_port):
        self.forge_addr = arguments.flag("a router", "forge_addr", forge_addr)
        self.forge_port = _checked_forge_port(forge_port)

    def routeConnection(self, session):
        """Write the local address that the session's server connection should come from."""
        port, session.target_local_loose, session.target_local_random = self._port_wish(session)
        if self.forge_addr or session.service.snat_policy:
            local = session.client_address.clone(TRUE)
            if port:
                local.port = port
            session.target_local = local
        elif port:
            session.target_local = _wildcard(session.client_address, port)

    def _port_wish(self, session):
        """Return (port, loose, random); port 0 leaves the choice to the kernel."""
        forge_port = self.forge_port
        if forge_port == Z_PORT_ANY:
            return 0, FALSE, FALSE
        forge_port = _meaning(forge_port)
        if forge_port in _PORT_WISHES:
            return getattr(session.client_address, "port", 0), *_PORT_WISHES[forge_port]
        return (0 if forge_port == Z_PORT_ANY else forge_port), FALSE, FALSE

    def _set_target(self, session, address):
        session.target_address_inband = self.overrideable
        session.setTargetAddress(address)
        session.target_address_routed = session.target_address


class TransparentRouter(AbstractRouter):
    """The server that the client addressed.

    Arguments:
        forced_port: port to use instead of the one that the client addressed; 0: that one.
        forge_addr: TRUE: the server sees the client's address.
        overrideable: TRUE: the proxy may replace the target by what the client names in-band.
        forge_port: see AbstractRouter.
    """

    def __init__(self, forced_port=0, forge_addr=FALSE, overrideable=FALSE, forge_port=Z_PORT_ANY):
        super().__init__(forge_addr, forge_port)
        forced_port = forced_port or 0
        if not isinstance(forced_port, int) or not 0 <= forced_port <= _LARGEST_PORT:
            raise PolicyError(f"Invalid forced_port value ({forced_port})",
                              remedy="give a port from 1 to 65535, or 0 for the one that the client addressed")
        self.forced_port = forced_port
        self.overrideable = arguments.flag("a router", "overrideable", overrideable)

    def routeConnection(self, session):
        """Make the original destination the target."""
        super().routeConnection(session)
        target = session.client_local.clone(FALSE)
        if self.forced_port:
            target.port = self.forced_port
        self._set_target(session, target)


class DirectedRouter(AbstractRouter):
    """A fixed server, whatever the client addressed.

    Arguments:
        dest_addr: a SockAddr, or several of them for a chainer that tries them in turn; port 0
            means the port that the client addressed.
        forge_addr, overrideable, forge_port: see TransparentRouter.

    Raises ValueError while the policy loads when dest_addr is something else.
    """

    def __init__(self, dest_addr, forge_addr=FALSE, overrideable=FALSE, forge_port=Z_PORT_ANY):
        super().__init__(forge_addr, forge_port)
        self.dest_addr = as_addresses(dest_addr, "dest_addr")
        self.overrideable = arguments.flag("a router", "overrideable", overrideable)

    def routeConnection(self, session):
        """Make copies of dest_addr the targets."""
        super().routeConnection(session)
        self._set_target(session, [address.clone(FALSE) for address in self.dest_addr])


class InbandRouter(AbstractRouter):
    """The server that the client names in the protocol, as with a non-transparent HTTP proxy.

    Arguments:
        forge_addr, forge_port: see AbstractRouter.
        permit_local_targets: TRUE: the client may name loopback, broadcast and multicast
            addresses and those of the firewall.
    """

    overrideable = TRUE

    def __init__(self, forge_addr=FALSE, forge_port=Z_PORT_ANY, permit_local_targets=FALSE):
        super().__init__(forge_addr, forge_port)
        self.permit_local_targets = arguments.flag("InbandRouter", "permit_local_targets", permit_local_targets)

    def routeConnection(self, session):
        """Leave the target to the proxy."""
        super().routeConnection(session)
        session.target_address_inband = TRUE


def as_addresses(value, argument):
    """Return one SockAddr or a sequence of them as a sequence; raises PolicyError naming the argument."""
    addresses = (value,) if isinstance(value, SockAddr) else value
    if not isinstance(addresses, (list, tuple)) or not all(isinstance(item, SockAddr) for item in addresses):
        raise PolicyError(f"Invalid {argument} value ({value!r})",
                          remedy="give a SockAddrInet or SockAddrInet6, or a list of them")
    return addresses


def _meaning(forge_port):
    """Return what a forge_port stands for; raises ValueError for an impossible one."""
    if forge_port is None or isinstance(forge_port, int):
        if forge_port in _TRUTH_VALUES:
            return _TRUTH_VALUES[forge_port][0]
        if forge_port in _PORT_WISHES or forge_port == Z_PORT_ANY or 1 < forge_port <= _LARGEST_PORT:
            return forge_port
    raise PolicyError(f"Invalid forge_port value ({forge_port})",
                      remedy="give Z_PORT_ANY, Z_PORT_GROUP, Z_PORT_EXACT, Z_PORT_RANDOM or a port from 2 to 65535")


def _checked_forge_port(forge_port):
    meaning = _meaning(forge_port)
    if forge_port in _TRUTH_VALUES:
        log(None, CORE_POLICY, 3, "Unclear forge_port value; value='%s', used='%s', place='%s'",
            (forge_port, _TRUTH_VALUES[forge_port][1], policy_caller()))
    return meaning


def _wildcard(client_address, port):
    if client_address.family == socket.AF_INET:
        return SockAddrInet("0.0.0.0", port)
    if client_address.family == socket.AF_INET6:
        return SockAddrInet6("::", port)
    raise ValueError(f"Invalid client_address type ({client_address.type})")


def _report_open_services():
    """Name the services that take any server their clients ask for."""
    if dac_enforced():
        return
    for service in Globals.services.values():
        if (getattr(getattr(service, "router", None), "overrideable", FALSE)
                and not getattr(service, "limit_target_zones_to", None)):
            log(None, CORE_POLICY, 3, "Clients of the service may name any server (see limit_target_zones_to);"
                " service='%s'", (service.name,))


Globals.parsed_callbacks.append(_report_open_services)
