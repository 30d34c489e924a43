"""The recorded lines of the original, reproduced for the same stimuli; every difference has a reason.

Numbers that vary (descriptors, ports, times, byte counts) are made equal first.  Lines about
single streams are compared without their place, because the original wrote them when its
objects were collected; all others in order.
"""

from __future__ import annotations

import collections
import contextlib
import difflib
import pathlib
import re
import shutil
import socket
import subprocess
import threading

import pytest

from test.support.daemon import wait_until
from test.support.ports import free_port

TRACES = pathlib.Path(__file__).parent.parent / "data/traces"

POLICY = """
    from Zorp.Core import *
    from Zorp.Plug import *
    from Zorp.Smtp import *

    Zone("internet", ["0.0.0.0/0"])
    Zone("office", ["127.0.0.0/8"])
    Zone("dmz", ["127.9.0.0/16"])

    class OpenSmtp(SmtpProxy):
        def config(self):
            SmtpProxy.config(self)
            self.relay_zones = ("*",)

    def listen(port, service):
        Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", port), ZD_PROTO_TCP), service=service)

    def intra():
        to = lambda port, host="127.0.0.1": DirectedRouter(SockAddrInet(host, port))
        Service("office_mail", OpenSmtp, router=to($mail))
        Service("strict_mail", SmtpProxy, router=to($mail))
        Service("dead_mail", OpenSmtp, router=to($dead))
        Service("office_plug", PlugProxy, router=to($web), max_instances=$limit)
        Service("dead_plug", PlugProxy, router=to($dead))
        Service("dmz_plug", PlugProxy, router=to($web, "127.9.0.1"), limit_target_zones_to=("office",))
        for port, service in (($office_mail, "office_mail"), ($strict_mail, "strict_mail"), ($dead_mail, "dead_mail"),
                              ($office_plug, "office_plug"), ($dead_plug, "dead_plug"), ($dmz_plug, "dmz_plug")):
            listen(port, service)
    """

# what is not as it was, and why
DIFFERENCES = {
    r"type='ZStreamLine'": "a line reader is no layer of its own here; the descriptor's line counts every byte",
    r"thread (starting|exiting);": "threads are reused: their life is not that of a session",
    r"core\.debug\(7\): .* Freeing ZProxy instance;": "no such object",
    r"Attribute fetched; ": "engine code reads its settings without asking the policy's view",
    r"Attribute changed; attribute='language'":
        "a quote inside a value is written as <27>, so that no value forges a field",
    r"core\.session\(4\): .* Ending proxy instance;": "the original wrote it when the collector came by",
    r"core\.accounting\(4\): \(svc/intra/(dead|dmz)_\w+:N/intra/\w+\)":
        "accounted under the proxy's id for a stream that was never connected; there is no stream here",
    r"core\.error\(2\): .* Connection to remote end failed; ":
        "written for SMTP and Plug alike now, with the real error; the blocking connect of the original said nothing, "
        "the other one named a local address that it never had",
    r"core\.accounting\(4\): \(svc/intra/office_plug:N\)":
        "the refused client's stream has its name already when the limit is tested",
    r"core\.dump\(": "the recorded lines of level 7 are without the dumps of streams",
    r"smtp\.info\(3\): .* Mail refused; ": "says in one line who was refused what, and how",
    r"smtp\.accounting\(4\): .* result='failure'": "refused recipients are accounted, too",
    r"smtp\.info\(4\): .* End of message; ": "the size of a mail was nowhere in the log",
}

_UNORDERED = re.compile(r"accounting info; |Closing stream; |Shutdown channel; |Connection denied by policy; ")
_VARYING = (
    (re.compile(r"\b(AF_INET\([\d.]+):\d+"), r"\1:P"),
    (re.compile(r"\b(\w*(?:fd|port|session_start|session_end|duration|sent|received))='[^']*'"), r"\1='N'"),
    (re.compile(r"\(svc/intra/(\w+):\d+"), r"(svc/intra/\1:N"),
    (re.compile(r"^\w{3} \d\d \d\d:\d\d:\d\d "), ""),
)


def comparable(lines: list[str]) -> list[str]:
    for pattern, replacement in _VARYING:
        lines = [pattern.sub(replacement, line) for line in lines]
    return lines


@pytest.fixture(scope="module")
def servers():
    """smtp-sink as mail server, and a web server that closes after its answer."""
    mail = free_port()
    program = shutil.which("smtp-sink") or "/usr/sbin/smtp-sink"
    sink = subprocess.Popen([program, "-u", "nobody", "-h", "smtp-sink", f"127.0.0.1:{mail}", "100"])
    web = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve, args=(web,), daemon=True).start()
    wait_until(lambda: _answers(mail), "smtp-sink")
    yield {"mail": mail, "web": web.getsockname()[1], "dead": free_port()}
    sink.kill()
    sink.wait()
    web.close()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _serve(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):                           # until the listener is closed
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):       # who has left already gets no answer
                connection.recv(4096)
                connection.sendall(b"HTTP/1.0 200 OK\r\n\r\nhello")


