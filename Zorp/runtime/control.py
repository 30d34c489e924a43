"""The control socket: one per virtual process, served by the master's loop (szig 2, 3, 5).

Theory of operation
    A connection is a line buffer, at most one request under way, and an output buffer.  Requests
    that one worker must answer go to it as a question; orders that concern the instance (reload,
    deadlock check) are carried out here.  Answers keep the order of the requests: the next line
    is looked at when the previous one is answered.  Every answer ends in a newline.

    An order that changes something needs the right peer: user 0, our user, or a member of our
    group, as the kernel tells; each is logged with its author.

Bounds: a line of 131328 bytes; ten seconds without progress for answers that nobody reads, and
    no further request is looked at while more than 1 MiB of them waits; ten seconds for an answer
    that a worker does not give; CONNECTIONS at a time, beyond which the longest idle one is
    closed.  Whatever exceeds them loses its connection.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
from collections.abc import Callable
from typing import Protocol

import Zorp
from Zorp.Log import log, log_exception
from Zorp.process.timers import Timer, Timers
from Zorp.runtime.pidfile import Directory
from Zorp.runtime.slots import Slot

LINE_BYTES = 131_328
OUTPUT_BYTES = 1 << 20
PATIENCE_S = 10.0
CONNECTIONS = 512
_READ_BYTES = 65_536
_SO_PEERGROUPS = 59
_SOCKET_MODE_MASK = 0o117        # rw-rw----

COMMANDS = ("GETVALUE", "GETCHILD", "GETSBLNG", "DUMP", "JSON", "LOGGING", "DEADLOCKCHECK", "RELOAD",
            "STOPSESSION", "COREDUMP", "STACKDUMP", "VERSION", "HELP")
_FOR_WORKER = frozenset({"GETVALUE", "GETCHILD", "GETSBLNG", "DUMP", "JSON", "LOGGING", "STACKDUMP"})


class Actions(Protocol):
    """What the master does for a request; done() is called with the answer, now or later."""

    def ask(self, slot: Slot, line: str, done: Callable[[str | None], None]) -> None:
        """Let the worker of the slot answer; None: it cannot."""

    def stop_session(self, slot: Slot, session_id: str, done: Callable[[str | None], None]) -> None:
        """Stop a session in whichever worker of the slot has it."""

    def reload(self) -> None:
        """Load the policy again."""

    def await_reload(self, done: Callable[[bool, str], None]) -> None:
        """Call done(success, reason) when no reload is under way."""

    def switch_deadlock_check(self, on: bool | None) -> bool:
        """Switch (None: leave) the deadlock check; return whether it is on."""


class ControlError(Exception):
    """A control socket cannot be made; the instance must not start."""


def _changes_something(words: list[str]) -> bool:
    command, *rest = words
    if command == "RELOAD":
        return rest[:1] != ["RESULT"]
    if command in ("STOPSESSION", "COREDUMP", "STACKDUMP"):
        return True
    if command == "LOGGING":
        return rest[:1] in (["VINC"], ["VDEC"], ["VSET"], ["SETSPEC"])
    return command == "DEADLOCKCHECK" and rest[:1] in (["ENABLE"], ["DISABLE"])


class Connection:
    """One client of the control socket."""

    def __init__(self, server: ControlServer, slot: Slot, sock: socket.socket, number: int) -> None:
        self._server = server
        self._slot = slot
        self._sock = sock
        self._session = f"szig/conn:{number}/stream"
        self._input = bytearray()
        self._output = bytearray()
        self._patience: Timer | None = None
        self.busy = False                # a request is under way
        self._taking = False             # _next_request() is looking at lines
        self._at_end = False             # the client sends nothing more
        self._pid, self._uid, self._gid = struct.unpack(
            "3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))

    def fileno(self) -> int:
        return self._sock.fileno()

    # ---- called by the loop

    def ready(self, events: int) -> None:
        """The socket can be read or written."""
        try:
            if events & selectors.EVENT_WRITE:
                self._write()
            if events & selectors.EVENT_READ and self._sock.fileno() >= 0:
                self._read()
        except Exception:                # a defect of ours ends this connection, not the instance
            log_exception(self._session)
            self.close()

    def _read(self) -> None:
        try:
            data = self._sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        self._at_end = not data
        self._input += data
        self._next_request()

    def _next_request(self) -> None:
        """Take lines as long as they are answered at once and somebody reads the answers."""
        self._taking = True
        while not self.busy and self._sock.fileno() >= 0 and len(self._output) <= OUTPUT_BYTES:
            line, newline, rest = self._input.partition(b"\n")
            if len(line) > LINE_BYTES or (not newline and self._at_end and not self._output):
                self.close()
            if not newline or self._sock.fileno() < 0:
                break
            self._input = rest
            self.busy = True
            self._handle(line.decode("utf-8", "surrogateescape").removesuffix("\r"))
        self._taking = False
        self._watch()

    def _watch(self) -> None:
        """Read only when there is room for requests: what waits in the kernel costs us nothing."""
        if self._sock.fileno() < 0:
            return
        wants_input = not self._at_end and len(self._input) <= LINE_BYTES
        events = (selectors.EVENT_READ if wants_input else 0) | (selectors.EVENT_WRITE if self._output else 0)
        self._server.watch(self, events)

    # ---- requests

    def _handle(self, line: str) -> None:
        words = line.split(" ")
        if words[0] in COMMANDS and _changes_something(words) and not self._may_change(words[0]):
            return
        if words[0] in _FOR_WORKER:
            self._be_patient()
            self._server.actions.ask(self._slot, line, self._answer)
            return
        handler = getattr(self, f"_do_{words[0]}", None) if words[0] in COMMANDS else None
        if handler is None:
            self._answer("FAIL No such command")
        else:
            handler(words[1:])

    def _may_change(self, command: str) -> bool:
        if self._uid in (0, os.getuid()) or os.getgid() in (self._gid, *self._groups()):
            log(self._session, "core.info", 2, "Control command; command='%s', uid='%d', pid='%d'",
                (command, self._uid, self._pid))
            return True
        log(self._session, "core.error", 1, "Control command refused; command='%s', uid='%d', pid='%d'",
            (command, self._uid, self._pid))
        self._answer("FAIL Permission denied")
        return False

    def _groups(self) -> tuple[int, ...]:
        with contextlib.suppress(OSError):
            data = self._sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4096)
            return struct.unpack(f"{len(data) // 4}i", data)
        return ()

    def _do_VERSION(self, words: list[str]) -> None:
        self._answer(f"OK {Zorp.__version__}")

    def _do_HELP(self, words: list[str]) -> None:
        self._answer(f"OK {' '.join(COMMANDS)}")

    def _do_COREDUMP(self, words: list[str]) -> None:
        log(self._session, "core.error", 3, "Creating core dumps using zorpctl is deprecated, please use gdb's "
            "gcore command to create on-the-fly coredumps;")
        self._answer("FAIL Dumping core failed")

    def _do_DEADLOCKCHECK(self, words: list[str]) -> None:
        actions = self._server.actions
        match words[:1]:
            case []:
                self._answer("FAIL DEADLOCKCHECK subcommand required")
            case ["GET"]:
                self._answer(f"OK {int(actions.switch_deadlock_check(None))}")
            case ["ENABLE"] | ["DISABLE"]:
                actions.switch_deadlock_check(words[0] == "ENABLE")
                self._answer("OK")
            case _:
                self._answer("FAIL")

    def _do_RELOAD(self, words: list[str]) -> None:
        actions = self._server.actions
        match words[:1]:
            case []:
                actions.reload()
                self._answer("OK Reload initiated")
            case ["RESULT"]:
                actions.await_reload(lambda success, reason: self._answer(
                    "OK Reload successful" if success else "FAIL Reload failed"))
            case ["WAIT"]:
                actions.reload()
                actions.await_reload(lambda success, reason: self._answer(
                    "OK Reload successful" if success else f"FAIL Reload failed; reason='{reason}'"))
            case _:
                self._answer("FAIL Unknown RELOAD subcommand")

    def _do_STOPSESSION(self, words: list[str]) -> None:
        self._be_patient()
        self._server.actions.stop_session(self._slot, words[0] if words else "", self._answer)

    # ---- answers

    def _answer(self, text: str | None) -> None:
        """Answer the request under way; None: there is no answer to be had."""
        if self._sock.fileno() < 0:
            return
        if text is None:
            self.close()
            return
        self._be_patient(False)
        self.busy = False
        self._output += text.encode("utf-8", "surrogateescape") + b"\n"
        self._write()

    def _write(self) -> None:
        try:
            sent = self._sock.send(self._output) if self._output else 0
        except BlockingIOError:
            sent = 0
        except OSError:
            self.close()
            return
        del self._output[:sent]
        if sent or not self._output:
            self._be_patient(bool(self._output))
        if not self._taking:
            self._next_request()

    def _be_patient(self, waiting: bool = True) -> None:
        """Close the connection when what it waits for now does not come in time."""
        if self._patience is not None:
            self._patience.cancel()
        self._patience = self._server.timers.after(PATIENCE_S, self.close) if waiting else None

    def close(self) -> None:
        """End the connection.  Idempotent."""
        if self._sock.fileno() >= 0:
            self._be_patient(False)
            self._server.forget(self)
            self._sock.close()


class ControlServer:
    """The control sockets of the instance."""

    def __init__(self, directory: Directory, selector: selectors.BaseSelector, timers: Timers,
                 actions: Actions) -> None:
        self._directory = directory
        self._selector = selector
        self.timers = timers
        self.actions = actions
        self._listeners: dict[str, socket.socket] = {}
        self._connections: dict[Connection, None] = {}       # in the order of their last request
        self._accepted = 0

    def listen(self, slot: Slot) -> None:
        """Open the control socket of one virtual process.  Raises ControlError."""
        name = f"zorpctl.{slot.name}"
        path = os.path.join(self._directory.path, name)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        here = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        mask = os.umask(_SOCKET_MODE_MASK)
        try:
            os.fchdir(self._directory.descriptor)    # the way into a new root, and past the length of a path
            _remove_socket(name)
            sock.bind(name)
            sock.listen(255)
        except OSError as problem:
            sock.close()
            raise ControlError(f"Failed to create SZIG socket; name='{path}', "
                               f"error='{problem.strerror or problem}'") from None
        finally:
            os.umask(mask)
            os.fchdir(here)
            os.close(here)
        self._listeners[name] = sock
        log("szig/listen", "core.debug", 7, "Start to listen; fd='%d', address='%s'",
            (sock.fileno(), f"AF_UNIX({path})"))
        self._selector.register(sock, selectors.EVENT_READ, lambda events: self._accept(slot, sock))

    def _accept(self, slot: Slot, listener: socket.socket) -> None:
        try:
            sock, _address = listener.accept()
        except OSError:
            return
        sock.setblocking(False)
        if len(self._connections) >= CONNECTIONS:
            idle = next((known for known in self._connections if not known.busy), None)
            if idle is None:
                sock.close()
                return
            idle.close()
        connection = Connection(self, slot, sock, self._accepted)
        self._accepted += 1
        self._connections[connection] = None
        self._selector.register(connection, selectors.EVENT_READ, connection.ready)

    # ---- for connections

    def watch(self, connection: Connection, events: int) -> None:
        """Change what a connection waits for."""
        known = self._connections.pop(connection, False)
        if known is False:
            return
        self._connections[connection] = None             # the most recently used is the last
        registered = connection.fileno() in self._selector.get_map()
        if events and registered:
            self._selector.modify(connection, events, connection.ready)
        elif events:
            self._selector.register(connection, events, connection.ready)
        elif registered:
            self._selector.unregister(connection)

    def forget(self, connection: Connection) -> None:
        """The connection is being closed."""
        self._connections.pop(connection, None)
        with contextlib.suppress(KeyError):
            self._selector.unregister(connection)

    def close(self, remove: bool) -> None:
        """Close everything; remove the socket files at the end of the instance, not in a child."""
        for connection in list(self._connections):
            connection.close()
        for name, sock in self._listeners.items():
            sock.close()
            if remove:
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=self._directory.descriptor)
        self._listeners.clear()


def _remove_socket(name: str) -> None:
    """Remove a socket of this name in the current directory; anything else stays and is an error."""
    try:
        mode = os.lstat(name).st_mode
    except FileNotFoundError:
        return
    if not _is_socket(mode):
        raise FileExistsError(17, "a file that is no socket is in the way")
    os.unlink(name)


def _is_socket(mode: int) -> bool:
    return mode & 0o170000 == 0o140000
