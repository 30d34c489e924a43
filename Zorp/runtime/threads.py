"""The pool of threads that serve sessions.

Theory of operation
    Leader and followers.  One idle thread, the leader, waits for a client.  It accepts, makes
    another thread the leader, and delivers the connection itself: no hand-over between the
    thread that accepts and the one that serves.  start(), called from inside that delivery,
    only notes the session's job, and the same thread runs it when the delivery returns; so one
    thread owns a session from the first line of policy to the last log line.  A job started from
    inside a running job, a stacked proxy, gets a thread of its own.

    While max_threads sessions run, the leader goes on accepting and lines the connections up,
    with one log line each; the next thread that becomes free serves them in order.  When the
    line is full, they are refused.  Stacked jobs cannot wait in that line, for the sessions that
    wait for them would never end: they may exceed the limit by STACKED_SHARE, and fail beyond.

Guarantees
    A job runs exactly once or start() returns False.  What a job raises is logged and ends with
    it.  No thread of the pool keeps the process from exiting.

_state_lock guards every attribute of the pool; no foreign code runs while it is held.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable

from Zorp.Log import log, log_exception

MIN_STACK_KIB = 2048             # deep recursion in policy code overflows less and kills the process
STACKED_SHARE = 0.25             # of max_threads, for stacked jobs beyond the limit


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolLimits:
    """How many of what the pool may hold."""

    max_threads: int = 1000      # sessions at a time
    idle_threads: int = 8        # threads kept ready when there is nothing to do
    max_queued: int = 1000       # accepted connections waiting for a thread


class _Lead:
    """The order to wait for the next client."""


_LEAD = _Lead()


class _PoolThread(threading.Thread):
    """A thread of the pool.  `task` is written by whoever releases `wake`, read by the thread."""

    def __init__(self, pool: ThreadPool, task=None) -> None:
        super().__init__(name="idle", daemon=True)
        self.pool = pool
        self.task = task
        self.wake = threading.Lock()
        self.wake.acquire()
        self.delivering = False
        self.deferred: tuple[str, Callable[[], None]] | None = None

    def run(self) -> None:
        self.pool.work(self)


class ThreadPool:
    """Threads for sessions; `Globals.threads` of a worker."""

    def __init__(self, limits: PoolLimits, acceptor, events=None, stack_kib: int | None = None) -> None:
        """acceptor has wait() and stopped; events gets thread_started() and thread_stopped(), or is None."""
        self._limits = limits
        self._most_stacked = limits.max_threads + max(1, int(limits.max_threads * STACKED_SHARE))
        self._acceptor = acceptor
        self._events = events
        self._state_lock = threading.Lock()
        self._idle: list[_PoolThread] = []
        self._queue: collections.deque[Callable[[], None]] = collections.deque()
        self._has_leader = False
        self._leading_allowed = False
        self._busy = 0
        self._when_idle: Callable[[], None] | None = None
        threading.stack_size(max(stack_kib or 0, MIN_STACK_KIB) * 1024)

    # ---- called from outside the pool

    def begin(self) -> None:
        """Start accepting."""
        with self._state_lock:
            self._leading_allowed = True
        _PoolThread(self).start()

    def when_idle(self, callback: Callable[[], None]) -> None:
        """Call back once no session runs or waits; at once if so already.  Accepting must have stopped."""
        with self._state_lock:
            self._when_idle = callback
        self._tell_if_idle()

    @property
    def busy(self) -> int:
        """Sessions and stacked jobs that run or wait now."""
        with self._state_lock:
            return self._busy + len(self._queue)

    def start(self, name: str, job: Callable[[], None]) -> bool:
        """Run job in a thread called name; False when there is no room.  Any thread may call."""
        thread = threading.current_thread()
        if isinstance(thread, _PoolThread) and thread.delivering and thread.deferred is None:
            thread.deferred = (name, job)
            return True
        return self._start_elsewhere(lambda: self._run(name, job))

    # ---- called by threads of the pool

    def work(self, thread: _PoolThread) -> None:
        """The life of one pool thread."""
        task, thread.task = thread.task, None
        while True:
            if task is None:
                task = self._next_task(thread)
                if task is None:
                    return
            if task is _LEAD:
                task = self._lead()
                if task is None:
                    continue
            try:
                task()
            except BaseException:
                log_exception(None)
            self._finished()
            task = None

    def _next_task(self, thread: _PoolThread):
        with self._state_lock:
            if self._queue:
                self._busy += 1
                return self._queue.popleft()
            if self._leading_allowed and not self._has_leader:
                self._has_leader = True
                return _LEAD
            if len(self._idle) >= self._limits.idle_threads:
                return None
            self._idle.append(thread)
        thread.wake.acquire()
        task, thread.task = thread.task, None
        return task

    def _lead(self):
        """Wait for one client.  Return how to serve it, with another leader in place; None: none is mine."""
        while (accepted := self._acceptor.wait()) is not None:
            with self._state_lock:
                verdict = self._make_room(accepted)
            if verdict == "mine" or verdict == "spawn" and self._spawn():
                return lambda: self._deliver(accepted)
            if verdict == "queued":
                log(None, "core.error", 3, "Too many running threads, waiting for one to become free; "
                    "num_threads='%d', max_threads='%d'", (self._limits.max_threads, self._limits.max_threads))
                continue
            accepted.refuse()
            log(None, "core.error", 2, "Too many connections, refusing; client_host='%s', max_threads='%d'",
                (accepted.remote_host, self._limits.max_threads))
            if verdict == "spawn" and not self._take_back_lead():
                return None
        with self._state_lock:
            self._has_leader = False
            self._leading_allowed = False
        return None

    def _make_room(self, accepted) -> str:
        """Decide under the lock who serves this connection and who leads next."""
        if self._busy >= self._limits.max_threads:
            if len(self._queue) >= self._limits.max_queued:
                return "refuse"
            self._queue.append(lambda: self._deliver(accepted))
            return "queued"
        self._busy += 1
        if self._idle:
            follower = self._idle.pop()
            follower.task = _LEAD
            follower.wake.release()
            return "mine"
        self._has_leader = False
        return "spawn"

    def _take_back_lead(self) -> bool:
        """No thread could be made: go on leading, unless a thread that became free does so already."""
        with self._state_lock:
            self._busy -= 1
            taken, self._has_leader = self._has_leader, True
            return not taken

    def _spawn(self, task=None) -> bool:
        try:
            _PoolThread(self, task).start()
        except RuntimeError as problem:
            log(None, "core.error", 2, "Error starting new thread; error='%s'", (problem,))
            return False
        return True

    def _start_elsewhere(self, task: Callable[[], None]) -> bool:
        with self._state_lock:
            if self._busy >= self._most_stacked:
                return False
            self._busy += 1
            if self._idle:
                follower = self._idle.pop()
                follower.task = task
                follower.wake.release()
                return True
        if self._spawn(task):
            return True
        with self._state_lock:
            self._busy -= 1
        return False

    def _deliver(self, accepted) -> None:
        thread = threading.current_thread()
        thread.delivering = True
        try:
            accepted.deliver()
        finally:
            thread.delivering = False
            deferred, thread.deferred = thread.deferred, None
        if deferred is not None:
            self._run(*deferred)

    def _run(self, name: str, job: Callable[[], None]) -> None:
        thread = threading.current_thread()
        thread.name = name
        if self._events is not None:
            self._events.thread_started()
        log(name, "core.debug", 6, "thread starting;")
        try:
            job()
        except BaseException:
            log_exception(name)
        finally:
            log(name, "core.debug", 6, "thread exiting;")
            thread.name = "idle"
            if self._events is not None:
                self._events.thread_stopped()

    def _finished(self) -> None:
        with self._state_lock:
            self._busy -= 1
            done = self._when_idle is not None
        if done:
            self._tell_if_idle()

    def _tell_if_idle(self) -> None:
        with self._state_lock:
            callback = self._when_idle
            if callback is None or self._busy or self._queue:
                return
            self._when_idle = None
        callback()
