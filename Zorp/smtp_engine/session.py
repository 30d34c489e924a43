"""What all parts of one SMTP session share, and how the proxy answers in its own name.

Two exceptions carry a decision out of any depth: Refusal ends a command, SessionOver ends the
session.  Whoever raises them has logged why.
"""

from __future__ import annotations

import functools
import re
from typing import NoReturn

from Zorp import Log
from Zorp.Log import VALUE_BYTES, log
from Zorp.smtp_engine.sides import ClientSide, ServerSide, SideLost
from Zorp.wire.errors import WireError
from Zorp.wire.limits import SmtpLimits
from Zorp.wire.smtp_replies import Reply, clean_text
from Zorp.wire.smtp_states import SessionState

CLOSING = "Service not available, closing transmission channel."
FAILED = "Service not available, closing transmission channel"          # a transfer; no dot at the end
INVALID = "Invalid command"

# RFC 3463 status of the replies that the proxy gives, by reply code
_STATUS = {
    "421": "4.3.0", "450": "4.7.1", "451": "4.4.1", "452": "4.5.3", "454": "4.7.0",
    "500": "5.5.2", "501": "5.5.4", "502": "5.5.1", "503": "5.5.1", "530": "5.7.0", "550": "5.7.1", "552": "5.3.4",
    "553": "5.6.7", "554": "5.7.1", "555": "5.5.4",
}
_WITH_STATUS = re.compile(r"[245]\.[0-9]{1,3}\.[0-9]{1,3}(?: |\Z)")
_REPLY_CODE = re.compile(r"[245][0-9][0-9]")
_LINE_ENDS = re.compile("[\r\n\0]+")
_WRITTEN_LONGER = re.compile(r"[^ -&(-~]")              # what a log line has as <XX>
_BYTES_ADDED = 3
_MOST_BLANKS = 64                       # within one address
_RECIPIENTS_OF_ONE_LINE = VALUE_BYTES // (1 + _BYTES_ADDED)      # however they are written


def portions_of(recipients: str) -> list[str]:
    """Return the recipients, separated by blanks, in portions that a log line has room for.

    Nothing is left out.  A blank within an address, which is before its @, parts nothing either,
    as long as the address is no longer than a line.
    """
    portions: list[list[str]] = [[]]
    room = VALUE_BYTES
    for part in recipients.split(" "):
        written = 1 + len(part) + _BYTES_ADDED * len(_WRITTEN_LONGER.findall(part))
        if written > room:
            address = []
            while portions[-1] and "@" not in portions[-1][-1] and len(address) < _MOST_BLANKS:
                address.insert(0, portions[-1].pop())
            portions.append(address)
            room = VALUE_BYTES - sum(1 + (1 + _BYTES_ADDED) * len(piece) for piece in address)
        portions[-1].append(part)
        room -= written
    return [" ".join(portion) for portion in portions if portion]


class Refusal(Exception):
    """The command is refused: the client gets this reply and the session goes on."""

    def __init__(self, code: str = "500", info: str = INVALID, status: str = "") -> None:
        super().__init__(code, info)
        self.code, self.info, self.status = code, info, status


class SessionOver(Exception):
    """The session ends; the client gets this reply first, if it is still there.  Code "": none."""

    def __init__(self, code: str = "421", info: str = CLOSING, status: str = "") -> None:
        super().__init__(code, info)
        self.code, self.info, self.status = code, info, status


class Transaction:
    """What belongs to one message."""

    recipients = 0              # accepted by the server
    utf8 = False                # MAIL had SMTPUTF8
    binary = False              # MAIL had BODY=BINARYMIME
    body_bytes = 0              # octets of the message so far, as the client sent them
    header_sent = False         # our Received line went with the first chunk


