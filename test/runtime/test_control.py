"""The control socket: protocol, tree, orders, limits."""

import json
import os
import selectors
import signal
import socket
import stat
import subprocess
import sys

import pytest

from test.runtime.policies import ECHO
from test.support.daemon import Control, Daemon, wait_until
from Zorp.process.timers import Timers
from Zorp.runtime.answers import Answers, _session_id, escape, parse_name, unescape
from Zorp.runtime.control import PATIENCE_S, ControlServer
from Zorp.runtime.pidfile import Directory
from Zorp.runtime.slots import Slot

FIXED_ANSWERS = {
    "no such node": ("GETVALUE nosuch.node", "None"),
    "value without name": ("GETVALUE", "None"),
    "inner node": ("GETVALUE stats", "None"),
    "first of the root": ("GETCHILD ", "conns"),
    "child without name": ("GETCHILD", "conns"),
    "sibling without name": ("GETSBLNG", "None"),
    "first sibling": ("GETSBLNG conns", "info"),
    "second sibling": ("GETSBLNG info", "service"),
    "third sibling": ("GETSBLNG service", "stats"),
    "no further sibling": ("GETSBLNG stats", "None"),
    "old root": ("GETCHILD zorp", "zorp.conns"),
    "old root has no value": ("GETVALUE zorp", "None"),
    "below the old root": ("GETSBLNG zorp.conns", "zorp.info"),
    "child keeps its prefix": ("GETCHILD info.policy", "info.policy.file"),
    "unknown": ("FOO", "FAIL No such command"),
    "empty line": ("", "FAIL No such command"),
    "lower case": ("getvalue stats", "FAIL No such command"),
    "private": ("_value stats", "FAIL No such command"),
    "superfluous fields": ("GETVALUE nosuch.node x y", "None"),
    "authorize": ("AUTHORIZE ACCEPT x y", "FAIL No such command"),
    "logging alone": ("LOGGING", "FAIL LOGGING subcommand required"),
    "logging other": ("LOGGING X", "FAIL"),
    "no spec": ("LOGGING SETSPEC", "FAIL No logspec specified"),
    "deadlock alone": ("DEADLOCKCHECK", "FAIL DEADLOCKCHECK subcommand required"),
    "deadlock other": ("DEADLOCKCHECK X", "FAIL"),
    "deadlock off by option": ("DEADLOCKCHECK GET", "OK 0"),
    "reload other": ("RELOAD X", "FAIL Unknown RELOAD subcommand"),
    "no reload yet": ("RELOAD RESULT", "FAIL Reload failed"),
    "core dump": ("COREDUMP", "FAIL Dumping core failed"),
    "no session": ("STOPSESSION svc/none:1", "FAIL No such session"),
    "no session id": ("STOPSESSION", "FAIL No such session"),
    "too short for a session": ("STOPSESSION svc", "FAIL No such session"),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One instance for the tests that only ask."""
    daemon = Daemon(tmp_path_factory.mktemp("shared"), ECHO).start()
    yield daemon
    daemon.end()


@pytest.mark.parametrize(("request_line", "answer"), FIXED_ANSWERS.values(), ids=FIXED_ANSWERS)
def test_fixed_answers(shared, request_line, answer):
    with shared.control() as control:
        assert control.ask(request_line) == answer


def test_ten_requests_in_one_segment_get_ten_answers_in_order(shared):
    # given questions for the worker between questions that the master answers
    with shared.control() as control:
        control.send(b"GETVALUE info.policy.file\nVERSION\n" * 5)
        for _ in range(5):
            assert control.line() == str(shared.policy)
            assert control.line().startswith("OK ")


def test_numbers_and_facts(shared):
    with shared.control() as control:
        assert control.ask("GETVALUE stats.threads_running").isdigit()
        assert control.ask("GETVALUE zorp.info.policy.file") == str(shared.policy)
        assert control.ask("GETVALUE info.policy.file_stamp") == str(int(shared.policy.stat().st_mtime))
        assert control.ask("GETVALUE info.pid") == str(shared.worker_pid())
        assert control.ask("GETVALUE info.process") == "intra"
        assert control.ask("GETVALUE info.policy.generations") == "1"


def test_dump_and_json(shared):
    with shared.control() as control:
        dump = control.dump("DUMP stats")
        assert dump[0] == "stats: None"
        assert all(line.startswith("stats") for line in dump)
        assert "info.policy: None" in control.dump("DUMP")
        assert control.dump("DUMP nosuch") == ["nosuch: None"]
        assert json.loads(control.ask("JSON info"))["instance"] == "intra"


def test_help_names_every_command(shared):
    with shared.control() as control:
        assert "GETVALUE GETCHILD GETSBLNG" in control.ask("HELP")


def test_a_line_that_is_too_long_costs_the_connection(shared):
    with shared.control() as control:
        try:
            control.send(b"x" * 200 * 1024)
            assert control.line() == ""
        except OSError:
            pass                         # closed while we were still sending
    with shared.control() as control:
        assert control.ask("VERSION").startswith("OK")


def test_the_longest_line_is_answered(shared):
    with shared.control() as control:
        assert control.ask("GETVALUE " + "x" * 131_000) == "None"


def test_a_closed_half_gets_its_answers(shared):
    with shared.control() as control:
        control.send(b"GETVALUE info.pid\nVERSION\n")
        control._socket.shutdown(socket.SHUT_WR)
        assert control.line().isdigit()
        assert control.line().startswith("OK")
        assert control.line() == ""


def test_many_idle_connections_leave_room(shared):
    idle = [shared.control() for _ in range(300)]
    with shared.control() as control:
        assert control.ask("VERSION").startswith("OK")
    for one in idle:
        one.__exit__()


def test_whoever_does_not_read_delays_nobody(shared):
    # given a client that asks for a great deal and reads nothing
    with shared.control() as silent, shared.control() as other:
        silent._socket.setblocking(False)
        assert is_full(silent)
        # then others are answered
        assert other.ask("VERSION").startswith("OK")


def is_full(control: Control) -> bool:
    """Send requests until no more are taken."""
    try:
        while True:
            control.send(b"DUMP\n" * 1000)
    except BlockingIOError:
        return True


def test_logging_orders(zorp):
    daemon = zorp(ECHO, verbosity=3)
    with daemon.control() as control:
        assert control.ask("LOGGING VGET") == "OK 3"
        assert control.ask("LOGGING VSET \u0663") == "OK 0"      # a digit elsewhere, none of C
        assert control.ask("LOGGING VSET 7") == "OK 7"
        assert control.ask("LOGGING VSET 99") == "OK 10"
        assert control.ask("LOGGING VDEC 20") == "OK 0"
        assert control.ask("LOGGING VINC x") == "OK 0"
        assert control.ask("LOGGING GETSPEC") == "OK *.summary:4,*.accounting:4"
        assert control.ask("LOGGING SETSPEC http.*:6") == "OK http.*:6"
        assert control.ask("LOGGING SETSPEC a_b:3") == "FAIL Error setting logspec"
        assert control.ask("LOGGING GETSPEC") == "OK http.*:6"
    assert daemon.log.find("core.info", 0, "Changing verbosity level", verbose_level="7")
    assert daemon.log.find("core.info", 0, "Changing logspec", logspec="http.*:6")
    assert daemon.log.find("core.error", 0, "Invalid logspec, reverting to old logspec", new_logspec="a_b:3")
    assert daemon.log.find("core.info", 2, "Control command", command="LOGGING", uid=str(os.getuid()))


def test_reload_over_the_socket(zorp):
    daemon = zorp(ECHO, word="old")
    with daemon.control() as control:
        stamp = int(control.ask("GETVALUE info.policy.reload_stamp"))
        # given a changed policy; when both lines come in one segment
        daemon.write_policy(ECHO, word="new")
        control.send(b"RELOAD\nRELOAD RESULT\n")
        # then the result is that of this reload
        assert control.line() == "OK Reload initiated"
        assert control.line() == "OK Reload successful"
        assert int(control.ask("GETVALUE info.policy.reload_stamp")) >= stamp
        assert daemon.connect().recv(100).startswith(b"new")
        # and a broken one says why
        good_stamp = control.ask("GETVALUE info.policy.file_stamp")
        daemon.write_policy("broken(\n")
        answer = control.ask("RELOAD WAIT")
        assert answer.startswith("FAIL Reload failed; reason='")
        assert f"{daemon.policy}:1:" in answer
        assert control.ask("RELOAD RESULT") == "FAIL Reload failed"
        assert control.ask("GETVALUE info.policy.file_stamp") == good_stamp
        assert control.ask("GETVALUE info.reload_failures") == "1"


def test_threads_are_counted(zorp):
    daemon = zorp(ECHO)
    with daemon.control() as control:
        idle = int(control.ask("GETVALUE stats.threads_running"))
        assert idle == 3
        clients = [daemon.connect() for _ in range(3)]
        for client in clients:
            client.recv(100)
        assert int(control.ask("GETVALUE stats.threads_running")) == idle + 3
        for client in clients:
            client.close()
        wait_until(lambda: int(control.ask("GETVALUE stats.threads_running")) == idle, "the end of the threads")
        assert int(control.ask("GETVALUE stats.threads_max")) == idle + 3


def test_a_stale_socket_is_replaced(zorp):
    daemon = zorp(ECHO)
    daemon.kill(signal.SIGKILL)
    daemon.wait()
    assert (daemon.directory / "zorpctl.intra").exists()
    daemon.launch()
    daemon.log.wait_for("core.info", 4, "Accepting connections", count=2)
    with daemon.control() as control:
        assert control.ask("VERSION").startswith("OK")


def test_a_file_in_its_place_stops_the_start_and_stays(zorp):
    daemon = zorp(ECHO, start=False)
    (daemon.directory / "zorpctl.intra").write_text("precious")
    assert daemon.run() == 1
    assert "Failed to create SZIG socket; name='" in daemon.log.text()
    assert (daemon.directory / "zorpctl.intra").read_text() == "precious"


def test_mode_of_the_socket(shared):
    assert stat.S_IMODE((shared.directory / "zorpctl.intra").stat().st_mode) == 0o660


@pytest.mark.skipif(os.getuid() != 0, reason="needs another user, and so root")
def test_a_foreign_user_may_look_but_not_touch(shared):
    # given somebody who reached the socket but belongs to nobody
    shared.directory.chmod(0o755)
    (shared.directory / "zorpctl.intra").chmod(0o666)
    program = (
        "import os, socket, sys; s = socket.socket(socket.AF_UNIX); os.setgroups([]); os.setgid(65534);"
        "directory = os.open(sys.argv[1], os.O_RDONLY); os.fchdir(directory); os.setuid(65534);"
        "s.connect('zorpctl.intra'); f = s.makefile('rw');"
        "print(*[(f.write(line + '\\n'), f.flush(), f.readline().strip())[2] for line in sys.argv[2:]], sep='|')")
    asked = subprocess.run(
        [sys.executable, "-c", program, str(shared.directory), "GETVALUE info.process", "RELOAD", "LOGGING VGET",
         "LOGGING VSET 1", "STOPSESSION svc/x:1", "DEADLOCKCHECK DISABLE", "STACKDUMP"],
        capture_output=True, text=True, timeout=20)
    # then questions are answered, and orders refused
    denied = "FAIL Permission denied"
    assert asked.stdout.strip().split("|") == ["intra", denied, "OK 6", denied, denied, denied, denied], asked.stderr
    shared.log.wait_for("core.error", 1, "Control command refused", command="RELOAD", uid="65534")


def test_orders_are_logged_with_their_author(shared):
    with shared.control() as control:
        control.ask("STACKDUMP")
    line = shared.log.wait_for("core.info", 2, "Control command", command="STACKDUMP")
    assert line.session.startswith("szig/conn:")
    assert line.fields["pid"] == str(os.getpid())
    shared.log.wait_for("core.error", 0, "Stack: ")


def test_a_connection_leaves_an_accounting_line_at_level_6(zorp):
    daemon = zorp(ECHO, verbosity=6, arguments=["--log-spec", ""])
    with daemon.control() as control:
        answer = control.ask("VERSION")
    line = daemon.log.wait_for("core.accounting", 6, "accounting info", type="ZStreamFD")
    assert line.session.startswith("szig/conn:")
    assert (line.fields["received"], line.fields["sent"]) == (str(len("VERSION\n")), str(len(answer) + 1))


class Silence:
    """A master whose workers never answer."""

    def __init__(self) -> None:
        self.asked = []

    def ask(self, slot, line, done) -> None:
        self.asked.append(line)


def test_a_question_without_answer_ends_with_the_connection(tmp_path):
    # given a control socket over a worker that is stopped, and a clock of our own
    now = [100.0]
    timers, selector, silence = Timers(lambda: now[0]), selectors.DefaultSelector(), Silence()
    server = ControlServer(Directory(str(tmp_path)), selector, timers, silence)
    server.listen(Slot("intra", True, None))

    def turn() -> None:
        for key, events in selector.select(1):
            key.data(events)
        timers.run_due()

    with Control(tmp_path, "zorpctl.intra") as control:
        # when somebody asks what the master knows itself, and then the worker
        control.send(b"VERSION\nGETVALUE info.pid\n")
        turn()
        turn()
        # then the first is answered, and the second is given up after its patience
        assert control.line().startswith("OK")
        assert silence.asked == ["GETVALUE info.pid"]
        now[0] += PATIENCE_S + 1
        timers.run_due()
        assert control.line() == ""
    server.close()


NAMES = {"plain": "stats", "blank and dot": "intra http.v1", "percent": "100%", "bytes": "b\u00fcro", "high": "a\x7f"}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_components_survive_escaping(name):
    assert unescape(escape(name)) == name
    assert parse_name(f"service.{escape(name)}") == ("service", name)


def test_escaping():
    assert escape("intra http.v1") == "intra%20http%2Ev1"
    assert escape("\x7f") == "\x7f"
    assert unescape("a%2") == "a"
    assert unescape("a%zzb") == "ab"


@pytest.mark.parametrize(("given", "meant"), [
    ("svc/intra#0/http:17", "svc/intra#0/http:17"),
    ("svc/intra#0/http:17/intra#0", "svc/intra#0/http:17"),
    ("svc/intra#0/http:17/intra#0/http", "svc/intra#0/http:17/intra#0/http"),
    ("svc/http:3", "svc/http:3"),
    ("svc/http:3/http", "svc/http:3/http"),
    ("svc/intra#0", None), ("svc", None), ("", None), ("x", None)])
def test_what_counts_as_a_session(given, meant):
    assert _session_id(given) == meant


def test_values_are_one_line():
    answers = Answers()
    answers.set_info(last_error="two\nlines")
    assert answers.answer("GETVALUE info.last_error") == "two<0A>lines"
