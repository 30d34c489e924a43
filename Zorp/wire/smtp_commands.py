"""Commands of an SMTP client (RFC 5321, 4.1.1): from a line to verb and parameter.

    command = verb [1*SP parameter]
    verb    = ALPHA *(ALPHA / DIGIT)
    parameter is printable ASCII; with `utf8` (SMTPUTF8 in force, RFC 6531) valid UTF-8 too

Spaces after the verb are skipped; spaces at the end stay part of the parameter, for the
grammar of each command to judge.  Everything else - NUL, CR, TAB, any control byte, a byte
above 0x7E without SMTPUTF8 - raises CommandError: such a byte means one thing here and another
at the next hop.

SASL dialogues (RFC 4954) and BDAT (RFC 3030) have their lines here as well.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from Zorp.wire.errors import WireError
from Zorp.wire.limits import CHUNK_BYTES
from Zorp.wire.text import to_policy

_PRINTABLE_8BIT = re.compile(rb"[ -~\x80-\xff]*")
_COMMON_VERBS = {verb.encode("ascii"): verb for verb in ("HELO", "EHLO", "MAIL", "RCPT", "DATA", "RSET", "QUIT")}
_AUTH = re.compile(rb"([A-Za-z0-9_-]{1,20})(?: +([A-Za-z0-9+/]*={0,2}))? *")
_SASL_LINE = re.compile(rb"[A-Za-z0-9+/]*={0,2}|\*")
_CREDENTIALS = re.compile(rb"(?<![A-Z0-9])AUTH(?!=)", re.IGNORECASE)      # MAIL has a parameter AUTH=
_BDAT = re.compile(rb"([0-9]{1,10})(?: +([Ll][Aa][Ss][Tt]))? *")
_ETRN = re.compile(rb"#[A-Za-z0-9._-]*|@?[A-Za-z0-9][A-Za-z0-9._-]*")
_C1_AND_SEPARATORS = re.compile("[\x80-\x9f\u2028\u2029\ufeff]")


class CommandError(WireError):
    """A line that is no command, or an argument that its verb does not have."""


Command = tuple[str, bytes]      # one request of the client: verb in upper case, parameter


def command_line(verb: str, parameter: bytes) -> bytes:
    """Return the bytes that go on the wire."""
    if parameter:
        return verb.encode("ascii") + b" " + parameter + b"\r\n"
    return verb.encode("ascii") + b"\r\n"


def is_utf8_text(data: bytes) -> bool:
    """Tell whether the bytes are valid UTF-8 without control characters of the upper half."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return _C1_AND_SEPARATORS.search(text) is None


def parse_command(line: bytes, utf8: bool = False) -> Command:
    """Return the verb and parameter of a line; raises CommandError."""
    verb, _, parameter = line.partition(b" ")
    try:
        printable = line.decode("ascii").isprintable()
    except UnicodeDecodeError:
        printable = utf8 and _is_printable_utf8(line)
    if not printable:
        raise CommandError("Invalid byte in request; line='%s'", to_policy(line))
    name = _COMMON_VERBS.get(verb)
    if name is None:
        if not verb.isalnum() or verb[:1].isdigit():
            raise CommandError("Invalid command verb in request; line='%s'", to_policy(line))
        name = verb.decode("ascii").upper()
    return name, parameter.lstrip(b" ")


def _is_printable_utf8(line: bytes) -> bool:
    return is_utf8_text(line) and _PRINTABLE_8BIT.fullmatch(line) is not None


class Authentication(NamedTuple):
    """The argument of AUTH: mechanism and, when given, the initial response."""

    mechanism: str          # upper case
    initial_response: bytes | None


def parse_auth(parameter: bytes) -> Authentication:
    """Return the parts of `AUTH mechanism [initial-response]`; raises CommandError without its bytes."""
    parts = _AUTH.fullmatch(parameter)
    if parts is None:
        raise CommandError("Invalid AUTH command;")       # the argument is a secret: never shown
    return Authentication(parts[1].decode("ascii").upper(), parts[2])


def is_sasl_line(line: bytes) -> bool:
    """Tell whether a client's line inside a SASL dialogue is base64, "=" or "*"."""
    return _SASL_LINE.fullmatch(line) is not None


def may_hold_credentials(line: bytes) -> bool:
    """Tell whether a line that cannot be understood may have been meant as AUTH, whatever else went wrong with it."""
    return _CREDENTIALS.search(line) is not None


class Chunk(NamedTuple):
    """The argument of BDAT."""

    size: int               # octets that follow the command line
    last: bool


def parse_bdat(parameter: bytes) -> Chunk:
    """Return the parts of `BDAT size [LAST]`; raises CommandError: nobody knows what follows then."""
    parts = _BDAT.fullmatch(parameter)
    if parts is None or int(parts[1]) > CHUNK_BYTES:
        raise CommandError("Invalid BDAT command; param='%s'", to_policy(parameter))
    return Chunk(int(parts[1]), parts[2] is not None)


def is_etrn_argument(parameter: bytes) -> bool:
    """Tell whether the argument of ETRN is a domain, @domain or #queue (RFC 1985)."""
    return _ETRN.fullmatch(parameter) is not None
