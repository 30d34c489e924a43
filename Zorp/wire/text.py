"""Bytes on the wire, text in the policy: one character per byte (latin-1), in every protocol.

Any byte survives the way to the policy and back.  What a policy returns is not trusted: a
character above U+00FF has no byte, and a line end or NUL inside a value would start another
line on the wire.  Both refuse.
"""

from __future__ import annotations

_CR, _LF, _NUL = b"\r\n\0"


class TextError(ValueError):
    """A value that cannot go on the wire; `str()` says why, without the value."""


def to_policy(data: bytes) -> str:
    """Return the bytes as text with one character per byte; never fails."""
    return data.decode("latin-1")


def to_wire(value: str | bytes, *, one_line: bool = True) -> bytes:
    """Return the bytes of a value that policy code gave.

    one_line: refuse CR, LF and NUL (give False only where the grammar has a place for them).
    Raises TextError for any other type, a character above U+00FF, a forbidden byte.
    """
    if isinstance(value, str):
        try:
            data = value.encode("latin-1")
        except UnicodeEncodeError:
            raise TextError("character above U+00FF") from None
    elif isinstance(value, (bytes, bytearray)):
        data = bytes(value)
    else:
        raise TextError(f"{type(value).__name__} instead of text")
    if one_line and (_CR in data or _LF in data or _NUL in data):
        raise TextError("CR, LF or NUL inside")
    return data
