"""Whatever a client sends and a server answers, the server gets sound commands and mail for ok.example only.

The whole engine runs, between a client that sends the input and a server that keeps its own
books of what it takes for commands, messages and chunks.
"""

from __future__ import annotations

import re

from test.smtp.two_ends import is_command, is_sasl_line, talk
from Zorp.Log import Filter, current_filter, set_filter

_GREETED = b"EHLO a\r\n"
_ADDRESSED = _GREETED + b"MAIL FROM:<a@b>\r\nRCPT TO:<a@ok.example>\r\n"
PIECES = [
    _ADDRESSED + b"DATA\r\n", _ADDRESSED, _ADDRESSED + b"DATA\r\none\r\n.\r\n", _ADDRESSED + b"BDAT 7\r\n1234567",
    _GREETED + b"AUTH LOGIN\r\ndXNlcg==\r\n", _GREETED, b"HELO a\r\n",
    b"MAIL FROM:<a@b>\r\n", b"RCPT TO:<a@ok.example>\r\n",
    b"RCPT TO:<a@evil>\r\n", b"DATA\r\n", b"one\r\n.\r\n", b"\r\n.\r\n", b"\n.\n", b"\r\n.\n", b"BDAT 7\r\n1234567",
    b"BDAT 20 LAST\r\n", b"BDAT 0 LAST\r\n", b"RSET\r\n", b"QUIT\r\n", b"NOOP\r\n", b"AUTH LOGIN\r\n", b"dXNlcg==\r\n",
    b"*\r\n", b"STARTTLS\r\n", b"XFOO bar\r\n", b"\r\n", b"RCPT TO:<@ok.example:a@evil>\r\n",
    b'RCPT TO:<"x@ok.example"@evil>\r\n', b"RCPT TO:<a@ok.example>\nRCPT TO:<a@evil>\r\n",
    b'RCPT TO:<"x@evil"@ok.example>\r\n', b'RCPT TO:<"@evil:x"@ok.example>\r\n', b'RCPT TO:<"x y"@ok.example>\r\n',
]
_RCPT = re.compile(rb"RCPT To:<(.*)>(?: .*)?\r\n", re.DOTALL)
_REPLIES = re.compile(rb"(?:[2-5][0-9][0-9](?:[ -][^\r\n]*)?\r\n)*")
_NOTHING_LOGGED = Filter(-1, "")


def one_input(data: bytes) -> None:
    """Raise AssertionError when a command or recipient gets through that must not, or a reply is malformed."""
    before = current_filter()
    set_filter(_NOTHING_LOGGED)
    try:
        server, answered = talk(data)
    finally:
        set_filter(before)
    for line in server.commands:
        assert is_command(line), line
        if line.startswith(b"RCPT"):
            address = _RCPT.fullmatch(line)[1]
            assert address.lower().rpartition(b"@")[2] in (b"ok.example", b"postmaster"), line
            assert address.count(b"@") <= 1, line
    assert all(map(is_sasl_line, server.sasl_lines)), server.sasl_lines
    assert _REPLIES.fullmatch(answered), answered
