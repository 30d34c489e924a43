"""Stacked programs in a real daemon: threads of the pool, processors, the end of an instance."""

from __future__ import annotations

import os
import signal
import socket

import pytest

from test.support.children import new_mark, processes, wait_until_gone, zombies_of
from test.support.daemon import wait_until
from test.support.gateway import Server, exchange

POLICY = '''
    from Zorp.Core import *
    from Zorp.Plug import *

    class Inspected(PlugProxy):
        def config(self):
            PlugProxy.config(self)
            self.stack_proxy = (Z_STACK_PROGRAM, """
                : $mark; trap 'exit 0' TERM; exec 4<&0
                (cat <&4 >&1; kill 0) & (cat <&1 >&4; kill 0) & wait""")

    def intra():
        Zone("all", ["0.0.0.0/0"])
        Service("plug", Inspected, router=DirectedRouter(SockAddrInet("127.0.0.1", $server_port)))
        Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", $port), ZD_PROTO_TCP), service="plug")
'''


@pytest.fixture
def server():
    with Server() as running:
        yield running


def test_many_sessions_with_programs_leave_nothing_behind(zorp, server):
    mark = new_mark()
    daemon = zorp(POLICY, server_port=server.port, mark=mark)
    # given ten clients at once
    clients = [daemon.connect() for _ in range(10)]
    assert [exchange(client) for client in clients] == [b"ping"] * 10
    assert len(processes(mark)) >= 10
    # when they have left
    for client in clients:
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
        client.close()
    # then no process and no zombie is left, and every session has its summary
    wait_until_gone(mark)
    wait_until(lambda: not zombies_of(daemon.worker_pid()), "the reaping of all programs")
    daemon.log.wait_for("core.session", 4, "Ending proxy instance", count=10)


def test_a_program_may_use_every_processor_of_the_daemon(zorp, server):
    mark = new_mark()
    daemon = zorp(POLICY, server_port=server.port, mark=mark)
    with daemon.connect() as client:
        exchange(client)
        assert os.sched_getaffinity(processes(mark)[0]) == os.sched_getaffinity(0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_programs_end_with_the_instance(zorp, server, number):
    mark = new_mark()
    daemon = zorp(POLICY, server_port=server.port, mark=mark)
    with daemon.connect() as client:
        exchange(client)
        daemon.kill(number)
        daemon.wait()
        wait_until_gone(mark)
