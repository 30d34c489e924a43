"""One line of log: filter, format once, hand to the sink."""

from __future__ import annotations

import sys
import threading
import time
import traceback

verbosity = 3


def enabled(tag, level):
    """True when a message of this tag and level would be written."""
    return level <= verbosity


def _write(line):
    sys.stderr.write(line)


def log(sessionid, logclass, verbosity, msg=None, args=None):
    """Write a message; log(tag, level, text) without session id is accepted too."""
    if msg is None:
        sessionid, logclass, verbosity, msg = None, sessionid, logclass, verbosity
    if not enabled(logclass, verbosity):
        return
    if args is not None:
        msg = msg % args
    session = sessionid or threading.current_thread().name
    _write(f"{time.strftime('%b %d %H:%M:%S')} {logclass}({verbosity}): ({session}): {msg}\n")


def log_exception(session_id=None):
    """Write the traceback of the exception being handled, a line each."""
    for line in traceback.format_exc().splitlines():
        log(session_id, "core.error", 2, "Traceback: %s", (line,))
