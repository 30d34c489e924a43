"""The pool of threads that serve sessions.

Theory of operation
    Every idle thread waits for a client in the acceptor.  The thread that gets one delivers the
    connection itself; start(), called from inside that delivery, only notes the session's job,
    and the same thread runs it when the delivery returns.  So one thread owns a session from
    the accept to the last log line.  At least one thread always waits: whoever takes the last
    one's place starts another.  A job started from inside a running job, a stacked proxy, gets
    a thread of its own, an idle one if there is one to spare.

    While max_threads sessions run, the waiting thread goes on accepting and lines the
    connections up, with one log line each; the next thread that becomes free serves them in
    order.  When the line is full, they are refused.  Stacked jobs cannot wait in that line, for
    the sessions that wait for them would never end: they may exceed the limit by STACKED_SHARE,
    and fail beyond.

The end
    After accepting has stopped, when_delivered() tells when every accepted connection has met
    its dispatcher, when_idle() when the last session is over.

Guarantees
    A job runs exactly once or start() returns False.  What a job raises is logged and ends with
    it.  No thread of the pool keeps the process from exiting.

_state_lock guards every attribute of the pool; no foreign code runs while it is held.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import threading
from collections.abc import Callable

from Zorp import Log
from Zorp.Log import log, log_exception
from Zorp.runtime.admission import Admission
from Zorp.Szig import Statistics, ThreadCounts

MIN_STACK_KIB = 2048             # deep recursion in policy code overflows less and kills the process
STACKED_SHARE = 0.25             # of max_threads, for stacked jobs beyond the limit


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolLimits:
    """How many of what the pool may hold."""

    max_threads: int = 1000      # sessions at a time
    idle_threads: int = 8        # threads kept ready when there is nothing to do
    max_queued: int = 1000       # accepted connections waiting for a thread


class _Verdict(enum.Enum):
    """What becomes of an accepted connection."""

    SERVE = "serve it"
    SERVE_AND_SPAWN = "serve it, and start a thread that waits in my place"
    QUEUE = "line it up"
    REFUSE = "refuse it"


@dataclasses.dataclass(frozen=True, eq=False)
class _Barrier:
    """Who is told when something is over; is_reached() is asked under the pool's lock."""

    is_reached: Callable[[], bool]
    callback: Callable[[], None]


class _PoolThread(threading.Thread):
    """A thread of the pool; `task` is what it begins with, or None."""

    def __init__(self, pool: ThreadPool, task: _Task | None = None) -> None:
        super().__init__(name="idle", daemon=True)
        self.pool = pool
        self.task = task
        self.delivering = False
        self.deferred: tuple[str, Callable[[], None]] | None = None
        self.is_counted = False          # it has a job

    def run(self) -> None:
        self.pool.work(self)


_Task = Callable[[_PoolThread], None]


