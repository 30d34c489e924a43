"""Several workers side by side: --num-of-processes."""

import os
import pathlib
import signal

from test.runtime.policies import ECHO
from test.support.daemon import wait_until


def test_the_process_list_tells_who_is_who(zorp):
    daemon = zorp(ECHO, arguments=["--num-of-processes", "2"])

    def words(pid):
        return pathlib.Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")

    assert words(daemon.pid) == ["zorp: supervising intra#0"]
    assert words(daemon.worker_pid(0))[:5] == ["zorp", "--master", "intra#0", "--as", "intra"]
    assert words(daemon.worker_pid(1))[:5] == ["zorp", "--slave", "intra#1", "--as", "intra"]


def test_two_workers_share_the_port_and_have_their_own_names(zorp):
    # given an instance of two processes
    daemon = zorp(ECHO, arguments=["--num-of-processes", "2"])
    daemon.log.wait_for("core.info", 4, "Accepting connections", process="intra#1")
    # when clients come until both have served
    seen: dict[str, int] = {}

    def both_have_served() -> bool:
        clients = [daemon.connect() for _ in range(8)]
        for client in clients:
            _word, session, pid = client.recv(100).split()
            seen[session.split(b"/")[1].decode()] = int(pid)
        return len(seen) == 2

    wait_until(both_have_served, "both workers")
    # then the pid files name them, and the session ids differ
    assert seen == {"intra#0": daemon.worker_pid(0), "intra#1": daemon.worker_pid(1)}
    # and each has a control socket of its own
    for number in (0, 1):
        with daemon.control(number) as control:
            assert control.ask("GETVALUE info.process") == f"intra#{number}"
            assert control.ask("GETVALUE info.pid") == str(daemon.worker_pid(number))


def test_one_is_the_master_of_the_policy(zorp):
    daemon = zorp('''
        from Zorp.Core import *
        def init(names, virtual_name, is_master):
            log(None, "my.tag", 2, "init; name='%s', is_master='%d'", (virtual_name, is_master))
            return TRUE
        ''', arguments=["--num-of-processes", "2"])
    daemon.log.wait_for("my.tag", name="intra#0", is_master="1")
    daemon.log.wait_for("my.tag", name="intra#1", is_master="0")


def test_while_one_worker_is_dead_the_other_serves(zorp):
    # given two workers; when one is killed
    daemon = zorp(ECHO, arguments=["--num-of-processes", "2"])
    dead = daemon.worker_pid(0)
    os.kill(dead, signal.SIGKILL)
    # then every client is served, before and after its successor is there
    for _ in range(20):
        assert daemon.connect().recv(100)
    wait_until(lambda: daemon.worker_pid(0) != dead, "the successor")


def test_a_hung_worker_is_not_hidden_by_its_healthy_neighbour(zorp):
    daemon = zorp(ECHO, arguments=["--num-of-processes", "2", "--deadlock-check-timeout", "1"])
    wait_until(lambda: daemon.pid_file(1).exists(), "the second worker")
    hung = daemon.worker_pid(1)
    os.kill(hung, signal.SIGSTOP)
    wait_until(lambda: daemon.worker_pid(1) != hung, "its replacement", timeout_s=15)


def test_a_reload_replaces_all_or_none(zorp):
    # given a policy that fails in the second process only
    daemon = zorp(ECHO, arguments=["--num-of-processes", "2"])
    wait_until(lambda: daemon.pid_file(1).exists(), "the second worker")
    before = [daemon.worker_pid(0), daemon.worker_pid(1)]
    daemon.write_policy(ECHO.replace("Globals.instance_name = names[0]",
                                     "assert virtual_name != 'intra#1'; Globals.instance_name = names[0]"))
    # when it is loaded
    with daemon.control(0) as control:
        assert control.ask("RELOAD WAIT").startswith("FAIL")
    # then neither worker has changed
    assert [daemon.worker_pid(0), daemon.worker_pid(1)] == before


def test_a_worker_that_has_handed_over_may_leave_before_its_neighbour_has(zorp):
    # given a reload of two workers, one of which takes its time to hand over
    daemon = zorp(ECHO, arguments=["--num-of-processes", "2"])
    wait_until(lambda: daemon.pid_file(1).exists(), "the second worker")
    quick, slow = before = [daemon.worker_pid(0), daemon.worker_pid(1)]
    os.kill(slow, signal.SIGSTOP)
    mark = daemon.log.mark()
    daemon.kill(signal.SIGHUP)
    # when the other has handed over and left, and then the slow one hands over too
    wait_until(lambda: not pathlib.Path(f"/proc/{quick}").exists(), "the end of the first worker")
    os.kill(slow, signal.SIGCONT)
    daemon.log.wait_for("core.info", 3, "Policy reloaded", after=mark)
    # then nobody has crashed, and both have successors
    wait_until(lambda: not {daemon.worker_pid(0), daemon.worker_pid(1)} & {*before, None}, "the successors")
    assert "Daemon exited" not in daemon.log.text()


def test_a_worker_killed_while_it_should_hand_over_holds_up_nobody(zorp):
    daemon = zorp(ECHO, arguments=["--num-of-processes", "2"])
    wait_until(lambda: daemon.pid_file(1).exists(), "the second worker")
    before = [daemon.worker_pid(0), daemon.worker_pid(1)]
    os.kill(before[1], signal.SIGSTOP)
    mark = daemon.log.mark()
    daemon.kill(signal.SIGHUP)
    wait_until(lambda: not pathlib.Path(f"/proc/{before[0]}").exists(), "the end of the first worker")
    os.kill(before[1], signal.SIGKILL)
    daemon.log.wait_for("core.info", 3, "Policy reloaded", after=mark, timeout_s=4)    # it would be waited for five
    assert daemon.connect().recv(100)
