"""A connected socket with deadlines, byte counters and a way to be woken up.

Theory of operation
    The descriptor stays in blocking mode and the kernel keeps the time (SO_RCVTIMEO,
    SO_SNDTIMEO): one system call per read or write, where Python's own settimeout() needs a
    poll() before each.  `timeout_ms` bounds a single call; a caller that wants to bound a
    whole dialogue step passes `deadline`, an absolute time.monotonic().

    Bytes given back with unread() come out of the next recv() first.

Threads
    One thread reads and writes.  Any other thread may call abort(): a blocked call returns at
    once (with end of file or an error), and no later call blocks.

Errors
    StreamTimeout when a bound is reached, another OSError when the connection failed.  recv()
    returns b"" at end of file.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time

_TIMEVAL = struct.Struct("@ll")
_LINGER_RESET = struct.pack("@ii", 1, 0)
_CHUNK_BYTES = 65536
_SHORTEST_WAIT_MS = 1          # 0 would mean "for ever" to the kernel


class StreamTimeout(TimeoutError):
    """Nothing could be read or written within the bound."""


def _timeval(milliseconds: int | None) -> bytes:
    if milliseconds is None:
        return _TIMEVAL.pack(0, 0)
    milliseconds = max(int(milliseconds), _SHORTEST_WAIT_MS)
    return _TIMEVAL.pack(milliseconds // 1000, milliseconds % 1000 * 1000)


class SocketStream:
    """One connected stream socket; owns the descriptor until close()."""

    __slots__ = ("_aborted", "_deadline_set", "_on_close", "_pushed_back", "_timeout_ms", "bytes_recvd", "bytes_sent",
                 "sock")

    def __init__(self, sock: socket.socket) -> None:
        if sock.gettimeout() is not None:
            sock.setblocking(True)
        self.sock = sock
        self.bytes_recvd = 0
        self.bytes_sent = 0
        self._pushed_back = b""
        self._timeout_ms: int | None = None
        self._deadline_set = False
        self._aborted = False
        self._on_close = None

    def fileno(self) -> int:
        return self.sock.fileno()

    @property
    def timeout_ms(self) -> int | None:
        """Bound of every single recv() and send() in milliseconds; None: no bound."""
        return self._timeout_ms

    @timeout_ms.setter
    def timeout_ms(self, milliseconds: int | None) -> None:
        if milliseconds == self._timeout_ms:
            return
        value = _timeval(milliseconds)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
        self._timeout_ms = milliseconds
        self._deadline_set = False

    def recv(self, limit: int = _CHUNK_BYTES, deadline: float | None = None) -> bytes:
        """Return at least one and at most `limit` bytes, or b"" at end of file."""
        if self._pushed_back:
            data, self._pushed_back = self._pushed_back[:limit], self._pushed_back[limit:]
            return data
        if deadline is not None or self._deadline_set:
            self._bound(socket.SO_RCVTIMEO, deadline)
        try:
            data = self.sock.recv(limit)
        except BlockingIOError:
            raise StreamTimeout("nothing received in time") from None
        self.bytes_recvd += len(data)
        return data

    def unread(self, data: bytes) -> None:
        """Give back bytes: the next recv() returns them first."""
        self._pushed_back = bytes(data) + self._pushed_back

    @property
    def pending(self) -> int:
        """Number of bytes given back and not read again yet."""
        return len(self._pushed_back)

    def send(self, data) -> None:
        """Send all of `data` (any bytes-like object)."""
        length = len(data)
        sent = 0
        try:
            sent = self.sock.send(data)
            while sent < length:                       # rare: a full socket buffer
                sent += self.sock.send(memoryview(data)[sent:])
        except BlockingIOError:
            raise StreamTimeout("nothing sent in time") from None
        finally:
            self.bytes_sent += sent

    def _bound(self, option: int, deadline: float | None) -> None:
        wait_ms = self._timeout_ms
        if deadline is not None:
            left_ms = int((deadline - time.monotonic()) * 1000)
            if left_ms <= 0:
                raise StreamTimeout("deadline reached")
            wait_ms = left_ms if wait_ms is None else min(wait_ms, left_ms)
        self.sock.setsockopt(socket.SOL_SOCKET, option, _timeval(wait_ms))
        self._deadline_set = deadline is not None

    def shutdown(self, how: int) -> None:
        """Half-close; a connection that is gone already is no error."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(how)

    def abort(self) -> None:
        """Wake whoever is blocked on this stream; for any thread, never raises."""
        self._aborted = True
        self.shutdown(socket.SHUT_RDWR)

    @property
    def aborted(self) -> bool:
        """True after abort(): end of file then means "we were told to stop"."""
        return self._aborted

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        self.sock.close()
        self._closed()

    def reset(self) -> None:
        """Close with a TCP reset instead of an orderly end."""
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
        self.sock.close()
        self._closed()

    def on_close(self, callback) -> None:
        """Have `callback()` called once, when the stream is closed; a later one replaces it."""
        self._on_close = callback

    def _closed(self) -> None:
        callback, self._on_close = self._on_close, None
        if callback is not None:
            callback()
