"""The child that loads a policy, where this process has no room for it."""

from __future__ import annotations

import errno
import os

import pytest

from Zorp.netfilter.policies import Child, PolicyUnusable
from Zorp.wire.instances_conf import InstanceLine


@pytest.mark.parametrize("lacking", ["memfd_create", "pidfd_open"])
def test_a_child_that_cannot_be_watched_is_no_child_and_leaves_nothing(monkeypatch, lacking):
    # given a program that would go on, and a process without a descriptor to spare at some point
    real, made = getattr(os, lacking), []

    def none_left(*arguments):
        made.append(arguments)
        if lacking == "memfd_create" and len(made) == 1:
            return real(*arguments)
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, lacking, none_left)
    before = sorted(os.listdir("/proc/self/fd"))
    # when it is started
    with pytest.raises(PolicyUnusable, match="Too many open files"):
        Child(InstanceLine(name="i", zorp_args=()), ("/bin/sh", "-c", "exec sleep 300"))
    # then neither descriptors nor a process are left
    assert sorted(os.listdir("/proc/self/fd")) == before
    if lacking == "pidfd_open":
        with pytest.raises(ProcessLookupError):
            os.kill(made[0][0], 0)
