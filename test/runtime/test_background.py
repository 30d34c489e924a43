"""Detached modes: what the start command tells, what stays behind, where messages go."""

import os
import pathlib
import resource
import signal

import pytest

from test.runtime.policies import ECHO
from test.support.daemon import lock_holders, wait_until
from test.support.syslog import SyslogReceiver


@pytest.fixture
def syslog(tmp_path):
    with SyslogReceiver(tmp_path / "log.sock") as receiver:
        yield receiver


@pytest.fixture
def detached(zorp, syslog):
    """Start a daemon in the background with its log in `syslog`."""
    def make(policy: str = ECHO, arguments=(), **keywords):
        return zorp(policy, detached=True, arguments=["--log-socket", str(syslog.path), *arguments], **keywords)

    return make


def test_the_command_returns_0_when_the_instance_serves(detached, syslog):
    # given a good policy; when it is started in the background
    daemon = detached()
    # then the command has ended with 0, the pid file is there already, and clients are served
    assert daemon.process.returncode == 0
    assert daemon.pid_file().read_text() == f"{daemon.worker_pid()}\n"
    assert daemon.connect().recv(100).startswith(b"hello")
    # and the master calls itself a supervisor
    command = pathlib.Path(f"/proc/{daemon.pid}/cmdline").read_bytes().rstrip(b"\0")
    assert command == b"zorp: supervising intra"
    # while the worker shows the command line
    assert b"zorp\0--as\0intra\0--policy\0" in pathlib.Path(f"/proc/{daemon.worker_pid()}/cmdline").read_bytes()


def test_the_command_returns_2_for_a_broken_policy(detached, syslog):
    daemon = detached("broken(\n")
    assert daemon.process.returncode == 2
    assert not daemon.pid_file().exists()
    wait_until(lambda: not lock_holders(daemon.directory), "the end of the master")
    # and the reason is on standard error as well as in the log
    assert f"{daemon.policy}:1:" in daemon.log.text()
    syslog.wait_for("Error loading initial policy, exiting;")


def test_the_command_returns_1_for_an_instance_that_was_stopped_before_it_served(detached):
    # given a policy that loads for ever; when the instance is stopped meanwhile
    daemon = detached("""
        import pathlib, time
        pathlib.Path("$dir/begun").touch()
        time.sleep(3600)
        """, start=False)
    daemon.launch()
    wait_until((daemon.directory / "begun").exists, "the load")
    (master,) = lock_holders(daemon.directory)
    os.kill(master, signal.SIGTERM)
    # then whoever started it does not hear that it serves
    assert daemon.wait() == 1


def test_the_command_returns_1_for_a_bad_set_up(detached, syslog):
    daemon = detached(arguments=["--user", "nobodyhere"])
    assert daemon.process.returncode == 1
    assert "Error resolving user; user='nobodyhere'" in daemon.log.text()


def test_the_command_returns_what_the_policy_quits_with(detached, syslog):
    assert detached("from Zorp.Core import *\ndef intra(): quit(7)\n").process.returncode == 7


def test_a_policy_path_may_be_relative(detached, syslog, monkeypatch):
    daemon = detached(start=False)
    daemon._arguments += ("--policy", "policy.py")
    assert daemon.start().process.returncode == 0


def test_the_process_has_left_its_terminal(detached, syslog):
    daemon = detached()
    syslog.wait_for("Accepting connections")
    for pid in (daemon.pid, daemon.worker_pid()):
        assert os.getsid(pid) != os.getsid(0)
        for descriptor in (0, 1, 2):
            assert os.readlink(f"/proc/{pid}/fd/{descriptor}").startswith(("/dev/null", "pipe:"))
        assert os.readlink(f"/proc/{pid}/cwd") != str(daemon.directory)


def test_term_of_the_master_ends_everything(detached, syslog):
    daemon = detached()
    master = daemon.pid
    os.kill(master, signal.SIGTERM)
    wait_until(lambda: not lock_holders(daemon.directory), "the end of the master")
    assert not daemon.pid_file().exists()
    syslog.wait_for("Shutting down; version=")


