"""Statistics of the process: what zorpctl shows about services, connections and threads.

Theory of operation
    Sessions, services and threads report what happens; Statistics counts under one lock and
    keeps nothing but numbers and, per open connection, who describes it.  The control
    socket asks for tree(), a copy in nested dictionaries with the node names of szig 6
    (`service.NAME.session_number`, `conns.NAME.N.SEC.REL.client_address`, `stats. ...`).

    Of an open connection only who describes it is kept, and asked when somebody wants to know:
    putting properties together for every connection would cost more than counting it.  Properties
    may be objects of a policy, so they are asked and turned into text without the lock; what fails
    has no value and says why in the log.

    Policies reach the same structure through szigEvent(event, (type, value)).

Deviations
    Running sessions are counted here, by start and stop, not copied from the service object:
    two threads may report in either order.  Threads of the pool and those that policies report
    are counted apart; threads_max is the sum of what both had at most.  Properties that arrive
    for a connection that is closed, or never was, are dropped; the original created nodes that
    nothing removed.
    Rates use the time that really passed between two ticks, and the monotonic clock.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from Zorp.Constants import (
    CORE_ERROR,
    Z_SZIG_CONNECTION_PROPS,
    Z_SZIG_CONNECTION_START,
    Z_SZIG_CONNECTION_STOP,
    Z_SZIG_RELOAD,
    Z_SZIG_SERVICE_COUNT,
    Z_SZIG_THREAD_START,
    Z_SZIG_THREAD_STOP,
    Z_SZIG_TICK,
    Z_SZIG_TYPE_CONNECTION_PROPS,
    Z_SZIG_TYPE_LONG,
    Z_SZIG_TYPE_PROPS,
    Z_SZIG_TYPE_STRING,
    Z_SZIG_TYPE_TIME,
)
from Zorp.Log import log, log_exception

_WINDOWS_S = {"avg1": 60, "avg5": 300, "avg15": 900}
_MAX_PROPERTIES = 16
_PRIMARY = (0, 0)                # secondary and related id of nearly every connection


ConnectionKey = tuple[str, int, int, int]        # service, instance id, secondary id, related id
Describe = Callable[[], Mapping[str, object]]


class _Connection(NamedTuple):
    """What is known of an open connection, in the place of its properties until somebody wants them."""

    describe: Describe
    added: Mapping[str, object]      # by events

    def properties(self) -> dict[str, int | str | None]:
        """Ask for the properties; runs code of policies.  Never raises."""
        described = _attempt(self.describe) or {}
        return {name: value if isinstance(value, int) else _attempt(str, value)
                for name, value in {**described, **self.added}.items()}


def _attempt(function, *args):
    """Return function(*args), None (and a line in the log) when it raises."""
    try:
        return function(*args)
    except BaseException:            # SystemExit of a policy's object is as good as any
        log_exception(None)
        return None


def _opened(node):
    """Return a node of the tree, that of a connection with its properties."""
    return node.properties() if isinstance(node, _Connection) else node


def _opened_below(node):
    """The same for everything below it."""
    node = _opened(node)
    return {name: _opened_below(below) for name, below in node.items()} if isinstance(node, dict) else node


class _Rate:
    """How fast a counter grows: the rate_... leaves.  Guarded by the owner's lock."""

    def __init__(self) -> None:
        self._last_total = 0
        self._last_tick_s: float | None = None
        self._increments: deque[tuple[float, int]] = deque()
        self.values: dict[str, int] = {}

    def tick(self, total: int, now_s: float, nominal_s: float) -> None:
        increment = total - self._last_total
        passed_s = nominal_s if self._last_tick_s is None else max(now_s - self._last_tick_s, 0.001)
        self._last_total, self._last_tick_s = total, now_s
        while self._increments and self._increments[0][0] <= now_s - max(_WINDOWS_S.values()):
            self._increments.popleft()
        if increment:
            self._increments.append((now_s, increment))
        for name, window_s in _WINDOWS_S.items():
            self.values[name] = sum(n for at_s, n in self._increments if at_s > now_s - window_s) // window_s
        self.values["max"] = max(self.values.get("max", 0), int(increment / passed_s))


