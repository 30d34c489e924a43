"""Bytes between two connections, both ways, until one of several ends.

Theory of operation
    Relay(client, server, settings).run() returns an End.  One poll() watches both sockets; every
    call on them is made with MSG_DONTWAIT, descriptors stay in blocking mode.  Each way is a
    _Direction: what was read is sent at once; what the peer does not take stays in `_unsent`,
    and as long as something waits there its source is not read (back pressure).  An idle relay
    holds no buffer and no pipe.

    A direction ends with the end of file of its source, when everything read was sent:

        half_close      the sink is told (shutdown of the write side), the other way goes on
        otherwise       the relay ends; what was read before is still sent, for at most DRAIN_MS

    A reset or any other failure of one side ends the relay at once; End names that side, and the
    caller resets the other, so that both ends learn the same.

    How the bytes of a direction move is the business of _Direction alone.  They are copied at
    first; once a direction has carried LONG_BYTES they go through a pipe (Zorp.transport.pipes)
    and never leave the kernel.  The pipe is empty whenever the source is read, so EAGAIN of the
    source means that there is nothing to read; bytes left in the pipe wait for the sink as those
    in `_unsent` do, whatever the source has meanwhile.  splice() obeys the mode of a descriptor
    and no flag of the call, so both sockets are non-blocking from then on until the relay ends.
    Where there is no pipe to be had, or a socket cannot do it, the direction copies.

    stop() must not tell a peer of an end, not even one that takes nothing at this moment: it may
    have read everything, and the end, before the reset comes.  So it shuts down sources for
    reading only, which wakes a relay that waits for one of them.  One that waits for sinks alone
    would sleep on; it has an alarm, made when this comes to pass and closed when run() ends.

    A source that is as fast as we are wakes us only when a pipe can be filled
    (Zorp.transport.moderation); what stays below that is looked after in time by _Clocks.

Threads
    run() in one thread.  Any other thread may call stop(), or abort() the streams, which tells
    their peers of an end: run() returns End.STOPPED.

Only for plain stream sockets: bytes that a TLS layer holds back would not wake poll().
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import enum
import errno
import math
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence

from Zorp.transport.cpus import home
from Zorp.transport.moderation import Moderation
from Zorp.transport.pipes import PIPE_BYTES, Pipe, pipes
from Zorp.transport.stream import SocketStream, ms_until

LONG_BYTES = 65_536              # a direction that has carried so much goes on inside the kernel
DRAIN_MS = 5_000                 # how long bytes already read may take after the other side has closed
_HALF_CLOSED = select.POLLRDHUP
_IN, _OUT = select.POLLIN | _HALF_CLOSED, select.POLLOUT
_PLAIN = (socket.SocketType, socket.socket)
_LOST = select.POLLERR | select.POLLNVAL
_SINK_READY = _OUT | select.POLLHUP      # of a local socket that is full when its peer closes, POLLHUP alone is told
_DONTWAIT = socket.MSG_DONTWAIT
_SPLICE_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK if hasattr(os, "splice") else 0
_alarms_lock = threading.Lock()          # one for all relays, because it is needed so rarely
_CANNOT_SPLICE = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ENOMEM})


class End(enum.Enum):
    """Why a relay ended."""

    FINISHED = "finished"
    TIMED_OUT = "timed out"
    STOPPED = "stopped"                  # a stream was aborted
    REFUSED = "refused"                  # on_stats said so
    CLIENT_FAILED = "client failed"      # reset or another error of the connection
    SERVER_FAILED = "server failed"
    CUT = "cut"                          # one side closed and the other did not take the last bytes
    CHILD_FAILED = "child failed"        # what sits between the two sides broke


# what has ended, as on_mask gives it and the log shows it
CLIENT_READ, SERVER_READ, CLIENT_WRITE, SERVER_WRITE, ALL_ENDED = 0x01, 0x02, 0x04, 0x08, 0x40


# who failed when the source or the sink of a direction does
_FROM_CLIENT = (End.CLIENT_FAILED, End.SERVER_FAILED)
_FROM_SERVER = (End.SERVER_FAILED, End.CLIENT_FAILED)


@dataclasses.dataclass(frozen=True, slots=True)
class RelaySettings:
    """How a relay works; see the module's docstring.  One object serves all relays that work alike."""

    idle_ms: int | None = None           # without a byte in either direction; None: for ever
    half_close: bool = False
    copy_to_server: bool = True          # False: what the client sends is read and thrown away
    copy_to_client: bool = True
    read_bytes: int = 65536              # most bytes of one read
    stats_reads: int = 0                 # call on_stats after so many reads, both ways together; 0: never
    stats_ms: int = 0                    # and after so much time; 0: never


