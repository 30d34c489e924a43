"""A real kzorpd in a network namespace, its files in a directory of the test.

    def test_something(kzorpd):
        kzorpd.write_policy(zones='Zone("office", addrs=("10.1.0.0/24",))', rules='...')
        kzorpd.start()                          # returns when policies have been read
        assert kzorpd.sets()["zorp.4.office"] == {"10.1.0.0/24"}

The instance is `intra`; its policy is POLICY with the text of `rules`, and imports zones.py.
`kzorpd.log` is what test.support.daemon.Log gives; `kzorpd.name_server()` starts a DnsServer in
the namespace, to be started before kzorpd, which then asks it and nobody else.  `kzorpd.fault` is
Python text that kzorpd runs before its main(), to make something fail that does not by itself.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import signal
import socket
import subprocess
import sys
import textwrap

import pytest

from test.support.daemon import DEADLINE_S, ROOT, Log, wait_until
from test.support.dns_server import DnsServer
from test.support.net import Namespace
from Zorp.transport.kzorpd import ask, exchange

START_DEADLINE_S = 40.0              # it loads policies in children, one after the other, on a machine that may be busy
POLICY = """
from Zorp.Core import *
from Zorp.Plug import *
from Zorp.Config import config
from zones import *

config.options.rule_listen_port = 50080

def intra():
    Service(name="web", router=TransparentRouter(), proxy_class=PlugProxy)
    PFService(name="fwd", router=TransparentRouter())
    DenyService(name="no", logging=TRUE, ipv4_setting=DenyIPv4.TCP_RESET)
    DenyService(name="quiet", logging=FALSE, ipv4_setting=DenyIPv4.TCP_RESET)
"""
ZONES = 'Zone("office", addrs=("10.1.0.0/24",))'
RULES = 'Rule(rule_id=1, service="web", proto=6, dst_port=80, src_zone="office")'


class Kzorpd:
    """See the module's text."""

    def __init__(self, directory: pathlib.Path, namespace: Namespace) -> None:
        self.directory, self.namespace = directory, namespace
        self.socket = str(directory / "kzorpd")
        self.process: subprocess.Popen | None = None
        self.log = Log(directory / "kzorpd.log", lambda: self.process is not None and self.process.poll() is None)
        self.arguments: list[str] = []
        self.fault = ""
        self._dns: list[DnsServer] = []
        self.configure()
        self.write_policy()
        (directory / "instances.conf").write_text(
            f"intra --policy {directory}/policy.py --state-dir {directory} --user {os.getuid()} "
            f"--group {os.getgid()}\n")

    def configure(self, settings: str = "") -> None:
        """Write kzorp.yml with these further lines."""
        (self.directory / "kzorp.yml").write_text(
            f"pid_dir: {self.directory}\nstate_dir: {self.directory}\nuser: nobody\n{settings}\n")

    def write_policy(self, zones: str = ZONES, rules: str = RULES) -> None:
        (self.directory / "zones.py").write_text("from Zorp.Zone import Zone\n" + textwrap.dedent(zones) + "\n")
        (self.directory / "policy.py").write_text(POLICY + textwrap.indent(textwrap.dedent(rules), "    ") + "\n")

    def name_server(self) -> DnsServer:
        """Start a name server that kzorpd will ask; names are looked up every second at the earliest."""
        dns = self.namespace.inside(DnsServer)
        self._dns.append(dns.__enter__())
        self.arguments += ["--name-server", dns.address, "--least-ttl", "1"]
        return dns

    # ---- the process

    def command(self, *arguments: str, program: str = "kzorpd") -> subprocess.CompletedProcess:
        """Run kzorpd or kzorp with these arguments to its end."""
        return subprocess.run(self.words(program, *arguments), capture_output=True, text=True, timeout=30, check=False)

    def words(self, program: str, *arguments: str) -> list[str]:
        start = [str(ROOT / "sbin" / program)]
        if self.fault and program == "kzorpd":
            start = ["-c", f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n{self.fault}\n"
                           "from Zorp.netfilter.daemon import main\nsys.exit(main())"]
        return ["ip", "netns", "exec", self.namespace.name, sys.executable, *start,
                "--config-dir", str(self.directory), *arguments]

    def start(self, *arguments: str, environment: dict | None = None, cwd: pathlib.Path | None = None) -> Kzorpd:
        """Start it and wait until it has read the policies."""
        mark = self.log.mark()
        with open(self.directory / "kzorpd.log", "ab") as log:
            self.process = subprocess.Popen(
                self.words("kzorpd", "--no-syslog", "--verbose", "6", *self.arguments, *arguments),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=cwd,
                env={**os.environ, **(environment or {})})
        self.log.wait_for("core.debug", 6, "Policies have been read", after=mark, timeout_s=START_DEADLINE_S)
        return self

    def kill(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it; return the exit status."""
        self.kill(number)
        return self.process.wait(DEADLINE_S)

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop(signal.SIGKILL)
        for dns in self._dns:
            dns.__exit__()

    # ---- what it says and does

    def ask(self, request: str, **fields) -> dict:
        return ask(self.socket, request, START_DEADLINE_S, **fields)

    def say(self, line: bytes) -> bytes:
        return exchange(self.socket, line, START_DEADLINE_S)

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(DEADLINE_S)
        sock.connect(self.socket)
        return sock

    def sets(self) -> dict[str, set[str]]:
        """The members of every set in the kernel, under the legible part of its name."""
        found: dict[str, set[str]] = {}
        for line in self.namespace.run("ipset", "save").stdout.splitlines():
            command, name, *rest = line.split()
            name = name.partition("~")[0]
            found.setdefault(name, set())
            if command == "add":
                found[name].add(" ".join(rest))
        return found

    def rules(self) -> list[str]:
        """Our packet rules in the kernel, without counters."""
        lines = [line for tool in ("iptables-save", "ip6tables-save")
                 for line in self.namespace.run(tool).stdout.splitlines()]
        return [line.split(" [")[0] for line in lines if not line.startswith("#") and "ZORP" in line]

    def wait_for_members(self, name: str, *members: str) -> None:
        """Wait until a set has exactly these members."""
        wait_until(lambda: self.sets().get(name) == set(members), f"set {name} with {members}")


@contextlib.contextmanager
def alone(directory: pathlib.Path):
    """Make a kzorpd that has not been started, alone in a namespace; skips the test where none can be made."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    namespace = Namespace(f"zorp-{secrets.token_hex(4)}-k")
    subprocess.run(["ip", "netns", "add", namespace.name], check=True, capture_output=True)
    namespace.run("ip", "link", "set", "lo", "up")
    made = Kzorpd(directory, namespace)
    try:
        yield made
    finally:
        made.end()
        subprocess.run(["ip", "netns", "del", namespace.name], capture_output=True, check=False)


@pytest.fixture
def kzorpd(tmp_path):
    """A kzorpd that has not been started, for one test."""
    with alone(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def lasting(tmp_path_factory):
    """A kzorpd that runs, for the tests of a module that change nothing of it, and say so."""
    with alone(tmp_path_factory.mktemp("kzorpd")) as made:
        yield made.start()
