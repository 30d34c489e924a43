"""Which reloads are wanted, under way, or done; and whether the program is still the same.

Reloads never overlap.  One that is wanted while another is under way follows it, so that the
policy in force at the end is the one on disk at the time of the last request.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable

import Zorp

_VERSION = re.compile(r'^__version__ = "([^"]+)"', re.MULTILINE)


class Reloads:
    """The history that RELOAD RESULT tells; for the loop of the master."""

    def __init__(self) -> None:
        self.wanted = False
        self.failures = 0
        self.last_error = ""
        self._under_way = False
        self._succeeded = False          # before any reload: failed, as it always was
        self._waiting: list[Callable[[bool, str], None]] = []

    def want(self) -> None:
        """Somebody asks for a reload."""
        self.wanted = True

    def begun(self) -> None:
        """The wanted one has begun."""
        self.wanted = False
        self._under_way = True

    def ended(self, success: bool, reason: str) -> None:
        """The one under way has ended; tell who waits, unless another is wanted already."""
        if self._under_way:
            self._under_way = False
            self._succeeded = success
            self.failures += not success
            self.last_error = reason
        if not self.wanted:
            waiting, self._waiting = self._waiting, []
            for done in waiting:
                done(self._succeeded, self.last_error)

    def when_ended(self, done: Callable[[bool, str], None]) -> None:
        """Call done(success, reason) when no reload is wanted or under way; at once if so."""
        if self.wanted or self._under_way:
            self._waiting.append(done)
        else:
            done(self._succeeded, self.last_error)


def replaced_program() -> str | None:
    """Say so when the installed program is not the one that runs: the two must not be mixed."""
    try:
        source = pathlib.Path(Zorp.__file__).read_text("utf-8")
    except OSError:
        return None                      # out of reach, in a new root: nothing to compare with
    found = _VERSION.search(source)
    if found is None or found[1] == Zorp.__version__:
        return None
    return ("Error reloading policy, the program was replaced, restart the instance; "
            f"running='{Zorp.__version__}', installed='{found[1]}'")
