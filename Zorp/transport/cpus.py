"""On which CPU the threads of a process run: together, on one, while the interpreter is the bottleneck.

Theory of operation
    One thread at a time holds the interpreter, and gives it up around every system call.  Threads
    on several CPUs hand it from core to core that way, with a wake-up, a context switch and cold
    caches each time: 280 of 1030 microseconds per mail with eight sessions at a time.  On one CPU
    the thread whose call did not block simply goes on, so home.settle() keeps all threads on one.

    That CPU is not fixed for ever: every few seconds look() and, a moment later, review() move the
    process when others want the CPU too while another one is idle.  Where others keep all CPUs busy
    the gain is gone, and threads that cannot go where there is room wait: then the kernel decides,
    until it is calm again.  Only a moment in which we work ourselves tells anything: an average over
    seconds holds what others did while we had nothing to do and were in nobody's way.  A crowd is
    believed in when it is seen twice in a row.

    The threads also wait their turn (SCHED_BATCH): one that wakes up does not push the one that
    holds the interpreter off the CPU, only to find out that it cannot go on without it.

    Who works in the kernel for long, not in the interpreter, steps out: inside `with away():` the
    calling thread may run on every CPU that the process was given, and so may programs that it
    starts there.

    Nothing happens where the process was given one CPU only, where the interpreter has no global
    lock, or before settle().

Threads
    settle() before there are other threads, which inherit its choice; look() and review() in one
    thread; away() in any.  _away_lock guards _away.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading
import time
from collections.abc import Iterator, Mapping

LOOK_S = 0.25                    # from look() to review()
_SHARE_OF_IDLERS = 0.02          # of a CPU: who took less had nothing to do; among ten hogs it would be more
_SHARE_THAT_MATTERS = 0.1        # of a CPU: below that our own work is not worth a move
_SHARE_OF_OTHERS = 0.25          # how much more others take from our CPU than from the one we move to
_FULL = 0.8                      # busy share from which a CPU has no room
_CROWD, _CALM = 0.6, 0.5         # what others take of all CPUs: from here on the kernel decides; below it no longer
_MOVE_PROBABILITY = 0.5          # two processes that meet on one CPU must not flee together
_IDLE_FIELDS = (3, 4)            # of a CPU in /proc/stat: idle, iowait
_BUSY_FIELDS = 8                 # user to steal; guest time is part of user


def has_interpreter_lock() -> bool:
    """True when only one thread at a time runs Python code."""
    return getattr(sys, "_is_gil_enabled", lambda: True)()


def busy_seconds() -> dict[int, float]:
    """Return for each CPU how long it has worked since the host started; raises OSError."""
    ticks_per_s = os.sysconf("SC_CLK_TCK")
    busy = {}
    with open("/proc/stat", encoding="ascii") as file:
        for line in file:
            name, *fields = line.split()
            if name[:3] == "cpu" and name != "cpu":
                ticks = sum(int(field) for index, field in enumerate(fields[:_BUSY_FIELDS])
                            if index not in _IDLE_FIELDS)
                busy[int(name[3:])] = ticks / ticks_per_s
    return busy


def best_cpu(present: int | None, busy: Mapping[int, float], own: float) -> int | None:
    """Return the CPU to be on, None where the kernel decides better.

    present: the one we are on, None when the kernel decides now; busy: share of its time that each
    permitted CPU worked; own: how much of that was for us.
    """
    if own < _SHARE_OF_IDLERS:
        return present
    others = (sum(busy.values()) - own) / len(busy)
    if others > (_CALM if present is None else _CROWD):
        return None
    best = min(busy, key=busy.__getitem__)
    if present is None:
        return best
    no_need = own < _SHARE_THAT_MATTERS or busy[present] < _FULL
    return present if no_need or busy[present] - own - busy[best] <= _SHARE_OF_OTHERS else best


class Home:
    """The CPU of this process."""

    def __init__(self) -> None:
        self._permitted: frozenset[int] = frozenset()    # empty: never settled
        self._cpu: int | None = None                     # None: the kernel decides
        self._saw_crowd = False                          # at the last review, and stayed
        self._away_lock = threading.Lock()
        self._away: set[int] = set()                     # kernel's ids of the threads inside away()
        self._seen: tuple[float, float, dict[int, float]] = (0.0, 0.0, {})

    def settle(self) -> None:
        """Keep this thread, and all that it starts, on one CPU."""
        try:
            permitted = frozenset(os.sched_getaffinity(0))
            if len(permitted) < 2 or not has_interpreter_lock():
                return
            self._seen = (time.monotonic(), time.process_time(), busy_seconds())
            cpu = sorted(permitted)[os.getpid() % len(permitted)]      # processes forked in a row spread
            os.sched_setaffinity(0, {cpu})
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        except OSError:                          # a container may forbid it; the kernel decides then
            return
        self._permitted, self._cpu = permitted, cpu

    def look(self) -> None:
        """Note what every CPU has done until now, for review()."""
        if self._permitted:
            with contextlib.suppress(OSError):
                self._seen = (time.monotonic(), time.process_time(), busy_seconds())

    def review(self) -> None:
        """Move the process, or leave it to the kernel, as the work of others since look() suggests."""
        if not self._permitted:
            return
        then_s, own_then_s, busy_then = self._seen
        try:
            now_s, own_s, busy_now = self._seen = time.monotonic(), time.process_time(), busy_seconds()
        except OSError:
            return
        passed_s = max(now_s - then_s, 0.001)
        busy = {cpu: (busy_now[cpu] - busy_then[cpu]) / passed_s
                for cpu in self._permitted & busy_now.keys() & busy_then.keys()}
        if not busy or (self._cpu is not None and self._cpu not in busy):
            return                               # CPUs come and go
        cpu = best_cpu(self._cpu, busy, (own_s - own_then_s) / passed_s)
        if cpu is None and self._cpu is not None and not self._saw_crowd:
            self._saw_crowd = True               # perhaps somebody whose work ended when ours began: look again
            return
        self._saw_crowd = False
        if cpu != self._cpu and (cpu is None or random.random() < _MOVE_PROBABILITY):
            self._move(cpu)

    def _move(self, cpu: int | None) -> None:
        with self._away_lock:
            self._cpu = cpu
            where = self._where()
            for task in map(int, os.listdir("/proc/self/task")):
                if task not in self._away:
                    with contextlib.suppress(OSError):       # it has ended meanwhile
                        os.sched_setaffinity(task, where)

    def _where(self) -> frozenset[int]:
        return self._permitted if self._cpu is None else frozenset({self._cpu})

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Let the calling thread run on every permitted CPU while it works in the kernel."""
        if not self._permitted:
            yield
            return
        thread = threading.get_native_id()
        with self._away_lock:
            self._away.add(thread)
        try:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(thread, self._permitted)
            yield
        finally:
            with self._away_lock:
                self._away.discard(thread)
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(thread, self._where())


home = Home()
