"""The longest time that a session may take as a whole: attribute max_session_time of every proxy.

Theory of operation
    The time-outs of a protocol bound each wait; a peer that keeps sending a little keeps its
    session for ever.  A proxy whose policy sets max_session_time enters itself here when its
    config() is done and leaves at its end.  One thread, started for the first of them, looks for
    those whose time is up and has each of them end itself (time_is_up()), which is a stop request
    with a reason of its own.  Sessions without the attribute cost nothing.

    The thread sleeps until the next time is up, but looks at most every _PAUSE_S: the time of
    sessions that have left meanwhile is not looked for in vain more often than that, and a
    session may take so much longer.

Threads
    Any thread may call.  _due guards _by_proxy; proxies are called outside it.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

_PAUSE_S = 0.1


class Limited(Protocol):
    """What has a time."""

    def time_is_up(self) -> None:
        """End soon; called by the thread of SessionTimes, must not wait."""


class SessionTimes:
    """When the time of each proxy is up; see the module's text."""

    def __init__(self) -> None:
        self._due = threading.Condition()
        self._by_proxy: dict[Limited, float] = {}        # seconds of the monotonic clock
        self._thread: threading.Thread | None = None

    def enter(self, proxy: Limited, allowed_ms: int) -> None:
        """The time of the proxy begins now.  Raises RuntimeError when the host refuses the thread."""
        with self._due:
            self._by_proxy[proxy] = time.monotonic() + allowed_ms / 1000
            if self._thread is None:
                thread = threading.Thread(target=self._watch, name="session times", daemon=True)
                thread.start()
                self._thread = thread
            self._due.notify()

    def leave(self, proxy: Limited) -> None:
        """The proxy ends; one that never entered is no error."""
        with self._due:
            self._by_proxy.pop(proxy, None)

    def _watch(self) -> None:
        while True:
            for proxy in self._wait_for_late():
                proxy.time_is_up()
            time.sleep(_PAUSE_S)

    def _wait_for_late(self) -> list[Limited]:
        """Wait until a time is up or somebody enters; return those whose time is up, who have left."""
        with self._due:
            now = time.monotonic()
            next_s = min(self._by_proxy.values(), default=None)
            if next_s is None or next_s > now:
                self._due.wait(None if next_s is None else next_s - now)
                now = time.monotonic()
            late = sorted((proxy for proxy, due_s in self._by_proxy.items() if due_s <= now), key=self._by_proxy.get)
            for proxy in late:
                del self._by_proxy[proxy]
        return late


session_times = SessionTimes()
