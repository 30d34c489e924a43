"""A command line has one meaning or none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from test.fuzz.smtp_command import PIECES, one_input
from Zorp.wire.smtp_commands import (
    Authentication,
    Chunk,
    CommandError,
    is_etrn_argument,
    is_sasl_line,
    parse_auth,
    parse_bdat,
    parse_command,
)

ACCEPTED = {
    "verb alone": (b"QUIT", ("QUIT", b"")),
    "lower case": (b"noop x", ("NOOP", b"x")),
    "spaces after the verb": (b"MAIL   FROM:<>", ("MAIL", b"FROM:<>")),
    "spaces at the end stay": (b"HELO a  ", ("HELO", b"a  ")),
    "verb and spaces": (b"DATA  ", ("DATA", b"")),
    "digits in the verb": (b"X1 2", ("X1", b"2")),
}
REFUSED = {
    "digit in front": b"1HELO a",
    "digit and minus (was HELO once)": b"H-E-L-O a",
    "TAB in front": b"\tHELO a",
    "TAB as separator": b"HELO\ta",
    "space in front": b" HELO a",
    "lone CR (C2)": b"HELO a\rMAIL FROM:<x@y>",
    "NUL (C3)": b"MAIL FROM:<a@b\x00>",
    "NUL in NOOP (C3)": b"NOOP \x00x",
    "DEL": b"NOOP \x7f",
    "8-bit without SMTPUTF8 (C5)": b"MAIL FROM:<a\xe9@b>",
    "only spaces": b"   ",
    "PROXY v2 header": b"\x00",
}


@pytest.mark.parametrize(("line", "command"), ACCEPTED.values(), ids=ACCEPTED)
def test_command_is_read(line, command):
    assert parse_command(line) == command


@pytest.mark.parametrize("line", REFUSED.values(), ids=REFUSED)
def test_command_is_refused(line):
    with pytest.raises(CommandError):
        parse_command(line)


def test_valid_utf8_passes_when_smtputf8_is_in_force():
    assert parse_command("MAIL FROM:<é@b>".encode(), utf8=True)[1] == "FROM:<é@b>".encode()


@pytest.mark.parametrize(
    "line",
    [b"MAIL FROM:<\xc3(@b>", b"MAIL FROM:<\xc2\x85@b>", b"MAIL \xe2\x80\xa8", b"\xc3\xa9 x"],
    ids=["invalid (C5)", "NEL", "line separator", "verb"],
)
def test_other_bytes_are_refused_even_then(line):
    with pytest.raises(CommandError):
        parse_command(line, utf8=True)


@pytest.mark.parametrize(
    ("argument", "chunk"),
    [(b"0 LAST", Chunk(0, True)), (b"2147483647", Chunk(2147483647, False)), (b"12  last ", Chunk(12, True))],
)
def test_bdat_is_read(argument, chunk):
    assert parse_bdat(argument) == chunk


@pytest.mark.parametrize(
    "argument", [b"", b"-1", b"+1", b"2147483648", b"99999999999", b"1 LASTX", b"1LAST", b"0x10", b"LAST"]
)
def test_bdat_is_refused(argument):
    with pytest.raises(CommandError):
        parse_bdat(argument)


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        (b"PLAIN AGEAYg==", Authentication("PLAIN", b"AGEAYg==")),
        (b"login", Authentication("LOGIN", None)),
        (b"EXTERNAL =", Authentication("EXTERNAL", b"=")),
        (b"SCRAM-SHA-256", Authentication("SCRAM-SHA-256", None)),
    ],
)
def test_auth_is_read(argument, parts):
    assert parse_auth(argument) == parts


@pytest.mark.parametrize("argument", [b"", b"PLAIN a b", b"PLAIN a=b", b"PLAIN *", b"A" * 21])
def test_auth_is_refused_and_never_shown(argument):
    with pytest.raises(CommandError) as problem:
        parse_auth(argument)
    assert str(problem.value) == "Invalid AUTH command;"


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (b"", True),
        (b"=", True),
        (b"*", True),
        (b"dXNlcg==", True),
        (b"a b", False),
        (b"MAIL FROM:<x@y>", False),
        (b"a===", False),
        (b"**", False),
    ],
)
def test_sasl_lines(line, wanted):
    assert is_sasl_line(line) is wanted


@pytest.mark.parametrize(
    ("argument", "wanted"),
    [
        (b"example.org", True),
        (b"@example.org", True),
        (b"#queue_1", True),
        (b"#", True),
        (b"", False),
        (b"a b", False),
        (b"@", False),
    ],
)
def test_etrn_arguments(argument, wanted):
    assert is_etrn_argument(argument) is wanted


@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=6)).map(b"".join))
def test_any_bytes(data):
    one_input(data)
