"""The message itself: DATA with its end, BDAT with its sizes.

Theory of operation
    DATA: what BodyReader lets pass goes to the server in the blocks in which it came; the end
    of data is part of the last block and leaves only when the whole body was sound, complete and
    small enough, and the server had nothing to say against it meanwhile.  Otherwise the server's
    connection is closed without it, and the server forgets the message.

    BDAT: the announced number of octets belongs to the command, whatever becomes of it; it is
    passed on, or read and dropped, before the next command is looked for.

    Who sends either more slowly than min_data_rate is left, also while it is only read and dropped.

    Afterwards the accounting line is written, always, and the transaction is over.

A message that a stacked child looks at goes another way, Zorp.smtp_engine.inspection.
"""

from __future__ import annotations

import time
from typing import NoReturn

from Zorp import Log
from Zorp.Log import enabled
from Zorp.smtp_engine.decisions import Decisions
from Zorp.smtp_engine.received import header_for
from Zorp.smtp_engine.session import CLOSING, FAILED, Refusal, SessionOver, SmtpSession
from Zorp.smtp_engine.sides import SideLost
from Zorp.wire.errors import WireError
from Zorp.wire.smtp_body import BodyError, BodyReader
from Zorp.wire.smtp_commands import Chunk, CommandError, command_line, parse_bdat
from Zorp.wire.smtp_replies import Reply
from Zorp.wire.smtp_states import OutOfSequence

BODY_ERROR = "Mail body error (probably incorrect CRLF sequence)"
TOO_LARGE = "Message size exceeds fixed limit"
END_LINE_BYTES = 3             # "." CR LF: not part of the message
_PACE_GRACE_SECONDS = 30


def bad_chunk() -> SessionOver:
    """Return the end of a session: nobody knows how many octets follow, nor where the next command begins."""
    return SessionOver("501", "Invalid BDAT command, closing transmission channel")


class ServerFailed(Exception):
    """The server's side broke while the message was on its way to it, or it refused the message early."""

    def __init__(self, reply: Reply | None = None) -> None:
        super().__init__()
        self.reply = reply


class BodyLost(Exception):
    """The client's side broke before the end of the body; carries the SideLost, told from one of the server."""

    def __init__(self, lost: SideLost) -> None:
        super().__init__()
        self.lost = lost


