"""Bytes and datagrams over several one-way pumps: relays that Zorp.transport.relay is not made for.

Theory of operation
    A Pump moves what its source sends to its sink, at once; what the sink does not take waits in
    the pump, and as long as something waits the source is not read.  Pumps(...).run() watches all
    of them with one poll() until the relay is over, and returns an End.  Two kinds of relay:

        through_child()     client <-> a stacked child's client side, its server side <-> server.
                            Half-closes pass through; the relay is over when the child has nothing
                            more to say on either side, and everything it said was delivered.  A
                            child that reads no more is no failure of the connection; a connection
                            that is lost meanwhile ends the relay all the same.
        datagrams()         client <-> server, at least one of them a datagram socket.  One read is
                            one datagram, empty ones and those of 65507 bytes included; it has no
                            end of file, so the relay is over when nothing came for idle_ms, when
                            an error shows (ICMP unreachable), or when a stream side ends.  What a
                            stream side sends in one read becomes one datagram.

    A source may hold datagrams that were received before it existed: it then has `inbox_fd`,
    readable while there are some, take() to get the next one, and touch() to be told of traffic.

Threads
    run() in one thread.  Any other thread may call stop(), or abort() the streams, which tells
    their peers of an end: run() returns End.STOPPED.
"""

from __future__ import annotations

import errno
import select
import socket
import time
from collections.abc import Callable, Sequence

from Zorp.transport.relay import DRAIN_MS, AbstractRelay, End, RelaySettings, SideFailed
from Zorp.transport.stream import SocketStream, ms_until

DATAGRAM_BYTES = 65_535
_LARGEST_SENT_BYTES = 65_507     # of UDP over IPv4, RFC 768
_LOST_ON_THE_WAY = (errno.EMSGSIZE, errno.ENOBUFS)      # this datagram cannot be sent, others can
_IN, _OUT = select.POLLIN, select.POLLOUT
_LOST = select.POLLERR | select.POLLNVAL
_DONTWAIT = socket.MSG_DONTWAIT


class Pump:
    """One way: from `source` to `sink`.  `bytes` and `reads` count what was read.

    Arguments:
        failures: what an error of the source and of the sink means; None: only that this way ends.
        copies: False: what the source sends is read and thrown away.
    """

    def __init__(self, source: SocketStream, sink: SocketStream, failures: tuple[End | None, End | None], *,
                 copies: bool = True, read_bytes: int = 65_536) -> None:
        self.source, self.sink = source, sink
        self._source_failed, self._sink_failed = failures
        self._copies = copies
        self._from_datagrams = source.sock.type == socket.SOCK_DGRAM
        self._to_datagrams = sink.sock.type == socket.SOCK_DGRAM
        self._read_bytes = DATAGRAM_BYTES if self._from_datagrams else read_bytes
        if self._to_datagrams and not self._from_datagrams:
            self._read_bytes = min(read_bytes, _LARGEST_SENT_BYTES)
        self._waiting: memoryview | None = None
        self.told = False                # the sink knows that this way has ended
        self.at_eof = False
        self.bytes = self.reads = 0

    @property
    def waiting(self) -> bool:
        """True while the sink has not taken everything; the source must not be read."""
        return self._waiting is not None

    @property
    def ended(self) -> bool:
        """True when nothing more will go this way."""
        return self.at_eof and not self.waiting

    @property
    def is_watched_for_loss(self) -> bool:
        """True when the source is a connection whose failure matters, and nobody reads it now to find that out."""
        return (self.waiting or self.at_eof) and self._source_failed is not None and not self._from_datagrams

    def lost(self) -> None:
        """The source was lost while it was not read."""
        raise SideFailed(self._source_failed)

    def take_pushed_back(self) -> None:
        """Send what was read from the source before the relay began."""
        if self.source.pending:
            self._send(self.source.recv(self.source.pending))

    def pump(self) -> None:
        """Read once, send at once; call it when the source is readable and nothing waits."""
        take = getattr(self.source, "take", None)
        try:
            data = self.source.sock.recv(self._read_bytes, _DONTWAIT) if take is None else take()
        except BlockingIOError:
            return
        except OSError:
            self._failed(self._source_failed)
            return
        if not data and self.source.broken:
            self._failed(self._source_failed)
            return
        if not data and (not self._from_datagrams or self.source.aborted):
            self.at_eof = self.source.at_eof = True
            return
        self.reads += 1
        self.bytes += len(data)
        if take is None:
            self.source.bytes_recvd += len(data)
        if data or self._to_datagrams:
            self._send(data)

    def flush(self) -> None:
        """Send what waits; call it when the sink is writable."""
        self._send(self._waiting)

    def _send(self, data: bytes | memoryview) -> None:
        if not self._copies:
            return
        try:
            sent = self.sink.sock.send(data, _DONTWAIT)
        except BlockingIOError:
            self._waiting = memoryview(data)
            return
        except OSError as problem:
            self._waiting = None
            if not (self._to_datagrams and problem.errno in _LOST_ON_THE_WAY):
                self._failed(self._sink_failed)
            return
        self.sink.bytes_sent += sent
        self._waiting = memoryview(data)[sent:] if sent < len(data) else None

    def _failed(self, end: End | None) -> None:
        if end is not None:
            raise SideFailed(end)
        self.at_eof = True


