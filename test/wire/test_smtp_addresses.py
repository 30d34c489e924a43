"""Addresses pass or not as the table of the SMTP proxy says, in both dialects."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from test.fuzz.smtp_address import PIECES, one_input
from Zorp.wire.smtp_addresses import (
    PathError,
    PathRules,
    comparable_domain,
    is_helo_argument,
    parse_path,
    split_address,
)

NO = None
# path, MAIL strict, RCPT strict, MAIL compat, RCPT compat
TABLE = [
    (b"<a@b>", b"a@b", b"a@b", b"a@b", b"a@b"),
    (b"   <a@b>", b"a@b", b"a@b", b"a@b", b"a@b"),
    (b"<>", b"", NO, b"", NO),
    (b"<@h1,@h2:a@b>", b"a@b", b"a@b", b"a@b", b"a@b"),
    (b"<@ok.example:a@evil>", b"a@evil", b"a@evil", b"a@evil", b"a@evil"),
    (b"<@h:>", NO, NO, b"", NO),
    (b"<@h1,a@b>", NO, NO, NO, NO),
    (b"<@h1@a@b>", NO, NO, NO, NO),
    (b"<@:a@b>", NO, NO, NO, NO),
    (b"<postmaster>", NO, b"postmaster", NO, b"postmaster"),
    (b"<PostMaster>", NO, b"PostMaster", NO, b"PostMaster"),
    (b"<joe>", NO, NO, NO, NO),
    (b"<a@>", NO, NO, NO, NO),
    (b"<@b>", NO, NO, NO, NO),
    (b"a@b", NO, NO, NO, NO),
    (b"<.@b>", NO, NO, b".@b", b".@b"),
    (b"<a..b@c>", NO, NO, b"a..b@c", b"a..b@c"),
    (b"<a@b.>", b"a@b", b"a@b", b"a@b.", b"a@b."),
    (b"<a@b..>", NO, NO, b"a@b..", b"a@b.."),
    (b'<"a b"@c>', b'"a b"@c', b'"a b"@c', b'"a b"@c', b'"a b"@c'),
    (b'<"a@x"@c>', b'"a@x"@c', b'"a@x"@c', b'"a@x"@c', b'"a@x"@c'),
    (b'<"a\\@x"@c>', b'"a\\@x"@c', b'"a\\@x"@c', b'"a\\@x"@c', b'"a\\@x"@c'),
    (b'<"@x:a"@c>', b'"@x:a"@c', b'"@x:a"@c', b'"@x:a"@c', b'"@x:a"@c'),
    (b'<a@x@c>', NO, NO, NO, NO),
    (b'<a\\@x@c>', NO, NO, NO, NO),
    (b'<"a\\"b"@c>', b'"a\\"b"@c', b'"a\\"b"@c', b'"a\\"b"@c', b'"a\\"b"@c'),
    (b'<"a\\', NO, NO, NO, NO),
    (b'<"a@b>', NO, NO, NO, NO),
    (b'<a."b"@c>', NO, NO, NO, NO),
    (b'<"a">', NO, NO, NO, NO),
    (b"<a@[1.2.3.4]>", b"a@[1.2.3.4]", b"a@[1.2.3.4]", b"a@[1.2.3.4]", b"a@[1.2.3.4]"),
    (b"<a@[1.2.3.400]>", NO, NO, b"a@[1.2.3.400]", b"a@[1.2.3.400]"),
    (b"<a@[IPv6:::1]>", b"a@[IPv6:::1]", b"a@[IPv6:::1]", b"a@[IPv6:::1]", b"a@[IPv6:::1]"),
    (b"<a@[1.2.3.4>", NO, NO, NO, NO),
    (b"<a@#12>", NO, NO, b"a@#12", b"a@#12"),
    (b"<a@#>", NO, NO, b"a@#", b"a@#"),
    (b"<a@#1z>", NO, NO, NO, NO),
    (b"<a@b", NO, NO, NO, NO),
    (b"a@b>", NO, NO, NO, NO),
    (b"<<a@b>>", NO, NO, NO, NO),
    (b"<a b@c>", NO, NO, NO, NO),
    (b"<a,b@c>", NO, NO, NO, NO),
    (b"<a\x01@c>", NO, NO, NO, NO),
    (b'<"a\x01"@c>', NO, NO, NO, NO),
    (b"<a%b@c>", b"a%b@c", b"a%b@c", b"a%b@c", b"a%b@c"),
    (b"<" + b"l" * 64 + b"@b>", b"l" * 64 + b"@b", b"l" * 64 + b"@b", b"l" * 64 + b"@b", b"l" * 64 + b"@b"),
    (b"<" + b"l" * 65 + b"@b>", NO, NO, b"l" * 65 + b"@b", b"l" * 65 + b"@b"),
    (b"<a@" + b"d" * 256 + b">", NO, NO, b"a@" + b"d" * 256, b"a@" + b"d" * 256),
    (b"<" + b"l" * 60 + b"@" + b"d" * 200 + b">", NO, NO, b"l" * 60 + b"@" + b"d" * 200, b"l" * 60 + b"@" + b"d" * 200),
    (b"<a\xe9@b>", NO, NO, NO, NO),
]
RULES = [
    PathRules(null=True),
    PathRules(postmaster=True),
    PathRules(null=True, compat=True),
    PathRules(postmaster=True, compat=True),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: repr(row[0][:20]))
@pytest.mark.parametrize("column", range(4), ids=["MAIL", "RCPT", "MAIL compat", "RCPT compat"])
def test_table(row, column):
    text, wanted = row[0], row[1 + column]
    if wanted is NO:
        with pytest.raises(PathError):
            parse_path(text, RULES[column])
    else:
        assert parse_path(text, RULES[column]) == (wanted, b"")


def test_what_follows_the_path_is_given_back():
    assert parse_path(b"<a@b> SIZE=5", PathRules()).rest == b" SIZE=5"
    assert parse_path(b"<a@b>X", PathRules()).rest == b"X"


def test_brackets_may_be_left_out_where_the_policy_says_so():
    rules = PathRules(brackets_optional=True)
    assert parse_path(b"a@b SIZE=5", rules) == (b"a@b", b" SIZE=5")
    assert parse_path(b"<a@b>", rules) == (b"a@b", b"")
    with pytest.raises(PathError, match="Path does not begin with '<' but ends with '>'"):
        parse_path(b"a@b>", rules)


def test_a_domain_is_appended_to_a_bare_local_part():
    assert parse_path(b"<joe>", PathRules(append_domain=b"ex.org")).address == b"joe@ex.org"


def test_smtputf8_addresses_pass_only_when_it_is_in_force_and_only_valid():
    path = "<é@bücher.example>".encode()
    assert parse_path(path, PathRules(utf8=True)).address == path[1:-1]
    with pytest.raises(PathError):
        parse_path(path, PathRules())
    with pytest.raises(PathError):
        parse_path(b"<\xc3(@b>", PathRules(utf8=True))


PROBLEMS = {
    "bracket missing": (b"a@b", ["Path does not start with '<'"]),
    "no end": (b"<a@b", ["Path begins with '<' but does not end with '>'"]),
    "route": (b"<@h1,a@b>", ["Invalid source route information"]),
    "local part": (b"<,@b>", ["Error parsing local part", "Invalid address information"]),
    "no domain": (b"<a>", ["Local part does not end in '@'", "Invalid address information"]),
    "domain": (b"<a@,>", ["Invalid domain name in path", "Invalid address information"]),
}


@pytest.mark.parametrize(("path", "texts"), PROBLEMS.values(), ids=PROBLEMS)
def test_the_log_learns_what_is_wrong(path, texts):
    with pytest.raises(PathError) as problem:
        parse_path(path, PathRules())
    assert [text.partition(";")[0] for text, _ in problem.value.problems] == texts


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("a@b", ("a", "b")),
        ("", ("", "")),
        ("postmaster", ("postmaster", "")),
        ('"x@ok.example"@evil', ('"x@ok.example"', "evil")),
        ('"x@ok.example"', ('"x@ok.example"', "")),
        ('"x@evil"@ok.example', ('"x@evil"', "ok.example")),
        ('"x\\@evil"@ok.example', ('"x\\@evil"', "ok.example")),
        ('"@evil:x"@ok.example', ('"@evil:x"', "ok.example")),
        ('"x\\"@evil"@ok.example', ('"x\\"@evil"', "ok.example")),
        ('"x y"@ok.example', ('"x y"', "ok.example")),
    ],
)
def test_the_domain_is_what_follows_the_last_unquoted_at(address, parts):
    assert split_address(address) == parts


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Example.ORG.", "example.org"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("bücher.example".encode().decode("latin-1"), "xn--bcher-kva.example"),
        ("BÜCHER.example", "bücher.example"),
    ],
)
def test_domains_that_are_equal(one, other):
    assert comparable_domain(one) == comparable_domain(other)


@pytest.mark.parametrize(
    ("one", "other"), [("straße.example", "strasse.example"), ("ｅｘ.org", "ex.org"), ("a.b", "ab")]
)
def test_domains_that_are_not(one, other):
    assert comparable_domain(one) != comparable_domain(other)


@pytest.mark.parametrize(
    ("argument", "wanted"),
    [
        (b"mx.example.org", True),
        (b"WIN_PC", True),
        (b"host.", True),
        (b"[1.2.3.4]", True),
        (b"[IPv6:2001:db8::1]", True),
        (b"", False),
        (b"a b", False),
        (b"a ", False),
        (b"[1.2.3]", False),
        (b"[x", False),
        (b"a" * 256, False),
        (b"a;b", False),
        (b"<a>", False),
    ],
)
def test_helo_arguments(argument, wanted):
    assert is_helo_argument(argument) is wanted


@pytest.mark.parametrize(
    "path",
    [b"<" + b"a." * 50_000, b'<"' + b"\\a" * 50_000, b"<" + b"@a," * 30_000, b"<a@" + b"b." * 50_000 + b"!"],
    ids=["atoms", "quoted", "route", "labels"],
)
def test_time_is_linear(path):
    began = time.thread_time()
    for rules in RULES:
        with pytest.raises(PathError):
            parse_path(path, rules)
    assert time.thread_time() - began < 2


@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=4)).map(b"".join))
def test_any_bytes(data):
    one_input(data)


@pytest.mark.parametrize("path", [
    b"<a@b>", b"<ann.lee+tag@mail-1.example.org>", b"<" + b"a" * 64 + b"@b>", b"<" + b"a" * 65 + b"@b>",
    b"<a@" + b"b" * 63 + b">", b"<a@" + b"b" * 64 + b">", b"<a@" + b"bb." * 83 + b"bbb>",
    b"<a@" + b"bb." * 84 + b"bbb>",
], ids=len)
def test_an_everyday_path_is_the_same_with_and_without_the_short_way(path):
    """The short way and what it remembers are for at most 512 bytes."""
    outcomes = []
    for rest in (b"", b" " + b"x" * 512):
        try:
            outcomes.append(parse_path(path + rest, PathRules()).address)
        except PathError as problem:
            outcomes.append(problem.problems[0][0])
    assert outcomes[0] == outcomes[1]
