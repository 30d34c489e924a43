"""init.d/zorp: every verb against real instances, with the exit status that the LSB gives it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from test.support.daemon import wait_until
from test.support.host import ROOT, Outcome
from test.zorpctl.test_lifecycle import BROKEN, serves

SCRIPT = ROOT / "init.d" / "zorp"


@pytest.fixture
def init(host):
    """Run the script on a host of its own: init("start") -> Outcome."""
    program = host.sbin / "zorpctl"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/sbin/zorpctl -c {host.etc}/zorpctl.conf "$@"\n')
    program.chmod(0o755)

    def run(*arguments: str, zorpctl: str = str(program)) -> Outcome:
        environment = {**os.environ, "ZORPCTL": zorpctl, "ZORPCTL_STARTED_BY_SYSTEMD": "true"}
        result = subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60, check=False,
                                env=environment)
        return Outcome(result.returncode, result.stdout, result.stderr)

    return run


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_the_shells_understand_it(shell):
    subprocess.run([shell, "-n", str(SCRIPT)], check=True)


def test_its_header_is_complete():
    # given the block that insserv reads
    header = re.search(r"### BEGIN INIT INFO\n(.*?)### END INIT INFO", SCRIPT.read_text(), re.DOTALL)[1]
    # then it names what it provides and when it runs
    assert re.findall(r"^# ([\w-]+):", header, re.MULTILINE) == [
        "Provides", "Required-Start", "Required-Stop", "Should-Start", "Default-Start", "Default-Stop",
        "Short-Description", "Description"]


def test_a_life(host, init):
    # given an instance that does not run
    port = host.instance("intra")
    assert init("status").status == 3
    # when it is started
    assert init("start").status == 0
    # then it serves, and every verb does its part
    assert serves(port)
    assert init("status").status == 0
    first = host.process("intra#0").master_pid()
    assert init("reload").status == 0
    assert init("force-reload").status == 0
    assert host.process("intra#0").master_pid() == first
    assert init("try-restart").status == 0
    assert host.process("intra#0").master_pid() != first
    assert init("restart", "intra").status == 0
    assert serves(port)
    assert init("stop").status == 0
    assert not serves(port)


def test_a_failure_is_not_hidden(host, init):
    # given an instance with a broken policy
    host.instance("intra", BROKEN)
    # then start fails, and says why
    outcome = init("start")
    assert (outcome.status, "intra.py:3:" in outcome.err) == (1, True)


def test_reload_without_anything_that_runs(host, init):
    host.instance("intra")
    assert init("reload").status == 7
    # but what may restart does, and what need not does not
    assert init("try-restart").status == 0
    assert not host.process("intra#0").is_running()
    assert init("force-reload").status == 0
    assert host.process("intra#0").is_running()


def test_status_of_what_died(host, init):
    # given a master that was killed
    host.instance("intra")
    init("start")
    master = host.process("intra#0").master_pid()
    os.kill(master, signal.SIGKILL)
    wait_until(lambda: not host.process("intra#0").is_running(), "the end of the master")
    # then the left-over pid file makes the difference
    assert init("status").status == 1
    assert init("start").status == 0
    assert init("status").status == 0


def test_status_when_some_run(host, init):
    host.instance("intra")
    host.instance("extra")
    init("start", "intra")
    assert init("status").status == 150
    assert init("status", "intra").status == 0


@pytest.mark.parametrize(("arguments", "status"), [((), 2), (("nosuch",), 3)])
def test_wrong_usage(host, init, arguments, status):
    outcome = init(*arguments)
    assert (outcome.status, "Usage:" in outcome.err) == (status, True)


@pytest.mark.parametrize(("verb", "status"), [("start", 5), ("status", 4)])
def test_without_the_program(init, verb, status):
    assert init(verb, zorpctl="/nonexistent/zorpctl").status == status
