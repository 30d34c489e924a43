"""Regular expressions of policies: dialect, bytes, and time."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from Zorp.matching import patterns
from Zorp.matching.patterns import (
    PatternTimeout,
    Repetition,
    byte_pattern,
    compile_pattern,
    repetition,
    set_of_another_dialect,
)


def as_bytes(text):
    return text.encode("utf-8").decode("latin-1")


@pytest.mark.parametrize(("pattern", "judgement"), [
    ("", Repetition.FEW),
    (r"^mail\.example\.com$", Repetition.FEW),
    ("a*", Repetition.FEW),
    ("(a+)?b", Repetition.FEW),
    ("(a|b)?", Repetition.FEW),
    ("(?:a|b){2,5}", Repetition.FEW),
    ("[(+]+", Repetition.FEW),
    (r"\(a+\)", Repetition.FEW),
    ("(?#a remark +)a+", Repetition.FEW),
    ("(?P<x>a)(?P=x)", Repetition.FEW),
    ("a*b*", Repetition.MANY),
    (r"\(a+\)*", Repetition.MANY),
    ("(a|b)*", Repetition.MANY),
    ("(a|b){3,}", Repetition.MANY),
    ("(a|a)*$", Repetition.NESTED),
    ("(a|aa)+$", Repetition.NESTED),
    ("(a|ab|b)*c", Repetition.NESTED),
    ("(?:a?){30}a{30}b", Repetition.NESTED),
    ("a*a*a*a*a*b$", Repetition.NESTED),
    ("([ab]|a)*", Repetition.NESTED),
    ("(|a)*", Repetition.NESTED),
    ("(a+)+", Repetition.NESTED),
    ("(?:x(a*)y){2,}", Repetition.NESTED),
    ("(a+){20}", Repetition.NESTED),
    (r"^([a-z0-9-]+\.)*example$", Repetition.NESTED),
    ("((a|b)*c)*", Repetition.NESTED),
    (")(", Repetition.FEW),
])
def test_the_form_of_a_pattern(pattern, judgement):
    assert repetition(pattern) is judgement


@pytest.mark.parametrize(("pattern", "found"), [
    ("x[[:alpha:]]y", "[[:alpha:]"),
    ("[a-z[:digit:]]", "[a-z[:digit:]"),
    ("[^[:space:]]", "[^[:space:]"),
    ("[[a-z]--[aeiou]]", "[[a-z]"),
    ("[a-z--aeiou]", "[a-z--aeiou]"),
    ("(ok)[a-z&&b]", "[a-z&&b]"),
    ("[a||b]", "[a||b]"),
    ("[a~~b]", "[a~~b]"),
    ("[[]", None),
    ("[^[]", None),
    (r"[\[:a]", None),
    (r"\[[a]", None),
    ("[a-c-]", None),
    ("[--9]", None),
    ("a--b||c&&d", None),
    ("[:a]", None),
])
def test_sets_that_another_dialect_takes_otherwise(pattern, found):
    assert set_of_another_dialect(pattern) == found


@pytest.mark.parametrize(("pattern", "subject"), [
    ("foo(?i)BAR", "fooBar"),                 # flags anywhere
    ("(?u)foo", "foo"),
    ("(?L)foo", "foo"),
    (r"\y\e\s", "ye "),                       # letters without a meaning
    (r"[\_\y]", "y"),
    (r"\\y", "\\y"),
])
def test_what_python_2_took_is_taken(pattern, subject):
    assert compile_pattern(pattern, ignore_case=False).search(subject)


@pytest.mark.parametrize("pattern", ["(", "a**", "[", "(?P<1>a)", "*", "(?<=a+)b"])
def test_what_is_no_pattern_is_refused(pattern):
    with pytest.raises(re.error):
        compile_pattern(pattern, ignore_case=True)


def test_case_and_classes_know_ascii_only():
    assert compile_pattern("abc", ignore_case=True).search("xABC")
    assert not compile_pattern("abc", ignore_case=False).search("ABC")
    assert not compile_pattern(as_bytes("Ü"), ignore_case=True).search(as_bytes("ü"))
    assert not compile_pattern(r"^\w+$", ignore_case=True).search(as_bytes("ü"))
    assert not compile_pattern(r"\s", ignore_case=True).search("\xa0")
    assert not compile_pattern(r"\d", ignore_case=True).search("\xb2")


def test_non_ascii_literals_match_their_utf_8_bytes():
    assert compile_pattern(byte_pattern("^bü+cher$"), ignore_case=True).search(as_bytes("büücher"))
    assert compile_pattern(byte_pattern("ä|ö"), ignore_case=True).search(as_bytes("xö"))
    assert byte_pattern("plain[a-z]+") == "plain[a-z]+"
    with pytest.raises(re.error, match="a set holds single bytes"):
        byte_pattern("[äö]")


def test_a_search_that_takes_too_long_is_given_up(monkeypatch):
    monkeypatch.setattr(patterns, "SEARCH_SECONDS", 0.2)
    pattern = compile_pattern("(x+x+)+y", ignore_case=True)
    assert pattern.search("xxy")
    with pytest.raises(PatternTimeout):
        pattern.search("x" * 4000)              # which would go on for years


def test_without_the_package_regex_patterns_still_work(monkeypatch):
    monkeypatch.setattr(patterns, "regex", None)
    assert isinstance(compile_pattern("(x+x+)+y", ignore_case=True), re.Pattern)


@given(st.text("ab()[]{}*+?|\\^$.:=!<>P#-iu,019é"))
def test_any_text_compiles_or_is_refused(pattern):
    assert repetition(pattern) in Repetition
    try:
        compiled = compile_pattern(byte_pattern(pattern), ignore_case=True)
    except re.error:
        return
    compiled.search("ab")
