"""Reload: the next policy beside the old one, and no client notices."""

import os
import signal
import socket
import threading
import time

from test.runtime.policies import ECHO
from test.support.daemon import wait_until
from test.support.ports import free_port
from Zorp.runtime import reloading


def word_of(client: socket.socket) -> str:
    return client.recv(100).split()[0].decode()


def test_running_sessions_finish_and_new_ones_follow_the_new_policy(zorp):
    # given a session under the old policy
    daemon = zorp(ECHO, word="old")
    session = daemon.connect()
    assert word_of(session) == "old"
    # when the policy is changed and HUP is sent
    daemon.reload(word="new", policy=ECHO)
    # then the session goes on, and a new connection follows the new policy
    session.sendall(b"still here\n")
    assert session.recv(100) == b"still here\n"
    assert word_of(daemon.connect()) == "new"
    # and the old worker leaves with its last session
    session.close()
    wait_until(lambda: len(workers(daemon)) == 1, "the end of the old worker")


def test_who_waits_for_a_thread_is_served_by_the_policy_that_accepted(zorp):
    # given one client that is served and one that waits for its turn
    daemon = zorp(ECHO, word="old", arguments=["--threads", "1"])
    served, waiting = daemon.connect(), daemon.connect()
    assert word_of(served) == "old"
    daemon.log.wait_for("core.error", 3, "Too many running threads, waiting for one to become free")
    # when the policy is loaded again, then the one that waits is served when its turn has come
    daemon.reload(word="new")
    served.close()
    assert word_of(waiting) == "old"
    # and the old policy is told of its end after that
    daemon.log.wait_for("core.debug", 6, "Deinitialization requested for instance")


def workers(daemon) -> list[int]:
    with open(f"/proc/{daemon.pid}/task/{daemon.pid}/children") as children:
        return [int(pid) for pid in children.read().split()]


def test_a_reload_says_which_text_is_in_force(zorp):
    # given the default verbosity and a file with a known time; when the policy is loaded again
    daemon = zorp(ECHO, verbosity=3)
    os.utime(daemon.policy, (1_000_000_000, 1_000_000_000))
    daemon.kill(signal.SIGHUP)
    # then the log has its time and generation
    fields = daemon.log.wait_for("core.info", 3, "Policy reloaded").fields
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(1_000_000_000))
    assert fields == {"policy_file": str(daemon.policy), "file_stamp": stamp, "generation": "2"}


def test_session_numbers_go_on(zorp):
    daemon = zorp(ECHO)
    numbers = [daemon.connect().recv(100).split()[1] for _ in range(3)]
    daemon.reload()
    numbers += [daemon.connect().recv(100).split()[1] for _ in range(2)]
    assert numbers == [b"svc/intra/echo:%d" % number for number in range(5)]


def test_a_stream_of_connections_is_never_refused(zorp):
    # given clients that connect without a pause
    daemon = zorp(ECHO, verbosity=3)
    failures, words, stop = [], [], threading.Event()

    def connect() -> None:
        while not stop.is_set():
            try:
                with daemon.connect() as client:
                    words.append(word_of(client))
            except (OSError, IndexError) as problem:
                failures.append(repr(problem))
            time.sleep(0.005)

    clients = [threading.Thread(target=connect) for _ in range(2)]
    for client in clients:
        client.start()
    # when the policy is reloaded twice meanwhile
    daemon.reload(ECHO, word="second")
    wait_until(lambda: "second" in words, "the second policy")
    daemon.reload(ECHO, word="third")
    wait_until(lambda: "third" in words, "the third policy")
    stop.set()
    for client in clients:
        client.join()
    # then no attempt was refused or reset
    assert failures == []
    assert list(dict.fromkeys(words)) == ["hello", "second", "third"]


def test_a_failed_reload_changes_nothing(zorp):
    daemon = zorp(ECHO)
    worker = daemon.worker_pid()
    # when the policy is replaced by a broken one
    daemon.write_policy("from Zorp.Core import *\nthis is no policy\n")
    daemon.kill(signal.SIGHUP)
    daemon.log.wait_for("core.error", 0, "Error reloading policy, reverting to old")
    # then the reason is in the log, the process is the same and serves
    assert f"{daemon.policy}:2: " in daemon.log.text()
    assert daemon.worker_pid() == worker
    assert word_of(daemon.connect()) == "hello"


