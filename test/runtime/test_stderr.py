"""Standard error belongs to whoever started us: one who does not read it, or is gone, harms nobody."""

import contextlib
import os
import subprocess

import pytest

from test.runtime.policies import ECHO
from test.support.daemon import wait_until
from test.support.syslog import SyslogReceiver


def fill(pipe: int) -> None:
    """Write until nothing more fits."""
    with open(f"/proc/self/fd/{pipe}", "wb", buffering=0, opener=lambda path, flags: os.open(
            path, os.O_WRONLY | os.O_NONBLOCK)) as unblocked:
        for size in (4096, 1):
            while unblocked.write(b"x" * size) is not None:
                pass


def launch(daemon, stderr: int, *wrapper: str, syslog: bool = False) -> None:
    command = [word for word in daemon.command if word != "--no-syslog" or not syslog]
    daemon.process = subprocess.Popen([*wrapper, *command], stdin=subprocess.DEVNULL, stdout=stderr,
                                      stderr=stderr, cwd=daemon.directory, start_new_session=True)
    wait_until(lambda: daemon.pid_file().exists() and daemon.pid_file().read_text(), "the first worker")


def crash(daemon) -> None:
    """Kill the worker, which the master has words for, and wait for the next one."""
    before = daemon.worker_pid()
    os.kill(before, 9)
    wait_until(lambda: daemon.worker_pid() != before, "the next worker")
    with daemon.connect() as client:
        assert client.recv(100)


@pytest.mark.parametrize("log", ["stderr", "syslog"])
@pytest.mark.parametrize("reader", ["reads nothing", "is gone"])
def test_a_reader_that_fails_us_neither_stops_nor_ends_the_instance(zorp, tmp_path, log, reader):
    # given an instance in the foreground whose standard error is a pipe
    read_end, write_end = os.pipe()
    with SyslogReceiver(tmp_path / "log.sock") as receiver, contextlib.ExitStack() as pipes:
        pipes.callback(os.close, write_end)
        daemon = zorp(ECHO, start=False, verbosity=3, arguments=("--log-socket", str(receiver.path)))
        launch(daemon, write_end, syslog=log == "syslog")
        # when the pipe is full, or nobody is at its other end, and a worker crashes
        if reader == "is gone":
            os.close(read_end)
        else:
            pipes.callback(os.close, read_end)
            fill(write_end)
        crash(daemon)
        # then the instance serves, answers and stops as always
        with daemon.control() as control:
            assert control.ask("VERSION").startswith("OK ")
        assert daemon.stop() == 0


def test_without_a_standard_error_no_file_of_ours_gets_what_is_said_there(zorp, tmp_path):
    # given an instance that was started with descriptors 0 to 2 closed
    with SyslogReceiver(tmp_path / "log.sock") as receiver:
        daemon = zorp(ECHO, start=False, arguments=("--log-socket", str(receiver.path)))
        launch(daemon, subprocess.DEVNULL, "sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", syslog=True)
        assert {os.readlink(f"/proc/{daemon.pid}/fd/{number}") for number in range(3)} == {"/dev/null"}
        crash(daemon)
        assert daemon.stop() == 0


def test_lines_that_wait_at_a_fork_are_written_once(zorp):
    # given a master with lines that its full standard error does not take, and a worker that crashes
    read_end, write_end = os.pipe()
    daemon = zorp(ECHO, start=False, verbosity=6)
    launch(daemon, write_end)
    fill(write_end)
    crash(daemon)
    # when somebody reads again until the instance has ended
    daemon.process.terminate()
    os.close(write_end)
    with open(read_end, "rb") as reader:
        text = reader.read()
    assert daemon.wait() == 0
    # then what the supervisor said before it forked is there, once
    assert text.count(b"intra: Daemon exited due to a signal, restarting") == 1
