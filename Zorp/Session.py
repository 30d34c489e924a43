"""Everything known about one connection, shared by the proxies that work on it.

Theory of operation
    MasterSession       one per client connection: the client's side, service, authentication,
                        verdict.
    StackedSession      one per proxy: target, server side, chainer.  What it does not have is
                        read from its owner, up to the master; what is written stays.

    Policies add attributes of their own to let proxies talk to each other: lower levels see
    what upper ones stored, never the other way round.  Methods of the owner are not inherited.

Life
    A master session is born held once, by the code that accepts.  Every proxy that is started
    holds it once more (Zorp.ProxyGroup does that).  The last release() ends the session:
    sockets closed, "Connection summary" written, the instance given back to the service;
    exactly once, whatever came before.  Nothing waits for the garbage collector.

Threads
    _holders_lock of a master guards its count of holders.  All other attributes belong to the thread of
    the session; a stacked proxy in another thread reads what was there when it started.

Session ids
    config.options.session_id_format selects their form, "7" when it says nothing else.  Blanks,
    ")" and quotes of a service name appear as <XX>, because the log is parsed by them.

Deviations
    The summary's session_start is the session's own start.  target_zone is looked up when
    somebody reads it: only policies do.
"""

from __future__ import annotations

import functools
import threading
import time
from types import MethodType

from Zorp import Globals, Log
from Zorp.acceptance.binds import protocol_name
from Zorp.acceptance.instance_numbers import getInstanceId
from Zorp.acceptance.verdict import (
    ABORTED_BY_POLICY_ACTION,
    ACCEPTED,
    DENIED_BY_CONNECTION_FAIL,
    DENIED_BY_LIMIT,
    DENIED_BY_POLICY,
    DENIED_BY_UNKNOWN_FAIL,
    INVALID_POLICY_CALL,
)
from Zorp.Config import config
from Zorp.Constants import (
    CORE_DEBUG,
    CORE_ERROR,
    CORE_POLICY,
    CORE_SUMMARY,
    FALSE,
    TRUE,
    Z_ACCEPT,
    Z_SZIG_CONNECTION_PROPS,
    ZD_PROTO_AUTO,
    ZD_PROTO_TCP,
    ZV_ACCEPT,
    ZV_REJECT,
)
from Zorp.Exceptions import DACException
from Zorp.Log import enabled, is_structured, log, log_exception
from Zorp.SockAddr import SockAddrType
from Zorp.Szig import statistics
from Zorp.Zone import Zone, claimants, dac_enforced

_BASE_SESSION_ID = "svc"
_FORBIDDEN_IN_IDS = frozenset(" )'\"<>(") | {chr(code) for code in (*range(0x20), 0x7F)}

_SUMMARY = (
    "Connection summary; rule_id='%s', session_start='%d', session_end='%d',"
    " client_proto='%s', client_address='%s', client_port='%d', client_zone='%s',"
    " server_proto='%s', server_address='%s', server_port='%d', server_zone='%s',"
    " client_local='%s', client_local_port='%d', server_local='%s', server_local_port='%d',"
    " verdict='%s', info='%s', auth_user='%s'"
)
_NOTHING = "(NULL)"
_REASONS = {                     # what structured summaries say where nobody gave a reason
    DENIED_BY_POLICY: "no service for this connection",
    DENIED_BY_LIMIT: "too many connections of this client",
    DENIED_BY_CONNECTION_FAIL: "no connection to the server",
    DENIED_BY_UNKNOWN_FAIL: "failure of the proxy, see its traceback",
    ABORTED_BY_POLICY_ACTION: "ended by the policy",
    INVALID_POLICY_CALL: "malformed entry of a policy table",
}

get_protocol_name = protocol_name


# ---------------------------------------------------------------------------- session ids

@functools.lru_cache(maxsize=4096)
def _name_in_id(service_name: str) -> str:
    return "".join(f"<{ord(c):02X}>" if c in _FORBIDDEN_IN_IDS else c for c in service_name)


def _plain_master_id(service: str, number: int) -> str:
    return f"svc/{_name_in_id(service)}:{number}"


def _instance_master_id(service: str, number: int) -> str:
    return f"svc/{Globals.virtual_instance_name}/{_name_in_id(service)}:{number}"


def _plain_proxy_id(master_id: str, secondary: int, proxy_name) -> str:
    return f"{master_id}/{proxy_name}"


def _secondary_proxy_id(master_id: str, secondary: int, proxy_name) -> str:
    return f"{master_id}:{secondary}/{proxy_name}" if secondary else f"{master_id}/{proxy_name}"


