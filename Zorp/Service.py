"""Services: what to do with a connection, under a name that rules and listeners refer to.

Theory of operation
    A service is declared while the policy loads and never changes afterwards; one object
    serves all its connections at once.  startInstance(session) is the way from a chosen
    service to a running proxy, top to bottom:

        limit and count, client keepalive, "Starting proxy instance"
        a StackedSession for the proxy, the router decides on the target
        zones that list services: may this client use it
        the proxy object, its entry in the statistics, its thread

    Every exception on that way leaves to the dispatcher, which logs it and ends the session;
    the end of the session calls stopInstance(), which gives back exactly what was counted.

    PFService and DenyService belong to the packet filter.  When a listener of ours gets their
    traffic, the first is relayed by `PFService.relay_class` (Zorp.Core puts PlugProxy there: a
    service may not know a protocol), the second is answered with a reset.

Threads
    startInstance() and stopInstance() run in the threads of sessions.  RunningInstances has its
    own lock; everything else is read only after loading.

Deviations, all towards refusing
    Names of unknown policies, bad limits and codes are errors while the policy loads; some of
    them used to be ignored.  The limit test and the count are one step.
"""

from __future__ import annotations

import enum
import threading
import time

from Zorp import Globals
from Zorp.acceptance.secondary_sessions import secondary_sessions
from Zorp.acceptance.verdict import DENIED_BY_POLICY, conclude
from Zorp.Chainer import AbstractChainer, ConnectChainer
from Zorp.Constants import CORE_SESSION, Z_KEEPALIVE_BOTH, Z_KEEPALIVE_CLIENT, Z_KEEPALIVE_NONE
from Zorp.engine.builtin_proxy import BuiltinProxy
from Zorp.Exceptions import DACException, LimitException, PolicyError
from Zorp.language import arguments
from Zorp.language.caller import policy_caller
from Zorp.Log import log
from Zorp.NAT import NATPolicy
from Zorp.ProxyGroup import ProxyGroup
from Zorp.Resolver import DNSResolver
from Zorp.Router import DirectedRouter, TransparentRouter
from Zorp.Session import StackedSession
from Zorp.Szig import statistics
from Zorp.Zone import Zone

default_snat = None
default_dnat = None
default_auth = None
default_router = None
default_chainer = None

Z_SESSION_LIMIT_NOT_REACHED = 0
Z_SESSION_LIMIT_GRACEFULLY_REACHED = 1
Z_SESSION_LIMIT_REACHED = 2

_NAME_BYTES = 1023

__all__ = [
    "Z_SESSION_LIMIT_GRACEFULLY_REACHED",
    "Z_SESSION_LIMIT_NOT_REACHED",
    "Z_SESSION_LIMIT_REACHED",
    "AbstractService",
    "DenyIPv4",
    "DenyIPv6",
    "DenyService",
    "PFService",
    "RunningInstances",
    "Service",
    "default_auth",
    "default_chainer",
    "default_dnat",
    "default_router",
    "default_snat",
]


class RunningInstances:
    """The connections that one service runs now.

    Any thread may call.  _running_lock guards _running and nothing else, and no foreign code
    runs while it is held.  Test and count are one step, so fifty clients in one moment cannot
    get past a limit of ten.
    """

    def __init__(self) -> None:
        self._running_lock = threading.Lock()
        self._running = 0

    @property
    def number(self) -> int:
        """How many run now."""
        return self._running

    def enter(self, maximum: int) -> None:
        """Count one more; raise LimitException when `maximum` (0: no limit) run already."""
        with self._running_lock:
            if maximum and self._running >= maximum:
                raise LimitException("Instance limit reached")
            self._running += 1

    def leave(self) -> None:
        """Count one less."""
        with self._running_lock:
            self._running -= 1


