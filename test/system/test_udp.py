"""UDP through a real daemon: sessions, addresses, limits, conversion."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest

from test.support.daemon import DEADLINE_S, Daemon, wait_until
from test.support.ports import free_port
from test.system.test_nothing_grows import descriptors, resident_kib, tree

POLICY = """
    from Zorp.Core import *
    from Zorp.Plug import *

    class DatagramPlug(PlugProxy):
        def config(self):
            PlugProxy.config(self)
            SETTINGS

    config.options.max_udp_sessions = $sessions
    config.options.max_udp_sessions_per_client = $per_client

    def intra():
        Zone("all", ["0.0.0.0/0", "::/0"])
        Service("dns", DatagramPlug, router=DirectedRouter(SockAddrInet("127.0.0.1", $server_port))CHAINER)
        Receiver(SockAddrInet("$bind", $port), service="dns")
"""


def policy(settings="pass", chainer=""):
    return POLICY.replace("SETTINGS", settings).replace("CHAINER", chainer)


class UdpServer:
    """Answers every datagram with its upper case form, and remembers who sent what."""

    def __init__(self):
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.bind(("127.0.0.1", 0))
        self.port = self._sock.getsockname()[1]
        self.heard = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                data, peer = self._sock.recvfrom(65535)
                if data == b"close":
                    return
                self.heard.append((data, peer))
                self._sock.sendto(data.upper(), peer)

    def close(self):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"close", ("127.0.0.1", self.port))
        self._sock.close()

    @property
    def peers(self):
        return {peer for _, peer in self.heard}


@pytest.fixture
def server():
    running = UdpServer()
    yield running
    running.close()


@pytest.fixture
def receiver(zorp, server):
    """Return a function that starts a daemon with a UDP receiver."""

    def start(settings="pass", chainer="", server_port=None, **values):
        values = {"sessions": 1000, "per_client": 100, "bind": "127.0.0.1", **values}
        return zorp(policy(settings, chainer), port=free_port(socket.SOCK_DGRAM),
                    server_port=server_port or server.port, **values)

    return start


@contextlib.contextmanager
def client(source="127.0.0.1"):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((source, 0))
        sock.settimeout(DEADLINE_S)
        yield sock


def ask(sock, data, port, host="127.0.0.1"):
    """Send a datagram and return (answer, who sent it)."""
    sock.sendto(data, (host, port))
    return sock.recvfrom(65535)


def wait_until_served(sock, port):
    """Ask again and again, as clients of UDP do, until an answer comes."""
    sock.settimeout(0.05)

    def served():
        with contextlib.suppress(TimeoutError):
            return ask(sock, b"again", port)[0] == b"AGAIN"

    wait_until(served, "an answer")


def answered_over_tcp(sock, daemon, listener):
    """Send a datagram that reaches a TCP server, whose answer comes back as one."""
    sock.sendto(b"question", ("127.0.0.1", daemon.port))
    listener.settimeout(DEADLINE_S)
    accepted, _ = listener.accept()
    with accepted:
        accepted.settimeout(DEADLINE_S)
        assert accepted.recv(100) == b"question"
        accepted.sendall(b"answer")
        assert sock.recv(100) == b"answer"


def test_two_clients_get_sessions_of_their_own(receiver, server):
    """dispatch 3, small-proxies 8, anatomy 16."""
    daemon = receiver()
    with client() as one, client("127.0.0.2") as other:
        assert ask(one, b"one", daemon.port) == (b"ONE", ("127.0.0.1", daemon.port))
        assert ask(other, b"other", daemon.port) == (b"OTHER", ("127.0.0.1", daemon.port))
        assert ask(one, b"one more", daemon.port)[0] == b"ONE MORE"
    assert len(server.peers) == 2
    started = [daemon.log.wait_for("core.session", 3, "Starting proxy instance", count=count) for count in (1, 2)]
    assert all(line.fields["client_protocol"] == "UDP" for line in started)
    assert len(daemon.log.find("core.session", 3, "Starting proxy instance")) == 2


@pytest.mark.parametrize("size", [0, 1, 4000, 65507])
def test_datagram_passes_whole(receiver, size):
    daemon = receiver()
    data = b"x" * size
    with client() as sock:
        assert ask(sock, data, daemon.port)[0] == data.upper()
        assert ask(sock, b"next", daemon.port)[0] == b"NEXT"


def test_answers_come_from_the_address_that_was_asked(receiver):
    daemon = receiver(bind="0.0.0.0")
    with client() as sock:
        for host in ("127.0.0.1", "127.0.0.77"):
            assert ask(sock, b"x", daemon.port, host) == (b"X", (host, daemon.port))
    # one client, two destinations: two sessions
    assert len(daemon.log.find("core.session", 3, "Starting proxy instance")) == 2


def test_burst_of_a_new_client_is_one_session(receiver, server):
    daemon = receiver()
    with client() as sock:
        for number in range(40):
            sock.sendto(b"%d" % number, ("127.0.0.1", daemon.port))
        answers = {sock.recv(100) for _ in range(40)}
        assert answers == {b"%d" % number for number in range(40)}
    assert len(server.peers) == 1
    assert [data for data, _ in server.heard] == [b"%d" % number for number in range(40)]


def test_many_clients_at_once(receiver, server):
    daemon = receiver()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(client()) for _ in range(60)]
        for number, sock in enumerate(clients):
            for part in (b"a", b"b"):
                sock.sendto(b"%d%s" % (number, part), ("127.0.0.1", daemon.port))
        for number, sock in enumerate(clients):
            assert {sock.recv(100) for _ in range(2)} == {b"%dA" % number, b"%dB" % number}
    assert len(server.peers) == 60


def test_idle_session_ends_and_leaves_a_summary(receiver):
    daemon = receiver("self.timeout = 300")
    with client() as sock:
        ask(sock, b"x", daemon.port)
        daemon.log.wait_for("plug.session", 3, "Connection timed out", timeout="300")
        summary = daemon.log.wait_for("core.summary", 4, "Connection summary")
        assert (summary.fields["client_proto"], summary.fields["server_proto"]) == ("UDP", "UDP")
        assert summary.fields["client_local_port"] == str(daemon.port)
        # the next datagram begins a new one
        assert ask(sock, b"y", daemon.port)[0] == b"Y"
        daemon.log.wait_for("core.session", 3, "Starting proxy instance", count=2)


def test_timeout_is_a_minute_at_most_by_default(receiver):
    daemon = receiver()
    with client() as sock:
        ask(sock, b"x", daemon.port)
    assert daemon.log.wait_for("core.debug", 6, "Attribute changed", attribute="timeout").fields["newvalue"] == "60000"


def test_server_that_is_not_there_ends_the_session(receiver):
    daemon = receiver(server_port=free_port(socket.SOCK_DGRAM))
    with client() as sock:
        sock.sendto(b"x", ("127.0.0.1", daemon.port))
        daemon.log.wait_for("core.session", 4, "Ending proxy instance")


def test_tcp_server_of_a_udp_service(receiver):
    """routing-chaining-nat 40."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        daemon = receiver(chainer=", chainer=ConnectChainer(protocol=ZD_PROTO_TCP)",
                          server_port=listener.getsockname()[1])
        with client() as sock:
            answered_over_tcp(sock, daemon, listener)
            summary = daemon.log.wait_for("core.summary", 4, "Connection summary")
            assert (summary.fields["client_proto"], summary.fields["server_proto"]) == ("UDP", "TCP")


