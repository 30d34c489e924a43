"""Zorp.wire.proxy_protocol: vectors, properties, and the time it takes."""

from __future__ import annotations

import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from test.fuzz.proxy_protocol import PIECES, one_input, outcome_bytewise
from Zorp.wire.errors import WireError
from Zorp.wire.proxy_protocol import V1_LINE_BYTES, V2_BODY_BYTES, V2_SIGNATURE, Header, parse, write


def v2(command, family, body):
    return V2_SIGNATURE + struct.pack(">BBH", command, family, len(body)) + body


CLIENT4, SERVER4 = ("192.0.2.1", 56324), ("198.51.100.2", 443)
CLIENT6, SERVER6 = ("2001:db8::1", 56324), ("2001:db8::2", 443)
TCP4_BODY = bytes([192, 0, 2, 1, 198, 51, 100, 2]) + struct.pack(">HH", 56324, 443)
ALL_ONES = ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 65535)
LONGEST = (b"PROXY TCP6 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff "
           b"65535 65535\r\n")

ACCEPTED = {
    "v1 tcp4": (b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 443\r\n", CLIENT4, SERVER4),
    "v1 tcp6": (b"PROXY TCP6 2001:db8::1 2001:db8::2 56324 443\r\n", CLIENT6, SERVER6),
    "v1 tcp6 spelled out": (b"PROXY TCP6 2001:0DB8:0:0::1 2001:db8::2 56324 443\r\n", CLIENT6, SERVER6),
    "v1 mapped": (b"PROXY TCP6 ::ffff:192.0.2.1 2001:db8::2 56324 443\r\n", CLIENT4, SERVER6),
    "v1 longest": (LONGEST, ALL_ONES, ALL_ONES),
    "v1 unknown": (b"PROXY UNKNOWN\r\n", None, None),
    "v1 unknown with more": (b"PROXY UNKNOWN ffff::1 whatever 1 2\r\n", None, None),
    "v1 port 0": (b"PROXY TCP4 192.0.2.1 198.51.100.2 0 0\r\n", ("192.0.2.1", 0), ("198.51.100.2", 0)),
    "v2 tcp4": (v2(0x21, 0x11, TCP4_BODY), CLIENT4, SERVER4),
    "v2 tcp4 with extensions": (v2(0x21, 0x11, TCP4_BODY + b"\x04\x00\x00" + b"\x02\x00\x03abc"), CLIENT4, SERVER4),
    "v2 tcp6": (v2(0x21, 0x21, b"\x20\x01\x0d\xb8" + bytes(11) + b"\x01" + b"\x20\x01\x0d\xb8" + bytes(11) + b"\x02"
                   + struct.pack(">HH", 56324, 443)), CLIENT6, SERVER6),
    "v2 local": (v2(0x20, 0x00, b""), None, None),
    "v2 local with a body": (v2(0x20, 0xFF, b"anything"), None, None),
    "v2 unspecified": (v2(0x21, 0x00, b""), None, None),
    "v2 unix": (v2(0x21, 0x31, bytes(216)), None, None),
}

REFUSED = {
    "another protocol": b"EHLO mx.example\r\n",
    "lower case": b"proxy TCP4 192.0.2.1 198.51.100.2 1 2\r\n",
    "lone LF": b"PROXY TCP4 192.0.2.1 198.51.100.2 1 2\n",
    "CR inside": b"PROXY UNKNOWN a\rb\r\n",
    "two blanks": b"PROXY TCP4  192.0.2.1 198.51.100.2 1 2\r\n",
    "blank at the end": b"PROXY TCP4 192.0.2.1 198.51.100.2 1 2 \r\n",
    "tab": b"PROXY\tTCP4 192.0.2.1 198.51.100.2 1 2\r\n",
    "family of the address": b"PROXY TCP4 2001:db8::1 2001:db8::2 1 2\r\n",
    "family of the second address": b"PROXY TCP6 2001:db8::1 192.0.2.1 1 2\r\n",
    "octet over 255": b"PROXY TCP4 192.0.2.256 198.51.100.2 1 2\r\n",
    "octal octet": b"PROXY TCP4 192.0.2.01 198.51.100.2 1 2\r\n",
    "scope": b"PROXY TCP6 fe80::1%eth0 2001:db8::2 1 2\r\n",
    "port over 65535": b"PROXY TCP4 192.0.2.1 198.51.100.2 65536 2\r\n",
    "port with leading zero": b"PROXY TCP4 192.0.2.1 198.51.100.2 01 2\r\n",
    "port missing": b"PROXY TCP4 192.0.2.1 198.51.100.2 1\r\n",
    "udp": b"PROXY UDP4 192.0.2.1 198.51.100.2 1 2\r\n",
    "UNKNOWN and more letters": b"PROXY UNKNOWNX\r\n",
    "line too long": b"PROXY UNKNOWN " + b"x" * V1_LINE_BYTES + b"\r\n",
    "never ends": b"PROXY UNKNOWN " + b"x" * V1_LINE_BYTES,
    "almost the signature": V2_SIGNATURE[:11] + b"\r",
    "version 1 in version 2": v2(0x11, 0x11, TCP4_BODY),
    "unknown command": v2(0x22, 0x11, TCP4_BODY),
    "datagram": v2(0x21, 0x12, TCP4_BODY),
    "unknown family": v2(0x21, 0x41, TCP4_BODY),
    "addresses cut": v2(0x21, 0x11, TCP4_BODY[:-1]),
    "extension cut": v2(0x21, 0x11, TCP4_BODY + b"\x04\x00"),
    "extension reaches over the end": v2(0x21, 0x11, TCP4_BODY + b"\x04\x00\x05abc"),
    "too long": V2_SIGNATURE + struct.pack(">BBH", 0x21, 0x11, V2_BODY_BYTES + 1),
}


@pytest.mark.parametrize(("wire", "source", "destination"), ACCEPTED.values(), ids=ACCEPTED)
def test_header_is_read(wire, source, destination):
    assert parse(wire) == Header(source, destination, len(wire))
    # and what follows is the client's
    assert parse(wire + b"EHLO x\r\n") == Header(source, destination, len(wire))
    assert outcome_bytewise(wire + b"EHLO") == Header(source, destination, len(wire))


@pytest.mark.parametrize("wire", [wire for wire, *_ in ACCEPTED.values()], ids=ACCEPTED)
def test_incomplete_header_asks_for_more(wire):
    for length in range(len(wire)):
        assert parse(wire[:length]) is None


@pytest.mark.parametrize("wire", REFUSED.values(), ids=REFUSED)
def test_header_is_refused(wire):
    with pytest.raises(WireError):
        parse(wire)
    assert isinstance(outcome_bytewise(wire), str)


WRITTEN = {
    "v1 tcp4": (1, CLIENT4, SERVER4, ACCEPTED["v1 tcp4"][0]),
    "v1 tcp6": (1, CLIENT6, SERVER6, ACCEPTED["v1 tcp6"][0]),
    "v1 nothing known": (1, CLIENT4, None, b"PROXY UNKNOWN\r\n"),
    "v2 tcp4": (2, CLIENT4, SERVER4, ACCEPTED["v2 tcp4"][0]),
    "v2 tcp6": (2, CLIENT6, SERVER6, ACCEPTED["v2 tcp6"][0]),
    "v2 nothing known": (2, None, SERVER4, v2(0x21, 0x00, b"")),
}


@pytest.mark.parametrize(("version", "source", "destination", "wire"), WRITTEN.values(), ids=WRITTEN)
def test_header_is_written(version, source, destination, wire):
    assert write(version, source, destination) == wire


def test_endpoints_of_two_families_are_written_in_the_larger_one():
    assert write(1, CLIENT4, SERVER6).startswith(b"PROXY TCP6 ::ffff:")
    assert write(2, CLIENT6, SERVER4)[13] == 0x21


@pytest.mark.parametrize(("version", "source"), [
    (3, CLIENT4), (1, ("mail.example", 25)), (2, ("192.0.2.1", 65536)), (1, ("192.0.2.1\r\nX", 25)),
    (1, ("fe80::1%eth0", 25))])
def test_nonsense_is_not_written(version, source):
    with pytest.raises(ValueError, match=r"no such|interface|not appear to be"):
        write(version, source, SERVER4)


@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=20)).map(b"".join))
def test_any_bytes(data):
    one_input(data)


addresses = st.tuples(st.ip_addresses().map(lambda a: str(getattr(a, "ipv4_mapped", None) or a)),
                      st.integers(0, 65535))


@given(st.sampled_from((1, 2)), addresses, addresses)
def test_written_header_reads_back(version, source, destination):
    wire = write(version, source, destination)
    assert parse(wire) == Header(source, destination, len(wire))
    assert len(wire) <= V1_LINE_BYTES


def test_a_long_line_costs_no_more_than_a_short_one():
    started = time.process_time()
    for _ in range(200):
        with pytest.raises(WireError):
            parse(b"PROXY UNKNOWN " + b" " * 1_000_000)
    assert time.process_time() - started < 1