class Pumps(AbstractRelay):
    """One relay; see the module's text.

    Arguments:
        to_server, to_client: the pumps whose counters tell what the peers sent.
        over: tells whether the relay is over; asked whenever a pump has ended.
        on_stats: called as the settings say; returns False to end the relay.
        broken: asked before a sink is told that this way has ended in order; True ends the relay.
    """

    def __init__(self, pumps: Sequence[Pump], settings: RelaySettings, over: Callable[[], bool],
                 on_stats: Callable[[], bool] | None, broken: Callable[[], bool] = lambda: False) -> None:
        super().__init__(pumps, settings, on_stats)
        self._pumps = pumps
        self._over = over
        self._broken = broken
        self._touch = getattr(pumps[0].source, "touch", None)        # of a UDP client: it is not idle
        self._last_traffic_s = self._started_s
        self._stats_due_s = self._started_s + settings.stats_ms / 1000
        self._reads_at_stats = 0
        self._hung_up: set[int] = set()      # sources that are closed both ways: each look would tell so at once

    def _loop(self) -> End:
        while True:
            ready = self._wait(self._next_ms())
            now_s = time.monotonic()
            if ready:
                self._last_traffic_s = now_s
                if self._touch is not None:
                    self._touch()
            elif self._is_idle(now_s):
                return End.TIMED_OUT
            self._serve(ready)
            if self._is_stopped():
                return End.STOPPED
            if self._stats_are_due(now_s) and not self._stats_allow(now_s):
                return End.REFUSED
            if any(pump.ended and not pump.told for pump in self._pumps):
                if self._broken():
                    return End.CHILD_FAILED
                self._tell_ends()
                if self._over():
                    return self._drain()

    def _wait(self, wait_ms: float | None) -> dict[int, int]:
        """Wait for something to do; return {descriptor: events}."""
        wanted: dict[int, int] = {}
        for pump in self._pumps:
            if pump.waiting:
                fd = pump.sink.fileno()
                wanted[fd] = wanted.get(fd, 0) | _OUT
            elif not pump.at_eof:
                for fd in _descriptors(pump.source):
                    wanted[fd] = wanted.get(fd, 0) | _IN
            if pump.is_watched_for_loss and (fd := pump.source.fileno()) not in self._hung_up:
                wanted.setdefault(fd, 0)             # errors are told without being asked for
        poll = select.poll()
        for fd, events in wanted.items():
            poll.register(fd, events)
        if all(way.waiting or way.at_eof for way in (self.to_server, self.to_client)):
            self._hear_stop(poll)
        return dict(poll.poll(wait_ms))

    def _serve(self, ready: dict[int, int]) -> None:
        for pump in self._pumps:
            if pump.is_watched_for_loss and (happened := ready.get(pump.source.fileno(), 0)):
                if happened & _LOST:
                    pump.lost()
                if happened & select.POLLHUP:
                    self._hung_up.add(pump.source.fileno())
            if pump.waiting:
                if pump.sink.fileno() in ready:
                    pump.flush()
            elif not pump.at_eof and any(fd in ready and ready[fd] & ~_OUT for fd in _descriptors(pump.source)):
                pump.pump()

    def _tell_ends(self) -> None:
        for pump in self._pumps:
            if pump.ended and not pump.told:
                pump.told = True
                pump.sink.shutdown(socket.SHUT_WR)

    def _drain(self) -> End:
        """Send what was read already, for a bounded time, reading nothing any more."""
        deadline_s = time.monotonic() + DRAIN_MS / 1000
        for pump in self._pumps:
            pump.at_eof = True
        while any(pump.waiting for pump in self._pumps):
            left_ms = (deadline_s - time.monotonic()) * 1000
            ready = self._wait(left_ms) if left_ms > 0 else {}
            if self._is_stopped():
                return End.STOPPED
            if not ready:
                return End.CUT
            self._serve(ready)
        return End.FINISHED

    # the clocks

    def _next_ms(self) -> float | None:
        due_s = []
        if self.settings.idle_ms is not None:
            due_s.append(self._last_traffic_s + self.settings.idle_ms / 1000)
        if self.settings.stats_ms > 0:
            due_s.append(self._stats_due_s)
        return ms_until(min(due_s)) if due_s else None

    def _is_idle(self, now_s: float) -> bool:
        return self.settings.idle_ms is not None and now_s >= self._last_traffic_s + self.settings.idle_ms / 1000

    def _stats_are_due(self, now_s: float) -> bool:
        settings = self.settings
        return ((settings.stats_ms > 0 and now_s >= self._stats_due_s)
                or (settings.stats_reads > 0
                    and self.to_server.reads + self.to_client.reads - self._reads_at_stats >= settings.stats_reads))

    def _stats_allow(self, now_s: float) -> bool:
        self._reads_at_stats = self.to_server.reads + self.to_client.reads
        self._stats_due_s = now_s + self.settings.stats_ms / 1000
        return self._on_stats is None or self._on_stats()


