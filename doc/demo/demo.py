"""`make demo`: one mail through the firewall, and one that it refuses.

An SMTP server (aiosmtpd) stands for the protected mail server, `zorp` runs the policy beside
this file, and smtplib is the client.  Everything happens on 127.0.0.1 and needs no privilege.

Root sees the transparent firewall as well (transparent.py).  It runs below `unshare`, in namespaces
of its own, also for processes and mounts: whatever happens, they end with it.
"""

from __future__ import annotations

import os
import shutil
import signal
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
START_SECONDS = 20
AS_WE_ARE = ("--user", str(os.getuid()), "--group", str(os.getgid()))      # root has no user zorp here, perhaps
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


class Program:
    """A program of the firewall in the foreground, and the lines it has logged."""

    def __init__(self, command: list[str], environment: dict[str, str] | None = None) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True,
                                        env={**os.environ, **(environment or {})})
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        self.lines.extend(iter(self.process.stderr.readline, ""))

    def wait_for(self, text: str, count: int = 1) -> str:
        """Return the count-th line with this text; end the demo with the log when it never comes."""
        deadline = time.monotonic() + START_SECONDS
        while len(found := [line for line in self.lines if text in line]) < count:
            if time.monotonic() > deadline or self.process.poll() is not None:
                self.process.kill()
                sys.exit(f"The firewall did not log {text!r}. Its log:\n{''.join(self.lines)}")
            time.sleep(0.02)
        return found[count - 1]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=START_SECONDS)


def program(name: str) -> str:
    """Return the path of a program of ours: that of this virtual environment before any other."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


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
        firewall = Program(
            [program("zorp"), "--as", "demo", "--policy", str(HERE / "policy.py"), "--foreground", "--no-syslog",
             "--verbose", "4", "--pid-dir", directory, *AS_WE_ARE],
            {"DEMO_CLIENT_PORT": str(client_port), "DEMO_ORIGIN_PORT": str(origin_port)})
        firewall.wait_for("Accepting connections")
        title("The client sends two mails to the firewall")
        send(client_port, "bob@example.com")
        send(client_port, "victim@elsewhere.example")
        firewall.wait_for("Ending proxy instance", count=2)
        firewall.stop()
    server.stop()
    show(origin, firewall)
    show_transparent()


def show(origin: Origin, firewall: Program) -> None:
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


def show_transparent() -> None:
    """Show the transparent firewall to those who may see it, and say to others what they miss."""
    # whichever of the three dies, by whatever signal, takes everything inside with it
    cage = ["setpriv", "--pdeathsig", "KILL",
            "unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in ("setpriv", "unshare", "ip", "iptables-restore") if not shutil.which(name, path=path)]
    title("The transparent firewall")
    if missing or subprocess.run([*cage, "true"], stderr=subprocess.DEVNULL, check=False).returncode:
        print("root sees a client, a firewall and a server in networks of their own here, and what each of them sees"
              + (f"; missing: {' '.join(missing)}" if missing else ""))
        return
    cage += [sys.executable, str(HERE / "transparent.py")]
    with subprocess.Popen(cage, env={**os.environ, "PATH": path}) as demo:
        try:
            demo.wait()
        finally:
            demo.kill()
    if demo.returncode:
        sys.exit("the transparent firewall failed")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("interrupted"))
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