class _ServiceCounters:
    """Everything counted for one service name; guarded by the lock of Statistics."""

    __slots__ = ("extra", "inbound_zones", "last_started_s", "outbound_zones", "rate",
                 "session_number", "sessions_max", "sessions_running")

    def __init__(self) -> None:
        self.session_number = 0          # sessions started so far, over reloads
        self.sessions_running = 0
        self.sessions_max = 0
        self.last_started_s: float | None = None
        self.inbound_zones: defaultdict[str, int] = defaultdict(int)
        self.outbound_zones: defaultdict[str, int] = defaultdict(int)
        self.rate = _Rate()
        self.extra: dict[str, object] = {}

    def leaves(self) -> dict[str, object]:
        found: dict[str, object] = {
            "session_number": self.session_number,
            "sessions_running": self.sessions_running,
            "sessions_max": self.sessions_max,
        }
        if self.last_started_s is not None:
            found["last_started"] = f"{self.last_started_s:.2f}"
        for name in ("inbound_zones", "outbound_zones"):
            if zones := getattr(self, name):
                found[name] = ", ".join(f"{zone}({count})" for zone, count in sorted(zones.items()))
        found.update({f"rate_{name}": value for name, value in self.rate.values.items()})
        found.update(self.extra)
        return found


class ThreadCounts:
    """How many threads of one kind run, were started, and ran at one time; guarded by a lock of whoever counts.

    Who only reads needs no lock: `running` first, and it is never above `most`.
    """

    __slots__ = ("most", "running", "started")

    def __init__(self) -> None:
        self.running = self.started = self.most = 0

    def begin(self) -> None:
        """One more."""
        running = self.running + 1
        if running > self.most:
            self.most = running
        self.running = running
        self.started += 1

    def end(self) -> None:
        """One less."""
        self.running -= 1


