"""The moment between two policies: old workers have been told to stop accepting, new ones not yet to begin."""

import os
import signal

from test.runtime.policies import ECHO
from test.support.daemon import wait_until


def children(pid: int) -> set[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return set(map(int, file.read().split()))


def test_new_workers_that_die_while_an_old_one_hands_over_are_replaced(zorp):
    # given two old workers, one of which does not take orders, and a reload
    daemon = zorp(ECHO, arguments=["--num-of-processes", "2"], word="old")
    daemon.log.wait_for("core.info", 4, "Accepting connections", count=2)
    frozen, other = daemon.worker_pid(0), daemon.worker_pid(1)
    os.kill(frozen, signal.SIGSTOP)
    daemon.write_policy(ECHO, word="new")
    daemon.kill(signal.SIGHUP)
    # when the other has handed over and ended, and the new ones are killed before the first has
    wait_until(lambda: other not in children(daemon.pid), "the end of the other old worker")
    daemon.write_policy("a draft")
    mark = daemon.log.mark()
    for new in children(daemon.pid) - {frozen}:
        os.kill(new, signal.SIGKILL)
    os.kill(frozen, signal.SIGCONT)
    # then each is replaced by one that follows the policy of the reload, whatever lies on disk
    daemon.log.wait_for("core.info", 4, "Accepting connections", after=mark, count=2)
    wait_until(lambda: frozen not in children(daemon.pid), "the end of the first old worker")
    with daemon.connect() as client:
        assert client.recv(100).startswith(b"new ")
    assert {daemon.worker_pid(0), daemon.worker_pid(1)} == children(daemon.pid)
    with daemon.control(0) as control:
        assert control.ask("RELOAD RESULT") == "OK Reload successful"
