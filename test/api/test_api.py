"""The package against the API of every old release: what is there, and the list of what is not yet."""

from __future__ import annotations

import importlib

import pytest

from test.api import gate, walk
from test.support import api

CASES = [(module, kind) for module in gate.BUILT for kind in walk.KINDS]


@pytest.mark.parametrize(("module", "kind"), CASES, ids=lambda part: part)
def test_every_fact_holds_or_is_listed_as_open(module, kind):
    # given the checks of one kind, and the list of those that may fail
    known_open = api.open_checks()
    # when they run
    failing = gate.failures(module, kind)
    # then what fails is listed, and what is listed fails: the list can only shrink
    listed = {text for text in known_open if text.startswith(f"{module} {kind} ")}
    new = {text: problem for text, problem in failing.items() if text not in listed}
    assert not new, "\n".join(f"{text}: {problem}" for text, problem in new.items())
    done = sorted(listed - failing.keys())
    assert not done, "take these out of test/data/api/open.txt, they hold now:\n" + "\n".join(done)


def test_every_open_check_exists():
    # given every check there is
    existing = {str(check) for module in gate.BUILT for check in gate.checks(module)}
    # then the list names none that nobody runs
    assert sorted(api.open_checks().keys() - existing) == []


def test_no_check_is_asked_twice():
    # given every check there is
    texts = [str(check) for module in gate.BUILT for check in gate.checks(module)]
    # then each has its own text, so that the list of open ones is exact
    assert sorted({text for text in texts if texts.count(text) > 1}) == []


@pytest.mark.parametrize("module", sorted(gate.UNBUILT))
def test_importing_an_unbuilt_module_says_so(module):
    # when a policy imports a module of an old release that this one lacks
    with pytest.raises(ImportError) as refusal:
        importlib.import_module(f"Zorp.{module}")
    # then the message names it and does not look like a broken installation
    assert f"Zorp.{module} is not built yet" in str(refusal.value)


def test_the_list_of_unbuilt_modules_is_the_package_s():
    # given the package's own list
    zorp = importlib.import_module("Zorp")
    # then it is ours
    assert zorp.UNBUILT == gate.UNBUILT
