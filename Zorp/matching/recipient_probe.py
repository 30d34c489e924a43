"""Asks a mail server whether it accepts a recipient, without sending a mail.

    S: 220 ...            C: EHLO us          (HELO when refused)
    C: VRFY user@example.com                  (server is plain SMTP or offers VRFY), or
    C: MAIL FROM:<>       C: RCPT TO:<user@example.com>
    C: QUIT

Theory of operation
    ask() tries the addresses of the server in turn until one greets, has the dialogue, and
    answers ACCEPTED or REFUSED.  Only 2xx and 5xx to the decisive command count; everything
    else, and every failure, raises ProbeFailed: the caller must not take it for a verdict.

    A VRFY that the server does not really do (252, or a code that says "no such command") is
    followed by MAIL and RCPT.  VRFY 252 used to count as valid, which made the check useless.

    Addresses that hold more than printable characters never reach a command line.

Deadlines
    Each step, connecting included, takes step_seconds at most, and all of them together
    _STEPS times that.  QUIT is not waited for longer than _QUIT_SECONDS.

Threads
    A probe belongs to the thread that made it.  SharedProbes is for any thread: it lets one
    probe per address run, and whoever asks meanwhile gets its result.
"""

from __future__ import annotations

import contextlib
import enum
import re
import socket
import threading
import time
from collections.abc import Callable

from Zorp.Constants import AF_INET, AF_UNSPEC, CORE_DEBUG
from Zorp.Log import log
from Zorp.matching import host_names
from Zorp.SockAddr import from_ip_int
from Zorp.transport.connect import ConnectError, Connector, Source
from Zorp.transport.stream import SocketStream
from Zorp.wire.errors import WireError
from Zorp.wire.limits import SmtpLimits
from Zorp.wire.smtp_extensions import ehlo_keyword
from Zorp.wire.smtp_lines import LineReader
from Zorp.wire.smtp_replies import Reply, ReplyReader
from Zorp.wire.text import to_policy

_STEPS = 3
_QUIT_SECONDS = 2.0
_ADDRESS = re.compile(rb"[!-;=?-~\x80-\xff]{1,320}")       # printable, without blanks and angle brackets
_NO_VRFY = (252, 500, 502, 503, 504)


class Verdict(enum.Enum):
    """What the server said about a recipient."""

    ACCEPTED = "accepted"
    REFUSED = "refused"


class ProbeFailed(Exception):
    """No verdict.  `str()` is the reason, `verdict_text` what the matcher's exception says."""

    def __init__(self, reason: str, verdict_text: str | None = None) -> None:
        super().__init__(reason)
        self.verdict_text = verdict_text or f"SMTP error or socket failure while checking user validity ({reason})"


class SenderRefused(Exception):
    """The server does not take our sender, so it cannot be asked about recipients."""


def address_bytes(address: str) -> bytes | None:
    """Return a mail address, with or without angle brackets, as it may stand in a command; None: it may not."""
    if address.startswith("<") and address.endswith(">"):
        address = address[1:-1]
    try:
        data = address.encode("latin-1")
    except UnicodeEncodeError:
        data = address.encode("utf-8", "surrogatepass")
    return data if _ADDRESS.fullmatch(data) else None


