"""Any bytes give a PROXY header or WireError, the same however they are cut, and what is written reads back."""

from __future__ import annotations

import ipaddress

from Zorp.wire.errors import WireError
from Zorp.wire.proxy_protocol import V1_LINE_BYTES, V2_BODY_BYTES, V2_SIGNATURE, parse, write

PIECES = [
    b"PROXY ", b"PROXY TCP4 ", b"PROXY TCP6 ", b"PROXY UNKNOWN", b"1.2.3.4 ", b"255.255.255.255 ", b"::1 ",
    b"::ffff:1.2.3.4 ", b"2001:db8::7 ", b"80 ", b"65535", b"65536", b"00", b"\r\n", b"\n", b"\r", V2_SIGNATURE,
    V2_SIGNATURE[:7], b"\x21\x11\x00\x0c", b"\x20\x00\x00\x00", b"\x21\x21\x00\x24",
    b"\x21\x31\x00\xd8", b"\x21\x00\x00\x03", b"\x22", bytes(12), b"\x03\x00\x04abcd", b"EHLO x\r\n",
]


def outcome(data: bytes):
    """Return what parse() says, or the refusal's text."""
    try:
        return parse(data)
    except WireError as problem:
        return str(problem)


def outcome_bytewise(data: bytes):
    """Return the first answer that parse() gives while the bytes arrive one by one."""
    for length in range(len(data) + 1):
        answer = outcome(data[:length])
        if answer is not None:
            return answer
    return None


def one_input(data: bytes) -> None:
    """Raise AssertionError when a cut changes the outcome or a header is not what it says."""
    whole, bytewise = outcome(data), outcome_bytewise(data)
    if isinstance(whole, str):
        assert isinstance(bytewise, str)
        return
    assert whole == bytewise
    if whole is None:
        assert len(data) < max(V1_LINE_BYTES, len(V2_SIGNATURE) + 4 + V2_BODY_BYTES)
        return
    assert 0 < whole.consumed <= len(data)
    assert (whole.source is None) == (whole.destination is None)
    for endpoint in (whole.source, whole.destination):
        if endpoint is not None:
            assert str(ipaddress.ip_address(endpoint[0])) == endpoint[0]
            assert 0 <= endpoint[1] <= 0xFFFF
    for version in (1, 2):
        again = parse(write(version, whole.source, whole.destination) + b"more")
        assert again[:2] == whole[:2]