class AbstractService:
    """Base of all services; construction puts the service into Globals.services.

    Raises ValueError "Duplicate service: NAME", or for a name that is no text.
    """

    def __init__(self, name):
        if not isinstance(name, str) or not 0 < len(name.encode("utf-8", "surrogateescape")) <= _NAME_BYTES:
            raise PolicyError(f"Invalid service name; service='{name}'",
                              remedy="give the service a name of 1 to 1023 bytes")
        if name in Globals.services:
            raise PolicyError(f"Duplicate service: {name}", remedy="give each service its own name, the first one is "
                              f"at {getattr(Globals.services[name], 'place', 'another place')}")
        self.name = name
        self.place = policy_caller()             # for explanations
        Globals.services[name] = self

    def startInstance(self, session):
        """Serve the connection of `session`; raise an exception to refuse it."""
        raise NotImplementedError

    def stopInstance(self, session):
        """Take note that the connection of `session` is over."""
        raise NotImplementedError

    def __str__(self):
        return self.name


class _ProxyService(AbstractService):
    """A service whose connections are served by a proxy of this process."""

    keepalive = Z_KEEPALIVE_NONE
    proxy_class = None
    router = chainer = None
    snat_policy = dnat_policy = None
    authentication_policy = authorization_policy = encryption_policy = None
    limit_target_zones_to = None
    detector_config = detector_default_service_name = None
    max_instances = 0
    max_sessions = 1
    start_time = 0                    # epoch seconds of the latest start

    def __init__(self, name):
        super().__init__(name)
        self._running = RunningInstances()
        self.proxy_group = ProxyGroup(self.max_sessions)
        self.lock = threading.Lock()  # kept for site code that takes it; guards nothing of ours

    @property
    def num_instances(self):
        """How many connections the service runs now."""
        return self._running.number

    def startInstance(self, session):
        """Start a proxy for the connection; return its StackedSession.

        Raises LimitException when max_instances run already, and whatever the router, the zones'
        permissions or the proxy's constructor raise.  A running proxy that takes the connection as
        a secondary session is one instance with it.
        """
        seat = secondary_sessions.join(session)
        if seat is not None:
            return self._join(session, seat)
        self._running.enter(self.max_instances)
        session.started = 1
        self.start_time = now_s = time.time()
        statistics.service_started(self.name, session.instance_id, now_s)
        stream = session.client_stream
        if self.keepalive & Z_KEEPALIVE_CLIENT:
            stream.keepalive = 1
        log(session.session_id, CORE_SESSION, 3,
            "Starting proxy instance; client_fd='%d', client_address='%s', client_zone='%s', client_local='%s',"
            " client_protocol='%s'",
            (stream.fd, session.client_address, session.client_zone, session.client_local, session.protocol_name))
        stacked = StackedSession(session, self.chainer)
        try:
            self._start_proxy(stacked, stream)
        except BaseException:
            stacked.destroy()
            raise
        return stacked

    def _join(self, session, seat):
        """Serve the connection by a proxy that runs already."""
        session.setServiceInstance(seat.instance_id)
        session.secondary_connection_id = seat.number
        stream = session.client_stream
        stacked = StackedSession(session, self.chainer)
        try:
            if self.keepalive & Z_KEEPALIVE_CLIENT:
                stream.keepalive = 1
            log(session.session_id, CORE_SESSION, 3,
                "Starting secondary session; secondary='%d', client_fd='%d', client_address='%s', client_zone='%s',"
                " client_local='%s', client_protocol='%s'",
                (seat.number, stream.fd, session.client_address, session.client_zone, session.client_local,
                 session.protocol_name))
            self._start_proxy(stacked, stream, seat)
        except BaseException:
            seat.leave()
            stacked.destroy()
            raise
        return stacked

    def _start_proxy(self, stacked, stream, seat=None):
        proxy_class = self.proxy_class
        stacked.client_stream = stream
        stream.name = f"{stacked.owner.session_id}/{proxy_class.name}/client"
        self.router.routeConnection(stacked)
        stacked.checkClientPermitted()
        proxy = proxy_class(stacked) if seat is None else proxy_class.joining(stacked, seat)
        stacked.registerStart()
        if self.proxy_group.start(proxy):
            return
        self.proxy_group = ProxyGroup(self.max_sessions)
        if not self.proxy_group.start(proxy):
            raise RuntimeError("Error starting proxy in group")

    def stopInstance(self, session):
        """Give the instance back; does nothing for a session that was refused before it counted."""
        if not session.started:
            return
        session.started = 0
        self._running.leave()
        statistics.service_stopped(self.name)
        log(session.session_id, CORE_SESSION, 4, "Ending proxy instance;")


