"""kzorpd's control socket: RELOAD as ever, and requests as JSON (Zorp.wire.kzorpd).

Theory of operation
    One connection carries requests one after the other; each is answered when it is carried out,
    which for a reload is later.  The kernel tells who the peer is.  User 0 and our own user may
    do everything; the user that instances run as may hand over, ask and reload; nobody else may
    do anything, whatever the permissions of the socket file say.

Bounds: CONNECTIONS at a time; lines of SHORT_LINE_BYTES for everything but descriptions and
    zones of permitted peers; PATIENCE_S for a peer that neither sends nor reads.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import stat
import struct
from collections.abc import Callable
from typing import Protocol

from Zorp.Log import log, log_exception
from Zorp.process.timers import Timer, Timers
from Zorp.wire.kzorpd import (
    MAX_LINE_BYTES,
    SHORT_LINE_BYTES,
    SOCKET_NAME,
    KzorpdProtocolError,
    LineReader,
    answer_line,
    read_request,
)

CONNECTIONS = 64
PATIENCE_S = 30.0
_READ_BYTES = 1 << 20
_BACKLOG = 512
_SOCKET_MODE_MASK = 0o117        # rw-rw----
_FOR_INSTANCES = frozenset({"hello", "instance", "remove", "reload"})

Answer = Callable[[str | None, dict], None]              # (error or None, fields)


class Refused(Exception):
    """A request cannot be carried out; `str()` is the answer."""


class Actions(Protocol):
    """What carries requests out.  Raises Refused; a reload calls `answer` when it has ended."""

    def perform(self, request: dict) -> dict:
        """Carry out anything but a reload; return the fields of the answer."""

    def reload(self, answer: Answer) -> None:
        """Read the policies' zones again."""


class ControlError(Exception):
    """The control socket cannot be made; kzorpd must not start."""


class _Connection:
    """One peer."""

    def __init__(self, server: ControlServer, sock: socket.socket) -> None:
        self._server = server
        self._sock = sock
        _pid, self._uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        permitted = self._uid in server.masters or self._uid in server.instances
        self._reader = LineReader(MAX_LINE_BYTES if permitted else SHORT_LINE_BYTES)
        self._lines: list[bytes] = []
        self._output = bytearray()
        self._busy = False
        self._at_end = False
        self._patience: Timer | None = None
        self._wait(PATIENCE_S)

    def fileno(self) -> int:
        return self._sock.fileno()

    def ready(self, events: int) -> None:
        """The loop: the socket can be read or written."""
        try:
            if events & selectors.EVENT_WRITE:
                self._write()
            if events & selectors.EVENT_READ and self.fileno() >= 0:
                self._read()
        except Exception:                                # a defect of ours ends this connection, not kzorpd
            log_exception(None)
            self.close()

    def _read(self) -> None:
        try:
            data = self._sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError as problem:
            log(None, "core.error", 1, "Could not read request; error='%s'", (problem.strerror,))
            self.close()
            return
        self._at_end = not data
        try:
            self._lines += self._reader.feed(data)
        except KzorpdProtocolError as problem:
            log(None, "core.error", 1, "Could not read request; error='%s'", (problem,))
            self.close()
            return
        self._wait(PATIENCE_S)
        self._next()

    def _next(self) -> None:
        while self._lines and not self._busy and self.fileno() >= 0:
            self._busy = True
            self._take(self._lines.pop(0))
        if self.fileno() >= 0:
            if self._at_end and not self._busy and not self._output:
                self.close()
            else:
                self._watch()

    def _take(self, line: bytes) -> None:
        as_json = True
        try:
            request, as_json = read_request(line)
            self._authorise(request["request"])
            if request["request"] == "reload":
                self._wait(None)
                self._server.actions.reload(lambda error, fields: self._later(error, fields, as_json=as_json))
                return
            fields = self._server.actions.perform(request)
        except (Refused, KzorpdProtocolError) as problem:
            self._answer(str(problem), {}, as_json=as_json)
            return
        self._answer(None, fields, as_json=as_json)

    def _authorise(self, request: str) -> None:
        if self._uid in self._server.masters or (request in _FOR_INSTANCES and self._uid in self._server.instances):
            return
        log(None, "core.error", 1, "Control command refused; command='%s', uid='%d'", (request, self._uid))
        raise Refused("permission denied")

    def _later(self, error: str | None, fields: dict, *, as_json: bool) -> None:
        if self.fileno() >= 0:
            self._answer(error, fields, as_json=as_json)
            self._next()

    def _answer(self, error: str | None, fields: dict, *, as_json: bool) -> None:
        self._busy = False
        self._output += answer_line(error, fields, as_json=as_json)
        self._at_end |= not as_json                      # the original closed after its one word
        self._wait(PATIENCE_S)
        self._write()

    def _write(self) -> None:
        try:
            sent = self._sock.send(self._output) if self._output else 0
        except BlockingIOError:
            sent = 0
        except OSError as problem:
            log(None, "core.error", 1, "Could not write response; error='%s'", (problem.strerror,))
            self.close()
            return
        del self._output[:sent]
        if sent:
            self._wait(PATIENCE_S)
        if self._at_end and not self._busy and not self._output and not self._lines:
            self.close()
        else:
            self._watch()

    def _watch(self) -> None:
        self._server.watch(self, (0 if self._at_end or self._busy else selectors.EVENT_READ)
                           | (selectors.EVENT_WRITE if self._output else 0))

    def _wait(self, patience_s: float | None) -> None:
        if self._patience is not None:
            self._patience.cancel()
        self._patience = None if patience_s is None else self._server.timers.after(patience_s, self.close)

    def close(self) -> None:
        """End the connection.  Idempotent."""
        if self.fileno() >= 0:
            self._wait(None)
            self._server.forget(self)
            self._sock.close()


