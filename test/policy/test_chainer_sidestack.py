"""SideStackChainer: a second proxy between the first one and the server."""

from __future__ import annotations

import importlib
import queue
import socket

import pytest

from test.support.chaining import asking
from test.support.deaf import silent_server
from test.support.ends import is_reset, receive_all, reset
from test.support.gateway import Gateway, Server, ended, exchange
from Zorp.engine.builtin_proxy import running
from Zorp.Chainer import ConnectChainer, SideStackChainer
from Zorp.Constants import ZD_PROTO_AUTO, ZD_PROTO_TCP
from Zorp.Plug import PlugProxy

__all__ = ["asking"]

POLICY = """
    from Zorp.Core import *
    from Zorp.AnyPy import *
    from Zorp.Plug import *

    Zone("all", "0.0.0.0/0")

    class Left(PlugProxy):
        name = "left"

    class Right(PlugProxy):
        name = "right"

    class Idle(Right):
        def config(self):
            Right.config(self)
            self.timeout = 300

    class Crashing(Right):
        def config(self):
            Right.config(self)
            self.packet_stats_interval_packet = 2

        def packetStats(self, *counts):
            raise ValueError("counts")

    class Speaking(AnyPyProxy):
        name = "speaking"
        def proxyThread(self):
            self.server_stream.write(self.client_stream.read(100))
            self.client_stream.write(self.server_stream.read(100))
            raise ValueError("in the middle")

    class Broken(PlugProxy):
        name = "broken"
        def __init__(self, session):
            raise RuntimeError("not today")

    def gateway():
        Service("svc", Left, router=DirectedRouter(SockAddrInet("127.0.0.1", $port)), chainer=$chainer, $more)
        Listener(SockAddrInet("127.0.0.1", 50090), "svc")
    """


@pytest.fixture
def server():
    with Server() as running_server:
        yield running_server


def sidestacked(server, chainer="SideStackChainer(Right)", more=""):
    return Gateway(POLICY, port=server.port, chainer=chainer, more=more)


def proxy_called(name):
    return next(proxy for proxy in running.all() if proxy.name == name)


def test_bytes_pass_both_proxies(server):
    """Scenario 33."""
    with sidestacked(server) as gateway:
        # when a client talks to the server
        client = gateway.connect()
        assert exchange(client) == b"ping"
        client.close()
        gateway.logged.wait_for("Ending proxy instance;")
        # then there were two proxies, one connection, and one summary
        log = gateway.logged
        assert len(log.find("Side-stacking proxy instance;")) == 1
        assert len(log.find("Proxy starting; class='Left'")) == len(log.find("Proxy starting; class='Right'")) == 1
        established = log.find("Server connection established;")
        assert len(established) == 1
        assert established[0].session.endswith("/right")
        assert len(log.find("Connection summary;")) == 1
        summary = log.find("Connection summary;")[0].text
        assert f"server_port='{server.port}'" in summary
        assert "verdict='ACCEPTED'" in summary


def test_names_of_the_streams_and_what_the_right_session_inherits(server):
    with sidestacked(server) as gateway:
        client = gateway.connect()
        assert exchange(client) == b"ping"
        left, right = proxy_called("left"), proxy_called("right")
        assert left.session.server_stream.name.endswith("/leftside")
        assert right.session.client_stream.name.endswith("/rightside")
        assert right.session.owner is left.session
        assert right.session.target_address == left.session.target_address
        assert right.session.client_address == left.session.client_address
        client.close()


def test_end_of_the_right_proxy_closes_the_client(server):
    """Scenario 33."""
    with sidestacked(server) as gateway:
        client = gateway.connect()
        assert exchange(client) == b"ping"
        proxy_called("right").request_stop()
        assert ended(client)
        gateway.logged.wait_for("Connection summary;")


@pytest.mark.parametrize("chainer", [
    "SideStackChainer(Right)", "SideStackChainer(Idle)", "SideStackChainer(Crashing)", "SideStackChainer(Speaking)",
    "SideStackChainer(Right, SideStackChainer(Idle))"])
def test_half_of_an_answer_does_not_look_like_a_whole_one(chainer):
    """Local sockets carry no reset, and what is between two proxies is one."""
    # given half of an answer
    with Server(half_an_answer_then_wait_then_reset) as server, sidestacked(server, chainer) as gateway:
        client = gateway.connect()
        client.sendall(b"x")
        assert client.recv(4, socket.MSG_WAITALL) == b"half"
        # when the right proxy times out or breaks, or else the server resets, then that is no end of file
        with pytest.raises(ConnectionResetError):
            send_and_receive_all(client, b"y")
        gateway.logged.wait_for("Connection summary;")