def _instance_proxy_id(master_id: str, secondary: int, proxy_name) -> str:
    instance = Globals.virtual_instance_name
    return (f"{master_id}/{instance}:{secondary}/{proxy_name}" if secondary
            else f"{master_id}/{instance}/{proxy_name}")


_ID_FORMATS = {                  # format: (id of a master, id of a proxy)
    "3": (_plain_master_id, _plain_proxy_id),
    "5": (_plain_master_id, _secondary_proxy_id),
    "7": (_instance_master_id, _instance_proxy_id),
    "short": (_instance_master_id, _secondary_proxy_id),
}


def _id_format():
    return _ID_FORMATS.get(str(config.options.session_id_format), _ID_FORMATS["7"])


# ---------------------------------------------------------------------------- sessions

class ClientInfo:
    """What is known about a client before a service is chosen; the zone is None when there is none."""

    def __init__(self, client_stream, client_local, client_listen, client_address):
        self.client_stream = client_stream
        self.client_local = client_local
        self.client_listen = client_listen
        self.client_address = client_address
        self.client_zone = Zone.lookup(client_address)


class AbstractSession:
    """What both kinds of session have."""

    client_stream = None
    server_stream = None

    @property
    def client_fd(self):
        """The client's stream under the name that chainers of release 1 use."""
        return self.client_stream

    @property
    def server_fd(self):
        """The server's stream under the name that chainers of release 1 use."""
        return self.server_stream

    def getMasterSession(self):
        """Return the session of the client connection."""
        raise NotImplementedError

    def setServerAddress(self, addr):
        """Set the final server address and with it the zone, also on the master session."""
        zone = Zone.lookup(addr)
        self.server_address, self.server_zone = addr, zone
        master = self.getMasterSession()
        if master is not self:
            master.server_address, master.server_zone = addr, zone

    def setTargetAddress(self, addr):
        """Set the servers to choose from: one SockAddr or a sequence of them."""
        self.target_address = (addr,) if isinstance(addr, SockAddrType) else tuple(addr)
        self._target_zone = None

    setServer = setTargetAddress

    @property
    def target_zone(self):
        """The zones of target_address, in its order; None for an address without a zone."""
        zones = self.__dict__.get("_target_zone")
        if zones is None:
            zones = self._target_zone = [Zone.lookup(address) for address in self.target_address]
        return zones

    @target_zone.setter
    def target_zone(self, zones):
        self._target_zone = zones

    def setTargetAddressByHostname(self, host, port):
        """Take the proxy's hint when the router allows it; return FALSE when the name does not resolve."""
        if not self.target_address_inband:
            return TRUE
        addresses = self.service.resolver_policy.resolve(host, port)
        if not addresses:
            log(self.session_id, CORE_ERROR, 3, "Error resolving hostname; host='%s'", (host,))
            return FALSE
        self.setTargetAddress(addresses)
        return TRUE

    def isServerPermitted(self):
        """Return ZV_ACCEPT when the service may reach server_address, else log why and return ZV_REJECT."""
        permitted, has_lists = getattr(self.service, "limit_target_zones_to", None), dac_enforced()
        zones = (self.server_zone, *claimants(self.server_address)) if permitted or has_lists else ()
        for zone in zones:
            if has_lists and (zone is None or zone.isInboundServicePermitted(self) != Z_ACCEPT):
                self._log_refusal("Inbound service not permitted", zone, self.server_address)
                return ZV_REJECT
            if permitted and (zone is None or not zone.isInside(permitted)):
                self._log_refusal("Outbound connection not permitted", zone, self.server_address)
                return ZV_REJECT
        return ZV_REJECT if self._newer_policy_refuses() else ZV_ACCEPT

    def _newer_policy_refuses(self):
        """True, and logged, when the policy that has replaced ours does not let this session reach server_address."""
        if Globals.newer_policy is None:
            return False
        reason = Globals.newer_policy(self.getMasterSession(), self.server_address)
        if reason:
            log(self.session_id, CORE_POLICY, 1,
                "Server connection not permitted by the new policy; service='%s', server='%s', reason='%s'",
                (self.service, self.server_address, reason))
        return bool(reason)

    def isClientPermitted(self):
        """Return ZV_ACCEPT when the client's zone may use the service, else log why and return ZV_REJECT.

        Only policies whose zones list services restrict anything here.
        """
        if not dac_enforced():
            return ZV_ACCEPT
        if all(zone is not None and zone.isOutboundServicePermitted(self) == Z_ACCEPT
               for zone in (self.client_zone, *claimants(self.client_address))):
            return ZV_ACCEPT
        targets, zones = self.target_address, self.target_zone
        self._log_refusal("Outbound service not permitted",
                          zones[0] if zones else None, targets[0] if targets else None)
        return ZV_REJECT

    def checkClientPermitted(self):
        """Raise DACException when isClientPermitted() refuses."""
        if self.isClientPermitted() != ZV_ACCEPT:
            raise DACException("This service was not permitted outbound")

    def _log_refusal(self, text, server_zone, server_address):
        log(self.session_id, CORE_POLICY, 1,
            text + "; service='%s', client_zone='%s', client='%s', server_zone='%s', server='%s'",
            (self.service, self.client_zone, self.client_address, server_zone, server_address))

    def destroy(self):
        """Close both sides of this session."""
        for stream in (self.client_stream, self.__dict__.get("server_stream")):
            if stream is not None:
                stream.close()