class SmtpSession:
    """One session; for one thread.

    proxy       the policy's object: callbacks and log
    vars        its engine attributes, as the policy reads and writes them
    limits      its numbers, fixed when config() was done
    client, server   the sides; server is None while there is none
    state       where the dialogue is
    active      keywords of the extensions in force
    transaction the message that is being talked about
    """

    def __init__(self, proxy, limits: SmtpLimits) -> None:
        self.proxy = proxy
        self.vars = proxy._vars
        self.limits = limits
        self.log = functools.partial(log, proxy._session_id)
        self.client: ClientSide
        self.server: ServerSide | None = None
        self.state = SessionState()
        self.active: frozenset[str] = frozenset()
        self.transaction = Transaction()
        self.errors = 0
        self.authenticated = False

    def trace(self, text: str) -> None:
        """Log one step at smtp.debug(6)."""
        self.log("smtp.debug", 6, text)

    def read_reply(self, hide: bool = False) -> Reply:
        """Return the server's next reply; raises SideLost or WireError.  hide: its text is a secret."""
        if Log.loudest < 6:
            return self.server.read_reply()
        self.trace("Fetching response;")
        reply = self.server.read_reply()
        self.log("smtp.response", 7, "Response parsed; response='%d', param='%s'",
                 (reply.code, "" if hide else reply.texts[0]))
        self.trace("Processing response;")
        return reply

    def report_cut(self, length: int) -> None:
        """A reply line was too long and was cut; the log has its length after that, as ever."""
        limit = self.limits.reply_line_bytes
        self.log("smtp.violation", 3,
                 "Response line was too long, truncated; length='%d', max_response_length='%d'", (limit, limit))

    # replies in our own name

    def answer(self, code: str, info: str, status: str = "") -> None:
        """Send one reply to the client; `status` replaces the usual enhanced status code.

        Code and text may come from the policy: a code that is none becomes 500, line ends are
        taken out of the text.
        """
        self.client.send(self.reply_bytes(code, info, status))

    def reply_bytes(self, code: str, info: str, status: str = "") -> bytes:
        """Return the reply as it goes on the wire."""
        if not _REPLY_CODE.fullmatch(code):
            code = "500"
        info = _LINE_ENDS.sub("", info) or INVALID
        if "ENHANCEDSTATUSCODES" in self.active and not _WITH_STATUS.match(info):
            info = f"{status or _STATUS.get(code, code[0] + '.0.0')} {info}"
        text = clean_text(info.encode("latin-1", "replace"), eight_bit="SMTPUTF8" in self.active)
        return f"{code} ".encode("ascii") + text + b"\r\n"

    def answer_refusal(self, refusal: Refusal) -> None:
        """Send the reply of a refused command and count it; raises SessionOver when it was one too many."""
        self.errors += 1
        if self.limits.errors and self.errors > self.limits.errors:
            self.log("smtp.violation", 2, "Too many errors; errors='%d'", (self.errors,))
            raise SessionOver("421", "Too many errors", "4.7.0")
        self.answer(refusal.code, refusal.info, refusal.status)
        if self.vars.error_abort:
            raise SessionOver("")

    # what is known about the message

    def account(self, sender: str, recipients: str, code: str, info: str, *, success: bool) -> None:
        """Write the accounting line of a message, or of a sender or recipient that was refused.

        A value is cut at VALUE_BYTES, so a message with more recipients than that has several
        lines, alike but for the recipients, each of which is in one of them.
        """
        result = "success" if success else "failure"
        for portion in (recipients,) if len(recipients) <= _RECIPIENTS_OF_ONE_LINE else portions_of(recipients):
            self.log("smtp.accounting", 4,
                     "Accounting; sender='%s', recipient='%s', response='%s', response_param='%s', result='%s'",
                     (sender, portion, code, info, result))

    def forget_message(self) -> None:
        """The transaction is over: no sender, no recipients."""
        self.vars.sender = self.vars.recipients = ""
        self.transaction = Transaction()

    def refuse_unasked_reply(self) -> None:
        """End the session when the server has said something unasked: it would answer what we send next."""
        if self.server.speaks():
            self.end_unasked()

    def end_unasked(self) -> NoReturn:
        """The server speaks without being asked: log what it says and raise SessionOver."""
        reply = self.server.unasked()
        if reply is None or reply.code != 421:
            self.log("smtp.violation", 2, "Unsolicited response; response='%s', response_param='%s'",
                     (reply.code, reply.texts[0]) if reply else ("", ""))
        raise SessionOver

    def reset_server(self) -> None:
        """Make the server forget the message; raises SessionOver when it does not agree."""
        self.refuse_unasked_reply()
        try:
            self.server.send(b"RSET\r\n")
            agreed = self.server.read_reply().code // 100 == 2
        except (SideLost, WireError):
            agreed = False
        if not agreed:
            self.log("smtp.error", 3, "Error sending RSET to the server;")
            raise SessionOver
        self.state.replied("RSET", 250)
        self.forget_message()

    def set_active(self, keywords: frozenset[str], mask: int) -> None:
        """Put extensions in force."""
        self.active = keywords
        self.vars.active_extensions = mask
        self.client.long_auth = "AUTH" in keywords
        if self.server is not None:
            self.server.eight_bit = "SMTPUTF8" in keywords
