"""Run what loads a policy in a child, and believe only what the child reports when it is done.

Theory of operation
    The exit status of a process that ran a policy says nothing: os._exit(0) is one line.  The
    child therefore reports over a pipe when its work is done, and no report is a failure,
    whatever the status.  Threads that the policy left behind end with the child; what it prints
    goes to standard error, so that standard output has the result alone.  A child that takes
    longer than DEADLINE_S is killed.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable

from Zorp import Log
from Zorp.runtime.uncaught import log_uncaught
from Zorp.runtime.worker import die_with_parent

DEADLINE_S = 300.0
_READ_BYTES = 65_536


class NoReport(Exception):
    """The child ended without a report; `str()` says how."""


def in_child(work: Callable[[], object], deadline_s: float = DEADLINE_S) -> object:
    """Return what work() returns in a child, plain data.  Raises NoReport."""
    sys.stdout.flush()
    sys.stderr.flush()
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _be_child(work, parent, read_end, write_end)
    os.close(write_end)
    try:
        data = _read_until_end(pid, read_end, deadline_s)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    finally:
        os.close(read_end)
    status = os.waitpid(pid, 0)[1]
    if not data.endswith(b"\n"):
        raise NoReport(f"ended by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status)
                       else f"ended with status {os.WEXITSTATUS(status)}")
    return json.loads(data)


def _be_child(work: Callable[[], object], parent: int, read_end: int, write_end: int) -> None:
    try:
        os.close(read_end)
        die_with_parent(parent)
        log_uncaught()
        os.dup2(2, 1)
        report = json.dumps(work()).encode() + b"\n"
        while report:
            report = report[os.write(write_end, report):]
    except BaseException:                # ours: the parent says that there was no report
        Log.log_exception(None, 0)
    finally:
        os._exit(0)


def _read_until_end(pid: int, read_end: int, deadline_s: float) -> bytearray:
    """Return what comes until the child has ended: whoever else holds the pipe does not count.  Raises NoReport."""
    os.set_blocking(read_end, False)
    ends = time.monotonic() + deadline_s
    data = bytearray()
    child = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(child, select.POLLIN)
        poll.register(read_end, select.POLLIN)
        while True:
            ready = dict(poll.poll(max(0, ends - time.monotonic()) * 1000))
            if not ready:
                raise NoReport(f"took longer than {deadline_s:.0f} seconds")
            if not _drain(read_end, data) and child not in ready:
                poll.unregister(read_end)        # closed by the child, which lives on
            if child in ready:
                return data
    finally:
        os.close(child)


def _drain(descriptor: int, data: bytearray) -> bool:
    """Read what is there; False at the end."""
    try:
        while part := os.read(descriptor, _READ_BYTES):
            data += part
    except BlockingIOError:
        return True
    return False