def test_client_with_too_many_sessions_loses_its_oldest_idle_one(receiver, server):
    daemon = receiver(per_client=2)
    with client() as first, client() as second, client() as third, client("127.0.0.2") as other:
        for sock in (other, first, second):
            ask(sock, b"x", daemon.port)
        # when a third comes from the same address, it is dropped while both others are fresh
        # and served once one of them was idle for a second; that one has ended
        wait_until_served(third, daemon.port)
        line = daemon.log.wait_for("core.error", 2, "Too many UDP sessions")
        assert line.fields["client_host"] == "127.0.0.1"
        daemon.log.wait_for("core.summary", 4, "Connection summary",
                            client_port=str(first.getsockname()[1]))
        # the client of another address is not touched
        assert ask(other, b"z", daemon.port)[0] == b"Z"
        assert len(daemon.log.find("core.session", 3, "Starting proxy instance")) == 4


def test_flood_is_reported_once_per_second(receiver):
    daemon = receiver(sessions=5, per_client=0)
    began_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(client()).sendto(b"x", ("127.0.0.1", daemon.port))
        daemon.log.wait_for("core.error", 2, "Too many UDP sessions", result="datagram dropped")
        with client() as probe:
            probe.sendto(b"x", ("127.0.0.1", daemon.port))
    # and whoever was idle for a second has made room for somebody
    reported = len(daemon.log.find("core.error", 2, "Too many UDP sessions"))
    served = len(daemon.log.find("core.session", 3, "Starting proxy instance"))
    elapsed_s = time.monotonic() - began_s
    assert reported <= elapsed_s + 1
    assert served <= 5 * (elapsed_s + 1)


