"""A day in the life of two instances of two processes each, told by zorpctl from start to stop."""

from __future__ import annotations

import json
import os
import re
import signal
import time

import pytest

from test.runtime.test_under_load import BROKEN, soak
from test.support.daemon import wait_until
from test.support.load import POLICY, Load

ALL = ["first#0", "first#1", "second#0", "second#1"]


@pytest.fixture
def day(host):
    """Two instances under a load each, not started: (host, {name: load})."""
    loads = {}
    for name in ("first", "second"):
        loads[name] = Load(per_second=60).__enter__()
        values = loads[name].policy_values()
        host.ports[name] = values.pop("port")
        host.instance(name, POLICY, "--deadlock-check-timeout 1 --verbose 3", "--num-of-processes 2", word="monday",
                      **values)
        loads[name].values = values
    yield host, loads
    for load in loads.values():
        load.__exit__()


def change(host, load, name: str, text: str, word: str) -> None:
    host.policy(name, text, word=word, **load.values)


def lines(outcome) -> list[str]:
    return outcome.out.splitlines()


def names_of(outcome) -> list[str]:
    return [line.partition(":")[0] for line in lines(outcome) if "#" in line]


def in_the_morning(host, loads) -> None:
    # when everything is checked and started
    assert host.zorpctl("check").status == 0
    started = host.zorpctl("start")
    assert (started.status, lines(started)) == (0, ["Starting Zorp:", *(f"{name}: Running" for name in ALL)])
    for load in loads.values():
        load.begin()
        load.long()
    # then status knows four processes, in every form
    assert names_of(host.zorpctl("status")) == ALL
    states = json.loads(host.zorpctl("status", "--json").out)
    assert [state["running"] and state["policy_current"] for state in states] == [True] * 4
    assert len({state["pid"] for state in states}) == 4
    assert len({state["master_pid"] for state in states}) == 2


def a_new_policy(host, loads) -> None:
    # when one policy is changed, then it is not in force until it is reloaded, and a broken one never is
    os.utime(host.etc / "first.py", (1, 1))
    assert sum("policy NOT reloaded" in line for line in lines(host.zorpctl("status"))) == 2
    change(host, loads["first"], "first", BROKEN, "never")
    assert host.zorpctl("check").status == 1
    refused = host.zorpctl("reload", "first")
    assert (refused.status, refused.err.count("Reload failed"), "first.py:2" in refused.err) == (1, 2, True)
    change(host, loads["first"], "first", POLICY, "tuesday")
    taken = host.zorpctl("reload")
    assert (taken.status, lines(taken)[1:]) == (0, [f"{name}: Reload successful" for name in ALL])
    assert "NOT reloaded" not in host.zorpctl("status").out
    wait_until(lambda: loads["first"].answers[-1].word == "tuesday", "the new policy")
    assert loads["second"].answers[-1].word == "monday"


def somebody_complains(host, loads) -> None:
    # when the log is looked at closer, for one process or for all
    assert names_of(host.zorpctl("inclog", "first#1")) == ["first#1"]
    assert re.findall(r"verbose_level=(\d)", host.zorpctl("log").out) == ["3", "4", "3", "3"]
    assert host.zorpctl("log", "-s", "3", "-S", "plug.*:6", "first").status == 0
    # and a session is found and ended
    session = loads["second"].long()
    found = wait_until(lambda: [line for line in host.zorpctl("conns", "--json").out.splitlines()
                                if json.loads(line)["proxy_class"] == "Word"], "the sessions")
    ids = {json.loads(line)["session_id"] for line in found if json.loads(line)["process"].startswith("second")}
    before = len(loads["second"].failures)
    for session_id in ids:
        host.zorpctl("stop-session", "-i", session_id, "second")
    wait_until(lambda: session.failed, "the end of the session")
    wait_until(lambda: len(loads["second"].failures) >= before + 1, "its client to see it")
    loads["second"].failures.clear()


def a_bad_afternoon(host, loads) -> None:
    # when a worker is killed, and another one is stopped
    for name, number in (("first#0", signal.SIGKILL), ("second#1", signal.SIGSTOP)):
        process = host.process(name)
        before = process.worker_pid()
        os.kill(before, number)
        if number == signal.SIGSTOP:
            # then status says which of them does not answer, and returns
            outcome = host.zorpctl("status")
            assert outcome.status == 1
            assert re.search(r"^second#1: ", outcome.err)
        # and it is replaced without anybody doing anything
        wait_until(lambda old=before, process=process: process.worker_pid() != old, "its successor", timeout_s=20)
    wait_until(lambda: host.zorpctl("status").status == 0, "all four to run", timeout_s=20)
    for load in loads.values():
        assert [failure for failure in load.failures if "Refused" in failure.problem] == []


def in_the_evening(host, loads) -> None:
    # when new sessions have been served after all that
    for load in loads.values():
        load.failures.clear()
        served = load.served
        wait_until(lambda load=load, served=served: load.served > served + 20, "more sessions")
        load.finish()
        assert [failure for failure in load.failures if failure.kind.startswith("short")] == []
    # then one instance is restarted as a whole
    masters = {name: host.process(name).master_pid() for name in ALL}
    assert host.zorpctl("restart", "first").status == 0
    assert [host.process(name).master_pid() != masters[name] for name in ALL] == [True, True, False, False]
    # and everything is stopped
    stopped = host.zorpctl("stop")
    assert (stopped.status, lines(stopped)[1:]) == (0, [f"{name}: Stopped" for name in ALL])
    after = host.zorpctl("status")
    assert (after.status, after.err.count("Process not running")) == (1, 4)
    assert not list(host.pid_dir.glob("*.pid"))
    assert not list(host.pid_dir.glob("zorpctl.*"))


@pytest.mark.parametrize("days", [1, soak(3)])
def test_a_day(day, days):
    host, loads = day
    for _ in range(days):
        began_s = time.monotonic()
        for part in (in_the_morning, a_new_policy, somebody_complains, a_bad_afternoon, in_the_evening):
            part(host, loads)
        for name, load in loads.items():
            load.longs.clear()
            change(host, load, name, POLICY, "monday")
        assert time.monotonic() - began_s < 120
