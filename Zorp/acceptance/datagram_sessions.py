"""UDP sessions of one listener: which datagram belongs to which session, and how many there may be.

Theory of operation
    A session is a pair of sender and destination.  arrived() takes one datagram of the listening
    socket: it goes to the session of its pair, or begins a new one, which is returned and has to
    be delivered to the policy like an accepted connection.  The new session's socket gets the
    later datagrams of its pair from the kernel; those that waited on the listening socket are
    read before the session is delivered, up to the first of another pair, and come through its
    inbox, in order and before all others.

    A thread is not tied to a session before the policy has accepted it: whoever delivers is one
    of the pool that asks the policy, and serves the session only when it was accepted.

A datagram that claims to come from where this process listens is forged, and dropped: its session
would answer ourselves, for ever when the server echoes.

Limits (config.options): max_udp_sessions of one listener, max_udp_sessions_per_client of one
sender's address.  Beyond, the session that was idle for longest ends, of all or of that sender,
if it was idle for a second; else the datagram is dropped.  One log line per second tells of it.
Nobody is looked for before the moment at which somebody can be idle for so long, so that a flood of
forged senders costs little more than reading it.

Threads
    arrived() in one thread at a time.  _sessions_lock guards the table; a stream's own lock guards
    its inbox.
"""

from __future__ import annotations

import collections
import contextlib
import os
import select
import socket
import threading
import time

from Zorp import Globals
from Zorp.Config import config
from Zorp.Constants import CORE_ERROR, CORE_INFO, ZD_PROTO_UDP
from Zorp.Log import log
from Zorp.process.log_pause import LogPause
from Zorp.SockAddr import from_sockaddr
from Zorp.Stream import Stream, StreamTimeout
from Zorp.transport.datagrams import DATAGRAM_BYTES, Datagram, SessionSocket, receive, session_socket, strays

INBOX_DATAGRAMS = 64
EVICTED_AFTER_S = 1.0


def _pair(datagram: Datagram) -> tuple:
    return datagram.destination[:2], datagram.source[:2]


class DatagramStream(Stream):
    """The client's side of a UDP session: recv() gives one datagram, send() sends one.

    inbox_fd    readable while the inbox holds something
    """

    __slots__ = ("_inbox", "_inbox_lock", "inbox_fd", "last_active_s", "peer")

    def __init__(self, sock: SessionSocket, name: str, peer: tuple) -> None:
        super().__init__(sock, name)
        self.peer = peer[:2]
        self.last_active_s = time.monotonic()
        self.inbox_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._inbox: collections.deque[bytes] = collections.deque()
        self._inbox_lock = threading.Lock()

    def give(self, data: bytes) -> bool:
        """Put a datagram of this pair into the inbox; False when it is full or closed.  Any thread."""
        with self._inbox_lock:
            if self.inbox_fd < 0 or len(self._inbox) >= INBOX_DATAGRAMS:
                return False
            self._inbox.append(data)
            os.eventfd_write(self.inbox_fd, 1)
        return True

    def take(self) -> bytes:
        """Return the next datagram, without waiting; raises BlockingIOError.  b"" when aborted or empty."""
        if self.aborted:
            return b""
        data = self._from_inbox()
        while data is None:
            data, source = self.sock.recvfrom(DATAGRAM_BYTES, socket.MSG_DONTWAIT)
            if source is not None and source[:2] != self.peer and not self.aborted:
                data = None                          # came while the socket was not connected yet
        self.touch()
        self.bytes_recvd += len(data)
        return data

    def _from_inbox(self) -> bytes | None:
        if not self._inbox:
            return None
        with self._inbox_lock:
            data = self._inbox.popleft()
            if not self._inbox:
                os.eventfd_read(self.inbox_fd)
        return data

    def touch(self) -> None:
        """Note that the session is in use."""
        self.last_active_s = time.monotonic()

    def recv(self, limit: int = DATAGRAM_BYTES, deadline: float | None = None) -> bytes:
        """Return the next datagram, cut to `limit`; b"" when aborted, or when it is empty."""
        if self.pending:
            return super().recv(limit)
        poll = select.poll()
        for fd in (self.inbox_fd, self.fileno()):
            poll.register(fd, select.POLLIN)
        while True:
            wait_ms = self.timeout_ms
            if deadline is not None:
                left_ms = max((deadline - time.monotonic()) * 1000, 0)
                wait_ms = left_ms if wait_ms is None else min(wait_ms, left_ms)
            if not poll.poll(wait_ms):
                raise StreamTimeout("nothing received in time")
            try:
                return self.take()[:limit]
            except BlockingIOError:
                continue

    def send(self, data) -> None:
        super().send(data)
        self.touch()

    def close(self) -> None:
        with self._inbox_lock:
            if self.inbox_fd >= 0:
                os.close(self.inbox_fd)
                self.inbox_fd = -1
                self._inbox.clear()
        super().close()

    def reset(self) -> None:
        """Close; a datagram socket has nothing to reset."""
        self.close()


