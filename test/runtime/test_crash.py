"""Workers that crash, hang or lose their master."""

import itertools
import json
import os
import resource
import signal
import time

import pytest

from test.runtime.policies import ECHO
from test.support.daemon import wait_until

SUPERVISED = ["--restart-interval", "60", "--restart-max", "5"]


def is_gone(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def reported(daemon, text: str) -> str:
    """Wait for a message of the supervisor; return the line."""
    def look() -> str:
        lines = daemon.log.text().splitlines()
        return next((line for line in lines if line.startswith("intra: ") and text in line), "")

    return wait_until(look, f"the message {text!r}")


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_crashed_worker_is_replaced(zorp, number):
    # given a running instance; when its worker is killed
    daemon = zorp(ECHO)
    before = daemon.worker_pid()
    daemon.kill(number, worker=True)
    wait_until(lambda: is_gone(before), "the end of the worker")
    # then a client that connects at once is served by the next worker, whose pid the file holds
    client = daemon.connect()
    _word, _session, pid = client.recv(100).split()
    assert int(pid) != before
    assert daemon.worker_pid() == int(pid)
    assert reported(daemon, "Daemon exited due to a signal, restarting").endswith(f"exitcode='{int(number)}'")


def test_every_line_of_a_structured_log_is_a_record_also_the_supervisors(zorp):
    # given JSON on standard error, and an option with a complaint
    daemon = zorp(ECHO, arguments=["--log-format", "json", "--tproxy", "netfilter", "--stack-size", "1"])
    # when a worker crashes and is replaced
    before = daemon.worker_pid()
    daemon.kill(signal.SIGSEGV, worker=True)
    wait_until(lambda: daemon.worker_pid() != before, "the next worker")
    assert daemon.stop() == 0
    # then everything that was said is a record
    records = [json.loads(line) for line in daemon.log.text().splitlines()]
    said = {record["message"]: record["level"] for record in records}
    assert said["Daemon exited due to a signal, restarting"] == 0
    assert said["Obsolete command line option ignored"] == 2
    assert said["Value of --stack-size must be 64 to 65536, ignored"] == 2
    assert said["Shutting down"] == 3


def test_a_worker_that_exits_with_an_error_is_replaced(zorp):
    daemon = zorp(ECHO)
    client = daemon.connect()
    client.recv(100)
    client.sendall(b"exit\n")
    reported(daemon, "Daemon exited due to a failure, restarting; exitcode='768'")
    assert daemon.connect().recv(100)


def test_after_too_many_crashes_the_instance_gives_up(zorp):
    # given a budget of two starts; when the worker crashes twice
    daemon = zorp(ECHO, arguments=["--restart-max", "2"])
    daemon.kill(signal.SIGSEGV, worker=True)
    daemon.log.wait_for("core.info", 4, "Accepting connections", count=2)
    daemon.kill(signal.SIGSEGV, worker=True)
    # then the instance ends, and says so
    assert daemon.wait() == 1
    assert "not restarting; exitcode='11', restart_count='2'" in daemon.log.text()
    assert not daemon.pid_file().exists()


def test_reloads_use_up_no_restarts(zorp):
    # given a budget of two starts, and more reloads than that
    daemon = zorp(ECHO, arguments=["--restart-max", "2"])
    for _ in range(3):
        daemon.reload()
    # when the worker crashes, then it is replaced
    before = daemon.worker_pid()
    daemon.kill(signal.SIGKILL, worker=True)
    wait_until(lambda: daemon.worker_pid() not in (None, before), "the next worker")
    assert daemon.connect().recv(100)
    # and the budget ends where it would have without reloads
    daemon.reload()
    daemon.kill(signal.SIGKILL, worker=True)
    assert daemon.wait() == 1
    assert "not restarting; exitcode='9', restart_count='2'" in daemon.log.text()


def test_the_failure_hook_is_told(zorp, tmp_path):
    # given a hook that writes down its arguments
    hook = tmp_path / "hook"
    hook.write_text(f'#!/bin/sh\nfor argument; do echo "$argument"; done > {tmp_path}/told.new\n'
                    f"mv {tmp_path}/told.new {tmp_path}/told\n")
    hook.chmod(0o755)
    daemon = zorp(ECHO, arguments=["--failure-hook", str(hook)])
    daemon.kill(signal.SIGSEGV, worker=True)
    # then it gets name, chroot, directory, pid file, cwd, caps, reason, detail, restarting
    wait_until((tmp_path / "told").exists, "the hook")
    told = (tmp_path / "told").read_text().splitlines()
    assert told[0] == "intra"
    assert told[1] == "(null)"
    assert told[3] == str(daemon.pid_file())
    assert told[6:] == ["signalled", "11; supressed_notifications=0", "restarting"]


def test_no_worker_outlives_its_master(zorp):
    # given a session; when the master is killed without a chance to say so
    daemon = zorp(ECHO)
    client = daemon.connect()
    client.recv(100)
    worker = daemon.worker_pid()
    daemon.kill(signal.SIGKILL)
    # then the worker is gone, and the session with it
    wait_until(lambda: is_gone(worker), "the end of the worker")
    assert client.recv(100) == b""


def test_a_stopped_worker_is_found_and_replaced(zorp):
    # given a check every second; when the worker is stopped
    daemon = zorp(ECHO, arguments=["--deadlock-check-timeout", "1"])
    before = daemon.worker_pid()
    os.kill(before, signal.SIGSTOP)
    # then it is killed after its grace and replaced
    reported(daemon, "Daemon deadlock detected, killing process;")
    wait_until(lambda: daemon.worker_pid() != before, "the next worker", timeout_s=15)
    reported(daemon, "Daemon exited due to a deadlock, restarting")
    assert daemon.connect().recv(100)


def test_a_frozen_interpreter_is_found_too(zorp):
    # given a session that holds the interpreter for an hour
    daemon = zorp(ECHO, arguments=["--deadlock-check-timeout", "1"])
    client = daemon.connect()
    client.recv(100)
    client.sendall(b"freeze\n")
    reported(daemon, "Daemon deadlock detected, killing process;")


def test_the_check_can_be_switched_off(zorp):
    # given the check switched off over the control socket
    daemon = zorp(ECHO, arguments=["--deadlock-check-timeout", "1"])
    with daemon.control() as control:
        assert control.ask("DEADLOCKCHECK GET") == "OK 1"
        assert control.ask("DEADLOCKCHECK DISABLE") == "OK"
        assert control.ask("DEADLOCKCHECK GET") == "OK 0"
        # when the worker is stopped for more than two periods
        before = daemon.worker_pid()
        os.kill(before, signal.SIGSTOP)
        time.sleep(2.5)
        # then nobody cares
        assert "deadlock detected" not in daemon.log.text()
        # and when it is switched on again, somebody does
        assert control.ask("DEADLOCKCHECK ENABLE") == "OK"
        reported(daemon, "Daemon deadlock detected, killing process;")




@pytest.mark.parametrize("state", ["stopped", "frozen"])
def test_a_worker_that_cannot_look_dies_with_its_master_too(zorp, state):
    # given a worker whose loop does not turn
    daemon = zorp(ECHO)
    worker = daemon.worker_pid()
    client = daemon.connect()
    client.recv(100)
    if state == "stopped":
        os.kill(worker, signal.SIGSTOP)
    else:
        client.sendall(b"freeze\n")
        wait_until(lambda: is_silent(daemon), "the worker to freeze")
    # when the master is killed, then the kernel ends the worker
    daemon.kill(signal.SIGKILL)
    wait_until(lambda: is_gone(worker), "the end of the worker")


def is_silent(daemon) -> bool:
    """True when the worker's loop does not answer any more."""
    with daemon.control() as control:
        control._socket.settimeout(0.3)
        try:
            return not control.ask("GETVALUE info.pid")
        except TimeoutError:
            return True


def test_a_fatal_signal_leaves_the_stacks_in_the_log(zorp):
    daemon = zorp(ECHO)
    before = daemon.worker_pid()
    daemon.kill(signal.SIGABRT, worker=True)
    line = daemon.log.wait_for("core.error", 0, "Signal received, stackdump follows")
    assert line.fields == {"signo": "6", "pid": str(before)}
    assert any("threads.py" in one.raw for one in daemon.log.find("core.error", 0, "Stack: "))


def test_a_callback_that_ends_the_process_is_a_crash(zorp):
    # given a policy whose callback ends the process with status 0, past every finally
    daemon = zorp("""
        import os
        from Zorp.Core import *
        from Zorp.Plug import *

        class Leaves(PlugProxy):
            def config(self):
                os._exit(0)

        def intra():
            Service("plug", Leaves, router=DirectedRouter(SockAddrInet("127.0.0.1", 9)))
            Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", $port), ZD_PROTO_TCP), service="plug")
        """)
    before = daemon.worker_pid()
    # when a client makes it do so
    daemon.connect().close()
    # then the worker is replaced, and the instance serves on
    wait_until(lambda: daemon.worker_pid() != before, "the new worker")
    daemon.connect().close()
    assert daemon.process.poll() is None


def test_a_pid_file_that_became_a_directory_does_not_spoil_the_end(zorp):
    daemon = zorp(ECHO)
    daemon.pid_file().unlink()
    daemon.pid_file().mkdir()
    daemon.process.terminate()
    assert daemon.wait() == 0


# ---------------------------------------------------------------- a host without room for a process

def take_descriptors(daemon) -> tuple[int, int]:
    """Leave the master no descriptor to open; return its limits of before."""
    limits = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    used = {int(number) for number in os.listdir(f"/proc/{daemon.pid}/fd")}
    unused = next(number for number in itertools.count() if number not in used)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (unused, limits[1]))
    return limits


