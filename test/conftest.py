"""Fixtures that every directory of tests may use; what a whole run begins with, and in which order it goes.

Three things make a run long: computing, which is mostly interpreters that start (all about packet
rules, in test/netfilter), waiting (for timeouts of daemons), and one long file that is left when
everything else is done.  So files that start programs come first, those that compute evenly
between those that wait, and the tests that stay in their own process last, which are quick.
"""

from __future__ import annotations

import compileall
from fractions import Fraction
from itertools import groupby
from pathlib import Path

import pytest

from test.support.daemon import zorp
from Zorp.Config import audit, blob, dirs, options

__all__ = ["zorp"]

_ROOT = Path(__file__).resolve().parents[1]
_COMPUTE = ("netfilter",)
_WAIT = ("zorpctl", "system", "runtime", "plugins", "service", "doc")      # those of the longest tests first


@pytest.fixture(autouse=True)
def own_options():
    """What a test, or a policy that it runs in this process, sets in config is gone afterwards."""
    before = [(vars(branch), dict(vars(branch))) for branch in (audit, blob, dirs, options)]
    yield
    for values, old in before:
        values.clear()
        values.update(old)


def pytest_configure(config) -> None:
    """Compile the programs once: tests start some thousand of them, also where Python may not keep what it compiled.

    Half of what it takes to start an instance would otherwise be compiling it.
    """
    if not hasattr(config, "workerinput"):
        for package in ("Zorp", "zorpctl"):
            compileall.compile_dir(_ROOT / package, quiet=2)


def pytest_collection_modifyitems(items) -> None:
    """Put the files in the order of the module's text; tests keep their order within a file."""
    computing, waiting, quick = [], [], []
    for path, tests in groupby(items, key=lambda item: item.path):
        directory = path.relative_to(_ROOT / "test").parts[0]
        group = computing if directory in _COMPUTE else waiting if directory in _WAIT else quick
        group.append((directory, list(tests)))
    waiting.sort(key=lambda file: _WAIT.index(file[0]))
    mixed = [(Fraction(number, len(group)), tests)
             for group in (computing, waiting) for number, (_, tests) in enumerate(group)]
    mixed.sort(key=lambda entry: entry[0])
    items[:] = [item for _, tests in (*mixed, *quick) for item in tests]
