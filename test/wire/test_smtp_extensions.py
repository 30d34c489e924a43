"""Lines of an EHLO reply: keyword, and the numbers in them lowered to ours."""

from __future__ import annotations

import pytest

from Zorp.wire.smtp_extensions import bits_of, ehlo_keyword, keep_mechanisms, lower_limits, lower_size


@pytest.mark.parametrize(
    ("line", "keyword"),
    [
        (b"SIZE 1000", "SIZE"),
        (b"auth=LOGIN", "AUTH"),
        (b"X-FOO a b", "X-FOO"),
        (b"8BITMIME", "8BITMIME"),
        (b"", ""),
        (b" SIZE", ""),
        (b"-X", ""),
        (b"SIZE\t1", ""),
    ],
)
def test_keyword(line, keyword):
    assert ehlo_keyword(line) == keyword


def test_bits():
    assert bits_of(["PIPELINING", "8BITMIME", "X-FOO"]) == 0x9


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (b"SIZE 1000", b"SIZE 500"),
        (b"SIZE 100", b"SIZE 100"),
        (b"SIZE", b"SIZE 500"),
        (b"SIZE 0", b"SIZE 500"),
        (b"SIZE x", b"SIZE 500"),
    ],
)
def test_size_is_lowered(line, wanted):
    assert lower_size(line, 500) == wanted


def test_limits_are_lowered_and_cleaned():
    assert lower_limits(b"LIMITS RCPTMAX=100 MAILMAX=5 junk X=y", 20) == b"LIMITS RCPTMAX=20 MAILMAX=5"


@pytest.mark.parametrize(
    ("line", "wanted"),
    [(b"AUTH PLAIN LOGIN GSSAPI", b"AUTH PLAIN LOGIN"), (b"AUTH=LOGIN x", b"AUTH LOGIN"), (b"AUTH GSSAPI", b"")],
)
def test_mechanisms_are_filtered(line, wanted):
    assert keep_mechanisms(line, frozenset({"PLAIN", "LOGIN"})) == wanted
