"""Nothing that an administrator does, and no crash of one process, costs a client anything it need not.

The short forms run always; the long ones, the same with more of everything, with `pytest -m soak`.
"""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest

from test.runtime.test_crash import is_gone
from test.support.daemon import wait_until
from test.support.load import POLICY, Load

BROKEN = "from Zorp.Core import *\nthis is no policy\n"


def soak(*values):
    return pytest.param(*values, marks=[pytest.mark.soak, pytest.mark.timeout(600)])


@pytest.fixture
def under_load(zorp):
    """Make a daemon that serves a load: under_load(arguments=...) -> (daemon, load)."""
    loads = []

    def make(per_second: int = 220, **arguments):
        load = Load(per_second)
        loads.append(load)
        load.__enter__()
        daemon = zorp(POLICY, verbosity=4, name="intra", word="word0", **load.policy_values(), **arguments)
        if not daemon.detached:
            daemon.log.wait_for("core.info", 4, "Accepting connections")
        return daemon, load

    yield make
    for load in loads:
        load.__exit__()


def summaries(daemon) -> int:
    return len(daemon.log.find("core.summary", 4, "Connection summary"))


def wait_for_time(at_s: float) -> None:
    wait_until(lambda: time.monotonic() >= at_s, "time to pass", timeout_s=60)


def reload(daemon, load, policy: str, word: str) -> bool:
    """Reload while the load goes on, begin a session that lasts; return whether the policy was taken."""
    daemon.write_policy(policy, word=word)
    with daemon.control(0) as control:
        answer = control.ask("RELOAD WAIT")
    load.long()
    return answer.startswith("OK")


# least: sessions per second that the load must have been; on a machine that does other things, too, any
@pytest.mark.parametrize(("seconds", "reloads", "processes", "least"),
                         [(6, 5, 1, 1), soak(30, 15, 1, 200), soak(30, 15, 2, 200)])
