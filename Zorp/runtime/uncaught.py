"""What nobody catches in code of a policy: an exception in a thread of its own, in a __del__, in a weak reference.

Python would print it.  Here it is logged like any other traceback, escaped, `Traceback: <line>` with
core.error(2); the session id is the name of the thread.
"""

from __future__ import annotations

import sys
import threading

from Zorp.Log import log, log_traceback


def log_uncaught() -> None:
    """From now on, in this process."""
    threading.excepthook = _in_a_thread
    sys.unraisablehook = _where_nobody_can_catch


def _in_a_thread(ended) -> None:
    if issubclass(ended.exc_type, SystemExit):           # how a thread may end
        return
    name = ended.thread.name if ended.thread is not None else None
    log(name, "core.error", 2, "Thread ended by an exception;")
    log_traceback(ended.exc_value, name)


def _where_nobody_can_catch(ignored) -> None:
    place = getattr(ignored.object, "__qualname__", type(ignored.object).__name__)
    log(None, "core.error", 2, "Exception ignored; in='%s'", (place,))
    log_traceback(ignored.exc_value)
