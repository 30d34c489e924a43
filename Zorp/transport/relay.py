"""Bytes between two connections, both ways, until one of several ends.

Theory of operation
    Relay(client, server, settings).run() returns an End.  One poll() watches both sockets; every
    call on them is made with MSG_DONTWAIT, the descriptors stay as they are.  Each way is a
    _Direction: what was read is sent at once; what the peer does not take stays in `_waiting`,
    and as long as something waits there its source is not read (back pressure).  An idle relay
    holds no buffer.

    A direction ends with the end of file of its source, when everything read was sent:

        half_close      the sink is told (shutdown of the write side), the other way goes on
        otherwise       the relay ends; what was read before is still sent, for at most DRAIN_MS

    A reset or any other failure of one side ends the relay at once; End names that side, and the
    caller resets the other, so that both ends learn the same.

    How the bytes of a direction move is the business of _Direction.pump() alone; that is where
    moving them inside the kernel belongs.

Threads
    run() in one thread.  Any other thread may abort() the streams: run() returns End.STOPPED.

Only for plain stream sockets: bytes that a TLS layer holds back would not wake poll().
"""

from __future__ import annotations

import enum
import select
import socket
import time
from collections.abc import Callable
from typing import NamedTuple

from Zorp.transport.stream import SocketStream

DRAIN_MS = 5_000                 # how long bytes already read may take after the other side has closed
_IN, _OUT = select.POLLIN, select.POLLOUT
_LOST = select.POLLERR | select.POLLNVAL
_DONTWAIT = socket.MSG_DONTWAIT


class End(enum.Enum):
    """Why a relay ended."""

    FINISHED = "finished"
    TIMED_OUT = "timed out"
    STOPPED = "stopped"                  # a stream was aborted
    REFUSED = "refused"                  # on_stats said so
    CLIENT_FAILED = "client failed"      # reset or another error of the connection
    SERVER_FAILED = "server failed"
    CUT = "cut"                          # one side closed and the other did not take the last bytes


# what has ended, as on_mask gives it and the log shows it
CLIENT_READ, SERVER_READ, CLIENT_WRITE, SERVER_WRITE, ALL_ENDED = 0x01, 0x02, 0x04, 0x08, 0x40


class RelaySettings(NamedTuple):
    """How a relay works; see the module's docstring."""

    idle_ms: int | None = None           # without a byte in either direction; None: for ever
    half_close: bool = False
    copy_to_server: bool = True          # False: what the client sends is read and thrown away
    copy_to_client: bool = True
    read_bytes: int = 65536              # most bytes of one read
    stats_reads: int = 0                 # call on_stats after so many reads, both ways together; 0: never
    stats_ms: int = 0                    # and after so much time; 0: never


class _SideFailed(Exception):
    """A connection broke; carries the End that says which."""

    def __init__(self, end: End) -> None:
        super().__init__(end)
        self.end = end


