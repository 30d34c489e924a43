"""The notification protocol of systemd: one datagram per state (sd_notify(3)).

READY=1, RELOADING=1, STOPPING=1 and WATCHDOG=1 go to the socket that NOTIFY_SOCKET names, a path
or, with a leading "@", an abstract name.  Without the variable nothing is sent and nothing fails.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping


class BadWatchdogTime(Exception):
    """WATCHDOG_USEC is not a positive number."""


class Notifier:
    """Tells the service manager how the instance is; for the master."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        """Raises BadWatchdogTime."""
        address = environment.get("NOTIFY_SOCKET", "")
        self._socket: socket.socket | None = None
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            with contextlib.suppress(OSError):       # open before chroot; a dead manager is no reason to stop
                self._socket.connect("\0" + address[1:] if address.startswith("@") else address)
        self.watchdog_s = self._watchdog_time(environment)

    @staticmethod
    def _watchdog_time(environment: Mapping[str, str]) -> float | None:
        """How often the manager wants to hear from us, half of its deadline; None: never."""
        value = environment.get("WATCHDOG_USEC")
        if value is None:
            return None
        if not value.isdigit() or int(value) == 0:
            raise BadWatchdogTime(f"'{value}' is not a positive number")
        return int(value) / 2_000_000

    def send(self, state: str) -> None:
        """Send one state, for example READY=1."""
        if self._socket is None:
            return
        if state == "RELOADING=1":
            state += f"\nMONOTONIC_USEC={time.monotonic_ns() // 1000}"
        with contextlib.suppress(OSError):
            self._socket.send(state.encode())

    def close(self) -> None:
        """Let go of the socket, in a child."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
