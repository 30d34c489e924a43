"""Peers that mean harm or vanish, and a host that has run out of something.

After each of them the worker is as it was: the same process, every counter at zero, no
descriptor more than before, and the next client is served.  Short forms run always, long ones
with `make soak`.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import select
import shutil
import socket
import tempfile
import threading
import time

import pytest

from test.support.daemon import Daemon, wait_until
from test.support.ends import flood, reset, vanish
from test.support.gateway import ended, exchange
from test.system.test_nothing_grows import descriptors, resident_kib, tree
from Zorp.runtime.acceptor import PAUSE_S
from Zorp.transport import pipes

POLICY = """
    import builtins
    import time
    from Zorp.Core import *
    from Zorp.Plug import *

    Zone("all", ["0.0.0.0/0"])
    config.options.max_connections_per_client = $per_client

    class Tried(PlugProxy):
        def config(self):
            PlugProxy.config(self)
            self.timeout = $timeout
            self.shutdown_soft = $soft

    def intra():
        Service("plug", Tried, router=DirectedRouter(SockAddrInet("127.0.0.1", $server_port)), max_instances=$most)
        Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", $port), ZD_PROTO_TCP), service="plug", backlog=4096)
    """
DEFAULTS = {"per_client": 0, "timeout": 600_000, "soft": "FALSE", "most": 0}
IDLE_MS = 600
SPARE_DESCRIPTORS = 4 + 2 * pipes.MOST_IDLE


def long(*values, minutes=10):
    return pytest.param(*values, id="long", marks=[pytest.mark.soak, pytest.mark.timeout(60 * minutes)])


_AT_ONCE = {"reset": reset}
_IN_THE_MIDDLE = {"reset in the middle": reset, "vanish in the middle": vanish}


class Echo:
    """A server of many clients in one thread; `moods` other than "echo" are rude ones."""

    def __init__(self, mood: str = "echo") -> None:
        self._mood = mood
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._clients: dict[int, socket.socket] = {}
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        self._ended = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended = True
        self._thread.join()
        for sock in (self._listener, *self._clients.values()):
            sock.close()
        self._epoll.close()

    def be(self, mood: str) -> None:
        """Change; clients that are there are forgotten without a word."""
        self._mood = mood

    def _serve(self) -> None:
        while not self._ended:
            for fd, _events in self._epoll.poll(0.05):
                if fd == self._listener.fileno():
                    self._accept()
                else:
                    with contextlib.suppress(OSError):
                        self._answer(fd)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, _ = self._listener.accept()
                self._clients[sock.fileno()] = sock
                if self._mood in _AT_ONCE:
                    _AT_ONCE[self._mood](self._clients.pop(sock.fileno()))
                    continue
                self._epoll.register(sock, select.EPOLLIN)

    def _answer(self, fd: int) -> None:
        sock = self._clients[fd]
        if self._mood == "mute":
            self._epoll.unregister(fd)
            return
        try:
            data = sock.recv(65536)
        except ConnectionResetError:
            data = b""
        if not data or self._mood in _IN_THE_MIDDLE:
            self._epoll.unregister(fd)
            end = _IN_THE_MIDDLE[self._mood] if data else socket.socket.close
            end(self._clients.pop(fd))
            return
        sock.settimeout(10)
        sock.sendall(data)


@pytest.fixture
def echo():
    running = Echo()
    yield running
    running.close()


class Tried:
    """A daemon, and what it was like before the fault."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self._quiet = {"service.plug.sessions_running": "0", "stats.sessions_running": "0",
                       "stats.threads_running": tree(daemon, "stats.threads_running")}
        for _ in range(3):                               # what the first sessions load stays out
            with daemon.connect() as client:
                assert exchange(client) == b"ping"
        self.pid = daemon.worker_pid()
        self._wait_for_quiet()
        self._descriptors = descriptors(self.pid)

    @property
    def running(self) -> int:
        """Sessions that run now."""
        return int(tree(self.daemon, "service.plug.sessions_running"))

    def is_as_before(self) -> None:
        """The end of every test."""
        self._wait_for_quiet()
        wait_until(lambda: descriptors(self.pid) <= self._descriptors + SPARE_DESCRIPTORS,
                   "descriptors as before", 20)
        with self.daemon.connect() as client:
            assert exchange(client, b"the next") == b"the next"
        self._wait_for_quiet()
        assert self.daemon.worker_pid() == self.pid
        assert "Traceback" not in self.daemon.log.text()

    def _wait_for_quiet(self) -> None:
        for counter, value in self._quiet.items():
            wait_until(lambda counter=counter, value=value: tree(self.daemon, counter) == value,
                       f"{counter} to be {value}", 30)


