"""The units: systemd understands them, and what they start is ready, reloads and ends as they say."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from test.support.daemon import wait_until
from test.support.host import ROOT
from test.zorpctl.test_lifecycle import serves
from Zorp.netfilter.site import Site
from Zorp.runtime.options import Options

UNITS = sorted((ROOT / "systemd").glob("*.service"))
# What is true of a machine where the programs are not installed.
_NOT_INSTALLED = re.compile(r"is not executable: No such file|Command 'man .*' failed")


def directives(name: str) -> list[tuple[str, str]]:
    """The lines KEY=VALUE of a unit."""
    lines = (ROOT / "systemd" / name).read_text().splitlines()
    return [tuple(line.split("=", 1)) for line in lines if "=" in line and line[0] not in "#["]


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_systemd_understands_it(unit, tmp_path):
    # given the unit, a template as an instance of it
    path = tmp_path / unit.name.replace("@.", "@intra.")
    shutil.copy(unit, path)
    # when it is checked
    result = subprocess.run(["systemd-analyze", "verify", "--recursive-errors=no", str(path)],
                            capture_output=True, text=True, check=False)
    # then there is nothing to say
    assert [line for line in result.stderr.splitlines() if not _NOT_INSTALLED.search(line)] == []


def test_an_instance_is_little_exposed():
    # given the unit of an instance; when systemd rates it, 0 locked up to 10 open
    result = subprocess.run(["systemd-analyze", "security", "--offline=yes", "--threshold=25",
                             str(ROOT / "systemd/zorp@.service")], capture_output=True, text=True, check=False)
    # then what its job leaves open is less than a quarter
    assert result.returncode == 0, result.stdout


def test_every_directive_is_given_once():
    for unit in UNITS:
        seen = [key for key, _value in directives(unit.name)]
        assert [key for key in set(seen) if seen.count(key) > 1] == []


def test_the_limits_are_those_of_the_daemon():
    # given the unit of an instance
    unit = dict(directives("zorp@.service"))
    # then it never has a capability that the daemon must not have, and room for its threads
    assert "CAP_NET_ADMIN" not in unit["CapabilityBoundingSet"]
    assert unit["AmbientCapabilities"] == unit["CapabilityBoundingSet"]
    assert (unit["TasksMax"], int(unit["LimitNOFILE"])) == ("infinity", 256_000)
    # and a worker that hangs is replaced before the watchdog ends them all
    assert int(unit["WatchdogSec"]) > 2 * 60 + 5
    # and systemd waits longer for the first policy than the master does
    assert int(unit["TimeoutStartSec"]) > 300


def test_users_and_directories_go_together():
    # given the user of the unit
    unit = dict(directives("zorp@.service"))
    users = (ROOT / "systemd/sysusers.d/zorp.conf").read_text()
    directories = (ROOT / "systemd/tmpfiles.d/zorp.conf").read_text()
    # then it is made, and owns the directories
    assert re.search(rf"^u {unit['User']} ", users, re.MULTILINE)
    assert re.search(rf"^d +/run/zorp +0770 {unit['User']} {unit['Group']} ", directories, re.MULTILINE)


@pytest.mark.parametrize("directory", ["/run/kzorp", "/var/lib/kzorp"])
def test_what_packet_rules_follow_is_in_directories_of_root(directory):
    # given the directories that kzorpd and kzorp-setup use where kzorp.yml says nothing
    assert Site().pid_dir == Options().kzorpd_dir == "/var/run/kzorp"
    assert directory in (Site().state_dir, Site().pid_dir.removeprefix("/var"))
    # then root's is made of them, by tmpfiles.d and by the unit
    directories = (ROOT / "systemd/tmpfiles.d/zorp.conf").read_text()
    assert re.search(rf"^d +{directory} +0755 root root ", directories, re.MULTILINE)
    unit = dict(directives("kzorpd.service"))
    assert (unit["User"], "Group" in unit) == ("root", False)
    assert unit["StateDirectory"] == unit["RuntimeDirectory"] == "kzorp"
    # and kzorp-setup may write its state, but starts, and closes the host, also where there is no such directory
    setup = dict(directives("kzorp-setup.service"))
    assert "-/var/lib/kzorp" in setup["ReadWritePaths"].split()
    assert not {"StateDirectory", "RuntimeDirectory"} & setup.keys()


@pytest.mark.parametrize(("tool", "file"), [
    (["systemd-sysusers", "--dry-run"], "sysusers.d/zorp.conf"),
    (["systemd-tmpfiles", "--create", "--boot"], "tmpfiles.d/zorp.conf"),
])
def test_the_tools_understand_the_lists(tool, file, tmp_path):
    # given an empty root with the accounts of this host and ours
    (tmp_path / "etc").mkdir()
    for name, line in (("passwd", "zorp:x:999:999::/:/bin/false\n"), ("group", "zorp:x:999:\n")):
        (tmp_path / "etc" / name).write_text(f"{'root:x:0:0::/:/bin/sh' if name == 'passwd' else 'root:x:0:'}\n{line}")
    result = subprocess.run([*tool, f"--root={tmp_path}", str(ROOT / "systemd" / file)],
                            capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


class Manager:
    """A service manager for one instance: a notify socket and the program in the foreground."""

    def __init__(self, host, *arguments: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(host.directory / "notify"))
        self.socket.settimeout(15)
        environment = {**os.environ, "ZORPCTL_STARTED_BY_SYSTEMD": "true",
                       "NOTIFY_SOCKET": str(host.directory / "notify"), "WATCHDOG_USEC": "1000000"}
        self.program = subprocess.Popen(
            [sys.executable, str(ROOT / "sbin/zorpctl"), "-c", str(host.etc / "zorpctl.conf"), "exec", *arguments],
            env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def states_until(self, last: str) -> list[str]:
        """States other than the watchdog's, up to this one."""
        seen: list[str] = []
        while last not in seen:
            state = self.socket.recv(1000).decode().split("\n")[0]
            if state != "WATCHDOG=1" or last == state:
                seen.append(state)
        return seen

    def close(self) -> None:
        if self.program.poll() is None:
            self.program.kill()
            self.program.wait()
        self.program.stderr.close()
        self.socket.close()


