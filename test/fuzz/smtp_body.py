"""Any body ends where CR LF "." CR LF stands and nowhere else, for us and for every careless server behind us."""

from __future__ import annotations

from test.wire.bodies import careless_end, message_of, outcome, reference_outcome
from Zorp.wire.smtp_body import BodyError, DotAdder

PIECES = [
    b"one\r\n",
    b"\r\n.\r\n",
    b".\r\n",
    b"..\r\n",
    b"\n.\n",
    b"\n.\r\n",
    b"\r.\r",
    b"\r.\r\n",
    b"\r\n.\n",
    b"\r\n.\r",
    b"\r\n",
    b"\n",
    b"\r",
    b".",
    b"\r\n..x\r\n",
    b"\0",
    b"\xc2\x85",
    b"MAIL FROM:<evil@x>\r\n",
    b"A" * 100,
]


def one_input(data: bytes) -> None:
    """Raise AssertionError when a cut matters, the reference disagrees, or an end can be smuggled."""
    bytewise = [data[i : i + 1] for i in range(len(data))]
    thirds = [data[: len(data) // 3], data[len(data) // 3 : 2 * len(data) // 3], data[2 * len(data) // 3 :]]
    for require_crlf in (True, False):
        result = outcome([data], require_crlf=require_crlf)
        assert result == outcome(bytewise, require_crlf=require_crlf)
        assert result == outcome(thirds, require_crlf=require_crlf)
        assert result == reference_outcome(data, require_crlf=require_crlf)
        if result.passed is not None:
            assert careless_end(result.passed) in (-1, len(result.passed))
            assert (careless_end(result.passed) >= 0) == result.finished
            if result.finished:
                _check_round_trip(result.passed)
    _check_generated(data)


def _check_round_trip(passed: bytes) -> None:
    message = message_of(passed)
    dots = DotAdder()
    again = dots.feed(message) + dots.finish()
    assert message_of(again) == message
    assert again.endswith(b"\r\n.\r\n") or again == b".\r\n"


def _check_generated(data: bytes) -> None:
    dots = DotAdder()
    try:
        wire = dots.feed(data[:7]) + dots.feed(data[7:]) + dots.finish()
    except BodyError:
        return
    assert careless_end(wire) == len(wire)
    assert message_of(wire) in (data, data + b"\r\n")
