"""Any bytes behind a path give parameters of extensions in force, or ParameterError; the result is stable."""

from __future__ import annotations

from Zorp.wire.smtp_extensions import EXTENSION_BITS
from Zorp.wire.smtp_parameters import ParameterError, check_parameters

PIECES = [
    b" SIZE=1000",
    b" size=00100",
    b" BODY=8BITMIME",
    b" BODY=BINARYMIME",
    b" AUTH=<>",
    b" AUTH=a+40b",
    b" SMTPUTF8",
    b" RET=FULL",
    b" ENVID=x+2Bz",
    b" NOTIFY=NEVER",
    b" NOTIFY=SUCCESS,DELAY",
    b" ORCPT=rfc822;a+40b",
    b" BY=10;R",
    b" MT-PRIORITY=-3",
    b" HOLDFOR=60",
    b" RRVS=2024-01-02T03:04:05Z",
    b" SOLICIT=org.example:adult",
    b"=",
    b" ",
    b"X",
    b"SIZE=",
    b"-1",
]
_EVERYTHING = frozenset(EXTENSION_BITS)


def one_input(data: bytes) -> None:
    """Raise AssertionError when a refused form passes or the forwarded form reads differently."""
    for verb in ("MAIL", "RCPT"):
        try:
            parameters = check_parameters(verb, data, _EVERYTHING)
        except ParameterError:
            continue
        assert b"  " not in parameters.wire
        assert not any((byte <= 0x20 and byte != 0x20) or byte == 0x7F for byte in parameters.wire)
        assert check_parameters(verb, b" " + parameters.wire, _EVERYTHING) == parameters
        if parameters.wire:
            refused = False
            try:
                check_parameters(verb, data, frozenset())
            except ParameterError:
                refused = True
            assert refused
