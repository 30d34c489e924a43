"""Dispatchers: which service gets a connection that arrives at an address.

Theory of operation
    A dispatcher is declared in the function of an instance, with bind objects and a way to
    choose services.  It registers with the dispatch table; connections come back through
    accepted(), in the thread that will own the session:

        _getSession     a MasterSession with client data and zone, then getService(session)
        startService    Service.startInstance(), its exceptions become verdicts
        release         from here on only the proxies keep the session alive

    Dispatcher, ZoneDispatcher and CSZoneDispatcher choose by address and zone;
    NDimensionDispatcher by rules of its own; RuleDispatcher, made once when the policy has
    rules, by those.  Sites override getService(session), which may look at the session as
    release 3 or at a ClientInfo as release 5 did, for both have the same attributes; or
    _getSession() as in release 6; or accepted() altogether.

Deviations
    A refused connection leaves a summary line even when no service was found; its session id
    is "svc" then.  Addresses without a zone are refused and logged.  Misses are not cached.
    Names of services and zones in tables are checked when the policy has loaded: a table entry
    for a zone that does not exist would let its clients fall through to the entry for any.
"""

from __future__ import annotations

import difflib
import socket

from Zorp import Globals, Log
from Zorp.acceptance.bind_forms import binds_of, parsePortString
from Zorp.acceptance.bind_forms import convertDBProtoToIPProto as convertDBProtoToIPProto  # policies know it from here
from Zorp.acceptance.bind_forms import convertIPProtoToDBProto as convertIPProtoToDBProto
from Zorp.acceptance.bind_forms import convertSockAddrToDB as convertSockAddrToDB
from Zorp.acceptance.binds import DBSockAddr
from Zorp.acceptance.dispatch_table import NO_SESSION, Dispatch, DispatchParams
from Zorp.acceptance.instance_numbers import getInstanceId
from Zorp.acceptance.open_sessions import OpenSessions
from Zorp.acceptance.verdict import DENIED_BY_LIMIT, DENIED_BY_POLICY, conclude, refuse
from Zorp.Cache import ShiftCache
from Zorp.Config import config
from Zorp.Constants import (
    CORE_DEBUG,
    CORE_ERROR,
    CORE_POLICY,
    CORE_SESSION,
    FALSE,
    TRUE,
    ZD_PROTO_TCP,
    ZD_PROTO_UDP,
)
from Zorp.Exceptions import PolicyError, ServiceException, ZoneException
from Zorp.language import arguments
from Zorp.language.caller import policy_caller
from Zorp.Log import log
from Zorp.Rule import RuleSet
from Zorp.Service import AbstractService, PFService
from Zorp.Session import MasterSession
from Zorp.SockAddr import SockAddrInet, SockAddrInet6
from Zorp.Zone import Zone

ZD_PRI_LISTEN = 100
ZD_PRI_NORMAL = 0
ZD_PRI_RELATED = -100

dispatch_id = 0              # the number of the next dispatcher
listen_hook = None           # assigned by old site code; nothing calls them
unlisten_hook = None

_ANY_ZONE = "*"

_clients, _zones = OpenSessions(), OpenSessions()


# ---------------------------------------------------------------------------- base

