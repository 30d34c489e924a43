"""What waits for the system log goes out as fast as the log takes it.

Theory of operation
    When a sink could not write, its lines wait.  The loop of the process then waits for the
    receiver to have room again, with everything else it waits for; each time it has, flush()
    writes what fits.  A log that is away is looked for once in a while instead.

    A timer alone would not do: a datagram socket takes ten packets at a time on many systems,
    and at ten packets per tick a backlog of minutes would grow forever while lines are lost.

One thread, that of the loop, calls flush(); any thread may fill the sink meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import selectors

from Zorp.process.logsinks import Sink
from Zorp.process.timers import Timer, Timers

_RETRY_S = 0.1


class LogFlusher:
    """Flushes one sink; callbacks are registered as the selector's data and called with or without the events."""

    def __init__(self, sink: Sink, selector: selectors.BaseSelector, timers: Timers) -> None:
        self._sink = sink
        self._selector = selector
        self._timers = timers
        self._watched: int | None = None
        self._timer: Timer | None = None

    def flush(self, events: int = 0) -> None:
        """Write what can be written now, and come back when more can be."""
        self._stop_waiting()
        if self._sink.flush():
            return
        self._timer = self._timers.after(_RETRY_S, self.flush)
        watched = self._sink.duplicate()
        if watched is None:
            return
        try:
            self._selector.register(watched, selectors.EVENT_WRITE, self.flush)
        except OSError:                  # a file: always writable, or the disk is full
            os.close(watched)
        else:
            self._watched = watched

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._watched is not None:
            watched, self._watched = self._watched, None
            with contextlib.suppress(KeyError):
                self._selector.unregister(watched)
            os.close(watched)
