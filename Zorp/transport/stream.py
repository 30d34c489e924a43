"""A connected socket with deadlines, byte counters and a way to be woken up.

Theory of operation
    The descriptor stays in blocking mode and the kernel keeps the time (SO_RCVTIMEO; SO_SNDTIMEO
    once a write has to wait): one system call per read or write, where Python's own settimeout()
    needs a poll() before each.  `timeout_ms` bounds a single call; a caller that wants to bound a
    whole dialogue step passes `deadline`, an absolute time.monotonic().

    Bytes given back with unread() come out of the next recv() first.

    How to close: close() while the peer's bytes lie unread makes the kernel reset the connection,
    and the peer may lose the end of what we sent; after shutdown(SHUT_RD), on the other hand, the
    kernel tells the peer of no more room, and one that is still sending waits for nothing for up
    to a minute.  end_reading() is what comes before close(): it discards, within bounds, what a
    peer is still sending, and does nothing where the peer has said that it is done.

Threads
    One thread reads and writes.  Any other thread may call abort(): a blocked call returns at
    once (with end of file or an error), and no later call blocks.

Errors
    StreamTimeout when a bound is reached, another OSError when the connection failed.  recv()
    returns b"" at end of file.
"""

from __future__ import annotations

import contextlib
import functools
import select
import socket
import struct
import time

_TIMEVAL = struct.Struct("@ll")
_LINGER_RESET = struct.pack("@ii", 1, 0)
DEFAULT_BYTES = 65536          # of one recv()
_SHORTEST_WAIT_MS = 1          # 0 would mean "for ever" to the kernel
DISCARD_BYTES = 1 << 20        # of a peer that goes on sending at the end
DISCARD_MS = 500
_DONTWAIT = int(socket.MSG_DONTWAIT)
_DISCARD_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_TRUNC)
_FIN_WAIT = (4, 5)             # TCP states: we have sent our end, the peer has not
_LONGEST_WAIT_MS = 86_400_000  # poll() takes an int of C, and a policy may set the largest one as timeout


class StreamTimeout(TimeoutError):
    """Nothing could be read or written within the bound."""


def ms_until(due_s: float) -> float:
    """Return how long poll() may wait for a moment of the monotonic clock: at most a day, 0 when it has passed."""
    return min(max((due_s - time.monotonic()) * 1000, 0.0), _LONGEST_WAIT_MS)


@functools.lru_cache(maxsize=64)           # the bounds that policies set are few
def _timeval(milliseconds: int | None) -> bytes:
    if milliseconds is None:
        return _TIMEVAL.pack(0, 0)
    milliseconds = max(int(milliseconds), _SHORTEST_WAIT_MS)
    return _TIMEVAL.pack(milliseconds // 1000, milliseconds % 1000 * 1000)


_SINK = bytearray(DEFAULT_BYTES)        # what is discarded may be written here, by any thread


# kind_of(sock): SOCK_STREAM, SOCK_DGRAM, ... as a plain number; sock.type builds a member of an enumeration each time
kind_of = socket.SocketType.type.__get__


def _peer_goes_on(sock: socket.socket) -> bool:
    """True for a TCP connection whose writing end only we have closed."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        return False
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in _FIN_WAIT


class SocketStream:
    """One connected stream socket; owns the descriptor until close()."""

    broken = False                     # True: what looks like the end of file is none (Zorp.Stream.streamPair)

    __slots__ = ("_aborted", "_deadline_set", "_on_close", "_pushed_back", "_timeout_ms", "at_eof", "bytes_recvd",
                 "bytes_sent", "kind", "sock")

    def __init__(self, sock: socket.socket) -> None:
        if sock.gettimeout() is not None:
            sock.setblocking(True)
        self.sock = sock
        self.bytes_recvd = 0
        self.bytes_sent = 0
        self.kind = kind_of(sock)
        self.at_eof = False            # the peer's end of file was read
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
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(milliseconds))
        self._timeout_ms = milliseconds
        self._deadline_set = False

    def recv(self, limit: int = DEFAULT_BYTES, deadline: float | None = None) -> bytes:
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
        if not data:
            self.at_eof = True
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
        try:
            sent = self.sock.send(data, _DONTWAIT)
        except BlockingIOError:
            sent = 0
        self.bytes_sent += sent
        if sent < len(data):                           # rare: a full socket buffer
            self._send_rest(memoryview(data)[sent:])

    def _send_rest(self, rest: memoryview) -> None:
        try:
            while rest:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(self._timeout_ms))
                sent = self.sock.send(rest)
                self.bytes_sent += sent
                rest = rest[sent:]
        except BlockingIOError:
            raise StreamTimeout("nothing sent in time") from None

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

    def wake(self) -> None:
        """Wake whoever reads from this stream or is held up by a peer that takes nothing, which is cut off.

        For any thread, never raises; whoever is woken must reset or close the stream.  To cut off
        is to tell of an end, after what was sent: only for a protocol whose peers know half a
        sentence for what it is.
        """
        with contextlib.suppress(OSError, ValueError):
            poll = select.poll()
            poll.register(self.sock, select.POLLOUT)
            self.sock.shutdown(socket.SHUT_RD if poll.poll(0) else socket.SHUT_RDWR)

    @property
    def aborted(self) -> bool:
        """True after abort(): end of file then means "we were told to stop"."""
        return self._aborted

    def end_reading(self) -> bool:
        """Discard what the peer still sends; False when the connection is better reset than closed.

        Waits only for a peer that is sending, at most DISCARD_MS and DISCARD_BYTES.  Never raises.
        """
        sock = self.sock
        try:
            if self._aborted:
                return not _peer_goes_on(sock)
            if self.at_eof or self.kind != socket.SOCK_STREAM:
                return True
            poll = select.poll()             # a look costs less than the exception of a read in vain
            poll.register(sock, select.POLLIN)
            if not poll.poll(0) or not self._discard_once():
                return True
            sock.shutdown(socket.SHUT_WR)
            return self._discard(poll, time.monotonic() + DISCARD_MS / 1000)
        except (OSError, ValueError):
            return True                      # broken already, or the descriptor is closed

    def _discard(self, poll: select.poll, deadline_s: float) -> bool:
        discarded = 0
        while discarded < DISCARD_BYTES and (left_s := deadline_s - time.monotonic()) > 0 and poll.poll(left_s * 1000):
            got = self._discard_once()
            if not got:
                return True
            discarded += got
        return discarded < DISCARD_BYTES

    def _discard_once(self) -> int:
        """Return how much was discarded now, 0 at end of file and where there is nothing."""
        try:
            return self.sock.recv_into(_SINK, 0, _DISCARD_FLAGS)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        self.sock.close()
        if self._on_close is not None:
            self._closed()

    def reset_when_closed(self) -> None:
        """Have close() be a TCP reset, also when the kernel closes, at the end of this process."""
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)

    def reset(self) -> None:
        """Close with a TCP reset instead of an orderly end."""
        self.reset_when_closed()
        self.sock.close()
        self._closed()

    def on_close(self, callback) -> None:
        """Have `callback()` called once, when the stream is closed; a later one replaces it."""
        self._on_close = callback

    def _closed(self) -> None:
        callback, self._on_close = self._on_close, None
        if callback is not None:
            callback()
