"""Programs of ours that are written in Python, started as children: from our own code only.

Theory of operation
    `python -c` imports from the current directory before anything else, and whoever has the
    administrator run a command in his directory had the rights of user 0.  So a child is started
    isolated (-I: neither the current directory nor PYTHONPATH), and is told as its first argument
    where this process finds modules.  Relative places are left out: they mean what the current
    directory is.  What the child's own main() sees in sys.argv are its arguments only.
"""

from __future__ import annotations

import os
import sys

ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}       # of everything that we start
_START = ("import sys; places, module = sys.argv[1:3]; del sys.argv[1:3]; sys.argv[0] = module; "
          "sys.path[:] = places.split(':'); "
          "import importlib; sys.exit(importlib.import_module(module).main())")


def command_of(module: str) -> list[str]:
    """Return the command whose process runs main() of a module of ours; arguments may be added."""
    places = [place for place in sys.path if os.path.isabs(place) and os.path.exists(place) and ":" not in place]
    return [sys.executable, "-I", "-c", _START, ":".join(places), module]