def test_a_crash_is_reported_to_the_system_log_and_repaired(detached, syslog):
    daemon = detached()
    before = daemon.worker_pid()
    daemon.kill(signal.SIGSEGV, worker=True)
    # then facility daemon, priority crit says so, under the supervisor's name
    packet = syslog.wait_for("Daemon exited due to a signal, restarting; exitcode='11'")
    assert packet.startswith("<26>")
    assert f" supervise/intra[{daemon_of(packet)}]: " in packet
    wait_until(lambda: daemon.worker_pid() != before, "the next worker")


def daemon_of(packet: str) -> str:
    return packet.partition("[")[2].partition("]")[0]


@pytest.mark.parametrize("option", [["--process-mode", "background"], ["--no-auto-restart"]])
def test_background_repairs_nothing(detached, syslog, option):
    daemon = detached(arguments=option)
    daemon.kill(signal.SIGSEGV, worker=True)
    syslog.wait_for("Daemon exited due to a signal, not restarting")
    wait_until(lambda: not lock_holders(daemon.directory), "the end of the instance")


def test_lines_of_the_system_log(detached, syslog):
    daemon = detached(verbosity=3)
    packet = syslog.wait_for("core.debug(0): (nosession): Starting up; verbose_level='3'")
    priority, _, rest = packet.partition(">")
    assert priority == "<182"
    assert rest[15:].startswith(f" zorp/intra[{daemon.pid}]: ")


def test_what_a_policy_prints_is_in_the_log(detached, syslog):
    daemon = detached()
    client = daemon.connect()
    client.recv(100)
    client.sendall(b"print\n")
    packet = syslog.wait_for("core.stderr(3): (stderr): printed by the policy")
    assert f"[{daemon.worker_pid()}]" in packet


def test_a_policy_that_prints_while_it_is_reloaded(detached, syslog):
    daemon = detached()
    daemon.write_policy("print('from the second load')\n" + ECHO)
    os.kill(daemon.pid, signal.SIGHUP)
    syslog.wait_for("core.stderr(3): (stderr): from the second load")


def test_a_restarted_system_log_gets_later_messages(detached, syslog):
    daemon = detached(verbosity=3)
    syslog.close()
    syslog.open()
    daemon.kill(signal.SIGUSR1, worker=True)
    syslog.wait_for("Changing verbosity level; verbose_level='4'")


def test_a_system_log_that_is_missing_at_the_start_gets_what_waited(zorp, tmp_path):
    # given no system log; when an instance starts, then it serves
    receiver = SyslogReceiver(tmp_path / "log.sock")
    daemon = zorp(ECHO, detached=True, arguments=["--log-socket", str(receiver.path)], verbosity=3)
    with daemon.connect() as client:
        assert client.recv(100).startswith(b"hello")
    # and once there is a system log, it gets what was said before, and what is said then
    with receiver:
        receiver.wait_for("Starting up; verbose_level='3'")
        daemon.kill(signal.SIGUSR1, worker=True)
        receiver.wait_for("Changing verbosity level; verbose_level='4'")


def test_core_files_are_permitted_when_asked_for_and_else_not(detached):
    # given an instance that shall leave core files, and one that shall not
    _soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    for arguments, limits in ((["--enable-core"], (hard, hard)), ([], (0, 0))):
        daemon = detached(arguments=arguments)
        # then the limit of its worker says so
        assert resource.prlimit(daemon.worker_pid(), resource.RLIMIT_CORE) == limits


def test_a_system_log_that_stops_reading_delays_nobody(zorp, tmp_path):
    # given a receiver that never reads, and a daemon that writes a lot
    with SyslogReceiver(tmp_path / "log.sock", reading=False) as receiver:
        daemon = zorp(ECHO, detached=True, arguments=["--log-socket", str(receiver.path)], verbosity=9)
        # then clients are served as ever
        for _ in range(50):
            with daemon.connect() as client:
                assert client.recv(100).startswith(b"hello")


@pytest.mark.parametrize("kind", ["--log-severity", "--log-format=rfc5424", "--log-format=json"])
def test_other_forms_of_lines(detached, syslog, kind):
    detached(arguments=[kind], verbosity=3)
    start = {"--log-severity": "<179>", "--log-format=rfc5424": "<182>1 2", "--log-format=json": "<182>"}[kind]
    assert syslog.wait_for("Starting up").startswith(start)
