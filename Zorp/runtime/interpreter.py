"""What a policy may not do to the interpreter that loads it: noticed, and undone.

Theory of operation
    A Guard stands around a load.  A policy that replaces builtins, traces or limits the
    interpreter would break our own code, most of all the code that has to say what is wrong;
    restore() gives everything back, and tells what was replaced.

    A process that forks while it loads a policy would have two loaders, two channels to one
    master, two reports.  The child ends before it runs a line, and the load is refused with the
    place of the call.  Programs that a policy starts by subprocess do not come here.
"""

from __future__ import annotations

import builtins
import os
import sys
import threading
import traceback

_REPLACED = object()


class Guard:
    """The interpreter as it was before a load; one at a time, for the main thread."""

    active: Guard | None = None

    def __init__(self) -> None:
        self._builtins = dict(vars(builtins))
        self._recursion_limit = sys.getrecursionlimit()
        self._streams = sys.stdin, sys.stdout, sys.stderr
        self.forks: list[traceback.StackSummary] = []    # where the policy forked

    def __enter__(self) -> Guard:
        Guard.active = self
        return self

    def __exit__(self, *exc_info) -> None:
        Guard.active = None

    def restore(self) -> list[str]:
        """Undo what the policy did; return the names of builtins that it replaced or deleted."""
        sys.settrace(None)
        sys.setprofile(None)
        threading.settrace(None)
        threading.setprofile(None)
        present = builtins.__dict__
        replaced = [name for name, value in self._builtins.items() if present.get(name, _REPLACED) is not value]
        present.update(self._builtins)
        sys.setrecursionlimit(self._recursion_limit)
        return [name for name in replaced if not name.startswith("_")]

    def restore_streams(self) -> None:
        """Give standard input, output and error back, after a load that failed."""
        sys.stdin, sys.stdout, sys.stderr = self._streams


def _before_fork() -> None:
    if Guard.active is not None:
        Guard.active.forks.append(traceback.extract_stack())


def _in_forked_child() -> None:
    if Guard.active is not None:
        os._exit(0)


os.register_at_fork(before=_before_fork, after_in_child=_in_forked_child)
