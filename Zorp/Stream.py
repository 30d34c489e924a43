"""Connections as policies see them: named, counted, readable by bytes or by lines.

Theory of operation
    Stream adds to a SocketStream what policy code uses: a name for logs, the keepalive and
    nonblocking switches, read(), readline() and write() with the exceptions of the original.
    Texts are str with one character per byte.  The proxies of this package use recv(), send()
    and unread() of SocketStream instead; both ways may be mixed, no byte is lost between them.

    readline() works after push_lines(limit): lines end in CRLF or LF and come without it; the
    limit counts the end.  With `raw` set, read() and readline() give bytes instead of text.
    At end of file pending text is the last line.  A line longer than the limit breaks the
    reader for good, unless `split` delivers it in pieces; NUL in a line does the same, unless
    `nul_nonfatal`.

    Closing writes one accounting line under the stream's name: seconds since the stream was
    made, bytes sent to and received from this peer.

    Local sockets carry no reset, so the two streams of streamPair() know each other: when one of
    them is reset, or its owner says that it broke off (break_off), the other one's reader gets a
    ConnectionResetError where the end of file would have been.

Deviations
    Setting an unknown attribute is an AttributeError in Python's own words: to have the original's
    would cost every connection a microsecond for each attribute that is set.
"""

from __future__ import annotations

import errno
import os
import socket
import time
import weakref

from Zorp import Log
from Zorp.Log import enabled, log
from Zorp.process import dump
from Zorp.transport.stream import DEFAULT_BYTES, SocketStream, StreamTimeout

G_IO_STATUS_ERROR = 0
G_IO_STATUS_NORMAL = 1
G_IO_STATUS_EOF = 2
G_IO_STATUS_AGAIN = 3

_NAME_CHARACTERS = 127

__all__ = [
    "G_IO_STATUS_AGAIN", "G_IO_STATUS_EOF", "G_IO_STATUS_ERROR", "G_IO_STATUS_NORMAL",
    "Stream", "StreamException", "StreamTimeout", "streamPair",
]


class StreamException(Exception):
    """read() or readline() failed; args are (status, partial line or None)."""


