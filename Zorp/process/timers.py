"""Deadlines of a loop: call something once, later.

A loop asks timeout() how long it may sleep and calls run_due() after each sleep.  The clock is
an argument, so that tests move it.  One thread only.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable

from Zorp.Log import log_exception


class Timer:
    """One call to come; cancel() takes it back."""

    __slots__ = ("callback", "due_s")

    def __init__(self, due_s: float, callback: Callable[[], None]) -> None:
        self.due_s = due_s
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Timers:
    """The pending calls of one loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._heap: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()

    def now(self) -> float:
        """The clock's present reading, seconds."""
        return self._clock()

    def after(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        """Call back once, delay_s seconds from now."""
        timer = Timer(self._clock() + delay_s, callback)
        heapq.heappush(self._heap, (timer.due_s, next(self._order), timer))
        return timer

    def timeout(self) -> float | None:
        """Seconds until the next call is due, 0 when one is, None when there is none."""
        while self._heap and self._heap[0][2].callback is None:
            heapq.heappop(self._heap)
        return max(0.0, self._heap[0][0] - self._clock()) if self._heap else None

    def run_due(self) -> None:
        """Run the calls whose time has come; what they ask for waits for the next run, also when it is due at once."""
        now = self._clock()
        due: list[Timer] = []
        while self._heap and self._heap[0][0] <= now:
            due.append(heapq.heappop(self._heap)[2])
        for timer in due:
            if timer.callback is not None:
                try:
                    timer.callback()
                except Exception:        # a defect of one call is no reason to lose the others
                    log_exception(None, 0)
