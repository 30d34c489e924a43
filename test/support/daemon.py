"""Start a real zorp process for a test, talk to it, and be sure that it is gone afterwards.

    def test_something(zorp):
        # given a running instance; $port in the policy is a free port of this test
        daemon = zorp('''
            from Zorp.Core import *
            from Zorp.Plug import *

            def intra():
                Service("plug", PlugProxy, router=DirectedRouter(SockAddrInet("127.0.0.1", $server_port)))
                Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", $port), ZD_PROTO_TCP), service="plug")
            ''', server_port=server.port, verbosity=6)
        # when a client comes
        client = daemon.connect()
        # then the log says so: waits up to half a minute, returns the line, fails with the whole log
        line = daemon.log.wait_for("core.session", 3, "Starting proxy instance")
        assert line.fields["client_protocol"] == "TCP"

zorp(policy, instance="intra", verbosity=6, arguments=(), start=True, environment={}, **values) -> Daemon
    policy      text; its common indent is removed and $name is replaced by values (string.Template)
    arguments   further command line options
    start       False: the caller calls start() or run() itself
    detached    True: not in the foreground and not with --no-syslog; start() waits for the command, whose
                exit status is in .process.returncode; the log is where --log-socket says
A test may call it several times; whatever still runs at the end of the test is killed.

Daemon
    .port             the value of $port; .values: all of them
    .directory        private directory (pathlib): policy.py, pid files, control sockets, state
    .policy           path of the policy; write_policy(text, **values) replaces it
    .process          subprocess.Popen of the command (the master, in the foreground)
    .pid              pid of the master
    .worker_pid(k=None)  what the pid file says: the worker that serves (of NAME#k)
    start()           start and wait until the first policy serves; fails with the log when it ends instead
    run()             start, wait for the end, return the exit status: for instances that must not start
    connect(port=None, source=None) -> socket.socket with a timeout of half a minute
    reload(policy=None, **values)  write the policy if given, HUP, wait for the new worker
    kill(number, worker=False)     send a signal to the master, or to the worker
    control(number=None)           client of the control socket, for a `with` block: .ask("GETVALUE x") -> line,
                                   .send(bytes), .line(), .dump("DUMP stats") -> lines
    wait(timeout_s=30) -> exit status;  stop() -> TERM and wait
Log
    .wait_for(tag, level, text, session=None, after=0, timeout_s=30, **fields) -> LogLine
    .find(tag, level, text, ...) -> list of LogLine that are there now; tag, level, text may be None
    .mark() -> number of lines so far, for `after`; .text() everything as written
LogLine
    .tag .level .session .text (up to the first ";") .fields (dict) .raw
"""

from __future__ import annotations

import os
import pathlib
import re
import signal
import socket
import string
import subprocess
import sys
import textwrap
import time
from typing import NamedTuple

import pytest

from test.support.ports import free_port
from Zorp.Log import Filter
from Zorp.runtime.options import parse

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEADLINE_S = 30.0                    # for what comes at once on a host that has nothing else to do
_POLL_S = 0.01

_LINE = re.compile(
    r"^(?P<date>\w{3} \d\d \d\d:\d\d:\d\d) (?P<tag>[A-Za-z0-9_.]+)\((?P<level>\d+)\): "
    r"(?:\((?P<session>.*?)\): )?(?P<text>[^;]*);?(?: (?P<fields>.*))?$")
_FIELD = re.compile(r"([A-Za-z0-9_]+)='([^']*)'")


class LogLine(NamedTuple):
    """One line of the log, taken apart."""

    tag: str
    level: int
    session: str | None
    text: str
    fields: dict[str, str]
    raw: str


def parse_line(raw: str) -> LogLine | None:
    """Take a line of the --no-syslog form apart; None for anything else."""
    found = _LINE.match(raw)
    if found is None:
        return None
    return LogLine(found["tag"], int(found["level"]), found["session"], found["text"],
                   dict(_FIELD.findall(found["fields"] or "")), raw)


