"""What a stacked child says about the content that goes through it.

Theory of operation
    One ContentVerdict per stacked child, kept by the parent.  The child gives a verdict (give) or
    fails (fail); the parent reads `value` before it passes the first byte of output on, tells so
    (output_passed), and reads it once more at the end.  Without a word from the child the content
    is accepted; a child that failed without a word is an error.  The last verdict counts, but one
    given after output was passed on can only turn an acceptance into a refusal.

Threads
    The child's thread gives, the parent's reads: _verdict_lock guards all attributes.
"""

from __future__ import annotations

import threading

from Zorp.Constants import CORE_ERROR, CORE_INFO, ZV_ACCEPT, ZV_ERROR
from Zorp.Log import log

_TEXTS = ("Unspecified", "Accept data", "Deny data", "Reject data", "Abort connection", "Drop data", "Call policy",
          "Error while processing")
UNKNOWN_LENGTH = -1


class ContentVerdict:
    """The verdict on one piece of content; see the module's text."""

    def __init__(self, session_id: str) -> None:
        self._session_id = session_id        # the parent's, for the log
        self._verdict_lock = threading.Lock()
        self._value = ZV_ACCEPT
        self._description = ""
        self._is_explicit = False
        self._output_passed = False
        self.content_length = UNKNOWN_LENGTH

    def give(self, verdict: int, description: str) -> None:
        """Take the child's verdict, a ZV_* number, with its reason."""
        with self._verdict_lock:
            late = self._output_passed
            if not late or (self._value == ZV_ACCEPT and verdict != ZV_ACCEPT):
                self._value, self._description = verdict, description
            self._is_explicit = True
        text = _TEXTS[verdict] if 0 <= verdict < len(_TEXTS) else "Unknown"
        log(self._session_id, CORE_INFO, 4, "Received verdict from stacked proxy; verdict='%s', description='%s'",
            (text, description))
        if late:
            log(self._session_id, CORE_ERROR, 3,
                "Verdict of stacked proxy came after content was passed on; verdict='%s'", (text,))

    def fail(self, reason: str) -> None:
        """The child broke: an error, unless it has given a verdict."""
        with self._verdict_lock:
            if self._is_explicit or self._value != ZV_ACCEPT:
                return
            self._value, self._description = ZV_ERROR, reason
        log(self._session_id, CORE_ERROR, 3, "Stacked proxy failed; reason='%s'", (reason,))

    def output_passed(self) -> None:
        """The first byte of output is on its way to the receiver."""
        with self._verdict_lock:
            self._output_passed = True

    @property
    def value(self) -> int:
        """The verdict so far, a ZV_* number; ZV_ACCEPT when the child has not said anything."""
        return self._value

    @property
    def description(self) -> str:
        """The reason given with the verdict."""
        return self._description

    @property
    def is_explicit(self) -> bool:
        """True when the child gave a verdict itself."""
        return self._is_explicit
