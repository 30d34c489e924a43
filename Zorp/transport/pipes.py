"""Pipes through which a relay moves bytes inside the kernel: borrowed, drained, given back.

Theory of operation
    A direction of a relay takes a pipe when it has something to move and gives it back as soon
    as it is empty again, so that the number of pipes follows the number of peers that do not
    take what waits for them, not the number of connections.  take() answers None when all pipes
    are in use, and for a while after the host refused one or gave one that is too small (what a
    user may have in pipes is limited: pipe-user-pages-soft of proc(5)).  The relay copies then.

    A pipe with bytes inside is never given back but discarded: nobody else's connection may
    ever see them.

Threads
    Any thread may call.  _pipes_lock guards everything below it.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

PIPE_BYTES = 1_048_576           # the most that the kernel gives to anyone; 512 KiB cost 10 to 50 % more CPU per GB
LEAST_PIPE_BYTES = 65_536        # smaller ones are slower than copying
MOST_PIPES = 32                  # of PIPE_BYTES: half of what a user may have by default
MOST_IDLE = 16
_PAUSE_S = 1.0                   # between attempts after the host refused


class Pipe(NamedTuple):
    """Both ends, as descriptors."""

    reader: int
    writer: int


class PipePool:
    """The pipes of this process, at most `most`."""

    def __init__(self, most: int = MOST_PIPES, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._pipes_lock = threading.Lock()
        self._idle: list[Pipe] = []
        self._open = 0                           # idle ones and borrowed ones
        self._not_before_s = 0.0

    def take(self) -> Pipe | None:
        """Return an empty pipe, None when there is none to be had."""
        with self._pipes_lock:
            if self._idle:
                return self._idle.pop()
            if self._open >= self._most or self._clock() < self._not_before_s:
                return None
            pipe = _new_pipe()
            if pipe is None:
                self._not_before_s = self._clock() + _PAUSE_S
            else:
                self._open += 1
            return pipe

    def give_back(self, pipe: Pipe) -> None:
        """Take back an empty pipe."""
        with self._pipes_lock:
            if len(self._idle) < MOST_IDLE:
                self._idle.append(pipe)
                return
        self.discard(pipe)

    def discard(self, pipe: Pipe) -> None:
        """Close a borrowed pipe, and what is in it with it."""
        with self._pipes_lock:
            self._open -= 1
        _close(pipe)


def _new_pipe() -> Pipe | None:
    """Return a pipe of a useful size, None when the host does not give one."""
    try:
        pipe = Pipe(*os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        return None
    try:
        fcntl.fcntl(pipe.writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    except OSError:                              # beyond the allowance: what it has may still do
        if fcntl.fcntl(pipe.writer, fcntl.F_GETPIPE_SZ) < LEAST_PIPE_BYTES:
            _close(pipe)
            return None
    return pipe


def _close(pipe: Pipe) -> None:
    os.close(pipe.reader)
    os.close(pipe.writer)


pipes = PipePool()
