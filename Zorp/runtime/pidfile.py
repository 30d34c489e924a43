"""Pid files that tell the truth, and the lock that makes an instance the only one of its name.

Theory of operation
    `zorp-VNAME.pid` holds the pid of the worker that serves, and is replaced by rename, so that
    a reader never sees half of it.  Because a replaced file carries no lock, liveness is an
    flock() on `zorp-VNAME.pid.lock` beside it, held by the master from before the first worker
    until the end, and inherited by nobody: a worker closes its copy first thing.  The lock dies
    with the master, however it dies; stale files need no clean-up.
"""

from __future__ import annotations

import contextlib
import fcntl
import os


class AlreadyRunning(Exception):
    """Another process holds the lock."""


class PidFile:
    """The pid file of one virtual process; owned by the master."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock: int | None = None

    def acquire(self) -> None:
        """Take the lock.  Raises AlreadyRunning, or OSError when the directory cannot be written."""
        descriptor = os.open(self.path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o660)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise AlreadyRunning(self.path) from None
        self._lock = descriptor

    def write(self, pid: int) -> None:
        """Name this process.  Raises OSError."""
        new = self.path + ".new"
        with open(new, "w", encoding="ascii") as file:
            file.write(f"{pid}\n")
        os.replace(new, self.path)

    def remove(self) -> None:
        """Remove the file at the end of the instance; the lock goes with the process."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def close(self) -> None:
        """Let go of the lock's descriptor, in a child; the lock stays with the master."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
