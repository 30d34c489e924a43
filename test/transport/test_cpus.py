"""Where the threads of a process run."""

from __future__ import annotations

import contextlib
import os
import threading

import pytest

from Zorp.transport import cpus
from Zorp.transport.cpus import Home, best_cpu

PERMITTED = os.sched_getaffinity(0)
several_cpus = pytest.mark.skipif(len(PERMITTED) < 2, reason="this host gives us one CPU only")


@pytest.fixture
def home():
    yield Home()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):        # a thread that has just ended
            os.sched_setaffinity(int(task), PERMITTED)
            os.sched_setscheduler(int(task), os.SCHED_OTHER, os.sched_param(0))


def in_a_thread(function):
    """Return what the function returns in a thread of its own."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join(10)
    return results[0]


@several_cpus
def test_threads_share_one_cpu(home):
    # when the process settles
    home.settle()
    # then it and the threads it starts have one and the same CPU
    mine = os.sched_getaffinity(0)
    assert len(mine) == 1
    assert in_a_thread(lambda: os.sched_getscheduler(0)) == os.SCHED_BATCH
    assert in_a_thread(lambda: os.sched_getaffinity(0)) == mine


@several_cpus
def test_who_works_in_the_kernel_may_go_everywhere_and_comes_back(home):
    # given a settled process
    home.settle()
    mine = os.sched_getaffinity(0)
    # when a thread steps out
    with home.away():
        inside, other = os.sched_getaffinity(0), in_a_thread(lambda: os.sched_getaffinity(os.getpid()))
    # then it had every CPU inside, and has the common one behind it
    assert inside == PERMITTED
    assert other == PERMITTED            # this test runs in the main thread, which is the one that is away
    assert os.sched_getaffinity(0) == mine


@several_cpus
def test_a_crowded_cpu_is_left_but_not_by_threads_that_are_away(home, monkeypatch):
    # given a settled process whose CPU others keep busy
    home.settle()
    (mine,) = os.sched_getaffinity(0)
    monkeypatch.setattr(cpus, "best_cpu", lambda present, busy, own: min(PERMITTED - {present}))
    monkeypatch.setattr(cpus.random, "random", lambda: 0.0)
    away, looked = threading.Event(), threading.Event()
    seen = []

    def work_in_the_kernel():
        with home.away():
            away.set()
            looked.wait(10)
            seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=work_in_the_kernel)
    thread.start()
    assert away.wait(10)
    # when the process looks around
    home.review()
    looked.set()
    thread.join(10)
    # then it has moved, and the thread that was away kept all its CPUs
    assert os.sched_getaffinity(0) == {min(PERMITTED - {mine})}
    assert seen == [PERMITTED]


def test_nothing_happens_without_settle(home):
    # given a process that never settled
    before = os.sched_getaffinity(0)
    # when it is asked to look around and to step out
    home.review()
    with home.away():
        inside = os.sched_getaffinity(0)
    # then the kernel goes on deciding
    assert inside == os.sched_getaffinity(0) == before


def test_nothing_happens_without_an_interpreter_lock(home, monkeypatch):
    monkeypatch.setattr(cpus, "has_interpreter_lock", lambda: False)
    home.settle()
    assert os.sched_getaffinity(0) == PERMITTED


@several_cpus
def test_in_a_crowd_the_kernel_decides_until_it_is_calm(home, monkeypatch):
    # given a settled process
    home.settle()
    mine = os.sched_getaffinity(0)
    monkeypatch.setattr(cpus.random, "random", lambda: 0.0)
    # when others keep all CPUs busy, not only for a moment
    monkeypatch.setattr(cpus, "best_cpu", lambda present, busy, own: None)
    home.review()
    for_a_moment = os.sched_getaffinity(0)
    home.review()
    crowded = os.sched_getaffinity(0)
    # and later they do no longer
    monkeypatch.setattr(cpus, "best_cpu", lambda present, busy, own: min(mine))
    home.review()
    # then the process could go everywhere meanwhile, and is together again now
    assert for_a_moment == mine
    assert crowded == PERMITTED
    assert os.sched_getaffinity(0) == mine


@several_cpus
def test_only_what_happened_since_the_look_counts(home, monkeypatch):
    # given a settled process, and others who kept every CPU busy in the past
    seen = []
    long_ago = dict.fromkeys(PERMITTED, 0.0)
    now = dict.fromkeys(PERMITTED, 1000.0)
    answers = iter([long_ago, now, now])
    monkeypatch.setattr(cpus, "busy_seconds", lambda: next(answers))
    monkeypatch.setattr(cpus, "best_cpu", lambda present, busy, own: seen.append(busy) or present)
    home.settle()
    # when it looks, and reviews after that
    home.look()
    home.review()
    # then the past is none of its business
    assert seen == [dict.fromkeys(PERMITTED, 0.0)]


@pytest.mark.parametrize(("present", "busy", "own", "expected"), [
    (0, {0: 1.0, 1: 0.1}, 0.5, 1),              # others take half of our CPU, the other is nearly idle
    (0, {0: 1.0, 1: 0.1}, 0.95, 0),             # we alone keep it busy: it would be the same there
    (0, {0: 1.0, 1: 0.5}, 0.7, 0),              # no better elsewhere
    (0, {0: 0.5, 1: 0.0}, 0.2, 0),              # room enough
    (0, {0: 1.0, 1: 0.0}, 0.01, 0),             # we have nothing to do anyway
    (0, {0: 1.0, 1: 0.4, 2: 0.1}, 0.4, 2),      # the least busy of several
    (0, {0: 1.0, 1: 1.0}, 0.5, None),           # others keep both busy
    (0, {0: 1.0, 1: 1.0}, 0.05, None),          # so much that little is left for us
    (0, {0: 1.0, 1: 1.0}, 0.01, 0),             # we had nothing to do and were in nobody's way
    (None, {0: 1.0, 1: 0.9}, 0.8, None),        # still a little too much
    (None, {0: 0.9, 1: 0.8}, 0.8, 1),           # calm again
])
def test_where_to_be(present, busy, own, expected):
    assert best_cpu(present, busy, own) == expected


def test_time_of_cpus_is_read_from_the_kernel():
    busy = cpus.busy_seconds()
    assert set(busy) >= PERMITTED
    assert all(seconds > 0 for seconds in busy.values())
