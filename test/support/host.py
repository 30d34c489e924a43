"""A host of its own for zorpctl: configuration, pid directory and programs in one directory.

    def test_something(host):
        host.instance("intra", POLICY)                    # a policy file and a line in instances.conf
        assert host.zorpctl("start", "intra").status == 0
        ...
Everything that still runs at the end of the test is killed.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import string
import subprocess
import sys
import textwrap
from typing import NamedTuple

import pytest

from test.support.ports import free_port
from zorpctl.processes import Process, with_pid_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
TIMEOUT_S = 60

PLUG = """
    from Zorp.Core import *
    from Zorp.Plug import *

    Zone("internet", ["0.0.0.0/0", "::/0"])
    Zone("office", ["127.0.0.0/8"])

    def $name():
        Service("$service", PlugProxy, router=DirectedRouter(SockAddrInet("127.0.0.1", $server_port)))
        Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", $port), ZD_PROTO_TCP), service="$service")
    """


class Outcome(NamedTuple):
    """What a command printed and how it ended."""

    status: int
    out: str
    err: str


class Host:
    """See the module's text."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.pid_dir = directory / "run"
        self.kzorpd_dir = directory / "kzorpd"
        self.etc = directory / "etc"
        self.sbin = directory / "sbin"
        for path in (self.pid_dir, self.kzorpd_dir, self.etc, self.sbin):
            path.mkdir()
        self._program()
        self.ports: dict[str, int] = {}
        self.conf()
        (self.etc / "instances.conf").write_text("")

    def _program(self) -> None:
        """The program zorp of this tree, run by the interpreter of the tests."""
        script = self.sbin / "zorp"
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/sbin/zorp --state-dir {self.directory} '
                          f'--user {os.getuid()} --group {os.getgid()} "$@"\n')
        script.chmod(0o755)

    def conf(self, text: str = "CHECK_PERMS=0\nSTART_WAIT_TIMEOUT=30\nSTOP_CHECK_TIMEOUT=30\n") -> None:
        """Write zorpctl.conf: `text` and the directories of this host."""
        (self.etc / "zorpctl.conf").write_text(
            f"{text}ZORP_SYSCONFDIR={self.etc}\nZORP_PIDFILEDIR={self.pid_dir}\nZORP_SBINDIR={self.sbin}\n"
            f"KZORPD_DIR={self.kzorpd_dir}\n")

    def policy(self, name: str, text: str, **values) -> pathlib.Path:
        """Write a policy file; $port is a free port kept for this name, $name the instance."""
        port = self.ports.setdefault(name, free_port())
        values = {"name": name, "service": f"{name}_plug", "port": port, "server_port": free_port(), **values}
        path = self.etc / f"{name}.py"
        path.write_text(string.Template(textwrap.dedent(text)).safe_substitute(values))
        return path

    def instance(self, name: str, text: str = PLUG, zorp_args: str = "", zorpctl_args: str = "", **values) -> int:
        """Add an instance; return its port."""
        path = self.policy(name, text, **values)
        with open(self.etc / "instances.conf", "a") as file:
            file.write(f"{name} --policy {path} --deadlock-check-timeout -1 {zorp_args} -- {zorpctl_args}\n")
        return self.ports[name]

    def zorpctl(self, *arguments: str, timeout_s: float = TIMEOUT_S) -> Outcome:
        """Run zorpctl to its end."""
        result = subprocess.run(
            [sys.executable, str(ROOT / "sbin/zorpctl"), "-c", str(self.etc / "zorpctl.conf"), *arguments],
            capture_output=True, text=True, timeout=timeout_s, check=False, cwd=self.directory,
            env={**os.environ, "ZORPCTL_STARTED_BY_SYSTEMD": "true"})
        return Outcome(result.returncode, result.stdout, result.stderr)

    def process(self, name: str) -> Process:
        """Return the process of this name, NAME#k."""
        return Process(name, str(self.pid_dir))

    def kill_all(self) -> None:
        """Kill every master of this host; the workers die with them."""
        for process in with_pid_file(str(self.pid_dir)):
            master = process.master_pid()
            if master is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(master, signal.SIGKILL)


@pytest.fixture
def host(tmp_path):
    """Make a host; what runs on it is killed after the test."""
    made = Host(tmp_path)
    yield made
    made.kill_all()
