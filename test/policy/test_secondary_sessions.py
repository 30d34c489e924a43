"""Connections that join a running plug: who may, what they share, what they have of their own."""

from __future__ import annotations

import pytest

from test.support.daemon import wait_until
from test.support.gateway import Gateway, Server, ended, exchange
from Zorp.acceptance.secondary_sessions import secondary_sessions
from Zorp.Szig import statistics

POLICY = """
    from Zorp.Core import *
    from Zorp.Plug import *

    Zone("office", ["127.0.0.0/25"])
    Zone("internet", ["0.0.0.0/0"])

    class Joined(PlugProxy):
        $declared

        def config(self):
            PlugProxy.config(self)
            $configured
            self._private = self.note = []
            self.packet_stats_interval_packet = 1
            SEEN.setdefault("config", []).append(self)

        def startup(self):
            SEEN.setdefault("startup", []).append(self)

        def packetStats(self, *counts):
            self.note.append(self.session.secondary_connection_id)
            self._private is self.note or SEEN.setdefault("lost", True)
            return $verdict

        def shutdown(self):
            SEEN.setdefault("shutdown", []).append(self.session.secondary_connection_id)
            SEEN["note"] = self.note

    class Other(PlugProxy):
        pass

    def gateway():
        Service("svc", Joined, router=$router, max_instances=$most)
        Service("other", Other, router=DirectedRouter(SockAddrInet("127.0.0.1", $server_port)))
        CSZoneListener(SockAddrInet("127.0.0.1", 50080), {("office", "*"): "svc"})
        Listener(SockAddrInet("127.0.0.1", 50081), "svc")
"""
DESTINATION = ("192.0.2.1", 80)


@pytest.fixture
def server():
    with Server() as running:
        yield running


@pytest.fixture
def gateway(server):
    """Return a function that makes the gateway; its sessions are over when the test is."""
    made = []

    def make(declared="secondary_mask = 0xC", configured="pass", most=0, verdict="ZV_ACCEPT",
             router='DirectedRouter(SockAddrInet("127.0.0.1", $server_port))'):
        made.append(Gateway(POLICY.replace("$router", router), server_port=server.port, declared=declared,
                            configured=configured, most=most, verdict=verdict).__enter__())
        return made[-1]

    yield make
    for one in made:
        one.__exit__(None, None, None)
    wait_until(lambda: not secondary_sessions._groups and not secondary_sessions._masks, "the end of all groups")


def proxies(gateway):
    return len(gateway.logged.find("Proxy starting"))


def test_off_unless_the_policy_sets_one_of_the_attributes(gateway):
    running = gateway(declared="pass")
    clients = [running.connect(DESTINATION) for _ in range(2)]
    assert [exchange(client) for client in clients] == [b"ping"] * 2
    assert proxies(running) == 2


@pytest.mark.parametrize(("declared", "configured"), [
    ("secondary_mask = 0xC", "pass"), ("secondary_sessions = 10", "self.secondary_mask = 0xC"),
    ("pass", "self.secondary_mask = 0xC")])
def test_second_connection_joins_the_running_proxy(gateway, server, declared, configured):
    # given a running session, one instance at most permitted
    running = gateway(declared, configured, most=1)
    first = running.connect(DESTINATION)
    assert exchange(first) == b"ping"
    # when another client goes to the same target
    second = running.connect(DESTINATION, source="127.0.0.9")
    assert exchange(second, b"other") == b"other"
    # then it has a connection of its own to the server, and no proxy was made or configured for it
    assert len(server.wait_for_peers(2)) == 2
    assert proxies(running) == 1
    assert len(running.seen["config"]) == len(running.seen["startup"]) == 1
    assert running.service("svc").num_instances == 1
    # and its id and its place in the statistics are those of the second one of this proxy
    lines = running.logged.find("Server connection established")
    base = lines[0].session.removesuffix("/plug")
    assert lines[1].session == f"{base}:1/plug"
    tree = statistics.tree()["conns"]["svc"][base.split("/")[2].partition(":")[2]]
    assert tree["0"]["0"]["client_address"] != tree["1"]["0"]["client_address"]
    assert tree["1"]["0"]["session_id"] == f"{base}:1"
    # when the first one ends, the second goes on, and others may still join
    first.close()
    running.logged.wait_for("Connection summary")
    assert exchange(second, b"still") == b"still"
    third = running.connect(DESTINATION)
    assert exchange(third) == b"ping"
    assert running.logged.find("Server connection established")[2].session == f"{base}:2/plug"
    assert "shutdown" not in running.seen
    # then the end of the last one is the end of the proxy; everybody has a summary
    second.close()
    third.close()
    wait_until(lambda: len(running.logged.find("Connection summary")) == 3, "the summaries")
    wait_until(lambda: len(running.logged.find("Proxy ending")) == 1, "the end of the proxy")
    assert len(running.seen["shutdown"]) == 1
    # the same object of the policy's own was seen by all of them
    assert set(running.seen["note"]) == {0, 1, 2}
    assert "lost" not in running.seen
    assert not statistics.tree()["conns"]["svc"]


