"""Where log lines go: the system log, or standard error; never a reason to wait.

Theory of operation
    A sink formats a record into one packet and writes it without blocking.  What cannot be
    written now waits in a bounded line, in order; what does not fit into the line is counted,
    and the count is written as soon as there is room again.  The loop of the process calls
    flush() while `waiting` is true; on_backlog tells it that this has begun.

    Between hold() and let_go() of a thread its lines for a descriptor are collected and written
    at once, the three at the end of a session for example; a line of level 2 or below takes with
    it what was collected.  A process that is killed in between loses them, so this is for stretches
    that run no policy code and hardly wait: half a second at the worst, for a peer that goes on
    sending.  The system log gets each line at once.

    The system log is tried as a stream socket first, then as a datagram socket, and opened
    again when it went away; while it is away, lines wait.  Standard error is polled before it
    is written when it is a pipe or a socket, because its blocking mode belongs to others.

    A record is written in one of three forms: classic (the form of the original), rfc5424, json.
    What the supervisor says of its own has the same form, with its own name and a severity that
    wakes somebody; in the classic form it is the bare text of the original.
    The latter two carry the values of the fields as they were, in JSON to the byte, in RFC 5424
    with control characters as <XX>; their text is the classic line's.

Threads
    Any thread may log.  _line_lock guards the waiting line and the socket; with nothing waiting a
    datagram, and a line for a file or terminal, go out without it.
"""

from __future__ import annotations

import abc
import collections
import json
import os
import re
import select
import socket
import stat
import threading
import time
from collections.abc import Callable

from Zorp.Log import HARMFUL, QUOTE, escaped, line_of

PACKET_BYTES = 8191              # what receivers of the original were built for
MAX_WAITING_BYTES = 4 << 20
_RETRY_S = 1.0                   # between attempts to reach a system log that is away
_AT_ONCE_LEVEL = 2               # lines of this level and below are never held back
_STDERR_POLL_BYTES = 4096        # what a pipe that polls writable takes without blocking
_FACILITY_LOCAL6 = 22
_DAEMON_CRIT = 3 * 8 + 2
_INFO = 6
_SUPERVISOR_CHARS = 31           # of its name in the system log
_SUPERVISOR_RECORD = "core.error", 0, "nosession"
_FIELD = re.compile(r"([A-Za-z0-9_]+)='([^']*)'")
_IN_PARAMETER = re.compile(r'["\\\]]')                # RFC 5424 section 6.3.3
_PARAMETER_NAME_CHARS = 32
_SD_ID, _FIELDS_SD_ID = "zorp@32473", "fields@32473"
_HARMFUL_IN_JSON = re.compile(f"[{HARMFUL}\ud800-\udfff]")


def severity_of(tag: str, level: int) -> int:
    """The syslog severity for --log-severity."""
    if level == 1:
        return 3 if tag.endswith(".error") else 4
    for highest, severity in ((0, 3), (2, 4), (3, 5), (5, 6)):
        if level <= highest:
            return severity
    return 7


class _Clock:
    """The date in front of a line, made once per second."""

    def __init__(self, form: str) -> None:
        self._form = form
        self.made: tuple[int, str] = (-1, "")         # the second and its text

    def __call__(self) -> str:
        now = int(time.time())
        second, text = self.made
        if second != now:
            text = time.strftime(self._form, time.localtime(now))
            self.made = (now, text)
        return text


