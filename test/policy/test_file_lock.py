"""Locks on files (addressing-helpers 8)."""

import subprocess
import sys
import threading

import pytest

from test.support.logged import captured_log
from Zorp.FileLock import FileLock

HOLDER = """
import sys
from Zorp.FileLock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
    print("released", flush=True)
"""


def test_scenario_39_a_second_process_waits(tmp_path):
    # given another process that holds the lock
    path = str(tmp_path / "lock")
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        # when we ask for it
        taken = threading.Event()
        order = []

        def take():
            with FileLock(path):
                order.append("taken")
                taken.set()

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        # then we wait until it is released
        assert not taken.wait(0.2)
        order.append("told to release")
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert taken.wait(10)
        assert order == ["told to release", "taken"]
        thread.join()


def test_two_locks_in_one_process_exclude_each_other(tmp_path):
    path = str(tmp_path / "lock")
    first, second = FileLock(path), FileLock(path)
    first.acquire()
    taken = threading.Event()

    def take():
        with second:
            taken.set()

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    assert not taken.wait(0.1)
    first.release()
    assert taken.wait(10)
    thread.join()


def test_exceptions_pass_and_release(tmp_path):
    path = str(tmp_path / "lock")
    with pytest.raises(KeyError), FileLock(path):
        raise KeyError("x")
    with FileLock(path):
        pass


def test_an_existing_file_keeps_its_content(tmp_path):
    path = tmp_path / "lock"
    path.write_text("content")
    with FileLock(str(path)) as lock:
        assert lock.filename == str(path)
    assert path.read_text() == "content"


def test_a_file_that_cannot_be_opened_is_logged_and_cannot_be_used(tmp_path):
    with captured_log() as logged:
        lock = FileLock(str(tmp_path / "missing" / "lock"))
    assert [(m.tag, m.level) for m in logged.find("Error opening lock file; file='")] == [("core.error", 3)]
    with pytest.raises(ValueError, match="not open"):
        lock.acquire()
