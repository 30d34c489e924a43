"""Reload with revocation: sessions of older policies that the new one would refuse are ended.

Theory of operation
    After the new workers serve, the master asks each worker of an older policy for its live
    sessions, the new worker of the same virtual process what it thinks of them, and tells the old
    one to end those (all three: Zorp.runtime.judgement).  A session goes on when the new policy
    would give the same connection the same service and permit it.  What cannot be judged is
    ended.

    Each step is bounded: a worker that does not answer in time leaves the sessions of that worker
    as they are, the log says so, and so does the answer to the order.

A session whose service is still being chosen then, or that has no server yet, is judged when
that is known (Zorp.runtime.consent), and is not among those that the answer counts.

An old worker's connections that still wait for a thread are refused when it is asked, because
they would begin under the old policy.  For the loop of the master.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from Zorp.Log import log
from Zorp.process.timers import Timers
from Zorp.runtime.questions import Questions, generations_of
from Zorp.runtime.slots import Handle, Slot
from Zorp.runtime.workers import Workers


class Revocation:
    """One round over all virtual processes; done(revoked, problem) is called once, at its end."""

    def __init__(self, workers: Workers, questions: Questions, timers: Timers, slots: list[Slot],
                 step_s: float, done: Callable[[int, str], None]) -> None:
        """step_s: how long one answer may take, seconds."""
        self._questions = questions
        self._timers = timers
        self._step_s = step_s
        self._done = done
        self._revoked = 0
        self._problems: list[str] = []
        pairs = [(old, slot.serving) for slot in slots for old in generations_of(workers, slot)
                 if old is not slot.serving]
        self._open = len(pairs)
        for old, new in pairs:
            self._ask(old, new)
        if not pairs:
            self._end()

    def _ask(self, old: Handle, new: Handle) -> None:
        def described(sessions: list) -> None:
            if not sessions:
                self._one_less()
            elif new is None:
                self._fail(old, "no worker serves")
            else:
                self._step(new, "judge", sessions, judged, old)

        def judged(refused: list) -> None:
            if refused:
                self._step(old, "end", refused, ended, old)
            else:
                self._one_less()

        def ended(count: int) -> None:
            self._revoked += count
            self._one_less()

        self._step(old, "describe", [], described, old)

    def _step(self, handle: Handle, step: str, sessions: list, go_on: Callable, old: Handle) -> None:
        waiting = [go_on]

        def answered(text: str | None) -> None:
            if not waiting:
                return                               # too late
            waiting.clear()
            deadline.cancel()
            if text is not None:
                go_on(json.loads(text))
            elif handle is old:
                self._one_less()                     # it has ended, and its sessions with it
            else:
                self._fail(old, "the new worker has ended")

        def expired() -> None:
            waiting.clear()
            self._fail(old, f"step {step} took longer than {self._step_s:.0f} seconds")

        deadline = self._timers.after(self._step_s, expired)
        self._questions.request(handle, "revoke", answered, step=step, sessions=sessions)

    def _fail(self, old: Handle, problem: str) -> None:
        log(None, "core.error", 1, "Sessions of an older policy could not be judged, they go on; pid='%d', error='%s'",
            (old.pid, problem))
        self._problems.append(problem)
        self._one_less()

    def _one_less(self) -> None:
        self._open -= 1
        if not self._open:
            self._end()

    def _end(self) -> None:
        log(None, "core.info", 3, "Sessions that the new policy refuses are ended; revoked='%d'", (self._revoked,))
        self._done(self._revoked, self._problems[0] if self._problems else "")
