"""How long a start and a reload take with a large policy: 2000 rules and services, 1000 zones.

From the command to the first policy that serves, and from the order to reload to its answer; the
median of several.  A small policy beside it shows what the process itself costs.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.process import free_port

RULES, ZONES = 2000, 1000
GOAL_S = 1.0
_ROUNDS = 5
_DEADLINE_S = 60.0
_ROOT = Path(__file__).resolve().parents[1]


def policy(rules: int, zones: int) -> str:
    """Return a policy as a site writes it: a line per zone, service and rule."""
    lines = ["from Zorp.Core import *", "from Zorp.Plug import *", 'Zone("internet", ["0.0.0.0/0", "::/0"])']
    lines += [f'Zone("zone{number}", ["10.{number // 256}.{number % 256}.0/24", "fd00:{number:x}::/64"])'
              for number in range(zones)]
    lines.append("def startup():")
    for number in range(rules):
        lines += [f'    Service("service{number}", PlugProxy, router=TransparentRouter())',
                  f'    Rule(src_zone="zone{number % zones}", dst_zone="internet", proto=6, '
                  f'dst_port={1024 + number // zones}, service="service{number}")']
    lines += ['    Service("plug", PlugProxy, router=DirectedRouter(SockAddrInet("127.0.0.1", 9)))',
              f'    Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", {free_port()}), ZD_PROTO_TCP), service="plug")']
    return "\n".join(lines) + "\n"


class _Instance:
    """A zorp process in a directory of its own."""

    def __init__(self, directory: Path, rules: int, zones: int) -> None:
        self._directory = directory
        path = directory / "policy.py"
        path.write_text(policy(rules, zones))
        self._command = [sys.executable, str(_ROOT / "sbin/zorp"), "--as", "startup", "--policy", str(path),
                         "--foreground", "--no-syslog", "--pid-dir", str(directory), "--state-dir", str(directory),
                         "--user", str(os.getuid()), "--group", str(os.getgid()), "--verbose", "2"]

    def start(self) -> float:
        """Start it; return the seconds until it serves."""
        began_s = time.monotonic()
        self._process = subprocess.Popen(self._command, stderr=subprocess.PIPE, cwd=self._directory)
        while not (self._directory / "zorp-startup.pid").exists():
            if self._process.poll() is not None or time.monotonic() - began_s > _DEADLINE_S:
                raise RuntimeError(f"the instance does not serve: {self._process.stderr.read().decode()}")
            time.sleep(0.002)
        return time.monotonic() - began_s

    def reload(self) -> float:
        """Reload it; return the seconds until the new policy serves."""
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(_DEADLINE_S)
            control.connect(str(self._directory / "zorpctl.startup"))
            began_s = time.monotonic()
            control.sendall(b"RELOAD WAIT\n")
            answer = control.recv(1000)
            if not answer.startswith(b"OK"):
                raise RuntimeError(f"the reload failed: {answer!r}")
            return time.monotonic() - began_s

    def stop(self) -> None:
        self._process.terminate()
        self._process.communicate(timeout=_DEADLINE_S)


def _measure(rules: int, zones: int, rounds: int) -> tuple[float, float]:
    """Return the median seconds of starts and of reloads."""
    starts, reloads = [], []
    with tempfile.TemporaryDirectory() as directory:
        instance = _Instance(Path(directory), rules, zones)
        for _ in range(rounds):
            starts.append(instance.start())
            reloads.append(instance.reload())
            instance.stop()
    return statistics.median(starts), statistics.median(reloads)


def run(rounds: int = _ROUNDS) -> list[dict]:
    """Return a row per policy and job: rules, zones, seconds, whether the goal is met."""
    rows = []
    for rules, zones in ((1, 1), (RULES, ZONES)):
        for job, seconds in zip(("start", "reload"), _measure(rules, zones, rounds), strict=True):
            row = {"job": job, "rules": rules, "zones": zones, "seconds": round(seconds, 3)}
            if rules == RULES:
                row |= {"goal": GOAL_S, "met": seconds < GOAL_S}
            rows.append(row)
    return rows
