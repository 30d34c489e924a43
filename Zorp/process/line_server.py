"""Requests in lines over a Unix socket, answers in the same order: for the loop of one thread.

Theory of operation
    A LineClient is one peer: what has arrived of it and is no request yet, at most one request
    under way, and answers that it has not read.  Subclasses carry requests out in take() and call
    answer() then or later; the next line is looked at when the previous one is answered.

    Fairness: a client gets REQUESTS_PER_TURN requests carried out, then it is the turn of the
    others, so whoever floods us waits for himself.  While a client has requests to wait for it is
    not read from: what is in the kernel costs us nothing.

Bounds: a line of line_bytes; no further request while more than UNREAD_BYTES of answers wait;
patience as Patience says; a number of connections, beyond which the longest unused one without
a request under way is closed.  Whatever exceeds them loses its connection.

Who the peer is, the kernel tells (peer_of); what it may do, the subclass decides.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import selectors
import socket
import stat
import struct
import time
from collections.abc import Callable
from typing import NamedTuple

from Zorp.Log import log, log_exception
from Zorp.process.log_pause import LogPause
from Zorp.process.timers import Timer, Timers

REQUESTS_PER_TURN = 50
UNREAD_BYTES = 1 << 20
PAUSE_S = 0.1
SPARED = 16
_READ_BYTES = 65_536
_SO_PEERGROUPS = 59
_SOCKET_MODE_MASK = 0o117        # rw-rw----
_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Patience(NamedTuple):
    """Seconds without progress until a connection is closed; None: for ever."""

    request: float | None            # a peer that sends nothing
    reader: float                    # a peer that does not read its answers


class Peer(NamedTuple):
    """The process at the other end, when it connected."""

    pid: int
    uid: int
    gids: frozenset[int]


def peer_of(sock: socket.socket) -> Peer:
    """Return who is at the other end of a connected Unix socket."""
    pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    groups: tuple[int, ...] = ()
    with contextlib.suppress(OSError):
        data = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4096)
        groups = struct.unpack(f"{len(data) // 4}i", data)
    return Peer(pid, uid, frozenset((gid, *groups)))


class LineClient:
    """One peer; subclasses define take().  All methods belong to the thread of the loop."""

    session_id: str | None = None        # for the log

    def __init__(self, server: LineServer, sock: socket.socket, line_bytes: int, patience: Patience) -> None:
        self.peer = peer_of(sock)
        self.events = 0                  # what the loop looks at now; the server's
        self.busy = False                # a request is under way
        self.sent = self.received = 0    # bytes
        self.connected_s = time.monotonic()
        self._server = server
        self._sock = sock
        self.line_bytes = line_bytes
        self._patience = patience
        self._input = bytearray()
        self._searched = 0               # so much of _input holds no newline
        self._output = bytearray()
        self._is_taking = False          # _take_requests() is at work
        self._next_turn: Timer | None = None     # requests are left for the next turn of the loop
        self._at_end = False             # the peer sends nothing more, or is not listened to any more
        self._deadline = Deadline(server.timers, self.close)
        self._waits_for: str | None = None
        self._answer_within_s: float | None = None

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def is_closed(self) -> bool:
        return self._sock.fileno() < 0

    # ---- for subclasses

    def take(self, line: bytes) -> None:
        """Carry out a request, given without its newline; answer() when that is done."""
        raise NotImplementedError

    def fail(self, step: str, problem: str) -> None:
        """The connection is being closed because of this.  step: "read" or "write"."""

    def answer(self, data: bytes) -> None:
        """Answer the request under way."""
        if self.is_closed:
            return
        self.busy = False
        self._answer_within_s = None
        self._output += data
        if not self._is_taking:
            self._take_requests()

    def answer_within(self, seconds: float) -> None:
        """The request under way is answered later; close the connection when that takes too long."""
        self._answer_within_s = seconds

    def last_answer(self) -> None:
        """Listen to no further request; the connection ends with the answers."""
        self._at_end = True
        self._input.clear()
        self._searched = 0

    def close(self) -> None:
        """End the connection.  Idempotent."""
        if not self.is_closed:
            self._deadline.set(None)
            self._cancel_next_turn()
            self._server.forget(self)
            self._sock.close()

    def let_go(self) -> None:
        """Close the descriptor without a word, in a forked child."""
        self._sock.close()

    # ---- the loop

    def begin(self) -> None:
        """The server has it: wait for requests."""
        self._settle(more=False)

    def ready(self, events: int) -> None:
        """The socket can be read or written."""
        if self.is_closed:
            return                       # by an earlier event of this turn
        try:
            if events & _WRITE:
                self._take_requests()
            if events & _READ and not self.is_closed and not self.busy:
                self._read()
        except Exception:                # a defect of ours ends this connection, not the process
            log_exception(self.session_id)
            self.close()

    def _read(self) -> None:
        try:
            data = self._sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError as problem:
            self._give_up("read", str(problem.strerror))
            return
        self._at_end = self._at_end or not data
        self.received += len(data)
        self._input += data
        if not self._output:
            self._waits_for = None       # progress: the patience begins again
        self._take_requests()

    def _take_requests(self) -> None:
        """Take lines as long as they are answered at once and somebody reads the answers."""
        self._cancel_next_turn()
        self._is_taking = True
        taken = 0
        while not self.busy and taken < REQUESTS_PER_TURN and len(self._output) <= UNREAD_BYTES:
            line = self._next_line()
            if line is None or self.is_closed:
                break
            self.busy = True
            taken += 1
            try:
                self.take(line)
            except Exception:            # likewise, whoever has called us: a timer, or the last request's answer
                log_exception(self.session_id)
                self.close()
        self._is_taking = False
        if not self.is_closed:
            self._write()
        if not self.is_closed:
            self._settle(more=taken == REQUESTS_PER_TURN and not self.busy)

    def _next_line(self) -> bytes | None:
        end = self._input.find(b"\n", self._searched)
        self._searched = len(self._input)
        if (self._searched if end < 0 else end) > self.line_bytes:
            self._give_up("read", f"line of more than {self.line_bytes} bytes")
            return None
        if end < 0:
            return None
        with memoryview(self._input) as whole, whole[:end] as part:
            line = bytes(part)
        del self._input[:end + 1]
        self._searched = 0
        return line

    def _write(self) -> None:
        if not self._output:
            return
        try:
            sent = self._sock.send(self._output)
        except BlockingIOError:
            return
        except OSError as problem:
            self._give_up("write", str(problem.strerror))
            return
        self.sent += sent
        del self._output[:sent]
        self._waits_for = None

    def _give_up(self, step: str, problem: str) -> None:
        self.fail(step, problem)
        self.close()

    def _settle(self, more: bool) -> None:
        """After whatever has happened: what comes next, what the loop looks at, and how long that may take."""
        if self._at_end and not (more or self.busy or self._output):
            self.close()
            return
        if more:
            self._next_turn = self._server.timers.after(0, lambda: self.ready(_WRITE))
        may_ask = not (self._at_end or self.busy or more) and len(self._output) <= UNREAD_BYTES
        self._server.watch(self, (_READ if may_ask else 0) | (_WRITE if self._output else 0))
        waits_for = "reader" if self._output else "answer" if self.busy else "request"
        if waits_for != self._waits_for:
            self._waits_for = waits_for
            self._deadline.set(self._answer_within_s if waits_for == "answer" else getattr(self._patience, waits_for))

    def _cancel_next_turn(self) -> None:
        if self._next_turn is not None:
            self._next_turn.cancel()
            self._next_turn = None


class Deadline:
    """Calls back when it passes; setting it again and again costs one timer, not one each time."""

    def __init__(self, timers: Timers, callback: Callable[[], None]) -> None:
        self._timers = timers
        self._callback = callback
        self._due_s: float | None = None
        self._timer: Timer | None = None

    def set(self, seconds: float | None) -> None:
        """Pass in so many seconds; None: never."""
        if seconds is None:
            self._due_s = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            return
        self._due_s = self._timers.now() + seconds
        if self._timer is None or self._timer.due_s > self._due_s:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._timers.after(seconds, self._look)

    def _look(self) -> None:
        self._timer = None
        left_s = self._due_s - self._timers.now()
        if left_s > 0:
            self._timer = self._timers.after(left_s, self._look)
        else:
            self._callback()


class LineServer:
    """Listening sockets and their clients; everything belongs to the thread of the loop."""

    def __init__(self, selector: selectors.BaseSelector, timers: Timers, connections: int) -> None:
        self.timers = timers
        self._selector = selector
        self._most = connections
        self._listeners: list[socket.socket] = []
        self._clients: collections.OrderedDict[LineClient, None] = collections.OrderedDict()  # last used: last
        self._exhaustions = LogPause(timers.now)

    def serve(self, listener: socket.socket, make: Callable[[socket.socket], LineClient]) -> None:
        """Accept clients of a listening socket, which is ours from now on; make() wraps each."""
        self._listeners.append(listener)
        self._listen(listener, make)

    def _listen(self, listener: socket.socket, make: Callable[[socket.socket], LineClient]) -> None:
        if listener.fileno() >= 0:           # closed during a pause
            self._selector.register(listener, _READ, lambda events: self._accept(listener, make))

    def _accept(self, listener: socket.socket, make: Callable[[socket.socket], LineClient]) -> None:
        try:
            sock, _address = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return                           # whoever knocked has gone
        except OSError as problem:
            if (suppressed := self._exhaustions.due()) is not None:
                log(None, "core.error", 3, "accept() failed; fd='%d', error='%s', suppressed='%d'",
                    (listener.fileno(), problem.strerror, suppressed))
            if problem.errno != errno.EMFILE or not self._spare_descriptors():
                self._pause(listener, make)
            return
        sock.setblocking(False)
        if len(self._clients) >= self._most and not self._close_longest_unused():
            sock.close()
            return
        client = make(sock)
        self._clients[client] = None
        client.begin()

    def _spare_descriptors(self) -> bool:
        """Give descriptors back, and keep to fewer connections; False when all have a request under way."""
        before = len(self._clients)
        self._most = min(self._most, max(before - SPARED, SPARED))
        while len(self._clients) > max(before - SPARED, 0) and self._close_longest_unused():
            pass
        return len(self._clients) < before

    def _pause(self, listener: socket.socket, make: Callable[[socket.socket], LineClient]) -> None:
        """Accept nobody for a while: the listener stays readable, and the loop would turn without end."""
        self._selector.unregister(listener)
        self.timers.after(PAUSE_S, lambda: self._listen(listener, make))

    def _close_longest_unused(self) -> bool:
        """Close the connection that was unused for longest, unless all have a request under way."""
        idle = next((known for known in self._clients if not known.busy), None)
        if idle is not None:
            idle.close()
        return idle is not None

    # ---- for clients

    def watch(self, client: LineClient, events: int) -> None:
        """Change what the loop looks at."""
        self._clients.move_to_end(client)
        if events == client.events:
            return
        if events and client.events:
            self._selector.modify(client, events, client.ready)
        elif events:
            self._selector.register(client, events, client.ready)
        else:
            self._selector.unregister(client)
        client.events = events

    def forget(self, client: LineClient) -> None:
        """The client is being closed."""
        self._clients.pop(client, None)
        if client.events:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(client)
            client.events = 0

    # ---- the end

    def close(self) -> None:
        """Close everything."""
        for client in list(self._clients):
            client.close()
        for listener in self._listeners:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(listener)
            listener.close()
        self._listeners.clear()

    def let_go(self) -> None:
        """In a forked child: close the descriptors, say nothing to anybody."""
        for client in self._clients:
            client.let_go()
        for listener in self._listeners:
            listener.close()


def listening_socket(directory: int, name: str, backlog: int) -> socket.socket:
    """Make a socket of this name in a directory (given as descriptor), mode rw-rw----, not blocking.

    A stale socket in its place is replaced.  Raises OSError, also when something else is there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    here = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    mask = os.umask(_SOCKET_MODE_MASK)
    try:
        os.fchdir(directory)                         # the way into a new root, and past the length of a path
        _remove_socket(name)
        sock.bind(name)
        sock.listen(backlog)
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(mask)
        os.fchdir(here)
        os.close(here)
    return sock


def _remove_socket(name: str) -> None:
    """Remove a socket of this name in the current directory; anything else stays and is an error."""
    try:
        mode = os.lstat(name).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(17, "a file that is no socket is in the way")
    os.unlink(name)
