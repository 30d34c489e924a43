"""Mail addresses on the wire (RFC 5321, 4.1.2; RFC 6531): paths, domains, host names.

    path      = *SP "<" [route] address ">"        brackets optional where the policy says so
    route     = "@" domain *("," "@" domain) ":"   read, never forwarded
    address   = local "@" domain / local           bare local part: see PathRules
    local     = dot-atom / quoted-string
    domain    = labels of letters, digits, "-", "_"; one dot at the end is dropped
              / "[" IPv4 / "IPv6:" IPv6 / tag ":" text "]"

Theory of operation
    A cursor walks over the bytes with one regular expression per element; none of them has
    nested repetition, so the time is linear.  Two grammars share the walk: STRICT, and COMPAT
    for sites that depend on odd addresses (empty atoms, "#12", any byte inside a literal), which
    still refuses control bytes and whatever has no end.

Which domain counts
    `domain` is what follows the last "@" outside quotes: "x@ok.example"@evil is at evil.
    Quotes are no part of a name, so a server may take them away early and read "x@evil"@ok.example
    as a route by way of ok.example to evil.  Whether such an address passes is up to the policy;
    split_address() leaves the "@" in the local part, where it is seen.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import re
import unicodedata
from dataclasses import dataclass
from typing import NamedTuple

from Zorp.wire.errors import WireError
from Zorp.wire.limits import PATH_LIMITS
from Zorp.wire.smtp_commands import is_utf8_text
from Zorp.wire.text import to_policy

_ATEXT = rb"[A-Za-z0-9!#$%&'*+/=?^_`{|}~\x80-\xff-]"
_ODD_ATOMS = rb"[^\x00-\x20()<>@,;:\\\"\[\]\x7f]+"          # dots included: empty atoms pass
_QUOTED = rb'"(?:[^"\\\x00-\x1f\x7f]|\\[ -~])*"'


class _Grammar(NamedTuple):
    """The elements of an address in one dialect."""

    local: re.Pattern
    domain: re.Pattern


_STRICT = _Grammar(
    local=re.compile(_ATEXT + rb"+(?:\." + _ATEXT + rb"+)*|" + _QUOTED),
    domain=re.compile(rb"[A-Za-z0-9_\x80-\xff-]+(?:\.[A-Za-z0-9_\x80-\xff-]+)*\.?"
                      rb"|\[[!-Z^-~]+\]"),
)
_COMPAT = _Grammar(
    local=re.compile(_ODD_ATOMS + rb"|" + _QUOTED),
    domain=re.compile(rb"#[0-9]*(?![A-Za-z0-9.-])|(?!#)" + _ODD_ATOMS
                      + rb'|\[(?:[^\]"\\\x00-\x1f\x7f]|\\[ -~])*\]'),
)
# nearly every path: good under all rules, its sizes included
_COMMON = re.compile(rb"<(?=[^@]{1,%d}@)(?=[^>]{1,%d}>)" % (PATH_LIMITS.local_bytes, PATH_LIMITS.path_bytes - 2)
                     + rb"([A-Za-z0-9+_=-]+(?:\.[A-Za-z0-9+_=-]+)*@"
                     rb"[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*)>")
_REMEMBERED_BYTES = 512             # of a path and its parameters; longer ones take the long way
_LITERAL_TAG = re.compile(rb"[A-Za-z0-9-]*[A-Za-z0-9]:[!-Z^-~]+")
_HELO_NAME = re.compile(rb"[A-Za-z0-9_.\x80-\xff-]+")


class PathError(WireError):
    """Not an address.

    problems      (text, path) for the log, most specific first
    unterminated  a quoted local part has no end
    """

    def __init__(self, path: bytes, *problems: str, unterminated: bool = False) -> None:
        super().__init__(problems[0], to_policy(path))
        self.problems = [(text, (to_policy(path),)) for text in problems]
        self.unterminated = unterminated


@dataclass(frozen=True, slots=True)
class PathRules:
    """What the policy and the command accept."""

    compat: bool = False
    brackets_optional: bool = False     # attribute permit_omission_of_angle_brackets
    append_domain: bytes = b""          # attribute append_domain: the domain of bare local parts
    utf8: bool = False                  # SMTPUTF8 in force
    null: bool = False                  # "<>" is an address: MAIL
    postmaster: bool = False            # "<postmaster>" needs no domain: RCPT (RFC 5321, 4.5.1)


@functools.lru_cache(maxsize=256)
def path_rules(**rules) -> PathRules:
    """Return the PathRules with these values; the same object for the same values."""
    return PathRules(**rules)


class Path(NamedTuple):
    """An address and what followed it."""

    address: bytes          # as it is forwarded, without brackets and route; b"" is the null path
    rest: bytes             # everything after the path


def common_path(text: bytes) -> Path | None:
    """Return the path at the beginning of `text` if it is an everyday one, which is a path under all rules.

    Remembered, because a policy's functions ask again for what the engine has just read.
    """
    return _common_path(text) if len(text) <= _REMEMBERED_BYTES else None


@functools.lru_cache(maxsize=256)
def _common_path(text: bytes) -> Path | None:
    common = _COMMON.match(text)
    return None if common is None else Path(common[1], text[common.end():])


def parse_path(text: bytes, rules: PathRules) -> Path:
    """Return the path at the beginning of `text`; raises PathError."""
    common = common_path(text)
    if common is not None:
        return common
    grammar = _COMPAT if rules.compat else _STRICT
    path = text.lstrip(b" ")
    bracketed = path.startswith(b"<")
    if not bracketed and not rules.brackets_optional:
        raise PathError(text, "Path does not start with '<'; path='%s'")
    position = _after_route(path, 1 if bracketed else 0, grammar)
    if bracketed and path.startswith(b">", position) and (position == 1 or rules.compat):
        if not rules.null:
            raise PathError(text, "Invalid address information; path='%s'")
        return Path(b"", path[position + 1:])
    address, end = _address(path, position, grammar, rules)
    if bracketed and not path.startswith(b">", end):
        raise PathError(text, "Path begins with '<' but does not end with '>'; path='%s'")
    if not bracketed and path.startswith(b">", end):
        raise PathError(text, "Path does not begin with '<' but ends with '>'; path='%s'")
    end += bracketed
    if end > PATH_LIMITS.path_bytes and not rules.compat:
        raise PathError(text, "Path too long; path='%s'")
    return Path(address, path[end:])


def _after_route(path: bytes, start: int, grammar: _Grammar) -> int:
    """Return where the address begins: behind the source route, if there is one."""
    position = start
    while path.startswith(b"@", position):
        domain = grammar.domain.match(path, position + 1)
        mark = path[domain.end():domain.end() + 1] if domain else b""
        if mark not in (b",", b":"):
            break
        position = domain.end() + 1
        if mark == b":":
            return position
    if position > start or path.startswith(b"@", start):
        raise PathError(path, "Invalid source route information; path='%s'")
    return start


def _address(path: bytes, start: int, grammar: _Grammar, rules: PathRules) -> tuple[bytes, int]:
    """Return the address that begins at `start`, as forwarded, and the position behind it."""
    local = grammar.local.match(path, start)
    if local is None:
        raise PathError(path, "Error parsing local part; path='%s'", "Invalid address information; path='%s'",
                        unterminated=path.startswith(b'"', start))
    end = local.end()
    if not path.startswith(b"@", end):
        address = _without_domain(path, local[0], rules)
    else:
        domain = grammar.domain.match(path, end + 1)
        if domain is None or not _domain_is_sound(domain[0], rules):
            raise PathError(path, "Invalid domain name in path; path='%s'", "Invalid address information; path='%s'")
        end = domain.end()
        address = local[0] + b"@" + (domain[0] if rules.compat else domain[0].removesuffix(b"."))
    if not rules.compat and len(local[0]) > PATH_LIMITS.local_bytes:
        raise PathError(path, "Local part too long; path='%s'")
    if not address.isascii() and not (rules.utf8 and is_utf8_text(address)):
        raise PathError(path, "Address is not ASCII; path='%s'", "Invalid address information; path='%s'")
    return address, end


def _without_domain(path: bytes, local: bytes, rules: PathRules) -> bytes:
    if rules.append_domain:
        return local + b"@" + rules.append_domain
    if rules.postmaster and local.lower() == b"postmaster":
        return local
    raise PathError(path, "Local part does not end in '@'; path='%s'", "Invalid address information; path='%s'")


def _domain_is_sound(domain: bytes, rules: PathRules) -> bool:
    if rules.compat:
        return True
    return len(domain) <= PATH_LIMITS.domain_bytes and (domain[:1] != b"[" or _is_literal(domain))


def _is_literal(domain: bytes) -> bool:
    """Tell whether the bytes in brackets are an address literal (RFC 5321, 4.1.3)."""
    inside = domain[1:-1]
    try:
        if inside[:5].upper() == b"IPV6:":
            ipaddress.IPv6Address(inside[5:].decode("ascii"))
        elif b":" in inside:
            return _LITERAL_TAG.fullmatch(inside) is not None
        else:
            ipaddress.IPv4Address(inside.decode("ascii"))
    except ValueError:
        return False
    return True


def is_helo_argument(argument: bytes, *, compat: bool = False) -> bool:
    """Tell whether a client may call itself this: a host name, also an odd one, or a literal.

    Bytes above 0x7E reach us only when SMTPUTF8 is in force and are valid UTF-8 then.
    """
    if len(argument) > PATH_LIMITS.domain_bytes:
        return False
    if compat:
        return _COMPAT.domain.fullmatch(argument) is not None
    if argument[:1] == b"[":
        return _STRICT.domain.fullmatch(argument) is not None and _is_literal(argument)
    return _HELO_NAME.fullmatch(argument) is not None


def split_address(address: str) -> tuple[str, str]:
    """Return (local part, domain) of an address, split at the last "@" outside quotes.

    Without such an "@" the domain is empty.
    """
    local, mark, domain = address.rpartition("@")
    if not mark or domain[-1:] == '"':              # the "@" stands inside a quoted local part
        return address, ""
    return local, domain


def comparable_domain(domain: str) -> str:
    """Return the domain in the one spelling that comparisons use.

    Lower case, no dot at the end, every label of Unicode letters as its A-label, so that A- and
    U-labels are equal.  `domain` has one character per byte or is real text; no mapping other
    than lower case and NFC is done, so that nothing is equal that a mail server keeps apart.
    """
    domain = domain.removesuffix(".")
    if domain.isascii():
        return domain.lower()
    with contextlib.suppress(UnicodeError):         # real text already, or bytes that match nothing
        domain = domain.encode("latin-1").decode("utf-8")
    return ".".join(_a_label(label) for label in domain.split("."))


def _a_label(label: str) -> str:
    label = unicodedata.normalize("NFC", label.lower())
    return label if label.isascii() else "xn--" + label.encode("punycode").decode("ascii")
