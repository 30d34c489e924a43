"""The service manager: READY, RELOADING, STOPPING, WATCHDOG."""

import os
import signal
import socket

import pytest

from test.runtime.policies import ECHO
from Zorp.process.notify import BadWatchdogTime, Notifier


@pytest.fixture
def manager():
    """A notify socket with an abstract name."""
    name = f"@zorp-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name[1:])
        sock.settimeout(10)
        yield sock, name


def states(manager, until: str) -> list[str]:
    """The states up to the one that begins with `until`."""
    sock, _name = manager
    seen = []
    while not seen or not seen[-1].startswith(until):
        seen.append(sock.recv(1000).decode().split("\n")[0])
    return seen


def test_the_life_of_an_instance(zorp, manager):
    # given an instance under a service manager; when it starts
    daemon = zorp(ECHO, start=False, environment={"NOTIFY_SOCKET": manager[1]})
    daemon.launch()
    # then READY comes when the policy serves
    assert states(manager, "READY=1") == ["READY=1"]
    daemon.log.wait_for("core.info", 4, "Accepting connections")
    # and around a reload, and at the end
    daemon.kill(signal.SIGHUP)
    assert states(manager, "READY=1") == ["RELOADING=1", "READY=1"]
    daemon.write_policy("broken(\n")
    daemon.kill(signal.SIGHUP)
    assert states(manager, "READY=1") == ["RELOADING=1", "READY=1"]
    daemon.kill(signal.SIGTERM)
    assert states(manager, "STOPPING=1") == ["STOPPING=1"]
    assert daemon.wait() == 0


def test_a_broken_policy_is_never_ready(zorp, manager):
    daemon = zorp("broken(\n", start=False, environment={"NOTIFY_SOCKET": manager[1]})
    assert daemon.run() == 2
    manager[0].setblocking(False)
    with pytest.raises(BlockingIOError):
        manager[0].recv(1000)


def test_the_watchdog_is_fed_while_every_worker_answers(zorp, manager):
    # given a watchdog of 0.4 seconds
    daemon = zorp(ECHO, environment={"NOTIFY_SOCKET": manager[1], "WATCHDOG_USEC": "400000"})
    assert states(manager, "WATCHDOG=1")[0] == "READY=1"
    # when the worker is stopped
    os.kill(daemon.worker_pid(), signal.SIGSTOP)
    # then, after at most one answer that was on its way, nothing comes any more
    manager[0].settimeout(1.5)
    with pytest.raises(TimeoutError):
        states(manager, "never")
    # and when it goes on, so does the feeding
    os.kill(daemon.worker_pid(), signal.SIGCONT)
    manager[0].settimeout(10)
    assert states(manager, "WATCHDOG=1")


@pytest.mark.parametrize("value", ["x", "0", "-5", ""])
def test_a_senseless_watchdog_time_is_an_error(value):
    with pytest.raises(BadWatchdogTime):
        Notifier({"WATCHDOG_USEC": value})


def test_the_watchdog_is_optional():
    assert Notifier({}).watchdog_s is None
    assert Notifier({"WATCHDOG_USEC": "30000000"}).watchdog_s == 15


def test_a_path_will_do_and_nobody_at_the_other_end_too(tmp_path):
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        notifier = Notifier({"NOTIFY_SOCKET": str(path)})
        notifier.send("READY=1")
        assert sock.recv(100) == b"READY=1"
    notifier.send("STOPPING=1")
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).send("READY=1")


def test_no_pid_file_under_a_service_manager(zorp, manager):
    daemon = zorp(ECHO, detached=True, start=False, environment={"NOTIFY_SOCKET": manager[1]},
                  arguments=["--process-mode", "systemd-notify", "--log-socket", "/nonexistent"])
    daemon.launch()
    assert states(manager, "READY=1") == ["READY=1"]
    assert not daemon.pid_file().exists()
    with daemon.control() as control:
        assert control.ask("VERSION").startswith("OK")
    daemon.process.terminate()
    assert daemon.wait() == 0
