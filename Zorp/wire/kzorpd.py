"""What is said on kzorpd's control socket: bytes to requests, answers to bytes.

    RELOAD                         OK                   or   FAIL why not
    {"request": NAME, ...}         {"ok": true, ...}    or   {"ok": false, "error": "why not"}

A request is one line, its answer is one line, in the same form: the word of the original, or an
object as JSON.  Requests, and what they carry and are answered with besides:

    hello                          who would apply rules: mode
    instance    description        apply what this instance wants (text of Zorp.rules.description)
    remove      instance           forget an instance and its rules
    stopped     instance           an instance has ended in good order; the site says what that means
    reload                         read the policies' zones again
    dump                           instances (descriptions), counters, addresses of host names
    zones       zones              replace the zones of all instances: name to {parent, nets}
    flush       what               zones: their nets; counters: the counters

No sockets here.  LineReader is bounded: who sends more without a newline is wrong.
"""

from __future__ import annotations

import json

KZORPD_DIR = "/var/run/kzorp"    # not that of the instances: their user must not be able to move the socket away
SOCKET_NAME = "kzorpd"           # in that directory
REQUESTS = ("hello", "instance", "remove", "stopped", "reload", "dump", "zones", "flush")
SHORT_LINE_BYTES = 4_096
MAX_LINE_BYTES = 132 << 20       # an instance with a million nets, quoted once more


class KzorpdProtocolError(ValueError):
    """A line that is no request or no answer; `str()` says why."""


class LineReader:
    """Lines out of pieces, for one connection."""

    def __init__(self, most_bytes: int = MAX_LINE_BYTES) -> None:
        self._most_bytes = most_bytes
        self._pieces: list[bytes] = []
        self._bytes = 0

    def feed(self, data: bytes) -> list[bytes]:
        """Return the lines that end in this piece, without newline; raises KzorpdProtocolError."""
        *ends, rest = data.split(b"\n")
        lines = []
        for end in ends:
            self._hold(end)
            lines.append(b"".join(self._pieces))
            self._pieces, self._bytes = [], 0
        self._hold(rest)
        return lines

    def _hold(self, piece: bytes) -> None:
        self._bytes += len(piece)
        if self._bytes > self._most_bytes:
            raise KzorpdProtocolError(f"line of more than {self._most_bytes} bytes")
        if piece:
            self._pieces.append(piece)


def request_line(request: str, **fields) -> bytes:
    """Return the line of a request."""
    return json.dumps({"request": request, **fields}, separators=(",", ":")).encode() + b"\n"


def read_request(line: bytes) -> tuple[dict, bool]:
    """Return (the request, whether it came as JSON); raises KzorpdProtocolError."""
    if line.rstrip(b"\r") == b"RELOAD":
        return {"request": "reload"}, False
    value = _object(line)
    if value.get("request") not in REQUESTS:
        raise KzorpdProtocolError("unknown request; known are " + ", ".join(REQUESTS))
    return value, True


def answer_line(error: str | None, fields: dict, *, as_json: bool) -> bytes:
    """Return the line of an answer; error None: done."""
    if not as_json:
        return b"OK\n" if error is None else f"FAIL {_one_line(error)}\n".encode("utf-8", "backslashreplace")
    value = {"ok": True, **fields} if error is None else {"ok": False, "error": error}
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def read_answer(line: bytes) -> dict:
    """Return the object of an answer; raises KzorpdProtocolError."""
    value = _object(line)
    if not isinstance(value.get("ok"), bool) or not (value["ok"] or isinstance(value.get("error"), str)):
        raise KzorpdProtocolError("not an answer of kzorpd")
    return value


def _object(line: bytes) -> dict:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise KzorpdProtocolError("neither RELOAD nor an object")
    return value


def _one_line(text: str) -> str:
    return " ".join(text.split())
