"""Small parts of the runtime: channel, timers, signals, restart budget, failure hook, reloads, process title."""

import os
import resource
import selectors
import signal
import socket
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from test.support.daemon import wait_until
from Zorp.process.signals import SignalPipe
from Zorp.process.timers import Timers
from Zorp.runtime import channel as channels
from Zorp.runtime.admission import Admission
from Zorp.runtime.channel import ChannelClosed
from Zorp.runtime.options import Options
from Zorp.runtime.pidfile import AlreadyRunning, Directory
from Zorp.runtime.reloading import Outcome, Reloads
from Zorp.runtime.slots import Handle
from Zorp.runtime.supervision import FailureHook, RestartBudget
from Zorp.runtime.workers import Workers


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def ends():
    master, worker = channels.pair()
    yield master, worker
    master.close()
    worker.close()


@given(st.text(max_size=300_000))
def test_messages_of_any_length_arrive(text):
    master, worker = channels.pair()
    master.send("question", text=text)
    while master.has_waiting:
        message = worker.receive()
        master.flush()
        if message is not None:
            break
    else:
        message = worker.receive()
    assert (message.kind, message["text"]) == ("question", text)
    master.close()
    worker.close()


def test_descriptors_travel_with_their_message(ends):
    master, worker = ends
    with socket.create_server(("127.0.0.1", 0)) as listener:
        master.send("listener", descriptors=(listener.fileno(),))
        with socket.socket(fileno=worker.receive().descriptors[0]) as copy:
            assert copy.getsockname() == listener.getsockname()
            assert not os.get_inheritable(copy.fileno())


def test_descriptors_that_get_lost_on_the_way_are_missed(ends):
    # given an end that has room for one more descriptor, and is sent two
    master, worker = ends
    with open(os.devnull) as first, open(os.devnull) as second:
        worker.send("loaded", descriptors=(first.fileno(), second.fileno()))
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(first.fileno())
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, limits[1]))
        # when it receives, then it does not take a part for the whole, and keeps nothing of it
        try:
            with pytest.raises(ChannelClosed):
                master.receive()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        again = os.dup(first.fileno())
        os.close(again)
        assert again == free


def test_a_worker_that_does_not_read_never_blocks_the_master(ends):
    master, worker = ends
    for number in range(2000):
        master.send("note", number=number, padding="x" * 1000)
    assert master.has_waiting
    assert worker.receive()["number"] == 0


def test_the_other_end_is_missed(ends):
    master, worker = ends
    worker.close()
    with pytest.raises(ChannelClosed):
        master.receive()
    with pytest.raises(ChannelClosed):
        master.send("note")


def test_what_an_end_said_before_it_closed_is_heard_although_it_left_something_unread(ends):
    # given a worker that hands over and ends, and a master that asks it something meanwhile
    master, worker = ends
    master.send("ping")
    worker.send("handover", state=1)
    worker.send("answer", number=2)
    worker.close()
    # when the master listens, then it has missed nothing
    assert [master.receive().kind, master.receive().kind] == ["handover", "answer"]
    with pytest.raises(ChannelClosed):
        master.receive()


def test_whoever_tells_a_worker_that_has_ended_something_misses_nothing_that_it_said():
    # given a worker that has handed over and ended
    taken, timers, selector = [], Timers(Clock()), selectors.DefaultSelector()
    workers = Workers(Options(), selector, timers, None, lambda _, message: taken.append(message.kind), None, None)
    ours, theirs = channels.pair()
    handle = Handle(1, 1, None, 1, ours, -1)
    selector.register(ours, selectors.EVENT_READ)
    theirs.send("handover")
    theirs.close()
    # when the master tells it something before it has listened, and asks a question
    workers.send(handle, "ping")
    answers = []
    handle.unanswered[1] = answers.append
    timers.run_due()
    # then it has heard the last words, and nobody waits for an answer
    assert (taken, answers) == (["handover"], [None])
    assert handle.channel.closed


def test_what_a_worker_does_not_take_is_offered_again_by_one_timer_however_much_it_is():
    # given a worker that does not read, and a master that has more to say than fits
    clock = Clock()
    timers = Timers(clock)
    workers = Workers(Options(), selectors.DefaultSelector(), timers, None, None, None, None)
    ours, theirs = channels.pair()
    handle = Handle(1, 1, None, 1, ours, -1)
    for number in range(2000):
        workers.send(handle, "note", number=number, padding="x" * 1000)
    offers, flush = [], ours.flush
    ours.flush = lambda: offers.append(flush())
    # when time passes, then each turn offers it once
    for _turn in range(3):
        clock.now_s += 1
        timers.run_due()
    assert offers == [False] * 3
    # and when the worker reads, then it gets everything in order
    ours.flush = flush
    for number in range(2000):
        assert theirs.receive()["number"] == number
        clock.now_s += 1
        timers.run_due()
    assert not ours.has_waiting
    ours.close()
    theirs.close()


def test_timers_run_in_order_and_only_when_due():
    clock, ran = Clock(), []
    timers = Timers(clock)
    timers.after(2, lambda: ran.append("second"))
    timers.after(1, lambda: ran.append("first"))
    timers.after(1.5, lambda: ran.append("cancelled")).cancel()
    assert timers.timeout() == 1
    timers.run_due()
    assert ran == []
    clock.now_s += 5
    timers.run_due()
    assert ran == ["first", "second"]
    assert timers.timeout() is None


