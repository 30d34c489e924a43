"""What BodyReader makes of a body, what it should make of it, and what a careless server would."""

from __future__ import annotations

import re
from typing import NamedTuple

from Zorp.wire.smtp_body import BodyError, BodyReader, DotRemover


class Outcome(NamedTuple):
    """The end of one body."""

    passed: bytes | None        # None: refused
    finished: bool
    rest: bytes


REFUSED = Outcome(None, False, b"")
_CARELESS_ENDS = re.compile(rb"(?:\A|\r\n|\n|\r)\.(?:\r\n|\n|\r)")


def outcome(pieces: list[bytes], **options) -> Outcome:
    """Feed the pieces and return what came out; an unfinished body counts as ended by the client."""
    reader = BodyReader(**options)
    passed = b""
    for position, piece in enumerate(pieces):
        try:
            passed += reader.feed(piece)
        except BodyError:
            return REFUSED
        if reader.finished:
            return Outcome(passed, True, reader.rest + b"".join(pieces[position + 1:]))
    return Outcome(passed, False, b"")


def reference_outcome(data: bytes, *, require_crlf: bool) -> Outcome:
    """The same by a plain walk over the bytes, one state per position, no blocks."""
    end = (b"\r\n" + data).find(b"\r\n.\r\n")
    body = data[:max(end, 0)] if end >= 0 else data
    finished = end >= 0
    if not finished:
        body = re.sub(rb"(?:(?:\A|\r\n)\.\r?|\r\n?)\Z", b"", body)      # may still become the end: not passed
    passed = bytearray()
    line_start = "crlf"                                         # what ended the line before this one
    for position, byte in enumerate(body):
        before, after = body[max(position - 1, 0):position], data[position + 1:position + 2]
        if byte == 0 or (byte == 13 and after != b"\n") or (byte == 10 and before != b"\r" and require_crlf):
            return REFUSED
        if byte == 46 and (line_start == "lf" or (line_start == "crlf" and after == b"\n")):
            passed += b".."
        elif byte == 10 and before != b"\r":
            passed += b"\r\n"
        else:
            passed.append(byte)
        if byte == 10:
            line_start = "crlf" if before == b"\r" else "lf"
        elif byte != 13:
            line_start = ""
    if finished:
        passed += b".\r\n"
        return Outcome(bytes(passed), True, data[end + 3:])
    return Outcome(bytes(passed), False, b"")


def careless_end(wire: bytes) -> int:
    """Return where a server that takes any line end for CR LF sees the end of data, -1: nowhere."""
    found = _CARELESS_ENDS.search(wire)
    return found.end() if found else -1


def message_of(passed: bytes) -> bytes:
    """Return the message inside a finished body."""
    dots = DotRemover()
    half = len(passed) // 2 if len(passed) > 10 else 0
    return dots.feed(passed[:half], finished=False) + dots.feed(passed[half:], finished=True)
