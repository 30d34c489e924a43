"""Lines of a line protocol: from bytes in any pieces to lines without their ends.

Theory of operation
    The caller gives feed() what recv() returned and asks next_line() until that answers None,
    "more bytes needed".  A line ends in CRLF; with require_crlf off a LF without CR ends one
    too.  A CR anywhere else stays part of the line, for the command and reply grammar to judge.
    take() hands out everything that waits, for the parts of a protocol that are not lines.

    How TCP cut the bytes never changes the lines.  At most one incomplete line waits, and it
    is shorter than the limit or next_line() raises LineError; the reader is spent afterwards.

    Bytes are kept as they came and lines are cut out by position: a segment that holds one
    line costs no copy but the line itself.
"""

from __future__ import annotations

from Zorp.wire.errors import WireError
from Zorp.wire.text import to_policy

_CR, _LF = b"\r\n"                # numbers: `in` first takes b"\n" for one that is wrong, and makes an exception


class LineError(WireError):
    """A line without CRLF where one is required, or without an end within the limit."""


class LineReader:
    """The lines of one direction of a connection; for one thread.

    buffered    the bytes that wait, from `_start` on; b"" exactly when none do
    """

    __slots__ = ("_require_crlf", "_searched", "_start", "buffered")

    def __init__(self, *, require_crlf: bool = True) -> None:
        self.buffered = b""
        self._start = 0             # first byte not handed out yet
        self._searched = 0          # no LF before this position
        self._require_crlf = require_crlf

    @property
    def pending(self) -> int:
        """Number of bytes that wait."""
        return len(self.buffered) - self._start

    def feed(self, data: bytes) -> None:
        """Add received bytes."""
        self.buffered = self.buffered[self._start:] + data if self.buffered else data
        self._searched -= self._start
        self._start = 0

    def take(self) -> bytes:
        """Hand out all waiting bytes, whatever they are."""
        data = self.buffered[self._start:]
        self._forget()
        return data

    def take_at_most(self, count: int) -> bytes:
        """Hand out the first `count` waiting bytes, or as many as there are."""
        data = self.buffered[self._start:self._start + count]
        self._start += len(data)
        self._searched = self._start
        if self._start == len(self.buffered):
            self._forget()
        return data

    def line_in(self, data: bytes, limit_bytes: int) -> bytes | None:
        """Add received bytes and return the next line, as feed() and next_line() do.

        Nearly always the bytes are one line and nothing waits: then they are not even kept.
        """
        line, end, rest = data.partition(b"\r\n")
        if end and not rest and _LF not in line and len(data) <= limit_bytes and not self.buffered:
            return line
        if data:
            self.feed(data)
        return self.next_line(limit_bytes)

    def next_line(self, limit_bytes: int) -> bytes | None:
        """Return the next line without its end, or None when its end has not come yet.

        limit_bytes: longest line, with its end.  Raises LineError.
        """
        data, start = self.buffered, self._start
        end = data.find(b"\n", self._searched)
        if end < 0:
            self._searched = len(data)
            if len(data) - start >= limit_bytes:
                raise self._too_long(start + limit_bytes, limit_bytes)
            return None
        if end + 1 - start > limit_bytes:
            raise self._too_long(end, limit_bytes)
        if end + 1 == len(data):
            self._forget()
        else:
            self._start = self._searched = end + 1
        if end > start and data[end - 1] == _CR:
            return data[start:end - 1]
        if self._require_crlf:
            raise LineError("Invalid line, bad CRLF sequence, buffer=[%s]", to_policy(data[start:end]))
        return data[start:end]

    def _forget(self) -> None:
        self.buffered = b""
        self._start = self._searched = 0

    def _too_long(self, end: int, limit_bytes: int) -> LineError:
        return LineError("Line too long, buffer=[%s], max_line_length=[%d]",
                         to_policy(self.buffered[self._start:end][:limit_bytes]), limit_bytes)