def test_a_failing_timer_does_not_take_the_others_along(capsys):
    clock, ran = Clock(), []
    timers = Timers(clock)
    timers.after(1, lambda: 1 / 0)
    timers.after(1, lambda: ran.append("next"))
    clock.now_s += 2
    timers.run_due()
    assert ran == ["next"]
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_signals_wait_for_the_loop():
    pipe = SignalPipe((signal.SIGUSR1, signal.SIGUSR2))
    try:
        assert pipe.arrived() == []
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert pipe.arrived() == [signal.SIGUSR1, signal.SIGUSR2]
        assert pipe.arrived() == []
    finally:
        pipe.close()


def test_the_fifth_start_within_the_interval_is_the_last():
    clock = Clock()
    budget = RestartBudget(5, 60, clock)
    for _start in range(4):
        budget.started()
        assert not budget.exhausted
    budget.started()
    assert budget.exhausted
    clock.now_s += 61
    assert not budget.exhausted
    assert budget.count == 0


def test_the_failure_hook_runs_at_most_once_per_interval(tmp_path):
    clock, told = Clock(), tmp_path / "told"
    hook = tmp_path / "hook"
    hook.write_text("#!/bin/sh\n")
    hook.chmod(0o755)
    runner = FailureHook(Options(failure_hook=str(hook), notify_interval=600), clock)
    assert runner.run("intra", "/p", "signalled", 11, True)
    assert not runner.run("intra", "/p", "signalled", 11, True)
    clock.now_s += 601
    assert runner.run("intra", "/p", "deadlock detected", None, False)
    assert not FailureHook(Options(failure_hook=str(told))).run("intra", "/p", "signalled", 11, True)


def test_a_working_directory_that_was_removed_is_no_reason_to_lose_the_hook(tmp_path, monkeypatch):
    # given a hook that notes its fifth argument, and a process whose directory has gone
    told, hook, place = tmp_path / "told", tmp_path / "hook", tmp_path / "place"
    hook.write_text(f'#!/bin/sh\nprintf %s "$5" > {told}.new && mv {told}.new {told}\n')
    hook.chmod(0o755)
    place.mkdir()
    monkeypatch.chdir(place)
    place.rmdir()
    # when a worker fails, then the hook runs all the same
    assert FailureHook(Options(failure_hook=str(hook))).run("intra", "/p", "signalled", 11, True)
    wait_until(told.exists, "the hook")
    assert told.read_text() == "(null)"


def test_before_any_reload_the_result_is_a_failure():
    told = []
    Reloads().when_ended(told.append)
    assert told == [Outcome(False)]              # as it always was


def test_the_lock_of_a_pid_file_belongs_to_one(tmp_path):
    directory = Directory(str(tmp_path))
    first, second = directory.pid_file("x.pid"), directory.pid_file("x.pid")
    first.acquire()
    with pytest.raises(AlreadyRunning):
        second.acquire()
    first.write(123)
    assert (tmp_path / "x.pid").read_text() == "123\n"
    first.remove()
    first.close()


def test_a_link_planted_in_the_pid_directory_is_not_followed(tmp_path):
    # given a link where the lock, and one where the new pid file would be
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "x.pid.lock").symlink_to(precious)
    (tmp_path / "y.pid.new").symlink_to(precious)
    directory = Directory(str(tmp_path))
    # then neither is written through
    with pytest.raises(OSError, match="symbolic links"):
        directory.pid_file("x.pid").acquire()
    with pytest.raises(OSError, match="symbolic links"):
        directory.pid_file("y.pid").write(1)
    assert precious.read_text() == "precious"


def test_a_missing_pid_directory_is_made(tmp_path):
    Directory(str(tmp_path / "run" / "zorp")).close()
    assert (tmp_path / "run" / "zorp").stat().st_mode & 0o777 == 0o770


def test_connections_per_second():
    clock = Clock()
    admission = Admission(2, clock)
    assert [admission.enter() for _ in range(3)] == [True, True, False]
    clock.now_s += 1
    assert admission.enter()
    assert all(Admission(0, clock).enter() for _ in range(1000))


def test_refusals_are_reported_once_per_second(capsys):
    clock = Clock()
    admission = Admission(1, clock)
    for _ in range(5):
        admission.report_refusal("192.0.2.1")
    clock.now_s += 1
    admission.report_refusal("192.0.2.2")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("host=")[2] for line in lines] == ["'192.0.2.1', refused='1'", "'192.0.2.2', refused='5'"]


def test_the_process_title_is_cut_to_its_room():
    program = ("import sys; sys.path.insert(0, sys.argv[1]); from Zorp.runtime.daemonise import title;"
               "title.show('supervising ' + 'x' * 10000);"
               "print(open('/proc/self/cmdline').read().rstrip(chr(0))[:20])")
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    shown = subprocess.run([sys.executable, "-c", program, root], capture_output=True, text=True, timeout=20)
    assert shown.stdout == "supervising xxxxxxxx\n"
