"""One 4 KiB mail per connection: zorp with full inspection, aiosmtpd's Proxy, HAProxy (bytes only).

smtp-source sends, smtp-sink receives (both from Postfix); the proxies take turns, several
rounds, and the median of each counts.  Goal: at most 0.45 of aiosmtpd's CPU time per mail.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from bench import peers
from bench.process import Server, free_port

GOAL_RATIO = 0.45
MAIL_BYTES = 4096
PARALLEL = 8

POLICY = """
from Zorp.Core import *
from Zorp.Smtp import *

Zone("internet", ["0.0.0.0/0", "::/0"])
Zone("loopback", ["127.0.0.0/8"])


class Mail(SmtpProxy):
    def config(self):
        SmtpProxy.config(self)
        self.relay_domains = ("example.com",)


def bench():
    Service("mail", Mail, router=DirectedRouter(SockAddrInet("127.0.0.1", ORIGIN)))
    Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", PORT), ZD_PROTO_TCP), service="mail")
"""


def _send(port: int, mails: int) -> float:
    start = time.monotonic()
    subprocess.run(["smtp-source", "-s", str(PARALLEL), "-m", str(mails), "-l", str(MAIL_BYTES),
                    "-f", "ann@example.org", "-t", "bob@example.com", f"127.0.0.1:{port}"],
                   check=True, timeout=600)
    return time.monotonic() - start


def _measure(server: Server, mails: int) -> tuple[float, float]:
    """Return (CPU microseconds per mail, mails per second)."""
    before = server.cpu_seconds()
    wall_seconds = _send(server.port, mails)
    return (server.cpu_seconds() - before) / mails * 1e6, mails / wall_seconds


def run(rounds: int = 5, mails: int = 1000) -> list[dict]:
    """Return a row per proxy: cpu_us_per_mail, mails_per_second (medians), resident_kib, ratio."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        origin = free_port()
        stack.enter_context(Server("smtp-sink", ["smtp-sink", "-u", "nobody", f"127.0.0.1:{origin}", "1000"], origin))
        servers = [peers.zorp(POLICY, directory, origin), peers.aiosmtpd_proxy(origin),
                   peers.haproxy(directory, origin)]
        for server in servers:
            stack.enter_context(server)
            _send(server.port, 100)                                   # warm up
        samples: dict[str, list] = {server.name: [] for server in servers}
        for _ in range(rounds):
            for server in servers:
                samples[server.name].append(_measure(server, mails))
        rows = [_row(server, samples[server.name]) for server in servers]
    reference = next(row for row in rows if row["proxy"] == "aiosmtpd Proxy")["cpu_us_per_mail"]
    for row in rows:
        row["cpu_ratio_to_aiosmtpd"] = round(row["cpu_us_per_mail"] / reference, 3)
    rows[0]["goal"] = f"<= {GOAL_RATIO}"
    rows[0]["met"] = rows[0]["cpu_ratio_to_aiosmtpd"] <= GOAL_RATIO
    return rows


def _row(server: Server, samples: list[tuple[float, float]]) -> dict:
    return {
        "proxy": server.name,
        "cpu_us_per_mail": round(statistics.median(cpu for cpu, _ in samples)),
        "mails_per_second": round(statistics.median(rate for _, rate in samples)),
        "resident_kib": server.resident_kib(),
    }
