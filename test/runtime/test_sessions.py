"""Real services in the tree of the control socket: counters, connections, stopping a session."""

import socket

import pytest

from test.support.daemon import wait_until
from test.support.gateway import Server, ended

POLICY = '''
from Zorp.Core import *
from Zorp.Plug import *

Zone("clients", ["127.0.0.0/8"])

def intra():
    Service("$service", PlugProxy, router=DirectedRouter(SockAddrInet("127.0.0.1", $server_port)))
    Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", $port), ZD_PROTO_TCP), service="$service")
'''


@pytest.fixture
def server():
    """An echo server; its port."""
    with Server() as made:
        yield made.port


def open_session(daemon) -> socket.socket:
    client = daemon.connect()
    client.sendall(b"x")
    assert client.recv(1) == b"x"
    return client


def test_a_connection_appears_and_disappears(zorp, server):
    # given an open session
    daemon = zorp(POLICY, service="plug", server_port=server)
    client = open_session(daemon)
    with daemon.control() as control:
        # then the tree shows both of its sides
        host, port = client.getsockname()
        assert control.ask("GETVALUE conns.plug.0.0.0.client_address") == f"AF_INET({host}:{port})"
        assert control.ask("GETVALUE conns.plug.0.0.0.client_zone") == "clients"
        assert control.ask("GETVALUE conns.plug.0.0.0.server_address") == f"AF_INET(127.0.0.1:{server})"
        # and how much each side has sent so far
        client.sendall(b"four")
        assert client.recv(4, socket.MSG_WAITALL) == b"four"
        wait_until(lambda: [control.ask(f"GETVALUE conns.plug.0.0.0.{side}_bytes_{way}")
                            for side in ("client", "server") for way in ("recvd", "sent")] == ["5"] * 4,
                   "the bytes in the tree")         # what was sent is counted when the client has it already
        # and when it is closed, the node goes and the service stays
        client.close()
        wait_until(lambda: control.ask("GETVALUE conns.plug.0.0.0.client_address") == "None", "the end of the node")
        assert control.ask("GETCHILD conns") == "conns.plug"
        assert control.ask("GETCHILD conns.plug") == "None"


def test_the_name_of_a_service_is_escaped(zorp, server):
    daemon = zorp(POLICY, service="intra http.v1", server_port=server)
    open_session(daemon).close()
    with daemon.control() as control:
        wait_until(lambda: control.ask("GETCHILD service") == "service.intra%20http%2Ev1", "the node")
        assert control.ask("GETVALUE service.intra%20http%2Ev1.session_number") == "1"


def test_counters_go_on_over_a_reload(zorp, server):
    # given three sessions at a time, then a reload
    daemon = zorp(POLICY, service="plug", server_port=server)
    clients = [open_session(daemon) for _ in range(3)]
    with daemon.control() as control:
        assert control.ask("GETVALUE service.plug.sessions_running") == "3"
    daemon.reload()
    # then the next one goes on counting
    clients.append(open_session(daemon))
    with daemon.control() as control:
        assert control.ask("GETVALUE service.plug.session_number") == "4"
        assert control.ask("GETVALUE service.plug.sessions_max") == "3"
        assert control.ask("GETVALUE service.plug.outbound_zones") == "clients(4)"
    for client in clients:
        client.close()


@pytest.mark.parametrize("spelling", ["svc/intra/plug:0", "svc/intra/plug:0/intra", "svc/intra/plug:0/intra/plug"])
def test_a_session_is_stopped(zorp, server, spelling):
    # given two sessions
    daemon = zorp(POLICY, service="plug", server_port=server)
    stopped, other = open_session(daemon), open_session(daemon)
    # when the first is stopped by one of the spellings of its id
    with daemon.control() as control:
        assert control.ask(f"STOPSESSION {spelling}") == "OK Session stop requested; proxies='1'"
        # then its connections end, the log says why, and the other goes on
        assert ended(stopped)
        daemon.log.wait_for("core.info", 2, "User initiated proxy termination request received")
        summary = daemon.log.wait_for("core.summary", 4, "Connection summary")
        assert summary.fields["info"] == "stopped by administrator"
        assert control.ask(f"STOPSESSION {spelling}") == "FAIL No such session"
    other.sendall(b"y")
    assert other.recv(1) == b"y"


def test_a_session_of_the_old_policy_is_stopped_too(zorp, server):
    # given a session that outlived a reload
    daemon = zorp(POLICY, service="plug", server_port=server)
    old = open_session(daemon)
    daemon.reload()
    with daemon.control() as control:
        assert control.ask("STOPSESSION svc/intra/plug:0") == "OK Session stop requested; proxies='1'"
        assert ended(old)
        # and with it the old policy leaves
        wait_until(lambda: control.ask("GETVALUE info.policy.generations") == "1", "the end of the old worker")


def test_sessions_that_a_stop_cuts_leave_their_summaries(zorp, server):
    daemon = zorp(POLICY, service="plug", server_port=server)
    clients = [open_session(daemon) for _ in range(3)]
    assert daemon.stop() == 0
    summaries = daemon.log.find("core.summary", 4, "Connection summary")
    assert [line.fields["info"] for line in summaries] == ["instance stopped"] * 3
    assert all(ended(client) for client in clients)


def test_a_session_that_ends_within_the_grace_has_an_ordinary_summary(zorp, server):
    # given an open session and a grace; when the client leaves after TERM
    daemon = zorp(POLICY, service="plug", server_port=server, arguments=["--shutdown-grace", "20"])
    client = open_session(daemon)
    daemon.process.terminate()
    client.close()
    assert daemon.wait() == 0
    assert len(daemon.log.find("core.summary", 4, "Connection summary")) == 1
