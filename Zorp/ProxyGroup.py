"""Starting the thread of a proxy, and holding its session for as long as it runs.

Theory of operation
    ProxyGroup.start(proxy) hands one job to Globals.threads, named by the session id: the life
    of the proxy, and after it the end of its session.  The session is held from before the job
    exists until after the proxy's run() returned, whatever happened in it; the last release of
    a master session writes the summary and gives the service its instance back.  No other
    place holds or releases a session for a proxy.

    Globals.threads is the runtime's pool.  Where there is none (a test, a tool), this module
    installs SimpleThreads, which starts a daemon thread per job.

Deviations
    The groups of the original multiplexed proxies on threads and filled up after max_sessions
    starts.  Here each proxy has a thread, and a group refuses only when no thread can be had.
"""

from __future__ import annotations

import threading

from Zorp import Globals, Log
from Zorp.acceptance.verdict import DENIED_BY_UNKNOWN_FAIL, conclude
from Zorp.Constants import CORE_ERROR
from Zorp.Log import log, log_exception


class SimpleThreads:
    """One daemon thread for every job; for processes without the runtime's pool."""

    def start(self, name: str, job) -> bool:
        """Run `job` in a thread called `name`; False when the host refuses another thread."""
        try:
            threading.Thread(target=job, name=name, daemon=True).start()
        except RuntimeError as problem:
            log(name, CORE_ERROR, 2, "Error starting new thread; error='%s'", (problem,))
            return False
        return True


if Globals.threads is None:
    Globals.threads = SimpleThreads()


class ProxyGroup:
    """A set of proxies that are started together; `max_sessions` is kept for policies that read it."""

    def __init__(self, max_sessions=1):
        self.max_sessions = max_sessions or 1

    def start(self, proxy):
        """Start the proxy's thread; return 1, or None when there is no thread for it."""
        session = proxy.session
        session.hold()
        try:
            started = Globals.threads.start(session.session_id, lambda: _live(proxy, session))
        except BaseException:
            session.release()
            raise
        if started:
            return 1
        log(session.session_id, CORE_ERROR, 2, "Error creating proxy thread;")
        log(session.session_id, CORE_ERROR, 1, "Error starting proxy; module='%s'", (proxy.name,))
        session.release()
        return None


ProxyGroupType = ProxyGroup


def _live(proxy, session) -> None:
    try:
        proxy.run()
    except BaseException as problem:
        # run() does not raise unless a policy breaks its own proxy; a thread of the pool must survive that
        log_exception(session.session_id)
        conclude(session, DENIED_BY_UNKNOWN_FAIL, type(problem).__name__)
    finally:
        session.release()
        Log.let_go()
