"""The two connections of an SMTP session, as lines, replies and blocks instead of bytes.

Theory of operation
    Each side owns the parser of what its peer sends and works on a Stream, which may be
    replaced between two reads (that is how TLS gets in).  Every wait is bounded: the first byte
    of a line or reply may take `idle_ms`, everything up to its end `command_ms` more.

    What goes wrong with a connection becomes SideLost, after it was logged.  The log names the
    stream, not the proxy, as every reader of lines does here.

    Whole lines and replies go out in one write, and whoever accepts or connects has set
    TCP_NODELAY: nothing waits for a timer.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable

from Zorp.Log import log
from Zorp.Stream import Stream, StreamTimeout
from Zorp.wire.errors import WireError
from Zorp.wire.limits import SmtpLimits
from Zorp.wire.smtp_commands import may_hold_credentials
from Zorp.wire.smtp_lines import LineError, LineReader
from Zorp.wire.smtp_replies import Reply, ReplyReader
from Zorp.wire.text import to_wire

_LINE_RECV_BYTES = 464           # nearly all lines and replies; as much as fits the interpreter's own small blocks
_MORE_RECV_BYTES = 8192          # when it was not all
_BLOCK_BYTES = 65536
_LINE_END_BYTES = 2
HIDDEN = "(hidden)"              # in place of what may be a secret


class SideLost(Exception):
    """The connection is gone, silent for too long, or sends what has no meaning."""

    def __init__(self, *, timed_out: bool = False) -> None:
        super().__init__()
        self.timed_out = timed_out


class _Side:
    """What both sides have."""

    _limits: SmtpLimits
    _lines: LineReader
    _stream: Stream

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when the peer sends."""
        return self._stream.fileno()

    def use(self, stream: Stream) -> None:
        """Talk over this stream from now on."""
        self._stream = stream
        stream.timeout_ms = self._limits.idle_ms

    def send(self, data: bytes) -> None:
        """Send all of it; raises SideLost."""
        try:
            self._stream.send(data)
        except OSError as problem:
            raise SideLost(timed_out=isinstance(problem, StreamTimeout)) from problem

    def _recv(self, limit_bytes: int, deadline: float | None = None) -> bytes:
        try:
            if data := self._stream.recv(limit_bytes, deadline):
                return data
        except OSError as problem:
            raise self._lost(problem) from problem
        raise SideLost

    def _lost(self, problem: OSError) -> SideLost:
        self._report(problem)
        return SideLost(timed_out=isinstance(problem, StreamTimeout))

    def _deadline(self) -> float:
        return time.monotonic() + self._limits.command_ms / 1000

    def _report(self, problem: object) -> None:
        log(self._stream.name, "core.error", 3, "Error while fetching line; error='%s'", (problem,))


