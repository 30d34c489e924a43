"""What the loaded policy would do with a connection, without one: for revoking and explaining.

Theory of operation
    An Arrival describes a connection as its dispatcher saw it.  service_for() finds the listener
    it would come to, asks that dispatcher, and then the zones' access lists; the answer is the
    service, or Refused with the reason in words.  Nothing is started and nothing counted.

    A dispatcher that takes connections in its own way (its class overrides accepted() or
    _getSession()) cannot be asked without a connection, and that is a refusal: what we do not
    understand does not pass.

Policy code may run here (getService() of a site), so never call this in a loop.
"""

from __future__ import annotations

import contextlib
import socket
from typing import NamedTuple

from Zorp import Globals
from Zorp.acceptance.binds import DBSockAddr
from Zorp.Constants import Z_ACCEPT, ZD_PROTO_TCP, ZD_PROTO_UDP
from Zorp.Dispatch import BaseDispatch, RuleDispatcher
from Zorp.Rule import Packet
from Zorp.Service import DenyService
from Zorp.Session import MasterSession
from Zorp.SockAddr import SockAddrInet, SockAddrInet6
from Zorp.transport.interfaces import interfaces
from Zorp.Zone import Zone, claimants, dac_enforced

NOT_IP = ("", 0)                         # a server that has no IP address and so no zone


class Refused(Exception):
    """The policy refuses the connection; `str()` says why."""


class Arrival(NamedTuple):
    """A connection that came, or might come.  Plain data; the names are those of a session."""

    protocol: int                        # ZD_PROTO_TCP or ZD_PROTO_UDP
    client: tuple[str, int]
    destination: tuple[str, int]         # where the client wanted to go
    iface: str | None = None             # None: unknown
    listener: tuple | None = None        # bind key of the listener; None: the rules'
    server: tuple[str, int] | None = None    # where the session is connected to; NOT_IP: not over IP

    @property
    def packet(self) -> Packet:
        """The connection as rules see it."""
        source, destination = sock_addr(self.client), sock_addr(self.destination)
        protocol = socket.IPPROTO_UDP if self.protocol == ZD_PROTO_UDP else socket.IPPROTO_TCP
        group, on_iface = None, False
        if self.iface is not None:
            group = interfaces.group(self.iface)
            on_iface = (int(destination.family), destination.ip_int) in interfaces.addresses(self.iface)
        return Packet(int(protocol), source, destination, source.port, destination.port, iface=self.iface,
                      ifgroup=group, dst_on_iface=on_iface)


def sock_addr(address: tuple[str, int]):
    """Return the SockAddr of (IP address, port); raises ValueError."""
    return (SockAddrInet6 if ":" in address[0] else SockAddrInet)(*address)


class _Socket:
    """What a dispatcher may want to know of the socket of a connection."""

    def __init__(self, arrival: Arrival) -> None:
        self.type = socket.SOCK_DGRAM if arrival.protocol == ZD_PROTO_UDP else socket.SOCK_STREAM
        self.family = socket.AF_INET6 if ":" in arrival.client[0] else socket.AF_INET
        self.interface_index = 0
        if arrival.iface is not None:
            with contextlib.suppress(OSError):       # it is gone: unknown
                self.interface_index = socket.if_nametoindex(arrival.iface)

    def getsockopt(self, *arguments):
        raise OSError("there is no socket")


class _Stream:
    """A client's stream for dispatchers that look at its socket."""

    fd = -1

    def __init__(self, arrival: Arrival) -> None:
        self.sock = _Socket(arrival)
        self.name = ""


def dispatcher_for(arrival: Arrival) -> BaseDispatch:
    """Return the dispatcher that the connection would come to.  Raises Refused."""
    for chain in Globals.dispatch_table.chains():
        is_here = (chain.params.rule_chain and chain.protocol == arrival.protocol if arrival.listener is None
                   else tuple(chain.bind.key()) == tuple(arrival.listener))
        if not is_here:
            continue
        for entry in chain.entries:
            for dispatcher in Globals.dispatches:
                if entry in dispatcher.dispatches:
                    return dispatcher
    raise Refused("nothing listens there any more" if arrival.listener is not None else "the policy has no rules")


def service_for(arrival: Arrival):
    """Return the service that the connection would get, which may still refuse it: permitted().  Raises Refused."""
    dispatcher = dispatcher_for(arrival)
    session = _session(arrival)
    if isinstance(dispatcher, RuleDispatcher):
        decision = Globals.rules.evaluate(arrival.packet)
        if decision is None:
            raise Refused("no rule matches")
        service = Globals.services.get(decision.service_name)
    else:
        service = _asked(dispatcher, session)
    if service is None:
        raise Refused("the dispatcher has no service for it")
    return service


def _asked(dispatcher: BaseDispatch, session: MasterSession):
    cls = type(dispatcher)
    if cls.accepted is not BaseDispatch.accepted or cls._getSession is not BaseDispatch._getSession:
        raise Refused(f"{cls.__name__} takes connections in its own way and cannot be asked without one")
    try:
        return dispatcher.getService(session)
    except (Exception, SystemExit) as problem:
        raise Refused(f"the dispatcher fails: {type(problem).__name__}") from None


def _session(arrival: Arrival) -> MasterSession:
    """A session for questions only: it is never released, so it never ends and counts nowhere."""
    return MasterSession(None, _Stream(arrival), sock_addr(arrival.destination),
                         DBSockAddr(sock_addr(arrival.destination), arrival.protocol or ZD_PROTO_TCP),
                         sock_addr(arrival.client))


def permit(service, arrival: Arrival) -> None:
    """Check the access lists of zones and the service's own list.  Raises Refused."""
    if isinstance(service, DenyService):
        raise Refused(f"service {service.name} denies")
    session = _session(arrival)
    session.service = service
    for client_zone in (session.client_zone, *claimants(session.client_address)):
        if dac_enforced() and (client_zone is None or client_zone.isOutboundServicePermitted(session) != Z_ACCEPT):
            raise Refused(f"service {service.name} may not leave zone {_name(client_zone)}")
    if arrival.server is None:
        return
    permitted = getattr(service, "limit_target_zones_to", None)
    server = None if tuple(arrival.server) == NOT_IP else sock_addr(arrival.server)
    for server_zone in (None,) if server is None else (Zone.lookup(server), *claimants(server)):
        if dac_enforced() and (server_zone is None or server_zone.isInboundServicePermitted(session) != Z_ACCEPT):
            raise Refused(f"service {service.name} may not enter zone {_name(server_zone)}")
        if permitted and (server_zone is None or not server_zone.isInside(permitted)):
            raise Refused(f"service {service.name} may not go to servers in zone {_name(server_zone)}")


def _name(zone) -> str:
    return zone.getName() if zone is not None else "(none)"