class MessageTransfer:
    """The messages of one session, one after the other; for one thread."""

    def __init__(self, session: SmtpSession, decisions: Decisions) -> None:
        self._session = session
        self._decisions = decisions
        self._vars = session.vars
        self._log = session.log
        self._pace: _Pace | None = None        # of the body that comes in; None: as slow as it likes

    def stack_form(self):
        """Ask the policy what is to look at the message, before DATA or the first BDAT; None: nothing."""
        proxy = self._session.proxy
        return proxy._call_policy(proxy.requestStack)

    def begin_body(self) -> None:
        """The client begins to send a message or a chunk: its pace counts from now."""
        rate = self._vars.min_data_rate
        self._pace = _Pace(rate) if rate else None

    def read_block(self) -> bytes:
        """Return what the client has sent of a body; raises SideLost, also when it is too slow."""
        block = self._session.client.read_block()
        if self._pace is not None:
            self._pace.check(len(block))
        return block

    # DATA

    def refused(self, reply: Reply) -> None:
        """The server answered DATA with something else than 354."""
        self._log("smtp.response", 4, "Server rejected our message; response='%d', response_param='%s'",
                  (reply.code, reply.texts[0]))
        self.account(reply.digits, reply.text, success=False)

    def run(self) -> None:
        """Take the body from the client to the server and the acknowledgement back; raises SessionOver."""
        variables = self._vars
        body = BodyReader(require_crlf=bool(variables.require_crlf), permit_nul=bool(variables.permit_nul_in_body),
                          line_limit_bytes=variables.max_body_line_length)
        try:
            kept = self._copy(body)
        except ServerFailed as failure:
            self.server_failed(body, failure.reply)
            return
        except BodyError as problem:
            self.body_refused(problem)
        except SideLost as lost:
            self.client_lost(lost)
        self._session.client.put_back(body.rest)
        if kept:
            self.acknowledge("DATA", ".")
        else:
            self._too_large()

    def _copy(self, body: BodyReader) -> bool:
        """Pass the body on; return False when it was larger than permitted and not completed."""
        session, limit = self._session, self._session.limits.message_bytes
        waiting = header_for(session.proxy) if self._vars.add_received_header else b""
        message = session.transaction
        self.begin_body()
        while not body.finished:
            passed = body.feed(self.read_block())
            message.body_bytes += len(passed)
            if body.finished:
                message.body_bytes -= END_LINE_BYTES
            if limit and message.body_bytes > limit:
                self._swallow(body)
                return False
            if body.finished:
                self.check_early_reply()
            if passed:
                self.send(waiting + passed if waiting else passed)
                waiting = b""
        return True

    def send(self, data: bytes) -> None:
        """Send to the server; raises ServerFailed."""
        try:
            self._session.server.send(data)
        except SideLost as lost:
            self._report_timeout(lost)
            raise ServerFailed(self.early_reply()) from lost

    def check_early_reply(self) -> None:
        """Raise ServerFailed when the server spoke, or left, before it has the whole message."""
        if self._session.server.speaks():
            raise ServerFailed(self.early_reply())

    def early_reply(self) -> Reply | None:
        """Return what the server said against a message that it does not have yet; never waits for it."""
        server = self._session.server
        try:
            reply = server.unasked() if server.speaks() else None
        except SideLost:
            reply = None
        return reply if reply is not None and reply.code >= 400 else None

    def _swallow(self, body: BodyReader) -> None:
        """Read the rest of the body and drop it."""
        while not body.finished:
            body.feed(self.read_block())

    def server_failed(self, body: BodyReader, reply: Reply | None) -> None:
        """Answer with what the server said, if anything, after the client has said all."""
        self._log("smtp.error", 2, "Transaction failed, some data may have been sent;")
        self.leave_server()
        code, info = "421", FAILED
        try:
            self._swallow(body)
        except BodyError as problem:
            self._log("smtp.violation", 2, problem.text, problem.fields)
            self.fail("550", BODY_ERROR, "5.6.0")
        except SideLost as lost:
            self.client_lost(lost)
        self._session.client.put_back(body.rest)
        if reply is not None:
            try:
                accepted = self._decisions.reply("DATA", b"", reply)
                code, info = accepted.digits, accepted.text
            except Refusal as refusal:
                code, info = refusal.code, refusal.info
        self.account(code, info, success=False)
        self._session.forget_message()
        self._session.answer(code, info)

    def _too_large(self) -> NoReturn:
        self.leave_server()
        self.report_too_large()

    def report_too_large(self) -> NoReturn:
        """The server has forgotten a message that was too large: log, account, and raise the Refusal."""
        self._log("smtp.violation", 2, "Message too large; max='%d'", (self._session.limits.message_bytes,))
        self.account("552", TOO_LARGE, success=False)
        self._session.forget_message()
        raise Refusal("552", TOO_LARGE)

    def body_refused(self, problem: BodyError) -> NoReturn:
        """The body holds what must not be passed on; its end was not seen."""
        self._log("smtp.violation", 2, problem.text, problem.fields)
        self._log("smtp.violation", 2, "Transaction aborted, some data may have been sent;")
        self.fail("550", BODY_ERROR, "5.6.0")

    def client_lost(self, lost: SideLost) -> NoReturn:
        """The client left, or was silent for too long, inside its message."""
        if not self._report_timeout(lost):
            self._log("smtp.violation", 2, "Transaction aborted, some data may have been sent;")
        self.fail("421", FAILED)

    def _report_timeout(self, lost: SideLost) -> bool:
        if lost.timed_out:
            self._log("core.error", 3, "Data transfer timed out; timeout='%d'", (self._session.limits.idle_ms,))
        return lost.timed_out

    def fail(self, code: str, info: str, status: str = "") -> NoReturn:
        """The end of the body was not seen: nothing that follows can be a command."""
        self.leave_server()
        self.account(code, info, success=False)
        raise SessionOver(code, info, status)

    def leave_server(self) -> None:
        """Close the server's connection; the message it has begun to receive has no end."""
        self._session.server = None
        self._session.state.ungreeted()
        self._session.proxy._disconnect_server()

    # BDAT

    def chunk(self, parameter: bytes) -> None:
        """Take one BDAT with its octets to the server; raises Refusal or SessionOver."""
        try:
            chunk = parse_bdat(parameter)
        except CommandError as problem:
            self._log("smtp.violation", 2, problem.text, problem.fields)
            raise bad_chunk() from problem
        try:
            command = self._permitted_chunk(chunk, parameter)
        except Refusal:
            self._drop_octets(chunk.size)
            raise
        self._forward_chunk(chunk, command)
        self._session.transaction.body_bytes += chunk.size
        self.acknowledge("BDAT", "BDAT LAST" if chunk.last else "BDAT")

    def drop_chunk(self, parameter: bytes) -> None:
        """Read and drop the octets of a BDAT that goes nowhere; raises SessionOver when their number is unknown."""
        try:
            chunk = parse_bdat(parameter)
        except CommandError as problem:
            raise bad_chunk() from problem
        self._drop_octets(chunk.size)

    def _permitted_chunk(self, chunk: Chunk, parameter: bytes) -> bytes:
        """Return the command to forward; raises Refusal or SessionOver."""
        session = self._session
        if "CHUNKING" not in session.active:
            raise Refusal("503", "Invalid command in this state")
        try:
            session.state.check("BDAT LAST" if chunk.last else "BDAT")
        except OutOfSequence as problem:
            self._log("smtp.violation", 4, problem.text, problem.fields)
            raise Refusal("503", "Invalid command in this state") from problem
        request = self._decisions.request(("BDAT", parameter))
        if request[1] != parameter:
            self._log("smtp.policy", 1, "Invalid request set by policy; request='%s', new_request='%s'",
                      ("BDAT", request[0]))
            raise SessionOver
        limit = session.limits.message_bytes
        if limit and session.transaction.body_bytes + chunk.size > limit:
            self._session.reset_server()
            raise Refusal("552", TOO_LARGE)
        if session.transaction.header_sent or session.transaction.body_bytes:
            return command_line(*request)
        if self.stack_form() is not None:
            self._log("smtp.policy", 3, "BDAT cannot be inspected by a stacked proxy;")
            raise Refusal("503", "Invalid command in this state")
        if not self._vars.add_received_header:
            return command_line(*request)
        session.transaction.header_sent = True
        header = header_for(session.proxy)
        return b"BDAT %d%b\r\n" % (chunk.size + len(header), b" LAST" if chunk.last else b"") + header

    def _forward_chunk(self, chunk: Chunk, command: bytes) -> None:
        session, left = self._session, chunk.size
        self.begin_body()
        if session.server.speaks():
            self._log("smtp.violation", 2, "Unsolicited response;")
            raise SessionOver
        waiting = command
        try:
            while left:
                octets = self._read_octets(left)
                left -= len(octets)
                self.send(waiting + octets)
                waiting = b""
            if waiting:
                self.send(waiting)
        except ServerFailed:
            self._log("smtp.error", 2, "Transaction failed, some data may have been sent;")
            self.fail("421", CLOSING)
        except SideLost as lost:
            self.client_lost(lost)

    def _read_octets(self, count: int) -> bytes:
        octets = self._session.client.read_octets(count)
        if self._pace is not None:
            self._pace.check(len(octets))
        return octets

    def _drop_octets(self, count: int) -> None:
        self.begin_body()
        try:
            while count:
                count -= len(self._read_octets(count))
        except SideLost as lost:
            self._report_timeout(lost)
            raise

    # the end of both

    def acknowledge(self, verb: str, step: str) -> None:
        """Take the server's answer to a body or chunk to the client; raises Refusal or SessionOver."""
        session = self._session
        try:
            reply = self._final_reply()
            session.state.replied(step, reply.code)
            final = self._decisions.reply(verb, b"", reply)
            if step == "BDAT" and final.code >= 400 > reply.code:
                raise Refusal(final.digits, final.text)
        except SessionOver as over:
            self.account(over.code, over.info, success=False)
            raise
        except Refusal as refusal:
            if step == "BDAT" and reply.code < 300:
                session.reset_server()
            self.account(refusal.code, refusal.info, success=False)
            session.forget_message()
            raise
        self._copy_acknowledgement(final)
        if step == "BDAT" and reply.code < 300:
            return
        if final.code >= 400:
            self._log("smtp.response", 4, "Server rejected our message; response='%d', response_param='%s'",
                      (final.code, final.texts[0]))
        else:
            session.errors = 0
        self.account(final.digits, final.text, success=final.code < 300)
        session.forget_message()

    def _final_reply(self) -> Reply:
        try:
            reply = self._session.read_reply()
        except SideLost as lost:
            self._log("smtp.error", 3, "Error fetching acknowledgement response from server;")
            raise SessionOver from lost
        except WireError as problem:
            self._log("smtp.violation", 2, problem.text, problem.fields)
            self._log("smtp.error", 3, "Error processing acknowledgement response from server;")
            raise SessionOver from problem
        if 300 <= reply.code < 400:
            self._log("smtp.violation", 2, "Invalid SMTP response; request='%s', response='%d'", ("DATA", reply.code))
            raise SessionOver
        return reply

    def _copy_acknowledgement(self, reply: Reply) -> None:
        if Log.loudest >= 6:
            self._session.trace("Copying response to client;")
        try:
            self._session.client.send(reply.wire)
        except SideLost:
            self._log("smtp.error", 3,
                      "Error sending acknowledgement to client, the message might be delivered multiple times;")
            self.account(reply.digits, reply.text, success=reply.code < 300)
            raise

    def account(self, code: str, info: str, *, success: bool) -> None:
        """Write the accounting line of a message."""
        session, variables = self._session, self._vars
        session.account(variables.sender, variables.recipients, code, info, success=success)
        if enabled("smtp.info", 4):
            session.log("smtp.info", 4, "End of message; client_address='%s', recipients='%d', size='%d'",
                        (session.proxy.session.client_address, session.transaction.recipients,
                         session.transaction.body_bytes))


class _Pace:
    """The slowest that a client may be: bytes per second over the whole body."""

    def __init__(self, bytes_per_second: int) -> None:
        self._rate = bytes_per_second
        self._began = time.monotonic()
        self._bytes = 0

    def check(self, count: int) -> None:
        """Count more bytes; raises SideLost when the client is too slow."""
        self._bytes += count
        elapsed = time.monotonic() - self._began
        if elapsed > _PACE_GRACE_SECONDS and self._bytes < self._rate * elapsed:
            raise SideLost(timed_out=True)