class MasterSession(AbstractSession):
    """One client connection.

    Forms, told apart by their arguments:
        MasterSession(service, client_stream, client_local, client_listen, client_address, **values)
            release 6 and newer; each value becomes an attribute (client_zone, rule_id, ...).
        MasterSession(protocol, service, client_info, instance_id)       release 5
        MasterSession()         older: followed by setProtocol(), setClientAddress(), setService()
    """

    base_session_id = _BASE_SESSION_ID
    service = None
    name = None
    client_address = client_local = client_listen = client_zone = None
    server_address = server_zone = server_local = None
    rule_id = None
    protocol = ZD_PROTO_TCP
    instance_id = 0
    secondary_connection_id = 0
    started = 0
    proxy = None
    auth_user = ""
    auth_groups = ()
    authorized = FALSE
    target_address = ()
    target_local = None
    target_address_inband = FALSE
    target_local_loose = TRUE
    target_local_random = FALSE
    verdict = ACCEPTED
    refusal_reason = ""              # why the verdict is what it is; in structured summaries only
    summary_info = ""                # the summary's info field; whoever stops a session from outside fills it
    is_revoked = False               # a newer policy refused it

    def __init__(self, service=None, client_stream=None, client_local=None, client_listen=None,
                 client_address=None, **values):
        self.start_time = time.time()
        self.session_id = self.master_session_id = _BASE_SESSION_ID
        self._holders_lock = threading.Lock()
        self._holders = 1
        self._at_end = []
        if isinstance(service, int):
            self._init_from_release_5(service, client_stream, client_local, client_listen)
            return
        self.client_stream = client_stream
        self.client_local = client_local
        self.client_listen = client_listen
        self.protocol = getattr(client_listen, "protocol", ZD_PROTO_AUTO) or ZD_PROTO_TCP
        self.client_address = client_address
        if values:
            self._add_values(values)
        if client_address is not None and "client_zone" not in values:
            self.client_zone = Zone.lookup(client_address)
        if service is not None:
            self._bind_to_service(service, values.get("instance_id", 0))

    def _init_from_release_5(self, protocol, service, client_info, instance_id):
        self.protocol = protocol
        for name in ("client_stream", "client_local", "client_listen", "client_address", "client_zone"):
            setattr(self, name, getattr(client_info, name))
        self._bind_to_service(service, instance_id or 0)

    def _add_values(self, values):
        self.__dict__.update(values)
        if Log.loudest >= 8 and enabled(CORE_DEBUG, 8):
            for item in values.items():
                log(self.session_id, CORE_DEBUG, 8, "Added value to the session; name='%s', value='%s'", item)
        address = values.get("server_address")
        if address is not None and values.get("server_zone") is None:
            self.server_zone = Zone.lookup(address)

    def _bind_to_service(self, service, instance_id):
        self.service = service
        self.name = service.name
        self.instance_id = instance_id
        self.session_id = self.master_session_id = _id_format()[0](service.name, instance_id)

    def getMasterSession(self):
        return self

    @property
    def protocol_name(self):
        """The client side's protocol: "TCP" or "UDP"."""
        return "TCP" if self.protocol == ZD_PROTO_TCP else protocol_name(self.protocol)

    # setters of release 3

    def setProtocol(self, protocol):
        """Set the protocol of the client side, ZD_PROTO_TCP or ZD_PROTO_UDP."""
        self.protocol = protocol

    def setClientAddress(self, addr):
        """Set the client's address and its zone."""
        self.client_address = addr
        self.client_zone = Zone.lookup(addr)

    def setService(self, service):
        """Bind the session to a service and draw the next instance number."""
        self._bind_to_service(service, getInstanceId(service.name))

    def setServiceInstance(self, instance_id):
        """Replace the instance number."""
        self._bind_to_service(self.service, instance_id)

    # life

    def hold(self):
        """Keep the session alive until one more release()."""
        with self._holders_lock:
            self._holders += 1

    def release(self):
        """Give up one hold; the last one ends the session, later calls do nothing."""
        with self._holders_lock:
            self._holders -= 1
            ended = self._holders == 0
        if ended:
            self._end()

    def call_at_end(self, function, *args):
        """Have function(*args) called when the session ends, after the service has its instance back."""
        self._at_end.append((function, args))

    def _end(self):
        self._attempt(self.destroy)
        self._attempt(self.logVerdict, self.summary_info)
        Log.let_go()                     # what follows may be a policy's
        if self.service is not None:
            self._attempt(self.service.stopInstance, self)
        for function, args in self._at_end:
            self._attempt(function, *args)

    def _attempt(self, step, *args):
        """Run one step of the end; each counts on its own, and stopInstance() may be a policy's."""
        try:
            step(*args)
        except Exception:
            log_exception(self.session_id)

    def logVerdict(self, info=""):
        """Write the connection summary (logging 10); it is evidence, so nothing that a policy has set keeps it away."""
        if Log.loudest < 4:
            return
        client_ip, client_port = _ip_and_port(self.client_address)
        server_ip, server_port = _ip_and_port(self.server_address)
        wanted_ip, wanted_port = _ip_and_port(self.client_local)
        local_ip, local_port = _ip_and_port(self.server_local)
        log(self.session_id, CORE_SUMMARY, 4, _SUMMARY, (
            "N/A" if self.rule_id is None else _text_of(self.rule_id), self.start_time, time.time(),
            self.protocol_name, client_ip, client_port, _zone_name(self.client_zone),
            self._server_protocol_name(), server_ip, server_port, _zone_name(self.server_zone),
            wanted_ip, wanted_port, local_ip, local_port,
            _text_of(self.verdict), self._reason(info), _text_of(self.auth_user or _NOTHING)))

    def _reason(self, info):
        """Return the summary's info: the classic line keeps it empty for refusals, as parsers know it."""
        if info or not is_structured():
            return info
        return self.refusal_reason or _REASONS.get(self.verdict, "")

    def _server_protocol_name(self):
        chainer = getattr(self.service, "chainer", None)
        try:
            protocol = chainer.getProtocol() if hasattr(chainer, "getProtocol") else ZD_PROTO_AUTO
        except Exception:                # of a policy's chainer
            log_exception(self.session_id)
            protocol = ZD_PROTO_AUTO
        return self.protocol_name if protocol == ZD_PROTO_AUTO else protocol_name(protocol)