class Statistics:
    """The counters of this process; any thread may call any method.

    _counters_lock guards everything below it; no foreign code runs while it is held.

    pool_threads: counted by the pool of threads, which does so under a lock that it holds anyway.
    """

    def __init__(self) -> None:
        self._counters_lock = threading.Lock()
        self._services: defaultdict[str, _ServiceCounters] = defaultdict(_ServiceCounters)
        self._connections: dict[ConnectionKey, Describe] = {}        # the open ones: who describes them
        self._added: dict[ConnectionKey, dict[str, object]] = {}     # what events added to open ones
        self._secondaries = 0            # open ones that are not the only one with their instance id
        self._sessions_running: int | None = None      # None until the first session
        self._other_threads = ThreadCounts()
        self.pool_threads = ThreadCounts()
        self._thread_rate = _Rate()
        self._info: dict[str, dict[str, object]] = {}

    # reported by services and sessions

    def service_started(self, service: str, instance_id: int, now_s: float) -> None:
        """A session of the service counts from now (epoch seconds) on."""
        with self._counters_lock:
            counters = self._services[service]
            if counters.session_number <= instance_id:
                counters.session_number = instance_id + 1
            counters.sessions_running += 1
            if counters.sessions_max < counters.sessions_running:
                counters.sessions_max = counters.sessions_running
            counters.last_started_s = now_s

    def service_stopped(self, service: str) -> None:
        """One session of the service has ended."""
        with self._counters_lock:
            self._services[service].sessions_running -= 1

    def service_properties(self, service: str, properties: Mapping) -> None:
        """Set leaves below service.NAME, as a policy's SERVICE_COUNT event asks."""
        properties = dict(properties)
        with self._counters_lock:
            counters = self._services[service]
            for name, value in properties.items():
                if name in ("session_number", "sessions_running"):
                    setattr(counters, name, value)
                else:
                    counters.extra[name] = value
            counters.sessions_max = max(counters.sessions_max, counters.sessions_running)

    def connection_opened(self, key: ConnectionKey, describe: Describe) -> None:
        """A proxy works on the connection.

        describe: called by any thread, until the connection is closed or a little later; returns its properties.
        """
        with self._counters_lock:
            self._connections[key] = describe
            self._secondaries += key[2:] != _PRIMARY
            self._sessions_running = (self._sessions_running or 0) + 1

    def connection_properties(self, key: ConnectionKey, properties: Mapping) -> bool:
        """Add properties to an open connection; False when there is none."""
        properties = dict(properties)
        with self._counters_lock:
            is_open = key in self._connections
            if is_open:
                self._added.setdefault(key, {}).update(properties)
            return is_open

    def server_connected(self, key: ConnectionKey, client_zone: str, server_zone: str) -> None:
        """The server side of an open connection stands: one more session between the two zones."""
        with self._counters_lock:
            if key not in self._connections:
                return
            counters = self._services[key[0]]
            if client_zone:
                counters.outbound_zones[client_zone] += 1
            if server_zone:
                counters.inbound_zones[server_zone] += 1

    def connection_closed(self, key: ConnectionKey) -> None:
        """The connection is over; unknown ones are an error of ours and say so in the log."""
        with self._counters_lock:
            known = self._connections.pop(key, None)
            if known is not None:
                self._added.pop(key, None)
                self._secondaries -= key[2:] != _PRIMARY
                self._sessions_running = (self._sessions_running or 0) - 1
        if known is None:
            log(None, CORE_ERROR, 0,
                "Internal error, end-of-service notification referred to a non-existent service; service='%s:%d:%d'",
                key[:3])

    def sessions_changed(self, step: int) -> None:
        """Correct the number of running sessions, for events that policies report themselves."""
        with self._counters_lock:
            self._sessions_running = (self._sessions_running or 0) + step

    # reported by the runtime

    def thread_started(self) -> None:
        """A thread begins that the pool does not count."""
        with self._counters_lock:
            self._other_threads.begin()

    def thread_stopped(self) -> None:
        """One of them ends."""
        with self._counters_lock:
            self._other_threads.end()

    def tick(self, nominal_s: float = 5.0) -> None:
        """Bring the rates up to date; the runtime calls this every `nominal_s` seconds."""
        now_s = time.monotonic()
        with self._counters_lock:
            self._thread_rate.tick(self._other_threads.started + self.pool_threads.started, now_s, nominal_s)
            for counters in self._services.values():
                counters.rate.tick(counters.session_number, now_s, nominal_s)

    def info_properties(self, branch: str, properties: Mapping) -> None:
        """Set leaves below info.BRANCH (the RELOAD event: branch "policy")."""
        properties = dict(properties)
        with self._counters_lock:
            self._info.setdefault(branch, {}).update(properties)

    # for the next generation and for the control socket

    def export_state(self) -> dict[str, dict[str, object]]:
        """What a new generation goes on counting from: plain data by service name, fit for JSON."""
        with self._counters_lock:
            return {name: {"session_number": c.session_number, "sessions_max": c.sessions_max,
                           "last_started_s": c.last_started_s, "inbound_zones": dict(c.inbound_zones),
                           "outbound_zones": dict(c.outbound_zones)}
                    for name, c in self._services.items()}

    def adopt_state(self, state: Mapping[str, Mapping]) -> None:
        """Go on where export_state() of another generation stopped; never counts backwards."""
        with self._counters_lock:
            for name, values in state.items():
                mine = self._services[name]
                mine.session_number = max(mine.session_number, values["session_number"])
                mine.sessions_max = max(mine.sessions_max, values["sessions_max"])
                mine.last_started_s = mine.last_started_s or values["last_started_s"]
                for zones, others in ((mine.inbound_zones, values["inbound_zones"]),
                                      (mine.outbound_zones, values["outbound_zones"])):
                    for zone, count in others.items():
                        zones[zone] += count

    def tree(self) -> dict[str, object]:
        """Return everything as nested dictionaries; leaves are int or str, None means no value."""
        with self._counters_lock:
            found = {branch: read() for branch, read in self._branches_locked().items()}
        return {**found, "conns": _opened_below(found["conns"])}

    def value(self, path: tuple[str, ...]) -> str | None:
        """Return the text of the leaf at this path of raw names; None for inner and missing nodes."""
        node = self._node(path)
        return None if node is None or isinstance(node, dict) else str(node)

    def children(self, path: tuple[str, ...]) -> list[str]:
        """Return the raw names below this path in byte order; none below a leaf or a missing node."""
        node = self._node(path)
        return sorted(node, key=_byte_order) if isinstance(node, dict) else []

    def next_sibling(self, path: tuple[str, ...]) -> str | None:
        """Return the name that follows the last one of the path below its parent, or None."""
        node = self._node(path[:-1])
        mine = _byte_order(path[-1])
        return min((name for name in node if _byte_order(name) > mine), key=_byte_order, default=None) \
            if isinstance(node, dict) else None

    def _node(self, path: tuple[str, ...]):
        with self._counters_lock:
            branches = self._branches_locked()
            if not path:
                return branches
            if path[0] == "conns":                  # there may be thousands: copy no more than is asked for
                node, rest = self._connections_below_locked(path[1:3]), path[3:]
            else:
                node, rest = branches.get(path[0], lambda: None)(), path[1:]
        for name in rest:
            node = _opened(node)
            node = node.get(name) if isinstance(node, dict) else None
        return _opened(node)

    def _branches_locked(self) -> dict[str, Callable[[], dict]]:
        return {"conns": self._connections_locked, "info": self._info_locked,
                "service": self._services_locked, "stats": self._stats_locked}

    def _connections_locked(self) -> dict:
        found: dict[str, dict] = {service: {} for service in self._services}
        for key in self._connections:
            if key[0] in found:
                instances = found[key[0]].setdefault(str(key[1]), {})
                instances.setdefault(str(key[2]), {})[str(key[3])] = self._connection_locked(key)
        return found

    def _connections_below_locked(self, path: tuple[str, ...]) -> dict | None:
        """Return what is below conns, conns.SERVICE (names only) or conns.SERVICE.N."""
        if not path:
            return {service: {} for service in self._services}
        if path[0] not in self._services:
            return None
        if len(path) == 1:
            return {str(key[1]): {} for key in self._connections if key[0] == path[0]}
        found: dict[str, dict] = {}
        for key in self._instance_locked(path[0], int(path[1])) if path[1].isdecimal() else ():
            found.setdefault(str(key[2]), {})[str(key[3])] = self._connection_locked(key)
        return found or None

    def _instance_locked(self, service: str, instance_id: int) -> list[ConnectionKey]:
        """Return the open connections with this instance id."""
        primary = (service, instance_id, *_PRIMARY)
        if self._secondaries:
            return [key for key in self._connections if key[:2] == primary[:2]]
        return [primary] if primary in self._connections else []         # nearly always, and without a search

    def _connection_locked(self, key: ConnectionKey) -> _Connection:
        return _Connection(self._connections[key], dict(self._added.get(key, ())))

    def _info_locked(self) -> dict:
        return {branch: dict(leaves) for branch, leaves in self._info.items()}

    def _services_locked(self) -> dict:
        return {name: counters.leaves() for name, counters in self._services.items()}

    def _stats_locked(self) -> dict:
        pool, others = self.pool_threads, self._other_threads
        return {
            "sessions_running": self._sessions_running,
            "threads_running": pool.running + others.running,
            "thread_number": pool.started + others.started,
            "threads_max": pool.most + others.most,
            **{f"thread_rate_{name}": value for name, value in self._thread_rate.values.items()},
            "audit_number": None,
            "audit_running": None,
        }


