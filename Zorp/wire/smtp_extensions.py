"""Service extensions (RFC 5321, 2.2): their bits, and the lines of an EHLO reply.

The numbers up to 0x20 are those that policies know as SMTP_EXT_*; ours start at 0x0100.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_EHLO_LINE = re.compile(rb"([A-Za-z0-9][A-Za-z0-9-]*)(?:[ =].*)?")
_LIMIT = re.compile(rb"([A-Za-z0-9-]+)=([0-9]{1,9})")
_MECHANISM = re.compile(rb"[A-Za-z0-9_-]{1,20}")
_SIZE = re.compile(rb"[Ss][Ii][Zz][Ee](?: +([0-9]{1,20}))? *")

EXTENSION_BITS = {
    "PIPELINING": 0x0001,
    "SIZE": 0x0002,
    "ETRN": 0x0004,
    "8BITMIME": 0x0008,
    "AUTH": 0x0010,
    "STARTTLS": 0x0020,
    "ENHANCEDSTATUSCODES": 0x0100,
    "SMTPUTF8": 0x0200,
    "DSN": 0x0400,
    "CHUNKING": 0x0800,
    "BINARYMIME": 0x1000,
    "REQUIRETLS": 0x2000,
    "LIMITS": 0x4000,
    "DELIVERBY": 0x8000,
    "MT-PRIORITY": 0x8000,
    "FUTURERELEASE": 0x8000,
    "RRVS": 0x8000,
    "NO-SOLICITING": 0x8000,
}
# one keyword alone would promise what needs the other
NEEDS = {"BINARYMIME": "CHUNKING", "SMTPUTF8": "8BITMIME"}


def ehlo_keyword(line: bytes) -> str:
    """Return the keyword of a line of an EHLO reply in upper case, "" when it has none."""
    parts = _EHLO_LINE.fullmatch(line)
    return parts[1].decode("ascii").upper() if parts else ""


def bits_of(keywords: Iterable[str]) -> int:
    """Return the mask of the known keywords."""
    mask = 0
    for keyword in keywords:
        mask |= EXTENSION_BITS.get(keyword, 0)
    return mask


def lower_size(line: bytes, limit_bytes: int) -> bytes:
    """Return the SIZE line with the smaller of the server's and our own maximum (RFC 1870)."""
    parts = _SIZE.fullmatch(line)
    announced = int(parts[1]) if parts and parts[1] else 0
    return b"SIZE %d" % (min(announced, limit_bytes) if announced else limit_bytes)


def lower_limits(line: bytes, recipients: int) -> bytes:
    """Return the LIMITS line (RFC 9422) without malformed tokens, RCPTMAX at most `recipients` (0: as it is)."""
    kept = []
    for token in line.split()[1:]:
        parts = _LIMIT.fullmatch(token)
        if parts is None:
            continue
        value = int(parts[2])
        if recipients and parts[1].upper() == b"RCPTMAX":
            value = min(value, recipients)
        kept.append(b"%b=%d" % (parts[1], value))
    return b" ".join([b"LIMITS", *kept])


def keep_mechanisms(line: bytes, permitted: frozenset[str]) -> bytes:
    """Return the AUTH line with the permitted SASL mechanisms only; b"" when none is left."""
    offered = [name for name in re.split(rb"[ =]+", line)[1:] if _MECHANISM.fullmatch(name)]
    kept = [name for name in offered if name.decode("ascii").upper() in permitted]
    return b" ".join([b"AUTH", *kept]) if kept else b""
