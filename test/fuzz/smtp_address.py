"""Any bytes give an address that is safe to forward, or PathError; parsing what came out changes nothing."""

from __future__ import annotations

from dataclasses import replace

from Zorp.wire.smtp_addresses import PathError, PathRules, comparable_domain, parse_path, split_address
from Zorp.wire.text import to_policy

PIECES = [
    b"<",
    b">",
    b"@",
    b"a@b",
    b"<a@b>",
    b"<@h1,@h2:a@b>",
    b'"a b"',
    b'"',
    b"\\",
    b".",
    b"..",
    b"[1.2.3.4]",
    b"[IPv6:::1]",
    b"[tag:x]",
    b"#12",
    b"postmaster",
    b"\xc3\xa9",
    b"xn--bcher-kva",
    b" ",
    b",",
    b":",
    b"%",
    b"!",
    b"mx.example.org",
    b"-",
    b"_",
]
_RULES = [
    PathRules(compat=compat, brackets_optional=compat, null=null, postmaster=not null, utf8=utf8)
    for compat in (False, True)
    for null in (False, True)
    for utf8 in (False, True)
]


def one_input(data: bytes) -> None:
    """Raise AssertionError when an unsafe address passes."""
    for rules in _RULES:
        try:
            address, rest = parse_path(data, rules)
        except PathError as problem:
            _ = [text % fields for text, fields in problem.problems]
            continue
        assert data.endswith(rest)
        assert not any(byte < 0x20 or byte == 0x7F for byte in address)
        assert rules.utf8 or address.isascii()
        again = parse_path(b"<" + address + b">", replace(rules, null=True, postmaster=True))
        assert again == (address, b"")
        _, domain = split_address(to_policy(address))
        if not rules.compat:
            assert comparable_domain(comparable_domain(domain)) == comparable_domain(domain)
            assert b"@" in address or address.lower() in (b"", b"postmaster")
            assert b".." not in domain.encode("latin-1")
