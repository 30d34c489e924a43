"""Instance numbers: the N in svc/VNAME/SERVICE:N.

Every accepted connection draws the next number of its service, starting at 0; refused ones
consume a number too.  A reload goes on counting: the worker that leaves hands its counters to
the one that takes over.
"""

from __future__ import annotations

import threading


class InstanceNumbers:
    """A counter per service name; any thread may call.  _next_lock guards _next."""

    def __init__(self) -> None:
        self._next_lock = threading.Lock()
        self._next: dict[str, int] = {}

    def draw(self, service_name: str) -> int:
        """Return the next number of the service, 0 for the first connection."""
        with self._next_lock:
            number = self._next.get(service_name, 0)
            self._next[service_name] = number + 1
        return number

    def snapshot(self) -> dict[str, int]:
        """Return the next number of every service, for the generation that follows."""
        with self._next_lock:
            return dict(self._next)

    def adopt(self, numbers: dict[str, int]) -> None:
        """Go on where another generation stopped; never counts backwards."""
        with self._next_lock:
            for service_name, number in numbers.items():
                self._next[service_name] = max(number, self._next.get(service_name, 0))


numbers = InstanceNumbers()
getInstanceId = numbers.draw
