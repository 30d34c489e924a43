"""The transparent firewall: a client and a server that do not know that it is between them.

    client  10.1.0.2 ---- 10.1.0.1  firewall  10.2.0.1 ---- 10.2.0.2  server      and the same in IPv6

Each is a network namespace.  demo.py starts this file below `unshare`: mounts, processes and networks
made here are nobody else's, and the kernel removes all of them with this process.  On the firewall
kzorp-setup loads the packet rules of policy_transparent.py, kzorpd watches what the kernel passes on
or refuses, and zorp runs the mail proxy.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import smtplib
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from aiosmtpd.controller import Controller
from demo import AS_WE_ARE, HERE, MAIL, Origin, Program, program, title

RUN = Path("/run/demo")              # below a mount of our own
CLIENT, SERVER, SERVER6 = "10.1.0.2", "10.2.0.2", "fd00:2::2"
CLONE_NEWNET = 0x40000000
SECONDS = 10
FIELD = re.compile(r"(\w+)='([^']*)'")
libc = ctypes.CDLL(None, use_errno=True)


# ---------------------------------------------------------------------------- networks

def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def make_networks() -> None:
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
    RUN.mkdir()
    for name in ("client", "firewall", "server"):
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")
    for number, end in enumerate(("client", "server"), start=1):
        ip("link", "add", end, "netns", "firewall", "type", "veth", "peer", "name", "eth0", "netns", end)
        for place, device, host in ((end, "eth0", 2), ("firewall", end, 1)):
            ip("-n", place, "address", "add", f"10.{number}.0.{host}/24", "dev", device)
            ip("-n", place, "address", "add", f"fd00:{number}::{host}/64", "dev", device, "nodad")
            ip("-n", place, "link", "set", device, "up")
        ip("-n", end, "route", "add", "default", "via", f"10.{number}.0.1")
        ip("-n", end, "route", "add", "default", "via", f"fd00:{number}::1")
    for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        inside("firewall", lambda name=name: Path("/proc/sys/net", name).write_text("1"))


def inside(place: str, function: Callable):
    """Return function(), called in a thread that visits a network; its sockets and threads stay there."""
    outcome: list = []

    def visit() -> None:
        with open(f"/run/netns/{place}", "rb") as network:
            if libc.setns(network.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        try:
            outcome.append((function(), None))
        except OSError as problem:
            outcome.append((None, problem))

    thread = threading.Thread(target=visit)
    thread.start()
    thread.join()
    value, problem = outcome[0]
    if problem is not None:
        raise problem
    return value


# ---------------------------------------------------------------------------- the firewall

class Firewall:
    """Packet rules, kzorpd and zorp on the firewall."""

    def __init__(self) -> None:
        zorp = " ".join([f"--policy {HERE / 'policy_transparent.py'} --pid-dir {RUN} --state-dir {RUN}",
                         f"--kzorpd-dir {RUN}", *AS_WE_ARE])
        (RUN / "instances.conf").write_text(f"demo {zorp}\n")
        (RUN / "kzorp.yml").write_text(f"pid_dir: {RUN}\nstate_dir: {RUN}\n")
        on_firewall = ["ip", "netns", "exec", "firewall"]
        self._zorp = Program([*on_firewall, program("zorp"), "--as", "demo", *zorp.split(), "--foreground",
                              "--no-syslog", "--verbose", "4"])
        self._zorp.wait_for("Accepting connections")
        loading = [program("kzorp-setup"), "--config-dir", str(RUN), "load"]
        print(f"# kzorp-setup load\n{subprocess.check_output([*on_firewall, *loading], text=True)}", flush=True)
        self._kzorpd = Program([*on_firewall, program("kzorpd"), "--config-dir", str(RUN), "--no-syslog", "--verbose",
                                "6"])
        self._kzorpd.wait_for("Policies have been read")

    def proxied(self, count: int) -> str:
        """Return what zorp says of the count-th session when it is over."""
        line = self._zorp.wait_for("Connection summary", count)
        said = dict(FIELD.findall(line))
        ends = [address(said[end], said[f"{end.removesuffix('_address')}_port"])
                for end in ("client_address", "client_local", "server_local", "server_address")]
        return "{} -> {} | proxy | {} -> {}, {}".format(*ends, said["verdict"])

    def watched(self, text: str) -> str:
        """Return what kzorpd says of a session that the kernel alone dealt with."""
        said = dict(FIELD.findall(self._kzorpd.wait_for(text)))
        return f"{said['client_address']} -> {said['server_address']}, {text}"

    def stop(self) -> None:
        for each in (self._kzorpd, self._zorp):
            each.stop()


def address(host: str, port: str | int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# ---------------------------------------------------------------------------- what happens

def report(what: str, client: str, firewall: str, server: str) -> None:
    print(f"{what}\n  client    {client}\n  firewall  {firewall}\n  server    {server}", flush=True)


def ends_of(sock: socket.socket) -> str:
    return f"{address(*sock.getsockname()[:2])} talks with {address(*sock.getpeername()[:2])}"


def send_mail(server: str) -> str:
    """Send a mail; return whom the client has talked with."""
    with smtplib.SMTP(server, 25, local_hostname="client.example.org", timeout=SECONDS) as client:
        client.sendmail("ann@example.org", ["bob@example.com"], MAIL)
        return ends_of(client.sock)


def show_mails(firewall: Firewall) -> None:
    for count, server in enumerate((SERVER, SERVER6), start=1):
        origin = Origin()
        mta = Controller(origin, hostname=server, port=25)
        inside("server", mta.start)
        seen = inside("client", lambda server=server: send_mail(server))
        peer, _ = origin.mails[0]
        report(f"A mail to {server}: SmtpProxy, router=TransparentRouter(forge_addr=TRUE)", seen,
               firewall.proxied(count), f"has a mail from {address(*peer[:2])}")
        mta.stop()


def show_forwarded(firewall: Firewall) -> None:
    with inside("server", lambda: socket.create_server((SERVER, 7))) as echo, \
            inside("client", lambda: socket.create_connection((SERVER, 7), SECONDS)) as client, \
            echo.accept()[0] as connection:
        report("A connection to port 7: PFService, router=TransparentRouter()", ends_of(client),
               firewall.watched("Starting forwarded session"), ends_of(connection))


def show_refused(firewall: Firewall) -> None:
    with inside("server", lambda: socket.create_server((SERVER, 23))) as telnet:
        telnet.setblocking(False)
        try:
            inside("client", lambda: socket.create_connection((SERVER, 23), SECONDS))
            sys.exit("port 23 was reached")
        except ConnectionRefusedError as problem:
            seen = f"{CLIENT} is told: {problem.strerror}"
        with contextlib.suppress(BlockingIOError):
            telnet.accept()
            sys.exit("port 23 was reached")
        report("A connection to port 23: DenyService, ipv4_setting=DenyIPv4.TCP_RESET", seen,
               firewall.watched("Session denied"), "nobody came")


def main() -> None:
    make_networks()
    print("client 10.1.0.2 ---- 10.1.0.1 firewall 10.2.0.1 ---- 10.2.0.2 server, fd00:1:: and fd00:2:: alike\n")
    firewall = Firewall()
    show_mails(firewall)
    show_forwarded(firewall)
    show_refused(firewall)
    firewall.stop()
    title("Result")
    print("nobody has noticed the firewall, and nothing has passed without a rule")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)         # demo.py ends us
    main()
