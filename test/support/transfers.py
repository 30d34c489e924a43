"""Transfers that prove themselves: both ends know every byte that must come, in both directions at once.

    with Origin() as origin:
        daemon = zorp(POLICY, server_port=origin.port)
        Transfer(seed=1, up=10_000_000, down=5_000_000).run(daemon.port)     raises TransferFailed
        origin.check()                                                       the same for what came up

A transfer is two streams of pseudo-random bytes that follow from its seed, cut into sends of
odd sizes.  Each end half-closes when it has sent everything, and reads until the other one has.
Checksums of whole streams are compared, in the order in which bytes arrive.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

PATIENCE_S = 60.0
_BLOCK_BYTES = 1_000_003             # prime: no buffer size fits, so a block out of place shows
_HEADER = "{seed} {up} {down}\n"


class TransferFailed(AssertionError):
    """Bytes were lost, added, changed or exchanged."""


class Transfer(NamedTuple):
    """One connection: `up` bytes towards the server, `down` towards the client, sent in pieces of at most `cut`."""

    seed: int
    up: int
    down: int
    cut: int = 1 << 20

    def run(self, port: int, before_piece: Callable[[int], None] = lambda number: None) -> None:
        """Be the client; raises TransferFailed, or OSError when the connection breaks.

        before_piece: called with the number of each piece before it is sent.
        """
        def outgoing() -> Iterator[memoryview]:
            for number, piece in enumerate(stream(self.seed, self.up, self.cut)):
                before_piece(number)
                yield piece

        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as sock:
            sock.sendall(_HEADER.format(**self._asdict()).encode())
            _both_ways(sock, outgoing(), stream(self.seed + 1, self.down, self.cut),
                       f"down of {self}")


def stream(seed: int, length: int, cut: int) -> Iterator[memoryview]:
    """Yield the bytes of a stream in pieces."""
    block = memoryview(random.Random(seed).randbytes(min(length, _BLOCK_BYTES)))
    cuts = random.Random(~seed)
    sent = 0
    while sent < length:
        start = sent % _BLOCK_BYTES
        piece = block[start:start + min(cuts.randint(1, cut), length - sent)]
        yield piece
        sent += len(piece)


def _both_ways(sock: socket.socket, outgoing: Iterator, expected: Iterator, what: str) -> None:
    problems: list[OSError] = []

    def send() -> None:
        try:
            for piece in outgoing:
                sock.sendall(piece)
            sock.shutdown(socket.SHUT_WR)
        except OSError as problem:
            problems.append(problem)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    crc = length = 0
    buffer = bytearray(1 << 18)
    while got := sock.recv_into(buffer):
        crc = zlib.crc32(memoryview(buffer)[:got], crc)
        length += got
    sender.join(PATIENCE_S)
    if problems:
        raise problems[0]
    wanted_crc = wanted_length = 0
    for piece in expected:
        wanted_crc = zlib.crc32(piece, wanted_crc)
        wanted_length += len(piece)
    if (length, crc) != (wanted_length, wanted_crc):
        raise TransferFailed(f"{what}: {length} of {wanted_length} bytes, checksum {crc:08x}, not {wanted_crc:08x}")


class Origin:
    """The server of transfers; a thread per connection."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port = self._listener.getsockname()[1]
        self._problems: list[BaseException] = []
        self._running: set[threading.Thread] = set()

    def __enter__(self) -> Origin:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *problem) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def check(self) -> None:
        """Wait for the end of all transfers; raise what went wrong with the first."""
        for thread in list(self._running):
            thread.join(PATIENCE_S)
        if self._problems:
            raise self._problems[0]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
                self._running.add(thread)
                thread.start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            with sock:
                sock.settimeout(PATIENCE_S)
                header = b""
                while not header.endswith(b"\n"):
                    byte = sock.recv(1)
                    if not byte:
                        return                       # a probe
                    header += byte
                seed, up, down = map(int, header.split())
                _both_ways(sock, stream(seed + 1, down, 1 << 16), stream(seed, up, 1 << 20), f"up of {seed}")
        except BaseException as problem:
            self._problems.append(problem)
        finally:
            self._running.discard(threading.current_thread())