class BaseDispatch:
    """What all dispatchers do: listen, accept, start the chosen service.

    Arguments:
        session_id: name of the instance, the first part of the dispatcher's own session id.
        bindto: a bind object or a sequence of them, all of one protocol; a bare SockAddr is TCP.
        transparent: TRUE: foreign destinations are accepted, direct connections refused.
        mark_tproxy: TRUE: as transparent, direct connections are not refused.
        prio: of several dispatchers of one address the one with the lowest number is asked first.
        backlog: TCP: connections that may wait to be accepted; 255.
        accept_one: TCP: TRUE: stop listening after one connection.
        rcvbuf, session_limit: UDP: bytes of the receive buffer; accepted for old policies.
        rule_port: transparent ones: the ports that are diverted to it, "80,8000:8099".
        proxy_protocol: subnets whose hosts must send a PROXY header.
        threaded: accepted for old policies.

    Raises RuntimeError outside an instance function, ValueError for bad binds, TypeError for
    unknown keywords.
    """

    def __init__(self, session_id, bindto=None, **kw):
        if not Globals.parsing:
            raise RuntimeError("Parsing phase has not completed yet, Dispatcher must be defined in the instance"
                               " init() function.")
        binds = binds_of(bindto)
        prio = kw.pop("prio", ZD_PRI_LISTEN)
        if not isinstance(prio, int):
            raise arguments.invalid("a dispatcher", "prio", prio, "give a number, or leave it out")
        self.rule_port = parsePortString(kw.pop("rule_port", ""))
        self.transparent = kw.get("transparent", FALSE)
        self.protocol = binds[0].protocol
        self.session_id = _next_session_id(session_id)
        self._bind_text = ", ".join(str(bind) for bind in binds)
        params = self._params(kw)
        self.backlog, self.threaded = params.backlog, params.threaded
        # the handler is looked up again for every connection: sites replace accepted() on objects, too
        self.dispatches = [
            Dispatch(self.session_id, bind, prio, lambda *connection: self.accepted(*connection), params)
            for bind in binds]
        Globals.dispatches.append(self)

    def _params(self, keywords) -> DispatchParams:
        return DispatchParams.from_keywords(self.protocol, keywords)

    def accepted(self, stream, client_address, client_local, client_listen):
        """Serve a connection: TRUE when a service took it over, None when it is refused.

        Called in the thread that will own the session.  The stream is closed when it is refused.
        """
        if stream is None:
            return None
        session = self._getSession(stream, client_local, client_listen, client_address)
        if session is None:
            stream.close()
            return None
        try:
            stream.name = session.session_id
            if Log.loudest >= 8:
                log(NO_SESSION, CORE_DEBUG, 8, "Connection accepted; client_address='%s'", (client_address,))
            if not _is_within_limits(session):
                conclude(session, DENIED_BY_LIMIT)
                return None
            return self.startService(session.service, session)
        finally:
            session.release()

    def _getSession(self, client_stream, client_local, client_listen, client_address):
        """Return the MasterSession, bound to the chosen service, or None to refuse the connection."""
        session = MasterSession(None, client_stream, client_local, client_listen, client_address)
        try:
            service = self.getService(session)
            if service is not None:
                session.setService(service)
                return session
            conclude(session, DENIED_BY_POLICY)
        except (Exception, SystemExit) as problem:
            refuse(session, problem)
        session.release()
        return None

    def getService(self, session):
        """Return the service for a connection, None (or an exception of Zorp.Exceptions) to refuse it."""
        raise NotImplementedError

    @staticmethod
    def startService(service, session):
        """Start the service: TRUE, or None after the reason was logged and the client's side closed."""
        if Log.loudest >= 5:
            log(session.session_id, CORE_SESSION, 5, "Starting service; name='%s'", (service.name,))
        try:
            service.startInstance(session)
        except (Exception, SystemExit) as problem:
            refuse(session, problem)
            session.destroy()
            return None
        return TRUE

    def destroy(self):
        """Stop accepting connections; those that are served go on."""
        for dispatch in self.dispatches:
            dispatch.destroy()
        self.dispatches = []
        if self in Globals.dispatches:
            Globals.dispatches.remove(self)


AbstractDispatch = BaseDispatch


def _is_within_limits(session):
    """Count the session with those of its client and its zone; False, and logged, when one of them has too many."""
    options = config.options
    per_client, per_zone = options.max_connections_per_client, options.max_connections_per_zone
    if per_client and not _clients.admit(session, getattr(session.client_address, "ip_s", ""), per_client):
        return False
    if not per_zone:
        return True
    zone = session.client_zone               # None: nobody knows who they are, so they share a limit, too
    return _zones.admit(session, "no zone" if zone is None else f"zone {zone.name}", per_zone)


def _next_session_id(instance):
    global dispatch_id
    number = dispatch_id
    dispatch_id += 1
    return f"{instance}/dsp/dispatch:{number}" if instance else f"dsp/dispatch:{number}"


