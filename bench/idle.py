"""Idle sessions: what one costs in memory when 5000 are open in one worker.

A Plug service with a thread per session; the client opens all sessions and says nothing, the
server accepts all and says nothing.  Resident memory of master and worker is read before and
after; the difference per session counts.  Goal: at most 40 KiB.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import tempfile
import time
from pathlib import Path

from bench import peers
from bench.process import Server, free_port

GOAL_KIB = 40
SESSIONS = 5000
WAIT_SECONDS = 120

POLICY = """
from Zorp.Core import *
from Zorp.Plug import *

Zone("internet", ["0.0.0.0/0", "::/0"])


def bench():
    Service("idle", PlugProxy, router=DirectedRouter(SockAddrInet("127.0.0.1", ORIGIN)))
    Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", PORT), ZD_PROTO_TCP), service="idle", backlog=1024)
"""

_ORIGIN = """\
import socket, sys
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=4096)
kept = []
while True:
    kept.append(listener.accept()[0])
"""


def _established(log: Path) -> int:
    return log.read_text(errors="replace").count("Server connection established")


def _open(server: Server, sessions: int, clients: list[socket.socket]) -> None:
    """Open sessions until the log counts them all."""
    for number in range(sessions):
        clients.append(socket.create_connection(("127.0.0.1", server.port), 30))
        if number % 500 == 499:
            deadline = time.monotonic() + WAIT_SECONDS
            while _established(server.log) < len(clients):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"only {_established(server.log)} of {len(clients)} sessions")
                time.sleep(0.05)


def run(sessions: int = SESSIONS) -> list[dict]:
    """Return one row: kib_per_session, resident_kib before and after."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        origin = free_port()
        stack.enter_context(Server("origin", [sys.executable, "-c", _ORIGIN, str(origin)], origin))
        server = stack.enter_context(peers.zorp(POLICY, directory, origin, "--threads", str(sessions + 1000)))
        clients: list[socket.socket] = []
        stack.callback(lambda: [client.close() for client in clients])
        _open(server, 500, clients)                      # what the first sessions load stays out
        before = server.resident_kib()
        _open(server, sessions, clients)
        after = server.resident_kib()
    kib = (after - before) / sessions
    return [{"sessions": sessions, "kib_per_session": round(kib, 1), "resident_kib_before": before,
             "resident_kib_after": after, "goal": f"<= {GOAL_KIB}", "met": kib <= GOAL_KIB}]
