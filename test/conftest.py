"""Fixtures that every directory of tests may use; what a whole run begins with."""

import compileall
from pathlib import Path

from test.support.daemon import zorp

__all__ = ["zorp"]

_ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config) -> None:
    """Compile the programs once: tests start some thousand of them, also where Python may not keep what it compiled.

    Half of what it takes to start an instance would otherwise be compiling it.
    """
    if not hasattr(config, "workerinput"):
        for package in ("Zorp", "zorpctl"):
            compileall.compile_dir(_ROOT / package, quiet=2)