class Formatter:
    """From a record to the text of one packet."""

    def __init__(self, form: str, instance: str, *, severity: bool = False) -> None:
        """form: classic, rfc5424 or json."""
        self._instance = instance
        self._severity = severity
        self._host = socket.gethostname() or "-"
        self._syslog_date = _Clock("%b %e %H:%M:%S")
        self._plain_date = _Clock("%b %d %H:%M:%S")
        self._text_of = self.plain = getattr(self, f"_{form}")     # plain: the line for standard error
        self.classic = form == "classic"

    def syslog(self, tag: str, level: int, session: str | None, text: str) -> str:
        """The packet for the system log."""
        priority = _FACILITY_LOCAL6 * 8 + (severity_of(tag, level) if self._severity else _INFO)
        if self.classic:
            return (f"<{priority}>{self._syslog_date()} zorp/{self._instance}[{os.getpid()}]: "
                    f"{line_of(tag, level, session, text)}")
        if self._text_of == self._json:
            return (f"<{priority}>{self._syslog_date()} zorp/{self._instance}[{os.getpid()}]: "
                    f"{self._json(tag, level, session, text)}")
        return f"<{priority}>{self._rfc5424(tag, level, session, text)}"

    def supervisor_packet(self, name: str, text: str) -> str:
        """The packet for the system log with what the supervisor of a process says."""
        program = f"supervise/{name}"[:_SUPERVISOR_CHARS]
        if self._text_of == self._rfc5424:
            return f"<{_DAEMON_CRIT}>{self._rfc5424(*_SUPERVISOR_RECORD, text, program=program)}"
        text = text if self.classic else self._json(*_SUPERVISOR_RECORD, text)
        return f"<{_DAEMON_CRIT}>{self._syslog_date()} {program}[{os.getpid()}]: {text}"

    def supervisor_line(self, name: str, text: str) -> str:
        """The line for standard error with what the supervisor of a process says, where the log is written, too."""
        return f"{name}: {text}" if self.classic else self.plain(*_SUPERVISOR_RECORD, text)

    def _classic(self, tag, level, session, text) -> str:
        second, date = self._plain_date.made
        if second != int(time.time()):
            date = self._plain_date()
        if session is None:              # as line_of(), without the call
            return f"{date} {tag}({level}): {text}"
        return f"{date} {tag}({level}): ({session}): {text}"

    def _rfc5424(self, tag, level, session, text, program="") -> str:
        fields = "".join(f' {name[:_PARAMETER_NAME_CHARS]}="{_parameter(value)}"' for name, value in _fields(text))
        return (f"1 {_iso_time()} {self._host} {program or f'zorp/{self._instance}'} {os.getpid()} {tag} "
                f'[{_SD_ID} level="{level}" session="{_parameter(session or "-")}"]'
                + (f"[{_FIELDS_SD_ID}{fields}]" if fields else "") + f" {escaped(text)}")

    def _json(self, tag, level, session, text) -> str:
        line = json.dumps({
            "time": _iso_time(), "host": self._host, "instance": self._instance, "pid": os.getpid(), "tag": tag,
            "level": level, "session": session, "message": escaped(text.partition(";")[0]),
            "fields": dict(_fields(text)), "text": escaped(text)}, ensure_ascii=False)
        return _HARMFUL_IN_JSON.sub(_in_json, line)


def _fields(text: str) -> list[tuple[str, str]]:
    """Return names and true values of the fields of a structured record's text."""
    return [(name, value.replace(QUOTE, "'")) for name, value in _FIELD.findall(text)]


def _in_json(found: re.Match) -> str:
    units = found[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at:at + 2].hex()}" for at in range(0, len(units), 2))


def _parameter(value: str) -> str:
    return _IN_PARAMETER.sub(r"\\\g<0>", escaped(value))


def _iso_time() -> str:
    now = time.time()
    zone = time.strftime("%z", time.localtime(now))
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now))
    return f"{moment}.{int(now % 1 * 1_000_000):06d}{zone[:3]}:{zone[3:]}"


class _Held(threading.local):
    """The lines that a thread has written since hold(); None: it has not called hold()."""

    lines: list[str] | None = None


class Sink(abc.ABC):
    """What both sinks share: the waiting line and the count of what did not fit."""

    on_backlog: Callable[[], None] | None = None

    def __init__(self, formatter: Formatter) -> None:
        self._formatter = formatter
        self._line_lock = threading.Lock()
        self._line: collections.deque[bytes] = collections.deque()
        self._line_bytes = 0
        self._dropped = 0

    @property
    def waiting(self) -> bool:
        """True while flush() has something to do."""
        return bool(self._line or self._dropped)

    @abc.abstractmethod
    def __call__(self, tag: str, level: int, session: str | None, text: str) -> None:
        """Write one record; what Zorp.Log calls."""

    @abc.abstractmethod
    def _write(self, packet: bytes) -> int:
        """Write without blocking; return the bytes taken, 0 when none can be taken now."""

    @abc.abstractmethod
    def _descriptor(self) -> int | None:
        """Return what becomes writable when more can be written; None: nobody can tell."""

    def duplicate(self) -> int | None:
        """Return a descriptor of the caller's own to wait for, None when there is none."""
        with self._line_lock:            # nobody closes it meanwhile
            descriptor = self._descriptor()
            try:
                return os.dup(descriptor) if descriptor is not None else None
            except OSError:
                return None              # no descriptor left

    def _send(self, packet: bytes) -> None:
        with self._line_lock:
            first = not self._line
            if first:
                taken = self._write(packet)
                if taken == len(packet):
                    return
                packet = packet[taken:]
            if self._line_bytes + len(packet) > MAX_WAITING_BYTES:
                self._dropped += 1
            else:
                self._line.append(packet)
                self._line_bytes += len(packet)
        if first and self.on_backlog is not None:
            self.on_backlog()

    def forget(self) -> None:
        """After a fork: what waits is our parent's to write."""
        with self._line_lock:
            self._line.clear()
            self._line_bytes = self._dropped = 0

    def flush(self) -> bool:
        """Write what waits; True when nothing waits any more."""
        with self._line_lock:
            while self._line:
                taken = self._write(self._line[0])
                self._line_bytes -= taken
                if taken < len(self._line[0]):
                    self._line[0] = self._line[0][taken:]
                    return False
                self._line.popleft()
            dropped, self._dropped = self._dropped, 0
        if dropped:
            self("core.error", 1, "nosession", f"Log messages dropped; count='{dropped}'")
        return not self._line


