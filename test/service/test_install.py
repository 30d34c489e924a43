"""make install and make uninstall, into a directory of their own."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from test.support.host import ROOT

OFFLINE = "--no-deps --no-build-isolation"
SITE_PACKAGES = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))


class Target:
    """A directory to install into."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory

    def make(self, goal: str, python: str = sys.executable) -> str:
        """Run install.sh as make does; return what it printed."""
        return subprocess.run(
            [str(ROOT / "install.sh"), goal], capture_output=True, text=True, timeout=120, check=True,
            env={**os.environ, "PREFIX": "/opt/firewall", "DESTDIR": str(self.directory), "PIP_FLAGS": OFFLINE,
                 "PYTHON": python}).stdout

    def path(self, name: str) -> pathlib.Path:
        return self.directory / name

    def files(self) -> set[str]:
        return {str(path.relative_to(self.directory)) for path in self.directory.rglob("*") if not path.is_dir()}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    made = Target(tmp_path_factory.mktemp("root"))
    made.make("install")
    return made


def test_everything_has_its_place(target):
    files = target.files()
    for name in ("etc/zorp/policy.py", "etc/zorp/instances.conf", "etc/init.d/zorp", "etc/logrotate.d/zorp",
                 "opt/firewall/share/man/man8/zorpctl.8", "opt/firewall/share/man/man5/policy.py.5",
                 "opt/firewall/lib/systemd/system/zorp@.service", "opt/firewall/lib/sysusers.d/zorp.conf",
                 "opt/firewall/lib/tmpfiles.d/zorp.conf", "opt/firewall/share/munin/plugins/zorp_thread",
                 "opt/firewall/share/bash-completion/completions/zorpctl",
                 "opt/firewall/lib/nagios/plugins/check_zorp_threads.py"):
        assert name in files
    # and nothing of the preparations is left
    assert not [name for name in files if name.endswith(".new")]
    assert "opt/firewall/lib/zorp/bin/zorp" not in files


def test_paths_follow_the_prefix(target):
    unit = target.path("opt/firewall/lib/systemd/system/zorp@.service").read_text()
    assert "ExecStart=/opt/firewall/sbin/zorpctl exec %i" in unit
    assert "/usr/sbin" not in unit
    assert "ZORPCTL:-/opt/firewall/sbin/zorpctl" in target.path("etc/init.d/zorp").read_text()


@pytest.mark.parametrize("command", ["zorp", "zorpctl"])
def test_the_commands_run_from_there(target, command):
    # given no source tree in reach; when a command is run through its link
    result = subprocess.run([target.path(f"opt/firewall/sbin/{command}"), "--version"], capture_output=True, text=True,
                            env={**os.environ, "PYTHONPATH": SITE_PACKAGES, "PYTHONSAFEPATH": "1"}, cwd="/", check=True)
    # then the installed program answers
    assert result.stdout.startswith("Zorp ")
    shebang = target.path(f"opt/firewall/lib/zorp/sbin/{command}").read_text().partition("\n")[0]
    assert os.access(shebang.removeprefix("#!"), os.X_OK)


PLUGINS = ("share/munin/plugins/zorp_thread", "share/munin/plugins/zorp_mem_",
           "lib/nagios/plugins/check_zorp_threads.py")


def run(program, *arguments, **environment) -> subprocess.CompletedProcess:
    """Run an installed program with no source tree in reach; site-packages stand in for what --no-deps left out."""
    variables = {"PATH": "/usr/bin:/bin", "PYTHONPATH": SITE_PACKAGES, "PYTHONSAFEPATH": "1", **environment}
    return subprocess.run([program, *arguments], capture_output=True, text=True, cwd="/", check=False, env=variables)


@pytest.fixture
def configuration(tmp_path):
    (tmp_path / "instances.conf").write_text("intra --policy /nowhere/policy.py\n")
    (tmp_path / "zorpctl.conf").write_text(f"ZORP_PIDFILEDIR={tmp_path}\nZORP_SYSCONFDIR={tmp_path}\nCHECK_PERMS=0\n")
    return str(tmp_path / "zorpctl.conf")


def test_the_plugins_run_from_there(target, configuration):
    # given an instance that does not run; when each plugin is run through its link, or a link to that
    thread, memory, check = (target.path(f"opt/firewall/{name}") for name in PLUGINS)
    assert run(thread, "autoconf", zorpctl_conf=configuration).stdout == "yes\n"
    link = target.directory / "zorp_mem_rss"
    link.symlink_to(memory)
    assert run(link, "config", zorpctl_conf=configuration).stdout.startswith("graph_title Zorp instances RSS")
    result = run(check, ZORPCTL_CONF=configuration)
    # then each does its work with the installed packages
    assert (result.returncode, result.stdout, result.stderr) == (2, "CRITICAL: intra#0;\n", "")
    command = target.path("etc/nagios/nrpe.d/zorp.cfg").read_text()
    assert "command[check_zorp_threads]=/opt/firewall/lib/nagios" in command


def test_nagios_hears_unknown_when_the_check_itself_fails(target, tmp_path):
    # given a copy of the check without the packages, and an interpreter in which it must fail
    check = target.path(f"opt/firewall/{PLUGINS[2]}")
    (copy := tmp_path / "a/b/c/check.py").parent.mkdir(parents=True)
    copy.write_bytes(check.read_bytes())
    copy.chmod(0o755)
    (tmp_path / "sitecustomize.py").write_text("import argparse; argparse.ArgumentParser.parse_args = None")
    for result in (run(copy, PYTHONPATH=""), run(check, PYTHONPATH=str(tmp_path))):
        assert (result.returncode, result.stdout.startswith("UNKNOWN "), result.stderr) == (3, True, "")


def test_metrics_come_from_there(target, configuration):
    # given the client of Prometheus where the firewall's packages are, or the system's
    result = run(target.path("opt/firewall/sbin/zorpctl"), "-c", configuration, "metrics")
    assert (result.returncode, 'zorp_up{' in result.stdout) == (0, True), result.stderr
    assert "ExecStart=/opt/firewall/sbin/zorpctl metrics" in target.path(
        "opt/firewall/lib/systemd/system/zorp-metrics.service").read_text()


def test_what_the_metrics_need_is_installed(tmp_path):
    # given an interpreter that writes down what it is asked for
    recorder = tmp_path / "python"
    recorder.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nexec {sys.executable} "$@"\n')
    recorder.chmod(0o755)
    target = Target(tmp_path / "root")
    target.make("install", python=str(recorder))
    # then pip was asked for the optional packages as well
    assert "[metrics]" in (tmp_path / "asked").read_text()


def test_what_the_administrator_edits_is_never_overwritten_nor_removed(tmp_path):
    target = Target(tmp_path)
    # given a configuration from before
    for name in ("etc/zorp/policy.py", "etc/logrotate.d/zorp"):
        target.path(name).parent.mkdir(parents=True)
        target.path(name).write_text("mine")
    # when it is installed, twice
    target.make("install")
    assert "kept /etc/zorp/policy.py" in target.make("install")
    # and removed
    target.make("uninstall")
    # then the edited files are as they were, and nothing but configuration is left
    assert target.path("etc/zorp/policy.py").read_text() == target.path("etc/logrotate.d/zorp").read_text() == "mine"
    assert [name for name in target.files() if not name.startswith("etc/")] == []
    assert "etc/init.d/zorp" not in target.files()
    # and a second time is an error that says so
    with pytest.raises(subprocess.CalledProcessError):
        target.make("uninstall")
