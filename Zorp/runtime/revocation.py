"""Reload with revocation: sessions of older policies that the new one would refuse are ended.

Theory of operation
    After the new workers serve, the master asks each worker of an older policy for its live
    sessions, the new worker of the same virtual process what it thinks of them, and tells the old
    one to end those (all three: Zorp.runtime.judgement).  A session goes on when the new policy
    would give the same connection the same service and permit it.  What cannot be judged is
    ended.

    The order is answered in time: when a worker takes too long for a step, the log says that the
    sessions of that worker go on, and so does the answer.  They are judged nevertheless when the
    step is answered late, by the policy in force then.

A session whose service is still being chosen then, or that has no server yet, is judged when
that is known (Zorp.runtime.consent), and is not among those that the answer counts.

An old worker's connections that still wait for a thread are refused when it is asked, because
they would begin under the old policy.  For the loop of the master.
"""

from __future__ import annotations

import functools
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
        self._done = done
        self._revoked = 0
        self._problems: list[str] = []
        ask = functools.partial(_Inquiry, questions, timers, step_s, self._one_less)
        inquiries = [ask(slot, old) for slot in slots for old in generations_of(workers, slot)
                     if old is not slot.serving]
        self._open = len(inquiries)
        for inquiry in inquiries:
            inquiry.begin()
        if not inquiries:
            self._end()

    def _one_less(self, revoked: int, problem: str) -> None:
        self._revoked += revoked
        if problem:
            self._problems.append(problem)
        self._open -= 1
        if not self._open:
            self._end()

    def _end(self) -> None:
        log(None, "core.info", 3, "Sessions that the new policy refuses are ended; revoked='%d'", (self._revoked,))
        self._done(self._revoked, self._problems[0] if self._problems else "")


class _Inquiry:
    """About the sessions of one worker of an older policy; tell(revoked, problem) is called once, in time."""

    def __init__(self, questions: Questions, timers: Timers, step_s: float, tell: Callable[[int, str], None],
                 slot: Slot, old: Handle) -> None:
        self._questions, self._timers, self._step_s = questions, timers, step_s
        self._tell = tell
        self._told = False
        self._slot, self._old = slot, old
        self._judge: Handle | None = None
        self._sessions: list = []

    def begin(self) -> None:
        self._step(self._old, "describe", [], self._described)

    def _described(self, sessions: list) -> None:
        self._sessions = sessions
        self._judge = self._slot.serving
        if not sessions:
            self._end(0)
        elif self._judge is None:
            self._fail("no worker serves")
        else:
            self._step(self._judge, "judge", sessions, self._judged)

    def _judged(self, refused: list) -> None:
        if self._told and self._judge is not self._slot.serving:
            self._described(self._sessions)          # so late that another policy is in force
        elif refused:
            self._step(self._old, "end", refused, self._end)
        else:
            self._end(0)

    def _step(self, handle: Handle, step: str, sessions: list, go_on: Callable) -> None:
        def answered(text: str | None) -> None:
            deadline.cancel()
            if text is not None:
                go_on(json.loads(text))
            elif handle is not self._old:
                self._fail("the new worker has ended")
            elif not self._told:
                self._conclude(0)                    # it has ended, and its sessions with it

        def expired() -> None:
            self._fail(f"step {step} took longer than {self._step_s:.0f} seconds")

        deadline = self._timers.after(self._step_s, expired)
        self._questions.request(handle, "revoke", answered, step=step, sessions=sessions)

    def _fail(self, problem: str) -> None:
        log(None, "core.error", 1, "Sessions of an older policy could not be judged, they go on; pid='%d', error='%s'",
            (self._old.pid, problem))
        if not self._told:
            self._conclude(0, problem)

    def _end(self, revoked: int) -> None:
        if self._told:
            log(None, "core.info", 3, "Sessions of an older policy were judged late; pid='%d', revoked='%d'",
                (self._old.pid, revoked))
        else:
            self._conclude(revoked)

    def _conclude(self, revoked: int, problem: str = "") -> None:
        self._told = True
        self._tell(revoked, problem)
