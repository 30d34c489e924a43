"""A system log that has stopped reading: sessions do not wait for it, and it is told what it missed."""

from __future__ import annotations

import collections
import contextlib
import re
import time

import pytest

from test.runtime.test_under_load import soak, under_load
from test.support.daemon import wait_until
from test.support.syslog import SyslogReceiver

__all__ = ["under_load"]

TALKATIVE = '''
from Zorp.Core import *
from Zorp.AnyPy import *

Zone("everywhere", ["0.0.0.0/0"])

class Talkative(AnyPyProxy):
    """Writes $lines lines into the log, then says so."""

    def startup(self):
        for number in range($lines):
            log(None, "my.tag", 3, "line; number='%d', filler='%s'", (number, "x" * 400))
        self.client_stream.write("done")

def intra():
    Service("talk", Talkative, router=DirectedRouter(SockAddrInet("127.0.0.1", $port)))
    Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", $port), ZD_PROTO_TCP), service="talk")
'''
LINES = 20_000                   # more than the line of waiting packets holds


def test_what_does_not_fit_is_counted_and_the_count_is_logged(zorp, tmp_path):
    # given a log that does not read, and nothing but the lines of the policy in it
    with SyslogReceiver(tmp_path / "log.sock", reading=False) as receiver:
        daemon = zorp(TALKATIVE, detached=True, verbosity=0, lines=LINES,
                      arguments=["--log-socket", str(receiver.path), "--log-spec", "my.*:3,core.*:0"])
        # when a session writes more than can wait
        with daemon.connect() as client:
            assert client.recv(100) == b"done"
        # and the log reads again
        receiver.read()
        # then it is told how many lines it has missed, and has all others
        told = receiver.wait_for("Log messages dropped; count=")
        dropped = int(re.search(r"count='(\d+)'", told)[1])
        numbers = [int(found[1]) for packet in list(receiver.packets) if (found := re.search("number='(.*?)'", packet))]
        assert dropped > 0
        assert len(numbers) + dropped == LINES
        assert numbers == sorted(numbers)


AT_ONCE = 8
EACH = 3000                      # all together fewer than may wait
TOGETHER = TALKATIVE.replace(
    "class Talkative", "import threading\nall_here = threading.Barrier($sessions)\n\nclass Talkative").replace(
    "        for number", "        all_here.wait(30)\n        for number").replace("* 400", "* 20")


def test_the_lines_of_each_session_arrive_in_their_order_whoever_writes_them(zorp, tmp_path):
    # given a log that takes a few packets at a time
    with SyslogReceiver(tmp_path / "log.sock") as receiver, contextlib.ExitStack() as clients:
        daemon = zorp(TOGETHER, detached=True, verbosity=0, lines=EACH, sessions=AT_ONCE,
                      arguments=["--log-socket", str(receiver.path), "--log-spec", "my.*:3,core.*:0"])
        # when sessions write all at once, and so does the loop what has waited
        for client in [clients.enter_context(daemon.connect()) for _ in range(AT_ONCE)]:
            assert client.recv(100) == b"done"
        found = wait_until(lambda: lines_of(receiver, AT_ONCE * EACH), "every line")
    # then each session's lines are all there, in the order in which it wrote them
    by_session = collections.defaultdict(list)
    for session, number in found:
        by_session[session].append(int(number))
    assert list(by_session.values()) == [list(range(EACH))] * AT_ONCE


def lines_of(receiver: SyslogReceiver, count: int) -> list[tuple[str, str]]:
    """Return session and number of each line when there are so many, else nothing."""
    found = [line.groups() for packet in list(receiver.packets)
             if (line := re.search(r"\((svc/.*?)\): line; number='(\d+)'", packet))]
    return found if len(found) >= count else []


# least: sessions per second that the load must have been; on a machine that does other things, too, any
@pytest.mark.parametrize(("seconds", "verbosity", "least"), [(3, 4, 1), soak(30, 6, 200)])
def test_no_session_waits_for_it(under_load, tmp_path, seconds, verbosity, least):
    # given a steady load and a log that does not read, with a deadlock check every second
    with SyslogReceiver(tmp_path / "log.sock", reading=False) as receiver:
        daemon, load = under_load(detached=True, arguments=[
            "--log-socket", str(receiver.path), "--verbose", str(verbosity), "--deadlock-check-timeout", "1"])
        worker = daemon.worker_pid()
        load.begin()
        load.long()
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            time.sleep(0.1)
        load.finish()
        # then nobody has noticed
        assert load.failures == []
        assert load.per_second >= least
        assert daemon.worker_pid() == worker