class Log:
    """What the daemon has written to stderr so far."""

    def __init__(self, path: pathlib.Path, is_alive) -> None:
        self._path = path
        self._is_alive = is_alive

    def text(self) -> str:
        return self._path.read_text("utf-8", "replace") if self._path.exists() else ""

    def lines(self) -> list[LogLine]:
        """Every complete line of the log's form."""
        complete = self.text().rpartition("\n")[0].split("\n")
        return [line for raw in complete if (line := parse_line(raw)) is not None]

    def mark(self) -> int:
        return len(self.lines())

    def find(self, tag=None, level=None, text=None, session=None, after=0, **fields) -> list[LogLine]:
        """The lines after a mark that agree with everything given; text is compared by its beginning."""
        return [line for line in self.lines()[after:]
                if tag in (None, line.tag) and level in (None, line.level) and session in (None, line.session)
                and (text is None or line.text.startswith(text))
                and all(line.fields.get(key) == value for key, value in fields.items())]

    def wait_for(self, tag=None, level=None, text=None, session=None, after=0, timeout_s=DEADLINE_S,
                 count=1, **fields) -> LogLine:
        """The count-th such line, as soon as it is there."""
        deadline = time.monotonic() + timeout_s
        while True:
            alive = self._is_alive()
            found = self.find(tag, level, text, session, after, **fields)
            if len(found) >= count:
                return found[count - 1]
            if time.monotonic() > deadline or not alive:
                state = "" if alive else ", the process has ended"
                pytest.fail(f"no {tag}({level}) {text!r} {fields or ''} within {timeout_s} s{state}; the log:\n"
                            + self.text())
            time.sleep(_POLL_S)


