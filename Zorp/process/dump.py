"""What passes through a socket, written into the log at the levels 7 to 10 of core.dump.

    core.dump(7): (...): Reading stream; fd='23', count='4'
    core.dump(9): (...): data line 0x0000: 51 55 49 54                                      QUIT

Theory of operation
    watched() makes of a socket one that reports what it reads and writes; Stream asks for that when
    core.dump is written at the moment the stream is made, so whoever turns the level up sees the
    sessions that begin afterwards, and all others cost nothing.  Such a socket is never spliced.
    The session of a line is the thread's.

    Level 9 writes passwords and mail: it is for an administrator who looks for a fault.
"""

from __future__ import annotations

import socket

from Zorp import Log
from Zorp.Log import enabled, log

CORE_DUMP = "core.dump"
COUNTS, CHANNELS, BYTES = 7, 8, 9
_ROW_BYTES = 16
_PLAIN = (socket.SocketType, socket.socket)


def is_wanted() -> bool:
    """True when the log takes at least the counts."""
    return Log.loudest >= COUNTS and Log.current_filter().effective(CORE_DUMP) >= COUNTS


def watched(sock: socket.SocketType) -> socket.SocketType:
    """Return a socket that reports what passes; it has the descriptor of this one, which has none any more.

    One of a kind of its own is returned as it is.
    """
    if type(sock) not in _PLAIN:
        return sock
    return WatchedSocket(sock.family, sock.type, sock.proto, sock.detach())


class WatchedSocket(socket.socket):
    """A socket that writes into the log what passes."""

    __slots__ = ()

    def recv(self, *arguments) -> bytes:
        data = super().recv(*arguments)
        if data:
            _report("Reading", self.fileno(), data)
        else:
            log(None, CORE_DUMP, CHANNELS, "Reading EOF on channel; fd='%d'", (self.fileno(),))
        return data

    def send(self, data, *arguments) -> int:
        sent = super().send(data, *arguments)
        _report("Writing", self.fileno(), bytes(memoryview(data)[:sent]))
        return sent


def _report(what: str, fd: int, data: bytes) -> None:
    log(None, CORE_DUMP, COUNTS, what + " stream; fd='%d', count='%d'", (fd, len(data)))
    if not enabled(CORE_DUMP, BYTES):
        return
    for offset in range(0, len(data), _ROW_BYTES):
        row = data[offset:offset + _ROW_BYTES]
        text = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in row)
        log(None, CORE_DUMP, BYTES, "data line 0x%04x: %s%s %s", (
            offset, "".join(f"{byte:02X} " for byte in row), "   " * (_ROW_BYTES - len(row)), text))
