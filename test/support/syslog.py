"""A system log for tests: receives what a daemon writes to --log-socket.

    with SyslogReceiver(directory / "log.sock") as syslog:
        daemon = zorp(policy, arguments=["--log-socket", str(syslog.path)], detached=True)
        packet = syslog.wait_for("Starting up")        # bytes decoded, without the final newline

kind=socket.SOCK_STREAM receives as a stream.  close() and open() again is a restart of the log.
reading=False makes one that has stopped reading, until read().
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
import threading
import time

import pytest


class SyslogReceiver:
    """Collects packets in a thread of its own; packets is guarded by the interpreter alone."""

    def __init__(self, path: pathlib.Path, kind: int = socket.SOCK_DGRAM, *, reading: bool = True) -> None:
        self.path = path
        self._kind = kind
        self._reading = reading
        self.packets: list[str] = []
        self.open()

    def open(self) -> None:
        """Listen; an old socket of the name is replaced."""
        self.path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, self._kind)
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._socket.bind(f"/proc/self/fd/{directory}/{self.path.name}")
        finally:
            os.close(directory)
        if self._kind == socket.SOCK_STREAM:
            self._socket.listen()
        if self._reading:
            self.read()

    def read(self) -> None:
        """Begin to read."""
        threading.Thread(target=self._receive, args=(self._socket,), daemon=True).start()

    def _receive(self, sock: socket.socket) -> None:
        try:
            if self._kind == socket.SOCK_STREAM:
                while True:
                    threading.Thread(target=self._receive_stream, args=(sock.accept()[0],), daemon=True).start()
            while True:
                self.packets.append(sock.recv(65_536).decode("utf-8", "backslashreplace").removesuffix("\n"))
        except OSError:
            return                       # closed by the test

    def _receive_stream(self, connection: socket.socket) -> None:
        with connection, connection.makefile(encoding="utf-8", errors="backslashreplace") as lines:
            for line in lines:
                self.packets.append(line.removesuffix("\n"))

    def find(self, text: str) -> list[str]:
        return [packet for packet in self.packets if text in packet]

    def wait_for(self, text: str, timeout_s: float = 10.0, count: int = 1) -> str:
        deadline = time.monotonic() + timeout_s
        while len(found := self.find(text)) < count:
            if time.monotonic() > deadline:
                pytest.fail(f"no {text!r} in the system log:\n" + "\n".join(self.packets))
            time.sleep(0.01)
        return found[count - 1]

    def close(self) -> None:
        """Go away, as a log that is stopped."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)      # wakes the thread
        self._socket.close()

    def __enter__(self) -> SyslogReceiver:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()