@pytest.fixture
def tried(zorp, echo):
    """Return a function that starts a daemon and knows how it was at the beginning."""
    return lambda policy=POLICY, verbosity=4, arguments=(), **values: Tried(
        zorp(policy, verbosity=verbosity, arguments=arguments, server_port=echo.port, **{**DEFAULTS, **values}))


# ---------------------------------------------------------------------------- many

@pytest.mark.parametrize(("clients", "rounds"), [pytest.param(300, 3, id="short"), long(2000, 20)])
def test_slow_clients_at_once(tried, clients, rounds):
    """Each writes a byte now and then; all of them are served."""
    worker = tried(verbosity=1, arguments=("--threads", str(clients + 100)))
    socks = []
    try:
        socks.extend(worker.daemon.connect() for _ in range(clients))
        for number in range(rounds):
            for sock in socks:
                sock.send(bytes([number]))
            for sock in socks:
                assert sock.recv(1) == bytes([number])
        assert worker.running == clients
    finally:
        for sock in socks:
            sock.close()
    worker.is_as_before()


STORMS = {
    "threads": {"arguments": ("--threads", "20")},
    "service": {"most": 20},
    "client": {"per_client": 20},
}


@pytest.mark.parametrize("limit", STORMS)
@pytest.mark.parametrize(("clients", "waves"), [pytest.param(150, 1, id="short"), long(1500, 10)])
def test_storm_above_a_limit(tried, clients, waves, limit):
    worker = tried(verbosity=3, **STORMS[limit])
    most = []
    for _ in range(waves):
        socks = [worker.daemon.connect() for _ in range(clients)]
        for sock in socks:
            with contextlib.suppress(OSError):
                sock.send(b"x")
        most.append(worker.running)
        served, refused = _outcomes(socks, worker)
        # then no more than permitted were served at a time, and every single one got his answer or his refusal
        assert served + refused == clients
        assert served >= 20
        if limit != "threads":
            assert refused > 0
    assert max(most) <= 20
    worker.is_as_before()


def _outcomes(socks, worker) -> tuple[int, int]:
    """Close each client that was answered, so that others get their turn; count answers and refusals."""
    poll = select.poll()
    waiting = {sock.fileno(): sock for sock in socks}
    for sock in socks:
        poll.register(sock, select.POLLIN)
    served = refused = 0
    while waiting:
        ready = poll.poll(20_000)
        assert ready, f"{len(waiting)} clients wait for ever; {worker.running} sessions run"
        for fd, _ in ready:
            poll.unregister(fd)
            with waiting.pop(fd) as sock:
                try:
                    answered = sock.recv(1) == b"x"
                except ConnectionResetError:
                    answered = False
            served, refused = served + answered, refused + (not answered)
    return served, refused


# ---------------------------------------------------------------------------- peers that break off

@pytest.mark.parametrize("soft", ["FALSE", "TRUE"])
@pytest.mark.parametrize("number", [pytest.param(100, id="short"), long(5000)])
def test_clients_that_reset(tried, number, soft):
    worker = tried(verbosity=1, soft=soft)
    for index in range(number):
        sock = worker.daemon.connect()
        if index % 3:
            sock.send(b"x" * (index % 3 * 40_000))
        if index % 3 and index % 5 == 0:
            sock.recv(1)
        reset(sock)
    worker.is_as_before()