def test_a_listener_that_the_new_policy_lacks_is_closed(zorp):
    port, other = free_port(), free_port()
    daemon = zorp(ECHO, ports=f"{port}, {other}", port=port)
    daemon.connect(other).close()
    daemon.reload(ECHO, ports=port)
    wait_until(lambda: refused(other), "the listener to be closed")
    daemon.connect(port).close()


def refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:         # it was just being closed
        return False
    return False


def test_a_listener_that_a_failed_policy_opened_is_closed_again(zorp):
    # given a new policy with a free port and one that somebody else has
    other = free_port()
    daemon = zorp(ECHO)
    with socket.create_server(("127.0.0.1", 0)) as foreign:
        daemon.write_policy(ECHO, ports=f"{daemon.port}, {other}, {foreign.getsockname()[1]}")
        daemon.kill(signal.SIGHUP)
        daemon.log.wait_for("core.error", 0, "Error reloading policy, reverting to old")
    # then the first of them is free again, and the old policy serves
    wait_until(lambda: refused(other), "the listener to be closed")
    assert word_of(daemon.connect()) == "hello"


def test_of_two_hangups_in_a_row_the_last_file_wins(zorp):
    # given a first reload that takes a while
    daemon = zorp(ECHO)
    daemon.write_policy("import time\ntime.sleep(1)\n" + ECHO, word="first")
    daemon.kill(signal.SIGHUP)
    daemon.log.wait_for("core.info", 0, "Reloading policy")
    # when the file changes and a second HUP arrives meanwhile
    daemon.write_policy(ECHO, word="second")
    daemon.kill(signal.SIGHUP)
    # then the second policy is in force at the end
    daemon.log.wait_for("core.info", 4, "Accepting connections", count=3)
    assert word_of(daemon.connect()) == "second"


def test_helpers_are_read_again(zorp):
    policy = "import helper\n" + ECHO.replace('"$word"', "helper.word")
    daemon = zorp(policy, start=False)
    (daemon.directory / "helper.py").write_text("word = 'one'\n")
    daemon.start()
    assert word_of(daemon.connect()) == "one"
    (daemon.directory / "helper.py").write_text("word = 'two'\n")
    daemon.reload()
    assert word_of(daemon.connect()) == "two"


def test_sessions_of_the_old_policy_are_bounded(zorp):
    daemon = zorp(ECHO, arguments=["--drain-timeout", "1"])
    session = daemon.connect()
    session.recv(100)
    daemon.reload()
    assert session.recv(100) == b""          # within the ten seconds of the socket


def test_a_hangup_of_the_worker_means_the_instance(zorp):
    daemon = zorp(ECHO)
    before = daemon.worker_pid()
    daemon.kill(signal.SIGHUP, worker=True)
    wait_until(lambda: daemon.worker_pid() != before, "the new worker")


def test_the_verbosity_survives(zorp):
    daemon = zorp(ECHO, verbosity=3)
    daemon.kill(signal.SIGUSR1)
    daemon.log.wait_for("core.info", 0, "Changing verbosity level")
    daemon.reload()
    with daemon.control() as control:
        assert control.ask("LOGGING VGET") == "OK 4"


def test_a_replaced_program_is_not_mixed_with_the_running_one(monkeypatch, tmp_path):
    assert reloading.replaced_program() is None
    (tmp_path / "__init__.py").write_text('__version__ = "99.1"\n')
    monkeypatch.setattr(reloading.Zorp, "__file__", str(tmp_path / "__init__.py"))
    assert "installed='99.1'" in reloading.replaced_program()


def test_the_policy_is_told_that_this_is_not_the_first_load(zorp):
    daemon = zorp('''
        from Zorp.Core import *
        log(None, "my.tag", 2, "load; initial='%d'", isInitialPolicyLoad())
        def intra(): pass
        ''')
    assert daemon.log.find("my.tag")[0].fields == {"initial": "1"}
    daemon.reload()
    assert daemon.log.find("my.tag")[1].fields == {"initial": "0"}
