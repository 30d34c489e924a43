"""The processes of an instance, as the files in the pid directory tell.

Theory of operation
    `zorp-NAME#k.pid` names the worker that serves; the kernel's lock on `zorp-NAME#k.pid.lock`
    belongs to the master of the instance and says that it lives.  /proc/locks tells the pid of
    the holder, so nobody is signalled because of a number in a file: a stale or planted pid
    file can mislead a reader, never a signal.

    The directory is writable for the user zorp: files are opened without following links.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from Zorp.transport.kzorpd import socket_path as kzorpd_socket
from Zorp.wire.kzorpd import KZORPD_DIR

_PID_FILE = re.compile(r"zorp-(.+)\.pid(\.lock)?")
_PID_FILE_BYTES = 32


@dataclass(frozen=True, slots=True)
class Process:
    """One virtual process: NAME#k of a configured instance, or NAME when it was started by hand."""

    name: str
    pid_dir: str
    kzorpd_dir: str = KZORPD_DIR

    @property
    def instance(self) -> str:
        """The name without the number."""
        return self.name.partition("#")[0]

    @property
    def pid_path(self) -> str:
        return os.path.join(self.pid_dir, f"zorp-{self.name}.pid")

    @property
    def socket_path(self) -> str:
        """Where the control socket is."""
        return os.path.join(self.pid_dir, f"zorpctl.{self.name}")

    @property
    def kzorpd_path(self) -> str:
        """Where the control socket of kzorpd is."""
        return kzorpd_socket(self.kzorpd_dir)

    def worker_pid(self) -> int | None:
        """Return the number in the pid file; None when there is none that makes sense."""
        try:
            descriptor = os.open(self.pid_path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return None
            text = os.read(descriptor, _PID_FILE_BYTES).decode("ascii", "replace").strip()
        finally:
            os.close(descriptor)
        return int(text) if text.isascii() and text.isdigit() and int(text) > 1 else None

    def master_pid(self) -> int | None:
        """Return the pid of the instance's master, None when it does not run."""
        return lock_holder(self.pid_path + ".lock")

    def is_running(self) -> bool:
        """True when the master lives."""
        return self.master_pid() is not None

    def remove_files(self) -> None:
        """Take away what a killed process left behind."""
        for path in (self.pid_path, self.socket_path):
            with contextlib.suppress(OSError):
                os.unlink(path)


def lock_holder(path: str) -> int | None:
    """Return the pid of whoever holds an exclusive flock() on a file, or None."""
    try:
        status = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
        fields = line.split()
        if len(fields) >= 6 and fields[1:4] == ["FLOCK", "ADVISORY", "WRITE"] and fields[5] == wanted:
            return int(fields[4]) if int(fields[4]) > 0 else None
    return None


def with_pid_file(pid_dir: str, kzorpd_dir: str = KZORPD_DIR) -> list[Process]:
    """Return a process for every pid file in the directory, and for every held lock, sorted by name.

    In the process mode systemd-notify there is no pid file.
    """
    try:
        names = os.listdir(pid_dir)
    except OSError:
        return []
    found = set()
    for match in filter(None, map(_PID_FILE.fullmatch, names)):
        process = Process(match[1], pid_dir, kzorpd_dir)
        if match[2] is None or process.is_running():
            found.add(process)
    return sorted(found, key=lambda process: natural(process.name))


def natural(name: str) -> tuple[str, int]:
    """Sort key: NAME#2 before NAME#10."""
    base, _, number = name.partition("#")
    return base, int(number) if number.isascii() and number.isdigit() else -1
