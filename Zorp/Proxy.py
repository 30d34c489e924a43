"""The class that every proxy of a policy derives from.

    class IntraHttp(HttpProxy):
        def config(self):
            HttpProxy.config(self)
            self.request["POST"] = (HTTP_REQ_REJECT, "read only")

Theory of operation
    BuiltinProxy lives the life and keeps the engine's attributes; Proxy is the part that
    policies read, override and call: the base members of the config events, how the target and
    the server connection come about, what happens after a callback failed, authentication
    results, the log.  Each session has an object of its own, used by that session's thread.

What this release refuses
    TLS and authentication are not built.  A policy that asks for one of them is refused while
    it loads where that can be seen; else the session ends after config() with one
    core.policy(1) line.  Nothing is passed unprotected because of a part that is missing.

Deviations
    connectServer() and setServerAddress() accept the forms of all releases.  A retry that
    succeeds takes back the verdict "connection failed".
"""

from __future__ import annotations

from Zorp import Log
from Zorp.acceptance.verdict import (
    ABORTED_BY_POLICY_ACTION,
    DENIED_BY_CONNECTION_FAIL,
    INVALID_POLICY_CALL,
    conclude,
    refuse,
    retract,
)
from Zorp.Config import config
from Zorp.Constants import (
    CORE_AUTH,
    CORE_DEBUG,
    CORE_ERROR,
    CORE_INFO,
    CORE_SESSION,
    FALSE,
    Z_SZIG_CONNECTION_PROPS,
    Z_SZIG_TYPE_CONNECTION_PROPS,
    ZD_PROTO_UDP,
)
from Zorp.engine.builtin_proxy import BEGINNING, BuiltinProxy, does_nothing
from Zorp.Exceptions import AAException, DACException, InternalException, PolicyError
from Zorp.Log import enabled, log
from Zorp.ProxyGroup import ProxyGroup
from Zorp.Session import StackedSession
from Zorp.Stack import getStackingProviderBackend
from Zorp.Szig import szigEvent

_LONGEST_UDP_TIMEOUT_MS = 60_000
_PROPERTIES_OF_LOGIN = {"gw-auth": ("gateway_user", "gateway_groups"), "server": ("remote_user", "remote_groups")}


def proxyLog(self, type, level, msg, args=None):
    """Log with the session id of a proxy (any object with a session); as Zorp.Zorp.log()."""
    log(self.session.session_id, type, level, msg, args)


