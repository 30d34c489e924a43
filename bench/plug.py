"""Bytes that nobody looks into: zorp's Plug and HAProxy in TCP mode, short connections and one large transfer.

Short connections: zorp decides with 1000 rules and 200 zones, and logs at level 3; HAProxy just
forwards.  Goal: at most 3 x HAProxy's CPU time per connection.

One large transfer: at least 1.2 x HAProxy's throughput, and no more CPU time per GB.  Both run as
an unprivileged user, because what the kernel allows for pipes depends on that.

The proxies take turns, round after round, and medians count.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from bench import peers, traffic
from bench.process import Server, free_port

GOAL_CONNECTION_RATIO = 3.0
GOAL_THROUGHPUT_RATIO = 1.2
GOAL_BULK_CPU_RATIO = 1.0
ROUNDS = 5
CONNECTIONS = 2000
PARALLEL = 8
BULK_BYTES = 2 << 30

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


def bench():
    Service("plug", PlugProxy, router=DirectedRouter(SockAddrInet("127.0.0.1", ORIGIN)))
    NDimensionDispatcher(DBSockAddr(SockAddrInet("127.0.0.1", PORT), ZD_PROTO_TCP), rules=RULES)
"""


def run() -> list[dict]:
    """Return a row per proxy and kind of traffic, with medians, ratios to HAProxy and the goals."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.chmod(directory, 0o777)
        origin = free_port()
        stack.enter_context(Server("origin", [sys.executable, "-m", "bench.traffic", str(origin)], origin))
        options = ("--user", peers.UNPRIVILEGED) if os.geteuid() == 0 else ()
        servers = [peers.zorp(POLICY, directory, origin, *options), peers.haproxy(directory, origin)]
        for server in servers:
            stack.enter_context(server)
            traffic.short_connections(server.port, 200, PARALLEL)     # warm up
        return [*_short_rows(_in_turns(servers, _short)), *_bulk_rows(_in_turns(servers, _bulk))]


def _in_turns(servers: list[Server],
              measure: Callable[[Server], tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Return the medians of both figures for each server."""
    samples: dict[str, list[tuple[float, float]]] = {server.name: [] for server in servers}
    for _ in range(ROUNDS):
        for server in servers:
            samples[server.name].append(measure(server))
    return {name: (statistics.median(first for first, _ in taken), statistics.median(second for _, second in taken))
            for name, taken in samples.items()}


def _short(server: Server) -> tuple[float, float]:
    """Return CPU microseconds per connection, and connections per second."""
    before = server.cpu_seconds()
    seconds = traffic.short_connections(server.port, CONNECTIONS, PARALLEL)
    return (server.cpu_seconds() - before) / CONNECTIONS * 1e6, CONNECTIONS / seconds


def _bulk(server: Server) -> tuple[float, float]:
    """Return GB per second, and CPU seconds per GB."""
    before, start = server.cpu_seconds(), time.monotonic()
    traffic.fetch(server.port, BULK_BYTES)
    seconds = time.monotonic() - start
    return BULK_BYTES / 1e9 / seconds, (server.cpu_seconds() - before) / (BULK_BYTES / 1e9)


def _short_rows(figures: dict[str, tuple[float, float]]) -> list[dict]:
    rows = [{"traffic": "short connections", "proxy": name, "cpu_us_per_connection": round(cpu_us),
             "connections_per_second": round(rate), "ratio": round(cpu_us / figures["haproxy"][0], 2)}
            for name, (cpu_us, rate) in figures.items()]
    return _with_goal(rows, f"cpu <= {GOAL_CONNECTION_RATIO}", rows[0]["ratio"] <= GOAL_CONNECTION_RATIO)


def _bulk_rows(figures: dict[str, tuple[float, float]]) -> list[dict]:
    reference_rate, reference_cpu = figures["haproxy"]
    rows = [{"traffic": "one transfer", "proxy": name, "gb_per_second": round(rate, 2),
             "cpu_s_per_gb": round(cpu, 3), "ratio": round(rate / reference_rate, 2),
             "cpu_ratio": round(cpu / reference_cpu, 2)}
            for name, (rate, cpu) in figures.items()]
    return _with_goal(rows, f">= {GOAL_THROUGHPUT_RATIO}, cpu <= {GOAL_BULK_CPU_RATIO}",
                      rows[0]["ratio"] >= GOAL_THROUGHPUT_RATIO and rows[0]["cpu_ratio"] <= GOAL_BULK_CPU_RATIO)


def _with_goal(rows: list[dict], goal: str, met: bool) -> list[dict]:
    rows[0] |= {"goal": goal, "met": met}
    return rows
