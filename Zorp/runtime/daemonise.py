"""Leave the terminal, and let the command that started us know how it went.

Theory of operation
    In the detached modes the command forks.  The child becomes the master; the command waits at
    a pipe and exits with the number that comes through it, so its exit status is the result of
    the first start: 0, 1 (set-up) or 2 (policy).  A child that dies without a word means 1.

    The child uses python-daemon for what every daemon does: close inherited descriptors, change
    directory and file mode mask, forbid core dumps.  It must not fork again (we just did) nor
    change user (capabilities have to survive that, Zorp.runtime.privileges).  Standard output
    and error stay those of the command until the start has succeeded, so that the reason of a
    failure reaches whoever typed it; then they become /dev/null.

    python-daemon's pid file lock is not used: a lock that is a file knows nothing of the death
    of its owner.  See Zorp.runtime.pidfile.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

import daemon

from Zorp.runtime.options import Options

_FILE_MODE_MASK = 0o027
_ARG_START, _ARG_END = 45, 46    # fields of /proc/self/stat, counted after the name's ")"


class StartReport:
    """Tells whoever waits how the first start went; this one, that nobody waits."""

    def __call__(self, status: int) -> None:
        """In the foreground the exit status says it."""

    def close(self) -> None:
        """Let go of it, in a child of the master."""


class _PipeReport(StartReport):
    """The report to the command that waits at a pipe."""

    def __init__(self, write_end: int) -> None:
        self._write_end = write_end

    def __call__(self, status: int) -> None:
        if status == 0:
            silence()
        with contextlib.suppress(OSError):       # the command may have been interrupted
            os.write(self._write_end, b"%d\n" % status)
        self.close()

    def close(self) -> None:
        if self._write_end >= 0:
            os.close(self._write_end)
            self._write_end = -1


def detach(options: Options) -> StartReport:
    """Fork; in the child return the report, to be made once.  The parent never returns.

    The parent exits with the reported status.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    read_end, write_end = os.pipe()
    if os.fork():
        os.close(write_end)
        os._exit(_awaited_status(read_end))
    os.close(read_end)
    os.setsid()
    context = daemon.DaemonContext(
        detach_process=False, files_preserve=[write_end], prevent_core=not options.enable_core,
        working_directory=working_directory(options), umask=_FILE_MODE_MASK, signal_map={},
        stdin=None, stdout=sys.stdout, stderr=sys.stderr)
    context.open()

    return _PipeReport(write_end)


def _awaited_status(read_end: int) -> int:
    text = b""
    while not text.endswith(b"\n"):
        try:
            part = os.read(read_end, 16)
        except InterruptedError:
            continue
        if not part:
            return 1
        text += part
    return int(text)


def working_directory(options: Options) -> str:
    """Where a detached instance lives: the directory for core files, else the root."""
    cores = os.path.join(options.state_dir, "cores")
    return cores if os.path.isdir(cores) else "/"


def occupy_standard_descriptors() -> None:
    """Open those of 0, 1, 2 that are closed: no file of ours may be where others write what they have to say."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))


def silence() -> None:
    """Give standard input, output and error to /dev/null."""
    sys.stdout.flush()
    sys.stderr.flush()
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    if nothing > 2:
        os.close(nothing)


class ProcessTitle:
    """The command line that the process list shows: who is who among the processes of an instance."""

    def __init__(self) -> None:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as stat:
            fields = stat.read().rpartition(")")[2].split()
        self._start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
        self._room = end - self._start if self._start else 0

    def show(self, *words: str) -> None:
        """Show these words, cut to the room that the command line took."""
        if self._room > 1:
            text = "\0".join(words).encode("utf-8", "surrogateescape")
            ctypes.memmove(self._start, text[:self._room - 1].ljust(self._room, b"\0"), self._room)

    def show_master(self, name: str) -> None:
        """Show the supervisor of an instance."""
        self.show(f"zorp: supervising {name}")

    def show_worker(self, name: str, is_master: bool) -> None:
        """Show a worker with the whole command line, as it would be if it were started by itself."""
        role = ["--master" if is_master else "--slave", name] if "#" in name else []
        self.show("zorp", *role, *(_without_role(sys.argv[1:]) if role else sys.argv[1:]))


def _without_role(words: list[str]) -> Iterator[str]:
    """Yield the words of a command line but for --master and --slave."""
    rest = iter(words)
    for word in rest:
        option, equals, _ = word.partition("=")
        if option not in ("--master", "--slave"):
            yield word
        elif not equals:
            next(rest, None)


title = ProcessTitle()
