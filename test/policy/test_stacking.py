"""Stacked proxies and programs in a Plug and an AnyPy: forms, life, harm they may want to do."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import sys
import textwrap
import threading

import pytest

from test.support.children import new_mark, processes, wait_until_gone, zombies_of
from test.support.daemon import wait_until
from test.support.ends import flood, is_reset, reset, whatever_comes
from test.support.plugs import stacking
from test.support.proxies import serve
from Zorp import Globals
from Zorp.AnyPy import AnyPyProxy
from Zorp.Constants import (
    Z_STACK_CUSTOM,
    Z_STACK_PROGRAM,
    Z_STACK_PROVIDER,
    Z_STACK_PROXY,
    Z_STACK_PROXY_IN_SESSION,
    Z_STACK_REMOTE,
    ZV_ACCEPT,
    ZV_REJECT,
)
from Zorp.engine.builtin_proxy import running
from Zorp.Plug import PlugProxy
from Zorp.Session import StackedSession
from Zorp.Stack import AbstractStackingBackend, StackingProvider
from Zorp.stacking.stacking import parse_form
from Zorp.Stream import StreamException, streamPair

__all__ = ["serve"]

BOTH_WAYS = "exec 4<&0; cat <&4 >&1 & cat <&1 >&4; wait"


class Upper(AnyPyProxy):
    """Capital letters towards the server."""

    def proxyThread(self):
        try:
            while True:
                self.server_stream.write(self.client_stream.read(100).upper())
        except StreamException:
            pass


# forms

@pytest.mark.parametrize(("form", "method"), [
    (PlugProxy, Z_STACK_PROXY), ("cat", Z_STACK_PROGRAM), ((Z_STACK_PROXY, PlugProxy), Z_STACK_PROXY),
    ([Z_STACK_PROGRAM, "cat"], Z_STACK_PROGRAM), ((Z_STACK_PROVIDER, "av", "info"), Z_STACK_PROVIDER),
    ((Z_STACK_PROVIDER, ("av", "info")), Z_STACK_PROVIDER), ((Z_STACK_REMOTE, None, "x"), Z_STACK_REMOTE), ((77,), 77),
])
def test_forms(form, method):
    assert parse_form(form).method == method


@pytest.mark.parametrize("form", [
    (Z_STACK_PROXY,), (Z_STACK_PROXY, PlugProxy, None), (Z_STACK_PROXY, "PlugProxy"), (Z_STACK_PROXY, int),
    (Z_STACK_PROGRAM, 5), (Z_STACK_PROGRAM, "a\0b"), (), 5, ("cat",), (Z_STACK_PROXY_IN_SESSION, PlugProxy, None),
    (Z_STACK_PROVIDER, ("av",)), object(),
])
def test_malformed_forms_pass_nothing(serve, form):
    with serve(stacking(form)) as session:
        session.client.sendall(b"abc")
        assert whatever_comes(session.server) == b""
        session.wait_for_end()
    line = session.log.find("Invalid stack tuple;")[0]
    assert (line.tag, line.level) == ("core.policy", 1)
    assert session.log.find("Could not start stacked proxy, rejecting transfer;")


@pytest.mark.parametrize("form", [(Z_STACK_REMOTE, None, "info"), (99, "x")])
def test_unsupported_methods_pass_nothing(serve, form):
    with serve(stacking(form)) as session:
        session.client.sendall(b"abc")
        assert whatever_comes(session.server) == b""
    line = session.log.find(f"Unsupported stacking method; method='{form[0]}'")[0]
    assert (line.tag, line.level) == ("core.error", 3)


# child proxies

@pytest.mark.parametrize("form", [PlugProxy, (Z_STACK_PROXY, PlugProxy)])
def test_child_proxy_sees_both_directions(serve, form):
    # given a plug inside a plug
    with serve(stacking(form)) as session:
        session.client.sendall(b"request")
        assert session.server.recv(100) == b"request"
        session.server.sendall(b"answer")
        assert session.client.recv(100) == b"answer"
        # then two proxies run, whose ids differ in the last part only, and one server connection exists
        child = session.log.wait_for("Proxy starting; class='PlugProxy'")
        parent = session.log.wait_for("Proxy starting; class='Configured'")
        assert child.session.rpartition("/")[0] == parent.session.rpartition("/")[0]
        assert session.chainer.asked == 1
        # and the log says which descriptors join them
        client, client_of_child, server, server_of_child = re.findall(
            r"\d+", session.log.find("Stacking subproxy; client='")[0].text)
        stacked = session.log.find("Stacking child proxy; client_fd='")[0]
        assert f"client_fd='{client_of_child}', server_fd='{server_of_child}', class='" in stacked.text
        assert session.proxy._stacked[0].client.fd == int(client)
        assert session.proxy._stacked[0].server.fd == int(server)
        assert session.proxy._stacked[0].client.name.endswith("/plug/client_downstream")
        assert session.proxy._stacked[0].server.name.endswith("/plug/server_downstream")
        # when the client leaves, the server hears of it, and when that leaves too, both proxies end
        session.client.close()
        assert session.server.recv(1) == b""
        session.server.close()
        session.wait_for_end()
    assert len(session.log.find("Proxy ending")) == 2


def test_streams_are_named_after_their_place(serve):
    names = []

    class Child(AnyPyProxy):
        def proxyThread(self):
            names.extend([self.client_stream.name, self.server_stream.name])

    with serve(stacking(Child)) as session:
        session.wait_for_end()

    assert [name.rpartition("/")[2] for name in names] == ["client_upstream", "server_upstream"]
    assert all("/anypy/" in name for name in names)


def test_child_inherits_the_session_and_keeps_its_own_values(serve):
    # given a parent that leaves a note, and a child that reads it and writes its own
    seen = {}

    class Child(AnyPyProxy):
        def proxyThread(self):
            seen.update(note=self.session.mynote, client=self.session.client_address, own=self.session.client_stream)
            self.session.mynote = "child"

    class Parent(PlugProxy):
        def requestStack(self):
            self.session.mynote = "parent"
            return Child

        def shutdown(self):
            seen["after"] = self.session.mynote

    with serve(Parent) as session:
        session.wait_for_end()
    assert (seen["note"], seen["after"]) == ("parent", "parent")
    assert seen["client"] == session.master.client_address
    assert seen["own"] is not session.master.client_stream


def test_child_that_crashes_ends_the_session(serve):
    class Crashing(AnyPyProxy):
        def proxyThread(self):
            self.client_stream.read(1)
            raise ValueError("broken")

    with serve(stacking(Crashing)) as session:
        session.client.sendall(b"abc")
        assert whatever_comes(session.client) == b""
        assert whatever_comes(session.server) == b""
        assert session.verdict == "ABORTED_BY_POLICY_ACTION"


class Crashing(AnyPyProxy):
    """Breaks in the middle of what it passes on."""

    def proxyThread(self):
        self.server_stream.write(self.client_stream.read(3))
        raise ValueError("broken")


class Lying(AnyPyProxy):
    """Says that all is well, and breaks."""

    def proxyThread(self):
        self.set_verdict(ZV_ACCEPT, "all is well")
        self.server_stream.write(self.client_stream.read(3))
        raise ValueError("broken")


HALFWAY = {"proxy crashes": Crashing, "proxy lies": Lying, "program exits": "head -c 3; exit 3",
           "program is killed": "head -c 3; kill -9 $$",
           "program lies": r"printf '0 SETVERDICT\n[]Verdict\nZ_ACCEPT\n\n' >&3; head -c 3; exit 1",
           "program writes rubbish on the control channel": "echo rubbish >&3; head -c 3"}


@pytest.mark.parametrize("form", HALFWAY.values(), ids=HALFWAY)
def test_what_a_broken_child_said_does_not_look_complete(serve, form):
    with serve(stacking(form)) as session:
        session.client.sendall(b"abcdef")
        with contextlib.suppress(OSError):               # the reset may be here already
            session.client.shutdown(socket.SHUT_WR)
        assert is_reset(session.server)
        assert is_reset(session.client)
        session.wait_for_end()
    assert session.log.find("Stacked proxy failed; reason=")


def test_program_that_ends_its_output_and_stays(serve, monkeypatch):
    monkeypatch.setattr("Zorp.Config.config.options.stack_program_exit_wait", 200)
    with serve(stacking("head -c 3; exec 0<&- 1<&-; sleep 1000")) as session:
        session.client.sendall(b"abcdef")
        assert is_reset(session.server)
        session.wait_for_end()
    assert session.log.find("Stacked proxy failed; reason='Program does not end'")


def test_exit_status_may_be_ignored(serve, monkeypatch):
    monkeypatch.setattr("Zorp.Config.config.options.stack_program_ignore_exit", 1)
    with serve(stacking("head -c 3; exit 3")) as session:
        session.client.sendall(b"abc")
        assert whatever_comes(session.server) == b"abc"
        assert session.client.recv(1) == b""


class Waiting(AnyPyProxy):
    """Does nothing but wait for a server that says nothing."""

    def proxyThread(self):
        self.server_stream.read(1)


def test_child_proxy_that_hangs_holds_the_session_no_longer_than_its_timeout(serve):
    with serve(stacking(Waiting, timeout=200)) as session:
        session.client.sendall(b"abc")
        assert whatever_comes(session.client) == b""
        assert whatever_comes(session.server) == b""
    assert session.log.find("Connection timed out; timeout='200'")


def test_child_whose_class_cannot_be_made(serve):
    class Unmakable(PlugProxy):
        def __init__(self, session):
            raise ValueError("no")

    descriptors = len(os.listdir("/proc/self/fd"))
    with serve(stacking(Unmakable)) as session:
        assert whatever_comes(session.client) == b""
        session.wait_for_end()
    assert session.log.find("Error while stacking child proxy; error='ValueError', error_desc='no', ")[0].level == 2
    assert session.log.find("Error stacking subproxy;")[0].level == 3
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors, "the closing of all descriptors")


@pytest.mark.parametrize(("form", "names"), [
    (PlugProxy, ("client", "server")), ("cat", ("client", "server", "control"))], ids=["proxy", "program"])
def test_host_without_descriptors_for_the_pairs(serve, form, names, monkeypatch):
    for number, name in enumerate(names):
        monkeypatch.setattr("Zorp.stacking.stacking.streamPair", pairs_but(number))
        descriptors = len(os.listdir("/proc/self/fd"))
        with serve(stacking(form)) as session:
            assert whatever_comes(session.server) == b""
            assert session.verdict == "DENIED_BY_UNKNOWN_FAIL"
        line = session.log.find(f"Error creating {name} socketpair for stacked proxy; error='")[0]
        assert (line.tag, line.level) == ("core.error", 1)
        assert len(os.listdir("/proc/self/fd")) <= descriptors


def pairs_but(number):
    """Return a streamPair() that fails after so many."""
    left = [number]

    def pair(*arguments):
        if not left[0]:
            raise OSError("I/O error during socketpair.")
        left[0] -= 1
        return streamPair(*arguments)

    return pair


@pytest.mark.parametrize("program", ["/no/such/program", "exit 3", "kill -KILL $$"])
def test_a_session_whose_program_failed_was_not_accepted(serve, program):
    with serve(stacking(program)) as session:
        assert is_reset(session.client)
        assert session.verdict == "DENIED_BY_UNKNOWN_FAIL"
        assert session.master.refusal_reason == "the stacked proxy failed"


def test_a_session_that_is_stopped_was_accepted_whatever_becomes_of_its_program(serve):
    with serve(stacking("exec 4<&0; cat <&4 >&1; sleep 60")) as session:
        session.client.sendall(b"abc")
        assert session.server.recv(3) == b"abc"
        assert running.stop_session(session.master.session_id)
        assert session.verdict == "ACCEPTED"


def test_a_client_that_is_reset_ends_a_session_whose_program_does_not_read(serve):
    with serve(stacking("sleep 60")) as session:
        session.client.settimeout(0.3)
        flood(session.client)
        reset(session.client)
        session.wait_for_end()


def test_plug_needs_the_streams_of_what_it_stacks(serve):
    # given a policy that stacks in a session of its own making, and keeps the streams for itself
    class Parent(PlugProxy):
        def requestStack(self):
            self.mine = [streamPair(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(2)]
            return (Z_STACK_PROXY_IN_SESSION, PlugProxy, StackedSession(self.session), self.mine[0][0], self.mine[1][0])

    with serve(Parent) as session:
        session.client.sendall(b"abc")
        assert whatever_comes(session.server) == b""
        assert session.verdict == "DENIED_BY_UNKNOWN_FAIL"
    assert session.log.find("Stacked proxy leaves no stream to its parent, rejecting transfer;")


def test_session_of_a_policy_s_making_whose_proxy_cannot_be_made(serve):
    class Parent(PlugProxy):
        def requestStack(self):
            return (Z_STACK_PROXY_IN_SESSION, PlugProxy, StackedSession(self.session), None, None)

        def stackProxyInSession(self, proxy_class, session, stack_info):
            return None

    descriptors = len(os.listdir("/proc/self/fd"))
    with serve(Parent) as session:
        assert whatever_comes(session.server) == b""
        session.wait_for_end()
    line = session.log.find("Error stacking subproxy, the proxy object returned by stackProxyInSession() is inv")[0]
    assert (line.tag, line.level) == ("core.error", 3)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors, "the closing of all descriptors")


def test_policy_may_replace_stack_proxy(serve):
    class Parent(PlugProxy):
        stack_proxy = PlugProxy

        def stackProxy(self, client_stream, server_stream, proxy_class, stack_info):
            return super().stackProxy(client_stream, server_stream, Upper, stack_info)

    with serve(Parent) as session:
        session.client.sendall(b"abc")
        assert session.server.recv(10) == b"ABC"


def test_proxy_that_stacks_itself_without_end_is_stopped(serve):
    class Endless(PlugProxy):
        pass

    Endless.stack_proxy = Endless
    with serve(Endless) as session:
        assert whatever_comes(session.client) == b""
        session.wait_for_end()
    assert session.log.find("Stacking too deep; depth='17', max='16'")


def test_stop_request_reaches_a_child_that_waits(serve):
    with serve(stacking(Waiting)) as session:
        session.log.wait_for("Proxy starting; class='Waiting'")
        session.server.sendall(b"")
        session.proxy.request_stop()
        session.wait_for_end()


# AnyPy as parent

def test_anypy_stacks_and_talks_to_the_child(serve):
    heard = []

    class Parent(AnyPyProxy):
        def proxyThread(self):
            to_child, from_child = self.stack(Z_STACK_PROXY, Upper)
            to_child.write("hello")
            heard.append(from_child.read(5))

    with serve(Parent) as session:
        session.wait_for_end()
    assert heard == ["HELLO"]
    # and the child is gone with its parent
    assert len(session.log.find("Proxy ending")) == 2


def test_anypy_stacks_in_a_session_of_its_own_making(serve):
    heard = []

    class Parent(AnyPyProxy):
        def proxyThread(self):
            subsession = StackedSession(self.session)
            ours, theirs = streamPair(socket.AF_UNIX, socket.SOCK_STREAM)
            ends = self.stack(Z_STACK_PROXY_IN_SESSION, Upper, subsession, theirs, None)
            ours.write("hello")
            heard.extend([ends[0], ends[1].read(5)])
            ours.close()

    with serve(Parent) as session:
        session.wait_for_end()
    assert heard == [None, "HELLO"]


@pytest.mark.parametrize("argument", [Upper, "tr a-z A-Z", (Z_STACK_PROXY, Upper)])
def test_anypy_stacks_a_single_argument(serve, argument):
    heard = []

    class Parent(AnyPyProxy):
        def proxyThread(self):
            to_child, from_child = self.stack(argument)
            to_child.write("hello")
            to_child.shutdown(socket.SHUT_WR)
            heard.append(from_child.read(5))

    with serve(Parent) as session:
        session.wait_for_end()
    assert heard == ["HELLO"]


def test_parent_hears_how_long_the_output_is_going_to_be(serve):
    told = []

    class Child(AnyPyProxy):
        def proxyThread(self):
            self.set_content_hint(5)
            self.server_stream.write("hello")

    class Parent(AnyPyProxy):
        def proxyThread(self):
            _, from_child = self.stack(Z_STACK_PROXY, Child)
            told.append((from_child.read(5), self._stacked[0].verdict.content_length))

    with serve(Parent) as session:
        session.wait_for_end()
    assert told == [("hello", 5)]


# backends

class Echo(AbstractStackingBackend):
    """Gives the ends of two pairs that are joined: what goes in comes out."""

    def stack(self, stack_info=None):
        self.info = stack_info
        near, far = streamPair(socket.AF_UNIX, socket.SOCK_STREAM)
        return near, far


@pytest.mark.parametrize("kind", [Z_STACK_CUSTOM, Z_STACK_PROVIDER])
def test_backend_of_the_site(serve, kind, monkeypatch):
    backend = Echo()
    monkeypatch.setattr(Globals, "stacking_providers", {})
    StackingProvider("echo", backend)
    heard = []

    class Parent(AnyPyProxy):
        def proxyThread(self):
            near, far = self.stack(kind, backend if kind == Z_STACK_CUSTOM else "echo", "info")
            near.write("x")
            heard.append(far.read(1))

    with serve(Parent) as session:
        session.wait_for_end()
    assert (heard, backend.info) == (["x"], "info")


@pytest.mark.parametrize("form", [
    (Z_STACK_PROVIDER, "unknown", "info"), (Z_STACK_CUSTOM, AbstractStackingBackend(), 1)])
def test_backend_that_offers_nothing(serve, form):
    with serve(stacking(form)) as session:
        session.client.sendall(b"abc")
        assert whatever_comes(session.server) == b""
    assert session.log.find("Error stacking subproxy;")


# what Plug does besides

def test_statistics_count_what_the_peers_send(serve):
    calls = []

    class Counting(PlugProxy):
        stack_proxy = PlugProxy

        def config(self):
            super().config()
            self.packet_stats_interval_packet = 2

        def packetStats(self, *counts):
            calls.append(counts)
            return ZV_ACCEPT if len(calls) < 2 else ZV_REJECT

    with serve(Counting) as session:
        for _ in range(2):
            session.client.sendall(b"abc")
            assert session.server.recv(10) == b"abc"
            session.server.sendall(b"z")
            with contextlib.suppress(ConnectionResetError):      # by the second call
                session.client.recv(10)
        session.wait_for_end()
    assert calls == [(1, 1, 3, 1), (2, 2, 6, 2)]
    assert session.log.find("packetStats() requested to abort session; verdict='3'")


# programs

def test_program_changes_what_the_client_sends(serve):
    with serve(stacking((Z_STACK_PROGRAM, "tr a-z A-Z"))) as session:
        session.client.sendall(b"abc")
        session.client.shutdown(socket.SHUT_WR)
        assert whatever_comes(session.server) == b"ABC"
        session.wait_for_end()
    line = session.log.find("Stacking program; client='")[0]
    assert (line.tag, line.level) == ("core.debug", 6)
    assert line.text.endswith("program='tr a-z A-Z'")


def test_program_that_copies_both_directions(serve):
    with serve(stacking(BOTH_WAYS)) as session:
        for number in range(3):
            session.client.sendall(b"question %d" % number)
            assert session.server.recv(100) == b"question %d" % number
            session.server.sendall(b"answer %d" % number)
            assert session.client.recv(100) == b"answer %d" % number


def test_much_data_through_a_program(serve):
    # given more than all the sockets on the way can hold
    data = os.urandom(1 << 20) * 8

    def send():
        session.client.sendall(data)
        session.client.shutdown(socket.SHUT_WR)

    with serve(stacking("cat")) as session:
        sender = threading.Thread(target=send)
        sender.start()
        assert whatever_comes(session.server) == data
        sender.join()


def test_program_has_a_clean_world(serve, monkeypatch):
    """Environment, descriptors, signals, session: only what belongs there."""
    monkeypatch.setenv("SECRET", "do not tell")
    loose = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(loose, True)
    command = ("env; echo descriptors; ls /proc/$$/fd; grep SigIgn /proc/$$/status;"
               " cut -d' ' -f1,5,6 /proc/$$/stat")
    try:
        with serve(stacking(command)) as session:
            text = whatever_comes(session.server).decode()
    finally:
        os.close(loose)
    lines = text.splitlines()
    values = dict(line.split("=", 1) for line in lines if "=" in line)
    assert values["PATH"].startswith("/usr/local/sbin")
    assert {name for name in values if not name.startswith("ZORP_")} <= {"PATH", "LANG", "PWD", "OLDPWD", "SHLVL", "_"}
    assert values["ZORP_SERVICE"] == "test"
    assert values["ZORP_SESSION_ID"].endswith("/plug")
    assert values["ZORP_CLIENT_ADDRESS"].startswith("AF_INET(127.0.0.1:")
    signals = next(index for index, line in enumerate(lines) if line.startswith("SigIgn"))
    assert lines[lines.index("descriptors") + 1:signals] == ["0", "1", "2", "3"]
    # nothing is ignored but the two signals of the C library
    assert int(lines[signals].split()[1], 16) & 0x7FFFFFFF == 0
    pid, group, own_session = lines[-1].split()
    assert pid == group == own_session


def test_program_has_no_capabilities_and_gets_none(serve):
    """Also of user 0, who would get all of them back by executing a program."""
    with serve(stacking("grep -E '^(Cap|NoNewPrivs)' /proc/self/status")) as session:
        lines = whatever_comes(session.server).decode().split()
    status = dict(zip(lines[::2], lines[1::2], strict=True))
    assert [int(status[f"Cap{name}:"], 16) for name in ("Inh", "Prm", "Eff", "Amb")] == [0, 0, 0, 0]
    assert status["NoNewPrivs:"] == "1"


def test_host_without_threads_starts_no_program(serve, monkeypatch):
    monkeypatch.setattr("Zorp.process.program._Spawning.start", refuse_thread)
    with serve(stacking("cat")) as session:
        session.client.sendall(b"abc")
        assert whatever_comes(session.server) == b""
        session.wait_for_end()
    assert session.log.find("Program stacking failed, fork returned error; program='cat'")


def refuse_thread(self):
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("what", ["os.pidfd_open", "os.eventfd"])
def test_host_without_descriptors_to_watch_a_program_runs_none(serve, what, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    # given a program that would not end by itself, and too few descriptors for watching it
    mark, descriptors = new_mark(), len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(what, refuse)
    with serve(stacking(f": {mark}; trap '' TERM; sleep 1000; :")) as session:
        session.client.sendall(b"abc")
        assert whatever_comes(session.server) == b""
        session.wait_for_end()
    # then it is gone, with all that was made for it
    assert session.log.find("Program stacking failed, fork returned error; program=': mark")
    wait_until_gone(mark)
    assert not zombies_of(os.getpid())
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_no_thread_of_the_pool_to_watch_a_program(serve, monkeypatch):
    threads, mark = Globals.threads, new_mark()

    class Full:
        def start(self, name, job):
            return False if name.endswith("/control") else threads.start(name, job)

    monkeypatch.setattr(Globals, "threads", Full())
    with serve(stacking(f": {mark}; sleep 1000; :")) as session:
        assert whatever_comes(session.server) == b""
        session.wait_for_end()
    assert session.log.find("Error starting new thread; error='no thread for a stacked program'")
    wait_until_gone(mark)


def test_command_that_no_program_can_be_given(serve):
    with serve(stacking("echo \ud800")) as session:
        assert whatever_comes(session.server) == b""
        session.wait_for_end()
    assert session.log.find("Program stacking failed, fork returned error;")


def test_session_data_cannot_become_shell_code(serve, tmp_path):
    # given a service whose name would run a command if it got into the command line
    name = f"$(touch {tmp_path}/run)`touch {tmp_path}/run`'; touch {tmp_path}/run; '"
    with serve(stacking('echo "$ZORP_SERVICE"'), name=name) as session:
        assert whatever_comes(session.server).decode().strip() == name
    assert not (tmp_path / "run").exists()


def test_missing_program_passes_nothing_and_is_logged(serve):
    with serve(stacking("/nonexistent/program")) as session:
        session.client.sendall(b"abc")
        assert whatever_comes(session.server) == b""
        session.wait_for_end()
        assert "exit status 127" in session.log.wait_for("Stacked program failed;").text
    assert session.log.find("Stacked program complains;")


@pytest.mark.parametrize(("command", "reason"), [("exit 3", "exit status 3"), ("kill -9 $$", "killed by signal 9")])
def test_exit_status_is_logged(serve, command, reason):
    with serve(stacking(command)) as session:
        session.wait_for_end()
        line = session.log.wait_for("Stacked program failed;")
    assert (line.tag, line.level) == ("core.error", 3)
    assert reason in line.text


HOSTILE = {
    "ignores TERM": "trap '' TERM; while :; do sleep 1; done",
    "forks": "sleep 1000 & sleep 1000 & wait",
    "never reads": "sleep 1000",
    "closes everything and stays": "exec 0<&- 1<&- 3<&- 2<&-; sleep 1000",
    "exits midway": "head -c 3 >/dev/null",
    "stays behind its leader": "(trap '' TERM HUP; sleep 1000) & exit 0",
    "floods the control channel": "yes '0 FOO\n' >&3",
    "sends rubbish for ever on the control channel": "tr -d '\\n' </dev/zero >&3",
    "floods its standard error": "yes >&2",
}


@pytest.mark.parametrize("script", HOSTILE.values(), ids=HOSTILE)
def test_no_process_is_left_and_the_session_ends(serve, script):
    # given a program that means harm
    mark = new_mark()
    with serve(stacking(f": {mark}; {script}", timeout=500)) as session:
        session.client.sendall(b"x" * 1000)
        # then the session ends at the latest when nothing has happened for its timeout
        assert whatever_comes(session.client) == b""
        session.wait_for_end()
        # and nothing is left of the program, not even a zombie
        wait_until_gone(mark)
        wait_until(lambda: not zombies_of(os.getpid()), "the reaping of the program")
        session.log.wait_for("Stacked program ")


def test_client_that_leaves_ends_the_program(serve):
    mark = new_mark()
    with serve(stacking(f": {mark}; sleep 1000; :")) as session:
        wait_until(lambda: processes(mark), "the start of the program")
        session.client.close()
        session.server.close()
        session.proxy.request_stop()
        session.wait_for_end()
        wait_until_gone(mark)


def test_complaints_of_a_program_are_logged_within_bounds(serve):
    with serve(stacking("seq 1 250 >&2; exit 0")) as session:
        session.wait_for_end()
        session.log.wait_for("Complaints of stacked program not logged; lines='150'")
    assert len(session.log.find("Stacked program complains;")) == 100


def control_script(tmp_path, *requests, deaf=False):
    """Return a command that writes requests to descriptor 3 and the answers to the server.

    deaf: it reads no answer before the last has been written.
    """
    script = tmp_path / "control.py"
    script.write_text(textwrap.dedent(f"""
        import os, select, socket
        control = socket.socket(fileno=3)
        for request in {requests!r}:
            control.sendall(request)
        control.shutdown(socket.SHUT_WR)
        if {deaf}:
            hung_up = select.poll()
            hung_up.register(control, 0)
            hung_up.poll()
        while data := control.recv(65536):
            os.write(1, data)
        """))
    return f"exec {sys.executable} {script}"


def test_requests_that_fail_say_why(serve, tmp_path):
    command = control_script(
        tmp_path, b"1 SETVERDICT\n[]Verdict\nZ_ACCEPT\n\n", b"0 FOO\n\n", b"0 SETVERDICT\n\n",
        b"0 SETVERDICT\n[]Verdict\nZ_ACCEPT\n[5]Description\na\nb\nc\n\n")
    with serve(stacking(command)) as session:
        answers = whatever_comes(session.server).decode()
    # in the order of the requests; a plug has no transfer that a verdict could decide
    assert answers == "".join(
        f"0 RESULT\n[{len(reason)}]Fail-Reason\n{reason}\n[7]Status\nFailure\n\n" for reason in (
            "Non-zero session-id", "Unknown request received", "No Verdict header in SETVERDICT request",
            "Proxy does not support Stack interface"))
    assert session.log.find("Read request from stack-control channel; request='FOO'")
    assert session.log.find("Error processing control channel request; request='FOO',"
                            " reason='Unknown request received'")
    assert session.log.find("Responding on stack-control channel; response='RESULT'")


def test_program_that_asks_for_ever_and_does_not_listen(serve, tmp_path):
    with serve(stacking(control_script(tmp_path, b"0 FOO\n\n" * 1001, deaf=True))) as session:
        answers = whatever_comes(session.server)
        session.wait_for_end()
    # it is answered until nothing more fits, once told of as our error, and heard a thousand times
    assert 0 < answers.count(b"0 RESULT") < 1000
    lines = session.log.find("Internal error writing response to stack-control channel;")
    assert [(line.tag, line.level) for line in lines] == [("core.error", 1)]
    assert len(session.log.find("Read request from stack-control channel; request='FOO'")) == 1000
    line = session.log.find("Too many requests; max='1000'")[0]
    assert (line.tag, line.level) == ("zas.error", 3)


def test_program_that_closes_the_channel_behind_its_request(serve):
    with serve(stacking(r"printf '0 FOO\n\n' >&3; exec 3>&-; cat")) as session:
        session.client.sendall(b"abc")
        session.client.shutdown(socket.SHUT_WR)
        # the content passes all the same
        assert whatever_comes(session.server) == b"abc"
        session.server.close()
        session.wait_for_end()
    assert session.log.find("Read request from stack-control channel; request='FOO'")
    assert not session.log.find("Stacked proxy failed")