def _descriptors(source: SocketStream) -> tuple[int, ...]:
    inbox = getattr(source, "inbox_fd", None)
    return (source.fileno(),) if inbox is None else (inbox, source.fileno())


def through_child(client: SocketStream, server: SocketStream, child_client: SocketStream, child_server: SocketStream,
                  settings: RelaySettings, on_stats: Callable[[], bool] | None = None,
                  has_failed: Callable[[bool], bool] = lambda is_last: False) -> Pumps:
    """Return the relay of two connections through a child that has the other ends of two more.

    has_failed: tells, when the child ends one of its outputs, whether it broke; its argument is
        True when it has ended both.
    """
    to_child = Pump(client, child_client, (End.CLIENT_FAILED, None), copies=settings.copy_to_server,
                    read_bytes=settings.read_bytes)
    back_to_child = Pump(server, child_server, (End.SERVER_FAILED, None), copies=settings.copy_to_client,
                         read_bytes=settings.read_bytes)
    out = Pump(child_server, server, (None, End.SERVER_FAILED))
    back_out = Pump(child_client, client, (None, End.CLIENT_FAILED))

    def over() -> bool:
        return out.ended and back_out.ended

    def broken() -> bool:
        return (out.ended or back_out.ended) and has_failed(over())

    return Pumps((to_child, back_to_child, out, back_out), settings, over, on_stats, broken)


def datagrams(client: SocketStream, server: SocketStream, settings: RelaySettings,
              on_stats: Callable[[], bool] | None = None) -> Pumps:
    """Return the relay of a client and a server of which at least one sends datagrams."""
    there = Pump(client, server, (End.CLIENT_FAILED, End.SERVER_FAILED), copies=settings.copy_to_server,
                 read_bytes=settings.read_bytes)
    back = Pump(server, client, (End.SERVER_FAILED, End.CLIENT_FAILED), copies=settings.copy_to_client,
                read_bytes=settings.read_bytes)
    return Pumps((there, back), settings, lambda: there.ended or back.ended, on_stats)


def is_datagram(stream: SocketStream) -> bool:
    """True for a datagram socket."""
    return stream.kind == socket.SOCK_DGRAM