class _Direction:
    """One way: from `source` to `sink`.  `bytes` and `reads` count what was read."""

    __slots__ = ("_copies", "_read_bytes", "_waiting", "at_eof", "bytes", "reads", "sink", "sink_failed", "source",
                 "source_failed")

    def __init__(self, source: SocketStream, sink: SocketStream, failures: tuple[End, End], copies: bool,
                 read_bytes: int) -> None:
        self.source, self.sink = source, sink
        self.source_failed, self.sink_failed = failures
        self._copies = copies
        self._read_bytes = read_bytes
        self._waiting: bytes | memoryview = b""
        self.bytes = 0
        self.reads = 0
        self.at_eof = False

    @property
    def waiting(self) -> bool:
        """True while the sink has not taken everything; the source must not be read."""
        return len(self._waiting) > 0

    @property
    def ended(self) -> bool:
        """True when nothing more will go this way."""
        return self.at_eof and not self._waiting

    def take_pushed_back(self) -> None:
        """Send what was read from the source before the relay began."""
        if self.source.pending:
            self._send(self.source.recv(self.source.pending))

    def pump(self) -> None:
        """Read once, send at once; call it when the source is readable and nothing waits."""
        try:
            data = self.source.sock.recv(self._read_bytes, _DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            raise _SideFailed(self.source_failed) from None
        if not data:
            self.at_eof = True
            return
        self.reads += 1
        self.bytes += len(data)
        self.source.bytes_recvd += len(data)
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
            sent = 0
        except OSError:
            raise _SideFailed(self.sink_failed) from None
        self.sink.bytes_sent += sent
        self._waiting = memoryview(data)[sent:] if sent < len(data) else b""


class Relay:
    """One relay between two connected streams, which stay the caller's.

    Arguments:
        on_stats: called as the settings say; returns False to end the relay.
        on_mask: called with the (old, new) mask of bits whenever something has ended.
    """

    def __init__(self, client: SocketStream, server: SocketStream, settings: RelaySettings,
                 on_stats: Callable[[], bool] | None = None,
                 on_mask: Callable[[int, int], None] | None = None) -> None:
        self.settings = settings
        self.to_server = _Direction(client, server, (End.CLIENT_FAILED, End.SERVER_FAILED),
                                    settings.copy_to_server, settings.read_bytes)
        self.to_client = _Direction(server, client, (End.SERVER_FAILED, End.CLIENT_FAILED),
                                    settings.copy_to_client, settings.read_bytes)
        self._ways = {client.fileno(): (self.to_server, self.to_client),
                      server.fileno(): (self.to_client, self.to_server)}      # descriptor: (from it, to it)
        self._poll = select.poll()
        self._registered: dict[int, int] = {}        # descriptor: events that poll() watches for
        self._on_stats = on_stats
        self._on_mask = on_mask
        self._mask = 0
        self._started_s = time.monotonic()
        self._reads_at_stats = 0

    def run(self) -> End:
        """Relay until the end; exceptions of the callbacks pass through."""
        client, server = self.to_server.source, self.to_client.source
        try:
            for direction in (self.to_server, self.to_client):
                direction.take_pushed_back()
            end = self._loop()
        except _SideFailed as failure:
            end = failure.end
        return End.STOPPED if client.aborted or server.aborted else end

    @property
    def elapsed_s(self) -> float:
        """Seconds since the relay was made."""
        return time.monotonic() - self._started_s

    def _loop(self) -> End:
        clocks = _Clocks(self.settings) if self.settings.stats_ms > 0 else None
        idle_ms, stats_reads, poll, serve = self.settings.idle_ms, self.settings.stats_reads, self._poll, self._serve
        self._watch()
        while True:
            events = poll.poll(idle_ms if clocks is None else clocks.next_ms())
            if not events and (clocks is None or clocks.idle_is_over()):
                return End.TIMED_OUT
            changed = False
            for fd, happened in events:
                changed |= serve(fd, happened)
            if stats_reads > 0 and self._reads() - self._reads_at_stats >= stats_reads and not self._stats_allow():
                return End.REFUSED
            if clocks is not None:
                if clocks.stats_are_due() and not self._stats_allow():
                    return End.REFUSED
                clocks.traffic(bool(events))
            if changed:
                if self._has_ended():
                    return self._drain()
                self._watch()

    def _serve(self, fd: int, happened: int) -> bool:
        """Do what one descriptor is ready for; return whether what to watch for may have changed."""
        incoming, outgoing = self._ways[fd]
        wanted = self._registered.get(fd, 0)
        changed = False
        if happened & _OUT and wanted & _OUT:
            outgoing.flush()
            changed = not outgoing.waiting
        if wanted & _IN and happened & ~_OUT:
            incoming.pump()                          # end of file and errors are found by reading
            return changed or incoming.at_eof or incoming.waiting
        if happened & _LOST:
            raise _SideFailed(incoming.source_failed)
        if happened & select.POLLHUP:
            self._forget(fd)                         # it would wake poll() for ever
        return changed

    def _watch(self) -> None:
        """Tell poll() what each side is waited for."""
        registered = self._registered
        for fd, (incoming, outgoing) in self._ways.items():
            wanted = (0 if incoming.at_eof or incoming.waiting else _IN) | (_OUT if outgoing.waiting else 0)
            if registered.get(fd) != wanted:
                self._poll.register(fd, wanted)
                registered[fd] = wanted

    def _forget(self, fd: int) -> None:
        self._poll.unregister(fd)
        self._registered[fd] = 0

    def _has_ended(self) -> bool:
        """Note what has ended, tell the peers, and return whether the relay is over."""
        to_server, to_client = self.to_server, self.to_client
        if not to_server.at_eof and not to_client.at_eof:
            return False
        ended = self._mask
        if to_server.at_eof:
            ended |= CLIENT_READ
        if to_client.at_eof:
            ended |= SERVER_READ
        if self.settings.half_close:
            for direction, bit in ((to_server, SERVER_WRITE), (to_client, CLIENT_WRITE)):
                if direction.ended and not ended & bit:
                    ended |= bit
                    direction.sink.shutdown(socket.SHUT_WR)
        over = not self.settings.half_close or (to_server.ended and to_client.ended)
        if over:
            ended |= ALL_ENDED
        if self._on_mask is not None and ended != self._mask:
            self._on_mask(self._mask, ended)
        self._mask = ended
        return over

    def _drain(self) -> End:
        """Send what was read already, for a bounded time, reading nothing any more."""
        deadline_s = time.monotonic() + DRAIN_MS / 1000
        while waiting := [direction for direction in (self.to_server, self.to_client) if direction.waiting]:
            left_ms = (deadline_s - time.monotonic()) * 1000
            poll = select.poll()
            for direction in waiting:
                poll.register(direction.sink.fileno(), _OUT)
            ready = dict(poll.poll(left_ms)) if left_ms > 0 else {}
            if not ready:
                return End.CUT
            for direction in waiting:
                if direction.sink.fileno() in ready:
                    direction.flush()
        return End.FINISHED

    def _reads(self) -> int:
        return self.to_server.reads + self.to_client.reads

    def _stats_allow(self) -> bool:
        self._reads_at_stats = self._reads()
        return self._on_stats is None or self._on_stats()


class _Clocks:
    """The two clocks of a relay that reports at intervals: idleness and the interval."""

    def __init__(self, settings: RelaySettings) -> None:
        self._idle_s = None if settings.idle_ms is None else settings.idle_ms / 1000
        self._interval_s = settings.stats_ms / 1000
        self._last_traffic_s = time.monotonic()
        self._stats_due_s = self._last_traffic_s + self._interval_s

    def next_ms(self) -> float:
        """Return how long poll() may wait."""
        until_s = self._stats_due_s
        if self._idle_s is not None:
            until_s = min(until_s, self._last_traffic_s + self._idle_s)
        return max(0.0, until_s - time.monotonic()) * 1000

    def traffic(self, there_was_some: bool) -> None:
        """Take note that something was sent or received."""
        if there_was_some:
            self._last_traffic_s = time.monotonic()

    def idle_is_over(self) -> bool:
        """True when neither side sent anything for too long."""
        return self._idle_s is not None and time.monotonic() >= self._last_traffic_s + self._idle_s

    def stats_are_due(self) -> bool:
        """True once per interval."""
        now_s = time.monotonic()
        if now_s < self._stats_due_s:
            return False
        self._stats_due_s = now_s + self._interval_s
        return True