def _warn_deprecated(cls, instead):
    """Say once per class that there is a better one."""
    if cls.deprecated_warning:
        cls.deprecated_warning = False
        log(None, CORE_DEBUG, 3, "Use of %s class is deprecated, %s should be used instead.; place='%s'",
            (cls.__name__, instead, policy_caller()))


# ---------------------------------------------------------------------------- dispatchers of policies

class Dispatcher(BaseDispatch):
    """Start one fixed service for every connection.

        Dispatcher(DBSockAddr(SockAddrInet('10.1.0.1', 50080), ZD_PROTO_TCP), 'office_http', transparent=TRUE)

    `service` is the name of a service that exists already (or the object); raises
    ServiceException "Service NAME not found".
    """

    def __init__(self, bindto=None, service=None, **kw):
        if service is not None:
            self.service = _existing_service(service)
        elif type(self).getService is Dispatcher.getService:
            raise _UnknownService(service)
        else:
            self.service = None                  # a site's own getService() chooses
        self.bindto = bindto
        super().__init__(Globals.instance_name, bindto, **kw)

    def getService(self, session):
        """Return the fixed service."""
        return self.service


def _existing_service(service):
    if isinstance(service, AbstractService):
        return service
    if not isinstance(service, str) or service not in Globals.services:
        raise _UnknownService(service)
    return Globals.services[service]


class _UnknownService(PolicyError, ServiceException):
    """A dispatcher is given a service that does not exist."""

    def __init__(self, service):
        near = difflib.get_close_matches(str(service), Globals.services, 1)
        known = f"did you mean '{near[0]}'" if near else f"there are: {', '.join(sorted(Globals.services)) or 'none'}"
        super().__init__(f"Service {service} not found", remedy="give the dispatcher the name of a service that is "
                         f"defined above it; {known}")
        self.detail = self.problem

    def __str__(self):
        return f"{self.what}: {self.problem}; {self.remedy}"


class _TableDispatcher(Dispatcher):
    """Choose among the services of a table by zones; what both zone dispatchers share."""

    _none_found = ""             # the line of log when the table has no service; fields: bind and zones

    def __init__(self, bindto, services, cache_name, kw):
        if not hasattr(services, "keys"):
            raise PolicyError(f"services must be a mapping; services='{services}'",
                              remedy="write services={'office': 'office_http', '*': 'other_http'}")
        self.services = services
        self.follow_parent = arguments.flag("a dispatcher", "follow_parent", kw.pop("follow_parent", FALSE))
        self._declared_at = policy_caller()
        BaseDispatch.__init__(self, Globals.instance_name, bindto, **kw)
        self.bindto = bindto
        self.cache = ShiftCache(f"{cache_name}({self._bind_text})", config.options.zone_dispatcher_shift_threshold)

    def checkReferences(self):
        """Raise PolicyError when the finished policy lacks a service or a zone of the table."""
        place = str(self._declared_at)
        for name in self.services.values():
            if not isinstance(name, AbstractService) and (
                    not isinstance(name, str) or name not in Globals.services):
                raise PolicyError(f"No such service; service='{name}', dispatcher='{place}'", place=place,
                                  remedy="define the service, or correct the name in the table of the dispatcher")
        if type(self).getService not in (ZoneDispatcher.getService, CSZoneDispatcher.getService):
            return                               # a site that chooses itself may have keys of its own
        known = {_ANY_ZONE, *Globals.zones, *(zone.getName() for zone in Globals.zones.values())}
        for key in self.services:
            names = self._zones_of_key(key)
            if names is None:
                raise PolicyError(f"Not a pair of zones; key={key!r}, dispatcher='{place}'", place=place,
                                  remedy="write the keys as ('office', 'internet'), '*' for any zone")
            for name in names:
                if name not in known:
                    raise PolicyError(f"No such zone; zone='{name}', dispatcher='{place}'", place=place,
                                      remedy="define the zone, or correct the name in the table of the dispatcher")

    @staticmethod
    def _zones_of_key(key):
        """Return the zone names that a key of the table holds, None when it can be none."""
        return (key,)

    def _candidates(self, zone):
        """Return the names under which a zone may stand in the table, the best first."""
        names = [zone.getName()]
        while self.follow_parent and (zone := zone.admin_parent) is not None:
            if (name := zone.getName()) != names[-1]:
                names.append(name)
        names.append(_ANY_ZONE)
        return names

    def _choose(self, key, candidates):
        """Return the service of the first candidate in the table, from the cache when it was chosen before."""
        service = self.cache.lookup(key)
        if service is not None:
            return service
        for candidate in candidates():
            if candidate in self.services:
                name = self.services[candidate]
                service = name if isinstance(name, AbstractService) else Globals.services.get(name)
                if service is None:
                    log(NO_SESSION, CORE_POLICY, 2, "No such service; service='%s'", (name,))
                    return None
                self.cache.store(key, service)
                return service
        log(NO_SESSION, CORE_POLICY, 2, self._none_found, (self._bind_text, *((key,) if isinstance(key, str) else key)))
        return None


