"""Replies of an SMTP server (RFC 5321, 4.2): from lines to Reply objects, and back to bytes.

Theory of operation
    The caller feeds the LineReader and asks next_reply() until that answers None, "more bytes
    needed".  Lines wait in `unfinished` for the line without "-".  Wrong input raises ReplyError or
    LineError; the reader is spent afterwards.

    Text is cleaned while it is read: control bytes other than TAB, and bytes above 0x7E unless
    `eight_bit` is set (SMTPUTF8 in force), become "?".  A bare CR inside a line therefore never
    reaches the client.

    Nearly every reply is one short line, the same in every session with that server ("250 2.1.5
    Ok"), and arrives alone.  Such replies are remembered, for all sessions, as the finished Reply;
    challenges of authentication (334) are not.

On purpose not as the RFC says
    "250" CRLF without the space counts as a last line: old servers send it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from Zorp.wire.errors import WireError
from Zorp.wire.limits import SmtpLimits
from Zorp.wire.smtp_lines import LineReader
from Zorp.wire.text import to_policy

_LINE = re.compile(rb"([2-5][0-9][0-9])(?:([ -])(.*))?", re.DOTALL)

_WHOLE = re.compile(rb"(?!334)([2-5][0-9][0-9]) ([^\r\n]+)\r\n")
_REMEMBERED = 256                 # replies, of all servers together
_REMEMBERED_BYTES = 256           # of one

_CONTROLS = bytes(byte for byte in range(0x20) if byte != 0x09) + b"\x7f"
_CLEAN_8BIT = bytes(0x3F if byte in _CONTROLS else byte for byte in range(256))
_CLEAN_7BIT = _CLEAN_8BIT[:0x80] + b"?" * 0x80


class ReplyError(WireError):
    """Not a reply: wrong form, a changed code, or too much of it."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One complete reply."""

    code: int                     # 200 to 599
    texts: tuple[bytes, ...]      # one per line, without code and line end; never empty
    digits: str = field(init=False, compare=False, repr=False)      # the code as policies see it
    text: str = field(init=False, compare=False, repr=False)        # the first line as policies see it
    wire: bytes = field(init=False, compare=False, repr=False)      # every line ended by CRLF; empty last: bare code

    def __post_init__(self) -> None:
        code, texts = self.code, self.texts
        wire = b"%d %b\r\n" % (code, texts[-1]) if texts[-1] else b"%d\r\n" % code
        if len(texts) > 1:
            wire = b"".join([b"%d-%b\r\n" % (code, text) for text in texts[:-1]]) + wire
        derive = object.__setattr__
        derive(self, "digits", str(code))
        derive(self, "text", texts[0].decode("latin-1"))
        derive(self, "wire", wire)


def clean_text(text: bytes, *, eight_bit: bool = False) -> bytes:
    """Return reply text with "?" for every byte that must not reach a client."""
    return text.translate(_CLEAN_8BIT if eight_bit else _CLEAN_7BIT)


@functools.lru_cache(maxsize=_REMEMBERED)
def _one_line(data: bytes, eight_bit: bool) -> Reply | None:
    """Return the reply that all of `data` is, None when it is anything but one ordinary line."""
    parts = _WHOLE.fullmatch(data)
    return Reply(int(parts[1]), (clean_text(parts[2], eight_bit=eight_bit),)) if parts else None


class ReplyReader:
    """The replies of one server connection; for one thread.

    Arguments:
        lines: where the server's bytes are fed.
        limits: line_bytes, reply_line_bytes, reply_lines and reply_bytes are used.
        on_cut: called with the length of a line that is too long, whose beginning is then kept;
            None: such a line is refused.
    """

    def __init__(self, lines: LineReader, limits: SmtpLimits, *, on_cut: Callable[[int], None] | None = None) -> None:
        self._lines = lines
        self._limits = limits
        self._on_cut = on_cut
        self._at_once_bytes = min(_REMEMBERED_BYTES, limits.reply_line_bytes, limits.line_bytes - 2)
        self._code = b""
        self.unfinished: list[bytes] = []          # texts of the reply whose last line has not come
        self._bytes = 0
        self.eight_bit = False

    def reply_in(self, data: bytes) -> Reply | None:
        """Add received bytes and return the next reply, None when it is not complete yet; raises WireError."""
        if len(data) <= self._at_once_bytes and not self.unfinished and not self._lines.buffered:
            reply = _one_line(data, self.eight_bit)
            if reply is not None:
                return reply
        line = self._lines.line_in(data, self._limits.line_bytes)
        while line is not None:
            if (reply := self._take(line)) is not None:       # None: a "250-" line
                return reply
            line = self._lines.next_line(self._limits.line_bytes)
        return None

    def next_reply(self) -> Reply | None:
        """Return the next reply of the bytes that wait, or None; raises WireError."""
        return self.reply_in(b"")

    def _take(self, line: bytes) -> Reply | None:
        limits = self._limits
        if len(line) > limits.reply_line_bytes:
            line = self._cut(line)
        parts = _LINE.fullmatch(line)
        if parts is None:
            raise self._misformed(line)
        code, mark, text = parts.groups(b"")
        if self.unfinished and code != self._code:
            raise ReplyError("Invalid SMTP reply, reply code changed; response='%s', line='%s'",
                             to_policy(self._code), to_policy(line))
        self._bytes += len(line)
        if len(self.unfinished) >= limits.reply_lines or self._bytes > limits.reply_bytes:
            raise ReplyError("Response too long; line='%s', lines='%d', bytes='%d'",
                             to_policy(line), len(self.unfinished) + 1, self._bytes)
        self.unfinished.append(clean_text(text, eight_bit=self.eight_bit))
        if mark == b"-":
            self._code = code
            return None
        reply = Reply(int(code), tuple(self.unfinished))
        self.unfinished.clear()
        self._bytes = 0
        return reply

    def _cut(self, line: bytes) -> bytes:
        limit = self._limits.reply_line_bytes
        if self._on_cut is None:
            raise ReplyError("Response line too long; line='%s', length='%d', max_response_length='%d'",
                             to_policy(line), len(line), limit)
        self._on_cut(len(line))
        return line[:limit]

    @staticmethod
    def _misformed(line: bytes) -> ReplyError:
        shown = to_policy(line)
        if len(line) < 3:
            return ReplyError("Too small response; line='%s'", shown)
        if not re.match(rb"[0-9]{3}", line):
            return ReplyError("SMTP reply contains non-numeric characters; line='%s'", shown)
        if not re.match(rb"[2-5]", line):
            return ReplyError("SMTP reply code out of range; line='%s'", shown)
        return ReplyError("Invalid continuation character; line='%s'", shown)
