"""A relay in a thread between two connections whose far ends a test holds.

    running = Running(RelaySettings(half_close=True), tcp_pair)
    running.client.sendall(b"question")
    assert received(running.server, 8) == b"question"
    running.close()
"""

from __future__ import annotations

import socket
import threading
import time

from Zorp.transport.relay import LONG_BYTES, Relay
from Zorp.transport.stream import SocketStream

PATIENCE_S = 20.0
BEGINNING = bytes(4 * LONG_BYTES)        # makes a direction long


class InThread:
    """Whoever has a relay run in a thread: `end` is what it returned, `cpu_s` what that cost."""

    def begin(self, relay):
        """Start the thread."""
        self.relay = relay
        self.end = self.cpu_s = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        self.end = self.relay.run()
        self.cpu_s = time.thread_time()

    def result(self):
        """Wait for the end and return it."""
        self.thread.join(PATIENCE_S)
        assert self.end is not None, "the relay does not end"
        return self.end


class Running(InThread):
    """`client` and `server` are the far ends, `near` the relay's streams to them.

    Arguments:
        pair: returns two connected sockets, the far one first.
        callbacks: the relay's.
    """

    def __init__(self, settings, pair=socket.socketpair, **callbacks):
        self.client, near_client = pair()
        self.server, near_server = pair()
        for end in (self.client, self.server):
            end.settimeout(PATIENCE_S)
        self.near = SocketStream(near_client), SocketStream(near_server)
        self.begin(Relay(*self.near, settings, **callbacks))

    def carry(self, data):
        """Send to the server, until it has got all of it."""
        sender = threading.Thread(target=self.client.sendall, args=(data,))
        sender.start()
        assert received(self.server, len(data)) == data
        sender.join(PATIENCE_S)

    def make_long(self):
        """Carry so much towards the server that the rest goes through pipes."""
        self.carry(BEGINNING)
        assert self.relay.to_server.is_long

    def close(self):
        """Close everything; the relay's own streams when its thread has let go of them."""
        self.relay.stop()
        self.thread.join(PATIENCE_S)
        for end in (self.client, self.server, *self.near):
            end.close()


def received(sock, count):
    """Return that many bytes, fewer at end of file."""
    parts = []
    while count and (part := sock.recv(min(count, 1 << 16))):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
