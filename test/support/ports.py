"""Ports for listeners that a test starts later, or never: nobody else takes them meanwhile.

A port that the kernel gave for a moment may be the next client's, of any process of the host, and
a client of a closed port in that range may even meet itself.  So these lie below the range that
the kernel gives ports from (net.ipv4.ip_local_port_range) and below those that tests name.  Every
process of a parallel run has its own, and none is given twice.
"""

from __future__ import annotations

import itertools
import os
import secrets
import socket

_PORTS = range(10_000, 20_000)


def _own() -> itertools.cycle:
    """The ports of this process, from a place by chance on: another run may be under way on this host."""
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    ports = _PORTS[number::int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))]
    start = secrets.randbelow(len(ports))
    return itertools.cycle((*ports[start:], *ports[:start]))


_own_ports = _own()


def free_port(kind: int = socket.SOCK_STREAM, host: str = "127.0.0.1") -> int:
    """Return a port that is free, and that nobody else of this run will be given."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in itertools.islice(_own_ports, len(_PORTS)):
        with socket.socket(family, kind) as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise AssertionError(f"no port of {_PORTS} is free")