def _zone_of(address):
    zone = Zone.lookup(address)
    if zone is None:
        raise ZoneException(str(address))
    return zone


class ZoneDispatcher(_TableDispatcher):
    """Choose the service by the client's zone.

    `services` maps zone names, or "*" for any, to service names.  With follow_parent=TRUE the
    entry of an administrative parent serves its children, too; the nearest one wins.
    """

    deprecated_warning = True
    _none_found = "No applicable service found for this client zone; bindto='%s', client_zone='%s'"

    def __init__(self, bindto=None, services=None, **kw):
        _warn_deprecated(ZoneDispatcher, "Rule")
        super().__init__(bindto, services, "sdispatch", kw)

    def getService(self, session):
        """Return the service of the client's zone; raises ZoneException when it has none."""
        zone = session.client_zone or _zone_of(session.client_address)
        return self._choose(zone.getName(), lambda: self._candidates(zone))


class CSZoneDispatcher(_TableDispatcher):
    """Choose the service by the zones of the client and of the server it asked for.

    `services` maps (client zone, server zone) to service names; "*" stands for any zone.  The
    nearest client zone wins, among those the nearest server zone.
    """

    deprecated_warning = True
    _none_found = ("No applicable service found for this client & server zone; bindto='%s', client_zone='%s',"
                   " server_zone='%s'")

    def __init__(self, bindto=None, services=None, **kw):
        _warn_deprecated(CSZoneDispatcher, "Rule")
        super().__init__(bindto, services, "csdispatch", kw)

    @staticmethod
    def _zones_of_key(key):
        return key if isinstance(key, tuple) and len(key) == 2 else None

    def getService(self, session):
        """Return the service of the pair of zones; raises ZoneException when one has none."""
        client_zone = session.client_zone or _zone_of(session.client_address)
        session.server_zone = server_zone = _zone_of(session.client_local)
        return self._choose(
            (client_zone.getName(), server_zone.getName()),
            lambda: ((client, server) for client in self._candidates(client_zone)
                     for server in self._candidates(server_zone)))


class NDimensionDispatcher(Dispatcher):
    """Choose the service by rules of its own, as release 3.9.0 wrote them.

    `rules` is a dictionary or a sequence of them with the keys service, rule_id, iface, ifgroup,
    proto, src_port, dst_port, src_subnet, src_zone, dst_subnet, dst_zone (`auth` is ignored).
    """

    def __init__(self, bindto=None, rules=None, **kw):
        self.rules = (rules,) if hasattr(rules, "keys") else rules
        self._rule_set = RuleSet.from_descriptions(self.rules)
        BaseDispatch.__init__(self, Globals.instance_name, bindto, **kw)
        self.bindto = bindto

    def getService(self, session):
        """Return the service of the rule that fits best, None when none does."""
        rule, _client_zone, server_zone = self._rule_set.decide(
            session.client_stream.sock, session.client_address, session.client_local, session.client_zone)
        if rule is None:
            log(NO_SESSION, CORE_POLICY, 2, "No applicable service found; bindto='%s'", (self._bind_text,))
            return None
        session.server_zone, session.rule_id = server_zone, rule.rule_id
        return Globals.services.get(rule.service)


