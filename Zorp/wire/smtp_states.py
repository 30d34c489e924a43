"""The states of an SMTP session (RFC 5321, 4.1.4): which command may come when.

All that moves a state lives in this file: RULES says where a verb is allowed and where the
reply leads, the two methods of SessionState that assign follow below it.  A verb without a rule is let
through in every state that is not a dialogue of its own.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import NamedTuple

from Zorp.wire.errors import WireError


class State(enum.IntFlag):
    """Where the session is; the value is what the log shows."""

    INITIAL = 1
    EHLO = 2                # greeted, no transaction
    AUTH = 4                # inside a SASL dialogue
    MAIL_FROM = 8
    RCPT_TO = 16
    DATA = 32               # the server waits for the body
    QUIT = 64
    CHUNKS = 128            # some BDAT accepted, the last not seen
    REFUSED = 256           # DATA refused: servers differ in whether the transaction is still open


def _states(mask: State) -> frozenset[State]:
    return frozenset(state for state in State if state & mask)


_TRANSACTION = State.MAIL_FROM | State.RCPT_TO | State.CHUNKS | State.REFUSED
_IDLE = _states(State.INITIAL | State.EHLO | _TRANSACTION)
_NOT_IN_DIALOGUE = _states(~(State.AUTH | State.DATA | State.QUIT))


class OutOfSequence(WireError):
    """A command that the present state does not allow."""


class Rule(NamedTuple):
    """One row of the table."""

    allowed_in: frozenset[State]
    after: Mapping[str, State]      # prefix of the reply code, longest first: next state; none: stay

    def next_state(self, code: int) -> State | None:
        """Return the state that a reply leads to, None to stay."""
        return next((state for prefix, state in self.after.items() if str(code).startswith(prefix)), None)


RULES = {
    "HELO": Rule(_IDLE, {"2": State.EHLO}),
    "EHLO": Rule(_IDLE, {"2": State.EHLO}),
    "AUTH": Rule(_states(State.EHLO | State.AUTH), {"334": State.AUTH, "": State.EHLO}),
    "MAIL": Rule(_states(State.EHLO | State.REFUSED), {"2": State.MAIL_FROM}),
    "RCPT": Rule(_states(State.MAIL_FROM | State.RCPT_TO | State.REFUSED), {"2": State.RCPT_TO}),
    "DATA": Rule(_states(State.RCPT_TO | State.REFUSED), {"354": State.DATA, "": State.REFUSED}),
    ".": Rule(_states(State.DATA), {"": State.EHLO}),
    "BDAT": Rule(_states(State.RCPT_TO | State.CHUNKS | State.REFUSED), {"2": State.CHUNKS, "": State.EHLO}),
    "BDAT LAST": Rule(_states(State.RCPT_TO | State.CHUNKS | State.REFUSED), {"": State.EHLO}),
    "RSET": Rule(_IDLE, {"2": State.EHLO}),
    "ETRN": Rule(_states(State.EHLO), {}),
    "STARTTLS": Rule(_states(State.EHLO), {}),
    "QUIT": Rule(_IDLE, {"": State.QUIT}),
}
_NEXT = {(verb, code): state for verb, rule in RULES.items() for code in range(200, 600)
         if (state := rule.next_state(code)) is not None}
_INITIAL = State.INITIAL
_ALLOWED_IN = {verb: rule.allowed_in for verb, rule in RULES.items()}
GREETINGS = frozenset({"HELO", "EHLO"})


class SessionState:
    """The state of one session; for one thread."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state = _INITIAL

    def check(self, verb: str) -> None:
        """Raise OutOfSequence when the verb is not allowed now."""
        if self.state not in _ALLOWED_IN.get(verb, _NOT_IN_DIALOGUE):
            raise OutOfSequence("Command not permitted in this state; request='%s', state='%d'", verb, int(self.state))

    def replied(self, verb: str, code: int) -> None:
        """Move to the state that the server's reply to the verb means."""
        state = self.state
        if state is _INITIAL and verb not in GREETINGS and verb != "QUIT":
            return                                  # RSET before any greeting: still not greeted
        self.state = _NEXT.get((verb, code), state)

    def ungreeted(self) -> None:
        """Forget the greeting: the other side and we do not agree about it any more."""
        self.state = State.INITIAL
