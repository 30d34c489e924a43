"""Any bytes on a control channel give requests or ControlError, and the same ones however they are cut."""

from __future__ import annotations

from Zorp.wire.stack_control import ControlError, ControlReader

PIECES = [b"0 SETVERDICT\n", b"[]Verdict\n", b"Z_REJECT\n", b"[5]Description\n", b"a\nb\nc\n", b"\n", b"[3", b"[0]\n"]


def outcome(pieces):
    """Return (requests, text of the problem or None)."""
    reader, requests = ControlReader(), []
    try:
        for piece in pieces:
            reader.feed(piece)
            while (request := reader.next_request()) is not None:
                requests.append(request)
    except ControlError as problem:
        return requests, str(problem)
    return requests, None


def one_input(data: bytes) -> None:
    """Raise when cutting the bytes changes what they mean."""
    assert outcome([data]) == outcome([data[i:i + 1] for i in range(len(data))])