def test_reloads_cost_no_client_anything(under_load, seconds, reloads, processes, least):
    # given a steady load, short and long sessions mixed
    daemon, load = under_load(arguments=["--num-of-processes", str(processes)])
    load.begin()
    began_s = time.monotonic()
    in_force = [(began_s, "word0")]
    load.long()
    # when the policy is reloaded again and again, twice with one that is broken
    broken = {reloads // 3, 2 * reloads // 3}
    for number in range(reloads):
        wait_for_time(began_s + (number + 0.5) * seconds / reloads)
        word = f"word{number + 1}"
        taken = reload(daemon, load, BROKEN if number in broken else POLICY, word)
        assert taken == (number not in broken)
        if taken:
            in_force.append((time.monotonic(), word))
    wait_for_time(began_s + seconds)
    load.finish()
    # then no connection was refused, reset or lost a byte
    assert load.failures == []
    assert load.per_second >= least
    # and every session ended under the policy it began with
    assert len(load.longs) == reloads + 1
    assert [set(session.words) for session in load.longs if len(set(session.words)) != 1] == []
    # and who came after a reload was served by the new policy
    order = [word for _since_s, word in in_force]
    assert [(answer, word) for answer in load.answers for since_s, word in in_force
            if answer.began_s > since_s and order.index(answer.word) < order.index(word)] == []
    # and each of them is accounted for
    wait_until(lambda: summaries(daemon) >= load.served, "the last summary", 30)
    assert summaries(daemon) == load.served == load.begun + 2 * len(load.longs)
    # and the processes of old policies have gone
    wait_until(lambda: len(workers_of(daemon)) == processes, "the end of the old workers")


def workers_of(daemon) -> list[int]:
    with open(f"/proc/{daemon.pid}/task/{daemon.pid}/children") as children:
        return [int(pid) for pid in children.read().split()]


def kill_and_start_again(daemon, load) -> None:
    wait_until(lambda: len(workers_of(daemon)) == 2, "both workers")
    load.begin()
    load.long()
    workers = workers_of(daemon)
    # when its master is killed
    daemon.kill(signal.SIGKILL)
    daemon.process.wait(10)
    # then its workers end and its ports are free
    wait_until(lambda: all(map(is_gone, workers)), "the end of the workers")
    load.finish()
    for port in (load.port, load.word_port):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    # and the next start serves, with nothing to clear away
    before, mark = load.served, daemon.log.mark()
    daemon.start()
    daemon.log.wait_for("core.info", 4, "Accepting connections", after=mark)
    load.longs.clear()
    load.failures.clear()
    load.begin()
    wait_until(lambda: load.served > before + 50, "the load to be served")
    load.finish()
    assert load.failures == []


@pytest.mark.parametrize("rounds", [1, soak(10)])
def test_after_the_death_of_the_master_the_next_start_serves(under_load, rounds):
    # given an instance of two processes under load
    daemon, load = under_load(arguments=["--num-of-processes", "2"])
    for _round in range(rounds):
        kill_and_start_again(daemon, load)


def kill_one(daemon, load, number: int, within_s: float) -> tuple[int, float]:
    """Kill worker `number` of two; return its pid and when that was."""
    pid, survivor = daemon.worker_pid(number), daemon.worker_pid(1 - number)
    answers = len(load.answers)
    os.kill(pid, signal.SIGKILL)
    killed_s = time.monotonic()
    # then the other one serves on, and a successor is there in time
    wait_until(lambda: any(answer.pid == survivor for answer in load.answers[answers:]), "the survivor", within_s)
    wait_until(lambda: daemon.worker_pid(number) != pid, "the successor")
    assert time.monotonic() - killed_s < within_s
    successor = daemon.worker_pid(number)
    wait_until(lambda: any(answer.pid == successor for answer in load.answers), "the successor's first answer")
    return pid, killed_s


# within_s: on a machine that does other things, too, only not so late that somebody would notice
@pytest.mark.parametrize(("kills", "within_s"), [(1, 10.0), soak(10, 2.0)])
def test_one_worker_dies_the_other_serves(under_load, kills, within_s):
    # given two workers under load
    daemon, load = under_load(arguments=["--num-of-processes", "2", "--restart-max", "30",
                                         "--restart-interval", "90"])
    wait_until(lambda: daemon.pid_file(1).exists(), "the second worker")
    load.begin()
    # when one of them is killed, and the other one, and so on
    deaths, at_risk = [], 0
    for number in range(kills):
        for _ in range(6):
            load.long()
        at_risk += load.in_flight + 50               # and those whose client has gone already
        deaths.append(kill_one(daemon, load, number % 2, within_s))
    load.finish()
    # then nobody was refused, and only sessions of the killed workers were cut, when they were killed
    dead = {pid for pid, _killed_s in deaths}
    assert [failure for failure in load.failures if "Refused" in failure.problem
            or failure.pid not in (None, *dead)
            or not any(0 <= failure.at_s - killed_s < within_s for _pid, killed_s in deaths)] == []
    # and the summaries add up: one per session that began, but for what a killed worker had at that moment
    began = len(daemon.log.find("core.session", 3, "Starting proxy instance"))
    assert began >= load.served
    if kills == 1:                                   # how much the killed one had depends on how busy the host is
        wait_until(lambda: not unaccounted(daemon, "intra#1"), "every summary of the survivor", 30)
    else:
        wait_until(lambda: began - summaries(daemon) <= at_risk, "the last summary", 30)


def unaccounted(daemon, process: str) -> set[str]:
    """The sessions of a process, which was not killed, that began and have no summary."""
    began, ended = ({line.session for line in daemon.log.find(tag, level, text)} for tag, level, text in (
        ("core.session", 3, "Starting proxy instance"), ("core.summary", 4, "Connection summary")))
    return {session for session in began - ended if f"/{process}/" in session}