def test_a_reload_without_room_for_a_process_fails_and_the_old_policy_serves(zorp):
    # given a running session, somebody at the control socket, and a master without descriptors
    daemon = zorp(ECHO)
    client = daemon.connect()
    before = client.recv(100)
    with daemon.control() as control:
        control.ask("VERSION")
        limits = take_descriptors(daemon)
        # when a reload is asked for, then it fails with the reason and nothing ends
        answer = control.ask("RELOAD WAIT")
        assert answer == "FAIL Reload failed; reason='no process can be started: Too many open files'"
        client.sendall(b"still there")
        assert client.recv(100) == b"still there"
        # and as soon as there is room it is done
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, limits)
        assert control.ask("RELOAD WAIT") == "OK Reload successful"
    assert daemon.connect().recv(100).split()[2] != before.split()[2]


def test_a_crashed_worker_is_replaced_as_soon_as_there_is_room_for_it(zorp):
    # given a master without descriptors, and a budget of one restart
    daemon = zorp(ECHO, arguments=["--restart-max", "2"])
    limits = take_descriptors(daemon)
    # when a worker crashes, and twice there is no room for another
    daemon.kill(signal.SIGKILL, worker=True)
    daemon.log.wait_for("core.error", 0, "Loading the policy failed", count=2,
                        error="no process can be started: Too many open files")
    # then it is started once there is
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, limits)
    assert daemon.connect().recv(100)