@pytest.fixture
def manage(host):
    managers = []

    def make(*arguments: str) -> Manager:
        managers.append(Manager(host, *arguments))
        return managers[-1]

    yield make
    for manager in managers:
        manager.close()


def test_the_main_process_is_the_master(host, manage):
    # given an instance of two processes; when the unit's command starts it
    port = host.instance("intra", zorpctl_args="--num-of-processes 2")
    manager = manage("intra")
    # then READY comes from the process that systemd started, which is the master
    assert manager.states_until("READY=1") == ["READY=1"]
    assert host.process("intra#0").master_pid() == manager.program.pid
    wait_until(lambda: host.zorpctl("status").status == 0, "both processes")
    assert serves(port)
    assert manager.states_until("WATCHDOG=1") == ["WATCHDOG=1"]
    # when the unit's reload command runs
    assert host.zorpctl("reload", "intra").status == 0
    # then systemd hears of it
    assert manager.states_until("READY=1") == ["RELOADING=1", "READY=1"]
    # when systemd stops the unit
    manager.program.send_signal(signal.SIGTERM)
    # then the master says so and leaves nothing behind
    assert manager.states_until("STOPPING=1") == ["STOPPING=1"]
    assert manager.program.wait(10) == 0
    assert not serves(port)


def test_a_broken_policy_fails_the_unit(host, manage):
    host.instance("intra", "broken(\n")
    manager = manage("intra")
    assert manager.program.wait(15) == 2


def test_no_auto_restart_is_said_to_mean_nothing(host, manage):
    host.instance("intra", zorpctl_args="--no-auto-restart")
    manager = manage("intra")
    manager.states_until("READY=1")
    manager.program.terminate()
    assert "--no-auto-restart has no effect" in manager.program.communicate()[1]


@pytest.mark.parametrize(("arguments", "text"), [
    (("nosuch",), "Instance nosuch not found!"), (("one", "two"), "name exactly one instance"),
    (("one#0",), "Processes can not be started individualy"),
])
def test_exec_takes_one_whole_instance(host, arguments, text):
    host.instance("one")
    host.instance("two")
    outcome = host.zorpctl("exec", *arguments)
    assert (outcome.status, text in outcome.err) == (1, True)


def test_logrotate_keeps_the_trail():
    # given the hint for logrotate
    text = (ROOT / "etc/logrotate.zorp").read_text()
    settings = re.search(r"^/var/log/zorp\.log \{\n(.*?)^\}", text, re.DOTALL | re.MULTILINE)[1].split()
    assert settings[settings.index("rotate") + 1] == "52"