class Stream(SocketStream):
    """A connection with a name.

    Arguments:
        fd: a connected socket object, or the number of a descriptor, which is taken over.
        name: for logs; at most 127 characters are kept.
    """

    __slots__ = ("_created", "_line_limit", "_lines_broken", "_name", "_nonblocking", "nul_nonfatal", "raw", "split")

    def __init__(self, fd, name=""):
        super().__init__(fd if isinstance(fd, socket.SocketType) else socket.socket(fileno=int(fd)))
        self._created = time.monotonic()
        self._line_limit = 0
        self._lines_broken = False
        self._nonblocking = False
        self.split = 0
        self.nul_nonfatal = 0
        self.raw = 0
        self._name = name[:_NAME_CHARACTERS]
        if Log.loudest >= dump.COUNTS and dump.is_wanted():
            self.sock = dump.watched(self.sock)

    @property
    def fd(self):
        """The descriptor's number; -1 after close()."""
        return self.sock.fileno()

    def __int__(self):
        return self.sock.fileno()

    @property
    def name(self):
        """What logs call this stream."""
        return self._name

    @name.setter
    def name(self, value):
        if not isinstance(value, str):
            raise TypeError("Stream name is not a string")
        self._name = value[:_NAME_CHARACTERS]

    def __repr__(self):
        return self._name

    @property
    def keepalive(self):
        """TCP keepalive probes, 0 or 1 (any true value switches them on)."""
        return self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)

    @keepalive.setter
    def keepalive(self, value):
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1 if value else 0)

    @property
    def nonblocking(self):
        """1 when read() and readline() never wait."""
        return int(self._nonblocking)

    @nonblocking.setter
    def nonblocking(self, value):
        self._nonblocking = bool(value)
        os.set_blocking(self.sock.fileno(), not value)

    def shutdown(self, how):
        """Half-close as socket.shutdown() does; a connection that is gone already is no error."""
        if Log.loudest >= 6 and enabled("core.debug", 6):
            log(self._name, "core.debug", 6, "Shutdown channel; fd='%d', mode='%d'", (self.fd, how))
        super().shutdown(how)

    def close(self):
        """Close and account; a second call does nothing."""
        if self.sock.fileno() < 0:
            return
        if Log.loudest >= 6:
            log(self._name, "core.debug", 6, "Closing stream; type='ZStreamFD'")
        super().close()
        self._account()

    def reset(self):
        """Close with a TCP reset instead of an orderly end, and account."""
        if self.fd >= 0:
            super().reset()
            self._account()

    def break_off(self):
        """Have the peer's reader see a reset where this stream ends; only a peer in this process can be told."""

    def _account(self):
        if Log.loudest >= 4:
            log(self._name, "core.accounting", 4,
                "accounting info; type='ZStreamFD', duration='%d', sent='%d', received='%d'",
                (time.monotonic() - self._created, self.bytes_sent, self.bytes_recvd))

    def read(self, count):
        """Return 1 to `count` bytes as text; raises StreamException at end of file or failure."""
        data = self._recv_for_policy(count)
        if not data:
            raise StreamException(G_IO_STATUS_EOF, None)
        return self._given(data)

    def _given(self, data):
        """Return bytes in the form that the policy wants."""
        return data if self.raw else data.decode("latin-1")

    def push_lines(self, limit_bytes):
        """Put a line reader on the stream: readline() accepts lines up to `limit_bytes`, their end included."""
        self._line_limit = limit_bytes

    def readline(self):
        """Return one line as text, without its end; raises StreamException."""
        if self._lines_broken or not self._line_limit:
            raise StreamException(G_IO_STATUS_ERROR, None)
        text = b""
        while (end := text.find(b"\n")) < 0 and len(text) < self._line_limit:
            data = self._recv_line_part(text)
            if not data:
                return self._last_line(text)
            text += data
        if 0 <= end < self._line_limit:
            self.unread(text[end + 1:])
            return self._checked(text[:end].removesuffix(b"\r"))
        return self._too_long(text)

    def _recv_line_part(self, text):
        try:
            return self._recv_for_policy(self._line_limit)
        except StreamException as problem:
            self.unread(text)                       # a later call goes on where this one stopped
            raise StreamException(problem.args[0], None) from None

    def _last_line(self, text):
        if not text:
            raise StreamException(G_IO_STATUS_EOF, None)
        return self._checked(text)

    def _checked(self, line):
        if b"\0" in line and not self.nul_nonfatal:
            self._break_lines("Invalid line, embedded NUL character found, buffer=[%s]", (line,))
        return self._given(line)

    def _too_long(self, text):
        if self.split:
            self.unread(text[self._line_limit:])
            raise StreamException(G_IO_STATUS_AGAIN, self._given(text[:self._line_limit]))
        return self._break_lines("Line too long, buffer=[%s], max_line_length=[%d]",
                                 (text[:self._line_limit], self._line_limit))

    def _break_lines(self, problem, arguments):
        self._lines_broken = True
        log(None, "core.error", 3, f"Error while fetching line; error='{problem}'", arguments)
        raise StreamException(G_IO_STATUS_ERROR, None)

    def _recv_for_policy(self, count):
        try:
            return self.recv(count)
        except StreamTimeout:
            status = G_IO_STATUS_AGAIN if self._nonblocking else G_IO_STATUS_ERROR
            raise StreamException(status, None) from None
        except OSError:
            raise StreamException(G_IO_STATUS_ERROR, None) from None

    def write(self, buf):
        """Send all of `buf`, text with one character per byte or bytes; raises IOError."""
        data = buf.encode("latin-1") if isinstance(buf, str) else buf
        try:
            self.send(data)
        except OSError:
            raise OSError("I/O error writing stream.") from None


class _PairedStream(Stream):
    """One of the two streams of streamPair().

    `broken` is written by the thread of the other one, before it closes; our reader looks at it
    when it has read the end.  A stream that nobody holds any more is closed: its twin does not hold it.
    """

    __slots__ = ("__weakref__", "_twin", "broken")

    def __init__(self, sock, name):
        super().__init__(sock, name)
        self.broken = False
        self._twin = None

    def join(self, twin):
        """Make this stream and another one the two of a pair."""
        self._twin, twin._twin = weakref.ref(twin), weakref.ref(self)

    def break_off(self):
        twin = self._twin()
        if twin is not None:
            twin.broken = True

    def recv(self, limit=DEFAULT_BYTES, deadline=None):
        data = super().recv(limit, deadline)
        if not data and self.broken:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        return data

    def reset(self):
        self.break_off()
        super().reset()


def streamPair(domain, type, proto=0):
    """Return two connected streams; raises IOError when the host refuses."""
    try:
        sockets = socket.socketpair(domain, type, proto)
    except OSError:
        raise OSError("I/O error during socketpair.") from None
    a, b = map(_PairedStream, sockets, ("streamPair/A", "streamPair/B"))
    a.join(b)
    return a, b
