"""What users without privileges see: a function run as one of them, and directories that let them in."""

from __future__ import annotations

import os
import pathlib
import pickle
import signal
import stat
import tempfile
import traceback

NOBODY = 65534
_DEADLINE_S = 20


def let_everybody_in(directory: pathlib.Path) -> None:
    """Let every user of the host reach a directory of a test, wherever pytest keeps those."""
    for each in (directory, *directory.parents):
        mode = stat.S_IMODE(each.stat().st_mode)
        if not mode & stat.S_IXOTH and each.is_relative_to(tempfile.gettempdir()):
            each.chmod(mode | 0o055)


def run_unprivileged(function):
    """Return function() as a user without privileges sees it; raises AssertionError with the child's traceback.

    The child is a fork, so the function sees everything that exists here, listening sockets too.
    What it returns must be picklable.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(function, writing)
    os.close(writing)
    with open(reading, "rb") as answer:
        data = answer.read()
    os.waitpid(pid, 0)
    failed, value = pickle.loads(data)
    assert not failed, value
    return value


def _child(function, writing):
    status = 1
    try:
        signal.alarm(_DEADLINE_S)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)      # with the last root id all capabilities go
        try:
            answer = (False, function())
        except BaseException:
            answer = (True, traceback.format_exc())
        with open(writing, "wb") as pipe:
            pipe.write(pickle.dumps(answer))
        status = 0
    finally:
        os._exit(status)
