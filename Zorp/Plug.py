"""Plug: a proxy that passes bytes both ways and knows no protocol.

    class Ssh(PlugProxy):
        def config(self):
            self.timeout = 3600000
            self.shutdown_soft = TRUE

Theory of operation
    Connect to the server, ask requestStack() whether something is to look at the data, then
    hand the streams to a relay: Zorp.transport.relay between two connections, Zorp.transport.pumps
    where a stacked child sits between them or one of them carries datagrams.  The engine's table
    below is the list of what a policy may set; RelaySettings is what a relay makes of it.

    A stacked child has both directions on both of its sides: what the client sends goes into its
    client side, what it says there goes to the client, and the same with the server.

    A policy that sets secondary_sessions or secondary_mask lets later connections join a running
    plug (Zorp.acceptance.secondary_sessions) instead of starting one: config() and startup() are
    not called for them, shutdown() only for the last one that ends.  Each has its own streams,
    server connection, access check and summary, and counts for no instance of the service.

    A session ends by end of file (on one side, or with shutdown_soft on both), by an error, by
    `timeout` milliseconds without a byte, by packetStats(), or by a stop request.  A side that
    was reset makes the other side reset as well; a stacked child that broke makes both.  A session
    that did not end by itself resets whoever has not got all that the other side said, so that
    half of a transfer does not look like a whole one.

Deviations
    Reads are at least 64 KiB whatever buffer_size says, which matters to datagrams only.
    An interval without a packetStats() method of the policy's own is reported once and
    otherwise ignored; the original ended every such session.  Bandwidths are floats, and 0.0
    in the first instant.  A secondary session has an object of its own, because a thread owns it:
    a copy of a running one with all that the policy set there, made when the session joins.
"""

from __future__ import annotations

import copy
import functools

from Zorp import Log
from Zorp.acceptance.secondary_sessions import ALL_PROPERTIES, secondary_sessions
from Zorp.acceptance.verdict import DENIED_BY_UNKNOWN_FAIL, conclude
from Zorp.Constants import CORE_DEBUG, CORE_ERROR, FALSE, TRUE, ZD_PROTO_UDP, ZV_ACCEPT
from Zorp.engine.attributes import ALIAS, ALWAYS, CUSTOM, INT, READ, Attr
from Zorp.engine.builtin_proxy import BuiltinProxy
from Zorp.engine.config_lint import Problem
from Zorp.Exceptions import PolicyError
from Zorp.language import star_names
from Zorp.Log import enabled
from Zorp.Proxy import Proxy, asks_for_authentication
from Zorp.stacking.stacking import StackingFailed, problem_of, stack_object
from Zorp.transport.pumps import datagrams, is_datagram, through_child
from Zorp.transport.relay import DRAIN_MS, End, Relay, RelaySettings

PLUG_DEBUG = "plug.debug"
_PLUG_SESSION = "plug.session"
_PLUG_POLICY = "plug.policy"
_PLUG_ERROR = "plug.error"

_SECONDARY = ("secondary_sessions", "secondary_mask")
_OWN = frozenset({"session", "_ends_lock"})          # of each session; the others are those that the class declares
_LEAST_READ_BYTES = 65536
_MOST_READ_BYTES = 1 << 20
_UDP_IDLE_MS = 60_000            # a session of datagrams has no other end


_CUT_SHORT = frozenset({End.TIMED_OUT, End.CUT, End.REFUSED, End.STOPPED})


_settings = functools.lru_cache(maxsize=64)(RelaySettings)      # policies ask for few different ones


class _Default(int):
    """A value that no policy has set."""


