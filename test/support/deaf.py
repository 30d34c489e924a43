"""Addresses where a connect gets no friendly answer: a refusal, or nothing at all."""

from __future__ import annotations

import contextlib
import socket


@contextlib.contextmanager
def unused_port(host="127.0.0.1"):
    """Yield a port that nobody listens on while the block runs: bound, but not listening."""
    with socket.socket() as sock:
        sock.bind((host, 0))
        yield sock.getsockname()[1]


@contextlib.contextmanager
def silent_server():
    """Yield the address of a server whose queue is full, so that SYN packets are dropped."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as clients:
        for _ in range(3):
            client = clients.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield listener.getsockname()
