"""The control channel of a stacked program: requests on its descriptor 3, and our answers.

    request = session-id SP command LF *header LF
    header  = "[" length "]" name LF value LF        ; value is exactly `length` bytes
            / "[]" name LF value-line LF             ; value is one line

Theory of operation
    feed() takes what recv() returned; next_request() gives requests as long as complete ones are
    there, then None.  Bytes wait in _pending, the request that is being read in _command and
    _headers.  How the bytes were cut never changes the requests.

    ControlError ends the reading: nobody knows where the next request would begin.

Limits: a line keeps its first LINE_BYTES and is cut there; HEADERS headers, VALUE_BYTES per value.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from Zorp.wire.errors import WireError

LINE_BYTES = 4096
HEADERS = 256
VALUE_BYTES = 16384

_LEAST_HEADER_BYTES = 3
_HEADER = re.compile(rb"\[([0-9]{0,9})\](.*)", re.DOTALL)


class ControlError(WireError):
    """The program sent what is no request."""


class ControlRequest(NamedTuple):
    """One request; texts have one character per byte."""

    session: str                     # "0" is the only one there is
    command: str
    headers: dict[str, str]


class ControlReader:
    """The requests of one program; for one thread at a time."""

    def __init__(self) -> None:
        self._pending = bytearray()
        self._skipping = False           # the rest of a line that was cut
        self._command: tuple[str, str] | None = None
        self._headers: dict[str, str] = {}
        self._count = 0
        self._name: str | None = None    # of the header whose value comes next
        self._length: int | None = None  # of that value; None: one line

    def feed(self, data: bytes) -> None:
        """Take more bytes."""
        self._pending += data

    def next_request(self) -> ControlRequest | None:
        """Return the next request, None when it is not complete yet; raises ControlError."""
        while True:
            if self._name is not None and self._length is not None:
                if not self._take_counted_value():
                    return None
                continue
            line = self._take_line()
            if line is None:
                return None
            if (request := self._take(line)) is not None:
                return request

    def _take_line(self) -> bytes | None:
        """Return the next line without its end, cut to its limit; None when there is no whole line."""
        end = self._pending.find(b"\n")
        if self._skipping:
            del self._pending[:len(self._pending) if end < 0 else end + 1]
            if end < 0:
                return None
            self._skipping = False
            end = self._pending.find(b"\n")
        if end < 0 and len(self._pending) <= LINE_BYTES:
            return None
        line = bytes(self._pending[:LINE_BYTES if end < 0 else min(end, LINE_BYTES)])
        if end < 0:
            self._pending.clear()
            self._skipping = True
        else:
            del self._pending[:end + 1]
        return line

    def _take(self, line: bytes) -> ControlRequest | None:
        if self._command is None:
            session, space, command = line.decode("latin-1").partition(" ")
            if not space:
                raise ControlError("Incomplete command header; header='%s'", line)
            self._command = session, command
        elif self._name is not None:
            self._add(line)
        elif line:
            self._begin_header(line)
        else:
            request = ControlRequest(*self._command, self._headers)
            self._command, self._headers, self._count = None, {}, 0
            return request
        return None

    def _begin_header(self, line: bytes) -> None:
        self._count += 1
        if self._count > HEADERS:
            raise ControlError("Too many headers; max='%d'", HEADERS)
        if len(line) < _LEAST_HEADER_BYTES or line[:1] != b"[":
            raise ControlError("Buffer too short to contain a valid header; line='%s'", line)
        found = _HEADER.fullmatch(line)
        if found is None:
            raise ControlError("Invalid header length specification; line='%s'", line)
        self._length = int(found[1]) if found[1] else None
        if self._length is not None and self._length > VALUE_BYTES:
            raise ControlError("Header too long; len='%d'", self._length)
        self._name = found[2].decode("latin-1")

    def _take_counted_value(self) -> bool:
        """Take a value of known length and the empty rest of its line; False when it is not there yet."""
        length = self._length
        if len(self._pending) <= length:
            return False
        if self._pending[length] != 0x0A:
            raise ControlError("Trailer line must be empty; line='%s'", bytes(self._pending[length:length + 1]))
        value = bytes(self._pending[:length])
        del self._pending[:length + 1]
        self._add(value)
        return True

    def _add(self, value: bytes) -> None:
        self._headers[self._name] = value.decode("latin-1")
        self._name = self._length = None


def answer(problem: str = "") -> bytes:
    """Return the answer to a request: that it succeeded, or why it failed."""
    headers = {"Fail-Reason": problem, "Status": "Failure"} if problem else {"Status": "OK"}
    lines = "".join(f"[{len(value)}]{name}\n{value}\n" for name, value in sorted(headers.items()))
    return f"0 RESULT\n{lines}\n".encode("latin-1", "replace")