@pytest.mark.parametrize(("mask", "same", "other"), [
    (0x1, {"source": "127.0.0.1"}, {"source": "127.0.0.2"}),
    (0x4, {"to": ("192.0.2.1", 81)}, {"to": ("192.0.2.2", 80)}),
    (0x8, {"to": ("192.0.2.2", 80)}, {"to": ("192.0.2.1", 81)}),
    (0xD, {"to": DESTINATION}, {"source": "127.0.0.2", "to": DESTINATION}),
])
def test_properties_of_the_mask_must_agree(gateway, mask, same, other):
    running = gateway(f"secondary_mask = {mask}")
    assert exchange(running.connect(**{"to": DESTINATION, "source": "127.0.0.1"})) == b"ping"
    assert exchange(running.connect(**{"to": DESTINATION, "source": "127.0.0.1", **same})) == b"ping"
    assert proxies(running) == 1
    assert exchange(running.connect(**{"to": DESTINATION, "source": "127.0.0.1", **other})) == b"ping"
    assert proxies(running) == 2


def test_all_four_properties_differ_by_default(gateway):
    running = gateway("secondary_sessions = 100")
    for _ in range(2):
        assert exchange(running.connect(DESTINATION)) == b"ping"
    assert proxies(running) == 2


def test_no_more_than_permitted_join(gateway):
    running = gateway("secondary_mask = 0xC; secondary_sessions = 2")
    clients = [running.connect(DESTINATION) for _ in range(1)]
    assert exchange(clients[0]) == b"ping"
    for _ in range(5):
        clients.append(running.connect(DESTINATION))
        assert exchange(clients[-1]) == b"ping"
    # three in each of two proxies
    assert proxies(running) == 2
    # and a seat that becomes free is taken again, under a number that nobody had
    clients[1].close()
    running.logged.wait_for("Connection summary")
    assert exchange(running.connect(DESTINATION)) == b"ping"
    assert proxies(running) == 2
    assert running.logged.find("Server connection established")[-1].session.endswith(":3/plug")


def test_none_join_when_none_may(gateway):
    running = gateway("secondary_mask = 0xC; secondary_sessions = 0")
    for _ in range(2):
        assert exchange(running.connect(DESTINATION)) == b"ping"
    assert proxies(running) == 2


def test_joining_is_no_way_around_the_dispatcher(gateway):
    # given a running session of the office, whose proxy takes everybody who goes there
    running = gateway()
    assert exchange(running.connect(DESTINATION)) == b"ping"
    # when somebody of a zone without a service comes
    stranger = running.connect(DESTINATION, source="127.0.0.200")
    # then nobody serves him
    assert ended(stranger)
    assert len(running.logged.find("Server connection established")) == 1


def test_another_listener_has_proxies_of_its_own(gateway):
    running = gateway()
    assert exchange(running.connect(DESTINATION)) == b"ping"
    assert exchange(running.connect(DESTINATION, chain=1)) == b"ping"
    assert proxies(running) == 2


def test_a_secondary_session_is_checked_and_ends_alone(gateway):
    # given a router that fails for one client only
    running = gateway(router="""type("Picky", (DirectedRouter,), {
            "routeConnection": lambda self, session: session.client_address.ip_s == "127.0.0.9" and 1 / 0
                or DirectedRouter.routeConnection(self, session)})(SockAddrInet("127.0.0.1", $server_port))""")
    first = running.connect(DESTINATION)
    assert exchange(first) == b"ping"
    assert ended(running.connect(DESTINATION, source="127.0.0.9"))
    line = running.logged.wait_for("Connection summary")
    assert "verdict='DENIED_BY_UNKNOWN_FAIL'" in line.text
    assert exchange(first) == b"ping"
    assert exchange(running.connect(DESTINATION)) == b"ping"
    assert proxies(running) == 1


def test_policy_that_refuses_ends_the_one_that_asked(gateway):
    running = gateway(verdict="ZV_ACCEPT if self.session.secondary_connection_id == 0 else ZV_REJECT")
    first = running.connect(DESTINATION)
    assert exchange(first) == b"ping"
    second = running.connect(DESTINATION)
    second.sendall(b"x")
    running.logged.wait_for("packetStats() requested to abort session; verdict='3'")
    assert exchange(first) == b"ping"


@pytest.mark.parametrize("value", ["-1", "'3'", "None"])
def test_values_that_make_no_sense_end_the_session(gateway, value):
    running = gateway(f"secondary_sessions = {value}")
    assert ended(running.connect(DESTINATION))
    assert running.logged.find("Policy cannot be used; error='Invalid secondary_sessions;")
