"""What chainers remember between sessions; each class is shared by all threads and has its own lock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence


class Rotation:
    """Whose turn it is.  _count_lock guards _count, so parallel sessions get consecutive turns."""

    def __init__(self) -> None:
        self._count_lock = threading.Lock()
        self._count = 0

    @property
    def count(self) -> int:
        """Number of turns taken so far."""
        return self._count

    def next_index(self, size: int) -> int:
        """Take a turn; return an index below `size` (0 when there is nothing to choose from)."""
        with self._count_lock:
            turn = self._count
            self._count += 1
        return turn % size if size else 0


class ConnectionCounts:
    """How many connections each target has now.  _counts_lock guards _counts.

    A target that nobody is connected to is not kept, so targets that clients name cannot
    make the table grow.
    """

    def __init__(self) -> None:
        self._counts_lock = threading.Lock()
        self._counts: dict = {}

    def number(self, target) -> int:
        """Return the connections of a target now."""
        return self._counts.get(target, 0)

    def enter_least(self, targets: Sequence) -> int:
        """Count one more for the target that has the fewest, the first of equals; return its index.

        Choice and count are one step: eight clients in one moment go to eight targets.
        """
        with self._counts_lock:
            index = index_of_least(len(targets), lambda i: self._counts.get(targets[i], 0))
            self._counts[targets[index]] = self._counts.get(targets[index], 0) + 1
        return index

    def leave(self, target) -> None:
        """Count one less."""
        with self._counts_lock:
            left = self._counts.get(target, 0) - 1
            if left > 0:
                self._counts[target] = left
            else:
                self._counts.pop(target, None)


def index_of_least(size: int, number: Callable[[int], int]) -> int:
    """Return the index below `size` with the smallest number, the first of equals."""
    return min(range(size), key=number)


class Turns:
    """The position in a list of hosts.

    turn_lock guards `position`.  Whoever takes a turn holds it over reading and advancing; since
    both are methods that sites override, it may be taken again by the thread that has it.
    """

    def __init__(self) -> None:
        self.turn_lock = threading.RLock()
        self.position = 0

    def advance(self, size: int) -> None:
        """Go to the next of `size` places, around."""
        with self.turn_lock:
            self.position = (self.position + 1) % size if size else 0