def _byte_order(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


statistics = Statistics()


def szigEvent(event, value):
    """Report an event from policy code; `value` is (type, argument) as in szig 5.6.

    Raises ValueError when the argument does not fit its type, with the text of the original.
    """
    kind, argument = value
    check = _CHECKS.get(kind)
    if check is None:
        raise ValueError("Unknown SZIG type;")
    check(argument)
    apply = _EVENTS.get((event, kind))
    if apply is not None:                    # events of parts that are not in this release count nothing
        apply(argument)


def _check_long(argument):
    if not isinstance(argument, int):
        raise ValueError("Z_SZIG_TYPE_LONG requires an integer argument")


def _check_time(argument):
    if not isinstance(argument, tuple) or len(argument) != 2:
        raise ValueError("Z_SZIG_TYPE_TIME requires a (seconds, microseconds) argument")


def _check_string(argument):
    if not isinstance(argument, str):
        raise ValueError("Z_SZIG_TYPE_STRING requires a string argument")


def _check_properties(argument):
    if not isinstance(argument, tuple) or len(argument) != 2 or not isinstance(argument[1], Mapping):
        raise ValueError("Z_SZIG_TYPE_PROPS requires a mapping as 2nd argument")
    for name, value in argument[1].items():
        if not isinstance(name, str):
            raise ValueError("Z_SZIG_TYPE_PROPS cannot handle not string keys")
        if not isinstance(value, (str, int)):
            raise ValueError("Z_SZIG_TYPE_PROPS requires a string->string or string->int mapping")


def _check_connection_properties(argument):
    if not isinstance(argument, tuple) or len(argument) != 5 or not isinstance(argument[4], Mapping):
        raise ValueError("Z_SZIG_TYPE_CONNECTION_PROPS requires a mapping as 5th argument")
    for name, value in argument[4].items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise ValueError("Z_SZIG_TYPE_CONNECTION_PROPS requires a string->string mapping")


_CHECKS = {
    Z_SZIG_TYPE_LONG: _check_long,
    Z_SZIG_TYPE_TIME: _check_time,
    Z_SZIG_TYPE_STRING: _check_string,
    Z_SZIG_TYPE_PROPS: _check_properties,
    Z_SZIG_TYPE_CONNECTION_PROPS: _check_connection_properties,
}


def _limited(properties: Mapping) -> dict:
    names = list(properties)
    for name in names[_MAX_PROPERTIES:]:
        log(None, CORE_ERROR, 0,
            "Internal error, error adding property, properties are limited to 16 elements; add_name='%s'", (name,))
    return {name: properties[name] for name in names[:_MAX_PROPERTIES]}


_EVENTS = {
    (Z_SZIG_THREAD_START, Z_SZIG_TYPE_LONG): lambda argument: statistics.thread_started(),
    (Z_SZIG_THREAD_STOP, Z_SZIG_TYPE_LONG): lambda argument: statistics.thread_stopped(),
    (Z_SZIG_TICK, Z_SZIG_TYPE_TIME): lambda argument: statistics.tick(),
    (Z_SZIG_CONNECTION_PROPS, Z_SZIG_TYPE_CONNECTION_PROPS):
        lambda argument: statistics.connection_properties(tuple(argument[:4]), _limited(argument[4])),
    (Z_SZIG_CONNECTION_STOP, Z_SZIG_TYPE_CONNECTION_PROPS):
        lambda argument: statistics.connection_closed(tuple(argument[:4])),
    (Z_SZIG_CONNECTION_START, Z_SZIG_TYPE_PROPS): lambda argument: statistics.sessions_changed(+1),
    (Z_SZIG_SERVICE_COUNT, Z_SZIG_TYPE_PROPS):
        lambda argument: statistics.service_properties(argument[0], _limited(argument[1])),
    (Z_SZIG_RELOAD, Z_SZIG_TYPE_PROPS): lambda argument: statistics.info_properties("policy", _limited(argument[1])),
}
