"""A message on its way through a stacked proxy or program.

Theory of operation
    The client is told 354 in the server's name; the server hears NOOP meanwhile, first to prove
    that it lives, then every interval_transfer_noop milliseconds while the child is silent.  The
    unstuffed body goes into the child's client side, what comes out of its server side is the new
    body.  One poll() watches client and child, so neither can stop the other:

        first byte of output    DATA to the server, if the child has not refused by then
        end of output           the verdict decides (Zorp.stacking.content_verdict): end of data, or none
        no output at all        RSET to the server; 550, 250 or 421 to the client, by the verdict

    A verdict that refuses after output was passed on costs the server's connection: it has no end
    of data and forgets the message.

    The body is read to its end whatever happens; when that end was not seen, nothing that follows
    can be a command and the session ends.

The child's output is data of our own host and not of the client: a LF without CR becomes CR LF
before dots are doubled; a CR without LF is an error of the child.
"""

from __future__ import annotations

import re
import select
import socket
import time

from Zorp.Constants import ZV_ACCEPT, ZV_DROP, ZV_ERROR, ZV_REJECT
from Zorp.smtp_engine.decisions import Decisions
from Zorp.smtp_engine.received import header_for
from Zorp.smtp_engine.session import CLOSING, FAILED, Refusal, SmtpSession
from Zorp.smtp_engine.sides import SideLost
from Zorp.smtp_engine.transfer import END_LINE_BYTES, BodyLost, MessageTransfer, ServerFailed
from Zorp.stacking.stacking import Stacked, StackingFailed, stack_object
from Zorp.transport.stream import ms_until
from Zorp.wire.errors import WireError
from Zorp.wire.smtp_body import BodyError, BodyReader, DotAdder, DotRemover
from Zorp.wire.smtp_commands import Command, command_line

_GO_ON = b"354 Go on, send your message\r\n"
_READ_BYTES = 65536
_LONE_LF = re.compile(rb"(?<!\r)\n")
_UNPRINTABLE = re.compile("[^ -~]")
_VERDICT_LOGS = {
    ZV_REJECT: "Invalid contents; stack_info='%s'",
    ZV_DROP: "Message dropped, invalid contents; stack_info='%s'",
    ZV_ERROR: "Error occurred while scanning contents; stack_info='%s'",
}


class Inspection:
    """The inspected messages of one session; for one thread."""

    def __init__(self, session: SmtpSession, decisions: Decisions, transfer: MessageTransfer) -> None:
        self._session, self._decisions, self._transfer = session, decisions, transfer

    def run(self, request: Command, form) -> None:
        """Take one message from the client through what `form` describes; raises Refusal or SessionOver."""
        session = self._session
        try:
            stacked = stack_object(session.proxy, form, hears_verdicts=True)
        except StackingFailed:
            stacked = None
        if stacked is None or stacked.client is None or stacked.server is None:
            session.log("core.error", 3, "Could not start stacked proxy, rejecting transfer;")
            self._transfer.leave_server()
            raise Refusal("421", CLOSING)
        try:
            stacked.one_way()
            self._begin()
            _Message(session, self._decisions, self._transfer, stacked, request).run()
        finally:
            stacked.close()

    def _begin(self) -> None:
        """Make sure that the server lives, and ask the client for its message."""
        try:
            alive = keep_awake(self._session, self._decisions)
        except (SideLost, WireError):
            self._transfer.leave_server()
            alive = False
        if not alive:
            raise Refusal("450", "Mailbox unavailable, try again")
        self._session.client.send(_GO_ON)


def keep_awake(session: SmtpSession, decisions: Decisions) -> bool:
    """Send NOOP to the server; False when it does not answer 2xx.  Raises SideLost, WireError."""
    if session.server.speaks():
        raise SideLost
    session.server.send(b"NOOP\r\n")
    reply = session.read_reply()
    try:
        decisions.reply("NOOP", b"", reply)
    except Refusal:
        session.log("smtp.policy", 3, "Invalid policy ignored, allowing 250 response to NOOP is required;")
    return reply.code // 100 == 2