class ThreadPool:
    """Threads for sessions; `Globals.threads` of a worker."""

    def __init__(self, limits: PoolLimits, acceptor, statistics: Statistics | None = None,
                 stack_kib: int | None = None, admission: Admission | None = None) -> None:
        """acceptor has wait() and wake(); the threads that have jobs are counted for the statistics."""
        self._limits = limits
        self._most_stacked = limits.max_threads + max(1, int(limits.max_threads * STACKED_SHARE))
        self._acceptor = acceptor
        self._counts = ThreadCounts() if statistics is None else statistics.pool_threads
        self._admission = admission or Admission()
        self._state_lock = threading.Lock()
        self._waiting = 0                # threads inside the acceptor
        self._busy = 0                   # jobs that have a thread, or one that is on its way to them
        self._handed: collections.deque[_Task] = collections.deque()   # for waiting threads; in _busy
        self._queue: collections.deque = collections.deque()     # accepted, over the limit; not in _busy
        self._undelivered = 0            # accepted, and no dispatcher has seen them yet; those of the queue, too
        self._closing = False            # accepting has stopped: nobody goes into the acceptor any more
        self._refusing = False           # who was accepted at the last moment is not served any more
        self._barriers: list[_Barrier] = []
        threading.stack_size(max(stack_kib or 0, MIN_STACK_KIB) * 1024)

    # ---- called from outside the pool

    def begin(self) -> None:
        """Start accepting."""
        self._spawn()

    def when_delivered(self, callback: Callable[[], None]) -> None:
        """Call back once the dispatchers have seen every accepted connection; perhaps at once."""
        self._wait_for(_Barrier(lambda: not self._undelivered, callback))

    def when_idle(self, callback: Callable[[], None]) -> None:
        """Call back once no session runs or waits; perhaps at once."""
        self._wait_for(_Barrier(lambda: not self._busy and not self._queue, callback))

    def _wait_for(self, barrier: _Barrier) -> None:
        """Accepting must have stopped.

        A thread inside the acceptor may hold a connection that nobody has counted yet: all are
        called out, and no barrier is reached before the last has come.
        """
        with self._state_lock:
            self._closing = True
            self._barriers.append(barrier)
            inside = self._waiting
        for _thread in range(inside):
            self._acceptor.wake()
        self._tell_barriers()

    def refuse_queued(self) -> int:
        """Close the connections that still wait for a thread; return their number.  Accepting must have stopped."""
        with self._state_lock:
            self._refusing = True
            refused = list(self._queue)
            self._queue.clear()
            self._undelivered -= len(refused)
        for accepted in refused:
            accepted.refuse()
        self._tell_barriers()
        return len(refused)

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
        return self._start_elsewhere(functools.partial(self._run_stacked, name, job))

    # ---- called by threads of the pool

    def work(self, thread: _PoolThread) -> None:
        """The life of one pool thread."""
        task, thread.task = thread.task, None
        while True:
            if task is None:
                with self._state_lock:
                    task = self._take_unlocked()
                    if task is None and (self._closing or self._waiting >= self._limits.idle_threads):
                        break
                    self._waiting += task is None
            if task is None:
                task = self._await_client()
            if task is not None:
                self._do(task, thread)
                task = None
        self._tell_barriers()

    def _take_unlocked(self) -> _Task | None:
        """The next job that needs no client."""
        if self._handed:
            return self._handed.popleft()
        if self._queue and self._busy < self._limits.max_threads:
            self._busy += 1
            return functools.partial(self._deliver, self._queue.popleft())
        return None

    def _await_client(self) -> _Task | None:
        """Wait in the acceptor; return how to serve who came, None when there is nothing for this thread."""
        accepted = self._acceptor.wait()
        with self._state_lock:
            self._waiting -= 1
            if accepted is None:
                return self._take_unlocked()
            verdict = self._judge_unlocked(accepted)
        if verdict is _Verdict.SERVE:
            return functools.partial(self._deliver, accepted)
        if verdict is _Verdict.QUEUE:
            log(None, "core.error", 3, "Too many running threads, waiting for one to become free; "
                "num_threads='%d', max_threads='%d'", (self._limits.max_threads, self._limits.max_threads))
            return None
        if verdict is _Verdict.SERVE_AND_SPAWN:
            if self._spawn():
                return functools.partial(self._deliver, accepted)
            with self._state_lock:
                self._busy -= 1
                self._undelivered -= 1   # nobody would wait for clients: refuse this one
        self._admission.report_refusal(accepted.remote_host)
        accepted.refuse()
        return None

    def _judge_unlocked(self, accepted) -> _Verdict:
        if self._refusing or not self._admission.enter():
            return _Verdict.REFUSE
        if self._busy >= self._limits.max_threads:
            if len(self._queue) >= self._limits.max_queued:
                return _Verdict.REFUSE
            self._queue.append(accepted)
            self._undelivered += 1
            return _Verdict.QUEUE
        self._busy += 1
        self._undelivered += 1
        if self._waiting > len(self._handed):
            return _Verdict.SERVE
        return _Verdict.SERVE_AND_SPAWN

    def _spawn(self, task: _Task | None = None) -> bool:
        try:
            _PoolThread(self, task).start()
        except RuntimeError as problem:
            log(None, "core.error", 2, "Error starting new thread; error='%s'", (problem,))
            return False
        return True

    def _start_elsewhere(self, task: _Task) -> bool:
        with self._state_lock:
            if self._busy >= self._most_stacked:
                return False
            self._busy += 1
            spare = self._waiting > len(self._handed) + 1        # one must go on waiting for clients
            if spare:
                self._handed.append(task)
        if spare:
            self._acceptor.wake()
            return True
        if self._spawn(task):
            return True
        with self._state_lock:
            self._busy -= 1
        return False

    def _do(self, task: _Task, thread: _PoolThread) -> None:
        try:
            task(thread)
        except BaseException:
            log_exception(None)
        with self._state_lock:
            self._busy -= 1
            if thread.is_counted:
                thread.is_counted = False
                self._counts.end()
        if self._barriers:
            self._tell_barriers()

    def _deliver(self, accepted, thread: _PoolThread) -> None:
        thread.delivering = True
        try:
            accepted.deliver()
        finally:
            thread.delivering = False
            deferred, thread.deferred = thread.deferred, None
            with self._state_lock:
                self._undelivered -= 1
                if deferred is not None:
                    self._begin_unlocked(thread)
            if self._barriers:
                self._tell_barriers()
        if deferred is not None:
            self._run(*deferred, thread)

    def _run_stacked(self, name: str, job: Callable[[], None], thread: _PoolThread) -> None:
        with self._state_lock:
            self._begin_unlocked(thread)
        self._run(name, job, thread)

    def _begin_unlocked(self, thread: _PoolThread) -> None:
        """Count a thread that has a job, until it has done it."""
        thread.is_counted = True
        self._counts.begin()

    def _run(self, name: str, job: Callable[[], None], thread: _PoolThread) -> None:
        """Run a session's job in this thread."""
        thread.name = name
        if Log.loudest >= 6:
            log(name, "core.debug", 6, "thread starting;")
        try:
            job()
        except BaseException:
            log_exception(name)
        finally:
            if Log.loudest >= 6:
                log(name, "core.debug", 6, "thread exiting;")
            thread.name = "idle"

    def _tell_barriers(self) -> None:
        with self._state_lock:
            if self._waiting:
                return
            reached = [barrier for barrier in self._barriers if barrier.is_reached()]
            self._barriers = [barrier for barrier in self._barriers if barrier not in reached]
        for barrier in reached:
            barrier.callback()
