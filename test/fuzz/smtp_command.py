"""Any bytes give commands or WireError, the same ones however they are cut, and never a byte that has two meanings."""

from __future__ import annotations

from test.wire.commands import outcome

PIECES = [
    b"HELO a\r\n", b"EHLO mx.example\r\n", b"MAIL FROM:<a@b>\r\n", b"RCPT TO:<c@d>\r\n", b"DATA\r\n", b"NOOP", b" ",
    b"\r\n", b"\n", b"\r", b"\t", b"BDAT 12 LAST", b"AUTH PLAIN AGEAYg==\r\n", b"X-1", b"\xc3\xa9", b"\x00", b"A" * 60,
]


def one_input(data: bytes) -> None:
    """Raise AssertionError when a cut changes the outcome or a forbidden byte passes."""
    for require_crlf in (True, False):
        commands, problem = outcome([data], require_crlf=require_crlf)
        bytewise = [data[i:i + 1] for i in range(len(data))]
        assert (commands, problem) == outcome(bytewise, require_crlf=require_crlf)
        for command in commands:
            if command is not None:
                verb, parameter = command
                assert verb.isalnum()
                assert verb == verb.upper()
                assert all(0x20 <= byte < 0x7F for byte in parameter)
