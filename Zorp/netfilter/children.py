"""Programs that are run and waited for: those of iptables, and our own that are written in Python.

Theory of operation
    `python -c` imports from the current directory before anything else, and whoever has the
    administrator run a command in his directory had the rights of user 0.  So a child is started
    isolated (-I: neither the current directory nor PYTHONPATH), and is told as its first argument
    where this process finds modules.  Relative places are left out: they mean what the current
    directory is.  What the child's own main() sees in sys.argv are its arguments only.

    What a program prints may hold anything: a comment in a rule of the site is bytes of any encoding.
    What is no UTF-8 is shown as \\xNN.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable

ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}       # of everything that we start
_START = ("import sys; places, module = sys.argv[1:3]; del sys.argv[1:3]; sys.argv[0] = module; "
          "sys.path[:] = places.split(':'); "
          "import importlib; sys.exit(importlib.import_module(module).main())")


def command_of(module: str) -> list[str]:
    """Return the command whose process runs main() of a module of ours; arguments may be added."""
    places = [place for place in sys.path if os.path.isabs(place) and os.path.exists(place) and ":" not in place]
    return [sys.executable, "-I", "-c", _START, ":".join(places), module]


class ChildError(Exception):
    """A program could not be run, or took too long; `str()` says which and why."""


class ProgramMissing(ChildError):
    """There is no such program."""


def run(command: Iterable[str], text: str, deadline_s: float) -> subprocess.CompletedProcess[str]:
    """Run a program with this input to its end, well or not.  Raises ChildError."""
    command = list(command)
    try:
        return subprocess.run(command, input=text, capture_output=True, encoding="utf-8", errors="backslashreplace",
                              timeout=deadline_s, env=ENVIRONMENT, check=False)
    except FileNotFoundError:
        raise ProgramMissing(f"{command[0]} is missing") from None
    except OSError as problem:
        raise ChildError(f"{command[0]} cannot be started: {problem.strerror}") from None
    except subprocess.TimeoutExpired:
        raise ChildError(f"{command[0]} did not end within {deadline_s} seconds") from None


def obeyed(module: str, order: object, deadline_s: float) -> str:
    """Give main() of a module of ours an order as JSON; return what it printed.

    Raises ChildError, with the last line of its complaints when it has failed.
    """
    result = run(command_of(module), json.dumps(order), deadline_s)
    if result.returncode:
        raise ChildError((result.stderr.strip().splitlines() or [f"{module} ended with {result.returncode}"])[-1])
    return result.stdout
