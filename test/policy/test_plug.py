"""Plug: what client and server see, and what the log says."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from test.support.daemon import wait_until
from test.support.ends import flood, is_reset, receive_all, reset
from test.support.plugs import exchange, plug, stacking
from test.support.proxies import serve
from Zorp.Constants import FALSE, TRUE, ZV_ACCEPT, ZV_REJECT
from Zorp.engine.builtin_proxy import running
from Zorp.Plug import AbstractPlugProxy, PlugProxy
from Zorp.transport import relay

__all__ = ["serve"]


WAYS = pytest.mark.parametrize("form", [None, PlugProxy], ids=["alone", "through a child"])


@WAYS
def test_bytes_pass_both_ways(serve, form):
    with serve(stacking(form)) as session:
        session.client.sendall(b"Haho")
        assert session.server.recv(10) == b"Haho"
        session.server.sendall(b"Hello")
        assert session.client.recv(10) == b"Hello"


def test_both_directions_at_once(serve):
    there, back = bytes(range(256)) * 8000, bytes(range(255, -1, -1)) * 8000
    with serve(plug(shutdown_soft=TRUE)) as session:

        def send(sock, data):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

        senders = [threading.Thread(target=send, args=pair)
                   for pair in ((session.client, there), (session.server, back))]
        received = {}
        readers = [threading.Thread(target=lambda name, sock: received.update({name: receive_all(sock)}), args=pair)
                   for pair in (("client", session.client), ("server", session.server))]
        for thread in (*senders, *readers):
            thread.start()
        for thread in (*senders, *readers):
            thread.join(20)
        assert received == {"client": back, "server": there}


def test_counters_of_the_streams(serve):
    with serve(PlugProxy) as session:
        exchange(session)
        session.client.sendall(b"12345")
        assert session.server.recv(5) == b"12345"
    texts = session.log.texts("core.accounting")
    assert [text.partition("duration='0', ")[2] for text in texts] == [
        "sent='1', received='6'", "sent='6', received='1'"]


@pytest.mark.parametrize(("setting", "talker", "other"), [
    ("copy_to_server", "client", "server"), ("copy_to_client", "server", "client")])
@WAYS
def test_direction_that_is_not_copied(serve, form, setting, talker, other):
    with serve(stacking(form, **{setting: FALSE})) as session:
        ends = {"client": session.client, "server": session.server}
        ends[talker].sendall(b"unheard")
        ends[other].sendall(b"heard")
        assert ends[talker].recv(10) == b"heard"
        # the session is up and the other direction still silent
        ends[other].setblocking(False)
        with pytest.raises(BlockingIOError):
            ends[other].recv(1)


@WAYS
def test_idle_session_is_closed_and_logged(serve, form):
    with serve(stacking(form, timeout=200)) as session:
        began = time.monotonic()
        exchange(session)
        assert is_reset(session.client)
        assert is_reset(session.server)
        assert time.monotonic() - began >= 0.2
        session.wait_for_end()
    line = session.log.find("Connection timed out; timeout='200'")[0]
    assert (line.tag, line.level) == ("plug.session", 3)


def test_traffic_in_one_direction_keeps_the_session(serve):
    with serve(plug(timeout=1500)) as session:
        exchange(session)
        began = time.monotonic()
        while time.monotonic() - began < 2:
            session.client.sendall(b"x")
            assert session.server.recv(1) == b"x"
            time.sleep(0.1)                     # the traffic whose rhythm is tested
        assert not session.log.find("Connection timed out")


@WAYS
def test_the_longest_time_that_can_be_set(serve, form):
    longest = (1 << 31) - 1
    with serve(stacking(form, timeout=longest, packet_stats_interval_time=longest)) as session:
        exchange(session)
        exchange(session)
    assert session.verdict == "ACCEPTED"


@pytest.mark.parametrize("timeout", [0, -1])
def test_no_timeout(serve, timeout):
    with serve(plug(timeout=timeout)) as session:
        exchange(session)
        settings = session.proxy._relay.settings
        assert settings.idle_ms is None


# packet statistics

class Counting(PlugProxy):
    calls = None

    def packetStats(self, client_bytes, client_pkts, server_bytes, server_pkts):
        self.calls.append((client_bytes, client_pkts, server_bytes, server_pkts))
        return ZV_ACCEPT


def send_one_by_one(session, count):
    """Each message arrives before the next is sent: one read each."""
    for _ in range(count):
        session.client.sendall(b"m")
        assert session.server.recv(1) == b"m"


@pytest.mark.parametrize("name", ["packet_stats_interval_packet", "packet_stats_interval"])
def test_packet_stats_that_accept(serve, name):
    proxy_class = plug(type("Counted", (Counting,), {"calls": []}), **{name: 5})
    with serve(proxy_class) as session:
        send_one_by_one(session, 12)
    assert proxy_class.calls == [(0, 0, 5, 5), (0, 0, 10, 10)]
    assert session.verdict == "ACCEPTED"


@pytest.mark.parametrize(("answer", "text"), [
    (ZV_REJECT, "packetStats() requested to abort session; verdict='3'"),
    (None, "Invalid return value of packetStats(), integer required;"),
    ("1", "Invalid return value of packetStats(), integer required;"),
])
def test_packet_stats_that_refuse(serve, answer, text):
    class Refusing(PlugProxy):
        def packetStats(self, *counts):
            return answer

    with serve(plug(Refusing, packet_stats_interval_packet=5)) as session:
        send_one_by_one(session, 5)
        assert is_reset(session.client)
        assert session.verdict == "ABORTED_BY_POLICY_ACTION"
    line = session.log.find(text)[0]
    assert (line.tag, line.level) == ("plug.policy", 1)


def test_packet_stats_that_raise(serve):
    class Raising(PlugProxy):
        def packetStats(self, *counts):
            raise ValueError("counts")

    with serve(plug(Raising, packet_stats_interval_packet=1)) as session:
        session.client.sendall(b"m")
        assert is_reset(session.client)
        assert session.verdict == "ABORTED_BY_POLICY_ACTION"


def test_interval_without_a_method_is_reported_and_ignored(serve):
    with serve(plug(packet_stats_interval_packet=1, packet_stats_interval_time=1)) as session:
        send_one_by_one(session, 3)
        exchange(session)
    assert session.verdict == "ACCEPTED"
    lines = session.log.find("Packet stats timeout elapsed, and no timeout callback specified;")
    assert [(line.tag, line.level) for line in lines] == [("core.error", 3)]


def test_abstract_method_says_so():
    with pytest.raises(NotImplementedError):
        AbstractPlugProxy.packetStats(None, 0, 0, 0, 0)


@WAYS
def test_packet_stats_by_time(serve, form):
    called = threading.Event()

    class Timed(PlugProxy):
        def packetStats(self, *counts):
            if counts == (1, 1, 1, 1):
                called.set()
            return ZV_ACCEPT

    with serve(plug(Timed, packet_stats_interval_time=50, stack_proxy=form)) as session:
        exchange(session)
        assert called.wait(10)


@WAYS
def test_idleness_is_noticed_between_two_statistics(serve, form):
    with serve(plug(type("Counted", (Counting,), {"calls": []}), packet_stats_interval_time=30,
                    timeout=200, stack_proxy=form)) as session:
        exchange(session)
        assert is_reset(session.client)
        session.wait_for_end()
    assert session.log.find("Connection timed out; timeout='200'")


@WAYS
def test_bandwidth_is_the_average_since_copying_began(serve, form):
    class Measuring(PlugProxy):
        seen = []

        def config(self):
            super().config()
            self.packet_stats_interval_packet = 1
            self.seen.append((self.bandwidth_to_server, self.bandwidth_to_client))

        def packetStats(self, client_bytes, client_pkts, server_bytes, server_pkts):
            self.seen.append((server_bytes / self.bandwidth_to_server, client_bytes, self.bandwidth_to_client))
            return ZV_ACCEPT

    began = time.monotonic()
    with serve(plug(Measuring, stack_proxy=form)) as session:
        # given a session in which the client sends, and nobody answers
        send_one_by_one(session, 1)
        wait_until(lambda: len(Measuring.seen) > 1, "the first average")
        time.sleep(0.3)                         # the time over which the average is taken
        send_one_by_one(session, 1)
        wait_until(lambda: len(Measuring.seen) > 2, "the second one")
        elapsed_s = time.monotonic() - began
    assert Measuring.seen[0] == (0.0, 0.0)
    (first_s, *_), (second_s, client_bytes, to_client) = Measuring.seen[1:3]
    # then bytes by bandwidth is the time since then
    assert second_s - first_s > 0.25
    assert second_s < elapsed_s
    assert (client_bytes, to_client) == (0, 0.0)


@WAYS
def test_policy_may_end_who_takes_too_much_bandwidth(serve, form):
    class Bounded(PlugProxy):
        def packetStats(self, *counts):
            return ZV_REJECT if self.bandwidth_to_server > 1_000_000 else ZV_ACCEPT

    with serve(plug(Bounded, packet_stats_interval_time=20, stack_proxy=form)) as session:
        # given somebody who is slow enough
        exchange(session)
        time.sleep(0.1)                         # in which packetStats() is asked several times
        exchange(session)
        # when he is not any more
        reader = threading.Thread(target=is_reset, args=(session.server,))
        reader.start()
        flood(session.client)
        reader.join()
        assert session.verdict == "ABORTED_BY_POLICY_ACTION"
    assert session.log.find("packetStats() requested to abort session; verdict='3'")


# the end

def test_soft_shutdown_lets_the_answer_through(serve):
    answer = b"0123456789abcdef" * 65536
    with serve(plug(shutdown_soft=TRUE)) as session:
        session.client.sendall(b"request")
        session.client.shutdown(socket.SHUT_WR)
        assert receive_all(session.server) == b"request"
        sender = threading.Thread(target=lambda: (session.server.sendall(answer), session.server.close()))
        sender.start()
        assert receive_all(session.client) == answer
        sender.join(10)


def test_hard_shutdown_delivers_what_was_sent(serve):
    with serve(PlugProxy) as session:
        exchange(session)
        session.server.sendall(b"x" * 100_000)
        session.server.close()
        assert receive_all(session.client) == b"x" * 100_000
        session.wait_for_end()


def test_hard_shutdown_delivers_to_a_client_that_is_still_talking(serve):
    # given a client whose own bytes nobody reads any more, which would turn a close into a reset
    with serve(PlugProxy) as session:
        exchange(session)
        session.server.sendall(b"y" * 50_000)
        session.client.sendall(b"z" * 1000)
        session.server.shutdown(socket.SHUT_WR)
        assert receive_all(session.client) == b"y" * 50_000


def test_hard_shutdown_ends_the_other_side(serve):
    with serve(PlugProxy) as session:
        exchange(session)
        session.client.shutdown(socket.SHUT_WR)
        assert session.server.recv(1) == b""
        assert session.client.recv(1) == b""


def test_peer_that_does_not_take_the_rest_is_not_waited_for(serve, monkeypatch):
    monkeypatch.setattr(relay, "DRAIN_MS", 200)
    with serve(PlugProxy) as session:
        # given a client that reads nothing, until the proxy holds bytes for it
        exchange(session)
        session.server.settimeout(1)
        flood(session.server)
        # when it closes its own direction
        session.client.shutdown(socket.SHUT_WR)
        # then the session ends soon, and says that bytes were lost
        session.wait_for_end()
    line = session.log.find("Peer did not take the last bytes in time;")[0]
    assert (line.tag, line.level) == ("plug.error", 3)


@pytest.mark.parametrize("breaker", ["client", "server"])
@pytest.mark.parametrize("soft", [TRUE, FALSE])
def test_reset_is_passed_on_as_reset(serve, breaker, soft):
    with serve(plug(shutdown_soft=soft)) as session:
        exchange(session)
        ends = {"client": session.client, "server": session.server}
        reset(ends.pop(breaker))
        (other,) = ends.values()
        with pytest.raises(ConnectionResetError):
            other.recv(1)


def test_end_of_file_mask_is_logged(serve):
    with serve(plug(shutdown_soft=TRUE)) as session:
        exchange(session)
        session.client.shutdown(socket.SHUT_WR)
        assert session.server.recv(1) == b""
        session.server.close()
        assert session.client.recv(1) == b""
        session.wait_for_end()
    lines = session.log.find("eofmask updated")
    assert [line.text for line in lines] == [
        "eofmask updated; old_mask='0000', eof_mask='0009'", "eofmask updated; old_mask='0009', eof_mask='004f'"]
    assert (lines[0].tag, lines[0].level) == ("core.debug", 7)


# settings and refusals

def test_bytes_that_were_read_before_are_passed_first(serve):
    class Peeking(PlugProxy):
        def startup(self):
            data = self.client_stream.read(6)
            self.client_stream.unread(data.encode("latin-1"))

    with serve(Peeking) as session:
        session.client.sendall(b"before")
        assert session.server.recv(6) == b"before"
        session.client.sendall(b"after")
        assert session.server.recv(5) == b"after"


def test_small_buffer_size_does_not_make_small_reads(serve):
    with serve(plug(buffer_size=10)) as session:
        exchange(session)
        assert session.proxy._relay.settings.read_bytes == 65536


def test_request_stack_that_raises_ends_the_session(serve):
    class Raising(PlugProxy):
        def requestStack(self):
            raise ValueError("stack")

    with serve(Raising) as session:
        assert session.client.recv(1) == b""
        assert session.verdict == "ABORTED_BY_POLICY_ACTION"


def test_plug_of_a_parent_shuts_down_softly(serve):
    class Parent(PlugProxy):
        softness = []

        def startup(self):
            # a stacked proxy is one that has a parent
            child = PlugProxy.__new__(PlugProxy)
            child._parent = self
            child._vars = PlugProxy._table.new_vars()
            child._engine_start()
            self.softness += [self.shutdown_soft, child._vars.shutdown_soft]

    with serve(Parent) as session:
        exchange(session)
    assert Parent.softness == [FALSE, TRUE]


def test_attributes_of_secondary_sessions_can_be_set(serve):
    with serve(plug(secondary_sessions=100, secondary_mask=0xC)) as session:
        exchange(session)
    assert session.verdict == "ACCEPTED"


# ---------------------------------------------------------------- half of a transfer does not look like a whole one

class Failing(PlugProxy):
    def packetStats(self, *counts):
        raise ValueError("counts")


CUT_SHORT = {
    "by an administrator": (plug(), True),
    "by idleness": (plug(timeout=100), False),
    "by the policy": (plug(Failing, packet_stats_interval_packet=1), False),
    "in a stacked proxy by an administrator": (plug(stack_proxy=PlugProxy), True),
    "in a stacked proxy by idleness": (plug(timeout=100, stack_proxy=PlugProxy), False),
}


@pytest.mark.parametrize(("proxy", "is_stopped"), CUT_SHORT.values(), ids=CUT_SHORT)
@pytest.mark.parametrize("half_close", [FALSE, TRUE])
def test_a_transfer_that_is_cut_short_ends_with_a_reset(serve, proxy, is_stopped, half_close):
    # given half of an upload
    with serve(plug(proxy, shutdown_soft=half_close)) as session:
        session.client.sendall(b"half of it")
        assert session.server.recv(100) == b"half of it"
        # when the session is cut short, then neither side takes that for the end of the data
        if is_stopped:
            assert running.stop_session(session.master.session_id)
        assert is_reset(session.server)
        assert is_reset(session.client)


@pytest.mark.parametrize("is_stopped", [True, False])
def test_who_has_got_everything_sees_an_orderly_end_all_the_same(serve, is_stopped):
    # given a complete upload, which the server does not answer
    with serve(plug(shutdown_soft=TRUE, timeout=600_000 if is_stopped else 100)) as session:
        session.client.sendall(b"all of it")
        session.client.shutdown(socket.SHUT_WR)
        assert receive_all(session.server) == b"all of it"
        # when the session is cut short
        if is_stopped:
            assert running.stop_session(session.master.session_id)
        # then only the client, which waits for an answer, is reset
        assert is_reset(session.client)
        session.wait_for_end()
        assert session.server.recv(1) == b""


@pytest.mark.parametrize("sides", [("client",), ("client", "server")])
def test_a_session_whose_peers_do_not_read_is_stopped_at_once(serve, sides):
    # given peers that send and do not read, until nothing more can be sent
    with serve(plug()) as session:
        exchange(session)
        for side in sides:
            sock = getattr(session, side)
            sock.settimeout(1)
            flood(sock)
            sock.settimeout(10)
        # when an administrator stops it, then it ends
        assert running.stop_session(session.master.session_id)
        session.wait_for_end()
        assert is_reset(session.server)


def test_a_client_that_never_stops_sending_is_stopped(serve):
    with serve(plug()) as session:
        exchange(session)
        reader = threading.Thread(target=is_reset, args=(session.server,))
        writer = threading.Thread(target=flood, args=(session.client,))
        for thread in (reader, writer):
            thread.start()
        assert running.stop_session(session.master.session_id)
        session.wait_for_end()
        for thread in (reader, writer):
            thread.join()