def send_and_receive_all(sock, data):
    sock.sendall(data)
    return receive_all(sock)


def half_an_answer_then_wait_then_reset(sock):
    sock.recv(1)
    sock.sendall(b"half")
    sock.recv(1)
    reset(sock)


def test_half_of_an_upload_does_not_look_like_a_whole_one():
    seen = queue.Queue()

    def receive(sock):
        seen.put(sock.recv(100))
        seen.put(is_reset(sock))

    with Server(receive) as server, sidestacked(server) as gateway:
        client = gateway.connect()
        client.sendall(b"half of it")
        assert seen.get(timeout=10) == b"half of it"
        reset(client)
        assert seen.get(timeout=10) is True


def test_stop_request_for_the_left_reaches_the_right():
    """The right proxy hangs in its connect and does not look at its client: only the link can reach it."""
    with silent_server() as (_, port), Gateway(
            POLICY, port=port, chainer="SideStackChainer(Right)", more="") as gateway:
        client = gateway.connect()
        gateway.logged.wait_for("Initiating connection;")
        proxy_called("left").request_stop()
        assert ended(client)
        gateway.logged.wait_for("Connection to remote end failed;", timeout_s=5)
        gateway.logged.wait_for("User initiated proxy termination request received;", count=2)
        gateway.logged.wait_for("Connection summary;")


def test_three_in_a_row(server):
    """The right chainer may be another SideStackChainer."""
    with sidestacked(server, "SideStackChainer(Right, SideStackChainer(PlugProxy))") as gateway:
        client = gateway.connect()
        assert exchange(client) == b"ping"
        client.close()
        gateway.logged.wait_for("Ending proxy instance;")
        assert len(gateway.logged.find("Side-stacking proxy instance;")) == 2
        assert gateway.logged.find("Server connection established;")[0].session.endswith("/plug")


def test_access_control_is_the_right_proxy_s(server):
    with sidestacked(server, more="limit_target_zones_to=['all']") as gateway:
        client = gateway.connect()
        assert exchange(client) == b"ping"
        client.close()
    with Gateway(POLICY.replace('Zone("all", "0.0.0.0/0")', 'Zone("all", "127.0.0.1/32"); Zone("dmz", "127.0.0.2/32")'),
                 port=server.port, chainer="SideStackChainer(Right)", more="limit_target_zones_to=['dmz']") as gateway:
        assert ended(gateway.connect())
        refused = gateway.logged.wait_for("DAC policy violation;")
        assert refused.session.endswith("/right")


def test_right_proxy_that_cannot_be_made(server):
    with sidestacked(server, "SideStackChainer(Broken)") as gateway:
        assert ended(gateway.connect())
        gateway.logged.wait_for("Side-stacking failed; proxy_class='")
        summary = gateway.logged.wait_for("Connection summary;").text
    assert "verdict='DENIED_BY_CONNECTION_FAIL'" in summary
    assert server.peers == []


def test_no_thread_for_the_right_proxy(asking, monkeypatch):
    """Nothing is left open when the right proxy cannot be started."""

    class NoThreads:
        def start(self, name, job):
            return False

    plug = importlib.import_module("Zorp.Plug").PlugProxy
    asked = asking(chainer=SideStackChainer(plug))
    monkeypatch.setattr("Zorp.Globals.threads", NoThreads())
    assert asked.connect() is None
    assert asked.log.find("Side-stacking failed;")


def test_no_descriptors_for_the_pair(asking, monkeypatch):
    def refused(*args):
        raise OSError("I/O error during socketpair.")

    asked = asking(chainer=SideStackChainer(PlugProxy))
    monkeypatch.setattr("Zorp.Chainer._sidestack.streamPair", refused)
    assert asked.connect() is None
    assert asked.log.has("Side stacking failed, socketPair failed;", ())


def test_constructor():
    chainer = SideStackChainer(PlugProxy)
    assert chainer.right_class is PlugProxy
    assert isinstance(chainer.right_chainer, ConnectChainer)
    assert chainer.getProtocol() == ZD_PROTO_AUTO
    assert SideStackChainer(PlugProxy, ConnectChainer(ZD_PROTO_TCP)).getProtocol() == ZD_PROTO_TCP
