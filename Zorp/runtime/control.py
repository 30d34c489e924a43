"""The control socket: one per virtual process, served by the master's loop (szig 2, 3, 5).

Theory of operation
    Clients, their bounds and their turns are those of Zorp.process.line_server.  Requests that
    one worker must answer go to it as a question; orders that concern the instance (reload,
    deadlock check) are carried out here.  Every answer ends in a newline.

    An order that changes something needs the right peer: user 0, our user, or a member of our
    group, as the kernel tells; each is logged with its author.

Bounds: a line of 131328 bytes; ten seconds without progress for answers that nobody reads, and
for an answer that a worker does not give; CONNECTIONS at a time.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import time
from collections.abc import Callable
from typing import Protocol

import Zorp
from Zorp.Log import log
from Zorp.process.line_server import LineClient, LineServer, Patience, listening_socket
from Zorp.process.timers import Timers
from Zorp.runtime.pidfile import Directory
from Zorp.runtime.reloading import Outcome
from Zorp.runtime.slots import Slot

LINE_BYTES = 131_328
PATIENCE_S = 10.0
CONNECTIONS = 512
_BACKLOG = 255

COMMANDS = ("GETVALUE", "GETCHILD", "GETSBLNG", "DUMP", "JSON", "LOGGING", "DEADLOCKCHECK", "RELOAD",
            "STOPSESSION", "COREDUMP", "STACKDUMP", "VERSION", "HELP")
_FOR_WORKER = frozenset({"GETVALUE", "GETCHILD", "GETSBLNG", "DUMP", "JSON", "LOGGING", "STACKDUMP"})


class Actions(Protocol):
    """What the master does for a request; done() is called with the answer, now or later."""

    def ask(self, slot: Slot, line: str, done: Callable[[str | None], None]) -> None:
        """Let the worker of the slot answer; None: it cannot."""

    def stop_session(self, slot: Slot, session_id: str, done: Callable[[str | None], None]) -> None:
        """Stop a session in whichever worker of the slot has it."""

    def reload(self, revoke: bool = False) -> None:
        """Load the policy again; revoke: end sessions of older policies that it refuses."""

    def await_reload(self, done: Callable[[Outcome], None]) -> None:
        """Call done() when no reload is under way."""

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


def _with_revocation(outcome: Outcome) -> str:
    if not outcome.success:
        return f"FAIL Reload failed; reason='{outcome.reason}'"
    if outcome.reason:
        return (f"FAIL Reload successful, not all sessions could be judged; revoked='{outcome.revoked}', "
                f"reason='{outcome.reason}'")
    return f"OK Reload successful; revoked='{outcome.revoked}'"


class Connection(LineClient):
    """One client of the control socket."""

    def __init__(self, server: LineServer, sock: socket.socket, slot: Slot, actions: Actions, number: int) -> None:
        super().__init__(server, sock, LINE_BYTES, Patience(request=None, reader=PATIENCE_S))
        self.session_id = f"szig/conn:{number}/stream"
        self._slot = slot
        self._actions = actions

    # ---- requests

    def take(self, line: bytes) -> None:
        text = line.decode("utf-8", "surrogateescape").removesuffix("\r")
        words = text.split(" ")
        if words[0] in COMMANDS and _changes_something(words) and not self._may_change(words[0]):
            return
        if words[0] in _FOR_WORKER:
            self.answer_within(PATIENCE_S)
            self._actions.ask(self._slot, text, self._answer)
            return
        handler = getattr(self, f"_do_{words[0]}", None) if words[0] in COMMANDS else None
        if handler is None:
            self._answer("FAIL No such command")
        else:
            handler(words[1:])

    def _may_change(self, command: str) -> bool:
        peer = self.peer
        if peer.uid in (0, os.getuid()) or os.getgid() in peer.gids:
            log(self.session_id, "core.info", 2, "Control command; command='%s', uid='%d', pid='%d'",
                (command, peer.uid, peer.pid))
            return True
        log(self.session_id, "core.error", 1, "Control command refused; command='%s', uid='%d', pid='%d'",
            (command, peer.uid, peer.pid))
        self._answer("FAIL Permission denied")
        return False

    def _do_VERSION(self, words: list[str]) -> None:
        self._answer(f"OK {Zorp.__version__}")

    def _do_HELP(self, words: list[str]) -> None:
        self._answer(f"OK {' '.join(COMMANDS)}")

    def _do_COREDUMP(self, words: list[str]) -> None:
        log(self.session_id, "core.error", 3, "Creating core dumps using zorpctl is deprecated, please use gdb's "
            "gcore command to create on-the-fly coredumps;")
        self._answer("FAIL Dumping core failed")

    def _do_DEADLOCKCHECK(self, words: list[str]) -> None:
        actions = self._actions
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
        actions = self._actions
        match words[:1]:
            case []:
                actions.reload()
                self._answer("OK Reload initiated")
            case ["RESULT"]:
                actions.await_reload(lambda outcome: self._answer(
                    "OK Reload successful" if outcome.success else "FAIL Reload failed"))
            case ["WAIT"]:
                actions.reload()
                actions.await_reload(lambda outcome: self._answer(
                    "OK Reload successful" if outcome.success else f"FAIL Reload failed; reason='{outcome.reason}'"))
            case ["REVOKE"]:
                actions.reload(revoke=True)
                actions.await_reload(lambda outcome: self._answer(_with_revocation(outcome)))
            case _:
                self._answer("FAIL Unknown RELOAD subcommand")

    def _do_STOPSESSION(self, words: list[str]) -> None:
        self.answer_within(PATIENCE_S)
        self._actions.stop_session(self._slot, words[0] if words else "", self._answer)

    # ---- answers

    def _answer(self, text: str | None) -> None:
        """Answer the request under way; None: there is no answer to be had."""
        if text is None:
            self.close()
        else:
            self.answer(text.encode("utf-8", "surrogateescape") + b"\n")

    def close(self) -> None:
        if not self.is_closed:
            log(self.session_id, "core.accounting", 6,
                "accounting info; type='ZStreamFD', duration='%d', sent='%d', received='%d'",
                (time.monotonic() - self.connected_s, self.sent, self.received))
        super().close()


class ControlServer:
    """The control sockets of the instance."""

    def __init__(self, directory: Directory, selector: selectors.BaseSelector, timers: Timers,
                 actions: Actions) -> None:
        self._directory = directory
        self._actions = actions
        self._server = LineServer(selector, timers, CONNECTIONS)
        self._names: list[str] = []
        self._accepted = 0

    def listen(self, slot: Slot) -> None:
        """Open the control socket of one virtual process.  Raises ControlError."""
        name = f"zorpctl.{slot.name}"
        path = os.path.join(self._directory.path, name)
        try:
            sock = listening_socket(self._directory.descriptor, name, _BACKLOG)
        except OSError as problem:
            raise ControlError(f"Failed to create SZIG socket; name='{path}', "
                               f"error='{problem.strerror or problem}'") from None
        self._names.append(name)
        log("szig/listen", "core.debug", 7, "Start to listen; fd='%d', address='%s'",
            (sock.fileno(), f"AF_UNIX({path})"))
        self._server.serve(sock, lambda accepted: self._connection(accepted, slot))

    def _connection(self, sock: socket.socket, slot: Slot) -> Connection:
        number, self._accepted = self._accepted, self._accepted + 1
        return Connection(self._server, sock, slot, self._actions, number)

    def let_go(self) -> None:
        """In a child of the master: close what is open, and nothing else."""
        self._server.let_go()

    def close(self) -> None:
        """Close everything and remove the sockets: the end of the instance."""
        self._server.close()
        for name in self._names:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=self._directory.descriptor)
