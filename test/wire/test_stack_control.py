"""The control channel of stacked programs: requests and answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from test.fuzz.stack_control import one_input, outcome
from Zorp.wire.stack_control import HEADERS, LINE_BYTES, VALUE_BYTES, answer

PIECES = (b"0 SETVERDICT\n", b"[]Verdict\n", b"Z_REJECT\n", b"[5]Description\n", b"a\nb\nc\n", b"\n", b"[3", b"x",
          b"[0]\n")

ACCEPTED = {
    "the request of the field": (
        b"0 SETVERDICT\n[]Verdict\nZ_REJECT\n[]Description\nEicar was found in the content.\n\n",
        [("0", "SETVERDICT", {"Verdict": "Z_REJECT", "Description": "Eicar was found in the content."})]),
    "value with a line end inside": (
        b"0 X\n[5]Name\na\nb\nc\n\n", [("0", "X", {"Name": "a\nb\nc"})]),
    "empty value of length 0": (b"0 X\n[0]Name\n\n\n", [("0", "X", {"Name": ""})]),
    "no header": (b"7 A B\n\n", [("7", "A B", {})]),
    "two requests": (b"0 A\n\n0 B\n\n", [("0", "A", {}), ("0", "B", {})]),
    "incomplete": (b"0 A\n[]Verdict\n", []),
    "last header of a name wins": (b"0 A\n[]V\n1\n[]V\n2\n\n", [("0", "A", {"V": "2"})]),
    "most headers": (b"0 A\n" + b"[]V\n1\n" * HEADERS + b"\n", [("0", "A", {"V": "1"})]),
    "longest value": (
        b"0 A\n[%d]V\n" % VALUE_BYTES + b"x" * VALUE_BYTES + b"\n\n", [("0", "A", {"V": "x" * VALUE_BYTES})]),
    "line that is cut": (
        b"0 A\n[]V\n" + b"x" * (LINE_BYTES + 9) + b"\n\n", [("0", "A", {"V": "x" * LINE_BYTES})]),
}
REFUSED = {
    "no command": (b"0\n", "Incomplete command header; header='0'"),
    "too many headers": (b"0 A\n" + b"[]V\n1\n" * (HEADERS + 1), "Too many headers; max='256'"),
    "value too long": (b"0 A\n[16385]V\n", "Header too long; len='16385'"),
    "no number": (b"0 A\n[x]V\n", "Invalid header length specification; line='[x]V'"),
    "negative": (b"0 A\n[-1]V\n", "Invalid header length specification; line='[-1]V'"),
    "no bracket": (b"0 A\nVerdict\n", "Buffer too short to contain a valid header; line='Verdict'"),
    "short": (b"0 A\n[]\n", "Buffer too short to contain a valid header; line='[]'"),
    "rest behind a value": (b"0 A\n[1]V\nyx\n\n", "Trailer line must be empty; line='x'"),
}


@pytest.mark.parametrize(("wire", "requests"), ACCEPTED.values(), ids=ACCEPTED)
def test_request_is_read(wire, requests):
    assert outcome([wire]) == (requests, None)


@pytest.mark.parametrize(("wire", "problem"), REFUSED.values(), ids=REFUSED)
def test_rubbish_ends_the_reading(wire, problem):
    assert outcome([wire])[1].replace("'b'", "'").replace("''", "'") == problem


@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=6), max_size=12).map(b"".join))
def test_any_bytes(data):
    one_input(data)


def test_answers():
    assert answer() == b"0 RESULT\n[2]Status\nOK\n\n"
    assert answer("Non-zero session-id") == (
        b"0 RESULT\n[19]Fail-Reason\nNon-zero session-id\n[7]Status\nFailure\n\n")
