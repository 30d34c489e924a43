"""Mutual exclusion between processes, and inside one, by a lock on a file.

Each FileLock has its own open description, so two of them on one file exclude each other even
in the same process.  The file is opened when the object is made and closed with it; it is
created when missing and never removed, because a removed lock file is no lock.

    with FileLock(cache_directory + "/.lock"):
        ...
"""

from __future__ import annotations

import fcntl
import os

from Zorp.Constants import CORE_ERROR
from Zorp.Log import log

_MODE = 0o600


class FileLock:
    """An exclusive lock on `filename`; waits until it is free.

    A file that cannot be opened is logged; acquire() and release() then raise ValueError.
    """

    def __init__(self, filename=None):
        self.filename = filename
        self.lock_fd = None
        try:
            self.lock_fd = os.fdopen(os.open(filename, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _MODE), "r+")
        except (OSError, TypeError) as problem:
            log(None, CORE_ERROR, 3, "Error opening lock file; file='%s', error='%s'",
                (filename, getattr(problem, "strerror", problem)))

    def acquire(self):
        """Wait for the lock and take it."""
        fcntl.flock(self._opened(), fcntl.LOCK_EX)

    def release(self):
        """Give the lock back."""
        fcntl.flock(self._opened(), fcntl.LOCK_UN)

    def _opened(self):
        if self.lock_fd is None:
            raise ValueError(f"Lock file is not open; file='{self.filename}'")
        return self.lock_fd

    def __enter__(self):
        self.acquire()
        return self

    def __exit__(self, exc_type, exc_val, exc_tb):
        self.release()

    def __del__(self):
        if getattr(self, "lock_fd", None) is not None:
            self.lock_fd.close()