def loopback_sources(number):
    """Yield so many addresses of this host, all different."""
    for index in range(number):
        yield f"127.{1 + index // 65_536}.{index // 256 % 256}.{index % 256}"


@pytest.mark.parametrize(("sources", "most"), [
    pytest.param(3000, 40, id="short"),
    pytest.param(100_000, 100, id="long", marks=[pytest.mark.soak, pytest.mark.timeout(600)])])
def test_flood_of_forged_sources_is_bounded(receiver, sources, most):
    """small-proxies P3."""
    daemon = receiver("self.timeout = 1500", sessions=most, per_client=0)
    with client() as first:
        ask(first, b"x", daemon.port)
    pid = daemon.worker_pid()
    before_kib, before_descriptors = resident_kib(pid), descriptors(pid)
    # when datagrams come from very many senders
    began_s, running = time.monotonic(), []
    for number, source in enumerate(loopback_sources(sources)):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as forged:
            forged.bind((source, 0))
            forged.sendto(b"x", ("127.0.0.1", daemon.port))
        if number % (sources // 20) == 0:
            running.append(int(tree(daemon, "service.dns.sessions_running")))
    # then no more sessions than permitted are open, beside those that are about to end
    assert max(running) <= 2 * most
    assert resident_kib(pid) - before_kib < 8192 + 64 * most
    # and somebody who means it is served as soon as one of the forged ones is idle
    with client() as honest:
        wait_until_served(honest, daemon.port)
    lines = daemon.log.find("core.error", 2, "Too many UDP sessions")
    assert 1 <= len(lines) <= time.monotonic() - began_s + 1
    # and when they were idle for long enough, nothing is left of them
    wait_until(lambda: tree(daemon, "service.dns.sessions_running") == "0", "the end of all sessions", 30)
    wait_until(lambda: descriptors(pid) <= before_descriptors + 4, "descriptors as before")
    started = len(daemon.log.find("core.session", 3, "Starting proxy instance"))
    wait_until(lambda: len(daemon.log.find("core.summary", 4, "Connection summary")) == started, "all summaries")


def test_bytes_of_both_directions_are_accounted(receiver):
    daemon = receiver("self.timeout = 4000")
    with client() as sock:
        for size in (1, 1000, 60_000):
            ask(sock, b"x" * size, daemon.port)
        # in the tree while the session runs (what was sent is counted just after the client has it)
        wait_until(lambda: [tree(daemon, f"conns.dns.0.0.0.{side}_bytes_{way}")
                            for side in ("client", "server") for way in ("recvd", "sent")] == ["61001"] * 4,
                   "the bytes in the tree")
        # and in the log
        daemon.log.wait_for("core.summary", 4, "Connection summary")
    sides = daemon.log.find("core.accounting", 4, "accounting info")
    assert [(side.fields["sent"], side.fields["received"]) for side in sides] == [("61001", "61001")] * 2


@pytest.mark.parametrize(("setting", "heard"), [("copy_to_server", []), ("copy_to_client", [b"x"])])
def test_a_direction_that_is_not_copied(receiver, server, setting, heard):
    daemon = receiver(f"self.{setting} = FALSE; self.timeout = 500")
    with client() as sock:
        sock.sendto(b"x", ("127.0.0.1", daemon.port))
        daemon.log.wait_for("plug.session", 3, "Connection timed out")
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(10)
    assert [data for data, _ in server.heard] == heard


def test_packet_statistics_count_datagrams(receiver):
    daemon = receiver("""self.packet_stats_interval_packet = 4

        def packetStats(self, *counts):
            proxyLog(self, "core.info", 3, "Counted; counts='%d,%d,%d,%d'", counts)
            return ZV_ACCEPT if counts[1] < 4 else ZV_REJECT""")
    with client() as sock:
        for data in (b"1", b"22", b"333", b"4444"):
            assert ask(sock, data, daemon.port)[0] == data
        # then the policy ends the session
        line = daemon.log.wait_for("plug.policy", 1, "packetStats() requested to abort session")
        assert line.fields["verdict"] == "3"
        summary = daemon.log.wait_for("core.summary", 4, "Connection summary")
        assert summary.fields["verdict"] == "ABORTED_BY_POLICY_ACTION"
        # and the next datagram begins another one
        assert ask(sock, b"5", daemon.port)[0] == b"5"
    counts = [line.fields["counts"] for line in daemon.log.find("core.info", 3, "Counted")]
    assert counts == ["3,2,3,2", "10,4,10,4"]


@pytest.mark.parametrize(("settings", "chainer", "text", "verdict"), [
    ("self.stack_proxy = PlugProxy", "", "Datagrams cannot go through a stacked proxy", "DENIED_BY_UNKNOWN_FAIL"),
    ("pass", ", chainer=SideStackChainer(PlugProxy)", "Datagrams cannot go through a side-stacked proxy",
     "DENIED_BY_CONNECTION_FAIL"),
], ids=["child", "beside"])
def test_datagrams_do_not_become_a_stream_on_their_way(receiver, server, settings, chainer, text, verdict):
    daemon = receiver(settings, chainer)
    with client() as sock:
        sock.sendto(b"x", ("127.0.0.1", daemon.port))
        daemon.log.wait_for("core.error", 3, text)
        summary = daemon.log.wait_for("core.summary", 4, "Connection summary")
    assert summary.fields["verdict"] == verdict
    assert server.heard == []


def test_datagrams_to_a_tcp_server_may_pass_two_proxies(receiver):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        daemon = receiver(chainer=", chainer=SideStackChainer(PlugProxy, ConnectChainer(protocol=ZD_PROTO_TCP))",
                          server_port=listener.getsockname()[1])
        with client() as sock:
            answered_over_tcp(sock, daemon, listener)


def test_a_session_is_stopped(receiver):
    daemon = receiver()
    with client() as one, client() as other, daemon.control() as control:
        ask(one, b"x", daemon.port)
        ask(other, b"x", daemon.port)
        assert control.ask("STOPSESSION svc/intra/dns:0") == "OK Session stop requested; proxies='1'"
        daemon.log.wait_for("core.info", 2, "User initiated proxy termination request received")
        daemon.log.wait_for("core.summary", 4, "Connection summary", client_port=str(one.getsockname()[1]))
        assert ask(other, b"y", daemon.port)[0] == b"Y"
        # and who was stopped may come again
        assert ask(one, b"z", daemon.port)[0] == b"Z"


def test_instances_of_a_service_are_limited(receiver):
    daemon = receiver("self.timeout = 1500", chainer=", max_instances=1")
    with client() as first, client() as second:
        ask(first, b"x", daemon.port)
        second.sendto(b"x", ("127.0.0.1", daemon.port))
        line = daemon.log.wait_for("core.policy", 1, "Connection over permitted limits")
        assert line.fields["info"] == "Limit error: Instance limit reached"
        # when the first is idle for long enough, the second is served
        daemon.log.wait_for("plug.session", 3, "Connection timed out")
        daemon.log.wait_for("core.summary", 4, "Connection summary", verdict="ACCEPTED")
        wait_until(lambda: tree(daemon, "service.dns.sessions_running") == "0", "the end of the first session")
        assert ask(second, b"y", daemon.port)[0] == b"Y"


def test_out_of_descriptors(receiver, monkeypatch):
    # given a worker that may open no more than eighty
    monkeypatch.setattr(Daemon, "prefix", ("prlimit", "--nofile=80:80"))
    daemon = receiver("self.timeout = 1500", per_client=0, arguments=("--fd-limit-min", "80", "--no-caps"))
    with client() as first:
        ask(first, b"x", daemon.port)
    pid = daemon.worker_pid()
    # when more clients come than that
    began_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(client()).sendto(b"x", ("127.0.0.1", daemon.port))
        lines = [daemon.log.wait_for("core.error", 3, "Error creating session socket, dropping packet")]
        assert lines[0].fields["error"] == "Too many open files"
    # then one line per second tells of it, and when sessions have ended, the next one is served
    with client() as honest:
        wait_until_served(honest, daemon.port)
        lines = daemon.log.find("core.error", 3, "Error creating session socket")
        assert len(lines) <= time.monotonic() - began_s + 1
    wait_until(lambda: tree(daemon, "service.dns.sessions_running") == "0", "the end of all sessions", 30)
    assert daemon.worker_pid() == pid


def test_sessions_of_one_target_may_share_a_proxy(receiver, server):
    daemon = receiver("self.secondary_mask = 0xC; self.timeout = 2000")
    with client() as one, client("127.0.0.2") as other:
        assert ask(one, b"a", daemon.port)[0] == b"A"
        assert ask(other, b"b", daemon.port)[0] == b"B"
        assert ask(one, b"c", daemon.port)[0] == b"C"
        daemon.log.wait_for("core.summary", 4, "Connection summary", count=2)
    # each has its own way to the server, and one proxy was made
    assert len(server.peers) == 2
    assert len(daemon.log.find("core.session", 5, "Proxy starting")) == 1
    ids = [line.session for line in daemon.log.find("core.session", 3, "Server connection established")]
    assert ids == ["svc/intra/dns:0/intra/plug", "svc/intra/dns:0/intra:1/plug"]


def test_refused_clients_hold_no_session(zorp, server):
    daemon = zorp("""
        from Zorp.Core import *
        from Zorp.Plug import *

        def intra():
            Zone("mine", ["127.0.0.2/32"])
            Service("dns", PlugProxy, router=DirectedRouter(SockAddrInet("127.0.0.1", $server_port)))
            ZoneReceiver(SockAddrInet("127.0.0.1", $port), {"mine": "dns"})
        """, port=free_port(socket.SOCK_DGRAM), server_port=server.port)
    with client("127.0.0.3") as stranger, client("127.0.0.2") as mine:
        stranger.sendto(b"x", ("127.0.0.1", daemon.port))
        daemon.log.wait_for("core.policy", 1, "Connection denied by policy")
        assert ask(mine, b"x", daemon.port)[0] == b"X"
    assert len(daemon.log.find("core.session", 3, "Starting proxy instance")) == 1
    assert not server.heard[1:]


def test_sessions_survive_a_reload(receiver, server):
    daemon = receiver()
    with client() as old, client() as new:
        ask(old, b"x", daemon.port)
        daemon.reload()
        assert ask(old, b"y", daemon.port)[0] == b"Y"
        assert ask(new, b"z", daemon.port)[0] == b"Z"
    assert len(server.peers) == 2


def test_ipv6(zorp):
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as server:
        server.bind(("::1", 0))
        server.settimeout(DEADLINE_S)
        daemon = zorp("""
            from Zorp.Core import *
            from Zorp.Plug import *

            def intra():
                Zone("all", ["::/0"])
                Service("dns", PlugProxy, router=DirectedRouter(SockAddrInet6("::1", $server_port)))
                Dispatcher(DBSockAddr(SockAddrInet6("::1", $port), ZD_PROTO_UDP), service="dns")
            """, port=free_port(socket.SOCK_DGRAM, "::1"), server_port=server.getsockname()[1])
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.settimeout(DEADLINE_S)
            sock.sendto(b"six", ("::1", daemon.port))
            data, peer = server.recvfrom(100)
            server.sendto(data.upper(), peer)
            answer, source = sock.recvfrom(100)
            assert (answer, source[:2]) == (b"SIX", ("::1", daemon.port))
