"""Files that kzorpd and kzorp-setup believe: nobody else can have written, renamed or locked them.

Theory of operation
    What is in force, the addresses that host names had, who the one kzorpd is and where it listens
    stand in files.  Programs with the rights to let packets pass act on them, so whoever could
    write them, put others in their place, or hold their locks, would decide in their stead.
    The user of the instances is such a one: a process of an instance may have been taken over.

    So a directory is ours if user 0 or our own user owns it and nobody else may write there, and
    the same holds for the directories above it, where somebody could rename it; a sticky one like
    /tmp lets nobody do that.  (The owner of / counts as user 0: in a user namespace user 0 of the
    host has another number.)  A file is ours if it is a plain file with one name of one of these
    owners, which nobody else may write; and nobody else may read those that we make, because
    reading is enough to hold a lock.

What is not ours is refused with an OSError that says why, and how to mend it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator

_FILE_MODE = 0o600
_DIRECTORY_MODE = 0o755
_PID_FILE = "kzorpd.pid"
_PID_BYTES = 32
_LOCK_PATIENCE_S = 1.0
_LOCK_POLL_S = 0.02


class NotOurs(OSError):
    """Somebody else owns or may write it; strerror says who."""

    def __init__(self, why: str, path: str) -> None:
        super().__init__(errno.EPERM, why, path)


def prepare_directory(path: str) -> None:
    """Make a directory if it is missing, for everybody to enter.

    Raises OSError, NotOurs when somebody else could write there.
    """
    if not os.path.isdir(path):
        os.makedirs(path, exist_ok=True)
        os.chmod(path, _DIRECTORY_MODE)          # whatever the umask: instances have to reach the socket
    check_directory(path)


def check_directory(path: str) -> None:
    """Raises NotOurs when somebody else could put files into a directory, or another one in its place; OSError."""
    given = path
    path = os.path.realpath(path)
    if (why := _foreign(os.stat(path))) is not None:
        raise NotOurs(f"{why}; {_REMEDY}", given)
    while path != "/":
        path = os.path.dirname(path)
        above = os.stat(path)
        if (why := _foreign(above, is_sticky=bool(above.st_mode & stat.S_ISVTX))) is not None:
            raise NotOurs(f"the directory {path} above it {why}; {_REMEDY}", given)


_REMEDY = "it must belong to user 0, who alone may write there (state_dir and pid_dir in kzorp.yml)"


def _foreign(found: os.stat_result, *, is_sticky: bool = False) -> str | None:
    """Return what lets others write here, None: nothing."""
    root = os.stat("/")
    if found.st_uid not in (0, os.geteuid(), root.st_uid):
        return f"belongs to user {found.st_uid}"
    if is_sticky:
        return None
    if found.st_mode & stat.S_IWOTH:
        return "may be written by everybody"
    if found.st_mode & stat.S_IWGRP and found.st_gid not in (0, root.st_gid):
        return f"may be written by group {found.st_gid}"
    return None


def opened(path: str, flags: int) -> int:
    """Return a descriptor of a file of ours, made for us alone where flags say so; nobody waits.

    Raises OSError: FileNotFoundError when it is missing, NotOurs.
    """
    check_directory(os.path.dirname(path))
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, _FILE_MODE)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise NotOurs("is not a plain file with one name", path)
        if (why := _foreign(found)) is not None:
            raise NotOurs(why, path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


# ---- the one kzorpd

@contextlib.contextmanager
def only_kzorpd(directory: str) -> Iterator[None]:
    """Be the only kzorpd in a `with` block, with a pid file.  Raises OSError."""
    prepare_directory(directory)
    path = os.path.join(directory, _PID_FILE)
    descriptor = opened(path, os.O_RDWR | os.O_CREAT)
    try:
        os.fchmod(descriptor, _FILE_MODE)
        # (who looks whether there is a kzorpd holds the lock for a moment, too)
        if not locked(descriptor, _LOCK_PATIENCE_S):
            raise OSError(errno.EEXIST, "kzorpd is running already", path)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, b"%d\n" % os.getpid())
        yield
        os.ftruncate(descriptor, 0)              # not removed: a lock on a removed file excludes nobody
    finally:
        os.close(descriptor)


def locked(descriptor: int, patience_s: float) -> bool:
    """Take the lock of a file; return False when another process held it all the time."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOCK_POLL_S)


def running_kzorpd(directory: str) -> str | None:
    """Return the pid of the kzorpd that runs, as a text, None when there is none.  Raises OSError, NotOurs."""
    try:
        descriptor = opened(os.path.join(directory, _PID_FILE), os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.read(descriptor, _PID_BYTES).decode("ascii", "replace").strip() or "not known yet"
    finally:
        os.close(descriptor)
    return None
