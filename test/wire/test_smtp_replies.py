"""Replies are read as RFC 5321 4.2 writes them, cleaned, and bounded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from test.fuzz.smtp_reply import PIECES, one_input
from test.wire.replies import LIMITS, outcome
from Zorp.wire.limits import SmtpLimits
from Zorp.wire.smtp_lines import LineReader
from Zorp.wire.smtp_replies import Reply, ReplyReader

ACCEPTED = {
    "one line": (b"250 ok\r\n", [Reply(250, (b"ok",))]),
    "two lines": (b"250-mx\r\n250 SIZE\r\n", [Reply(250, (b"mx", b"SIZE"))]),
    "code without text": (b"354\r\n", [Reply(354, (b"",))]),
    "code and space": (b"354 \r\n", [Reply(354, (b"",))]),
    "last line without space": (b"250-a\r\n250\r\n", [Reply(250, (b"a", b""))]),
    "two replies": (b"250 a\r\n550 b\r\n", [Reply(250, (b"a",)), Reply(550, (b"b",))]),
    "lone CR is cleaned (C13)": (b"250 ok\r250 fake\r\n", [Reply(250, (b"ok?250 fake",))]),
    "NUL and DEL are cleaned": (b"250 a\0b\x7f\r\n", [Reply(250, (b"a?b?",))]),
    "TAB stays": (b"250 a\tb\r\n", [Reply(250, (b"a\tb",))]),
    "bytes above 0x7E are cleaned": (b"250 \xc3\xa9\r\n", [Reply(250, (b"??",))]),
}
REFUSED = {
    "lone LF": (b"250 a\n250 b\r\n", "bad CRLF sequence"),
    "code changes (C13)": (b"250-a\r\n550 b\r\n", "reply code changed"),
    "letters in the code (C13)": (b"25x hi\r\n", "non-numeric"),
    "other mark": (b"250_a\r\n", "continuation character"),
    "two digits": (b"25\r\n", "Too small response"),
    "empty line": (b"\r\n", "Too small response"),
    "code below 200": (b"199 a\r\n", "out of range"),
    "code above 599": (b"600 a\r\n", "out of range"),
    "long line": (b"250 " + b"x" * 509 + b"\r\n", "Response line too long"),
    "endless line": (b"250 " + b"x" * 700, "Line too long"),
    "too many lines": (b"250-a\r\n" * 11, "Response too long"),
    "too many bytes": ((b"250-" + b"x" * 400 + b"\r\n") * 6, "Response too long"),
}


@pytest.mark.parametrize(("wire", "replies"), ACCEPTED.values(), ids=ACCEPTED)
def test_reply_is_read(wire, replies):
    assert outcome([wire]) == (replies, None)


@pytest.mark.parametrize(("wire", "why"), REFUSED.values(), ids=REFUSED)
def test_reply_is_refused(wire, why):
    replies, problem = outcome([wire])
    assert replies == []
    assert why in problem


def test_longest_line_is_read():
    assert outcome([b"250 " + b"x" * 508 + b"\r\n"]) == ([Reply(250, (b"x" * 508,))], None)


def test_long_line_is_cut_where_the_policy_permits_it():
    lines = LineReader()
    cut = []
    reader = ReplyReader(lines, SmtpLimits(reply_line_bytes=10), on_cut=cut.append)
    lines.feed(b"250 abcdefghijkl\r\n")
    assert reader.next_reply() == Reply(250, (b"abcdef",))
    assert cut == [16]


def test_bytes_above_0x7e_stay_when_smtputf8_is_in_force():
    lines = LineReader()
    reader = ReplyReader(lines, LIMITS)
    reader.eight_bit = True
    lines.feed(b"250 \xc3\xa9\r\n")
    assert reader.next_reply() == Reply(250, ("é".encode(),))


def test_remembered_reply_of_a_session_with_smtputf8_is_cleaned_in_one_without():
    for eight_bit, text in ((True, b"\xc3\xa9 seen before"), (False, b"?? seen before")):
        reader = ReplyReader(LineReader(), LIMITS)
        reader.eight_bit = eight_bit
        assert reader.reply_in(b"250 \xc3\xa9 seen before\r\n") == Reply(250, (text,))


def test_remembered_reply_is_too_long_for_a_stricter_policy():
    line = b"250 " + b"x" * 20 + b"\r\n"
    assert outcome([line]) == ([Reply(250, (b"x" * 20,))], None)
    replies, problem = outcome([line], SmtpLimits(reply_line_bytes=23))
    assert (replies, "Response line too long" in problem) == ([], True)


def test_bytes_behind_a_reply_are_noticed():
    lines = LineReader()
    reader = ReplyReader(lines, LIMITS)
    lines.feed(b"250 a\r\n250 ")
    assert reader.next_reply() is not None
    assert lines.pending


def test_reply_is_written_as_it_was_read():
    assert Reply(250, (b"mx", b"SIZE 5", b"")).wire == b"250-mx\r\n250-SIZE 5\r\n250\r\n"


@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=6)).map(b"".join))
def test_any_bytes(data):
    one_input(data)
