"""A firewall between a client and a server, each in a network namespace of its own.

    def test_something(net):
        # client 10.1.0.2 --- 10.1.0.1 fc [firewall] fs 10.2.0.1 --- 10.2.0.2 server, the same in IPv6
        firewall = net.firewall.start_zorp(POLICY, backend="nft")     # daemon and packet rules
        server = net.server.listen("10.2.0.2", 80)
        client = net.client.connect("10.2.0.2", 80)

Namespaces get random names and are removed at the end of the test, whatever happens.  Sockets
are made in a thread that visits the namespace; they stay in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import secrets
import socket
import string
import struct
import subprocess
import sys
import textwrap
import threading

import pytest

from test.support.daemon import ROOT, Daemon

CLIENT, SERVER = "10.1.0.2", "10.2.0.2"
CLIENT6, SERVER6 = "fd00:1::2", "fd00:2::2"
FIREWALL_OUTSIDE, FIREWALL_OUTSIDE6 = "10.2.0.1", "fd00:2::1"
_CLONE_NEWNET = 0x40000000
_DEADLINE_S = 5.0
_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """One namespace: commands and sockets in it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess:
        """Run a command inside; fails with its complaint."""
        result = subprocess.run(["ip", "netns", "exec", self.name, *command], capture_output=True, text=True,
                                timeout=60, check=False)
        assert not check or result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result

    def sysctl(self, name: str, value: str) -> None:
        self.run("sysctl", "-q", "-w", f"{name}={value}")

    def inside(self, function):
        """Return function(), called in a thread that is in the namespace."""
        outcome: list = []

        def visit() -> None:
            try:
                with open(f"/run/netns/{self.name}", "rb") as namespace:
                    if _libc.setns(namespace.fileno(), _CLONE_NEWNET):
                        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
                outcome.extend((True, function()))
            except BaseException as problem:
                outcome.extend((False, problem))

        thread = threading.Thread(target=visit)
        thread.start()
        thread.join()
        done, value = outcome
        if not done:
            raise value
        return value

    def socket(self, address: str, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> socket.socket:
        """Return a socket of the address's family, with a deadline."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        made = self.inside(lambda: socket.socket(family, kind, protocol))
        made.settimeout(_DEADLINE_S)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return made

    def listen(self, address: str, port: int) -> Server:
        """Return a server that accepts by itself and says who came."""
        made = self.socket(address)
        made.bind((address, port))
        made.listen(64)
        return Server(made)

    def answer_datagrams(self, address: str, port: int) -> DatagramServer:
        """Return a server that answers every datagram with its upper case form, in a thread."""
        made = self.socket(address, socket.SOCK_DGRAM)
        made.bind((address, port))
        return DatagramServer(made)

    def connect(self, address: str, port: int, *, source: tuple[str, int] | None = None,
                timeout_s: float = _DEADLINE_S) -> socket.socket:
        """Return a connected socket, or raise what connect() raises."""
        made = self.socket(address)
        made.settimeout(timeout_s)
        try:
            if source:
                made.bind(source)
            made.connect((address, port))
        except BaseException:
            made.close()
            raise
        made.settimeout(_DEADLINE_S)
        return made

    def ping(self, address: str, timeout_s: float = _DEADLINE_S) -> None:
        """Send an echo request and wait for the reply with its identifier; raises TimeoutError."""
        six = ":" in address
        protocol, request, reply = (socket.IPPROTO_ICMPV6, 128, 129) if six else (socket.IPPROTO_ICMP, 8, 0)
        packet = struct.pack("!BBHHH", request, 0, 0, 0x5A0B, 1)
        packet = packet[:2] + struct.pack("!H", 0xFFFF - sum(struct.unpack("!4H", packet)) % 0xFFFF) + packet[4:]
        with self.socket(address, socket.SOCK_RAW, protocol) as raw:
            raw.settimeout(timeout_s)
            raw.sendto(packet, (address, 0))
            while True:
                answer = raw.recv(2_048)
                if answer[0 if six else 20:][:1] == bytes((reply,)) and b"\x5a\x0b\0\1" in answer:
                    return


class Server:
    """A listening socket and the connections that came; for `with`."""

    def __init__(self, listening: socket.socket) -> None:
        self.listening = listening
        self.accepted: list[socket.socket] = []

    def accept(self, timeout_s: float = _DEADLINE_S) -> tuple[socket.socket, str]:
        """Return (connection, the peer's address)."""
        self.listening.settimeout(timeout_s)
        connection, peer = self.listening.accept()
        connection.settimeout(_DEADLINE_S)
        self.accepted.append(connection)
        return connection, peer[0]

    def nobody_came(self, within_s: float = 0.3) -> bool:
        try:
            self.accept(within_s)
        except TimeoutError:
            return True
        return False

    def answer_all(self, text: bytes) -> None:
        """From now on, send this to everybody and close, in a thread."""
        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = self.listening.accept()
                    connection.sendall(text)
                    connection.close()

        self.listening.settimeout(None)
        threading.Thread(target=serve, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listening.shutdown(socket.SHUT_RDWR)
        for each in (self.listening, *self.accepted):
            each.close()


class DatagramServer:
    """Answers until the end of the test; `peers` are the addresses that asked, in order."""

    def __init__(self, sock: socket.socket) -> None:
        self.peers: list[str] = []
        self._sock = sock
        sock.settimeout(None)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, peer = self._sock.recvfrom(65_535)
                self.peers.append(peer[0])
                self._sock.sendto(data.upper(), peer)


class Firewall(Namespace):
    """The namespace in the middle, with instances and packet rules."""

    def __init__(self, name: str, directory: pathlib.Path) -> None:
        super().__init__(name)
        self.directory = directory
        self.daemons: list[Daemon] = []
        self.backend = "nft"
        self.more_settings = ""

    def configure(self, backend: str, settings: str = "") -> None:
        """Say how packet rules are written; settings are further lines of kzorp.yml.

        The site's own rules, written alike, drop all but answers, loopback and neighbour discovery.
        """
        self.backend, self.more_settings = backend, settings
        for family in (4, 6):
            for chain in ("INPUT", "FORWARD"):
                self.iptables("-P", chain, "DROP", family=family)
            self.iptables("-A", "INPUT", "-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED", "-j", "ACCEPT",
                          family=family)
            self.iptables("-A", "INPUT", "-i", "lo", "-j", "ACCEPT", family=family)
        self.iptables("-A", "INPUT", "-p", "icmpv6", "-j", "ACCEPT", family=6)

    def start_zorp(self, policy: str, instance: str = "intra", *, load: bool = True, **values) -> Daemon:
        """Start an instance, then load the packet rules of all of them."""
        daemon = self.add_zorp(policy, instance, **values).start()
        if load:
            self.setup("load")
        return daemon

    def load_policy(self, policy: str) -> Daemon:
        """Load packet rules of an instance that does not run: for what the kernel does without it."""
        daemon = self.add_zorp(policy)
        self.setup("load")
        return daemon

    def add_zorp(self, policy: str, instance: str = "intra", arguments=(), **values) -> Daemon:
        """Return an instance of this host, not started."""
        directory = self.directory / instance
        directory.mkdir()
        daemon = Daemon(directory, policy, instance=instance,
                        arguments=("--packet-rules", "administrator", *arguments), **values)
        daemon.prefix = ("ip", "netns", "exec", self.name)
        self.daemons.append(daemon)
        return daemon

    def setup(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        """Run kzorp-setup."""
        self.write_settings()
        return self.run(sys.executable, str(ROOT / "sbin" / "kzorp-setup"), "--config-dir", str(self.directory),
                        *arguments, check=check)

    def write_settings(self) -> None:
        """Write kzorp.yml and instances.conf."""
        (self.directory / "kzorp.yml").write_text(
            f"backend: {self.backend}\nstate_dir: {self.directory}\npid_dir: {self.directory}\n" + self.more_settings)
        (self.directory / "instances.conf").write_text("".join(
            f"{daemon.instance} --policy {daemon.policy} --state-dir {daemon.directory} --user 0 --group 0\n"
            for daemon in self.daemons))

    def set_of(self, zone: str) -> str:
        """Return the name of the set that our IPv4 rules use for a zone."""
        found, = (name for name in self.run("ipset", "list", "-n").stdout.split()
                  if name.startswith(f"zorp.4.{zone}~"))
        return found

    def iptables(self, *arguments: str, family: int = 4) -> str:
        """Run the iptables that the packet rules are written with."""
        kind = "nft" if self.backend == "nft" else "legacy"
        return self.run(f"{'iptables' if family == 4 else 'ip6tables'}-{kind}", *arguments).stdout


class Network:
    """The three namespaces; a context manager."""

    def __init__(self, directory: pathlib.Path) -> None:
        unique = secrets.token_hex(4)
        self.client = Namespace(f"zorp-{unique}-c")
        self.server = Namespace(f"zorp-{unique}-s")
        self.firewall = Firewall(f"zorp-{unique}-f", directory)
        self._all = (self.client, self.firewall, self.server)

    def __enter__(self) -> Network:
        try:
            for namespace in self._all:
                _ip("netns", "add", namespace.name)
                namespace.run("ip", "link", "set", "lo", "up")
            self._link(self.client, "c0", "fc", 1)
            self._link(self.server, "s0", "fs", 2)
        except BaseException:
            self.__exit__()
            raise
        for name in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
            self.firewall.sysctl(name, "1")
        return self

    def _link(self, end: Namespace, inner: str, outer: str, number: int) -> None:
        _ip("link", "add", outer, "netns", self.firewall.name, "type", "veth", "peer", "name", inner, "netns", end.name)
        for namespace, device, host in ((end, inner, 2), (self.firewall, outer, 1)):
            namespace.run("ip", "addr", "add", f"10.{number}.0.{host}/24", "dev", device)
            namespace.run("ip", "addr", "add", f"fd00:{number}::{host}/64", "dev", device, "nodad")
            namespace.run("ip", "link", "set", device, "up")
        end.run("ip", "route", "add", "default", "via", f"10.{number}.0.1")
        end.run("ip", "-6", "route", "add", "default", "via", f"fd00:{number}::1")

    def __exit__(self, *exc_info) -> None:
        for daemon in self.firewall.daemons:
            daemon.end()
        for namespace in self._all:
            subprocess.run(["ip", "netns", "del", namespace.name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)


def can_make_namespaces() -> bool:
    if os.geteuid() != 0:
        return False
    name = f"zorp-{secrets.token_hex(4)}-t"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if made.returncode == 0:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return made.returncode == 0


def policy(body: str, zones: str = "", **values) -> str:
    """Return a policy with one instance function of this body."""
    head = "from Zorp.Core import *\nfrom Zorp.Plug import *\n\n"
    text = head + textwrap.dedent(zones) + "\n\ndef $instance():\n" + textwrap.indent(textwrap.dedent(body), "    ")
    return string.Template(text).safe_substitute({"instance": "intra", **values})


def network(directory: pathlib.Path) -> Network:
    """Return three namespaces, for a fixture of a whole module; skips the test where they cannot be made."""
    if not can_make_namespaces():
        pytest.skip("network namespaces need root")
    return Network(directory)


@pytest.fixture
def net(tmp_path):
    """Three namespaces; skipped where they cannot be made."""
    with network(tmp_path) as made:
        yield made
