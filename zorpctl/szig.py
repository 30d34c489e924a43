"""Client of the control socket of one zorp process.

Theory of operation
    A request is a line, the answer is a line; DUMP answers with lines up to one that holds a
    single dot.  Every call is bounded by `timeout_s` in total, so a daemon that hangs costs its
    time and no more.  Old daemons leave the newline off some answers: a quiet fifth of a second
    ends such an answer.
"""

from __future__ import annotations

import re
import socket
import time

TIMEOUT_S = 10.0
_QUIET_S = 0.2
_MOST_BYTES = 64 << 20
_ESCAPED = re.compile(rb"%([0-9A-Fa-f]{2})")


class SzigError(Exception):
    """The process did not answer; the text says why."""


class SzigClient:
    """One connection; use it in a `with` block."""

    def __init__(self, path: str, timeout_s: float = TIMEOUT_S) -> None:
        self._path, self._timeout_s = path, timeout_s
        self._pending = b""

    def __enter__(self) -> SzigClient:
        self._deadline = time.monotonic() + self._timeout_s
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(self._timeout_s)
            self._socket.connect(self._path)
        except OSError as problem:
            self._socket.close()
            raise SzigError(f"Error while communicating through szig: {problem.strerror or problem}") from None
        return self

    def __exit__(self, *exc_info) -> None:
        self._socket.close()

    def ask(self, request: str) -> str:
        """Send a request, return its one-line answer.  Raises SzigError."""
        self._send(request)
        return self._line()

    def order(self, request: str) -> str:
        """Send a request that is answered OK or FAIL; return the text behind OK.  Raises SzigError with FAIL's text."""
        answer = self.ask(request)
        status, _, text = answer.partition(" ")
        if status != "OK":
            raise SzigError(text or answer)
        return text

    def value(self, node: str) -> str | None:
        """Return the value of a node, None when it has none."""
        answer = self.ask(f"GETVALUE {node}")
        return None if answer == "None" else answer

    def dump(self, node: str = "") -> list[tuple[str, str]]:
        """Return (name, value) of every node below, depth first; "None" where a node has no value."""
        self._send(f"DUMP {node}".rstrip())
        lines = []
        while (line := self._line()) != ".":
            if line.startswith("FAIL"):
                raise SzigError(line.partition(" ")[2] or line)
            name, _, value = line.partition(": ")
            lines.append((name, value))
        return lines

    def _send(self, request: str) -> None:
        try:
            self._socket.settimeout(self._remaining())
            self._socket.sendall(request.encode("utf-8", "surrogateescape") + b"\n")
        except OSError as problem:
            raise SzigError(f"Error while communicating through szig: {problem.strerror or problem}") from None

    def _line(self) -> str:
        while b"\n" not in self._pending:
            if len(self._pending) > _MOST_BYTES:
                raise SzigError("Error while communicating through szig: endless answer")
            data = self._receive()
            if not data:
                break
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode("utf-8", "backslashreplace")

    def _receive(self) -> bytes:
        """Return more bytes; b"" when an answer without newline has ended."""
        quiet = bool(self._pending)
        try:
            self._socket.settimeout(min(_QUIET_S, self._remaining()) if quiet else self._remaining())
            data = self._socket.recv(65536)
        except TimeoutError:
            if quiet:
                return b""
            raise SzigError("Error while communicating through szig: no answer in time") from None
        except OSError as problem:
            raise SzigError(f"Error while communicating through szig: {problem.strerror or problem}") from None
        if not data and not quiet:
            raise SzigError("Error while communicating through szig: connection closed")
        return data

    def _remaining(self) -> float:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise SzigError("Error while communicating through szig: no answer in time")
        return remaining


def components(node: str) -> list[str]:
    """Return the parts of a node's name as they were before escaping, which is of the bytes of UTF-8."""
    return [_ESCAPED.sub(lambda match: bytes((int(match[1], 16),)), part.encode()).decode("utf-8", "backslashreplace")
            for part in node.split(".")]
