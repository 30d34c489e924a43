"""Watching a stacked program: its control channel, its complaints, its exit.

Theory of operation
    One thread per program runs watch(): it answers requests on the control channel, writes what
    comes on standard error to the log, notes the exit, and ends with the program's whole process
    group when the parent has closed the stack (close) and everything is reaped.

    The thread that moves the content calls settle() before it passes the first byte of output and
    conclude() after the last.  Both read the control channel themselves: what the program wrote
    there before it wrote its output is in our socket by then, whoever reads it first.

    Exit status other than 0, a signal, no exit at all within stack_program_exit_wait after the end
    of output, or bytes on the control channel that are no request: an error, unless the program
    gave a verdict (config.options.stack_program_ignore_exit brings the old leniency back, for the
    exit only).

Bounds against a program that means harm: REQUESTS requests, ERROR_LINES lines of complaints; what
exceeds them closes the channel, or is counted and reported.  An answer that the program does not
read closes the channel too.

Threads
    _control_lock guards the control channel and its reader.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable

from Zorp.Config import config
from Zorp.Constants import CORE_DEBUG, CORE_ERROR, Z_ACCEPT, Z_DROP, Z_ERROR, Z_REJECT, ZV_UNSPEC
from Zorp.Log import log
from Zorp.process.program import DYING_MS, Program
from Zorp.stacking.content_verdict import ContentVerdict
from Zorp.wire.stack_control import ControlError, ControlReader, answer

REQUESTS = 1000
ERROR_LINES = 100
TERM_GRACE_S = 1.0
_RECV_BYTES = 65536
_READS_AT_ONCE = 16              # whoever floods us must not keep the thread from its other work
_ERROR_LINE_BYTES = 1024
_ZAS_ERROR = "zas.error"
_VERDICTS = {"Z_ACCEPT": Z_ACCEPT, "Z_REJECT": Z_REJECT, "Z_DROP": Z_DROP, "Z_ERROR": Z_ERROR}


class ControlChannel:
    """Requests of a program, and of backends that offer the same channel; see the module's text."""

    def __init__(self, session_id: str, sock: socket.socket, verdict: ContentVerdict, hears_verdicts: bool) -> None:
        self.sock = sock
        self._session_id = session_id
        self._verdict = verdict
        self._hears_verdicts = hears_verdicts
        self._reader = ControlReader()
        self._requests = 0
        self._answers = True                 # the program reads what we answer
        self._control_lock = threading.Lock()
        self.ended = False

    def pump(self) -> None:
        """Read and answer what is there, without waiting.  Any thread."""
        with self._control_lock:
            for _ in range(_READS_AT_ONCE):
                if self.ended:
                    return
                try:
                    data = self.sock.recv(_RECV_BYTES, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    return
                except OSError:
                    data = b""
                if not data:
                    self._debug("Error reading control channel request;")
                    self._end()
                    return
                self._take(data)

    def close(self) -> None:
        """Close the channel; a second call does nothing."""
        with self._control_lock:
            self._end()

    def _end(self) -> None:
        self.ended = True
        self.sock.close()

    def _take(self, data: bytes) -> None:
        self._reader.feed(data)
        try:
            while not self.ended and (request := self._reader.next_request()) is not None:
                self._serve(request)
        except ControlError as problem:
            log(self._session_id, _ZAS_ERROR, 3, problem.text, problem.fields)
            self._verdict.fail("Invalid request on the control channel")
            self._end()

    def _serve(self, request) -> None:
        self._requests += 1
        if self._requests > REQUESTS:
            log(self._session_id, _ZAS_ERROR, 3, "Too many requests; max='%d'", (REQUESTS,))
            self._verdict.fail("Too many requests on the control channel")
            self._end()
            return
        self._debug("Read request from stack-control channel; request='%s'", (request.command,))
        problem = self._perform(request)
        if problem:
            self._debug("Error processing control channel request; request='%s', reason='%s'",
                        (request.command, problem))
        if self._answers:
            self._answer(answer(problem))

    def _answer(self, reply: bytes) -> None:
        self._debug("Responding on stack-control channel; response='RESULT'")
        try:
            if self.sock.send(reply, socket.MSG_DONTWAIT) == len(reply):
                return
        except OSError:
            pass                             # it has gone, or does not read; its request is done all the same
        log(self._session_id, CORE_ERROR, 1, "Internal error writing response to stack-control channel;")
        self._answers = False                # half an answer must not be followed by another one
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def _perform(self, request) -> str:
        """Do what a request wants; return why not, "" for done."""
        if request.session != "0":
            return "Non-zero session-id"
        if request.command != "SETVERDICT":
            return "Unknown request received"
        if "Verdict" not in request.headers:
            return "No Verdict header in SETVERDICT request"
        if not self._hears_verdicts:
            return "Proxy does not support Stack interface"
        self._verdict.give(_VERDICTS.get(request.headers["Verdict"], ZV_UNSPEC),
                           request.headers.get("Description", ""))
        return ""

    def _debug(self, text, fields=None) -> None:
        log(self._session_id, CORE_DEBUG, 6, text, fields)


class ProgramWatch:
    """One stacked program; see the module's text."""

    def __init__(self, session_id: str, command: str, start: Callable[[], Program], channel: ControlChannel,
                 verdict: ContentVerdict) -> None:
        """Start the program, when all that watching it takes is there; raises OSError."""
        self._session_id, self._command = session_id, command
        self._channel, self._verdict = channel, verdict
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._program = start()
        except BaseException:
            os.close(self._wake)
            raise
        self._wake_lock = threading.Lock()       # guards _wake against a close by the watching thread
        self._error_lines = 0
        self._errors_pending = b""

    # called by the thread that moves the content

    def settle(self) -> None:
        """Take in what the program has said so far."""
        self._channel.pump()

    def has_died(self) -> bool:
        """Tell whether the program has ended badly, also when it is ending right now."""
        return self._program.has_ended(DYING_MS) and bool(self._program.status())

    def conclude(self) -> None:
        """The output has ended: let the program exit, and make its verdict final."""
        deadline_s = time.monotonic() + config.options.stack_program_exit_wait / 1000
        ended = self._program.has_ended(_ms_until(deadline_s))
        self._await_control(deadline_s)
        if config.options.stack_program_ignore_exit:
            return
        status = self._program.status()
        if not ended:
            self._verdict.fail("Program does not end")
        elif status:
            self._verdict.fail(_how(status))

    def _await_control(self, deadline_s: float) -> None:
        """Read the control channel to its end, but not longer than to the deadline."""
        self._channel.pump()
        while not self._channel.ended and not self._verdict.is_explicit and (left_ms := _ms_until(deadline_s)) > 0:
            poll = select.poll()
            try:
                poll.register(self._channel.sock, select.POLLIN)
            except ValueError:
                return                           # the watching thread has read the end
            poll.poll(left_ms)
            self._channel.pump()

    def close(self) -> None:
        """Have the program ended.  Any thread, idempotent; returns at once."""
        with self._wake_lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    # the watching thread

    def watch(self) -> None:
        """Watch until close(); then end and reap the program."""
        try:
            self._loop()
        finally:
            status = self._program.end(TERM_GRACE_S)
            self._channel.close()
            self._read_errors()
            os.close(self._program.errors)
            with self._wake_lock:
                os.close(self._wake)
                self._wake = -1
            self._report(status)

    def _loop(self) -> None:
        poll = select.poll()
        control, errors = self._channel.sock.fileno(), self._program.errors
        for fd in (control, errors, self._wake):
            if fd >= 0:
                poll.register(fd, select.POLLIN)
        os.set_blocking(errors, False)
        while True:
            ready = dict(poll.poll())
            if self._wake in ready:
                return
            if errors in ready and not self._read_errors():
                poll.unregister(errors)
            if control in ready:
                self._channel.pump()
                if self._channel.ended:
                    poll.unregister(control)

    def _read_errors(self) -> bool:
        """Log what the program complained about; False at the end."""
        for _ in range(_READS_AT_ONCE):
            try:
                data = os.read(self._program.errors, _RECV_BYTES)
            except BlockingIOError:
                return True
            except OSError:
                return False
            *lines, self._errors_pending = (self._errors_pending + data).split(b"\n")
            if not data or len(self._errors_pending) > _ERROR_LINE_BYTES:
                lines.append(self._errors_pending)
                self._errors_pending = b""
            for line in filter(None, lines):
                self._error_lines += 1
                if self._error_lines <= ERROR_LINES:
                    log(self._session_id, CORE_ERROR, 3, "Stacked program complains; line='%s'",
                        (line[:_ERROR_LINE_BYTES],))
            if not data:
                return False
        return True

    def _report(self, status: int | None) -> None:
        if self._error_lines > ERROR_LINES:
            log(self._session_id, CORE_ERROR, 3, "Complaints of stacked program not logged; lines='%d'",
                (self._error_lines - ERROR_LINES,))
        if status:
            log(self._session_id, CORE_ERROR, 3, "Stacked program failed; program='%s', reason='%s'",
                (self._command, _how(status)))
        else:
            log(self._session_id, CORE_DEBUG, 6, "Stacked program ended; program='%s', status='%s'",
                (self._command, "killed" if status is None else status))


def _how(status: int) -> str:
    return f"exit status {status}" if status > 0 else f"killed by signal {-status}"


def _ms_until(deadline_s: float) -> int:
    return max(int((deadline_s - time.monotonic()) * 1000), 0)