class StderrSink(Sink):
    """Lines to a descriptor, standard error usually."""

    def __init__(self, formatter: Formatter, descriptor: int = 2) -> None:
        super().__init__(formatter)
        self._descriptor_number = descriptor
        self._held = _Held()
        self._poller = None
        try:
            mode = os.fstat(descriptor).st_mode
        except OSError:
            mode = 0                     # whoever started us closed it: what is written is lost
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            self._poller = select.poll()
            self._poller.register(descriptor, select.POLLOUT)

    def __call__(self, tag: str, level: int, session: str | None, text: str) -> None:
        line = self._formatter.plain(tag, level, session, text) + "\n"
        held = self._held.lines
        if held is not None:
            held.append(line)
            if level > _AT_ONCE_LEVEL:
                return
            self._held.lines = []
            line = "".join(held)
        self.packet(line.encode("utf-8", "backslashreplace"))

    def hold(self) -> None:
        """The lines of this thread may wait for let_go(), to be written at once."""
        if self._held.lines is None:
            self._held.lines = []

    def let_go(self) -> None:
        """Write what this thread's lines since hold() are."""
        held = self._held.lines
        if held is not None:
            self._held.lines = None
            if held:
                self.packet("".join(held).encode("utf-8", "backslashreplace"))

    def packet(self, packet: bytes) -> None:
        """Write whole lines as they are."""
        if self._poller is None and not self._line:
            try:
                taken = os.write(self._descriptor_number, packet)
            except OSError:
                taken = 0                # _send() finds out what is wrong
            if taken == len(packet):
                return
            packet = packet[taken:]
        self._send(packet)

    def _descriptor(self) -> int | None:
        return self._descriptor_number

    def _write(self, packet: bytes) -> int:
        taken = 0
        try:
            while taken < len(packet) and (self._poller is None or self._poller.poll(0)):
                part = packet[taken:taken + _STDERR_POLL_BYTES] if self._poller is not None else packet[taken:]
                taken += os.write(self._descriptor_number, part)
        except BlockingIOError:
            return taken
        except OSError:                  # nobody reads any more: there is nowhere left to complain
            return len(packet)
        return taken


class SyslogSink(Sink):
    """Packets to the system log."""

    def __init__(self, formatter: Formatter, path: str = "/dev/log",
                 clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(formatter)
        self._path = path
        self._clock = clock
        self._socket: socket.socket | None = None
        self._is_stream = False
        self._not_before_s = 0.0
        self.open()

    def __call__(self, tag: str, level: int, session: str | None, text: str) -> None:
        packet = self._formatter.syslog(tag, level, session, text).encode("utf-8", "backslashreplace")
        self.packet(packet)

    def packet(self, packet: bytes) -> None:
        """Send one packet as it is, cut to what receivers take."""
        packet = packet[:PACKET_BYTES - 1] + b"\n"
        sock = self._socket
        if sock is not None and not self._is_stream and not self._line:
            try:
                sock.send(packet)
                return
            except OSError:
                pass                     # _send() finds out what is wrong
        self._send(packet)

    def open(self) -> bool:
        """Connect to the system log; False when it is not there."""
        self.close()
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            try:
                sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK)
            except OSError:                  # no descriptor left: as if it were away
                break
            try:
                sock.connect(self._path)
            except OSError:
                sock.close()
                continue
            self._socket, self._is_stream = sock, kind == socket.SOCK_STREAM
            return True
        self._not_before_s = self._clock() + _RETRY_S
        return False

    def close(self) -> None:
        """Let go of the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _write(self, packet: bytes) -> int:
        for _attempt in range(2):
            if self._socket is None and (self._clock() < self._not_before_s or not self.open()):
                return 0
            try:
                return self._socket.send(packet)
            except BlockingIOError:
                return 0
            except OSError:
                self.close()
                if not packet.startswith(b"<"):
                    return len(packet)   # a rest: its beginning went to the receiver that is gone
        return 0

    def _descriptor(self) -> int | None:
        return self._socket.fileno() if self._socket is not None else None

    def reopen(self) -> None:
        """Use a connection of our own after a fork, if there is one to get."""
        old, self._socket = self._socket, None
        if not self.open() and old is not None:
            self._socket = old           # chroot: the path is out of reach, the open socket still works
        elif old is not None:
            old.close()


class Throttle:
    """At most so many lines per second with the same tag and text; reports what it held back.

    Any thread may call.  _counts_lock guards _counts and _held.
    """

    def __init__(self, lines_per_second: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = lines_per_second
        self._clock = clock
        self._counts_lock = threading.Lock()
        self._second = -1
        self._counts: collections.Counter[tuple[str, str]] = collections.Counter()
        self._held = 0

    def __call__(self, tag: str, text: str) -> bool:
        now = int(self._clock())
        with self._counts_lock:
            if now != self._second:
                self._second = now
                self._counts.clear()
            self._counts[tag, text] += 1
            if self._counts[tag, text] <= self._most:
                return True
            self._held += 1
            return False

    def take_held(self) -> int:
        """Return how many lines were held back since the last call."""
        with self._counts_lock:
            held, self._held = self._held, 0
        return held
