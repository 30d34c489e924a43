"""The SASL dialogue after AUTH (RFC 4954).

Client lines are forwarded without being understood, but only lines that SASL can have, only
while the server's last answer was 334, and never into a log.  Any other answer ends the
dialogue, whatever the policy says of it: the next line of the client is a command again.
"""

from __future__ import annotations

from Zorp.smtp_engine.decisions import Decisions
from Zorp.smtp_engine.session import INVALID, Refusal, SessionOver, SmtpSession
from Zorp.smtp_engine.sides import SideLost
from Zorp.wire.smtp_commands import is_sasl_line
from Zorp.wire.smtp_replies import Reply

GO_ON, DONE = 334, 235


class SaslDialogue:
    """What follows one AUTH command; for one thread.

    parameter: of the command, as it is forwarded.
    """

    def __init__(self, session: SmtpSession, decisions: Decisions, parameter: bytes) -> None:
        self._session = session
        self._decisions = decisions
        self._log = session.log
        self._mechanism = parameter.partition(b" ")[0].decode("latin-1").upper()
        self._rounds = 0

    def one_line(self) -> None:
        """Take one line of the client to the server and the answer back; raises Refusal."""
        session, limits = self._session, self._session.limits
        session.trace("Fetching authentication request;")
        line = session.client.read_sasl_line()
        self._rounds += 1
        if len(line) > limits.sasl_line_bytes:
            self._log("smtp.violation", 2, "Auth request line too long; length='%d', max='%d'",
                      (len(line), limits.sasl_line_bytes))
            self._give_up("500", INVALID)
        if not is_sasl_line(line) or self._rounds > limits.sasl_rounds:
            self._log("smtp.violation", 2, "Invalid authentication request; rounds='%d'", (self._rounds,))
            self._give_up("501", "Invalid authentication request")
        session.refuse_unasked_reply()
        session.trace("Copying authentication request to server;")
        try:
            session.server.send(line + b"\r\n")
        except SideLost:
            self._log("smtp.error", 3, "Error sending authentication request;")
            raise
        self.replied(b"", session.read_reply(hide=True))

    def replied(self, parameter: bytes, reply: Reply) -> None:
        """Decide about the server's answer to AUTH or to a line; raises Refusal or SessionOver."""
        session = self._session
        if reply.code == DONE:
            session.authenticated = True
            self._log("smtp.info", 3, "Authentication successful; mechanism='%s'", (self._mechanism,))
        elif reply.code >= 400:
            self._log("smtp.error", 3, "Authentication failed; mechanism='%s', response='%d'",
                      (self._mechanism, reply.code))
        try:
            accepted = self._decisions.reply("AUTH", parameter, reply)
        except Refusal as refusal:
            self._told_no(reply.code, refusal)
            raise
        session.state.replied("AUTH", reply.code)
        if reply.code == GO_ON and accepted.code != GO_ON:
            self._cancel()
        session.client.send(accepted.wire)
        if reply.code == DONE and accepted.code >= 300:
            raise SessionOver("")                   # the server believes in a login that the client knows nothing of

    def _told_no(self, code: int, refusal: Refusal) -> None:
        """The policy keeps the server's answer from the client."""
        if code == GO_ON:
            self._cancel()
        self._session.state.replied("AUTH", 500)
        if code == DONE:
            raise SessionOver(refusal.code, refusal.info)

    def _give_up(self, code: str, info: str) -> None:
        self._cancel()
        raise Refusal(code, info)

    def _cancel(self) -> None:
        """End the dialogue at the server; its answer to that is nobody's business."""
        session = self._session
        session.refuse_unasked_reply()
        session.server.send(b"*\r\n")
        if session.server.read_reply().code < 400:
            self._log("smtp.violation", 2, "Server goes on with a cancelled authentication;")
            raise SessionOver
        session.state.replied("AUTH", 500)
