"""kzorpd's control socket: RELOAD as ever, and requests as JSON (Zorp.wire.kzorpd).

Theory of operation
    Clients, their bounds and their turns are those of Zorp.process.line_server; each request is
    answered when it is carried out, which for a reload is later.  The kernel tells who the peer
    is.  Nobody but user 0, our own user and the user that instances run as may do anything,
    whatever the permissions of the socket file say.

Who may do what
    A worker that a peer has taken over has the user of the instances, and can end any of their
    processes.  It must not be able to let anything pass by talking to us, so what takes rules away
    is weighed like what brings them:

        request    user 0         the user of the instances
        hello      answered       answered
        reload     done           done: it reads the files of the administrator
        instance   put in force   put in force if the policy file says the same
        remove     rules go       rules go if the policy file has none (kzorp_enabled = FALSE)
        stopped    on_stop:       keep: they stay until its policy file is read again; flush: they
                   keep, flush    stay, but everything that they took is dropped until the instance
                                  starts, or user 0 says stopped
        dump, zones, flush        refused

    Our own user may ask for everything, too; where it is not user 0, it is believed no more than the
    user of the instances.  What is left to a worker that was taken over is to stop traffic, as by
    ending its processes: our files, locks and the directory of the socket are not its user's
    (Zorp.netfilter.own_files), so it keeps nobody from changing rules.

Bounds: CONNECTIONS at a time; lines of SHORT_LINE_BYTES for everything but descriptions and
zones of permitted peers; PATIENCE_S for a peer that neither sends nor reads.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
from collections.abc import Callable
from typing import Protocol

from Zorp.Log import log
from Zorp.netfilter.own_files import prepare_directory
from Zorp.process.line_server import LineClient, LineServer, Patience, listening_socket
from Zorp.process.timers import Timers
from Zorp.wire.kzorpd import (
    MAX_LINE_BYTES,
    SHORT_LINE_BYTES,
    SOCKET_NAME,
    KzorpdProtocolError,
    answer_line,
    read_request,
)

CONNECTIONS = 64
PATIENCE_S = 30.0
_BACKLOG = 512
_FOR_INSTANCES = frozenset({"hello", "instance", "remove", "stopped", "reload"})
_CONFIRMED = frozenset({"instance", "remove"})           # these may have to be compared with policy files

Answer = Callable[[str | None, dict], None]              # (error or None, fields)


class Refused(Exception):
    """A request cannot be carried out; `str()` is the answer."""


class Actions(Protocol):
    """What carries requests out.  Raises Refused; what takes its time calls `answer` when it has ended."""

    def perform(self, request: dict, *, is_trusted: bool) -> dict:
        """Carry out a request that takes no time; return the fields of the answer."""

    def confirm(self, request: dict, answer: Answer, *, is_trusted: bool) -> None:
        """Carry out `instance` or `remove`; not is_trusted: if the instance's policy file says so, too."""

    def reload(self, answer: Answer) -> None:
        """Read the policies' zones again."""


class ControlError(Exception):
    """The control socket cannot be made; kzorpd must not start."""


class _Connection(LineClient):
    """One peer."""

    def __init__(self, control: ControlServer, server: LineServer, sock: socket.socket) -> None:
        super().__init__(server, sock, SHORT_LINE_BYTES, Patience(request=PATIENCE_S, reader=PATIENCE_S))
        self._control = control
        if self.peer.uid in control.masters or self.peer.uid in control.instances:
            self.line_bytes = MAX_LINE_BYTES

    def take(self, line: bytes) -> None:
        as_json = True

        def answer(error: str | None, fields: dict) -> None:
            if not as_json:
                self.last_answer()                       # the original closed after its one word
            self.answer(answer_line(error, fields, as_json=as_json))

        try:
            request, as_json = read_request(line)
            self._authorise(request["request"])
            if request["request"] == "reload":
                self._control.actions.reload(answer)
                return
            is_trusted = self.peer.uid == 0
            if request["request"] in _CONFIRMED:
                self._control.actions.confirm(request, answer, is_trusted=is_trusted)
                return
            fields = self._control.actions.perform(request, is_trusted=is_trusted)
        except (Refused, KzorpdProtocolError) as problem:
            answer(str(problem), {})
            return
        answer(None, fields)

    def _authorise(self, request: str) -> None:
        control, uid = self._control, self.peer.uid
        if uid in control.masters or (request in _FOR_INSTANCES and uid in control.instances):
            return
        log(None, "core.error", 1, "Control command refused; command='%s', uid='%d'", (request, uid))
        raise Refused("permission denied")

    def fail(self, step: str, problem: str) -> None:
        what = {"read": "read request", "write": "write response"}[step]
        log(None, "core.error", 1, "Could not %s; error='%s'", (what, problem))


class ControlServer:
    """The socket and its connections; the loop's."""

    def __init__(self, directory: str, selector: selectors.BaseSelector, timers: Timers, actions: Actions,
                 instances_uid: int | None) -> None:
        """Raises ControlError."""
        self.masters = frozenset({0, os.getuid()})
        self.instances = frozenset() if instances_uid is None else frozenset({instances_uid})
        self.actions = actions
        self._path = os.path.join(directory, SOCKET_NAME)
        self._server = LineServer(selector, timers, CONNECTIONS)
        self._server.serve(self._listen(directory), lambda sock: _Connection(self, self._server, sock))

    def _listen(self, directory: str) -> socket.socket:
        try:
            prepare_directory(directory)
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                return listening_socket(descriptor, SOCKET_NAME, _BACKLOG)
            finally:
                os.close(descriptor)
        except OSError as problem:
            raise ControlError(f"Cannot make the control socket; socket='{self._path}', "
                               f"error='{problem.strerror or problem}'") from None

    def give_to_group(self, group: int) -> None:
        """Let the group of the instances reach the socket."""
        with contextlib.suppress(OSError):
            os.chown(self._path, -1, group)

    def close(self) -> None:
        """Close everything and remove the socket."""
        self._server.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)