class Proxy(BuiltinProxy):
    """Base of all proxies.

    Arguments:
        session: the StackedSession that the proxy serves; it learns of the proxy here.
    """

    name = None                        # protocol: part of the session id, attribute of the session
    module = None                      # kept for policies that read it; same as name
    auth_inband_defer = FALSE
    auth_inband_supported = FALSE
    auth_server_supported = FALSE
    server_fd_picked = FALSE           # connectServer() was called
    encryption = None
    ssl_deprecation_warning = True     # kept for policies of release 6 that switch it off

    def __init__(self, session):
        vars(self).update(BEGINNING)
        self.session = session
        session.setProxy(self)
        self.encryption_policy = None      # here, and not of the class: what config() leaves behind is looked at
        if not self.module:
            self.module = self.name
        if Log.loudest >= 5 and enabled(CORE_SESSION, 5):
            log(session.session_id, CORE_SESSION, 5, "Proxy starting; class='%s', proxy='%s'",
                (self.__class__.__name__, self.name))
        owner = session.owner
        super().__init__(self.name, self.module, session.session_id, session.client_stream,
                         owner.proxy if owner is not None else None)

    def __del__(self):
        """The last trace of the object; announces the end of a proxy that never ran."""
        if self._session_id:
            if not self._ended:
                self._announce_end()
            if Log.loudest >= 7 and enabled(CORE_DEBUG, 7):
                log(self._session_id, CORE_DEBUG, 7, "Freeing ZProxy instance;")

    def __destroy__(self):
        """Called by the core last of all: unlink the proxy from its session, drop all attributes."""
        session = self.session
        if not self.server_fd_picked and self.proxy_started and session.server_stream is not None:
            session.server_stream.close()
        for name in ("proxy", self.name):
            session.__dict__.pop(name, None)
        if Log.loudest >= 6 and enabled(CORE_DEBUG, 6):
            log(session.session_id, CORE_DEBUG, 6, "Proxy destroy; class='%s', module='%s'",
                (self.__class__.__name__, self.name))
        session_id, state = self._session_id, self._state
        self.__dict__.clear()
        self.__dict__.update(session=session, _session_id=session_id, _state=state)

    def _announce_end(self):
        if Log.loudest >= 5 and enabled(CORE_SESSION, 5):
            log(self._session_id, CORE_SESSION, 5, "Proxy ending; class='%s', module='%s'",
                (self.__class__.__name__, self.name))

    # events

    def __pre_config__(self):
        """First event: outband authentication, defaults that come from config.options."""
        master = self.session.getMasterSession()
        if not master.auth_user and asks_for_authentication(master.service):
            raise AAException("Authentication is not built in this release")
        if master.protocol == ZD_PROTO_UDP and self.timeout > _LONGEST_UDP_TIMEOUT_MS:
            self.timeout = _LONGEST_UDP_TIMEOUT_MS
        if config.options.language != self._vars.language:
            self.language = config.options.language
        self.encryption_policy = None

    @does_nothing
    def config(self):
        """Set the attributes of the protocol; policies override this."""

    @does_nothing
    def __post_config__(self):
        """Last event of the family; where TLS is built, it chooses the encryption here."""

    @does_nothing
    def __pre_startup__(self):
        """First event of its family; where authentication is built, it hands the provider to the engine."""

    def _check_config(self):
        """Refuse TLS settings, also those of classes whose __post_config__() does not call the base."""
        super()._check_config()
        ssl = None if self._structs is None else self._structs.get("ssl")
        if (self.encryption_policy or self.encryption or getattr(self.session.service, "encryption_policy", None)
                or (ssl is not None and (ssl.client_connection_security or ssl.server_connection_security))):
            raise PolicyError("TLS is not built in this release, session refused",
                              remedy="take the encryption settings out of the policy")

    # the server side

    def setServerAddress(self, host, port):
        """Set the target the client asked for; return FALSE when it is refused or does not resolve.

        Without a router that takes the target from the protocol nothing happens, and TRUE is returned.
        """
        return self.session.setTargetAddressByHostname(host, port)

    def connectServer(self, *hint):
        """Connect to the server; return the Stream, or None (the log says why).

        hint: host and port as old policies give them; an empty host means nothing.
        """
        if hint and hint[0] and not self.setServerAddress(*hint[:2]):
            return None
        session = self.session
        if session.chainer is None:
            return self._take_prepared_server()
        self.server_fd_picked = True
        session.server_stream = stream = self._connectServerInternal()
        return stream

    def _take_prepared_server(self):
        """Return what the parent of a stacked proxy prepared, the first time."""
        if self.session.server_stream is None:
            raise InternalException("No chainer and server_stream is None")
        if self.server_fd_picked:
            log(self.session.session_id, CORE_ERROR, 1,
                "Internal error, stacked proxy reconnected to server multiple times;")
            return None
        self.server_fd_picked = True
        return self.session.server_stream

    def _connectServerInternal(self):
        """Return what the chainer connected; failures become the verdict and a line of log."""
        session = self.session
        session.server_failure = ""
        try:
            stream = session.chainer.chainParent(session)
        except BaseException as problem:
            refuse(session, problem)
            if isinstance(problem, DACException):
                self.notifyEvent("core.dac_exception", [])
            return None
        if stream is None:
            retract(session, DENIED_BY_CONNECTION_FAIL)
            conclude(session, DENIED_BY_CONNECTION_FAIL, session.server_failure)
        return stream

    # verdicts on the whole session

    def closedByAbort(self):
        """Called when policy code raised, gave an unusable value, or asked to abort."""
        conclude(self.session, ABORTED_BY_POLICY_ACTION)

    def invalidPolicyCall(self):
        """Called when an entry of a policy table is malformed."""
        conclude(self.session, INVALID_POLICY_CALL)

    # authentication

    def userAuthenticated(self, entity, groups=None, auth_info=""):
        """Record who the client is: on the master session, in the log and in the statistics.

        groups: sequence of names; a string here is auth_info (calls of two arguments).
        auth_info: how: "none", "inband", "gw-auth", "server", "cached".
        """
        if isinstance(groups, str):
            groups, auth_info = None, groups
        session = self.session
        master = session.getMasterSession()
        if auth_info == "none":
            log(session.session_id, CORE_INFO, 6, "Internal problem, NONE authentication should not be used for"
                " userAuthenticated function from Zorp; type='%d'", (0,))
        master.auth_user = entity
        master.auth_groups = tuple(groups or ())
        session.auth_info = auth_info
        log(session.session_id, CORE_AUTH, 3, "User authentication successful; entity='%s', auth_info='%s'",
            (entity, auth_info))
        group_text = str(master.auth_groups)
        user_name, groups_name = _PROPERTIES_OF_LOGIN.get(auth_info, ("auth_user", "auth_groups"))
        properties = {"auth_user": entity, "auth_info": auth_info, "auth_groups": group_text,
                      user_name: entity, groups_name: group_text}
        szigEvent(Z_SZIG_CONNECTION_PROPS, (
            Z_SZIG_TYPE_CONNECTION_PROPS,
            (session.service.name, session.instance_id, session.secondary_connection_id, 0, properties)))

    def getCredentials(self, method, username, domain, target, port):
        """Hook of credential stores: return the credentials for a target; () when there are none."""
        return ()

    # stacking

    def stackProxy(self, client_stream, server_stream, proxy_class, stack_info, side_stacking=False):
        """Start a child proxy between two streams; return it.

        The child has a session of its own below ours and no chainer: server_stream is its server.
        Both streams are the child's from now on, and closed when this raises.
        """
        session = self.session
        log(session.session_id, CORE_DEBUG, 7, "Stacking child proxy; client_fd='%d', server_fd='%d', class='%s'",
            (client_stream.fd, server_stream.fd, proxy_class))
        subsession = StackedSession(session)
        subsession.client_stream, subsession.server_stream = client_stream, server_stream
        prefix = f"{session.session_id.rpartition('/')[0]}/{proxy_class.name}"
        client_stream.name, server_stream.name = f"{prefix}/client_upstream", f"{prefix}/server_upstream"
        return self.stackProxyInSession(proxy_class, subsession, stack_info)

    def stackProxyInSession(self, proxy_class, subsession, stack_info):
        """Start a child proxy in a session that is ready; return it."""
        try:
            subsession.stack_info = stack_info
            proxy = proxy_class(subsession)
            if not ProxyGroup(1).start(proxy):
                raise RuntimeError("Error starting proxy in group")
        except Exception as problem:
            log(self.session.session_id, CORE_ERROR, 2,
                "Error while stacking child proxy; error='%s', error_desc='%s', ",
                (type(problem).__name__, problem))
            subsession.destroy()
            raise
        return proxy

    def stackCustom(self, args):
        """Return what a stacking backend offers: (client stream, server stream[, control stream]), or None.

        args: name of a StackingProvider or a backend object, and what it is to be told.
        """
        log(self.session.session_id, CORE_DEBUG, 7, "Stacking custom child; args='%s'", (args,))
        backend, stack_info = args
        if isinstance(backend, str):
            backend = getStackingProviderBackend(backend)
        return backend.stack(stack_info) if backend is not None else None

    # small helpers

    def readPEM(self, filename):
        """Return the whole text of a file; raises OSError."""
        log(self.session.session_id, CORE_DEBUG, 6, "Reading PEM file; filename='%s'", (filename,))
        with open(filename, encoding="latin-1") as file:
            return file.read()

    def notifyEvent(self, event, params):
        """Report an event to a notification system; sites override it."""
        log(self.session.session_id, CORE_DEBUG, 6, "Event reported; event='%s', params='%s'", (event, params))

    def _hasMethod(self, obj, method):
        """Return whether the class of `obj` itself, not one of its bases, defines this function."""
        return callable(vars(type(obj)).get(method))


def asks_for_authentication(service):
    """True when clients of the service must authenticate."""
    return getattr(service, "authentication_policy", None) or getattr(service, "auth_policy", None)
