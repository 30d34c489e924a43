"""Which reloads are wanted, under way, or done; and whether the program is still the same.

Reloads never overlap.  One that is wanted while another is under way follows it, so that the
policy in force at the end is the one on disk at the time of the last request.

Whoever asked is told when nothing is wanted any more, how the last one ended.  So one that was to
revoke and has failed, or could not judge all sessions, leaves the duty to the next: nobody hears
that sessions were judged when they were not.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

import Zorp

_VERSION = re.compile(r'^__version__ = "([^"]+)"', re.MULTILINE)


class Outcome(NamedTuple):
    """How a reload ended."""

    success: bool
    reason: str = ""                 # of a failure, or why sessions could not be judged
    revoked: int = 0                 # sessions of older policies that were ended


class Reloads:
    """The history that RELOAD RESULT tells; for the loop of the master."""

    def __init__(self) -> None:
        self.wanted = False
        self.failures = 0
        self.last_error = ""
        self._is_to_revoke = False       # the wanted one shall end sessions that it refuses
        self.is_revoking = False         # the one under way shall
        self.under_way = False           # from begun() to ended(), with the revocation
        self._is_over = False            # the instance stops: nothing is wanted or begun any more
        self._latest = Outcome(False)    # before any reload: failed, as it always was
        self._revoked = 0                # since somebody was told
        self._waiting: list[Callable[[Outcome], None]] = []

    def want(self, revoke: bool) -> None:
        """Somebody asks for a reload."""
        if not self._is_over:
            self.wanted = True
            self._is_to_revoke |= revoke

    def begun(self) -> None:
        """The wanted one has begun."""
        self.is_revoking, self._is_to_revoke = self._is_to_revoke, False
        self.wanted = False
        self.under_way = True

    def ended(self, outcome: Outcome) -> None:
        """The one under way has ended; tell who waits, unless another is wanted already."""
        if self.under_way:
            self.under_way = False
            self.failures += not outcome.success
            self.last_error = outcome.reason
            self._revoked += outcome.revoked
            self._latest = outcome._replace(revoked=self._revoked)
            if self.wanted and self.is_revoking and (outcome.reason or not outcome.success):
                self._is_to_revoke = True
        if not self.wanted:
            self._tell()

    def give_up(self, reason: str) -> None:
        """The instance stops: whoever waits, and whoever still asks, hears that his reload has failed."""
        self._is_over, self.wanted, self.under_way = True, False, False
        self._latest = Outcome(False, reason)
        self._tell()

    def _tell(self) -> None:
        self._revoked = 0
        waiting, self._waiting = self._waiting, []
        for done in waiting:
            done(self._latest)

    def when_ended(self, done: Callable[[Outcome], None]) -> None:
        """Call done() when no reload is wanted or under way; at once if so."""
        if self.wanted or self.under_way:
            self._waiting.append(done)
        else:
            done(self._latest)


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