class Service(_ProxyService):
    """A named way to serve connections with a proxy.

        Service("office_http", HttpProxy, router=TransparentRouter(), max_instances=100)
        Service("office_http", TransparentChainer(), HttpProxy)         as releases 0.8 to 1.x wrote it

    Arguments:
        name: unique in the policy.
        proxy_class: class of the proxy, not an instance.
        router: decides on the server; default_router, else TransparentRouter().
        chainer: connects to it; default_chainer, else ConnectChainer().
        snat_policy, dnat_policy: names of NATPolicy objects; snat, dnat: NAT objects instead.
        authentication_policy: name; auth, auth_policy: its older forms.
        authorization_policy, resolver_policy, encryption_policy: names.
        max_instances: connections at the same time; 0: any number.
        max_sessions: accepted for old policies; every proxy has its own thread.
        auth_name: what an authenticating user is told; the service's name.
        keepalive: Z_KEEPALIVE_...: on which sides TCP keepalive is switched on.
        limit_target_zones_to: a zone name or a sequence; servers elsewhere are refused.
        detector_config, detector_default_service_name: set by Rule(detect=...).

    Raises ValueError (PolicyError) while the policy loads for unknown names, contradictions and
    values of the wrong kind.
    """

    def __init__(self, name, proxy_class, router=None, chainer=None, snat_policy=None, snat=None,
                 dnat_policy=None, dnat=None, authentication_policy=None, authorization_policy=None,
                 max_instances=0, max_sessions=0, auth_name=None, resolver_policy=None, auth=None,
                 auth_policy=None, keepalive=None, encryption_policy=None, limit_target_zones_to=None,
                 detector_config=None, detector_default_service_name=None):
        if isinstance(proxy_class, AbstractChainer) and isinstance(router, type):
            proxy_class, chainer, router = router, proxy_class, chainer
        _check_kinds(name, proxy_class, router, chainer)
        self.proxy_class = proxy_class
        self.chainer = chainer or default_chainer or ConnectChainer()
        self.router = router or _fitting_router(self.chainer) or default_router or TransparentRouter()
        self.max_instances = _limit(name, "max_instances", max_instances)
        self.max_sessions = _limit(name, "max_sessions", max_sessions) or 1
        if keepalive:
            self.keepalive = _keepalive(name, keepalive)
        self.auth_name = arguments.text(f"Service '{name}'", "auth_name", auth_name) if auth_name else name
        self.snat_policy = _nat_policy(name, "snat", snat_policy, snat, default_snat)
        self.dnat_policy = _nat_policy(name, "dnat", dnat_policy, dnat, default_dnat)
        self.authentication_policy = _authentication(name, authentication_policy, auth, auth_policy)
        self.authorization_policy = _known(name, "authorization", "policy", authorization_policy,
                                           Globals.authorization_policies)
        self.resolver_policy = _known(name, "resolver", "policy", resolver_policy, Globals.resolver_policies)
        if self.resolver_policy is None:
            self.resolver_policy = DNSResolver()
        self.encryption_policy = _known(name, "encryption", "name", encryption_policy, Globals.encryption_policies)
        self.limit_target_zones_to = _zone_names(name, limit_target_zones_to)
        self.detector_config = detector_config
        self.detector_default_service_name = detector_default_service_name
        super().__init__(name)


class PFService(_ProxyService):
    """Traffic that the packet filter forwards by itself, whatever its protocol.

    Arguments:
        name: unique in the policy.
        router: TransparentRouter (the default: keep the destination) or a DirectedRouter with
            one address; forge_addr=TRUE keeps the client's address towards the server.
        snat_policy, dnat_policy: names of NATPolicy objects whose NAT class has a packet form.

    Raises ValueError for other routers, more than one address, and other NAT classes.
    """

    relay_class: type | None = None       # the proxy that stands in when a listener gets the traffic

    def __init__(self, name, router=None, snat_policy=None, dnat_policy=None):
        self.router = router or default_router or TransparentRouter()
        _check_packet_router(name, self.router)
        self.chainer = ConnectChainer()
        self.snat_policy = _packet_nat_policy(name, "snat", snat_policy)
        self.dnat_policy = _packet_nat_policy(name, "dnat", dnat_policy)
        self.auth_name = name
        self.resolver_policy = None
        super().__init__(name)

    @property
    def proxy_class(self):
        """The relay; raises RuntimeError when nobody provided one."""
        if PFService.relay_class is None:
            raise RuntimeError("No relay for packet filter services")
        return PFService.relay_class


