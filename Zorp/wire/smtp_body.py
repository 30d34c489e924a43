"""The body of a message after DATA (RFC 5321, 4.5.2): found, checked, passed on, unstuffed, stuffed.

Theory of operation
    BodyReader finds the end of the data and hands out what may be sent on.  The only end is the
    five bytes CR LF "." CR LF; the CR LF before the first body byte is the one of the DATA
    command.  Dot stuffing is the same on both sides, so checked blocks go on unmodified and are
    never cut into lines: what is left when every CR LF is taken out tells whether a CR or LF
    stands alone.  A tail that may be the beginning of the end (CR, CR LF, CR LF ".", CR LF "." CR)
    is held back until the next block decides.

    With require_crlf off a LF without CR becomes CR LF, after it has been decided what it was:
    such a LF never ends the data, and a "." that the conversion would put at the beginning of a
    line of its own is doubled.  A CR without LF is refused in both modes, NUL too unless permitted.

    BodyError means: do not send another byte, above all no end of data.

    DotRemover and DotAdder turn the passed stream into the message and back, for those who look
    inside it; DotAdder is also what a generated header goes through.

    How the bytes were cut changes neither the output nor the verdict.
"""

from __future__ import annotations

import re

from Zorp.wire.errors import WireError

_END = b"\r\n.\r\n"
_CR, _LF, _NUL = b"\r\n\0"       # numbers: `in` first takes b"\n" for one that is wrong, and makes an exception
_BEGUN_END = re.compile(rb"\r(?:\n(?:\.\r?)?)?\Z")
# require_crlf off: a LF without CR, with the "." that follows it; a "." line that such a LF ends
_LONE_LF = re.compile(rb"(?<!\r)\n(\.?)|(?<=\r\n)(\.)(?=\n)")


class BodyError(WireError):
    """The body holds what some server could take for an end of data, or what it must not hold."""


class BodyReader:
    """The body of one message; for one thread.

    Arguments:
        require_crlf: refuse a LF without CR instead of converting it.
        permit_nul: let NUL pass.
        line_limit_bytes: longest line without its end; 0: no limit.

    `finished` is True when the end of data has been read; `rest` holds the bytes behind it.
    """

    def __init__(self, *, require_crlf: bool = True, permit_nul: bool = False, line_limit_bytes: int = 0) -> None:
        self._require_crlf = require_crlf
        self._permit_nul = permit_nul
        self._line_limit = line_limit_bytes
        self._line_bytes = 0            # of the line that the last block left unfinished
        self._held = b"\r\n"            # ours at first: the line end of DATA
        self._not_ours = 2              # how many bytes of _held are not body
        self._after_lone_lf = False     # the last block ended in a LF that was converted
        self.finished = False
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        """Return the bytes to send on for `data`, the end of data included; raises BodyError."""
        data = self._held + data
        block, end, rest = data.partition(_END)
        if end:
            self.finished = True
            self.rest = rest
        else:
            block = self._hold(data)
        self._check(block)
        if not self._require_crlf and block:
            block = self._convert(block)
        passed = block + _END if self.finished else block
        if self._not_ours:
            passed, self._not_ours = passed[self._not_ours:], max(self._not_ours - len(passed), 0)
        return passed

    def _hold(self, data: bytes) -> bytes:
        """Return what can be decided now and keep the rest."""
        begun = _BEGUN_END.search(data, max(len(data) - len(_END), 0))
        cut = begun.start() if begun else len(data)
        self._held = data[cut:]
        return data[:cut]

    def _convert(self, block: bytes) -> bytes:
        """Make CR LF of every lone LF.  A block never ends between a CR LF and the byte behind its "."."""
        converted = _LONE_LF.sub(_converted, block)
        if self._after_lone_lf and block.startswith(b"."):
            converted = b"." + converted
        self._after_lone_lf = block.endswith(b"\n") and not block.endswith(b"\r\n")
        return converted

    def _check(self, block: bytes) -> None:
        single = block.replace(b"\r\n", b"")
        if _CR in single:
            raise BodyError("Invalid mail body, CR without LF;")
        if self._require_crlf and _LF in single:
            raise BodyError("Invalid mail body, LF without CR;")
        if not self._permit_nul and _NUL in block:
            raise BodyError("Invalid mail body, embedded NUL character;")
        if self._line_limit:
            self._check_line_lengths(block)

    def _check_line_lengths(self, block: bytes) -> None:
        lengths = [len(line) for line in block.replace(b"\r\n", b"\n").split(b"\n")]
        lengths[0] += self._line_bytes
        self._line_bytes = lengths[-1]
        if max(lengths) > self._line_limit:
            raise BodyError("Invalid mail body, line too long; length='%d', max='%d'", max(lengths), self._line_limit)


def _converted(found: re.Match) -> bytes:
    if found[2]:
        return b".."
    return b"\r\n.." if found[1] else b"\r\n"


class DotRemover:
    """What BodyReader passes, in blocks, to the message itself: doubled dots undone, no end of data."""

    def __init__(self) -> None:
        self._held = b"\r\n"
        self._not_ours = 2

    def feed(self, passed: bytes, *, finished: bool) -> bytes:
        """Return the message bytes of the next block; `finished`: it holds the end of data."""
        data = self._held + passed
        if finished:
            data = data[:len(data) - len(_END)] + b"\r\n"
            self._held = b""
        else:
            begun = _BEGUN_END.search(data, max(len(data) - len(_END), 0))
            cut = begun.start() if begun else len(data)
            self._held = data[cut:]
            data = data[:cut]
        message = data.replace(b"\r\n.", b"\r\n")
        message, self._not_ours = message[self._not_ours:], max(self._not_ours - len(message), 0)
        return message


class DotAdder:
    """A message, in blocks, to what follows DATA: dots doubled, CR and LF only in pairs."""

    def __init__(self) -> None:
        self._held = b"\r\n"
        self._not_ours = 2

    def feed(self, message: bytes) -> bytes:
        """Return the bytes to send for the next block of the message; raises BodyError."""
        data = self._held + message
        cut = len(data) - (2 if data.endswith(b"\r\n") else 1 if data.endswith(b"\r") else 0)
        self._held = data[cut:]
        return self._stuffed(data[:cut])

    def finish(self) -> bytes:
        """Return what is still to be sent: the last line end and the end of data."""
        held, self._held = self._held, b""
        return self._stuffed(held + _END if held != b"\r\n" else _END, end=True)

    def _stuffed(self, block: bytes, *, end: bool = False) -> bytes:
        body = block[:-len(_END)] if end else block
        line_ends = body.count(b"\r\n")
        if body.count(b"\r") != line_ends or body.count(b"\n") != line_ends:
            raise BodyError("Invalid mail body, CR or LF alone;")
        stuffed = body.replace(b"\r\n.", b"\r\n..") + (_END if end else b"")
        stuffed, self._not_ours = stuffed[self._not_ours:], max(self._not_ours - len(stuffed), 0)
        return stuffed
