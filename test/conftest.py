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

from test.support.daemon import zorp

__all__ = ["zorp"]

_ROOT = Path(__file__).resolve().parents[1]
_COMPUTE = ("netfilter",)
_START_PROGRAMS = ("zorpctl", "system", "runtime", "plugins", "service", "doc")


def pytest_configure(config) -> None:
    """Compile the programs once: tests start some thousand of them, also where Python may not keep what it compiled.

    Half of what it takes to start an instance would otherwise be compiling it.
    """
    if not hasattr(config, "workerinput"):
        for package in ("Zorp", "zorpctl"):
            compileall.compile_dir(_ROOT / package, quiet=2)


def pytest_collection_modifyitems(items) -> None:
    """Put the files in the order of the module's text; tests keep their order within a file."""
    files = [list(tests) for _, tests in groupby(items, key=lambda item: item.path)]
    groups: list[list] = [[], [], []]
    for tests in files:
        directory = tests[0].path.relative_to(_ROOT / "test").parts[0]
        groups[0 if directory in _COMPUTE else 1 if directory in _START_PROGRAMS else 2].append(tests)
    computing, starting, quick = groups
    mixed = sorted((Fraction(number, len(group)), which, number)
                   for which, group in enumerate((computing, starting)) for number in range(len(group)))
    ordered = [(computing, starting)[which][number] for _, which, number in mixed] + quick
    items[:] = [item for tests in ordered for item in tests]
