"""An SMTP proxy between a client that sends any bytes and a server that keeps its own books, all in memory.

The streams are fakes of Zorp.Stream.Stream that never block: at the end of its bytes a peer has
left.  The server is careful about one thing only: it writes down what it takes for commands,
and where it believes a message to end, as a server behind the proxy would.
"""

from __future__ import annotations

import os
import random
import re
import types

from Zorp.acceptance.verdict import ACCEPTED
from Zorp.Smtp import SmtpProxy
from Zorp.Stream import Stream

_COMMAND = re.compile(rb"[A-Z][A-Z0-9]*(?: [ -~]+)?\r\n")
_SASL_LINE = re.compile(rb"(?:[A-Za-z0-9+/]*={0,2}|\*)\r\n")
_EHLO = ("mx", "SIZE 9999", "8BITMIME", "CHUNKING", "DSN", "AUTH PLAIN LOGIN", "PIPELINING")
_FULL_EHLO = "".join(f"250-{line}\r\n" for line in _EHLO) + "250 HELP\r\n"
_REPLIES = {
    "EHLO": [_FULL_EHLO, _FULL_EHLO, _FULL_EHLO, "250 mx\r\n", "550 no\r\n"],
    "DATA": ["354 go\r\n", "354 go\r\n", "354 go\r\n", "554 no\r\n"],
    "AUTH": ["334 eA==\r\n", "235 ok\r\n", "535 no\r\n", "559 odd\r\n"],
    "QUIT": ["221 bye\r\n"],
}
_EVERYDAY = [
    "250 ok\r\n",
    "250 ok\r\n",
    "250 ok\r\n",
    "251 will do\r\n",
    "550 no\r\n",
    "459 odd\r\n",
    "250-a\r\n250 b\r\n",
]
_ODD = [
    "250 a\r250 b\r\n",
    "250 a\r\n250 b\r\n",
    "25",
    "250 a\n",
    "\r\n",
    "999 x\r\n",
    "334 eA==\r\n",
    "421 bye\r\n",
    "",
]


class OpenForOne(SmtpProxy):
    """Mail for ok.example only."""

    def config(self):
        SmtpProxy.config(self)
        self.relay_domains = ("ok.example",)
        self.extensions["CHUNKING"] = 1
        self.extensions["DSN"] = 1


class _FakeSocket:
    family = 0

    def __init__(self, descriptor):
        self._descriptor = descriptor

    def fileno(self):
        return self._descriptor

    def setsockopt(self, *_option):
        pass


class _FakeStream(Stream):
    """Hands out pieces; what the proxy sends goes to `sent`."""

    __slots__ = ("pieces", "sent")

    def __init__(self, name, descriptor, pieces):
        self.sock = _FakeSocket(descriptor)
        self._name = name
        self.pieces = pieces
        self.sent = bytearray()
        self._timeout_ms = None

    def recv(self, limit=65536, deadline=None):
        while self.pieces:
            piece = self.pieces.pop(0)
            if len(piece) > limit:
                self.pieces.insert(0, piece[limit:])
            if piece:
                return piece[:limit]
        return b""

    def send(self, data):
        self.sent += data


class _Server(_FakeStream):
    """Reads commands, bodies and chunks as they come and answers each."""

    __slots__ = ("_left", "_mode", "_pending", "commands", "dice", "messages", "sasl_lines")

    def __init__(self, descriptor, dice):
        super().__init__("server", descriptor, [b"220 mx\r\n"])
        self.dice = dice
        self.commands: list[bytes] = []
        self.sasl_lines: list[bytes] = []
        self.messages = 0
        self._mode, self._pending, self._left = "command", b"", 0

    def send(self, data):
        self._pending += data
        while self._one_thing():
            pass

    def _one_thing(self):
        """Take one command, body or chunk from what was sent; return False when none is complete."""
        if self._mode == "body":
            end = (b"\r\n" + self._pending).find(b"\r\n.\r\n")
            if end < 0:
                return False
            self._pending, self._mode = self._pending[end + 3 :], "command"
            self.messages += 1
            self._answer(_EVERYDAY)
        elif self._mode == "chunk":
            if len(self._pending) < self._left:
                return False
            self._pending, self._mode = self._pending[self._left :], "command"
            self._answer(_EVERYDAY)
        else:
            line, end, rest = self._pending.partition(b"\r\n")
            if not end:
                return False
            self._pending = rest
            self._command(line + end)
        return True

    def _command(self, line):
        verb = line.split(b" ")[0].strip().decode("latin-1")
        if self._mode == "sasl":
            self._mode = "command"
            self.sasl_lines.append(line)
            verb = "AUTH"
        else:
            self.commands.append(line)
        if verb == "BDAT":
            self._mode, self._left = "chunk", int(line.split()[1])
            return
        reply = self._answer(_REPLIES.get(verb, _EVERYDAY))
        if reply == b"354 go\r\n":
            self._mode = "body"
        elif reply == b"334 eA==\r\n" and verb == "AUTH":
            self._mode = "sasl"

    def _answer(self, replies):
        odd = self.dice.random() < 0.03
        reply = self.dice.choice(_ODD if odd else replies).encode()
        self.pieces.append(reply)
        return reply


class _Session:
    """What a proxy needs of a session."""

    owner = chainer = server_stream = None
    auth_user = "nobody"
    session_id = "svc/fuzz:0/smtp"
    protocol = 1
    client_zone = None
    client_address = None
    verdict, refusal_reason = ACCEPTED, ""
    service = types.SimpleNamespace(encryption_policy=None)

    def __init__(self, client_stream):
        self.client_stream = client_stream

    def setProxy(self, proxy):
        pass

    def getMasterSession(self):
        return self


_silent_read, _silent_write = os.pipe()  # never readable: the server speaks when asked, or in its odd moments


def talk(data: bytes, proxy_class=OpenForOne):
    """Let the proxy serve a client that sends `data`; return (server, bytes that the client got)."""
    dice = random.Random(data)
    cuts = sorted(dice.randrange(len(data) + 1) for _ in range(dice.choice((0, 0, 1, 3, 8))))
    pieces = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    client = _FakeStream("client", _silent_read, pieces)
    server = _Server(_silent_read, dice)
    proxy = proxy_class(_Session(client))
    proxy.connectServer = lambda: server
    proxy._disconnect_server = lambda: setattr(proxy, "_server", None)
    proxy._live()
    return server, bytes(client.sent)


def is_sasl_line(line: bytes) -> bool:
    """Tell whether this is a line that a server may get inside a SASL dialogue."""
    return _SASL_LINE.fullmatch(line) is not None


def is_command(line: bytes) -> bool:
    """Tell whether this is a line that a server may get outside of bodies and chunks."""
    return _COMMAND.fullmatch(line) is not None
