"""The walkers find what is wrong: a gate that cannot close guards nothing."""

from __future__ import annotations

import inspect

import pytest

from test.api import proxies, walk
from test.support import api

VARIANT = [["name"], ["addrs", "()"], ["flag", "FALSE", 0]]


def good(name, addrs=(), flag=0, more=None): ...
def renamed(name, address=(), flag=0): ...
def swapped(name, flag=0, addrs=()): ...
def required(name, addrs, flag): ...
def other_default(name, addrs=None, flag=1): ...
def keywords_only(name, **rest): ...


@pytest.mark.parametrize(("function", "question", "holds"), [
    (good, walk._accepts_keywords, True), (renamed, walk._accepts_keywords, False),
    (keywords_only, walk._accepts_keywords, True), (good, walk._has_order, True), (swapped, walk._has_order, False),
    (good, walk._accepts_positional, True), (keywords_only, walk._accepts_positional, False),
    (required, walk._accepts_positional, False),
], ids=lambda part: getattr(part, "__name__", str(part)))
def test_forms_are_compared(function, question, holds):
    # given a function and the parameters that a release had
    signature = inspect.signature(function)
    # then the question tells whether an old call would bind
    if holds:
        question(signature, VARIANT)
    else:
        with pytest.raises((walk.Differs, TypeError)):
            question(signature, VARIANT)


@pytest.mark.parametrize(("function", "holds"), [(good, True), (other_default, False), (required, False)])
def test_defaults_are_compared(function, holds):
    # given a function and the defaults of a release
    for item in VARIANT[1:]:
        # then another default, or none, is a difference
        if holds:
            walk._has_default("Core", inspect.signature(function), item)
        else:
            with pytest.raises(walk.Differs):
                walk._has_default("Core", inspect.signature(function), item)


def test_a_missing_name_is_a_problem_with_its_text():
    # given a check for something that is not there
    check = walk.Check("Zone", "name", "Nowhere", lambda: walk.member("Zone", "Nowhere"))
    # then it tells so in one line and does not raise
    assert "Nowhere" in check.problem()
    assert str(check) == "Zone name Nowhere"


@pytest.mark.parametrize("facts", [
    {"type": "int", "conftime": "r", "runtime": "r"},          # really rw at config time
    {"type": "int", "conftime": "-", "runtime": "r"},
], ids=["may be written", "may be read"])
def test_permissions_are_asked_of_a_living_proxy(facts):
    # given permissions that are not those of Plug's timeout
    where = ("Plug", "AbstractPlugProxy")
    wrong = (proxies._writing, False) if facts["conftime"] == "r" else (proxies._reading, False)
    # then asking finds the difference
    with pytest.raises(walk.Differs):
        wrong[0](where, "timeout", facts, proxies.CONFIG, wrong[1])


def test_the_open_list_wants_a_reason(tmp_path, monkeypatch):
    # given a list with a check and no reason
    path = tmp_path / "open.txt"
    path.write_text("Zone name Nowhere\n")
    monkeypatch.setattr(api, "OPEN_LIST", path)
    # then it is refused with the line
    with pytest.raises(ValueError, match=r"open\.txt:1"):
        api.open_checks()