class _DenyCode(enum.IntEnum):
    @classmethod
    def to_string(cls, value):
        """Return the name of a code, None when there is no such code."""
        return cls(value).name if value in cls._value2member_map_ else None

    def __str__(self):
        return str(self.value)


class DenyIPv4(_DenyCode):
    """How the packet filter answers a denied IPv4 client."""

    DROP = 0
    TCP_RESET = 1
    ICMP_NET_UNREACHABLE = 2
    ICMP_HOST_UNREACHABLE = 3
    ICMP_PROTO_UNREACHABLE = 4
    ICMP_PORT_UNREACHABLE = 5
    ICMP_NET_PROHIBITED = 6
    ICMP_HOST_PROHIBITED = 7
    ICMP_ADMIN_PROHIBITED = 8


class DenyIPv6(_DenyCode):
    """How the packet filter answers a denied IPv6 client."""

    DROP = 0
    TCP_RESET = 1
    ICMP_NO_ROUTE = 2
    ICMP_ADMIN_PROHIBITED = 3
    ICMP_ADDR_UNREACHABLE = 4
    ICMP_PORT_UNREACHABLE = 5


class DenyService(AbstractService):
    """Refuse traffic; the packet filter answers as the settings say.

    Arguments:
        name: unique in the policy.
        logging: write a line for refused connections.
        ipv4_setting, ipv6_setting: members of DenyIPv4, DenyIPv6.

    A connection that reaches a listener of ours is closed with a reset, whatever the settings.
    """

    def __init__(self, name, logging=True, ipv4_setting=DenyIPv4.DROP, ipv6_setting=DenyIPv6.DROP):
        self.logging = arguments.flag(f"DenyService '{name}'", "logging", logging)
        self.ipv4_setting = _deny_code(name, "ipv4_setting", DenyIPv4, ipv4_setting)
        self.ipv6_setting = _deny_code(name, "ipv6_setting", DenyIPv6, ipv6_setting)
        super().__init__(name)

    def startInstance(self, session):
        """Reset the client's connection; DACException, or None when nothing is to be logged."""
        session.client_stream.reset()
        if self.logging:
            raise DACException(f"Denied by service '{self.name}'")
        conclude(session, DENIED_BY_POLICY, f"Denied by service '{self.name}'")

    def stopInstance(self, session):
        """Nothing was started."""


# ---------------------------------------------------------------------------- checks at load

def _check_kinds(name, proxy_class, router, chainer):
    where = f"service='{name}'"
    if hasattr(proxy_class, "routeConnection") and not isinstance(proxy_class, type):
        raise PolicyError(f"Router given in place of the proxy class; {where}",
                          remedy="the order is Service(name, proxy_class, router)")
    if not isinstance(proxy_class, type) or not issubclass(proxy_class, BuiltinProxy):
        raise PolicyError(f"Service without a proxy class; {where}, proxy_class='{proxy_class}'",
                          remedy="the order is Service(name, proxy_class, router), proxy_class a class like PlugProxy")
    for value, what, method in ((router, "router", "routeConnection"), (chainer, "chainer", "chainParent")):
        if value is not None and (isinstance(value, type) or not hasattr(value, method)):
            raise PolicyError(f"Invalid {what}; {where}, {what}='{value}'",
                              remedy=f"give a {what} object, with parentheses: {what}=Some{what.capitalize()}()")


def _fitting_router(chainer):
    """Return the router that a chainer of release 1 brings along: it decides on the target itself."""
    fitting = getattr(chainer, "fitting_router", None)
    return fitting() if fitting is not None else None


