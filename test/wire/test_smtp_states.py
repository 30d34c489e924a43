"""The table of states: every state is reached, every wrong order is refused."""

from __future__ import annotations

import pytest

from Zorp.wire.smtp_states import RULES, OutOfSequence, SessionState, State

DIALOGUES = {
    "a mail": ([("EHLO", 250), ("MAIL", 250), ("RCPT", 250), ("DATA", 354), (".", 250)], State.EHLO),
    "helo refused": ([("HELO", 550)], State.INITIAL),
    "sender refused": ([("EHLO", 250), ("MAIL", 550)], State.EHLO),
    "every recipient refused": ([("EHLO", 250), ("MAIL", 250), ("RCPT", 550)], State.MAIL_FROM),
    "data refused": ([("EHLO", 250), ("MAIL", 250), ("RCPT", 250), ("DATA", 554)], State.REFUSED),
    "new mail after data refused": (
        [("EHLO", 250), ("MAIL", 250), ("RCPT", 250), ("DATA", 554), ("MAIL", 250)],
        State.MAIL_FROM,
    ),
    "auth goes on": ([("EHLO", 250), ("AUTH", 334)], State.AUTH),
    "auth fails with a code nobody expects": ([("EHLO", 250), ("AUTH", 334), ("AUTH", 554)], State.EHLO),
    "chunks": ([("EHLO", 250), ("MAIL", 250), ("RCPT", 250), ("BDAT", 250)], State.CHUNKS),
    "last chunk": ([("EHLO", 250), ("MAIL", 250), ("RCPT", 250), ("BDAT", 250), ("BDAT LAST", 250)], State.EHLO),
    "chunk refused": ([("EHLO", 250), ("MAIL", 250), ("RCPT", 250), ("BDAT", 552)], State.EHLO),
    "rset": ([("EHLO", 250), ("MAIL", 250), ("RSET", 250)], State.EHLO),
    "rset before any greeting": ([("RSET", 250)], State.INITIAL),
    "greeted again": ([("EHLO", 250), ("MAIL", 250), ("RCPT", 250), ("EHLO", 250)], State.EHLO),
    "quit": ([("QUIT", 250)], State.QUIT),
}


def after(dialogue):
    session = SessionState()
    for verb, code in dialogue:
        session.check(verb)
        session.replied(verb, code)
    return session.state


@pytest.mark.parametrize(("dialogue", "state"), DIALOGUES.values(), ids=DIALOGUES)
def test_dialogue_ends_in(dialogue, state):
    assert after(dialogue) is state


@pytest.mark.parametrize(
    ("dialogue", "verb"),
    [
        ([], "MAIL"),
        ([("EHLO", 250)], "RCPT"),
        ([("EHLO", 250)], "DATA"),
        ([("EHLO", 250), ("MAIL", 250)], "DATA"),
        ([("EHLO", 250), ("MAIL", 250)], "MAIL"),
        ([("EHLO", 250), ("MAIL", 250)], "AUTH"),
        ([], "ETRN"),
        ([], "BDAT"),
        ([("EHLO", 250), ("MAIL", 250), ("RCPT", 250), ("BDAT", 250)], "DATA"),
        ([("EHLO", 250), ("AUTH", 334)], "NOOP"),
        ([("EHLO", 250), ("AUTH", 334)], "QUIT"),
        ([("EHLO", 250), ("MAIL", 250), ("RCPT", 250), ("DATA", 354)], "RSET"),
    ],
)
def test_wrong_order_is_refused(dialogue, verb):
    session = SessionState()
    for earlier, code in dialogue:
        session.replied(earlier, code)
    with pytest.raises(OutOfSequence, match=f"request='{verb}', state='{int(session.state)}'"):
        session.check(verb)


def test_every_state_is_reached_and_left():
    reached, frontier = set(), [State.INITIAL]
    while frontier:
        state = frontier.pop()
        if state in reached:
            continue
        reached.add(state)
        for verb, rule in RULES.items():
            for code in (221, 250, 334, 354, 550):
                session = SessionState()
                session.state = state
                if state in rule.allowed_in:
                    session.replied(verb, code)
                    frontier.append(session.state)
    assert reached == set(State)


def test_numbers_are_those_of_the_log():
    assert [int(state) for state in State][:7] == [1, 2, 4, 8, 16, 32, 64]
