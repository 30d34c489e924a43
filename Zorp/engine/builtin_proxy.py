"""The core of every proxy: its life, its attributes, the calls into policy code, its two streams.

Theory of operation
    A proxy object is made in the accepting code and lives in one thread: run().

        INITIAL          made; attributes are plain
        THREAD_STARTED   engine values have their defaults
        CONFIG           __pre_config__, config, __post_config__; then the engine reads its settings
        STARTING_UP      __pre_startup__, startup, __post_startup__
        WORKING          the engine's main loop
        SHUTTING_DOWN    __pre_shutdown__, shutdown, __post_shutdown__, __destroy__
        DESTROYING       both streams closed, client first

    Whatever happens, also in the middle of config(), the last two states are reached, once.
    Zorp.ProxyGroup then gives up the session, whose last holder writes the summary.

For authors of protocol classes
    engine_attributes       table of Attr entries, see Zorp.engine.attributes
    _engine_start()         values that the table cannot tell; before config()
    _engine_config()        check and convert what config() set; an exception ends the session
    _config_problems()      settings that cannot be meant, for the log and zorp --check-policy
    _engine_main()          the protocol; returning from it ends the session
    _engine_stop()          release what the engine holds; always called when _engine_start() was
    _vars                   the engine's values, without check and log
    _client, _server        the streams; _connect_server() makes the second
    _call_policy()          call policy code; _ask_policy() the same for a verdict
    _log()                  log with the session id
    stop_requested          true when somebody wants the session to end

Threads
    Everything runs in the proxy's thread except request_stop(), abandon() and set_connecting(),
    which any thread may call.  _ends_lock guards _children, and is held while streams are woken or closed,
    so that a descriptor is never shut down after it was closed and given to somebody else.

Deviations
    All three members of the shutdown family run, whatever the others did.  Exceptions of policy
    code are logged, not printed.  A class without an engine is refused by the constructor, not
    when its thread starts.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from typing import NoReturn

from Zorp import Globals, Log
from Zorp.acceptance.verdict import (
    ABORTED_BY_POLICY_ACTION,
    DENIED_BY_CONNECTION_FAIL,
    DENIED_BY_UNKNOWN_FAIL,
    INVALID_POLICY_CALL,
    conclude,
    conclude_by,
    retract,
    revoke,
)
from Zorp.Config import config
from Zorp.Constants import CORE_DEBUG, CORE_ERROR, CORE_INFO, CORE_POLICY, CORE_SESSION
from Zorp.engine.attributes import (
    ALWAYS,
    CONFIG,
    CUSTOM,
    INT,
    INT8,
    INT32,
    READ,
    RUN_READ,
    STATE_CONFIG,
    STRING,
    Attr,
    AttributeStruct,
    check_number,
    install,
)
from Zorp.engine.config_lint import Problem, look_at
from Zorp.engine.session_time import session_times
from Zorp.Exceptions import PolicyError
from Zorp.Log import enabled, log, log_exception
from Zorp.Stream import Stream

_SERVER_SIDE_MARK = 0x40000000       # tells a forged server connection from the client's in packet rules
_STOPPED_BY_ADMINISTRATOR = "stopped by administrator"      # info of the summary line
_OUT_OF_TIME = "max_session_time reached"

# where a proxy is in its life: `_state`, ordered
INITIAL, THREAD_STARTED, STARTING_UP, WORKING, SHUTTING_DOWN, DESTROYING = 0, 1, 3, 4, 5, 6

_FAMILIES = {
    "config": ("__pre_config__", "config", "__post_config__"),
    "startup": ("__pre_startup__", "startup", "__post_startup__"),
    "shutdown": ("__pre_shutdown__", "shutdown", "__post_shutdown__"),
}
_OLD_NAMES = {"startup": "startUp", "shutdown": "shutDown"}
_FAMILY_NAMES = {family: frozenset((*members, *filter(None, map(_OLD_NAMES.get, members))))
                 for family, members in _FAMILIES.items()}


def does_nothing(method):
    """Mark an event of a base class that is there to be overridden: nobody needs to call it."""
    method.does_nothing = True
    return method


class PolicyCallFailed(Exception):
    """Policy code raised or gave a value that cannot be used; already logged, the session must end."""


def log_policy_exception(session_id, problem: BaseException) -> None:
    """Log an exception that left policy code, as its kind wants it (call while it is handled)."""
    if isinstance(problem, PolicyCallFailed):
        return
    if isinstance(problem, PolicyError):
        log(session_id, CORE_POLICY, 1, "Policy cannot be used; error='%s'", (problem,))
        return
    what = getattr(problem, "what", None)
    if what is None:
        log_exception(session_id)
    elif hasattr(problem, "detail"):
        log(session_id, CORE_ERROR, 3, "%s; reason='%s'", (what, problem.detail))
    else:
        log(session_id, CORE_ERROR, 3, "%s;", (what,))


class RunningProxies:
    """The proxies that have a thread now.  _proxies_lock guards _proxies."""

    def __init__(self) -> None:
        self._proxies: set = set()
        self._proxies_lock = threading.Lock()

    def add(self, proxy) -> None:
        """Enter a proxy; its own thread calls this."""
        with self._proxies_lock:
            self._proxies.add(proxy)

    def remove(self, proxy) -> None:
        """Take a proxy out; unknown ones are no error."""
        with self._proxies_lock:
            self._proxies.discard(proxy)

    def all(self) -> list:
        """Return the proxies of this moment."""
        with self._proxies_lock:
            return list(self._proxies)

    def stop_session(self, session_id: str) -> int:
        """Ask every proxy of a session to end and have its summary say so; return their number.

        session_id: of the master session, which secondary sessions share, or of one proxy.
        """
        stopped = 0
        for proxy in self.all():
            own_id = proxy._session_id
            if own_id == session_id or own_id.startswith(session_id + "/"):
                proxy.session.getMasterSession().summary_info = _STOPPED_BY_ADMINISTRATOR
                proxy.request_stop()
                stopped += 1
        return stopped


running = RunningProxies()


def _stream_of(side):
    return lambda proxy: getattr(proxy, side)


def _set_tos(side):
    """Return the setter of a `*_local_tos` attribute: remember the value, apply it if connected."""
    name = f"{side.removeprefix('_')}_local_tos"
    attribute = Attr(name, INT8)

    def set_tos(proxy, value):
        setattr(proxy._vars, name, check_number(value, attribute))
        stream = getattr(proxy, side)
        if stream is not None:
            apply_tos(stream.sock, getattr(proxy._vars, name) & 0xFF)

    return set_tos


def apply_tos(sock: socket.socket, tos: int) -> None:
    """Set the TOS or traffic class of an IP socket; other sockets have none, and that is no error."""
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
    elif sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, tos)


def _server_socket_mark() -> int:
    """The mark is for packet rules; without them it would only ask for a privilege."""
    return _SERVER_SIDE_MARK if Globals.kzorp_available and config.options.kzorp_enabled else 0


def _value_of(name):
    return lambda proxy: getattr(proxy._vars, name)


class _ProxyStarted:
    """proxy_started: plain before config(), then always 1."""

    def __get__(self, proxy, owner=None):
        if proxy is None:
            return 0
        return 1 if proxy._state >= STATE_CONFIG else proxy.__dict__.get("proxy_started", 0)

    def __set__(self, proxy, value):
        proxy.__dict__["proxy_started"] = value


class BuiltinProxy:
    """What the native core gave to the class Proxy; policies name it in isinstance() at most."""

    engine_attributes = (
        Attr("language", STRING, CONFIG, "en"),
        Attr("max_session_time", INT, CONFIG, 0),                  # ms, config() to end; 0: any time
        Attr("alerting_config", STRING, CONFIG, "{}"),             # releases 3.9.8 to 6; nothing reads it
        Attr("client_stream", CUSTOM, RUN_READ, _stream_of("_client")),
        Attr("server_stream", CUSTOM, RUN_READ, _stream_of("_server")),
        Attr("client_remote_tos", INT8, ALWAYS, 0),
        Attr("client_local_tos", CUSTOM, ALWAYS, _value_of("client_local_tos"), _set_tos("_client")),
        Attr("server_remote_tos", INT8, ALWAYS, 0),
        Attr("server_local_tos", CUSTOM, ALWAYS, _value_of("server_local_tos"), _set_tos("_server")),
        Attr("server_socket_mark", INT32, ALWAYS, 0),
        Attr("ssl", CUSTOM, READ, lambda proxy: proxy._struct("ssl")),
        Attr("tls", CUSTOM, READ, lambda proxy: proxy._struct("tls")),
    )
    proxy_started = _ProxyStarted()
    name = None
    module = None

    # what other threads and late callers find once the instance dictionary is gone
    _state = INITIAL
    _session_id = ""
    _client = None
    _server = None
    _server_hint = ("", 0)
    _connecting = None
    _stop_requested = False
    _is_out_of_time = False
    _ended = False
    _seat = None                     # among sessions that share what the policy has set (a class that lets them)
    _joined = False                  # config() and startup() have run for another one of those
    _vars = None
    _structs: dict[str, AttributeStruct] | None = None       # those that somebody has asked for
    _events: dict[str, dict[str, str]] | None = None
    _parent = None
    _children = ()
    _stacked = ()                    # what this proxy has stacked and not closed yet

    def __init_subclass__(cls, **keywords):
        super().__init_subclass__(**keywords)
        cls._table = install(cls)
        cls._events = None               # found at the first session: sites add methods after the class statement

    def __init__(self, proxy_name, module_name, session_id, client_stream, parent=None):
        if not isinstance(client_stream, Stream):
            raise TypeError("client must be a ZPolicyStream")
        self._ends_lock = threading.Lock()
        self._session_id = session_id
        self._client = client_stream
        self._parent = parent
        if type(self)._engine_main is BuiltinProxy._engine_main:
            log(session_id, CORE_ERROR, 1, "Cannot find proxy module; module='%s', proxy='%s, type='%d'",
                (module_name, proxy_name, 0))
            raise RuntimeError("Error binding proxy implementation")
        if parent is not None:
            parent.add_child(self)

    # what an engine overrides

    def _engine_start(self) -> None:
        """Set engine values that the table cannot tell."""

    def _engine_config(self) -> None:
        """Check and convert what config() set; raises to refuse the session."""

    def _engine_main(self) -> None:
        """Speak the protocol; the session ends when this returns."""

    def _engine_stop(self) -> None:
        """Release what the engine holds."""

    def _check_config(self) -> None:
        """Refuse what the configuration asks for and this release cannot do; raises PolicyError."""
        if self._vars.max_session_time < 0:
            raise PolicyError(f"max_session_time is negative; value='{self._vars.max_session_time}'",
                              remedy="give milliseconds, or 0 for no limit")

    def _config_problems(self) -> list[Problem]:
        """Return the settings that cannot be meant but only hurt when a client comes upon them."""
        return []

    def _datagram_problems(self) -> list[Problem]:
        """Return why no client whose side carries datagrams could be served; for zorp --check-policy."""
        return []

    # life

    def run(self) -> None:
        """Live from THREAD_STARTED to DESTROYING; never raises.  The session's thread calls it once."""
        running.add(self)
        try:
            try:
                if not self._is_revoked():
                    self._live()
            except PolicyCallFailed:
                self._content_failed("Policy function failed")      # logged where it happened
            except BaseException as problem:
                self._crashed(problem)
                self._content_failed("Proxy crashed")
            if self._stop_requested:
                self._content_failed("Stopped")
                if not (self._is_out_of_time or self.session.getMasterSession().is_revoked):     # told already
                    log(self._session_id, CORE_INFO, 2, "User initiated proxy termination request received;")
        finally:
            if self._vars is not None and self._vars.max_session_time:
                session_times.leave(self)
            try:
                self._end()
            finally:
                running.remove(self)

    def _is_revoked(self) -> bool:
        """True when a newer policy refuses the session that would begin here; who is stacked was judged before."""
        if Globals.newer_policy is None or self._parent is not None:
            return False
        reason = Globals.newer_policy(self.session.getMasterSession(), None)
        if reason:
            revoke(self.session, reason)
        return bool(reason)

    def _live(self) -> None:
        if not self._joined:
            self._configure()
        self._begin_time()
        if not self._joined:
            self._state = STARTING_UP
            self._run_events("startup")
        self._state = WORKING
        if not self._stop_requested:
            self._engine_main()

    def _configure(self) -> None:
        """Up to the point where the engine has understood what config() wants; zorp --check-policy comes here, too."""
        self._state = THREAD_STARTED
        self._vars = made = self._table.new_vars()
        made.client_local_tos = made.server_local_tos = 0
        made.server_socket_mark = _server_socket_mark()
        self._engine_start()
        self._state = STATE_CONFIG
        plain_attributes = len(self.__dict__)
        self._run_events("config")
        try:
            self._check_config()
            self._engine_config()
        except BaseException as problem:
            self._policy_failed(problem)         # what config() set is the policy's fault
        self._quietly(look_at, self, plain_attributes)

    def _begin_time(self) -> None:
        """From now on max_session_time counts."""
        if self._vars.max_session_time:
            session_times.enter(self, self._vars.max_session_time)

    def _crashed(self, problem: BaseException) -> None:
        """The engine itself failed; a stop request that tore its streams apart is no failure."""
        if self._stop_requested and isinstance(problem, OSError):
            return
        log_exception(self._session_id)
        conclude(self.session, DENIED_BY_UNKNOWN_FAIL, type(problem).__name__)

    def _end(self) -> None:
        """Every step on its own: none may keep the next from running."""
        is_last = self._seat is None or self._seat.leave()       # at once: nobody joins what is taken apart
        self._state = SHUTTING_DOWN
        client, server, parent, lock, stacked = (
            self._client, self._server, self._parent, self._ends_lock, self._stacked)
        if is_last and (Log.loudest >= 7 or self._events_of("shutdown")):
            self._quietly(self._run_events, "shutdown", lambda name: self._quietly(self._call_event, name))
        if self._vars is not None:
            self._quietly(self._engine_stop)
        for child in stacked:
            self._quietly(child.close)
        if Log.loudest >= 7 and enabled(CORE_DEBUG, 7):
            log(self._session_id, CORE_DEBUG, 7, "calling __destroy__() event;")
        self._quietly(getattr(self, "__destroy__", None) or _nothing)
        self._state = DESTROYING
        if parent is not None:
            parent.drop_child(self)
        Log.hold()                       # accounting and summary in one write: Zorp.ProxyGroup lets go
        for stream in (client, server):
            if stream is not None:
                self._quietly(_close, stream, lock)
        if is_last:
            self._quietly(self._announce_end)
        self._ended = True

    def _announce_end(self) -> None:
        """Tell the log that this proxy is gone; called once."""

    def _quietly(self, step, *args) -> None:
        try:
            step(*args)
        except BaseException as problem:
            log_policy_exception(self._session_id, problem)

    # events

    def _events_of(self, family: str) -> dict[str, str]:
        """Return the events of the family for which this object does something: {name of the event: method's name}."""
        if self.__dict__.keys().isdisjoint(_FAMILY_NAMES[family]):
            return (self._events or _find_events(type(self)))[family]
        return _present(_FAMILIES[family], lambda name: _does_something(getattr(self, name, _nothing)))

    def _run_events(self, family: str, call=None) -> None:
        """Call the events of a family in their order, each announced in the log, also those that do not exist.

        call: runs one event; by default the first exception ends the family.
        """
        call = call or self._call_event
        methods = self._events_of(family)
        if Log.loudest < 7 or not enabled(CORE_DEBUG, 7):
            for name in methods.values():
                call(name)
            return
        for event in _FAMILIES[family]:
            log(self._session_id, CORE_DEBUG, 7, "calling event; %s()", (event,))
            if event in methods:
                call(methods[event])

    def _call_event(self, name: str) -> None:
        method = getattr(self, name)
        if not callable(method) and name not in _FAMILY_NAMES["config"]:
            log(self._session_id, CORE_ERROR, 2, "Traceback: TypeError: Event must be callable: %s", (name,))
            return
        try:
            if not callable(method):         # a session without what the policy demands would pass too much
                raise TypeError(f"Event must be callable: {name}")
            method()
        except BaseException as problem:
            self._policy_failed(problem)

    # calls into policy code

    def _policy_failed(self, problem: BaseException) -> NoReturn:
        if isinstance(problem, PolicyCallFailed):
            raise problem                    # of a call within this call; all is said already
        log_policy_exception(self._session_id, problem)
        self._closed_by_abort(f"policy code raised {type(problem).__name__}")
        raise PolicyCallFailed from problem

    def _call_policy(self, function, *args):
        """Return what policy code returns; raises PolicyCallFailed, all said and logged, when it raises."""
        try:
            return function(*args)
        except BaseException as problem:
            self._policy_failed(problem)

    def _ask_policy(self, function, *args) -> int:
        """Return the verdict that policy code gives; raises PolicyCallFailed when it is not an int."""
        verdict = self._call_policy(function, *args)
        if isinstance(verdict, int):
            return int(verdict)
        log(self._session_id, CORE_POLICY, 1, "Policy function returned no verdict; function='%s', type='%s'",
            (getattr(function, "__name__", function), type(verdict).__name__))
        self._closed_by_abort("policy code gave no verdict")
        raise PolicyCallFailed

    def _closed_by_abort(self, reason: str = "") -> None:
        """Tell the policy that its own action ends the session."""
        self._quietly_notify("closedByAbort", ABORTED_BY_POLICY_ACTION, reason)

    def _invalid_policy_call(self) -> None:
        """Tell the policy that an entry of one of its tables is malformed."""
        self._quietly_notify("invalidPolicyCall", INVALID_POLICY_CALL, "")

    def _quietly_notify(self, name: str, verdict, reason: str) -> None:
        """Call one of the two notices; a site's own decides on the verdict, unless it fails."""
        try:
            getattr(self, name, _nothing)()
        except BaseException as problem:
            log_policy_exception(self._session_id, problem)
            conclude(self.session, verdict, reason)
        master = self.session.getMasterSession()
        if master.verdict == verdict and not master.refusal_reason:
            master.refusal_reason = reason

    def _log(self, tag, level, msg, args=None) -> None:
        """Log with this proxy's session id; the arguments are formatted only if the line is written."""
        log(self._session_id, tag, level, msg, args)

    def _struct(self, name: str) -> AttributeStruct:
        """Return the struct attribute of this name, made at its first use."""
        if self._structs is None:
            self._structs = {}
        if name not in self._structs:
            self._structs[name] = AttributeStruct(_STRUCTS[name], lambda: self._state == STATE_CONFIG)
        return self._structs[name]

    # the server side

    def _connect_server(self, host: str = "", port: int = 0) -> bool:
        """Reach the server through the policy; return whether `_server` is connected (routing 3.1).

        host, port: what the protocol said about the target; "" when it said nothing.
        Raises PolicyCallFailed when setServerAddress() raised.
        """
        self.session.connect_hint = (host, port)
        if self._server is not None:
            if _usable(self._server) and (not host or (host, port) == self._server_hint):
                self._log(CORE_INFO, 6, "Using already established server connection;")
                return True
            self._disconnect_server()
        if host and not self._call_policy(self.setServerAddress, host, port):
            self._closed_by_abort()
            return False
        try:
            stream = self.connectServer()
        except BaseException as problem:
            log_policy_exception(self._session_id, problem)
            conclude_by(self.session, problem)
            return False
        if not isinstance(stream, Stream):
            self._not_connected(stream)
            return False
        retract(self.session, DENIED_BY_CONNECTION_FAIL)
        self._server, self._server_hint = stream, (host, port)
        if self._stop_requested:
            stream.abort()
            return False
        return True

    def _not_connected(self, answer) -> None:
        """Conclude what connectServer() meant that gave no stream."""
        if answer is None:
            conclude(self.session, DENIED_BY_CONNECTION_FAIL)
            return
        self._log(CORE_POLICY, 1, "Policy function returned no stream; function='connectServer', type='%s'",
                  (type(answer).__name__,))
        conclude(self.session, INVALID_POLICY_CALL, "connectServer() gave no stream")

    def _disconnect_server(self) -> None:
        """Close the server's stream, if any, so that _connect_server() makes a new one."""
        stream, self._server = self._server, None
        if stream is not None:
            self.session.server_stream = None
            _close(stream, self._ends_lock)

    def _reset(self, stream) -> None:
        """Close a stream with a TCP reset."""
        with self._ends_lock:
            stream.reset()

    # stacking: see Zorp.stacking.stacking

    def _content_failed(self, reason: str) -> None:
        """Tell a parent, or the proxy on our left, that what came out of this one must not be taken for complete."""
        if self._parent is not None:
            self._parent.child_failed(self._client, reason)
            self._client.break_off()

    def child_failed(self, child_end, reason: str) -> None:
        """The child with this end of its client side broke; our own parent hears it when we do not judge content."""
        for stacked in self._stacked:
            if stacked.is_joined_to(child_end):
                stacked.verdict.fail(reason)
                if not stacked.hears_verdicts:
                    self._content_failed(reason)

    def child_judged(self, child_end, verdict: int, description: str) -> None:
        """The child with this end of its client side gave a verdict on the content."""
        for stacked in self._stacked:
            if stacked.is_joined_to(child_end):
                stacked.hear_verdict(verdict, description)

    def child_announced(self, child_end, length: int) -> None:
        """The child with this end of its client side announced how long its output will be."""
        for stacked in self._stacked:
            if stacked.is_joined_to(child_end):
                stacked.hear_length(length)

    def add_stacked(self, stacked) -> None:
        """Keep what was stacked, so that it ends with this proxy."""
        with self._ends_lock:
            self._stacked = (*self._stacked, stacked)
        if self._stop_requested:
            stacked.abort()                  # the request came while it was being started

    def drop_stacked(self, stacked) -> None:
        """Forget what is being closed."""
        lock = getattr(self, "_ends_lock", None)
        if lock is not None:
            with lock:
                self._stacked = tuple(other for other in self._stacked if other is not stacked)

    # other threads

    @property
    def stop_requested(self) -> bool:
        """True when the session was asked to end."""
        return self._stop_requested

    def set_connecting(self, attach) -> None:
        """Tell which connection attempt request_stop() must interrupt; None: none any more."""
        self._connecting = attach
        if attach is not None and self._stop_requested:
            attach.abort()

    def time_is_up(self) -> None:
        """End, because max_session_time is reached.  Any thread; never raises."""
        values = self._vars
        if values is None or self._stop_requested:
            return
        self._is_out_of_time = True
        log(self._session_id, CORE_SESSION, 3, "Session takes too long, ending it; max_session_time='%d'",
            (values.max_session_time,))
        self.session.getMasterSession().summary_info = _OUT_OF_TIME
        self.request_stop()

    def add_child(self, proxy) -> None:
        """Make a stop request for this proxy reach `proxy` too; nothing happens when this proxy ended."""
        lock = getattr(self, "_ends_lock", None)
        if lock is not None:
            with lock:
                self._children = (*self._children, proxy)

    def drop_child(self, proxy) -> None:
        """Forget a child that ended; nothing happens when this proxy ended first."""
        lock = getattr(self, "_ends_lock", None)
        if lock is not None:
            with lock:
                self._children = tuple(child for child in self._children if child is not proxy)

    def request_stop(self) -> None:
        """Make the session end soon: wake whatever its proxy waits for.  Any thread; never raises."""
        self._stop_requested = True
        lock = getattr(self, "_ends_lock", None)
        if lock is None:
            return                           # ended already
        for child in self._children:
            child.request_stop()             # first: else they would see an ordinary end of ours
        with lock:
            self._wake()

    def abandon(self) -> None:
        """Have the peers see a reset when this process ends without this session's end.  Any thread; never raises."""
        lock = getattr(self, "_ends_lock", None)
        if lock is None:
            return                           # ended already
        with lock:
            for stream in (self._client, self._server):
                if stream is not None:
                    stream.reset_when_closed()

    def _wake(self) -> None:
        """Wake whatever the proxy's thread may wait for; called with _ends_lock held, by any thread."""
        for busy in (self._connecting, *self._stacked, self._client, self._server):
            if busy is not None:
                with contextlib.suppress(OSError):
                    busy.abort()


