"""How many sessions of one kind may be open at a time: of each client address, of each zone."""

from __future__ import annotations

import threading

from Zorp.Constants import CORE_ERROR
from Zorp.Log import log
from Zorp.process.log_pause import LogPause


class OpenSessions:
    """The open sessions by what they share; for a limit of config.options.

    Any thread may call.  _open_lock guards _open; log lines are written outside it.
    """

    def __init__(self) -> None:
        self._open_lock = threading.Lock()
        self._open: dict[str, int] = {}
        self._refusals = LogPause()

    def admit(self, session, shared: str, maximum: int) -> bool:
        """Count the session until its end, or log the refusal and return False when `maximum` are open.

        shared: what the sessions that count together have in common, their client's address for example.
        """
        with self._open_lock:
            running = self._open.get(shared, 0)
            if running < maximum:
                self._open[shared] = running + 1
        if running < maximum:
            session.call_at_end(self._leave, shared)
            return True
        if (suppressed := self._refusals.due()) is not None:
            log(session.session_id, CORE_ERROR, 2,
                "Too many connections, refusing; client_address='%s', of='%s', max_connections='%d', suppressed='%d'",
                (session.client_address, shared, maximum, suppressed))
        return False

    def _leave(self, shared: str) -> None:
        with self._open_lock:
            if self._open[shared] == 1:
                del self._open[shared]
            else:
                self._open[shared] -= 1
