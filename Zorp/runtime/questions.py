"""Questions to workers, also to those of older policies that only finish their sessions.

A question is a line of the control socket (Zorp.runtime.answers); done() gets its answer, now or
later, or None when the worker ended before it.  For the loop of the master.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from Zorp.process.timers import Timers
from Zorp.runtime.slots import Handle, Slot, State
from Zorp.runtime.workers import Workers

_DUMP_SESSIONS = "DUMP conns"
_PATIENCE_S = 2.0                # a worker of an older policy that does not answer hides its own sessions only

Done = Callable[[str | None], None]


def generations_of(workers: Workers, slot: Slot) -> list[Handle]:
    """Return the workers of a slot that may have sessions: the one that serves first, then those of older policies."""
    return sorted((handle for handle in workers
                   if handle.slot is slot and handle.state in (State.SERVING, State.DRAINING)),
                  key=lambda handle: -handle.generation)


class Questions:
    """Asks; every question to a worker has a number of its own."""

    def __init__(self, workers: Workers, timers: Timers) -> None:
        self._workers = workers
        self._timers = timers
        self._asked = 0

    def ask(self, slot: Slot, line: str, done: Done) -> None:
        """Ask the worker that serves the slot, or all of the slot when it is about sessions."""
        if slot.serving is None:
            slot.questions.append((line, done))      # the client's patience bounds the wait
        elif line == _DUMP_SESSIONS:
            self._dump(generations_of(self._workers, slot), line, done)
        else:
            self._put(slot.serving, line, done)

    def put_waiting(self, slot: Slot) -> None:
        """The slot has a worker again: ask it what has waited."""
        while slot.questions:
            line, done = slot.questions.popleft()
            self._put(slot.serving, line, done)

    def stop_session(self, slot: Slot, session_id: str, done: Done) -> None:
        """Stop a session in whichever worker of the slot has it."""
        asked = generations_of(self._workers, slot)
        counts: list[int] = []

        def count(text: str | None) -> None:
            counts.append(int(text) if text is not None and text.isdigit() else 0)
            if len(counts) == len(asked):
                done(f"OK Session stop requested; proxies='{sum(counts)}'" if any(counts)
                     else "FAIL No such session")

        for handle in asked:
            self._put(handle, f"STOPSESSION {session_id}", count)
        if not asked:
            done("FAIL No such session")

    def request(self, handle: Handle, kind: str, done: Done, **fields) -> None:
        """Send a message of this kind that is answered like a question."""
        if handle.channel.closed:
            done(None)
            return
        self._asked += 1
        handle.unanswered[self._asked] = done
        self._workers.send(handle, kind, number=self._asked, **fields)

    @staticmethod
    def answered(handle: Handle, number: int, text: str) -> None:
        """A worker has answered."""
        done = handle.unanswered.pop(number, None)
        if done is not None:
            done(text)

    def _put(self, handle: Handle, line: str, done: Done) -> None:
        self.request(handle, "ask", done, line=line)

    def _dump(self, asked: list[Handle], line: str, done: Done) -> None:
        """Answer a DUMP with what all these workers say: session numbers go on over reloads, so no name is twice."""
        answers: dict[int, str | None] = {}
        waiting = [done]

        def collect(handle: Handle, text: str | None) -> None:
            answers[handle.serial] = text
            if len(answers) == len(asked):
                finish()

        def finish() -> None:
            if waiting:                              # else patience has ended, and an answer comes late
                patience.cancel()
                dumps = [text.split("\n")[:-1] for one in asked if (text := answers.get(one.serial)) is not None]
                waiting.pop()("\n".join([*dumps[0], *(node for dump in dumps[1:] for node in dump[1:]), "."])
                              if dumps else None)

        patience = self._timers.after(_PATIENCE_S, finish)
        for handle in asked:
            self._put(handle, line, functools.partial(collect, handle))
