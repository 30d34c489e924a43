"""The body of a message: one end of data, no smuggling, byte for byte otherwise."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from test.fuzz.smtp_body import PIECES, one_input
from test.wire.bodies import REFUSED, Outcome, careless_end, message_of, outcome
from Zorp.wire.smtp_body import BodyError, BodyReader, DotAdder

HEAD = b"Subject: t\r\n\r\none"
EVIL = b"MAIL FROM:<evil@x>\r\nRCPT TO:<victim@y>\r\nDATA\r\ntwo\r\n.\r\n"
R = "refused"


def attack(sequence: bytes) -> bytes:
    return HEAD + sequence + EVIL


# sequence in the body: what becomes of it with require_crlf, and without
ATTACKS = {
    "B1 LF . LF": (b"\n.\n", R, b"\r\n..\r\n"),
    "B2 LF . CRLF": (b"\n.\r\n", R, b"\r\n..\r\n"),
    "B3 CR . CR": (b"\r.\r", R, R),
    "B4 CR . CRLF": (b"\r.\r\n", R, R),
    "B5 CRLF . LF": (b"\r\n.\n", R, b"\r\n..\r\n"),
    "B6 CRLF . CR": (b"\r\n.\r", R, R),
    "B7 CRCRLF . CRCRLF": (b"\r\r\n.\r\r\n", R, R),
    "B8 CRLF . CRCRLF": (b"\r\n.\r\r\n", R, R),
    "B9 CRLF NUL . CRLF": (b"\r\n\0.\r\n", R, R),
    "B9 CRLF . NUL CRLF": (b"\r\n.\0\r\n", R, R),
    "B10 LFLF . LFLF": (b"\n\n.\n\n", R, b"\r\n\r\n..\r\n\r\n"),
    "B15 NEL": (b"\xc2\x85.\xc2\x85", b"\xc2\x85.\xc2\x85", b"\xc2\x85.\xc2\x85"),
    "B15 VT": (b"\x0b.\x0b", b"\x0b.\x0b", b"\x0b.\x0b"),
    "B15 FF": (b"\x0c.\x0c", b"\x0c.\x0c", b"\x0c.\x0c"),
    "B15 U+2028": (b"\xe2\x80\xa8.\r\n", b"\xe2\x80\xa8.\r\n", b"\xe2\x80\xa8.\r\n"),
}


@pytest.mark.parametrize(("sequence", "strict", "lenient"), ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("bytewise", [False, True], ids=["whole", "bytewise"])
def test_attack(sequence, strict, lenient, bytewise):
    data = attack(sequence)
    pieces = [data[i : i + 1] for i in range(len(data))] if bytewise else [data]
    for require_crlf, wanted in ((True, strict), (False, lenient)):
        result = outcome(pieces, require_crlf=require_crlf)
        assert result == (REFUSED if wanted is R else Outcome(HEAD + wanted + EVIL, True, b""))


@pytest.mark.parametrize("require_crlf", [True, False])
@pytest.mark.parametrize("cut", range(1, 5))
def test_b14_the_end_is_found_wherever_it_is_cut(require_crlf, cut):
    end = b"\r\n.\r\n"
    result = outcome([b"one" + end[:cut], end[cut:] + b"RSET\r\n"], require_crlf=require_crlf)
    assert result == Outcome(b"one\r\n.\r\n", True, b"RSET\r\n")


@pytest.mark.parametrize("require_crlf", [True, False])
def test_b11_first_line_of_two_dots_stays(require_crlf):
    assert outcome([b"..\r\n.\r\n"], require_crlf=require_crlf).passed == b"..\r\n.\r\n"


@pytest.mark.parametrize("require_crlf", [True, False])
def test_b12_empty_body(require_crlf):
    assert outcome([b".\r\n"], require_crlf=require_crlf) == Outcome(b".\r\n", True, b"")


@pytest.mark.parametrize("length", [*range(4093, 4100), *range(8190, 8195)])
@pytest.mark.parametrize("require_crlf", [True, False])
def test_b13_long_lines_are_content(length, require_crlf):
    body = b"A" * length + b".\r\n.\r\n"
    assert outcome([body[:length], body[length:]], require_crlf=require_crlf).passed == body


def test_b16_a_body_without_end_is_not_ended():
    result = outcome([HEAD])
    assert not result.finished
    assert careless_end(result.passed) == -1


def test_nul_passes_where_it_is_permitted():
    assert outcome([b"a\0b\r\n.\r\n"], permit_nul=True).passed == b"a\0b\r\n.\r\n"


def test_an_optional_limit_on_lines():
    assert outcome([b"a" * 998 + b"\r\n.\r\n"], line_limit_bytes=998).finished
    assert outcome([b"a" * 500, b"a" * 499 + b"\r\n.\r\n"], line_limit_bytes=998) == REFUSED


def test_the_error_names_the_problem():
    with pytest.raises(BodyError, match="CR without LF"):
        BodyReader().feed(b"a\rb\r\n")
    with pytest.raises(BodyError, match="LF without CR"):
        BodyReader().feed(b"a\nb\r\n")
    with pytest.raises(BodyError, match="NUL"):
        BodyReader().feed(b"a\0b\r\n")


@pytest.mark.parametrize(
    ("passed", "message"), [(b".\r\n", b""), (b"..\r\n.\r\n", b".\r\n"), (b"a\r\n..b\r\n.\r\n", b"a\r\n.b\r\n")]
)
def test_the_message_inside_a_body(passed, message):
    assert message_of(passed) == message


@pytest.mark.parametrize(
    ("message", "wire"),
    [
        ([], b".\r\n"),
        ([b".\r\n"], b"..\r\n.\r\n"),
        ([b"a\r\n", b".b"], b"a\r\n..b\r\n.\r\n"),
        ([b"a\r", b"\n.\r\n"], b"a\r\n..\r\n.\r\n"),
        ([b"a"], b"a\r\n.\r\n"),
    ],
)
def test_a_message_is_stuffed_and_ended(message, wire):
    dots = DotAdder()
    assert b"".join(map(dots.feed, message)) + dots.finish() == wire


@pytest.mark.parametrize("message", [b"a\nb", b"a\rb", b"a\r"])
def test_a_message_with_cr_or_lf_alone_is_refused(message):
    def stuffed():
        dots = DotAdder()
        return dots.feed(message) + dots.finish()

    with pytest.raises(BodyError):
        stuffed()


def test_large_bodies_are_not_walked_byte_by_byte():
    reader = BodyReader()
    block = (b"x" * 75 + b"\r\n") * 850
    began = time.process_time()
    for _ in range(300):  # 20 MB
        reader.feed(block)
    assert time.process_time() - began < 2


@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=4)).map(b"".join))
def test_any_bytes(data):
    one_input(data)
