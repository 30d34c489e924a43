"""Processes that a test's programs have started, found by a word in their command line."""

from __future__ import annotations

import contextlib
import pathlib
import uuid

from test.support.daemon import wait_until


def new_mark() -> str:
    """Return a word that no other process has in its command line."""
    return f"mark{uuid.uuid4().hex}"


def processes(mark: str) -> list[int]:
    """Return the pids of living processes, zombies not counted, with this word in their command line."""
    found = []
    for directory in pathlib.Path("/proc").iterdir():
        if directory.name.isdigit():
            with contextlib.suppress(OSError):
                if mark.encode() in (directory / "cmdline").read_bytes():
                    found.append(int(directory.name))
    return found


def wait_until_gone(mark: str) -> None:
    """Fail the test when such processes still live after half a minute."""
    wait_until(lambda: not processes(mark), f"the end of the processes {processes(mark)}")


def session_of(leader: int) -> list[int]:
    """Return the pids of living processes in the session of this one: a daemon in the foreground and its workers."""
    found = []
    for directory in pathlib.Path("/proc").iterdir():
        if directory.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (directory / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z" and int(fields[3]) == leader:
                    found.append(int(directory.name))
    return found


def zombies_of(parent: int) -> list[int]:
    """Return the pids of this process's children that have ended and were not reaped."""
    found = []
    for directory in pathlib.Path("/proc").iterdir():
        if directory.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (directory / "stat").read_text().rpartition(")")[2].split()
                if fields[0] == "Z" and int(fields[1]) == parent:
                    found.append(int(directory.name))
    return found
