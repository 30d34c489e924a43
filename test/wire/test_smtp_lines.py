"""Lines come out as they were sent, however TCP cut them, and never longer than the limit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from Zorp.wire.smtp_lines import LineError, LineReader


def lines_of(pieces, limit_bytes=20, **options):
    reader = LineReader(**options)
    lines = []
    for piece in pieces:
        reader.feed(piece)
        while (line := reader.next_line(limit_bytes)) is not None:
            lines.append(line)
    return lines


def test_lines_lose_their_ends():
    assert lines_of([b"a\r\n\r\nb c\r\n"]) == [b"a", b"", b"b c"]


def test_incomplete_line_waits():
    reader = LineReader()
    reader.feed(b"a\r\nb")
    assert reader.next_line(20) == b"a"
    assert reader.next_line(20) is None
    assert reader.pending == 1


def test_a_lone_lf_is_an_error_where_crlf_is_required():
    with pytest.raises(LineError, match=r"bad CRLF sequence, buffer=\[HELO a\]"):
        lines_of([b"HELO a\nMAIL\r\n"])


def test_a_lone_lf_ends_a_line_where_it_is_permitted():
    assert lines_of([b"a\nb\r\n\n"], require_crlf=False) == [b"a", b"b", b""]


def test_a_lone_cr_stays_in_the_line():
    assert lines_of([b"a\rb\r\r\n"]) == [b"a\rb\r"]


@pytest.mark.parametrize("pieces", [[b"x" * 18 + b"\r\n"], [b"x"] * 18 + [b"\r", b"\n"]], ids=["whole", "bytewise"])
def test_longest_line_passes(pieces):
    assert lines_of(pieces) == [b"x" * 18]


@pytest.mark.parametrize(
    "pieces", [[b"x" * 19 + b"\r\n"], [b"x"] * 21, [b"x" * 100]], ids=["whole", "bytewise", "endless"]
)
def test_longer_line_is_an_error(pieces):
    with pytest.raises(LineError, match="Line too long"):
        lines_of(pieces)


def test_what_waits_can_be_taken_as_it_is():
    reader = LineReader()
    reader.feed(b"DATA\r\nbody\nQU")
    assert reader.next_line(20) == b"DATA"
    assert reader.take_at_most(4) == b"body"
    assert reader.take() == b"\nQU"
    assert reader.pending == 0


@given(st.lists(st.sampled_from([b"a", b"\r\n", b"\r", b"\n", b"bc\r\n", b""])), st.booleans())
def test_pieces_never_matter(pieces, require_crlf):
    def outcome(parts):
        try:
            return lines_of(parts, require_crlf=require_crlf)
        except LineError as problem:
            return str(problem)

    assert outcome(pieces) == outcome([b"".join(pieces)])
