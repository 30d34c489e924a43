"""Questions and small orders to running instances (zorpctl, observable scenarios 15 to 19, 30, 33)."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from test.support.daemon import wait_until
from test.support.gateway import ended
from test.support.host import ROOT
from test.support.syslog import SyslogReceiver
from Zorp.runtime.answers import escape
from zorpctl.szig import components


@pytest.fixture
def intra(host):
    """A host with a running instance whose sessions last as long as a server that never answers."""
    server = socket.create_server(("127.0.0.1", 0))
    host.port = host.instance("intra", server_port=server.getsockname()[1])
    assert host.zorpctl("start").status == 0
    yield host
    server.close()


def session(host):
    """Open a session and wait until it is counted."""
    client = socket.create_connection(("127.0.0.1", host.port), 10)
    wait_until(lambda: "client_address" in host.zorpctl("conns").out, "the session in the tree")
    return client


def test_verbose_status_has_six_lines(intra):
    lines = intra.zorpctl("status", "-v").out.splitlines()
    pid = intra.process("intra#0").worker_pid()
    assert re.fullmatch(rf"intra#0: running, \d+ threads active, pid {pid}", lines[0])
    assert [line.split(":")[0] for line in lines[1:]] == ["started at", "policy", "cpu", "memory", "sessions"]
    assert re.fullmatch(r"memory: vsz=\d+kB, rss=\d+kB", lines[4])
    assert lines[5] == "sessions: running=0, of older policies=0"


def test_status_as_json(intra):
    outcome = intra.zorpctl("status", "--json")
    (state,) = json.loads(outcome.out)
    assert (outcome.status, state["process"], state["running"], state["policy_current"]) == (0, "intra#0", True, True)


def test_log_level_is_set_and_shown(intra):
    assert intra.zorpctl("log", "-s", "7", "intra").out.strip() == "intra#0: New verbose_level=7"
    assert "intra#0: verbose_level=7" in intra.zorpctl("log", "intra").out
    assert "intra#0: New verbose_level=8" in intra.zorpctl("inclog", "intra").out
    assert "intra#0: New verbose_level=7" in intra.zorpctl("declog").out
    refused = intra.zorpctl("log", "intra", "-s", "11")
    assert (refused.status, "Log level is out of range, 0 to 10" in refused.err) == (1, True)


def test_log_spec_is_set_and_shown(intra):
    assert "intra#0: New logspec='plug.*:6'" in intra.zorpctl("log", "--logspec", "plug.*:6", "intra").out
    assert "logspec='plug.*:6'" in intra.zorpctl("log").out
    refused = intra.zorpctl("log", "-S", "a_b:3")
    assert refused.status == 1
    assert "Log specification has not been set. It is a list of category:level, as '*.summary:4," in refused.err
    assert "; pattern:number expected at 'a_b:3'" in refused.err


def test_a_spec_that_drops_the_audit_trail_is_warned_about(intra):
    # given a specification without summaries; when it is set
    outcome = intra.zorpctl("log", "-S", "smtp.*:6")
    # then it holds, and the warning has the one that keeps them
    assert (outcome.status, outcome.out.strip()) == (0, "intra#0: New logspec='smtp.*:6'")
    assert "does not name core.summary, core.accounting" in outcome.err
    kept = re.search(r"zorpctl log -S '(.*)'", outcome.err)[1]
    assert kept == "*.summary:4,*.accounting:4,smtp.*:6"
    # and that one needs no warning
    outcome = intra.zorpctl("log", "-S", kept)
    assert (outcome.status, outcome.err) == (0, "")


def test_the_tree_shows_an_open_session(intra):
    with session(intra):
        lines = intra.zorpctl("szig", "-r", "conns", "intra").out.splitlines()
    assert lines[0] == "Process intra#0: walking"
    assert any(re.fullmatch(r"conns\.intra_plug\.0\.0\.0\.client_address: AF_INET\(127\.0\.0\.1:\d+\)", line)
               for line in lines)


@pytest.mark.parametrize(("node", "warned"), [
    ("nonsense", True), ("conns.nonsense.1", True), ("conns", False), ("stats.audit_running", False),
    ("info.policy", False), ("zorp.stats", False)])
def test_a_node_that_does_not_exist_is_warned_of(intra, node, warned):
    outcome = intra.zorpctl("szig", "-r", node)
    assert outcome.out.startswith(f"Process intra#0: walking\n{node}: None\n")
    assert ("There is no node" in outcome.err, outcome.status) == (warned, 0)


def test_one_session_is_ended(intra):
    # given an open session
    with session(intra) as client:
        found = re.search(r"session_id=([^;]*);", intra.zorpctl("conns").out)[1]
        # when it is stopped by its id
        assert intra.zorpctl("stop-session", "-i", found).status == 0
        # then the client sees the end
        client.settimeout(5)
        assert ended(client)
    assert intra.zorpctl("stop-session", "-i", "svc/none:1").status == 1


def test_sessions_of_older_policies_are_shown_and_can_be_ended(intra):
    # given two sessions, then a reload and a third session
    with session(intra) as old, socket.create_connection(("127.0.0.1", intra.port), 10) as second:
        wait_until(lambda: len(intra.zorpctl("conns").out.splitlines()) == 2, "two sessions in the tree")
        assert intra.zorpctl("reload").status == 0
        with socket.create_connection(("127.0.0.1", intra.port), 10):
            # then all of them are shown, and status tells them apart
            wait_until(lambda: len(intra.zorpctl("conns").out.splitlines()) == 3, "three sessions in the tree")
            (state,) = json.loads(intra.zorpctl("status", "--json").out)
            assert (state["sessions"], state["draining_sessions"]) == (1, 2)
            assert "2 sessions of older policies" in intra.zorpctl("status").out
            # and the id of an old one ends it
            address = f"127.0.0.1:{old.getsockname()[1]}"
            (line,) = [line for line in intra.zorpctl("conns").out.splitlines() if address in line]
            assert intra.zorpctl("stop-session", "-i", re.search(r"session_id=([^;]*);", line)[1]).status == 0
            old.settimeout(5)
            assert ended(old)
        assert second.fileno() >= 0


def test_gui_status_is_a_table_of_nine_columns(intra):
    outcome = intra.zorpctl("gui-status")
    rows = [row for row in csv.reader(io.StringIO(outcome.out), delimiter=";") if row]
    assert outcome.status == 0
    assert [len(row) for row in rows] == [9, 9]
    assert rows[1][:3] == ["intra#0", "0", "running"]


def test_deadlock_check_is_switched(intra):
    assert "intra#0: Deadlockcheck=" in intra.zorpctl("deadlockcheck").out
    assert "intra#0: Deadlockcheck=False" in intra.zorpctl("deadlockcheck", "--disable").out


def test_a_hung_daemon_costs_the_timeout_and_a_failure_line(intra):
    # given a worker and a master that do not run
    process = intra.process("intra#0")
    for pid in (process.worker_pid(), process.master_pid()):
        os.kill(pid, signal.SIGSTOP)
    # when the state is asked for
    before = time.monotonic()
    outcome = intra.zorpctl("status")
    # then an answer comes within the timeout
    assert time.monotonic() - before < 15
    assert outcome.status == 1
    assert "intra#0: Error while communicating through szig" in outcome.err


USAGE = {
    "help": (["help"], 0), "--help": (["--help"], 0), "version": (["version"], 0), "coredump": (["coredump"], 0),
    "unknown": (["nosuch"], 2), "nothing": ([], 2), "authorize without what": (["authorize", "--nonsense"], 2),
}


@pytest.mark.parametrize(("arguments", "status"), USAGE.values(), ids=USAGE)
def test_usage(host, arguments, status):
    assert host.zorpctl(*arguments).status == status


def test_a_command_with_leading_dashes(host):
    outcome = host.zorpctl("--version")
    assert (outcome.status, outcome.out.startswith("Zorp ")) == (0, True)
    assert host.zorpctl("--nonsense").status == 2


@pytest.mark.parametrize(("arguments", "text"), [
    (["authorize", "-d", "why"], "either the '--accept' or '--reject' option has to be specified"),
    (["authorize", "-a", "x", "-r", "y", "-d", "why"], "both reject and accept cannot be used"),
    (["authorize", "-a", "svc/x:1"], "description is not specified"),
    (["authorize", "-a", "-d", "why"], "proxy instance is not specified"),
    (["authorize", "-a", "svc/x:1", "-d", "why"], "No such command; no proxy of this release waits"),
])
def test_misuse_of_authorize(intra, arguments, text):
    outcome = intra.zorpctl(*arguments)
    assert (outcome.status, text in outcome.err) == (1, True)


def test_an_unknown_command_is_the_one_named(host):
    assert "invalid choice: 'nonsense'" in host.zorpctl("nonsense").err
    assert "unknown option: '--nonsense'" in host.zorpctl("--nonsense").err


def test_a_directory_stands_for_the_files_in_it(host):
    # given the directory instead of its zorpctl.conf
    host.instance("intra")
    result = subprocess.run([sys.executable, str(ROOT / "sbin/zorpctl"), "-c", str(host.etc), "status"],
                            capture_output=True, text=True, check=False)
    # then its instances are the ones that are meant
    assert "intra#0: Process not running" in result.stderr


def test_names_that_mean_nothing(host):
    host.instance("intra")
    unknown = host.zorpctl("status", "nosuch")
    assert (unknown.status, unknown.err.splitlines()[-1]) == (1, "Instance nosuch not found!")
    assert "Instance: intra#x not recognized!" in host.zorpctl("status", "intra#x").err


def test_asking_does_not_make_the_log_grow(host):
    # given an instance with default settings and a log of its own
    with SyslogReceiver(host.directory / "log.sock") as syslog:
        host.instance("intra", zorp_args=f"--log-socket {syslog.path}")
        assert host.zorpctl("start").status == 0
        syslog.wait_for("Starting up")
        host.zorpctl("inclog")
        syslog.wait_for("Changing verbosity level; verbose_level='4'")
        host.zorpctl("declog")
        syslog.wait_for("Changing verbosity level; verbose_level='3'")
        lines = len(syslog.packets)
        # when it is asked again and again; then the log says nothing until something changes
        for command in ("status", "gui-status", "szig", "conns", "log", "status"):
            assert host.zorpctl(command).status == 0
        host.zorpctl("inclog")
        syslog.wait_for("Changing verbosity level; verbose_level='4'", count=2)
        assert [line for line in syslog.packets[lines:] if "LOGGING" not in line and "Changing" not in line] == []


def test_a_bad_line_of_zorpctl_conf_is_named_with_its_file_its_number_and_what_it_takes(host):
    # given the third line in error, and the directory named instead of the file
    conf = host.etc / "zorpctl.conf"
    conf.write_text(f"# ours\n{conf.read_text().strip().splitlines()[0]}\nSTART_WAIT_TIMEOUT=zehn\n")
    outcome = host.zorpctl("-c", str(host.etc), "status")
    # then the warning leads there
    assert ("Invalid zorpctl.conf line at 3: START_WAIT_TIMEOUT=zehn; START_WAIT_TIMEOUT takes seconds, 0 or more, "
            f"like 2.5 ({conf})") in outcome.err


def test_a_reader_who_has_seen_enough_is_no_error(host):
    host.instance("intra")
    assert host.zorpctl("start").status == 0
    # when the output goes to somebody who leaves at once
    command = [sys.executable, str(ROOT / "sbin/zorpctl"), "-c", str(host.etc / "zorpctl.conf"), "szig"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as asking:
        asking.stdout.close()
        assert asking.stderr.read() == ""


def test_a_name_comes_out_of_its_node_as_it_went_in():
    # given names that the daemon escapes byte by byte
    for name in ("plain", "two words", "a.b%", "é", "日本", "\x7f"):
        assert components(f"service.{escape(name)}.sessions_running") == ["service", name, "sessions_running"]
    # and bytes that are no text stay readable
    assert components("service.%FF%2E.x") == ["service", "\\xff.", "x"]
