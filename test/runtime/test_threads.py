"""The pool: one thread owns a session, limits refuse the new and never harm the old."""

import queue
import signal
import threading
import time

import pytest

from test.runtime.policies import ECHO
from test.support.daemon import wait_until
from Zorp.runtime.threads import PoolLimits, ThreadPool
from Zorp.Szig import Statistics


class Clients:
    """An acceptor for tests: connections come out of a queue."""

    def __init__(self) -> None:
        self._queue: queue.Queue = queue.Queue()

    def come(self, connection) -> None:
        self._queue.put(connection)

    def wake(self) -> None:
        self._queue.put(None)

    def wait(self):
        return self._queue.get()


class SlowAcceptor(Clients):
    """Where the system call has returned and the interpreter is somewhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.accepted, self.go_on = threading.Event(), threading.Event()

    def wait(self):
        connection = super().wait()
        if connection is not None:
            self.accepted.set()
            assert self.go_on.wait(20)
        return connection


class Connection:
    """A client whose delivery starts one job, as a service does."""

    remote_host = "192.0.2.1"

    def __init__(self, pool: ThreadPool, name: str = "session") -> None:
        self.pool, self.name = pool, name
        self.finish = threading.Event()
        self.running = threading.Event()
        self.refused = threading.Event()
        self.threads: list[int] = []

    def deliver(self) -> None:
        self.threads.append(threading.get_ident())
        assert self.pool.start(self.name, self.live)

    def live(self) -> None:
        self.threads.append(threading.get_ident())
        self.thread_name = threading.current_thread().name
        self.running.set()
        assert self.finish.wait(20)

    def refuse(self) -> None:
        self.refused.set()


@pytest.fixture
def clients():
    return Clients()


@pytest.fixture
def last_moment():
    """A thread that has accepted a connection and not yet said so: (its acceptor, its pool, the connection)."""
    clients = SlowAcceptor()
    pool = pool_of(clients)
    connection = Connection(pool)
    clients.come(connection)
    assert clients.accepted.wait(5)
    return clients, pool, connection


def pool_of(clients, **limits) -> ThreadPool:
    pool = ThreadPool(PoolLimits(**limits), clients)
    pool.begin()
    return pool


def test_the_thread_that_accepts_serves(clients):
    pool = pool_of(clients)
    connection = Connection(pool, "svc/intra/x:0")
    clients.come(connection)
    assert connection.running.wait(5)
    assert connection.threads[0] == connection.threads[1]
    assert connection.thread_name == "svc/intra/x:0"
    connection.finish.set()


def test_while_one_serves_another_accepts(clients):
    pool = pool_of(clients)
    connections = [Connection(pool) for _ in range(5)]
    for connection in connections:
        clients.come(connection)
    for connection in connections:
        assert connection.running.wait(5)
    assert pool.busy == 5
    for connection in connections:
        connection.finish.set()
    wait_until(lambda: pool.busy == 0, "the end of the sessions")


def test_the_statistics_count_threads_that_have_a_job(clients):
    # given a thread that is counted elsewhere, and a pool
    statistics = Statistics()
    statistics.thread_started()
    pool = ThreadPool(PoolLimits(), clients, statistics)
    pool.begin()

    def counted():
        return [statistics.value(("stats", name)) for name in ("threads_running", "thread_number", "threads_max")]

    assert counted() == ["1", "1", "1"]
    # when two sessions run and one of them starts another job
    first, second, stacked = (Connection(pool) for _ in range(3))
    for connection in (first, second):
        clients.come(connection)
        assert connection.running.wait(5)
    assert pool.start("stacked", stacked.live)
    assert stacked.running.wait(5)
    assert counted() == ["4", "4", "4"]
    # then those that have ended are counted no more
    for connection in (first, second, stacked):
        connection.finish.set()
    wait_until(lambda: pool.busy == 0, "the end of the sessions")
    assert counted() == ["1", "4", "4"]


def test_over_the_limit_they_line_up_and_over_that_they_are_refused(clients):
    # given room for one session and one that waits
    pool = pool_of(clients, max_threads=1, max_queued=1)
    first, second, third = (Connection(pool) for _ in range(3))
    # when three come
    for connection in (first, second, third):
        clients.come(connection)
    # then the first is served, the second waits, the third is refused
    assert first.running.wait(5)
    assert third.refused.wait(5)
    assert not second.running.is_set()
    # and the second is served when the first ends
    first.finish.set()
    assert second.running.wait(5)
    second.finish.set()


def test_a_stacked_job_gets_a_thread_even_at_the_limit(clients):
    # given a pool whose only thread is taken
    pool = pool_of(clients, max_threads=1, max_queued=0)
    done = threading.Event()

    class Stacking(Connection):
        def live(self) -> None:
            self.started = self.pool.start("stacked", done.set)
            super().live()

    connection = Stacking(pool)
    clients.come(connection)
    # then the job that it starts runs beside it
    assert connection.running.wait(5)
    assert connection.started
    assert done.wait(5)
    connection.finish.set()


def test_stacked_jobs_have_a_limit_too(clients):
    pool = pool_of(clients, max_threads=4)
    blocker = threading.Event()
    started = [pool.start(f"job {number}", lambda: blocker.wait(20)) for number in range(7)]
    assert started == [True] * 5 + [False] * 2
    blocker.set()


def test_what_a_job_raises_ends_nothing_else(clients):
    pool = pool_of(clients)
    for problem in (ValueError("x"), SystemExit(3)):
        def fail(problem=problem) -> None:
            raise problem

        assert pool.start("failing", fail)
    connection = Connection(pool)
    clients.come(connection)
    assert connection.running.wait(5)
    connection.finish.set()
    wait_until(lambda: pool.busy == 0, "the end of the sessions")


def test_idle_threads_are_few_and_used_again(clients):
    pool = pool_of(clients, idle_threads=2)
    connections = [Connection(pool) for _ in range(20)]
    for connection in connections:
        clients.come(connection)
    for connection in connections:
        assert connection.running.wait(5)
    for connection in connections:
        connection.finish.set()
    wait_until(lambda: sum(getattr(thread, "pool", None) is pool for thread in threading.enumerate()) <= 2,
               "two idle threads")


def test_a_host_without_threads_refuses_the_new_and_goes_on(clients, monkeypatch):
    # given a pool with one thread, and a host that gives no further one
    pool = pool_of(clients)
    monkeypatch.setattr("Zorp.runtime.threads._PoolThread.start", no_thread)
    refused = Connection(pool)
    clients.come(refused)
    assert refused.refused.wait(5)
    # when it gives threads again, then clients are served again
    monkeypatch.undo()
    served = Connection(pool)
    clients.come(served)
    assert served.running.wait(5)
    served.finish.set()


def no_thread(thread) -> None:
    raise RuntimeError("can't start new thread")


def test_the_end_of_the_last_session_is_told_once(clients):
    pool = pool_of(clients)
    connection = Connection(pool)
    clients.come(connection)
    assert connection.running.wait(5)
    told = threading.Event()
    pool.when_idle(told.set)
    assert not told.is_set()
    connection.finish.set()
    assert told.wait(5)


def test_a_client_accepted_at_the_last_moment_is_served_before_the_end(last_moment):
    # when the end is asked for at this moment
    clients, pool, connection = last_moment
    told = threading.Event()
    pool.when_idle(told.set)
    # then the end waits for this client
    assert not told.is_set()
    clients.go_on.set()
    assert connection.running.wait(5)
    assert not told.is_set()
    connection.finish.set()
    assert told.wait(5)


def test_what_was_accepted_meets_its_dispatcher_before_they_are_told_to_go(clients):
    # given one session that runs and one connection that waits for its thread
    pool = pool_of(clients, max_threads=1)
    running, queued = Connection(pool), Connection(pool)
    for connection in (running, queued):
        clients.come(connection)
    assert running.running.wait(5)
    wait_until(lambda: pool.busy == 2)
    # when the end of all deliveries is asked for
    told = threading.Event()
    pool.when_delivered(told.set)
    assert not told.is_set()
    # then it is told while the last session still runs
    running.finish.set()
    assert queued.running.wait(5)
    assert told.wait(5)
    queued.finish.set()


def test_after_the_refusal_of_the_queue_nobody_is_served(last_moment):
    # given an end that is asked for at this moment
    clients, pool, connection = last_moment
    told = threading.Event()
    pool.when_idle(told.set)
    # when sessions are cut at this moment
    pool.refuse_queued()
    clients.go_on.set()
    # then it is refused
    assert connection.refused.wait(5)
    assert told.wait(5)


def test_five_threads_serve_ten_sessions(zorp):
    # given an instance with five threads, and ten clients at once
    daemon = zorp(ECHO, arguments=["--threads", "5"])
    clients = [daemon.connect() for _ in range(10)]
    served = clients[:5]
    for client in served:
        assert client.recv(100)
    # then the log says that others wait
    line = daemon.log.wait_for("core.error", 3, "Too many running threads, waiting for one to become free", count=5)
    assert line.fields == {"num_threads": "5", "max_threads": "5"}
    # and they are served when others finish
    for client in served:
        client.close()
    for client in clients[5:]:
        assert client.recv(100)


def test_a_full_line_refuses(zorp):
    policy = ECHO + "\nfrom Zorp.Config import config\nconfig.options.max_queued_sessions = 1\n"
    daemon = zorp(policy, arguments=["--threads", "1"])
    first, second, third = (daemon.connect() for _ in range(3))
    assert first.recv(100)
    assert third.recv(100) == b""
    daemon.log.wait_for("core.error", 2, "Too many connections, refusing")
    first.close()
    assert second.recv(100)


def test_a_stacked_job_runs_while_every_thread_is_taken(zorp):
    daemon = zorp(ECHO, arguments=["--threads", "1"])
    client = daemon.connect()
    client.recv(100)
    client.sendall(b"nested\n")
    assert client.recv(100) == b"started\n"


def test_deep_recursion_in_policy_code_is_an_exception_not_a_crash(zorp):
    deep = ECHO.replace("def serve(stream, session_id):",
                        "def deep(n):\n    return deep(n + 1)\n\ndef serve(stream, session_id):\n"
                        "    import sys\n    sys.setrecursionlimit(5000)\n    try:\n        deep(0)\n"
                        "    except RecursionError:\n        pass")
    daemon = zorp(deep, arguments=["--stack-size", "64"])
    assert daemon.connect().recv(100).startswith(b"hello")
    daemon.kill(signal.SIGUSR1)
    daemon.log.wait_for("core.info", 0, "Changing verbosity level")


def test_more_clients_per_second_than_allowed_are_refused(zorp):
    # given an instance that accepts three per second
    policy = ECHO + "\nfrom Zorp.Config import config\nconfig.options.max_accepts_per_second = 3\n"
    daemon = zorp(policy)
    # when forty come at once
    began_s = time.monotonic()
    answers = [client.recv(100) for client in [daemon.connect() for _ in range(40)]]
    # then so many are served as have come in these seconds, and one line says so
    begun_seconds = int(time.monotonic() - began_s) + 2
    assert len(answers) - answers.count(b"") <= 3 * begun_seconds
    assert answers[0]
    daemon.log.wait_for("core.error", 2, "Too many connections, refusing")


def test_accept_one_stops_after_one(zorp):
    daemon = zorp(ECHO.replace("accepted)\n    return", "accepted, {'accept_one': 1})\n    return"))
    with daemon.connect() as client:
        assert client.recv(100)
    with daemon.connect() as client:        # the master's queue still takes it, nobody serves it
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(100)
