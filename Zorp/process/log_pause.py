"""How often one kind of event is written into the log.

    pause = LogPause()
    if (unlogged := pause.due()) is not None:
        log(None, "core.error", 2, "Too many ...; suppressed='%d'", (unlogged,))

What a flood of clients brings about is told once per second, with the number of events that
were not, so that nobody fills the log by knocking.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_PAUSE_S = 1.0


class LogPause:
    """One kind of event.  Any thread may call; _pause_lock guards all attributes that change."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pause_lock = threading.Lock()
        self._silent_until_s = float("-inf")
        self._unlogged = 0

    def due(self) -> int | None:
        """Count an event; return how many before it went unlogged when it is time for a line, None when it is not."""
        with self._pause_lock:
            now_s = self._clock()
            if now_s < self._silent_until_s:
                self._unlogged += 1
                return None
            self._silent_until_s = now_s + _PAUSE_S
            unlogged, self._unlogged = self._unlogged, 0
            return unlogged
