"""How many sessions each client address may have open at a time."""

from __future__ import annotations

import threading

from Zorp.Constants import CORE_ERROR
from Zorp.Log import log
from Zorp.process.log_pause import LogPause


class ConnectionsPerClient:
    """The open sessions of every client address, for config.options.max_connections_per_client.

    Any thread may call.  _open_lock guards _open; log lines are written outside it.
    """

    def __init__(self) -> None:
        self._open_lock = threading.Lock()
        self._open: dict[str, int] = {}
        self._refusals = LogPause()

    def admit(self, session, maximum: int) -> bool:
        """Count the session until its end, or log the refusal and return False when `maximum` are open."""
        client = getattr(session.client_address, "ip_s", "")
        with self._open_lock:
            running = self._open.get(client, 0)
            if running < maximum:
                self._open[client] = running + 1
        if running < maximum:
            session.call_at_end(self._leave, client)
            return True
        if (suppressed := self._refusals.due()) is not None:
            log(session.session_id, CORE_ERROR, 2,
                "Too many connections, refusing; client_address='%s', max_connections='%d', suppressed='%d'",
                (session.client_address, maximum, suppressed))
        return False

    def _leave(self, client: str) -> None:
        with self._open_lock:
            if self._open[client] == 1:
                del self._open[client]
            else:
                self._open[client] -= 1
