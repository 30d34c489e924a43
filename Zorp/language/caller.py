"""Which line of the policy called us, and in which language it is written.

Theory of operation
    The loader puts POLICY_LANGUAGE into the name space of every policy module: PYTHON2 for
    files that keep the meaning of Python 2, PYTHON3 for the others.  policy_caller() walks up
    the stack to the first frame that is not code of this package.  It is for warnings and for
    old values that only old files may use; the way of a connection never comes here.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

POLICY_LANGUAGE = "__policy_language__"
PYTHON2 = "python2"
PYTHON3 = "python3"


class PolicyCaller(NamedTuple):
    """A place in a policy."""

    filename: str
    line: int
    is_legacy: bool          # the file keeps the meaning of Python 2

    def __str__(self):
        return f"{self.filename}:{self.line}"


def policy_caller() -> PolicyCaller:
    """Return the innermost place outside this package that led to the call."""
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith("Zorp."):
        frame = frame.f_back
    language = frame.f_globals.get(POLICY_LANGUAGE, PYTHON3)
    return PolicyCaller(frame.f_code.co_filename, frame.f_lineno, language == PYTHON2)