class AbstractPlugProxy(Proxy):
    """The engine of Plug with its attributes."""

    name = "plug"
    engine_attributes = (
        Attr("copy_to_server", INT, default=TRUE),
        Attr("copy_to_client", INT, default=TRUE),
        Attr("timeout", INT, default=600_000),                     # ms; 0 and less: no limit
        Attr("shutdown_soft", INT, default=FALSE),                 # TRUE when stacked
        Attr("buffer_size", INT, default=1500),                    # bytes
        Attr("packet_stats_interval_packet", INT, default=0),      # reads
        Attr("packet_stats_interval_time", INT, default=0),        # ms
        Attr("packet_stats_interval", ALIAS, ALWAYS, "packet_stats_interval_packet"),
        Attr("bandwidth_to_client", CUSTOM, READ, lambda proxy: proxy._bandwidth("to_client")),
        Attr("bandwidth_to_server", CUSTOM, READ, lambda proxy: proxy._bandwidth("to_server")),
    )
    stack_proxy = None                   # what requestStack() returns
    secondary_sessions = _Default(10)
    secondary_mask = _Default(0xF)       # bits: source address, source port, destination address, port
    _relay = None

    # what policies override

    def requestStack(self):
        """Return what is to be stacked, None for nothing."""
        return self.stack_proxy

    def packetStats(self, client_bytes, client_pkts, server_bytes, server_pkts):
        """Called at intervals with what was read so far; any result but ZV_ACCEPT ends the session.

        client_*: from the server towards the client; server_*: towards the server.
        """
        raise NotImplementedError

    # the engine

    def _engine_start(self):
        if self._parent is not None:
            self._vars.shutdown_soft = TRUE

    def _engine_config(self):
        for name in _SECONDARY:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise PolicyError(f"Invalid {name}; class='{type(self).__name__}', {name}='{value}'",
                                  remedy=f"give {name} a number from 0 on")

    def _config_problems(self):
        found = super()._config_problems()
        problem = problem_of(self.stack_proxy) if self._stacks_always() else None
        if problem is not None and getattr(self.stackCustom, "__func__", None) is Proxy.stackCustom:
            found.append(Problem(problem, "give stack_proxy a proxy class, a command, or a provider that is defined",
                                 "stack_proxy"))
        if self._vars.buffer_size < 1:
            found.append(Problem(f"buffer_size is no size; buffer_size='{self._vars.buffer_size}'", "give bytes, 1500",
                                 "buffer_size", is_fatal=False))
        if self.secondary_mask > ALL_PROPERTIES:
            found.append(Problem(f"secondary_mask has bits of no meaning; secondary_mask='{self.secondary_mask}'",
                                 f"give a number from 0 to {ALL_PROPERTIES}", "secondary_mask", is_fatal=False))
        return found

    def _datagram_problems(self):
        return [Problem("Datagrams cannot go through a stacked proxy", "take stack_proxy out, or give the dispatcher a "
                        "TCP bind", "stack_proxy")] if self._stacks_always() else []

    def _stacks_always(self):
        """True when stack_proxy decides for every client, and not to let it be."""
        return (self.stack_proxy is not None
                and getattr(self.requestStack, "__func__", None) is AbstractPlugProxy.requestStack)

    def _engine_main(self):
        if self._seat is None and self._wants_company():
            self._seat = secondary_sessions.open(self.session.getMasterSession(),
                                                 self.secondary_mask & ALL_PROPERTIES, self.secondary_sessions)
            self._seat.fill(self._state_to_share)
        if not self._connect_server():
            return
        form = self._call_policy(self.requestStack)
        if form is not None:
            self._relay_through(form)
        elif is_datagram(self._client) or is_datagram(self._server):
            self._run(datagrams(self._client, self._server, self._relay_settings(), self._stats_allow))
        else:
            on_mask = self._log_mask if Log.loudest >= 7 and enabled(CORE_DEBUG, 7) else None
            self._run(Relay(self._client, self._server, self._relay_settings(), self._stats_allow, on_mask))

    # secondary sessions

    def _wants_company(self):
        """True when the policy has set one of the two attributes, and whoever joins need not authenticate."""
        if isinstance(self.secondary_sessions, _Default) and isinstance(self.secondary_mask, _Default):
            return False
        return (self.secondary_sessions > 0 and self._parent is None
                and not asks_for_authentication(self.session.service))

    def _state_to_share(self):
        """Return what a secondary session begins with; called in another thread while this proxy runs."""
        state = {name: value for name, value in dict(self.__dict__).items()
                 if name not in _OWN and not (name[:1] == "_" and hasattr(AbstractPlugProxy, name))}
        state["_vars"] = copy.copy(self._vars)
        return state

    @classmethod
    def joining(cls, session, seat):
        """Return the proxy of a secondary session, ready for its thread."""
        proxy = cls.__new__(cls)
        proxy.__dict__.update(seat.state)
        proxy.session = session
        session.setProxy(proxy)
        proxy.server_fd_picked = FALSE
        proxy._seat, proxy._joined = seat, True
        BuiltinProxy.__init__(proxy, proxy.name, proxy.module, session.session_id, session.client_stream)
        seat.fill(proxy._state_to_share)
        return proxy

    # relaying

    def _relay_through(self, form):
        """Relay through what the form describes; nothing passes when it cannot be started."""
        if is_datagram(self._client) or is_datagram(self._server):
            self._log(CORE_ERROR, 3, "Datagrams cannot go through a stacked proxy;")
            self._not_stacked()
            return
        try:
            stacked = stack_object(self, form)
        except StackingFailed:
            self._log(CORE_ERROR, 3, "Could not start stacked proxy, rejecting transfer;")
            self._content_failed("Could not start stacked proxy")
            self._not_stacked()
            return
        if stacked.client is None or stacked.server is None:
            self._log(CORE_ERROR, 3, "Stacked proxy leaves no stream to its parent, rejecting transfer;")
            self._not_stacked()
            return
        self._vars.shutdown_soft = TRUE
        self._run(through_child(self._client, self._server, stacked.client, stacked.server,
                                self._relay_settings(), self._stats_allow, stacked.has_failed))

    def _not_stacked(self):
        conclude(self.session, DENIED_BY_UNKNOWN_FAIL, "nothing to look at the data")

    def _relay_settings(self):
        settings = self._vars
        stats_reads, stats_ms = settings.packet_stats_interval_packet, settings.packet_stats_interval_time
        if (stats_reads > 0 or stats_ms > 0) and type(self).packetStats is AbstractPlugProxy.packetStats:
            self._log(CORE_ERROR, 3, "Packet stats timeout elapsed, and no timeout callback specified;")
            stats_reads = stats_ms = 0
        idle_ms = settings.timeout if settings.timeout > 0 else None
        if idle_ms is None and self.session.getMasterSession().protocol == ZD_PROTO_UDP:
            idle_ms = _UDP_IDLE_MS
        return _settings(
            idle_ms, settings.shutdown_soft != FALSE,
            settings.copy_to_server != FALSE, settings.copy_to_client != FALSE,
            self._read_bytes(), stats_reads, stats_ms)

    def _read_bytes(self):
        """Return the size of one read: what is fast; where a stream becomes datagrams, what the policy sets."""
        size = self._vars.buffer_size
        if self._client.kind != self._server.kind and is_datagram(self._client) != is_datagram(self._server):
            return min(max(size, 1), _MOST_READ_BYTES)
        return min(max(size, _LEAST_READ_BYTES), _MOST_READ_BYTES)

    def _run(self, relay):
        self._relay = relay
        if self._stop_requested:             # it came before there was a relay to stop
            relay.stop()
        try:
            end = relay.run()
        except BaseException:
            self._content_failed("Relay failed")
            self._reset_unfinished()
            raise
        self._finish(end)

    def _finish(self, end):
        """Log why the relay ended, and reset the side that is still there when the other was reset."""
        if end is End.FINISHED:
            return
        self._content_failed(f"Relay ended; reason='{end.value}'")          # a parent must know before it sees an end
        if end is End.TIMED_OUT:
            self._log(_PLUG_SESSION, 3, "Connection timed out; timeout='%d'", (self._vars.timeout,))
        elif end is End.CUT:
            self._log(_PLUG_ERROR, 3, "Peer did not take the last bytes in time; timeout='%d'", (DRAIN_MS,))
        elif end is End.CLIENT_FAILED:
            self._reset(self._server)
        elif end is End.SERVER_FAILED:
            self._reset(self._client)
        elif end is End.CHILD_FAILED:
            if not self._stop_requested:                 # which ends children first
                conclude(self.session, DENIED_BY_UNKNOWN_FAIL, "the stacked proxy failed")
            self._reset(self._client)
            self._reset(self._server)
        if end in _CUT_SHORT:
            self._reset_unfinished()

    def _wake(self):
        """A relay of connections is stopped before anybody is told of an end."""
        relay = self._relay
        if relay is None or is_datagram(self._client) or is_datagram(self._server):
            super()._wake()
            return
        relay.stop()
        for stacked in self._stacked:
            stacked.abort()

    def _reset_unfinished(self):
        """An orderly end says that all has been said: give it only to a side that has got everything."""
        for stream in (self._client, self._server):
            if not is_datagram(stream) and not self._relay.said_all_to(stream):
                self._reset(stream)

    def _stats_allow(self):
        """Ask packetStats() whether the session goes on."""
        to_client, to_server = self._relay.to_client, self._relay.to_server
        verdict = self._call_policy(self.packetStats, to_client.bytes, to_client.reads,
                                    to_server.bytes, to_server.reads)
        if not isinstance(verdict, int):
            self._log(_PLUG_POLICY, 1, "Invalid return value of packetStats(), integer required;")
            self._closed_by_abort()
            return False
        if verdict != ZV_ACCEPT:
            self._log(_PLUG_POLICY, 1, "packetStats() requested to abort session; verdict='%d'", (verdict,))
            self._closed_by_abort()
            return False
        return True

    def _bandwidth(self, way):
        """Return the average bytes per second of one direction since copying began."""
        relay = self._relay
        if relay is None or (elapsed_s := relay.elapsed_s) <= 0:
            return 0.0
        return getattr(relay, way).bytes / elapsed_s

    def _log_mask(self, old, new):
        self._log(CORE_DEBUG, 7, "eofmask updated; old_mask='%04x', eof_mask='%04x'", (old, new))


class PlugProxy(AbstractPlugProxy):
    """Pass bytes both ways; the class that policies use and derive from."""


star_names.complete(__name__)
