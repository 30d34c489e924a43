"""`make demo`: one mail through the firewall, and one that it refuses.

An SMTP server (aiosmtpd) stands for the protected mail server, `zorp` runs the policy beside
this file, and smtplib is the client.  Everything happens on 127.0.0.1 and needs no privilege.
"""

from __future__ import annotations

import os
import shutil
import smtplib
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from aiosmtpd.controller import Controller

HERE = Path(__file__).parent
START_SECONDS = 10
MAIL = """\
From: Ann <ann@example.org>
To: Bob <bob@example.com>
Subject: through the firewall

Hello Bob,
.a line that starts with a dot arrives as it was written.
Ann
"""


class Origin:
    """The protected mail server: keeps the mails it is given."""

    def __init__(self) -> None:
        self.mails: list = []

    async def handle_DATA(self, server, session, envelope):
        self.mails.append((session.peer, envelope))
        return "250 2.0.0 taken by the origin server"


class Firewall:
    """A `zorp` process in the foreground, and the lines it has logged."""

    def __init__(self, client_port: int, origin_port: int, directory: str) -> None:
        zorp = shutil.which("zorp", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        environment = dict(os.environ, DEMO_CLIENT_PORT=str(client_port), DEMO_ORIGIN_PORT=str(origin_port))
        self.command = [zorp, "--as", "demo", "--policy", str(HERE / "policy.py"), "--foreground", "--no-syslog",
                        "--verbose", "4", "--pid-dir", directory]
        self.lines: list[str] = []
        self.process = subprocess.Popen(self.command, stderr=subprocess.PIPE, text=True, env=environment)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        self.lines.extend(iter(self.process.stderr.readline, ""))

    def wait_for(self, condition, what: str) -> None:
        """Wait until `condition()` holds; end the demo with the log when it never does."""
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            if time.monotonic() > deadline or self.process.poll() is not None:
                self.process.kill()
                sys.exit(f"The firewall did not {what}. Its log:\n{''.join(self.lines)}")
            time.sleep(0.02)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=START_SECONDS)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def title(text: str) -> None:
    print(f"\n--- {text} " + "-" * max(0, 90 - len(text)), flush=True)


def send(port: int, recipient: str) -> None:
    print(f"MAIL FROM:<ann@example.org> RCPT TO:<{recipient}>")
    with smtplib.SMTP("127.0.0.1", port, local_hostname="client.example.org", timeout=10) as client:
        try:
            client.sendmail("ann@example.org", [recipient], MAIL)
            print("  accepted")
        except smtplib.SMTPRecipientsRefused as refusal:
            code, text = refusal.recipients[recipient]
            print(f"  refused by the firewall: {code} {text.decode()}")


def main() -> None:
    client_port, origin_port = free_ports(2)
    origin = Origin()
    server = Controller(origin, hostname="127.0.0.1", port=origin_port)
    server.start()
    with tempfile.TemporaryDirectory() as directory:
        firewall = Firewall(client_port, origin_port, directory)
        firewall.wait_for(lambda: any("Accepting connections" in line for line in firewall.lines), "start to listen")
        title("The client sends two mails to the firewall")
        send(client_port, "bob@example.com")
        send(client_port, "victim@elsewhere.example")
        firewall.wait_for(lambda: sum("Ending proxy instance" in line for line in firewall.lines) >= 2,
                          "account for the sessions")
        firewall.stop()
    server.stop()
    show(origin, firewall)


def show(origin: Origin, firewall: Firewall) -> None:
    title("The origin server received")
    for peer, envelope in origin.mails:
        print(f"from {peer[0]}, MAIL FROM:<{envelope.mail_from}>, RCPT TO:<{'>, <'.join(envelope.rcpt_tos)}>\n")
        print(envelope.content.decode("latin-1").replace("\r\n", "\n"), end="")
    title("The firewall logged")
    print("".join(firewall.lines), end="")
    title("Result")
    if len(origin.mails) != 1:
        sys.exit(f"expected one mail at the origin server, found {len(origin.mails)}")
    print("one mail delivered, one refused, every step in the log")


if __name__ == "__main__":
    main()