class _Inherited:
    """An attribute that a session has of its owner until it is set.

    The same holds for every name, see StackedSession.__getattr__(); but to get there costs an exception,
    too much for what every connection asks for.
    """

    def __set_name__(self, cls, name):
        self._name = name

    def __get__(self, session, cls=None):
        return self if session is None else getattr(session.owner, self._name)


class StackedSession(AbstractSession):
    """The session of one proxy, below its owner.

    Arguments:
        owner: the session of the level above.
        chainer: reaches the server; None for a proxy whose parent prepared both streams.
    """

    proxy = None
    stack_info = None
    protocol = _Inherited()
    target_local = _Inherited()
    connect_timeout_ms = None                # of one attempt, while a chainer tries several addresses
    registered_in_szig = FALSE
    _is_connected_in_szig = False            # the server side is shown, too

    def __init__(self, owner, chainer=None):
        self.owner = owner
        self.chainer = chainer
        self.service = owner.service             # these two are asked for at every turn and never change
        self.secondary_connection_id = owner.secondary_connection_id
        self._master = owner.getMasterSession()

    def __getattr__(self, name):
        if name[:2] == "__" or name == "owner":
            raise AttributeError(name)
        owner = self.owner
        value = getattr(owner, name)
        if value.__class__ is MethodType and value.__self__ is owner:
            raise AttributeError(f"methods of the owner are not inherited: {name}")
        return value

    def getMasterSession(self):
        return self._master

    @property
    def target_zone(self):
        """The zones of target_address, in its order; None for an address without a zone."""
        if "target_address" in self.__dict__ or "_target_zone" in self.__dict__:
            return AbstractSession.target_zone.fget(self)
        return self.owner.target_zone

    @target_zone.setter
    def target_zone(self, zones):
        self._target_zone = zones

    def setProxy(self, proxy):
        """Store the proxy, also under its protocol's name, and make it part of the session id."""
        self.proxy = proxy
        name = proxy.name
        if name:
            setattr(self, name, proxy)
        self.session_id = _id_format()[1](self._master.master_session_id, self.secondary_connection_id, name)

    def hold(self):
        """Keep the master session alive; for the proxy of this session."""
        self._master.hold()

    def release(self):
        """End this level's statistics entry and give up the hold on the master."""
        try:
            self.registerStop()
        finally:
            self._master.release()

    def destroy(self):
        """Close both sides of this session, forget its proxy, take it out of the statistics."""
        self.registerStop()
        proxy = self.__dict__.pop("proxy", None)
        if proxy is not None:
            self.__dict__.pop(proxy.name, None)
        super().destroy()

    # statistics

    def connectionKey(self):
        """Return the place of this session in the statistics tree; a proxy has no related connections."""
        return self.service.name, self._master.instance_id, self.secondary_connection_id, 0

    def registerStart(self, timestamp=None):
        """Show the session in the statistics; `timestamp` is the start in epoch seconds."""
        if self.registered_in_szig:
            return
        self.registered_in_szig = TRUE
        self._szig_start = timestamp or self._master.start_time
        self._szig_class = type(self.proxy)
        self._szig_key = key = self.connectionKey()
        statistics.connection_opened(key, self._describe)

    def _describe(self):
        """Return what the statistics show of this session; called by any thread while it is registered.

        The thread is that of the control socket mostly, which answers for the whole process: no code of a policy here.
        """
        master = self._master
        base_id, _, proxy_module = self.session_id.rpartition("/")
        properties = {
            "started": f"{self._szig_start:.2f}",
            "session_id": base_id,
            "proxy_module": proxy_module,
            "proxy_class": self._szig_class.__name__,
            "client_address": _shown(master.client_address),
            "client_local": _shown(master.client_local),
            "client_zone": _shown_zone(master.client_zone),
        }
        for side in ("client", "server"):
            stream = self.__dict__.get(f"{side}_stream")
            for counter in ("bytes_recvd", "bytes_sent"):
                properties[f"{side}_{counter}"] = str(getattr(stream, counter, 0))
        if self._is_connected_in_szig:
            properties |= {"server_address": _shown(self.server_address),
                           "server_local": _shown(self.server_local),
                           "server_zone": _shown_zone(self.server_zone)}
        return properties

    def registerServerAddress(self):
        """Show the server side in the statistics."""
        self._is_connected_in_szig = True
        if self.registered_in_szig:
            statistics.server_connected(self._szig_key, _name_or_nothing(self._master.client_zone),
                                        _name_or_nothing(self.server_zone))

    def registerStop(self):
        """Take the session out of the statistics; a second call does nothing."""
        if self.registered_in_szig:
            self.registered_in_szig = FALSE
            statistics.connection_closed(self._szig_key)

    def updateSzigConns(self, event, data):
        """Add properties (name to text) to this session's entry, or end it, by szig event."""
        if event == Z_SZIG_CONNECTION_PROPS:
            statistics.connection_properties(self.connectionKey(), data)
        else:
            self.registerStop()


def _ip_and_port(address):
    """Return address and port for the summary; a local socket, a missing address and what is none have none."""
    try:
        text = getattr(address, "ip_s", None)
        return (_NOTHING, 0) if text is None else (_text_of(text), int(address.port))
    except BaseException:            # what a policy has put in its place
        return _NOTHING, 0


def _zone_name(zone):
    return _NOTHING if zone is None else _name_or_nothing(zone)


def _name_or_nothing(zone):
    """Return the name of a zone, "" for none; what a policy has put in its place counts by its text."""
    if zone is None:
        return ""
    try:
        return _text_of(zone.getName())
    except BaseException:
        return _text_of(zone)


def _shown(value):
    """Return the text of one of our values, of anything else that a policy has put there its kind."""
    return str(value) if value is None or isinstance(value, (SockAddrType, str, int)) else f"({type(value).__name__})"


def _shown_zone(zone):
    return "" if zone is None else zone.getName() if isinstance(zone, Zone) else _shown(zone)


def _text_of(value):
    """Return something that a policy may have set as text, whatever it is."""
    if type(value) is str:
        return value
    try:
        return str(value)
    except BaseException:            # of the policy's object
        return _NOTHING
