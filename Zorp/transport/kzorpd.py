"""Client of kzorpd's control socket; what is said there is in Zorp.wire.kzorpd.

Every call is one connection and is bounded by its deadline as a whole.

kzorpd listens only in a directory where nobody but user 0, or its own user, can put a socket.  Where
that was not asked for, anybody may listen: what is not run by user 0 or by our own user is nobody.
"""

from __future__ import annotations

import os
import socket
import struct
import time

from Zorp.wire import kzorpd as wire

_READ_BYTES = 1 << 20


class KzorpdError(Exception):
    """kzorpd refused, or what it said makes no sense; `str()` is its reason."""


class KzorpdAway(KzorpdError):
    """Nobody answers on the socket."""


def socket_path(directory: str) -> str:
    """Return where kzorpd listens."""
    return os.path.join(directory, wire.SOCKET_NAME)


def ask(path: str, request: str, timeout_s: float, **fields) -> dict:
    """Send one request; return its answer.  Raises KzorpdAway, or KzorpdError with kzorpd's reason."""
    line = exchange(path, wire.request_line(request, **fields), timeout_s)
    try:
        answer = wire.read_answer(line)
    except wire.KzorpdProtocolError as problem:
        raise KzorpdError(f"kzorpd does not answer as it should: {problem}") from None
    if not answer["ok"]:
        raise KzorpdError(answer["error"])
    return answer


def exchange(path: str, line: bytes, timeout_s: float) -> bytes:
    """Send one line; return the line that answers it, without newline.  Raises as ask() does."""
    deadline = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.settimeout(timeout_s)
            sock.connect(path)
        except OSError as problem:
            raise KzorpdAway(f"kzorpd does not answer on {path}: {problem.strerror or problem}") from None
        _check_owner(sock, path)
        try:
            sock.sendall(line)
            return _first_line(sock, deadline)
        except TimeoutError:
            raise KzorpdError(f"kzorpd did not answer within {timeout_s:.0f} seconds") from None
        except OSError as problem:
            raise KzorpdError(f"kzorpd ended the connection: {problem.strerror}") from None


def _check_owner(sock: socket.socket, path: str) -> None:
    """Raises KzorpdAway when somebody else than kzorpd can have made the socket."""
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid not in (0, os.geteuid()):
        raise KzorpdAway(f"kzorpd does not answer on {path}: who listens there is user {uid}, which may be anybody; "
                         "kzorpd must run as user 0")


def _first_line(sock: socket.socket, deadline: float) -> bytes:
    reader = wire.LineReader()
    while True:
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError
        sock.settimeout(remaining_s)
        data = sock.recv(_READ_BYTES)
        if not data:
            raise KzorpdError("kzorpd ended the connection without an answer")
        try:
            lines = reader.feed(data)
        except wire.KzorpdProtocolError as problem:
            raise KzorpdError(f"kzorpd does not answer as it should: {problem}") from None
        if lines:
            return lines[0]