class RecipientProbe:
    """One question to one server.

    Arguments:
        server_name, server_port: host name or address; all addresses are tried in turn.
        bind_name: host name or address to connect from; "": the kernel chooses.
        sender: of the mail that is begun, "<>" for none.
        tries_vrfy: use VRFY where the server has it.
        step_seconds: bound of one step.
    """

    def __init__(self, server_name: str, server_port: int, *, bind_name: str = "", sender: str = "<>",
                 tries_vrfy: bool = True, step_seconds: float = 30.0) -> None:
        self._server = server_name, server_port
        self._bind_name = bind_name
        self._sender = b"" if sender in ("", "<>") else address_bytes(sender)
        self._tries_vrfy = tries_vrfy
        self._step_seconds = step_seconds
        self._end = 0.0
        self._stream: SocketStream | None = None
        self._lines: LineReader | None = None
        self._replies: ReplyReader | None = None

    def ask(self, email: str) -> Verdict:
        """Return what the server says about the recipient; raises ProbeFailed or SenderRefused."""
        recipient = address_bytes(email)
        if recipient is None:
            raise ProbeFailed("address contains characters that cannot be sent")
        if self._sender is None:
            raise SenderRefused
        self._end = time.monotonic() + self._step_seconds * _STEPS
        try:
            self._connect()
            try:
                return self._dialogue(email, recipient)
            finally:
                self._quit()
        except (OSError, WireError) as problem:
            raise ProbeFailed(str(problem)) from None
        finally:
            if self._stream is not None:
                self._stream.close()

    # ------------------------------------------------------------------ connecting

    def _connect(self) -> None:
        """Connect to the first address that greets with 220; raises ProbeFailed with the last failure."""
        name, port = self._server
        reason = f"host name does not resolve; host='{name}'"
        for family, ip_int in host_names.system_names.addresses(name, AF_UNSPEC):
            problem = self._try_address(family, from_ip_int(family, ip_int, port).to_sockaddr())
            if problem is None:
                return
            reason = problem
        raise ProbeFailed(reason)

    def _try_address(self, family: int, remote: tuple) -> str | None:
        """Connect and read the greeting; return why it failed."""
        source = None
        if self._bind_name:
            own = host_names.system_names.addresses(self._bind_name, family)
            if not own:
                return f"no local address of this family; bind_name='{self._bind_name}'"
            source = Source(family, from_ip_int(*own[0], 0).to_sockaddr())
        left_seconds = min(self._step_seconds, self._end - time.monotonic())
        try:
            sock, _ = Connector(family, socket.SOCK_STREAM, remote, source=source,
                                timeout_ms=max(int(left_seconds * 1000), 1)).run()
        except ConnectError as problem:
            return problem.strerror
        self._stream = SocketStream(sock)
        self._stream.timeout_ms = int(self._step_seconds * 1000)
        self._lines = LineReader(require_crlf=False)
        self._replies = ReplyReader(self._lines, SmtpLimits(), on_cut=lambda length: None)
        try:
            greeting = self._reply()
        except (OSError, WireError) as problem:
            self._stream.close()
            return str(problem)
        if greeting.code == 220:
            return None
        self._quit()
        self._stream.close()
        return _text(greeting)

    # ------------------------------------------------------------------ the dialogue

    def _dialogue(self, email: str, recipient: bytes) -> Verdict:
        extensions = self._hello()
        suffix = b""
        if not recipient.isascii():
            if extensions is None or "SMTPUTF8" not in extensions:
                raise ProbeFailed("server does not accept addresses beyond ASCII")
            suffix = b" SMTPUTF8"
        if self._tries_vrfy and (extensions is None or "VRFY" in extensions):
            log(None, CORE_DEBUG, 6, "Trying to use VRFY to check email address validity; email='%s'", (email,))
            reply = self._command(b"VRFY " + recipient + suffix)
            if reply.code not in _NO_VRFY:
                return _verdict(reply)
        log(None, CORE_DEBUG, 6, "Attempting delivery to check email address validity; email='%s'", (email,))
        reply = self._command(b"MAIL FROM:<" + self._sender + b">" + suffix)
        if reply.code != 250:
            raise SenderRefused
        return _verdict(self._command(b"RCPT TO:<" + recipient + b">"))

    def _hello(self) -> set[str] | None:
        """Greet; return the extensions that the server offers, None when it knows only HELO."""
        name = self._own_name()
        reply = self._command(b"EHLO " + name)
        if reply.code < 300:
            return {ehlo_keyword(line) for line in reply.texts[1:]}
        if self._command(b"HELO " + name).code > 299:
            raise ProbeFailed("EHLO and HELO refused", "Server refused our EHLO/HELO command.")
        return None

    def _own_name(self) -> bytes:
        """Return what we call ourselves: our full name, or our address where there is none (RFC 5321, 4.1.4)."""
        name = socket.gethostname()
        if "." in name and host_names.host_name(name) is not None:
            return name.encode("ascii", "replace")
        address = self._stream.sock.getsockname()[0]
        tag = "" if self._stream.sock.family == AF_INET else "IPv6:"
        return f"[{tag}{address}]".encode("ascii")

    def _command(self, line: bytes) -> Reply:
        self._stream.send(line + b"\r\n")
        return self._reply()

    def _reply(self, seconds: float | None = None) -> Reply:
        deadline = min(time.monotonic() + (seconds or self._step_seconds), self._end)
        while (reply := self._replies.next_reply()) is None:
            data = self._stream.recv(deadline=deadline)
            if not data:
                raise ConnectionError("server closed the connection")
            self._lines.feed(data)
        return reply

    def _quit(self) -> None:
        with contextlib.suppress(OSError, WireError):
            self._stream.timeout_ms = int(_QUIT_SECONDS * 1000)
            self._stream.send(b"QUIT\r\n")
            self._reply(_QUIT_SECONDS)


def _verdict(reply: Reply) -> Verdict:
    if 200 <= reply.code < 300:
        return Verdict.ACCEPTED
    if reply.code >= 500:
        return Verdict.REFUSED
    raise ProbeFailed(_text(reply))


def _text(reply: Reply) -> str:
    return f"{reply.code} {to_policy(reply.texts[-1])}"


class SharedProbes:
    """One probe per address at a time.

    Arguments:
        new_probe: makes a probe.

    _running_lock guards _running, and is not held while a probe runs.
    """

    def __init__(self, new_probe: Callable[[], RecipientProbe]) -> None:
        self._new_probe = new_probe
        self._running_lock = threading.Lock()
        self._running: dict[str, _Outcome] = {}

    def ask(self, email: str) -> Verdict:
        """Return what the server says about the recipient; raises ProbeFailed or SenderRefused."""
        with self._running_lock:
            outcome = self._running.get(email)
            is_ours = outcome is None
            if is_ours:
                outcome = self._running[email] = _Outcome()
        if not is_ours:
            return outcome.wait()
        try:
            outcome.verdict = self._new_probe().ask(email)
        except (ProbeFailed, SenderRefused) as problem:
            outcome.problem = problem
            raise
        finally:
            with self._running_lock:
                del self._running[email]
            outcome.done.set()
        return outcome.verdict


class _Outcome:
    """What a running probe will have found, for those who wait for it."""

    __slots__ = ("done", "problem", "verdict")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.verdict: Verdict | None = None
        self.problem: Exception = ProbeFailed("the probe for this address was given up")

    def wait(self) -> Verdict:
        self.done.wait()                 # a probe is bounded
        if self.verdict is None:
            raise self.problem
        return self.verdict