class ControlServer:
    """The socket and its connections; the loop's."""

    def __init__(self, directory: str, selector: selectors.BaseSelector, timers: Timers, actions: Actions,
                 instances_uid: int | None) -> None:
        """Raises ControlError."""
        self.masters = frozenset({0, os.getuid()})
        self.instances = frozenset() if instances_uid is None else frozenset({instances_uid})
        self.timers = timers
        self.actions = actions
        self._selector = selector
        self._path = os.path.join(directory, SOCKET_NAME)
        self._connections: set[_Connection] = set()
        self._listener = self._listen()
        selector.register(self._listener, selectors.EVENT_READ, lambda events: self._accept())

    def _listen(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        mask = os.umask(_SOCKET_MODE_MASK)
        try:
            if os.path.lexists(self._path) and not stat.S_ISSOCK(os.lstat(self._path).st_mode):
                raise FileExistsError(17, "a file that is no socket is in the way")
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
            sock.bind(self._path)
            sock.listen(_BACKLOG)
        except OSError as problem:
            sock.close()
            raise ControlError(f"Cannot make the control socket; socket='{self._path}', "
                               f"error='{problem.strerror or problem}'") from None
        finally:
            os.umask(mask)
        return sock

    def give_to_group(self, group: int) -> None:
        """Let the group of the instances reach the socket."""
        with contextlib.suppress(OSError):
            os.chown(self._path, -1, group)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        if len(self._connections) >= CONNECTIONS:
            sock.close()
            return
        sock.setblocking(False)
        connection = _Connection(self, sock)
        self._connections.add(connection)
        self._selector.register(connection, selectors.EVENT_READ, connection.ready)

    # ---- for connections

    def watch(self, connection: _Connection, events: int) -> None:
        """Change what a connection waits for."""
        if connection not in self._connections:
            return
        registered = connection.fileno() in self._selector.get_map()
        if events and registered:
            self._selector.modify(connection, events, connection.ready)
        elif events:
            self._selector.register(connection, events, connection.ready)
        elif registered:
            self._selector.unregister(connection)

    def forget(self, connection: _Connection) -> None:
        """The connection is being closed."""
        self._connections.discard(connection)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection)

    def close(self) -> None:
        """Close everything and remove the socket."""
        for connection in list(self._connections):
            connection.close()
        self._selector.unregister(self._listener)
        self._listener.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)
