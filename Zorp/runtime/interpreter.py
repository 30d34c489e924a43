"""What a policy may not do to the interpreter that loads it: noticed, and undone.

Theory of operation
    A Guard stands around a load.  A policy that replaces builtins, traces or limits the
    interpreter would break our own code, most of all the code that has to say what is wrong;
    restore() gives everything back, and tells what was replaced.

    A process that forks while it loads a policy would have two loaders, two channels to one
    master, two reports.  The child ends before it runs a line, and the load is refused with the
    place of the call.

    The same holds for a session: a child of a worker would accept clients beside it, under
    numbers that are given twice, outlive its master and keep the ports of an instance that has
    ended.  After refuse_forks() such a child ends, too, and the log has the place.

    What subprocess starts runs a program, has none of our descriptors, and is left alone.
"""

from __future__ import annotations

import builtins
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable

from Zorp.Log import log

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


class _Forks(threading.local):
    """What is to become of the fork that this thread makes."""

    child_ends = False


_forks = _Forks()
_is_policy_file: Callable[[str], bool] | None = None     # set in a process that must have no children of its kind


def refuse_forks(is_policy_file: Callable[[str], bool]) -> None:
    """From now on a fork of this process ends at once in the child, with a line of log in the parent."""
    global _is_policy_file
    _is_policy_file = is_policy_file


def _before_fork() -> None:
    _forks.child_ends = False
    if Guard.active is None and _is_policy_file is None:
        return
    stack = traceback.extract_stack()
    if any(step.filename == subprocess.__file__ for step in stack):
        return
    _forks.child_ends = True
    if Guard.active is not None:
        Guard.active.forks.append(stack)
        return
    place = next((f"{step.filename}:{step.lineno}" for step in reversed(stack) if _is_policy_file(step.filename)), "")
    log(None, "core.policy", 1, "Policy code forked, the child is ended, start programs with subprocess; place='%s'",
        (place,))


def _in_forked_child() -> None:
    if _forks.child_ends:
        os._exit(1)


os.register_at_fork(before=_before_fork, after_in_child=_in_forked_child)
