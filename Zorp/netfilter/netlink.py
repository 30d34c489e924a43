"""Netlink to the packet filter: messages taken apart, and a socket that is read in a loop.

The kernel counts what did not fit into the socket and tells once per gap: has_lost.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator

HEADER = struct.Struct("=IHHII")         # length, type, flags, sequence, port
REQUEST, ACK, DUMP = 0x1, 0x4, 0x300
_NETLINK_NETFILTER = 12
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_ERROR, _DONE = 2, 3
_SO_RCVBUFFORCE = 33
_DATAGRAM_BYTES = 1 << 17
_BATCH = 256                             # datagrams at a time, so that the loop turns
_TYPE_MASK = 0x3FFF
_ATTRIBUTE = struct.Struct("=HH")


class NetfilterSocket:
    """A netlink socket; request() waits for the kernel, arrived() never does."""

    def __init__(self, *, receive_bytes: int | None = None, answer_s: float = 10.0) -> None:
        """Raises OSError."""
        self.has_lost = False            # the kernel dropped messages since this was last set back
        self._answer_s = answer_s
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        try:
            if receive_bytes is not None:
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, receive_bytes)
            self._socket.bind((0, 0))
            self._socket.setblocking(False)
        except OSError:
            self._socket.close()
            raise

    def __enter__(self) -> NetfilterSocket:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def join(self, group: int) -> None:
        """Get the messages of a multicast group.  Raises OSError."""
        self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)

    def request(self, kind: int, flags: int, body: bytes) -> Iterator[tuple[int, bytes]]:
        """Send a request and yield (type, message) of its answers, until the last one.  Raises OSError."""
        self._socket.settimeout(self._answer_s)
        try:
            self._socket.send(HEADER.pack(HEADER.size + len(body), kind, REQUEST | flags, 1, 0) + body)
            while True:
                for answer, message in messages(self._socket.recv(_DATAGRAM_BYTES)):
                    if answer == _DONE:
                        return
                    if answer == _ERROR:
                        number = -struct.unpack_from("=i", message, HEADER.size)[0]
                        if number:
                            raise OSError(number, os.strerror(number))
                        return
                    yield answer, message
        finally:
            self._socket.setblocking(False)

    def arrived(self) -> Iterator[tuple[int, bytes]]:
        """Yield (type, message) of what has come, some of it if it is much.  Raises OSError."""
        for _ in range(_BATCH):
            try:
                data = self._socket.recv(_DATAGRAM_BYTES)
            except BlockingIOError:
                return
            except OSError as problem:
                if problem.errno != errno.ENOBUFS:
                    raise
                self.has_lost = True
                continue
            yield from messages(data)


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (type, message with its header) of the netlink messages in a datagram."""
    position = 0
    while position + HEADER.size <= len(data):
        length, kind = HEADER.unpack_from(data, position)[:2]
        if length < HEADER.size or position + length > len(data):
            return
        yield kind, data[position:position + length]
        position += length + 3 & ~3


def attributes(message: bytes, position: int) -> Iterator[tuple[int, bytes]]:
    """Yield (type, value) of the netlink attributes from a position on."""
    while position + _ATTRIBUTE.size <= len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, position)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _TYPE_MASK, message[position + _ATTRIBUTE.size:position + length]
        position += length + 3 & ~3


def attribute(kind: int, value: bytes) -> bytes:
    """Return one attribute, padded."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + b"\0" * (-len(value) % 4)
