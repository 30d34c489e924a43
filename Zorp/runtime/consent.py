"""In a worker of an older policy: what the policy in force says about sessions that are not judged yet.

Theory of operation
    A reload with revocation judges the sessions that run (Zorp.runtime.revocation).  Two kinds
    escape that: connections whose service is still being chosen under the older policy, and
    sessions that have no server yet, or will have another.  From the moment on at which a
    worker lists its sessions, `Globals.newer_policy` is a Consent, and both ask it: a proxy when
    its thread begins, and isServerPermitted() before every connection to a server.

    The question goes over the master to the worker that serves now, which judges as always.  No
    answer in time is a refusal, as is a worker that is not there.

Threads
    Any session's thread asks and waits for itself; the loop of the worker calls answered().  At
    most _AT_ONCE questions are out, so that a policy that hangs while it judges does not collect
    a thread for every session of ours.  _questions_lock guards _questions and _asked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from Zorp.runtime.channel import ChannelClosed
from Zorp.runtime.judgement import described

_AT_ONCE = 16


class _Question:
    """One session's question; `refused` is what judge() returned, None without an answer."""

    def __init__(self) -> None:
        self.is_answered = threading.Event()
        self.refused: list[list] | None = None


class Consent:
    """See the module's text; calling it returns why the policy in force refuses a session, "" when it does not."""

    def __init__(self, send: Callable[..., None], patience_s: float) -> None:
        """send: tells the master, as Channel.send(); patience_s: how long one question may take."""
        self._send = send
        self._patience_s = patience_s
        self._room = threading.BoundedSemaphore(_AT_ONCE)
        self._questions_lock = threading.Lock()
        self._questions: dict[int, _Question] = {}
        self._asked = 0

    def __call__(self, master, server_address) -> str:
        """Ask about a master session; server_address: where it wants to connect to, None: nowhere yet."""
        deadline_s = time.monotonic() + self._patience_s
        if not self._room.acquire(timeout=self._patience_s):
            return "it cannot be judged in time"
        try:
            return self._ask(described(master, server_address), deadline_s)
        finally:
            self._room.release()

    def _ask(self, session: list, deadline_s: float) -> str:
        question = _Question()
        with self._questions_lock:
            self._asked += 1
            number = self._asked
            self._questions[number] = question
        try:
            self._send("judge", number=number, session=session)
            question.is_answered.wait(max(0.0, deadline_s - time.monotonic()))
        except ChannelClosed:
            pass                                 # without a master this process ends
        finally:
            with self._questions_lock:
                del self._questions[number]
        if question.refused is None:
            return "no worker serves" if question.is_answered.is_set() else "it cannot be judged in time"
        return next((reason for _key, reason in question.refused), "")

    def answered(self, number: int, refused: list[list] | None) -> None:
        """The master has an answer: what judge() returned, or None when nobody could be asked."""
        with self._questions_lock:
            question = self._questions.get(number)
        if question is not None:                 # else it came too late
            question.refused = refused
            question.is_answered.set()
