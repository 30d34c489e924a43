"""After many sessions the process is as it was: memory, descriptors, threads, counters.

The short run belongs to every `make test`; the long one, `make soak`, makes 100 000 sessions.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from bench import traffic
from bench.process import Server
from test.support.daemon import wait_until
from test.support.ports import free_port
from zorpctl.szig import SzigClient

POLICY = """
    from Zorp.Core import *
    from Zorp.Plug import *

    Zone("internet", ["0.0.0.0/0"])

    def intra():
        Service("plug", PlugProxy, router=DirectedRouter(SockAddrInet("127.0.0.1", $server_port)))
        Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", $port), ZD_PROTO_TCP), service="plug")
    """


@pytest.fixture
def origin():
    port = free_port()
    with Server("origin", [sys.executable, "-m", "bench.traffic", str(port)], port):
        yield port


def resident_kib(pid: int) -> int:
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.parametrize(("first", "sessions"), [
    pytest.param(1000, 5000, id="short"),
    pytest.param(10_000, 100_000, id="long", marks=[pytest.mark.soak, pytest.mark.timeout(1800)]),
])
def test_nothing_grows(first, sessions, origin, zorp):
    # given a worker that has served for a while
    daemon = zorp(POLICY, verbosity=1, server_port=origin, arguments=("--log-spec", "core.error:3"))
    pid = daemon.worker_pid()
    traffic.short_connections(daemon.port, first, 8)
    wait_until(lambda: tree(daemon, "service.plug.sessions_running") == "0", "the end of the first sessions")
    before_kib, before_descriptors = resident_kib(pid), descriptors(pid)
    # when ten times as many sessions have passed
    traffic.short_connections(daemon.port, sessions - first, 8)
    wait_until(lambda: tree(daemon, "service.plug.sessions_running") == "0", "the end of the sessions")
    # then memory is within a tenth of what it was, and descriptors and counters are where they were
    assert resident_kib(pid) <= before_kib * 1.1
    assert descriptors(pid) <= before_descriptors + 2
    assert tree(daemon, "service.plug.session_number") == str(sessions)
    assert daemon.worker_pid() == pid


def tree(daemon, node: str) -> str:
    """Return a value of the statistics tree."""
    with SzigClient(str(daemon.directory / f"zorpctl.{daemon.instance}")) as szig:
        return szig.ask(f"GETVALUE {node}")