def wait_until(condition, what: str = "condition", timeout_s: float = DEADLINE_S):
    """Return the first true result of condition(), or fail the test at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not come true within {timeout_s} s")
        time.sleep(_POLL_S)
    return result


def lock_holders(directory: pathlib.Path) -> set[int]:
    """The masters that live: whoever holds a lock in this directory."""
    inodes = {str(path.stat().st_ino) for path in directory.glob("*.lock")}
    locks = [line.split() for line in pathlib.Path("/proc/locks").read_text().splitlines()]
    return {int(fields[4]) for fields in locks if fields[1] == "FLOCK" and fields[5].split(":")[-1] in inodes}


class Control:
    """One connection to a control socket; a path of any length will do."""

    def __init__(self, directory: pathlib.Path, name: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._socket.connect(f"/proc/self/fd/{directory_fd}/{name}")      # waits where the queue is full
        finally:
            os.close(directory_fd)
        self._socket.settimeout(DEADLINE_S)
        self._reader = self._socket.makefile("rb")

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *exc_info) -> None:
        self._reader.close()
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def line(self) -> str:
        """The next answer; "" when the daemon has closed the connection."""
        return self._reader.readline().decode().removesuffix("\n")

    def ask(self, request: str) -> str:
        self.send(request.encode() + b"\n")
        return self.line()

    def dump(self, request: str) -> list[str]:
        """The lines of an answer that ends with a dot."""
        self.send(request.encode() + b"\n")
        return list(iter(self.line, "."))


class Daemon:
    """One zorp instance of a test; see the module's text."""

    prefix: tuple[str, ...] = ()         # a command that starts the command, such as ip netns exec

    def __init__(self, directory: pathlib.Path, policy: str, instance: str = "intra", verbosity: int = 6,
                 arguments=(), environment=None, detached: bool = False, **values) -> None:
        self.directory = directory
        self.detached = detached
        self.instance = instance
        self.values = {"port": free_port(), "dir": str(directory), "word": "hello", **values}
        self.values.setdefault("ports", self.values["port"])
        self.port = self.values["port"]
        self.policy = directory / "policy.py"
        self.write_policy(policy)
        self._verbosity = verbosity
        self._arguments = tuple(arguments)
        self._environment = {**os.environ, **(environment or {})}
        self.process: subprocess.Popen | None = None
        self.log = Log(directory / "log", lambda: self.process is not None and self.process.poll() is None)

    def write_policy(self, policy: str, **values) -> None:
        self.values.update(values)
        text = string.Template(textwrap.dedent(policy)).safe_substitute(self.values)
        new = self.policy.with_suffix(".new")
        new.write_text(text)
        new.replace(self.policy)

    @property
    def command(self) -> list[str]:
        """The command line; the last of several equal options wins, so arguments may replace ours."""
        mode = () if self.detached else ("--foreground", "--no-syslog")
        return [sys.executable, str(ROOT / "sbin" / "zorp"), "--as", self.instance, "--policy", str(self.policy), *mode,
                "--verbose", str(self._verbosity), "--pid-dir", str(self.directory), "--state-dir", str(self.directory),
                "--kzorpd-dir", str(self.directory),
                "--user", str(os.getuid()), "--group", str(os.getgid()), "--deadlock-check-timeout", "-1",
                *self._arguments]

    def launch(self) -> None:
        """Start the process and return at once."""
        with open(self.directory / "log", "ab") as log:
            self.process = subprocess.Popen([*self.prefix, *self.command], stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=log, cwd=self.directory, env=self._environment,
                                            start_new_session=True)

    def start(self) -> Daemon:
        self.launch()
        if self.detached:
            self.wait()
            return self
        deadline = time.monotonic() + DEADLINE_S
        while not self.pid_file().exists():
            if self.process.poll() is not None:
                pytest.fail(f"zorp ended with status {self.process.returncode}; the log:\n{self.log.text()}")
            if time.monotonic() > deadline:
                pytest.fail(f"zorp does not serve after {DEADLINE_S} s; the log:\n{self.log.text()}")
            time.sleep(_POLL_S)
        options = parse(self.command[2:])
        if options.log_format == "classic" and Filter(options.verbosity, options.log_spec).effective("core.info") >= 4:
            self.log.wait_for("core.info", 4, "Accepting connections")
        return self

    def run(self) -> int:
        self.launch()
        return self.wait()

    def pid_file(self, number: int | None = None) -> pathlib.Path:
        """The pid file of the first virtual process, or of NAME#number."""
        if number is None:
            plain = self.directory / f"zorp-{self.instance}.pid"
            first = self.directory / f"zorp-{self.instance}#0.pid"
            return first if first.exists() else plain
        return self.directory / f"zorp-{self.instance}#{number}.pid"

    @property
    def pid(self) -> int:
        """The pid of the master; of a detached one while its worker lives."""
        if not self.detached:
            return self.process.pid
        stat = pathlib.Path(f"/proc/{self.worker_pid()}/stat").read_text()
        return int(stat.rpartition(")")[2].split()[1])

    def worker_pid(self, number: int | None = None) -> int:
        return int(self.pid_file(number).read_text())

    def connect(self, port: int | None = None, source: tuple[str, int] | None = None) -> socket.socket:
        return socket.create_connection(("127.0.0.1", port or self.port), DEADLINE_S, source)

    def reload(self, policy: str | None = None, **values) -> None:
        if policy is not None:
            self.write_policy(policy, **values)
        before = self.worker_pid()
        self.kill(signal.SIGHUP)
        wait_until(lambda: self.worker_pid() != before, f"the new worker; the log:\n{self.log.text()}\nit")

    def control(self, number: int | None = None) -> Control:
        name = self.instance if number is None else f"{self.instance}#{number}"
        return Control(self.directory, f"zorpctl.{name}")

    def kill(self, number: int, worker: bool = False) -> None:
        os.kill(self.worker_pid() if worker else self.pid, number)

    def wait(self, timeout_s: float = DEADLINE_S) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"zorp still runs after {timeout_s} s; the log:\n{self.log.text()}")

    def stop(self) -> int:
        self.kill(signal.SIGTERM)
        return self.wait()

    def end(self) -> None:
        """Kill what is left; the workers die with their master."""
        if self.detached:
            for pid in lock_holders(self.directory):
                os.kill(pid, signal.SIGKILL)
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def zorp(tmp_path):
    """Make daemons: zorp(policy, ...) -> Daemon, started unless start=False."""
    daemons = []

    def make(policy: str, *, start: bool = True, **arguments) -> Daemon:
        directory = tmp_path / f"daemon{len(daemons)}"
        directory.mkdir()
        daemon = Daemon(directory, policy, **arguments)
        daemons.append(daemon)
        return daemon.start() if start else daemon

    yield make
    for daemon in daemons:
        daemon.end()