@pytest.mark.parametrize("mood", ["reset", "reset in the middle"])
@pytest.mark.parametrize("number", [pytest.param(50, id="short"), long(5000)])
def test_servers_that_reset(tried, echo, number, mood):
    worker = tried(verbosity=1)
    echo.be(mood)
    for _ in range(number):
        with contextlib.suppress(ConnectionResetError, BrokenPipeError), worker.daemon.connect() as sock:
            sock.send(b"x")
            assert sock.recv(1) == b""
    echo.be("echo")
    worker.is_as_before()


@pytest.mark.parametrize("soft", ["FALSE", "TRUE"])
def test_one_side_is_silent_for_ever(tried, echo, soft):
    """A server that accepts and never answers, clients that say nothing, or have half-closed."""
    worker = tried(timeout=IDLE_MS, soft=soft)
    echo.be("mute")
    silent, talker, half = (worker.daemon.connect() for _ in range(3))
    talker.send(b"question")
    half.send(b"question")
    half.shutdown(socket.SHUT_WR)
    for sock in (silent, talker, half):
        assert ended(sock)
        sock.close()
    worker.daemon.log.wait_for("plug.session", 3, "Connection timed out", timeout=str(IDLE_MS))
    echo.be("echo")
    worker.is_as_before()


@pytest.mark.parametrize("soft", ["FALSE", "TRUE"])
@pytest.mark.parametrize("number", [pytest.param(20, id="short"), long(1000)])
def test_hosts_that_lose_their_power(tried, echo, number, soft):
    """Half-open connections: the kernel of nobody knows the other end any more, and nobody says so."""
    worker = tried(timeout=IDLE_MS, soft=soft)
    # when clients vanish after an answer, and servers instead of one
    for _ in range(number):
        sock = worker.daemon.connect()
        assert exchange(sock) == b"ping"
        vanish(sock)
    echo.be("vanish in the middle")
    socks = []
    for _ in range(number):
        socks.append(worker.daemon.connect())
        socks[-1].send(b"question")
    # then those who are left are told, and nothing is left of the sessions
    for sock in socks:
        assert ended(sock)
        sock.close()
    echo.be("echo")
    worker.is_as_before()


@pytest.mark.parametrize("number", [pytest.param(5, id="short"), long(200)])
def test_servers_that_read_nothing(tried, echo, number):
    """Zero windows on the other side: back pressure to the client, then the idle time."""
    worker = tried(timeout=IDLE_MS)
    before_kib = resident_kib(worker.pid)
    echo.be("mute")
    socks = []
    for _ in range(number):
        sock = worker.daemon.connect()
        sock.settimeout(0.05)
        flood(sock)
        socks.append(sock)
    assert resident_kib(worker.pid) - before_kib < 4096 + number * 300
    wait_until(lambda: worker.running == 0, "the end of all sessions", 30)
    for sock in socks:
        sock.close()
    echo.be("echo")
    worker.is_as_before()


@pytest.mark.parametrize("number", [pytest.param(10, id="short"), long(500)])
def test_windows_that_stay_closed(tried, number):
    """Clients that ask for much and read nothing: back pressure to the server, then the idle time."""
    worker = tried(timeout=IDLE_MS)
    before_kib = resident_kib(worker.pid)
    socks = []
    for _ in range(number):
        sock = worker.daemon.connect()
        sock.settimeout(0.05)
        with contextlib.suppress(TimeoutError, ConnectionError):
            sock.sendall(bytes(20_000_000))              # comes back, and is not read
        socks.append(sock)
    worker.daemon.log.wait_for("plug.session", 3, "Connection timed out", timeout_s=30)
    assert resident_kib(worker.pid) - before_kib < 4096 + number * 300
    wait_until(lambda: worker.running == 0, "the end of all sessions", 30)
    for sock in socks:
        sock.close()
    worker.is_as_before()


def test_byte_by_byte(tried):
    worker = tried()
    with worker.daemon.connect() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        received = b""
        for number in range(2000):
            sock.send(bytes([number % 256]))
            if number % 10 == 9:
                while len(received) <= number:
                    received += sock.recv(100)
    assert received == bytes(number % 256 for number in range(2000))
    worker.is_as_before()