# Each object begins with these in a dictionary of its own.  A read that falls through to the class costs several times
# as much, and a dictionary that is a copy keeps reads quick also after somebody has looked at it, as the events do.
BEGINNING = {name: vars(BuiltinProxy)[name] for name in (
    "_state", "_session_id", "_client", "_server", "_server_hint", "_connecting", "_stop_requested", "_seat", "_joined",
    "_vars", "_structs", "_parent", "_children", "_stacked")}

_STRUCTS = {
    "ssl": (Attr("client_connection_security", INT8, CONFIG, 0), Attr("server_connection_security", INT8, CONFIG, 0)),
    "tls": (),
}


@does_nothing
def _nothing() -> None:
    pass


def _find_events(cls: type) -> dict[str, dict[str, str]]:
    """Return what _events_of() says for objects of the class, by family, and keep it with the class."""
    cls._events = {family: _present(members, lambda name: _does_something(getattr(cls, name, _nothing)))
                   for family, members in _FAMILIES.items()}
    return cls._events


def _does_something(method) -> bool:
    return not getattr(method, "does_nothing", False)


def _present(members, has) -> dict[str, str]:
    """Return {member: method} of the members that exist, an old name standing in for its missing new one."""
    methods = {}
    for name in members:
        old_name = _OLD_NAMES.get(name)
        if has(name):
            methods[name] = name
        elif old_name is not None and has(old_name):
            _report_old_name(name, old_name)
            methods[name] = old_name
    return methods


_old_names_reported: set[str] = set()


def _report_old_name(name: str, old_name: str) -> None:
    if old_name not in _old_names_reported:
        _old_names_reported.add(old_name)
        log(None, CORE_POLICY, 0, "Obsolete policy handler in Proxy definition; new_name='%s', old_name='%s'",
            (name, old_name))


def _usable(stream: Stream) -> bool:
    """True when the stream can still carry data: open and neither reset nor hung up."""
    if stream.fileno() < 0 or stream.aborted:
        return False
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return not poll.poll(0)


def _close(stream: Stream, lock) -> None:
    """Close in order; only a peer that must be told to stop sending is reset."""
    in_order = stream.end_reading()
    if Log.loudest >= 6 and enabled(CORE_DEBUG, 6) and stream.fd >= 0:
        log(stream.name, CORE_DEBUG, 6, "Shutdown channel; fd='%d', mode='%d'", (stream.fd, socket.SHUT_RDWR))
    with lock:
        if in_order:
            stream.close()
        else:
            stream.reset()
