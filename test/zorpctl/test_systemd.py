"""Instances that are units: zorpctl asks systemd (a program of that name that notes what it is told)."""

from __future__ import annotations

import stat

import pytest

from test.support import tree
from zorpctl import lifecycle
from zorpctl.host import Everything, Host


@pytest.fixture
def systemctl(host, monkeypatch):
    """A systemctl that succeeds unless the file `fails` is there; returns what it was asked so far."""
    program = host.directory / "bin" / "systemctl"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {host.directory}/asked\n[ ! -e {host.directory}/fails ]\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.delenv("ZORPCTL_STARTED_BY_SYSTEMD", raising=False)
    monkeypatch.setattr(lifecycle, "_has_systemd", lambda: True)
    monkeypatch.setattr(lifecycle, "_has_unit", lambda name: True)
    return lambda: (host.directory / "asked").read_text().splitlines()


def groups(host):
    read = Host.read(str(host.etc / "zorpctl.conf"))
    return lifecycle.Lifecycle(read), read.select(["intra"], Everything.CONFIGURED).by_instance()


def test_start_asks_for_the_unit_once_per_instance(host, systemctl):
    # given an instance of two processes that is a unit; when it is started
    host.instance("intra", zorpctl_args="-P 2")
    commands, processes = groups(host)
    results = list(commands.start(processes))
    # then systemd was asked once, and the truth is told: this one starts nothing
    assert systemctl() == ["start zorp@intra.service"]
    assert [(result.process_name, result.text, result.ok) for result in results] == [
        ("intra#0", "Failed to start", False), ("intra#1", "Failed to start", False)]


def test_a_refusal_of_systemd_is_a_failure(host, systemctl):
    host.instance("intra")
    (host.directory / "fails").touch()
    commands, processes = groups(host)
    (result,) = commands.start(processes)
    assert (result.ok, result.text) == (False, "Error invoking 'systemctl start zorp@intra.service'")


def test_a_unit_is_stopped_through_systemd(host, systemctl):
    # given an instance that runs
    host.instance("intra")
    assert host.zorpctl("start").status == 0
    # when it is stopped, then its unit is, because systemd would start it again otherwise
    commands, processes = groups(host)
    assert [result.text for result in commands.stop(processes)] == ["Stopped"]
    assert systemctl() == ["--quiet is-active zorp@intra.service", "stop zorp@intra.service"]


@pytest.mark.parametrize("unit", ["zorp.service", "zorp@.service"])
def test_instances_wait_for_the_addresses_of_the_host(unit):
    settings = (tree.ROOT / "systemd" / unit).read_text().splitlines()
    assert "Wants=network-online.target" in settings
    assert any(line.startswith("After=") and "network-online.target" in line.split("=")[1].split() for line in settings)
