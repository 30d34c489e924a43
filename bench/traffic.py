"""Traffic for relays: a server that sends what it is asked for, and clients that ask.

    python -m bench.traffic PORT        serve: a connection asks with a number and LF, gets as many bytes, then the end

Both ends are cheap, so that the relay between them is what limits: the server sends from a file in
memory, the client lets the kernel discard what comes.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable

_BLOCK_BYTES = 1 << 20
_THREADS = 16
_SHORT_REPLY_BYTES = 64


def serve(port: int) -> None:
    """Serve for ever."""
    listener = socket.create_server(("127.0.0.1", port), backlog=1024)
    file = os.memfd_create("block")
    os.truncate(file, _BLOCK_BYTES)
    threads = [threading.Thread(target=_serve_clients, args=(listener, file)) for _ in range(_THREADS)]
    for thread in threads:
        thread.start()
    threads[0].join()


def _serve_clients(listener: socket.socket, file: int) -> None:
    while True:
        client, _ = listener.accept()
        with client:
            left = int(client.recv(32) or 0)
            try:
                while left > 0:
                    left -= os.sendfile(client.fileno(), file, 0, min(left, _BLOCK_BYTES))
            except OSError:              # the client left early
                pass


def fetch(port: int, count: int) -> None:
    """Ask for that many bytes and wait for the last one; raises RuntimeError when fewer come."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(b"%d\n" % count)
        while got := sock.recv_into(_SINK, 0, socket.MSG_TRUNC):
            count -= got
    if count:
        raise RuntimeError(f"{count} bytes are missing")


_SINK = bytearray(_BLOCK_BYTES)


def bulk(port: int, count: int, streams: int) -> float:
    """Fetch that many bytes, shared among several connections at once; return the seconds until the last one came."""
    return _in_threads(streams, lambda: fetch(port, count // streams))


def short_connections(port: int, connections: int, parallel: int) -> float:
    """Make connections that carry a few bytes each; return the seconds that all of them took."""
    def work() -> None:
        for _ in range(connections // parallel):
            fetch(port, _SHORT_REPLY_BYTES)

    return _in_threads(parallel, work)


def _in_threads(number: int, job: Callable[[], None]) -> float:
    """Run a job in several threads at once; return the seconds, or raise what the first to fail raised."""
    failures = []

    def work() -> None:
        try:
            job()
        except Exception as problem:
            failures.append(problem)

    threads = [threading.Thread(target=work) for _ in range(number)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return time.monotonic() - start


if __name__ == "__main__":
    serve(int(sys.argv[1]))