class SideFailed(Exception):
    """A connection broke; carries the End that says which."""

    def __init__(self, end: End) -> None:
        super().__init__(end)
        self.end = end


class _Direction:
    """One way: from `source` to `sink`.  `bytes` and `reads` count what was read.

    `waiting`: the sink has not taken everything yet, and the source must not be read.
    """

    __slots__ = ("_copies", "_in_pipe", "_pipe", "_read_bytes", "_splices", "_unsent", "at_eof", "bytes", "is_long",
                 "moderation", "reads", "sink", "sink_failed", "source", "source_failed", "waiting")

    def __init__(self, source: SocketStream, sink: SocketStream, failures: tuple[End, End], copies: bool,
                 read_bytes: int) -> None:
        self.source, self.sink = source, sink
        self.source_failed, self.sink_failed = failures
        self._copies = copies
        self._read_bytes = read_bytes
        self._unsent: bytes | memoryview = b""
        self.waiting = False
        self.is_long = False             # use_pipes() was called
        self.moderation: Moderation | None = None      # of a long one
        self._splices = False            # pipes are used; false again when a socket cannot do that
        self._pipe: Pipe | None = None   # the one that is not empty
        self._in_pipe = 0
        self.bytes = 0
        self.reads = 0
        self.at_eof = False

    @property
    def ended(self) -> bool:
        """True when nothing more will go this way."""
        return self.at_eof and not self.waiting

    @property
    def mark_due_s(self) -> float:
        """When bytes below a raised mark of a long direction have waited for long enough; infinite where none wait."""
        return math.inf if self.waiting else self.moderation.due_s

    def use_pipes(self) -> None:
        """Move bytes inside the kernel from now on; both sockets must be non-blocking."""
        self.is_long = True
        self.moderation = Moderation(self.source.sock)
        plain = type(self.source.sock) in _PLAIN and type(self.sink.sock) in _PLAIN      # others want to see the bytes
        self._splices = self._copies and plain and _SPLICE_FLAGS != 0

    def take_pushed_back(self) -> None:
        """Send what was read from the source before the relay began."""
        if pending := self.source.pending:
            self._send(self.source.recv(pending))

    def pump(self) -> None:
        """Read once, send at once; call it when the source is readable and nothing waits."""
        if self._splices and self._splice():
            return
        try:
            data = self.source.sock.recv(self._read_bytes, _DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            raise SideFailed(self.source_failed) from None
        if not data:
            if self.source.broken:
                raise SideFailed(self.source_failed)
            self.at_eof = self.source.at_eof = True
            return
        self.reads += 1
        self.bytes += len(data)
        self.source.bytes_recvd += len(data)
        self._send(data)

    def flush(self) -> None:
        """Send what waits; call it when the sink is writable."""
        if self._in_pipe:
            self._empty_pipe()
        else:
            self._send(self._unsent)

    def _splice(self) -> bool:
        """Fill an empty pipe from the source and empty it into the sink.

        False when nothing was moved: no pipe to be had, the end of file, or an urgent byte, which splice() does not
        get past.
        """
        pipe = pipes.take()
        if pipe is None:
            return False
        received = 0
        try:
            received = os.splice(self.source.fileno(), pipe.writer, PIPE_BYTES, flags=_SPLICE_FLAGS)
        except BlockingIOError:
            pass
        except OSError as problem:
            if problem.errno not in _CANNOT_SPLICE:
                raise SideFailed(self.source_failed) from None
            self._splices = False
        finally:
            if not received:
                pipes.give_back(pipe)
        if received:
            self.reads += 1
            self.bytes += received
            self.source.bytes_recvd += received
            self._pipe, self._in_pipe, self.waiting = pipe, received, True
            self._empty_pipe()
        return received > 0

    def _empty_pipe(self) -> None:
        """Move from the pipe to the sink what that takes; give the pipe back when it is empty."""
        try:
            while self._in_pipe:
                sent = os.splice(self._pipe.reader, self.sink.fileno(), self._in_pipe, flags=_SPLICE_FLAGS)
                self._in_pipe -= sent
                self.sink.bytes_sent += sent
        except BlockingIOError:
            return
        except OSError as problem:
            if problem.errno not in _CANNOT_SPLICE:
                raise SideFailed(self.sink_failed) from None
            self._splices = False
            data = self._read_pipe()
            pipes.give_back(self._pipe)
            self._pipe = None
            self._send(data)
            return
        pipes.give_back(self._pipe)
        self._pipe, self.waiting = None, False
        self.moderation.carried(self.bytes)

    def _read_pipe(self) -> bytes:
        """Take everything out of the pipe."""
        parts = []
        while self._in_pipe:
            parts.append(os.read(self._pipe.reader, self._in_pipe))
            self._in_pipe -= len(parts[-1])
        return b"".join(parts)

    def close(self) -> None:
        """Let go of a pipe, with what is in it."""
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            pipes.discard(pipe)

    def _send(self, data: bytes | memoryview) -> None:
        if not self._copies:
            return
        try:
            sent = self.sink.sock.send(data, _DONTWAIT)
        except BlockingIOError:
            sent = 0
        except OSError:
            raise SideFailed(self.sink_failed) from None
        self.sink.bytes_sent += sent
        self.waiting = sent < len(data)
        self._unsent = memoryview(data)[sent:] if self.waiting else b""


class AbstractRelay(abc.ABC):
    """What every relay is to its owner: run, stopped from outside, and asked afterwards who got everything.

    Arguments:
        ways: each has `source`, `sink`, `ended` and take_pushed_back(); the first two carry what the client and
            what the server sends.
    """

    def __init__(self, ways: Sequence[_Direction], settings: RelaySettings,
                 on_stats: Callable[[], bool] | None) -> None:
        self.settings = settings
        self.to_server, self.to_client = ways[0], ways[1]
        self._all_ways = ways
        self._on_stats = on_stats
        self._started_s = time.monotonic()
        self._stopped: tuple[SocketStream, ...] | None = None      # by stop(): who had got everything then
        self._alarm: int | None = None               # an eventfd that stop() writes to; guarded by _alarms_lock
        self._is_deaf = False                        # there was none to be had; guarded as well

    def run(self) -> End:
        """Relay until the end; exceptions of the callbacks pass through."""
        try:
            for way in self._all_ways:
                way.take_pushed_back()
            end = self._loop()
        except SideFailed as failure:
            end = failure.end
        finally:
            if self._alarm is not None:
                self._close_alarm()
        return End.STOPPED if self._is_stopped() else end

    @abc.abstractmethod
    def _loop(self) -> End:
        """Move bytes until there is a reason to end."""

    def _is_stopped(self) -> bool:
        return self._stopped is not None or self.to_server.source.aborted or self.to_client.source.aborted

    def stop(self) -> None:
        """Make run() return End.STOPPED soon, with no end told to anybody; for any thread, never raises."""
        with _alarms_lock:
            if self._stopped is None:
                self._stopped = tuple(way.sink for way in self._all_ways if way.ended)
            if self._alarm is not None:
                os.eventfd_write(self._alarm, 1)
            how = socket.SHUT_RDWR if self._is_deaf else socket.SHUT_RD
        for stream in (self.to_server.source, self.to_client.source):
            stream.shutdown(how)

    def _hear_stop(self, poll: select.poll) -> None:
        """Have stop() wake a poll() that watches neither source for reading.

        Without a descriptor for the alarm nothing but an end wakes it, and a peer may take that for the end of data.
        """
        with _alarms_lock:
            if self._alarm is None:
                try:
                    self._alarm = os.eventfd(self._stopped is not None, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                except OSError:
                    self._is_deaf = True
                    return
            poll.register(self._alarm, select.POLLIN)

    def _close_alarm(self) -> None:
        with _alarms_lock:
            alarm, self._alarm = self._alarm, None
            os.close(alarm)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the relay was made."""
        return time.monotonic() - self._started_s

    def said_all_to(self, stream: SocketStream) -> bool:
        """True when whoever speaks to `stream` has ended in order and all of it was sent."""
        if self._stopped is not None:                # what has ended since then, stop() has ended
            return stream in self._stopped
        return any(way.sink is stream and way.ended for way in self._all_ways)


class Relay(AbstractRelay):
    """One relay between two connected streams, which stay the caller's.

    Arguments:
        on_stats: called as the settings say; returns False to end the relay.
        on_mask: called with the (old, new) mask of bits whenever something has ended.
    """

    def __init__(self, client: SocketStream, server: SocketStream, settings: RelaySettings,
                 on_stats: Callable[[], bool] | None = None,
                 on_mask: Callable[[int, int], None] | None = None) -> None:
        to_server = _Direction(client, server, _FROM_CLIENT, settings.copy_to_server, settings.read_bytes)
        to_client = _Direction(server, client, _FROM_SERVER, settings.copy_to_client, settings.read_bytes)
        super().__init__((to_server, to_client), settings, on_stats)
        self._ways = {client.fileno(): (to_server, to_client),
                      server.fileno(): (to_client, to_server)}      # descriptor: (from it, to it)
        self._poll = select.poll()
        self._registered: dict[int, int] = {}        # descriptor: events that poll() watches for
        self._on_mask = on_mask
        self._mask = 0
        self._reads_at_stats = 0
        self._after_pipes: contextlib.ExitStack | None = None      # None: all is copied
        self._clocks: _Clocks | None = None          # None: there is only idle_ms to look after

    def run(self) -> End:
        """As every relay; the sockets are in blocking mode again afterwards."""
        try:
            return super().run()
        finally:
            if self._after_pipes is not None:
                self._after_pipes.close()

    def _loop(self) -> End:
        settings, poll, serve = self.settings, self._poll, self._serve
        idle_ms, stats_reads = settings.idle_ms, settings.stats_reads
        if settings.stats_ms > 0:
            self._clocks = _Clocks(self.settings)
        self._watch()
        while True:
            clocks = self._clocks
            events = poll.poll(idle_ms if clocks is None else clocks.next_ms())
            if not events and (clocks is None or clocks.idle_is_over()):
                return End.TIMED_OUT
            if self._stopped is not None:
                return End.STOPPED
            changed = False
            for fd, happened in events:
                changed |= serve(fd, happened)
            if stats_reads > 0 and self._reads() - self._reads_at_stats >= stats_reads and not self._stats_allow():
                return End.REFUSED
            if clocks is not None:
                if clocks.stats_are_due() and not self._stats_allow():
                    return End.REFUSED
                clocks.traffic(bool(events))
                clocks.lower_late_marks()
            if changed:
                if self._stopped is not None:        # what looks like the end of a source is ours
                    return End.STOPPED
                if self._has_ended():
                    return self._drain()
                self._watch()

    def _serve(self, fd: int, happened: int) -> bool:
        """Do what one descriptor is ready for; return whether what to watch for may have changed."""
        incoming, outgoing = self._ways[fd]
        wanted = self._registered.get(fd, 0)
        changed = False
        if happened & _SINK_READY and wanted & _OUT:
            outgoing.flush()
            changed = not outgoing.waiting
        if wanted & _IN and happened & ~_OUT:
            incoming.pump()                          # end of file and errors are found by reading
            if happened & _HALF_CLOSED and not (incoming.at_eof or incoming.waiting or incoming.is_long):
                incoming.pump()                      # the end nearly always: poll() need not tell of it once more
            if incoming.bytes >= LONG_BYTES and not incoming.is_long:
                self._use_pipes(incoming)
            return changed or incoming.at_eof or incoming.waiting
        if happened & _LOST:
            raise SideFailed(incoming.source_failed)
        if happened & select.POLLHUP:
            self._forget(fd)                         # it would wake poll() for ever
        return changed

    def _use_pipes(self, direction: _Direction) -> None:
        """Let a direction that has proved long move its bytes inside the kernel."""
        if self._clocks is None:
            self._clocks = _Clocks(self.settings)
        if self._after_pipes is None:
            self._after_pipes = after = contextlib.ExitStack()
            after.enter_context(home.away())
            for each in (self.to_server, self.to_client):
                os.set_blocking(each.source.fileno(), False)
                after.callback(os.set_blocking, each.source.fileno(), True)
                after.callback(each.close)
        direction.use_pipes()
        self._after_pipes.callback(direction.moderation.lower)
        self._clocks.long_ways.append(direction)

    def _watch(self) -> None:
        """Tell poll() what each side is waited for."""
        registered = self._registered
        watched = 0
        for fd, (incoming, outgoing) in self._ways.items():
            wanted = (0 if incoming.at_eof or incoming.waiting else _IN) | (_OUT if outgoing.waiting else 0)
            watched |= wanted
            if registered.get(fd) != wanted:
                self._poll.register(fd, wanted)
                registered[fd] = wanted
        if not watched & _IN:
            self._hear_stop(self._poll)

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
        if not (self.to_server.waiting or self.to_client.waiting):
            return End.FINISHED
        deadline_s = time.monotonic() + DRAIN_MS / 1000
        while waiting := [direction for direction in (self.to_server, self.to_client) if direction.waiting]:
            left_ms = (deadline_s - time.monotonic()) * 1000
            poll = select.poll()
            for direction in waiting:
                poll.register(direction.sink.fileno(), _OUT)
            self._hear_stop(poll)
            ready = dict(poll.poll(left_ms)) if left_ms > 0 else {}
            if self._stopped is not None:
                return End.STOPPED
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
    """What a relay must not sleep through: the end of its idle time, a report, bytes below a raised mark."""

    def __init__(self, settings: RelaySettings) -> None:
        self._idle_s = math.inf if settings.idle_ms is None else settings.idle_ms / 1000
        self._interval_s = settings.stats_ms / 1000 if settings.stats_ms > 0 else math.inf
        self.long_ways: list[_Direction] = []        # those that may raise a mark
        self._last_traffic_s = time.monotonic()
        self._stats_due_s = self._last_traffic_s + self._interval_s

    def next_ms(self) -> float:
        """Return how long poll() may wait."""
        return ms_until(min(self._stats_due_s, self._last_traffic_s + self._idle_s,
                            *[way.mark_due_s for way in self.long_ways]))

    def traffic(self, there_was_some: bool) -> None:
        """Take note that something was sent or received."""
        if there_was_some:
            self._last_traffic_s = time.monotonic()

    def idle_is_over(self) -> bool:
        """True when neither side sent anything for too long."""
        return time.monotonic() >= self._last_traffic_s + self._idle_s

    def stats_are_due(self) -> bool:
        """True once per interval."""
        now_s = time.monotonic()
        if now_s < self._stats_due_s:
            return False
        self._stats_due_s = now_s + self._interval_s
        return True

    def lower_late_marks(self) -> None:
        """Have poll() tell of bytes that have waited below a raised mark for long enough."""
        now_s = time.monotonic()
        for way in self.long_ways:
            if way.mark_due_s <= now_s:
                way.moderation.lower()
