"""Pid files that tell the truth, and the lock that makes an instance the only one of its name.

Theory of operation
    `zorp-VNAME.pid` holds the pid of the worker that serves, and is replaced by rename, so that
    a reader never sees half of it.  Because a replaced file carries no lock, liveness is an
    flock() on `zorp-VNAME.pid.lock` beside it, held by the master from before the first worker
    until the end, and inherited by nobody: a worker closes its copy first thing.  The lock dies
    with the master, however it dies; stale files need no clean-up.

    The directory is opened once, before a change of the root directory, and everything goes
    through that descriptor.
"""

from __future__ import annotations

import contextlib
import fcntl
import os

_DIRECTORY_MODE = 0o770
_FILE_MODE = 0o640


class AlreadyRunning(Exception):
    """Another process holds the lock."""


class PidFile:
    """The pid file of one virtual process; owned by the master."""

    def __init__(self, directory: Directory, name: str, *, kept: bool = True) -> None:
        """kept=False: there is only the lock, the service manager knows our pid."""
        self._directory = directory
        self._name = name
        self._kept = kept
        self._lock: int | None = None

    @property
    def path(self) -> str:
        return os.path.join(self._directory.path, self._name)

    def acquire(self) -> None:
        """Take the lock.  Raises AlreadyRunning, or OSError when the directory cannot be written."""
        descriptor = os.open(self._name + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW,
                             _FILE_MODE, dir_fd=self._directory.descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise AlreadyRunning(self.path) from None
        self._lock = descriptor

    def write(self, pid: int) -> None:
        """Name this process.  Raises OSError."""
        if not self._kept:
            return
        new, directory = self._name + ".new", self._directory.descriptor
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW,
                             _FILE_MODE, dir_fd=directory)
        try:
            with open(descriptor, "w", encoding="ascii") as file:
                file.write(f"{pid}\n")
        except OSError:                      # a full disk: the old file stays, nothing half made
            os.unlink(new, dir_fd=directory)
            raise
        os.rename(new, self._name, src_dir_fd=directory, dst_dir_fd=directory)

    def remove(self) -> None:
        """Remove the file at the end of the instance; the lock goes with the process."""
        with contextlib.suppress(OSError):   # it is gone, or somebody has put something else there
            os.unlink(self._name, dir_fd=self._directory.descriptor)

    def close(self) -> None:
        """Let go of the lock's descriptor, in a child; the lock stays with the master."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        self._directory.close()


class Directory:
    """Where pid files and control sockets lie."""

    def __init__(self, path: str, owner: int | None = None, group: int | None = None) -> None:
        """Open it; make it first, for this owner, when it is missing.  Raises OSError."""
        self.path = path
        if not os.path.isdir(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.mkdir(path, _DIRECTORY_MODE)
            os.chmod(path, _DIRECTORY_MODE)
            if os.geteuid() == 0:
                os.chown(path, -1 if owner is None else owner, -1 if group is None else group)
        self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def pid_file(self, name: str, *, kept: bool = True) -> PidFile:
        """The pid file of this name; an absolute name may lie elsewhere."""
        if os.path.dirname(name):
            path = os.path.join(self.path, name)
            return PidFile(Directory(os.path.dirname(path)), os.path.basename(path), kept=kept)
        return PidFile(self, name, kept=kept)

    def close(self) -> None:
        """Let go of the directory, in a child.  Idempotent."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
