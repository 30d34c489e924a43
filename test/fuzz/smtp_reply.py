"""Any bytes give replies or WireError, and the same ones however they are cut; no control byte gets through."""

from __future__ import annotations

from test.wire.replies import outcome

PIECES = [
    b"250 ok\r\n", b"250-mx\r\n", b"250 SIZE 1000\r\n", b"250\r\n", b"354 go\r\n", b"220 mx ESMTP\r\n", b"550 no\r\n",
    b"421 bye\r\n", b"25x hi\r\n", b"1", b"600 x\r\n", b"250-", b"-", b" ", b"\r\n", b"\n", b"\r", b"ok \xc3\xa9",
]


def one_input(data: bytes) -> None:
    """Raise AssertionError when a cut changes the outcome or a reply is not clean."""
    replies, problem = outcome([data])
    assert (replies, problem) == outcome([data[i:i + 1] for i in range(len(data))])
    for reply in replies:
        assert 200 <= reply.code <= 599
        again, _ = outcome([reply.wire])
        assert again == [reply]
        assert not any((byte < 0x20 and byte != 0x09) or byte > 0x7E for text in reply.texts for byte in text)
