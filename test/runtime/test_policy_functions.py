"""Which generation of a policy is told of what: init(), deinit(), cleanup()."""

import collections
import os
import signal

from test.runtime.policies import ECHO
from test.support.daemon import wait_until

POLICY = '''
import os, time
from Zorp.Core import *
from Zorp.Plug import *

def note(what, virtual_name):
    with open("$dir/calls", "a") as calls:
        calls.write("%s $generation %s %d\\n" % (what, virtual_name, os.getpid()))

def init(names, virtual_name, is_master):
    note("init", virtual_name)
    if virtual_name == "$broken":
        while not os.path.exists("$dir/go"):
            time.sleep(0.01)
        raise ValueError("not today")
    Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", $port), ZD_PROTO_TCP), service="plug")
    return TRUE

def deinit(names, virtual_name):
    note("deinit", virtual_name)

def cleanup(names, virtual_name, is_master):
    note("cleanup", virtual_name)

Service("plug", PlugProxy, router=DirectedRouter(SockAddrInet("127.0.0.1", 9)))
'''
TWO = ("--num-of-processes", "2")


def lines(daemon) -> list[list[str]]:
    """Return what was called: name of the function, generation, process, its pid."""
    return [line.split() for line in (daemon.directory / "calls").read_text().splitlines()]


def calls(daemon) -> dict[str, list[str]]:
    """Return what each generation was told, in the alphabet's order."""
    told = collections.defaultdict(list)
    for what, generation, name, _pid in lines(daemon):
        told[generation].append(f"{what} {name}")
    return {generation: sorted(words) for generation, words in told.items()}


def test_a_policy_that_was_never_in_force_is_told_of_its_end_and_does_not_clean_up(zorp):
    # given a policy in two processes, and a new one that only the first of them can load
    daemon = zorp(POLICY, generation="first", broken="", arguments=TWO)
    daemon.write_policy(POLICY, generation="second", broken="intra#1")
    with daemon.control(0) as control:
        control.send(b"RELOAD WAIT\n")
        pid = wait_until(lambda: [int(pid) for what, *which, pid in lines(daemon) if which == ["second", "intra#0"]],
                         "the load")[0]
        os.kill(pid, signal.SIGUSR1)                 # which it hears when it has loaded
        daemon.log.wait_for("core.info", 0, "Changing verbosity level")
        (daemon.directory / "go").touch()
        assert control.line().startswith("FAIL Reload failed")
    # when the instance stops
    assert daemon.stop() == 0
    # then only the policy in force cleans up
    assert calls(daemon) == {
        "first": ["cleanup intra#0", "cleanup intra#1", "init intra#0", "init intra#1"],
        "second": ["deinit intra#0", "deinit intra#1", "init intra#0", "init intra#1"]}


def test_of_several_generations_the_one_in_force_cleans_up(zorp):
    daemon = zorp(POLICY, generation="first", broken="")
    daemon.reload(POLICY, generation="second")
    assert daemon.stop() == 0
    assert calls(daemon) == {"first": ["deinit intra", "init intra"], "second": ["cleanup intra", "init intra"]}


LEAVING = ECHO + """
import sys

def deinit(names, virtual_name):
    sys.exit(5)

def cleanup(names, virtual_name, is_master):
    sys.exit(5)
"""


def test_a_function_that_exits_ends_itself_and_no_session(zorp):
    # given a session under a policy whose deinit() and cleanup() call sys.exit()
    daemon = zorp(LEAVING)
    with daemon.connect() as client:
        assert client.recv(100)
        # when another policy replaces it, then the session goes on
        daemon.reload(LEAVING)
        daemon.log.wait_for("core.error", 0, "Traceback: SystemExit: 5")
        client.sendall(b"hello")
        assert client.recv(100) == b"hello"
    # and when the instance stops, then its worker ends as it should
    assert daemon.stop() == 0
    assert len(daemon.log.find("core.error", 0, "Traceback: SystemExit: 5")) == 2
    assert "_become_worker" not in daemon.log.text()
