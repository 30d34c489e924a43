"""A program of the host on prepared sockets: started clean, watched by its pid descriptor, killed whole.

Theory of operation
    start() runs `/bin/sh -c COMMAND` by posix_spawn: no Python code runs between fork and exec,
    which a process with many threads could not survive.  The program gets

        0, 1, 3      the sockets it is given
        2            the write side of a pipe, for its complaints
        nothing else descriptors of ours are closed at exec; those that are not are listed and closed

    and a session, so a process group, of its own, default signals, the environment it is given
    and every CPU that this process was given; user and groups are ours, but capabilities it has
    none, also as user 0, and no set-user-id program gives it any.  Capabilities belong to threads,
    so the program is started by a thread that lives for this and lets go of everything before.

    The program's leader stays a zombie until end(): as long as it is not reaped its number cannot
    belong to anybody else, and killing the group can hit nobody else.  end() kills what is left
    of the group, TERM first, KILL after a grace, and reaps.

    A process that leaves the group (setsid) is out of reach; whoever stacks such a program wants
    it to stay.

Threads
    has_ended(), status() and end() may be called by several threads: _reap_lock guards _status
    and _reaped.  No log and no policy here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import select
import signal
import socket
import threading
from collections.abc import Mapping
from typing import NamedTuple

from Zorp.process.capabilities import without_privileges
from Zorp.transport.cpus import home

SHELL = "/bin/sh"
_CONTROL_FD = 3
_FIRST_FREE_FD = 10              # sources of dup2() must lie above the targets
DYING_MS = 20                   # its sockets are closed a moment before its status can be read
_SIGNALS = range(1, 32)          # those with a name; the others are never ignored or caught here


class ProgramLimits(NamedTuple):
    """What a program may use; 0: as much as it likes."""

    cpu_s: int = 0
    memory_bytes: int = 0            # address space of each process


class Program:
    """One running program.

    errors      read side of its standard error; the caller's to read and close
    pid         of the leader, which is also the number of session and process group
    """

    def __init__(self, pid: int, errors: int) -> None:
        self.pid = pid
        self.errors = errors
        self.pidfd = os.pidfd_open(pid)
        self._reap_lock = threading.Lock()
        self._status: int | None = None
        self._reaped = False

    def has_ended(self, wait_ms: int = 0) -> bool:
        """Tell whether the leader has ended, after waiting for that at most `wait_ms`."""
        with self._reap_lock:
            if self._reaped:
                return True
            poll = select.poll()
            poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(wait_ms))

    def status(self) -> int | None:
        """Return the leader's exit status, minus the number of the signal that killed it; None: it runs."""
        with self._reap_lock:
            if self._status is None and not self._reaped:
                found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if found is not None:
                    self._status = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
            return self._status

    def end(self, grace_s: float) -> int | None:
        """Kill every process of the group and reap the leader; return the status that it had before, if any.

        A leader that still runs is asked with TERM first and has `grace_s`.  A second call does nothing.
        """
        self.has_ended(DYING_MS)
        status = self.status()
        with self._reap_lock:
            if self._reaped:
                return status
            if status is None:
                self._signal(signal.SIGTERM)
                poll = select.poll()
                poll.register(self.pidfd, select.POLLIN)
                poll.poll(grace_s * 1000)
            self._signal(signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
            self._reaped = True
            os.close(self.pidfd)
        return status

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


def start(command: str, stdin: socket.socket, stdout: socket.socket, control: socket.socket,
          environment: Mapping[str, str], limits: ProgramLimits) -> Program:
    """Start a program; the sockets stay the caller's, to be closed.  Raises OSError."""
    errors, errors_of_program = os.pipe()
    sources: list[int] = []
    try:
        sources += [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE_FD)
                    for fd in (stdin.fileno(), stdout.fileno(), errors_of_program, control.fileno())]
        actions = [(os.POSIX_SPAWN_CLOSE, fd) for fd in _inheritable()]
        actions += [(os.POSIX_SPAWN_DUP2, source, target) for target, source in enumerate(sources)]
        pid = _Spawning([SHELL, "-c", command], dict(environment), actions).result()
        program = _watched(pid, errors)
    except BaseException:
        os.close(errors)
        raise
    finally:
        for fd in (*sources, errors_of_program):
            os.close(fd)
    _limit(pid, limits)
    return program


def _watched(pid: int, errors: int) -> Program:
    """Return the program that was started; raises OSError, and kills it, when it cannot be watched."""
    try:
        return Program(pid, errors)
    except OSError:                                  # no descriptor is left
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


class _Spawning(threading.Thread):
    """The thread that starts one program."""

    def __init__(self, argv: list[str], environment: dict[str, str], actions: list[tuple]) -> None:
        super().__init__(name="spawning", daemon=True)
        self._argv, self._environment, self._actions = argv, environment, actions
        self._pid = 0
        self._problem: OSError | None = None

    def run(self) -> None:
        try:
            without_privileges()
            with home.away():
                self._pid = os.posix_spawn(self._argv[0], self._argv, self._environment, file_actions=self._actions,
                                           setsid=True, setsigmask=(), setsigdef=_SIGNALS)
        except OSError as problem:
            self._problem = problem
        except ValueError as problem:                # text that no program can be given
            self._problem = OSError(errno.EINVAL, str(problem))

    def result(self) -> int:
        """Start the program and return its pid; raises OSError."""
        try:
            self.start()
        except RuntimeError as problem:              # the host has no thread left
            raise OSError(errno.EAGAIN, str(problem)) from None
        self.join()
        if self._problem is not None:
            raise self._problem
        return self._pid


def _inheritable() -> list[int]:
    """Return the descriptors above the four that a program would get without being meant to."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        with contextlib.suppress(OSError):           # the directory itself, or closed meanwhile
            if fd > _CONTROL_FD and os.get_inheritable(fd):
                found.append(fd)
    return found


def _limit(pid: int, limits: ProgramLimits) -> None:
    for what, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_CPU, limits.cpu_s or None),
                        (resource.RLIMIT_AS, limits.memory_bytes or None)):
        if value is not None:
            with contextlib.suppress(OSError):       # it has ended already
                resource.prlimit(pid, what, (value, value))