class DatagramSessions:
    """The sessions of one listener; see the module's text."""

    _announced = False

    def __init__(self, *, transparent: bool) -> None:
        self._transparent = transparent
        self._sessions_lock = threading.Lock()
        self._sessions: dict[tuple, DatagramStream] = {}
        self._per_client: collections.Counter = collections.Counter()
        self._nobody_idle_until_s: dict[str, float] = {}     # by client's address, "" for all; while there is no room
        self._too_many, self._failures, self._own = LogPause(), LogPause(), LogPause()
        self._waiting: collections.deque[Datagram] = collections.deque()     # read already; for arrived()

    def arrived(self, listener: socket.socket) -> tuple[DatagramStream, Datagram] | None:
        """Take one datagram; return the session that it begins, None when it begins none.

        Raises BlockingIOError when there is no datagram, another OSError when the socket is unwell.
        """
        datagram = self._waiting.popleft() if self._waiting else receive(listener)
        key = _pair(datagram)
        session = self._sessions.get(key)
        if session is not None:
            session.give(datagram.data)              # a full inbox loses it, as a full socket buffer would
            return None
        if self._is_our_own(listener.family, datagram) or not self._make_room(datagram):
            return None
        return self._begin(listener, datagram, key)

    @property
    def waiting(self) -> bool:
        """True when arrived() has something to do that no event of the socket will tell."""
        return bool(self._waiting)

    @property
    def number(self) -> int:
        """How many sessions there are."""
        return len(self._sessions)

    def _is_our_own(self, family: int, datagram: Datagram) -> bool:
        """True, and logged, when an answer to the datagram would come back to this process."""
        table = Globals.dispatch_table
        if table is None or not table.listens_on(ZD_PROTO_UDP, from_sockaddr(family, datagram.source)):
            return False
        if (suppressed := self._own.due()) is not None:
            log(None, CORE_ERROR, 2, "Datagram claims to come from a listener of this firewall, dropping packet;"
                " client='%s:%d', suppressed='%d'", (*datagram.source[:2], suppressed))
        return True

    def _begin(self, listener: socket.socket, datagram: Datagram, key: tuple):
        if not DatagramSessions._announced:
            DatagramSessions._announced = True
            log(None, CORE_INFO, 4, "UDP accept() support unavailable, falling back to legacy datagram handling;")
        try:
            stream = self._open(listener, datagram)
        except OSError as problem:
            if (suppressed := self._failures.due()) is not None:
                log(None, CORE_ERROR, 3, "Error creating session socket, dropping packet; error='%s', suppressed='%d'",
                    (problem.strerror, suppressed))
            return None
        stream.give(datagram.data)
        self._give_what_waits(stream, key, listener)
        for stray in strays(stream.sock, datagram):
            self._give_or_keep(stream, key, stray)
        with self._sessions_lock:
            self._sessions[key] = stream
            self._per_client[stream.peer[0]] += 1
        stream.on_close(lambda: self._forget(key, stream))
        return stream, datagram

    def _open(self, listener: socket.socket, datagram: Datagram) -> DatagramStream:
        sock = session_socket(listener.family, datagram, transparent=self._transparent)
        try:
            return DatagramStream(sock, "nosession", datagram.source)
        except BaseException:
            sock.close()
            raise

    def _give_what_waits(self, stream: DatagramStream, key: tuple, listener: socket.socket) -> None:
        """Give a new session what came for it before its own socket was there.

        The listening socket is read up to the first datagram of somebody else: those behind it
        stay in the kernel, where the next generation of this instance finds them after a reload.
        """
        waiting, self._waiting = self._waiting, collections.deque()
        for datagram in waiting:
            self._give_or_keep(stream, key, datagram)
        with contextlib.suppress(OSError):           # nothing more, or arrived() will meet the same
            for _ in range(INBOX_DATAGRAMS - 1):
                if self._waiting:
                    break
                self._give_or_keep(stream, key, receive(listener))

    def _give_or_keep(self, stream: DatagramStream, key: tuple, datagram: Datagram) -> None:
        if _pair(datagram) == key:
            stream.give(datagram.data)
        elif len(self._waiting) < INBOX_DATAGRAMS:
            self._waiting.append(datagram)

    def _forget(self, key: tuple, stream: DatagramStream) -> None:
        with self._sessions_lock:
            if self._sessions.get(key) is stream:
                self._remove_locked(key)

    def _remove_locked(self, key: tuple) -> DatagramStream:
        host = key[1][0]
        for full in (host, ""):
            self._nobody_idle_until_s.pop(full, None)
        self._per_client[host] -= 1
        if not self._per_client[host]:
            del self._per_client[host]
        return self._sessions.pop(key)

    def _make_room(self, datagram: Datagram) -> bool:
        """Tell whether one more session may be there; ends the one that was idle for longest when need be."""
        options, host = config.options, datagram.source[0]
        most, most_of_client = options.max_udp_sessions, options.max_udp_sessions_per_client
        with self._sessions_lock:
            if most_of_client and self._per_client[host] >= most_of_client:
                limit, evicted = most_of_client, self._evict_locked(host)
            elif most and len(self._sessions) >= most:
                limit, evicted = most, self._evict_locked("")
            else:
                return True
        if evicted is not None:
            evicted.abort()
        if (suppressed := self._too_many.due()) is not None:
            result = "oldest session ended" if evicted is not None else "datagram dropped"
            log(None, CORE_ERROR, 2, "Too many UDP sessions; client_host='%s', max_sessions='%d', result='%s',"
                " suppressed='%d'", (host, limit, result, suppressed))
        return evicted is not None

    def _evict_locked(self, host: str) -> DatagramStream | None:
        """Take out the session that was idle for longest, of one client or ("") of all; None: none for long enough."""
        now_s = time.monotonic()
        if now_s < self._nobody_idle_until_s.get(host, 0.0):
            return None
        keys = [key for key in self._sessions if key[1][0] == host] if host else self._sessions
        oldest = min(keys, key=lambda key: self._sessions[key].last_active_s)
        idle_at_s = self._sessions[oldest].last_active_s + EVICTED_AFTER_S
        if now_s < idle_at_s:
            self._nobody_idle_until_s[host] = idle_at_s
            return None
        return self._remove_locked(oldest)
