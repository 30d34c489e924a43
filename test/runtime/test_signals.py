"""Signals: stop with and without grace and while loading, verbosity up and down."""

import contextlib
import os
import pathlib
import queue
import signal

import pytest

from test.runtime.policies import ECHO
from test.support.daemon import wait_until
from test.support.ends import is_reset
from test.support.gateway import Server

LISTEN = "0A"                        # a state in /proc/net/tcp


def test_term_ends_with_0_and_leaves_nothing(zorp):
    daemon = zorp(ECHO)
    assert daemon.stop() == 0
    assert not daemon.pid_file().exists()
    assert not (daemon.directory / "zorpctl.intra").exists()
    last = daemon.log.lines()[-1]
    assert (last.tag, last.level, last.session, last.text) == ("core.info", 3, None, "Shutting down")
    assert daemon.log.find("core.debug", 6, "Cleaning up instance")


def test_int_and_a_term_of_the_worker_do_the_same(zorp):
    for number, worker in ((signal.SIGINT, False), (signal.SIGTERM, True), (signal.SIGINT, True)):
        daemon = zorp(ECHO)
        daemon.kill(number, worker=worker)
        assert daemon.wait() == 0


@pytest.mark.parametrize("detached", [False, True])
def test_term_while_the_first_policy_loads(zorp, detached):
    # given a policy that takes long to load
    daemon = zorp("import os, time\nfrom Zorp.Core import *\nopen('$dir/loading', 'w').write(str(os.getpid()))\n"
                  "while True:\n    time.sleep(0.1)\n", start=False, detached=detached)
    daemon.launch()
    loading = daemon.directory / "loading"
    worker = int(wait_until(lambda: loading.exists() and loading.read_text(), "the load"))
    master = int(pathlib.Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    # when TERM comes, then the start ends, which is no success for whoever waits for it, and leaves nothing behind
    os.kill(master, signal.SIGTERM)
    assert daemon.wait() == (1 if detached else 0)
    wait_until(lambda: not pathlib.Path(f"/proc/{worker}").exists(), "the end of the worker")
    assert [path.name for path in daemon.directory.iterdir() if path.suffix == ".pid" or "zorpctl" in path.name] == []


def test_without_grace_sessions_are_cut(zorp):
    daemon = zorp(ECHO)
    client = daemon.connect()
    client.recv(100)
    daemon.stop()
    assert client.recv(100) == b""


def test_with_grace_the_last_session_may_finish(zorp):
    # given a grace and a running session
    daemon = zorp(ECHO, arguments=["--shutdown-grace", "30"])
    client = daemon.connect()
    client.recv(100)
    # when TERM arrives
    daemon.kill(signal.SIGTERM)
    # then the session goes on, and its end is the end of the instance
    client.sendall(b"x\n")
    assert client.recv(100) == b"x\n"
    client.close()
    assert daemon.wait() == 0


def test_a_second_term_does_not_wait(zorp):
    daemon = zorp(ECHO, arguments=["--shutdown-grace", "30"])
    client = daemon.connect()
    client.recv(100)
    daemon.kill(signal.SIGTERM)
    wait_until(lambda: not is_listening(daemon), "the end of accepting")
    daemon.kill(signal.SIGTERM)
    assert daemon.wait() == 0
    assert client.recv(100) == b""


def is_listening(daemon) -> bool:
    """True while the worker holds the socket of its port, as the master always does."""
    sockets = [line.split() for line in pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inodes = {fields[9] for fields in sockets if fields[1].endswith(f":{daemon.port:04X}") and fields[3] == LISTEN}
    held = set()
    for descriptor in pathlib.Path(f"/proc/{daemon.worker_pid()}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):         # closed meanwhile
            held.add(os.readlink(descriptor))
    return any(f"socket:[{inode}]" in held for inode in inodes)


def test_verbosity_goes_up_and_down_and_says_so(zorp):
    daemon = zorp(ECHO, verbosity=3)
    for number, level in ((signal.SIGUSR1, "4"), (signal.SIGUSR1, "5"), (signal.SIGUSR2, "4")):
        mark = daemon.log.mark()
        daemon.kill(number)
        daemon.log.wait_for("core.info", 0, "Changing verbosity level", after=mark, verbose_level=level)


def test_the_level_stays_within_0_and_10(zorp):
    # given verbosity 10; when it is raised, and then lowered
    daemon = zorp(ECHO, verbosity=10)
    daemon.kill(signal.SIGUSR1, worker=True)
    daemon.kill(signal.SIGUSR2, worker=True)
    # then the first is not even logged
    daemon.log.wait_for("core.info", 0, "Changing verbosity level", verbose_level="9")
    assert len(daemon.log.find("core.info", 0, "Changing verbosity level")) == 1


def test_the_change_is_logged_even_at_level_0(zorp):
    daemon = zorp(ECHO, verbosity=0)
    daemon.kill(signal.SIGUSR1)
    daemon.log.wait_for("core.info", 0, "Changing verbosity level", verbose_level="1")


def test_a_session_that_policy_code_holds_is_named_when_the_instance_stops(zorp):
    # given a session in a callback that does not return
    daemon = zorp("""
        import threading
        from Zorp.Core import *
        from Zorp.Plug import *

        class Waits(PlugProxy):
            def config(self):
                threading.Event().wait(60)

        def intra():
            Service("plug", Waits, router=DirectedRouter(SockAddrInet("127.0.0.1", 9)))
            Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", $port), ZD_PROTO_TCP), service="plug")
        """)
    client = daemon.connect()
    session = daemon.log.wait_for("core.session", 3, "Starting proxy instance").session
    # when the instance stops
    assert daemon.stop() == 0
    # then the log says which session left no summary
    assert daemon.log.find("core.error", 1, "Session abandoned", session=session)
    client.close()


def test_the_peers_of_a_session_that_is_left_behind_see_no_orderly_end(zorp):
    # given half of an upload, in a session whose policy code does not return
    seen = queue.SimpleQueue()

    def serve(sock):
        seen.put(sock.recv(100))
        seen.put(is_reset(sock))

    with Server(serve) as server:
        daemon = zorp("""
            import threading
            from Zorp.Core import *
            from Zorp.Plug import *

            class Waits(PlugProxy):
                def config(self):
                    PlugProxy.config(self)
                    self.packet_stats_interval_packet = 1

                def packetStats(self, *counts):
                    threading.Event().wait(60)

            def intra():
                Service("plug", Waits, router=DirectedRouter(SockAddrInet("127.0.0.1", $server_port)))
                Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", $port), ZD_PROTO_TCP), service="plug")
            """, server_port=server.port)
        with daemon.connect() as client:
            session = daemon.log.wait_for("core.session", 3, "Starting proxy instance").session
            client.sendall(b"half of it")
            assert seen.get(timeout=10) == b"half of it"
            # when the instance stops
            assert daemon.stop() == 0
            # then both are reset
            assert is_reset(client)
        assert seen.get(timeout=10)
        assert daemon.log.find("core.error", 1, "Session abandoned", session=session)