class _Message:
    """One message."""

    def __init__(self, session: SmtpSession, decisions: Decisions, transfer: MessageTransfer, stacked: Stacked,
                 request: Command) -> None:
        variables = session.vars
        self._session, self._decisions, self._transfer = session, decisions, transfer
        self._stacked, self._verdict, self._request = stacked, stacked.verdict, request
        self._log = session.log
        self._body = BodyReader(
            require_crlf=bool(variables.require_crlf), permit_nul=bool(variables.permit_nul_in_body),
            line_limit_bytes=variables.max_body_line_length)
        self._unstuffed, self._stuffed = DotRemover(), DotAdder()
        self._to_child = memoryview(header_for(session.proxy) if variables.add_received_header else b"")
        self._child_reads = True         # its client side takes more
        self._child_writes = True        # its server side has not ended
        self._child_held = b""           # a CR at the end of its output so far
        self._passed = False             # the server has got DATA
        self._too_large = False
        self._idle_s = session.limits.idle_ms / 1000

    def run(self) -> None:
        """Move the message, then conclude; raises Refusal or SessionOver."""
        try:
            self._move()
            self._conclude()
        except ServerFailed as failure:
            self._transfer.server_failed(self._body, failure.reply)
        except BodyError as problem:
            self._transfer.body_refused(problem)
        except BodyLost as lost:
            self._transfer.client_lost(lost.lost)

    # moving

    def _move(self) -> None:
        """Move until the client's body and the child's output have ended."""
        self._transfer.begin_body()
        progress_s = noop_s = time.monotonic()
        while self._child_writes or not self._body.finished:
            interval_s = self._session.vars.interval_transfer_noop / 1000
            noop_due_s = noop_s + interval_s if interval_s > 0 and not self._passed and self._child_writes else None
            ready = self._wait(progress_s + self._idle_s, noop_due_s)
            now_s = time.monotonic()
            if ready:
                progress_s = now_s
                self._serve(ready)
                if self._passed:
                    noop_due_s = None
            elif now_s >= progress_s + self._idle_s:
                self._time_out()
                return
            if noop_due_s is not None and now_s >= noop_due_s:
                self._noop()
                noop_s = now_s

    def _wait(self, idle_due_s: float, noop_due_s: float | None) -> dict[int, int]:
        """Wait for something to do; return {descriptor: events}."""
        stacked, client = self._stacked, self._session.client
        poll = select.poll()
        if len(self._to_child):
            poll.register(stacked.client.fileno(), select.POLLOUT)
        elif not self._body.finished:
            if client.has_more:
                return {client.fileno(): select.POLLIN}
            poll.register(client.fileno(), select.POLLIN)
        else:
            self._stop_feeding()
        if self._child_writes:
            poll.register(stacked.server.fileno(), select.POLLIN)
        due_s = idle_due_s if noop_due_s is None else min(idle_due_s, noop_due_s)
        return dict(poll.poll(ms_until(due_s)))

    def _serve(self, ready: dict[int, int]) -> None:
        if self._child_writes and self._stacked.server.fileno() in ready:
            self._take_output()
        if self._stacked.client.fileno() in ready:
            self._feed_child()
        if self._session.client.fileno() in ready:
            self._take_input()

    def _take_input(self) -> None:
        """Read from the client, and hand the child what belongs to the message."""
        try:
            block = self._transfer.read_block()
        except SideLost as lost:
            raise BodyLost(lost) from lost
        passed = self._body.feed(block)
        message, limit = self._session.transaction, self._session.limits.message_bytes
        message.body_bytes += len(passed) - (END_LINE_BYTES if self._body.finished else 0)
        if limit and message.body_bytes > limit:
            self._too_large = True
            self._stop_feeding()
        if self._body.finished:
            self._session.client.put_back(self._body.rest)
            self._body.rest = b""                    # given back
        if self._child_reads:
            self._to_child = memoryview(self._unstuffed.feed(passed, finished=self._body.finished))
            self._feed_child()

    def _feed_child(self) -> None:
        if not len(self._to_child):
            return
        try:
            sent = self._stacked.client.sock.send(self._to_child, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:                              # it reads no more: what is left of the message is of no use
            self._stop_feeding()
            self._verdict.fail("Stacked proxy does not read the whole message")
            return
        self._to_child = self._to_child[sent:]

    def _stop_feeding(self) -> None:
        """The child gets nothing more."""
        self._to_child = memoryview(b"")
        if self._child_reads:
            self._child_reads = False
            self._stacked.client.shutdown(socket.SHUT_WR)

    def _take_output(self) -> None:
        """Read from the child, and pass on to the server what it may have."""
        try:
            data = self._stacked.server.sock.recv(_READ_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._child_writes = False
        elif self._may_pass():
            self._transfer.send(self._as_body(data))

    def _may_pass(self) -> bool:
        """Tell whether output goes to the server; the first of it has DATA sent."""
        if self._too_large:
            return False
        if not self._passed:
            self._stacked.settle()
            if self._verdict.value != ZV_ACCEPT:
                return False
            self._verdict.output_passed()
            self._send_data()
        return self._verdict.value == ZV_ACCEPT

    def _as_body(self, data: bytes) -> bytes:
        """Return output as it follows DATA; the child fails when that cannot be."""
        data = self._child_held + data
        self._child_held = b"\r" if data.endswith(b"\r") else b""
        data = _LONE_LF.sub(b"\r\n", data[:len(data) - len(self._child_held)])
        try:
            return self._stuffed.feed(data)
        except BodyError:
            self._verdict.fail("Stacked proxy sends a CR without LF")
            return b""

    def _send_data(self) -> None:
        session = self._session
        if session.server.speaks():
            raise ServerFailed(self._transfer.early_reply())
        try:
            session.server.send(command_line(*self._request))
            reply = session.read_reply()
        except (SideLost, WireError) as problem:
            raise ServerFailed from problem
        if reply.code != 354:
            self._log("smtp.response", 4, "Server rejected our message; response='%d', response_param='%s'",
                      (reply.code, reply.texts[0]))
            self._refused_data()
        try:
            self._decisions.reply("DATA", b"", reply)
        except Refusal:
            self._log("smtp.policy", 3, "Invalid policy ignored, allowing 354 response to DATA is required;")
        session.state.replied("DATA", 354)
        self._passed = True

    def _refused_data(self) -> None:
        """The server does not want the message: make it forget it, and the client say all of it."""
        self._swallow()
        self._transfer.account("421", FAILED, success=False)
        self._session.reset_server()
        raise Refusal("421", FAILED)

    def _swallow(self) -> None:
        self._stop_feeding()
        while not self._body.finished:
            self._take_input()

    def _noop(self) -> None:
        try:
            alive = keep_awake(self._session, self._decisions)
        except (SideLost, WireError):
            alive = False
        if not alive:
            self._log("core.error", 3, "Data transfer interrupted by progress;")
            raise ServerFailed

    def _time_out(self) -> None:
        self._log("core.error", 3, "Data transfer timed out; timeout='%d'", (self._session.limits.idle_ms,))
        if not self._body.finished:
            self._transfer.fail("421", FAILED)
        self._verdict.fail("Data transfer timed out")

    # the end

    def _conclude(self) -> None:
        """Both have ended: complete the message, or say why not."""
        if not self._child_writes:
            self._stacked.conclude()
        if self._too_large:
            self._discard()
            self._transfer.report_too_large()
        if self._passed and self._verdict.value == ZV_ACCEPT:
            self._complete()
        if self._verdict.value != ZV_ACCEPT or not self._passed:
            self._refuse()

    def _complete(self) -> None:
        """End the data and take the server's answer to the client."""
        try:
            rest = self._stuffed.feed(self._child_held) + self._stuffed.finish()
        except BodyError:
            self._verdict.fail("Stacked proxy sends a CR without LF")
            return
        self._transfer.check_early_reply()
        self._transfer.send(rest)
        self._transfer.acknowledge("DATA", ".")

    def _refuse(self) -> None:
        """Answer what the child's verdict says; the server keeps nothing."""
        verdict = self._verdict.value
        description = _UNPRINTABLE.split(self._verdict.description, maxsplit=1)[0]
        if verdict in _VERDICT_LOGS:
            self._log("smtp.policy", 3, _VERDICT_LOGS[verdict], (self._verdict.description,))
        else:
            self._log("smtp.error", 3, "Rejecting empty message;")
        info = f" ({description})" if description else ""
        code, text = {ZV_REJECT: ("550", f"Error storing message{info}"),
                      ZV_DROP: ("250", f"Message discarded{info}")}.get(verdict, ("421", CLOSING))
        if self._passed and code == "421":
            code, text = "451", f"Error storing message{info}"
        self._transfer.account(code, text, success=False)
        self._discard()
        self._session.answer(code, text)             # no Refusal: what is in a message is no error of the protocol

    def _discard(self) -> None:
        """Make the server forget the message: by RSET, or by leaving it when it is in the middle of the data."""
        if self._passed:
            self._transfer.leave_server()
            self._session.forget_message()
        else:
            self._session.reset_server()
