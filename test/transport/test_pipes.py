"""The pool of pipes: bounded, patient, and no pipe is ever given back full."""

from __future__ import annotations

import fcntl
import os

import pytest

from Zorp.transport import pipes
from Zorp.transport.pipes import LEAST_PIPE_BYTES, PipePool


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


def is_open(descriptor):
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def test_there_are_no_more_than_agreed():
    # given a pool of two, both borrowed
    pool = PipePool(most=2)
    first, second = pool.take(), pool.take()
    # when a third is wanted
    # then there is none until one goes back or is closed
    assert pool.take() is None
    pool.give_back(first)
    assert pool.take() == first
    pool.discard(second)
    third = pool.take()
    assert third is not None
    for pipe in (first, third):
        pool.discard(pipe)


def test_pipes_do_not_block_and_do_not_leak_into_programs():
    pool = PipePool()
    pipe = pool.take()
    for end in pipe:
        assert not os.get_blocking(end)
        assert not os.get_inheritable(end)
    pool.discard(pipe)
    assert not is_open(pipe.reader)
    assert not is_open(pipe.writer)


def test_few_idle_pipes_are_kept():
    pool = PipePool(most=40)
    taken = [pool.take() for _ in range(40)]
    for pipe in taken:
        pool.give_back(pipe)
    assert sum(is_open(pipe.reader) for pipe in taken) == 16
    for pipe in [pool.take() for _ in range(16)]:
        pool.discard(pipe)


def test_a_host_that_refuses_is_not_asked_again_at_once(monkeypatch):
    # given a host without descriptors
    clock, asked = Clock(), []

    def pipe2(flags):
        asked.append(flags)
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(pipes.os, "pipe2", pipe2)
    pool = PipePool(clock=clock)
    # when pipes are wanted again and again
    assert pool.take() is None
    assert pool.take() is None
    # then the host was asked once, and once more later
    assert len(asked) == 1
    clock.now_s += 1.0
    assert pool.take() is None
    assert len(asked) == 2


@pytest.mark.parametrize(("size", "useful"), [(LEAST_PIPE_BYTES, True), (8192, False)])
def test_beyond_the_allowance_of_the_user(monkeypatch, size, useful):
    # given a user whose pipes cannot grow any more
    real = fcntl.fcntl

    def allowance_spent(descriptor, command, argument=0):
        if command == fcntl.F_SETPIPE_SZ:
            raise PermissionError(1, "Operation not permitted")
        return size if command == fcntl.F_GETPIPE_SZ else real(descriptor, command, argument)

    monkeypatch.setattr(pipes.fcntl, "fcntl", allowance_spent)
    pool = PipePool()
    # when a pipe is wanted
    pipe = pool.take()
    # then a pipe of the usual size will do, a tiny one will not
    assert (pipe is not None) == useful
    if pipe is not None:
        pool.discard(pipe)
