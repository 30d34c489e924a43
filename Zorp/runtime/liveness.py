"""Does every worker's loop turn?

Theory of operation
    Once per period each worker that serves is sent a ping; its loop answers at once, whatever
    its sessions do.  One that has not answered when the next period begins is hung: frozen by a
    signal, or by code that never lets the loop run.  It gets a grace, then SIGABRT (a core, if
    those are allowed), then SIGKILL, and is replaced like a crashed one.

    The service manager's watchdog is fed from the same answers: only when every worker has
    answered since the last time, so that a healthy master never hides a hung worker.

    Loading and draining workers are not asked; both have deadlines of their own.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable

from Zorp.process.notify import Notifier
from Zorp.process.timers import Timers
from Zorp.runtime.slots import Handle

_GRACE_S = 4.0
_ABORT_S = 1.0


class Liveness:
    """Asks, and kills who does not answer; for the loop of the master."""

    def __init__(self, timers: Timers, period_s: int, serving: Callable[[], Iterable[Handle]],
                 send: Callable[[Handle, str], None], report: Callable[[str], None]) -> None:
        """period_s negative: never ask, and nobody can switch it on."""
        self._timers = timers
        self._period_s = period_s
        self._serving = serving
        self._send = send
        self._report = report
        self._enabled = period_s >= 0

    @property
    def enabled(self) -> bool:
        """What DEADLOCKCHECK GET says."""
        return self._enabled

    def switch(self, on: bool) -> None:
        """DEADLOCKCHECK ENABLE or DISABLE."""
        self._enabled = on and self._period_s >= 0
        for handle in self._serving():
            handle.pinged = False

    def begin(self, notifier: Notifier) -> None:
        """Start asking."""
        if self._period_s >= 0:
            self._timers.after(max(self._period_s, 0.1), self._check)
        if notifier.watchdog_s is not None:
            self._timers.after(notifier.watchdog_s, lambda: self._feed(notifier))

    def answered(self, handle: Handle) -> None:
        """A pong has come."""
        handle.pinged = False

    def _check(self) -> None:
        self._timers.after(max(self._period_s, 0.1), self._check)
        if not self._enabled:
            return
        for handle in self._serving():
            if handle.hung:
                continue
            if handle.pinged:
                self._deal_with(handle)
            else:
                self._ping(handle)

    def _ping(self, handle: Handle) -> None:
        handle.pinged = True
        self._send(handle, "ping")

    def _deal_with(self, handle: Handle) -> None:
        handle.hung = True
        self._report("Daemon deadlock detected, killing process;")
        self._timers.after(_GRACE_S, lambda: self._kill(handle, signal.SIGABRT))
        self._timers.after(_GRACE_S + _ABORT_S, lambda: self._kill(handle, signal.SIGKILL))

    def _kill(self, handle: Handle, number: signal.Signals) -> None:
        if handle in list(self._serving()):      # not when it has ended meanwhile and the pid is another's
            os.kill(handle.pid, number)

    def _feed(self, notifier: Notifier) -> None:
        self._timers.after(notifier.watchdog_s, lambda: self._feed(notifier))
        serving = list(self._serving())
        if serving and not any(handle.pinged for handle in serving):
            notifier.send("WATCHDOG=1")
        for handle in serving:
            if not handle.pinged:
                self._ping(handle)