class Client:
    """A client that speaks line by line."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 10)
        self._pending = b""

    def reply(self) -> str:
        """Return the last line of a reply."""
        while not (found := re.search(rb"^\d{3}(?: .*)?\r\n", self._pending, re.M)):
            data = self.socket.recv(4096)
            assert data, self._pending
            self._pending += data
        self._pending = self._pending[found.end():]
        return found[0].decode()

    def say(self, *commands: str) -> str:
        for command in commands:
            self.socket.sendall(command.encode() + b"\r\n")
            last = self.reply()
        return last

    def rest(self) -> bytes:
        """Read to the end and close."""
        data = b"".join(iter(lambda: self.socket.recv(4096), b""))
        self.socket.close()
        return data


def mail_accepted(daemon):
    client = Client(daemon.values["office_mail"])
    client.reply()
    client.say("EHLO client.example", "MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA",
               "Subject: t\r\n\r\nhello\r\n.", "QUIT")
    client.rest()


def mail_relay_denied(daemon):
    client = Client(daemon.values["strict_mail"])
    client.reply()
    assert client.say("EHLO client.example", "MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>").startswith("554")
    client.say("QUIT")
    client.rest()


def mail_server_down(daemon):
    client = Client(daemon.values["dead_mail"])
    assert client.reply().startswith("451")
    client.socket.close()


def mail_bad_commands(daemon):
    client = Client(daemon.values["office_mail"])
    client.reply()
    assert client.say("FOO").startswith("500")
    client.socket.sendall(b"HELO a\n")
    assert client.reply().startswith("421")
    client.rest()


def plug(daemon):
    client = Client(daemon.values["office_plug"])
    client.socket.sendall(b"GET / HTTP/1.0\r\n\r\n")
    assert client.rest().endswith(b"hello")


def plug_server_down(daemon):
    Client(daemon.values["dead_plug"]).rest()


def plug_zone_denied(daemon):
    Client(daemon.values["dmz_plug"]).rest()


def plug_limit(daemon):
    first = Client(daemon.values["office_plug"])
    daemon.log.wait_for("core.session", 3, "Server connection established")
    Client(daemon.values["office_plug"]).rest()
    daemon.log.wait_for("core.policy", 1, "Connection denied by policy")
    first.socket.close()


STIMULI = {
    "mail-accepted": mail_accepted, "mail-relay-denied": mail_relay_denied, "mail-server-down": mail_server_down,
    "mail-bad-commands": mail_bad_commands, "plug": plug, "plug-server-down": plug_server_down,
    "plug-zone-denied": plug_zone_denied, "plug-limit": plug_limit,
}


@pytest.mark.parametrize("trace", sorted(TRACES.glob("level*.txt")), ids=lambda path: path.stem)
def test_the_recorded_lines_are_written(trace, servers, zorp):
    # given the policy of the recording, at its level
    level, _, name = trace.stem.partition("-")
    ports = {service: free_port() for service in ("office_mail", "strict_mail", "dead_mail", "office_plug", "dead_plug",
                                                  "dmz_plug")}
    daemon = zorp(POLICY, verbosity=int(level[5:]), limit=1 if name == "plug-limit" else 0, **servers, **ports)
    # when the stimulus is repeated
    STIMULI[name](daemon)
    daemon.log.wait_for("core.summary", 4, "Connection summary")
    assert daemon.stop() == 0
    # then the same lines come, but for the differences listed above
    recorded = comparable(trace.read_text().splitlines())
    session = re.search(r"\(svc/intra/\w+:", recorded[0])[0]
    written = comparable([line.raw for line in daemon.log.lines() if session in line.raw or "denied by" in line.raw])
    if name == "plug-limit":
        refused = written.index(next(line for line in written if "over permitted limits" in line))
        written = [line for line in written[refused:] if "accounting" not in line]
        written = written[:written.index(next(line for line in written if "summary" in line)) + 1] + [
            line for line in written if "Connection denied by policy" in line]
    unexplained = [line for line in differences(recorded, written)
                   if not any(re.search(pattern, line) for pattern in DIFFERENCES)]
    assert unexplained == []


def differences(recorded: list[str], written: list[str]) -> list[str]:
    """Return the lines of either side without partner, "- " recorded only, "+ " written only."""
    def ordered(lines):
        return [line for line in lines if not _UNORDERED.search(line)]

    def others(lines):
        return collections.Counter(line for line in lines if _UNORDERED.search(line))

    found = [line for line in difflib.ndiff(ordered(recorded), ordered(written)) if line[:2] in ("- ", "+ ")]
    found += [f"- {line}" for line in (others(recorded) - others(written)).elements()]
    return found + [f"+ {line}" for line in (others(written) - others(recorded)).elements()]