def _limit(name, what, value):
    if value is None:
        return 0
    if not isinstance(value, int) or value < 0:
        raise PolicyError(f"Invalid {what}; service='{name}', {what}='{value}'",
                          remedy="give a number from 0 (no limit) on")
    return int(value)


def _keepalive(name, value):
    if not isinstance(value, int) or not Z_KEEPALIVE_NONE <= value <= Z_KEEPALIVE_BOTH:
        raise PolicyError(f"Invalid keepalive; service='{name}', keepalive='{value}'",
                          remedy="give Z_KEEPALIVE_NONE, Z_KEEPALIVE_CLIENT, Z_KEEPALIVE_SERVER or Z_KEEPALIVE_BOTH")
    return int(value)


def _known(name, kind, field, wanted, registry):
    """Return the object called `wanted`, None when none is wanted; a policy object stands for itself."""
    if not wanted:
        return None
    if not isinstance(wanted, str):
        if any(wanted is policy for policy in registry.values()):
            return wanted
        wanted = getattr(wanted, "name", wanted)
    if not isinstance(wanted, str) or wanted not in registry:
        raise PolicyError(f"No such {kind} policy; {field}='{wanted}', service='{name}'",
                          remedy=f"define it before the service, or correct the name in Service('{name}', ...)")
    return registry[wanted]


def _nat_policy(name, kind, policy, nat, default):
    if nat and policy:
        raise PolicyError(f"Cannot set both {kind} and {kind}_policy",
                          remedy=f"give Service('{name}', ...) one of them")
    if policy:
        return _known(name, "NAT", "policy", policy, Globals.nat_policies)
    nat = nat or default
    if nat and f"__{name}-{kind}" in Globals.nat_policies:
        raise PolicyError(f"Duplicate service: {name}", remedy="give each service its own name")
    return NATPolicy(f"__{name}-{kind}", nat) if nat else None


def _packet_nat_policy(name, kind, policy):
    found = _nat_policy(name, kind, policy, None, None)
    if found is not None and not hasattr(found.nat, "getKZorpMapping"):
        raise PolicyError(f"NAT class does not support KZorp representation; service='{name}', policy='{found.name}'",
                          remedy="a PFService needs a NAT class with a packet form, such as GeneralNAT")
    return found


def _check_packet_router(name, router):
    if isinstance(router, DirectedRouter):
        if len(router.dest_addr) != 1:
            raise PolicyError(
                f"DirectedRouter with more than one destination address not supported by KZorp; service='{name}'",
                remedy="give the DirectedRouter of a PFService one address")
    elif not isinstance(router, TransparentRouter):
        raise PolicyError(f"Invalid router type specified for port forwarded service; service='{name}'",
                          remedy="a PFService takes a TransparentRouter or a DirectedRouter")


def _authentication(name, policy, auth, auth_policy):
    if policy and (auth or auth_policy):
        raise PolicyError("Cannot set authentication_policy and auth or auth_policy",
                          remedy=f"give Service('{name}', ...) one of them")
    if policy:
        return _known(name, "authentication", "policy", policy, Globals.authentication_policies)
    wanted = auth or auth_policy or default_auth
    if wanted and not isinstance(wanted, str) and callable(getattr(wanted, "performAuthentication", None)):
        return wanted                            # release 2 gave the object itself
    return _known(name, "authentication", "policy", wanted, Globals.auth_policies)


def _zone_names(name, zones):
    if not zones:
        return None
    names = arguments.items(f"Service '{name}'", "limit_target_zones_to", zones, "give a zone name or a list of them")
    for zone in names:
        if not isinstance(zone, str) or Zone.lookupByName(zone) is None:
            raise PolicyError(f"No zone was defined with that name; zone='{zone}', service='{name}'",
                              remedy="define the zone before the service, or correct limit_target_zones_to")
    return names


def _deny_code(name, what, codes, value):
    if not isinstance(value, int) or isinstance(value, bool) or value not in codes._value2member_map_:
        raise PolicyError(f"Invalid {what}; service='{name}', {what}='{value}'",
                          remedy=f"give a member of {codes.__name__}, such as {codes.__name__}.TCP_RESET")
    return codes(value)
