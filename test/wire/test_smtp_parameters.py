"""Parameters pass when they belong to an extension in force and have its form."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from test.fuzz.smtp_parameter import PIECES, one_input
from Zorp.wire.smtp_extensions import EXTENSION_BITS
from Zorp.wire.smtp_parameters import ParameterError, Parameters, check_parameters

ALL = frozenset(EXTENSION_BITS)
ACCEPTED = [
    ("MAIL", b"", Parameters()),
    ("MAIL", b"  ", Parameters()),
    ("MAIL", b" size=00100", Parameters(b"SIZE=100", size=100)),
    ("MAIL", b" SIZE=5   BODY=8bitmime ", Parameters(b"SIZE=5 BODY=8bitmime", size=5)),
    ("MAIL", b" BODY=BINARYMIME", Parameters(b"BODY=BINARYMIME", binary=True)),
    ("MAIL", b" AUTH=<>", Parameters(b"AUTH=<>")),
    ("MAIL", b" AUTH=e+3Dmc2@example.com", Parameters(b"AUTH=e+3Dmc2@example.com")),
    ("MAIL", b" SMTPUTF8", Parameters(b"SMTPUTF8", utf8=True)),
    ("MAIL", b" RET=hdrs ENVID=QQ314159", Parameters(b"RET=hdrs ENVID=QQ314159")),
    (
        "MAIL",
        b" BY=120;RT MT-PRIORITY=-9 HOLDUNTIL=2024-01-02T03:04:05+01:00",
        Parameters(b"BY=120;RT MT-PRIORITY=-9 HOLDUNTIL=2024-01-02T03:04:05+01:00"),
    ),
    (
        "RCPT",
        b" NOTIFY=SUCCESS,FAILURE,DELAY ORCPT=rfc822;a+40b",
        Parameters(b"NOTIFY=SUCCESS,FAILURE,DELAY ORCPT=rfc822;a+40b"),
    ),
    ("RCPT", b" NOTIFY=NEVER", Parameters(b"NOTIFY=NEVER")),
]
REFUSED = [
    ("MAIL", b"X", 500),
    ("MAIL", b" SIZE=-1", 500),
    ("MAIL", b" SIZE=", 500),
    ("MAIL", b" SIZE", 500),
    ("MAIL", b" SIZE=99999999999999999999999", 500),
    ("MAIL", b" BODY=9BIT", 500),
    ("MAIL", b" AUTH=a=b", 500),
    ("MAIL", b" AUTH=a+zz", 500),
    ("MAIL", b" SMTPUTF8=1", 500),
    ("MAIL", b" FOO=1", 500),
    ("MAIL", b" SIZE=1 SIZE=1", 501),
    ("MAIL", b" ENVID=" + b"x" * 101, 500),
    ("MAIL", b" NOTIFY=NEVER", 500),
    ("MAIL", b" AUTH=" + b"x" * 501, 500),
    ("MAIL", b" " + b"K" * 32 + b"=1", 500),
    ("MAIL", b" SIZE=1\tBODY=7BIT", 500),
    ("MAIL", b" SIZE=1\x00", 500),
    ("RCPT", b" NOTIFY=NEVER,DELAY", 500),
    ("RCPT", b" ORCPT=rfc822", 500),
    ("RCPT", b" ORCPT=;a", 500),
    ("RCPT", b" SIZE=1", 500),
    ("RCPT", b" ORCPT=rfc822;" + b"x" * 600, 500),
]


@pytest.mark.parametrize(("verb", "text", "wanted"), ACCEPTED)
def test_parameters_pass(verb, text, wanted):
    assert check_parameters(verb, text, ALL) == wanted


@pytest.mark.parametrize(("verb", "text", "reply_code"), REFUSED)
def test_parameters_are_refused(verb, text, reply_code):
    with pytest.raises(ParameterError) as problem:
        check_parameters(verb, text, ALL)
    assert problem.value.reply_code == reply_code


@pytest.mark.parametrize(
    ("verb", "text", "reply_code"),
    [
        ("MAIL", b" SIZE=5", 500),
        ("MAIL", b" RET=FULL", 555),
        ("RCPT", b" NOTIFY=NEVER", 555),
        ("MAIL", b" REQUIRETLS", 550),
    ],
)
def test_parameters_of_an_extension_that_is_not_in_force_are_refused(verb, text, reply_code):
    with pytest.raises(ParameterError) as problem:
        check_parameters(verb, text, frozenset())
    assert problem.value.reply_code == reply_code


def test_binarymime_needs_its_own_extension():
    with pytest.raises(ParameterError):
        check_parameters("MAIL", b" BODY=BINARYMIME", frozenset({"8BITMIME"}))


@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=4)).map(b"".join))
def test_any_bytes(data):
    one_input(data)
