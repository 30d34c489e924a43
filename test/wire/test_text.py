"""One character per byte, and nothing else goes back on the wire."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from Zorp.wire.text import TextError, to_policy, to_wire


@given(st.binary())
def test_every_byte_survives_the_way_to_the_policy_and_back(data):
    assert to_wire(to_policy(data), one_line=False) == data


def test_bytes_are_accepted_from_policies():
    assert to_wire(b"\xc3\xa9") == b"\xc3\xa9"


@pytest.mark.parametrize("value", ["a\r\nb", "a\nb", "a\rb", "a\0b", "\u20ac", None, 5], ids=repr)
def test_value_that_cannot_go_on_the_wire_is_refused(value):
    with pytest.raises(TextError):
        to_wire(value)


def test_line_ends_pass_where_the_grammar_has_a_place_for_them():
    assert to_wire("a\r\n", one_line=False) == b"a\r\n"