class ClientSide(_Side):
    """The client: command lines, and the blocks of a message.

    long_auth: an AUTH command may be longer than other lines; the dialogue sets it.
    expects_secret: lines may hold credentials and are not shown; since AUTH, until a command that we know
    (the dialogue sets it: a client that does not wait for replies sends its secrets whatever they are).
    proxy: nothing more is read when it was asked to stop, and what is read at that moment ends; what
    we still have to say goes out (SmtpProxy._wake).
    """

    def __init__(self, stream: Stream, limits: SmtpLimits, *, require_crlf: bool, proxy) -> None:
        self._limits = limits
        self._lines = LineReader(require_crlf=require_crlf)
        self._proxy = proxy
        self.long_auth = False
        self.expects_secret = False
        self.use(stream)

    def _recv(self, limit_bytes: int, deadline: float | None = None) -> bytes:
        if self._proxy._stop_requested:
            raise SideLost
        return super()._recv(limit_bytes, deadline)

    def read_line(self, limit_bytes: int = 0) -> bytes:
        """Return the next line, without its end; raises SideLost.

        limit_bytes: longest line, with its end; 0: what holds for commands.
        """
        if self._proxy._stop_requested:
            raise SideLost
        if not limit_bytes:
            if self.long_auth:
                return self._read_long_line()
            limit_bytes = self._limits.line_bytes
        lines = self._lines
        try:
            line = lines.line_in(b"" if lines.buffered else self._stream.recv(_LINE_RECV_BYTES), limit_bytes)
            if line is None:                        # a part of it, or end of file
                deadline = self._deadline()
                while line is None:
                    line = lines.line_in(self._recv(_MORE_RECV_BYTES, deadline), limit_bytes)
        except LineError as problem:
            self._report(self._without_secret(problem))
            raise SideLost from problem
        except OSError as problem:
            raise self._lost(problem) from problem
        return line

    def _read_long_line(self) -> bytes:
        line_bytes = self._limits.line_bytes
        line = self.read_line(max(line_bytes, self._limits.sasl_line_bytes + _LINE_END_BYTES))
        if len(line) + _LINE_END_BYTES > line_bytes and line[:5].upper() != b"AUTH ":
            self._report(f"Line too long, buffer=[{HIDDEN}], max_line_length=[{line_bytes}]")
            raise SideLost
        return line

    def read_sasl_line(self) -> bytes:
        """Return the next line of a SASL dialogue; may be one byte longer than the limit says."""
        return self.read_line(self._limits.sasl_line_bytes + 1 + _LINE_END_BYTES)

    def _without_secret(self, problem: LineError) -> str:
        buffer, *others = problem.fields
        if self.expects_secret or may_hold_credentials(to_wire(buffer, one_line=False)):
            buffer = HIDDEN
        return problem.text % (buffer, *others)

    def read_block(self) -> bytes:
        """Return what has come, at least one byte, whatever it is; raises SideLost."""
        return self._lines.take() if self._lines.buffered else self._recv(_BLOCK_BYTES)

    def read_octets(self, count: int) -> bytes:
        """Return at least one and at most `count` bytes; raises SideLost."""
        if self._lines.buffered:
            return self._lines.take_at_most(count)
        return self._recv(min(count, _BLOCK_BYTES))

    def put_back(self, data: bytes) -> None:
        """Give back what was read with a block and belongs to the next command."""
        if data:
            self._lines.feed(data)

    @property
    def has_more(self) -> bool:
        """True when bytes have been received and not looked at yet."""
        return bool(self._lines.pending)

    def talks_within(self, wait_ms: int) -> bool:
        """Wait for up to `wait_ms`; tell whether the client sent something."""
        return bool(self._lines.buffered) or _readable(self._stream.fileno(), wait_ms)


class ServerSide(_Side):
    """The server: replies, and whether it speaks without being asked."""

    def __init__(self, stream: Stream, limits: SmtpLimits, *, require_crlf: bool,
                 on_cut: Callable[[int], None] | None) -> None:
        self._limits = limits
        self._lines = LineReader(require_crlf=require_crlf)
        self._replies = ReplyReader(self._lines, limits, on_cut=on_cut)
        self.use(stream)

    def use(self, stream: Stream) -> None:
        super().use(stream)
        self._poll = select.poll()
        self._poll.register(stream.fileno(), select.POLLIN)

    @property
    def eight_bit(self) -> bool:
        """Bytes above 0x7E stay in replies."""
        return self._replies.eight_bit

    @eight_bit.setter
    def eight_bit(self, stays: bool) -> None:
        self._replies.eight_bit = stays

    def read_reply(self) -> Reply:
        """Return the next reply; raises SideLost, or ReplyError when it is none."""
        replies = self._replies
        try:
            reply = replies.reply_in(b"" if self._lines.buffered else self._stream.recv(_LINE_RECV_BYTES))
            if reply is None:                       # a part of it, or end of file
                deadline = self._deadline()
                while reply is None:
                    reply = replies.reply_in(self._recv(_MORE_RECV_BYTES, deadline))
        except LineError as problem:
            self._report(problem)
            raise SideLost from problem
        except OSError as problem:
            raise self._lost(problem) from problem
        return reply

    def speaks(self) -> bool:
        """Tell, without waiting, whether the server said something that nobody asked for, or hung up."""
        return bool(self._lines.buffered or self._replies.unfinished or self._poll.poll(0))

    def unasked(self) -> Reply | None:
        """Return the reply that nobody asked for, None when what came is no complete reply.  Raises SideLost."""
        try:
            if (reply := self._replies.next_reply()) is None and self._poll.poll(0):
                reply = self._replies.reply_in(self._recv(_MORE_RECV_BYTES))
        except WireError as problem:
            self._report(problem)
            return None
        return reply


def _readable(fd: int, wait_ms: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(wait_ms))