# ---------------------------------------------------------------------------- a host that has run out

@pytest.mark.parametrize("rounds", [pytest.param(1, id="short"), long(20)])
def test_out_of_descriptors(zorp, echo, monkeypatch, rounds):
    # given a worker that may open no more than eighty
    monkeypatch.setattr(Daemon, "prefix", ("prlimit", "--nofile=80:80"))
    worker = Tried(zorp(POLICY, verbosity=4, arguments=("--fd-limit-min", "80", "--no-caps"), server_port=echo.port,
                        **DEFAULTS))
    limits = pathlib.Path(f"/proc/{worker.pid}/limits").read_text()
    assert re.search(r"Max open files\s+80\s", limits)
    for _ in range(rounds):
        # when more come than that, then some are not served; those that are there go on
        socks = [worker.daemon.connect() for _ in range(100)]
        for sock in socks:
            sock.send(b"x")
        began_s, mark = time.monotonic(), worker.daemon.log.mark()
        worker.daemon.log.wait_for(text="accept() failed")
        # and when clients leave, those that waited are accepted or refused, none is forgotten
        served, refused = _outcomes(socks, worker)
        assert served + refused == 100
        assert served >= 20
        wait_until(lambda: worker.running == 0, "the end of all sessions", 30)
        # and accepting paused between attempts
        failures = worker.daemon.log.find(text="accept() failed", after=mark)
        assert len(failures) <= 1 + (time.monotonic() - began_s) / PAUSE_S
    worker.is_as_before()


def test_out_of_threads(echo, monkeypatch):
    """The kernel refuses threads (RLIMIT_NPROC of a user that nobody else is)."""
    user = 64_321
    directory = pathlib.Path(tempfile.mkdtemp(prefix="threads", dir="/tmp"))
    daemon = None
    try:
        os.chown(directory, user, user)
        monkeypatch.setattr(Daemon, "prefix", ("prlimit", "--nproc=30:30"))
        daemon = Daemon(directory, POLICY, verbosity=4, arguments=("--user", str(user), "--group", str(user)),
                        server_port=echo.port, **DEFAULTS)
        os.chmod(daemon.policy, 0o644)
        daemon.start()
        worker = Tried(daemon)
        socks = [daemon.connect() for _ in range(100)]
        for sock in socks:
            with contextlib.suppress(OSError):
                sock.send(b"x")
        daemon.log.wait_for("core.error", 2, "Error starting new thread")
        served, refused = _outcomes(socks, worker)
        assert served + refused == 100
        assert served >= 10
        worker.is_as_before()
    finally:
        if daemon is not None:
            daemon.end()
        shutil.rmtree(directory, ignore_errors=True)


# ---------------------------------------------------------------------------- clocks

CLOCK = """
    true_time = time.time

    def stepped_time():
        try:
            with builtins.open("$dir/step") as step:
                return true_time() + float(step.read() or 0)
        except OSError:
            return true_time()

    time.time = stepped_time
"""


def test_steps_of_the_clock_end_nothing(tried):
    """The kernel has no name space for CLOCK_REALTIME, so the policy steps what the worker sees of it."""
    worker = tried(POLICY.replace("    def intra", CLOCK + "    def intra"), timeout=3_000)
    began = len(worker.daemon.log.lines())
    step = worker.daemon.directory / "step"
    with worker.daemon.connect() as sock:
        assert exchange(sock) == b"ping"
        for seconds in (86_400, -86_400, 10 ** 9, -10 ** 8):
            step.write_text(str(seconds))
            # sessions that run go on, and new ones come
            last_s = time.monotonic()
            assert exchange(sock) == b"ping"
            with worker.daemon.connect() as other:
                assert exchange(other) == b"ping"
        # the step is really seen
        line = worker.daemon.log.wait_for("core.summary", 4, "Connection summary", after=began, count=4)
        assert abs(int(line.fields["session_end"]) - time.time()) > 10 ** 7
        # and idleness is measured by another clock
        assert ended(sock)
        assert time.monotonic() - last_s >= 3
    worker.is_as_before()
