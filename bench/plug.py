"""Bytes that nobody looks into: zorp's Plug and HAProxy in TCP mode, short connections and large transfers.

Short connections: zorp decides with 1000 rules and 200 zones, and logs at level 3; HAProxy just
forwards.  Goal: at most 3 x HAProxy's CPU time per connection, with eight clients at a time, where an event
loop is at its best because it never sleeps; one client at a time stands beside it.  With two worker processes,
and two threads of HAProxy beside them, it shows what a second processor is good for.

Large transfers, one at a time and eight at once: at least 1.2 x HAProxy's throughput, and no more
CPU time per GB.  Both run as an unprivileged user, because what the kernel allows for pipes
depends on that.

The two take turns, round after round, and medians count.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from bench import peers, traffic
from bench.process import Server, free_port

GOAL_CONNECTION_RATIO = 3.0
GOAL_THROUGHPUT_RATIO = 1.2
GOAL_BULK_CPU_RATIO = 1.0
ROUNDS = 5
CONNECTIONS = 8000                # CPU time is counted in hundredths of a second: 1.25 us per connection
PARALLEL = 8
BULK_BYTES = 2 << 30
STREAMS = (1, 8)

POLICY = """
from Zorp.Core import *
from Zorp.Plug import *

Zone("internet", ["0.0.0.0/0", "::/0"])
Zone("loopback", ["127.0.0.0/8"])
for number in range(198):
    Zone(f"office{number}", [f"10.{number}.0.0/16"], admin_parent="internet")

RULES = [{"service": "plug", "proto": 6, "src_zone": f"office{number % 198}", "dst_zone": f"office{number % 197}",
          "dst_port": 1024 + number} for number in range(999)]
RULES.append({"service": "plug", "proto": 6, "src_zone": "loopback", "dst_zone": "loopback", "dst_port": PORT})


def _instance():
    Service("plug", PlugProxy, router=DirectedRouter(SockAddrInet("127.0.0.1", ORIGIN)))
    NDimensionDispatcher(DBSockAddr(SockAddrInet("127.0.0.1", PORT), ZD_PROTO_TCP), rules=RULES)


bench1 = bench2 = _instance
"""


def run() -> list[dict]:
    """Return a row per proxy and kind of traffic, with medians, ratios to HAProxy and the goals."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.chmod(directory, 0o777)
        origin = free_port()
        stack.enter_context(Server("origin", [sys.executable, "-m", "bench.traffic", str(origin)], origin))
        rows = []
        with _pair(directory, origin, 1) as servers:
            rows += _short_rows("short connections", _in_turns(servers, partial(_short, PARALLEL)), has_goal=True)
            rows += _short_rows("short connections, one at a time", _in_turns(servers, partial(_short, 1)),
                                has_goal=False)
            for streams in STREAMS:
                rows += _bulk_rows(streams, _in_turns(servers, partial(_bulk, streams)))
        with _pair(directory, origin, 2) as servers:
            rows += _short_rows("short connections, 2 processes", _in_turns(servers, partial(_short, PARALLEL)),
                                has_goal=False)
        return rows


@contextmanager
def _pair(directory: Path, origin: int, processes: int) -> Iterator[list[Server]]:
    """Run zorp with so many workers, and HAProxy with as many threads."""
    options = ("--user", peers.UNPRIVILEGED) if os.geteuid() == 0 else ()
    servers = [peers.zorp(POLICY, directory, origin, "--num-of-processes", str(processes), *options,
                          name=f"bench{processes}"),
               peers.haproxy(directory, origin, processes)]
    with ExitStack() as stack:
        for server in servers:
            stack.enter_context(server)
            traffic.short_connections(server.port, 200, PARALLEL)     # warm up
        yield servers


def _in_turns(servers: list[Server],
              measure: Callable[[Server], tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Return the medians of both figures for each server."""
    samples: dict[str, list[tuple[float, float]]] = {server.name: [] for server in servers}
    for _ in range(ROUNDS):
        for server in servers:
            samples[server.name].append(measure(server))
    return {name: (statistics.median(first for first, _ in taken), statistics.median(second for _, second in taken))
            for name, taken in samples.items()}


def _short(parallel: int, server: Server) -> tuple[float, float]:
    """Return CPU microseconds per connection, and connections per second."""
    before = server.cpu_seconds()
    seconds = traffic.short_connections(server.port, CONNECTIONS, parallel)
    return (server.cpu_seconds() - before) / CONNECTIONS * 1e6, CONNECTIONS / seconds


def _bulk(streams: int, server: Server) -> tuple[float, float]:
    """Return GB per second, and CPU seconds per GB."""
    before = server.cpu_seconds()
    seconds = traffic.bulk(server.port, BULK_BYTES, streams)
    return BULK_BYTES / 1e9 / seconds, (server.cpu_seconds() - before) / (BULK_BYTES / 1e9)


def _short_rows(what: str, figures: dict[str, tuple[float, float]], *, has_goal: bool) -> list[dict]:
    rows = [{"traffic": what, "proxy": name, "cpu_us_per_connection": round(cpu_us),
             "connections_per_second": round(rate), "ratio": round(cpu_us / figures["haproxy"][0], 2)}
            for name, (cpu_us, rate) in figures.items()]
    if has_goal:
        rows[0] |= {"goal": f"cpu <= {GOAL_CONNECTION_RATIO}", "met": rows[0]["ratio"] <= GOAL_CONNECTION_RATIO}
    return rows


def _bulk_rows(streams: int, figures: dict[str, tuple[float, float]]) -> list[dict]:
    reference_rate, reference_cpu = figures["haproxy"]
    rows = [{"traffic": "one transfer" if streams == 1 else f"{streams} transfers", "proxy": name,
             "gb_per_second": round(rate, 2), "cpu_s_per_gb": round(cpu, 3), "ratio": round(rate / reference_rate, 2),
             "cpu_ratio": round(cpu / reference_cpu, 2)}
            for name, (rate, cpu) in figures.items()]
    rows[0] |= {"goal": f">= {GOAL_THROUGHPUT_RATIO}, cpu <= {GOAL_BULK_CPU_RATIO}",
                "met": rows[0]["ratio"] >= GOAL_THROUGHPUT_RATIO and rows[0]["cpu_ratio"] <= GOAL_BULK_CPU_RATIO}
    return rows
