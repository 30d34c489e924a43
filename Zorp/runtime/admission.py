"""How many connections may come per second, and the log line about refused ones.

The limit (config.options.max_accepts_per_second) is off by default.  A client that comes too
many is closed without a byte; the log says so at most once per second, with the number of
refusals that the line stands for.  Limits per client belong to the dispatcher, which knows the
client behind a load balancer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from Zorp.Log import log
from Zorp.process.log_pause import LogPause


class Admission:
    """The counts.  Any thread may call; _counts_lock guards all attributes that change."""

    def __init__(self, max_per_second: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        """0: no limit."""
        self._max_per_second = max_per_second
        self._clock = clock
        self._counts_lock = threading.Lock()
        self._second = -1
        self._this_second = 0
        self._refusals = LogPause(clock)

    def enter(self) -> bool:
        """Count a connection; False when it is one too many for this second."""
        if not self._max_per_second:
            return True
        with self._counts_lock:
            second = int(self._clock())
            if second != self._second:
                self._second, self._this_second = second, 0
            self._this_second += 1
            return self._this_second <= self._max_per_second

    def report_refusal(self, host: str) -> None:
        """Say that a connection of this host was refused, for whichever reason."""
        if (others := self._refusals.due()) is not None:
            log(None, "core.error", 2, "Too many connections, refusing; client_host='%s', refused='%d'",
                (host, others + 1))