# ---------------------------------------------------------------------------- rules

class RuleDispatcher(BaseDispatch):
    """Choose the service by the rules of the policy; one per instance, made when there are rules.

    Listens on the loopback addresses only: the packet filter diverts connections to it, and
    whoever addresses it directly is refused.
    """

    def __init__(self, **kw):
        port = config.options.rule_listen_port
        addresses = _loopback_addresses(port)
        self.bindto = [DBSockAddr(address, ZD_PROTO_TCP) for address in addresses]
        super().__init__(Globals.instance_name, self.bindto, **kw)
        params = DispatchParams(transparent=True, rule_chain=True)
        for address in addresses:
            bind = DBSockAddr(address.clone(FALSE), ZD_PROTO_UDP)
            self.bindto.append(bind)
            self.dispatches.append(Dispatch(
                self.session_id, bind, ZD_PRI_LISTEN, lambda *connection: self.accepted(*connection), params))

    def _params(self, keywords):
        return DispatchParams(transparent=True, rule_chain=True, proxy_protocol=DispatchParams.from_keywords(
            ZD_PROTO_TCP, {"proxy_protocol": config.options.proxy_protocol}).proxy_protocol)

    @classmethod
    def createOneInstance(cls):
        """Make the dispatcher of the instance; a second call does nothing."""
        if not any(isinstance(dispatcher, RuleDispatcher) for dispatcher in Globals.dispatches):
            cls()

    def _getSession(self, client_stream, client_local, client_listen, client_address):
        rule, client_zone, server_zone = Globals.rules.decide(client_stream.sock, client_address, client_local)
        values = {"client_zone": client_zone, "server_zone": server_zone}
        if rule is None:
            log(NO_SESSION, CORE_POLICY, 0, "Unable to determine service, KZorp service lookup failed; bindto='%s'",
                (client_listen,))
            service = None
        else:
            values["rule_id"] = rule.rule_id
            service = self._service_of(rule)
        if service is not None:
            values["instance_id"] = getInstanceId(service.name)
        session = MasterSession(service, client_stream, client_local, client_listen, client_address, **values)
        if service is not None:
            return session
        conclude(session, DENIED_BY_POLICY, "no rule for this connection" if rule is None else "")
        client_stream.reset()
        session.release()
        return None

    @staticmethod
    def _service_of(rule):
        """Return the service object; None when it vanished, or when the packet filter ought to have served it."""
        service = Globals.services.get(rule.service)
        if service is None:
            log(NO_SESSION, CORE_POLICY, 2, "No such service; service='%s'", (rule.service,))
        elif isinstance(service, PFService) and Globals.kzorp_available:
            log(NO_SESSION, CORE_POLICY, 2, "Packet filter service reached the daemon; service='%s'", (service,))
            return None
        return service


def _loopback_addresses(port):
    """Return the addresses rule chains listen on: those of the families that this host has."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as problem:
        log(None, CORE_ERROR, 3, "IPv6 is not available, rules serve IPv4 only; error='%s'", (problem,))
        return [SockAddrInet("127.0.0.1", port)]
    return [SockAddrInet("127.0.0.1", port), SockAddrInet6("::1", port)]


# ---------------------------------------------------------------------------- life of a policy

def _policy_parsed():
    """After the instance functions: the dispatcher of the rules, and names that were used before they existed."""
    if Globals.rules is not None and Globals.rules.length:
        RuleDispatcher.createOneInstance()
    for dispatcher in Globals.dispatches:
        check = getattr(dispatcher, "checkReferences", None)
        if check is not None:
            check()


def purgeDispatches():
    """Stop every dispatcher of the policy."""
    for dispatcher in list(Globals.dispatches):
        dispatcher.destroy()


Globals.parsed_callbacks.append(_policy_parsed)
Globals.deinit_callbacks.append(purgeDispatches)
