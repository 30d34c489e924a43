"""Chainers for several servers: order, rotation, down state, giving up, counting."""

from __future__ import annotations

import threading
import time
import types

import pytest

from test.support.chaining import address_of, asking
from test.support.deaf import unused_port
from test.support.gateway import Server
from test.support.zones import no_zones
from Zorp.Chainer import (
    AvailabilityChainer,
    FailoverChainer,
    LeastConnectionChainer,
    MultiTargetChainer,
    RoundRobinAvailabilityChainer,
    RoundRobinChainer,
    SourceIPBasedChainer,
    StateBasedChainer,
)
from Zorp.Chainer._state import ConnectionCounts, Rotation
from Zorp.Constants import FALSE, TRUE, ZD_PROTO_TCP
from Zorp.Exceptions import PolicyError
from Zorp.Router import DirectedRouter
from Zorp.SockAddr import SockAddrInet, SockAddrInet6
from Zorp.Zone import Zone

__all__ = ["asking", "no_zones"]

DEADLINE_S = 10
FAMILY = [MultiTargetChainer, RoundRobinChainer, FailoverChainer, AvailabilityChainer,
          RoundRobinAvailabilityChainer, SourceIPBasedChainer, LeastConnectionChainer]
WITH_STATE = [RoundRobinChainer, FailoverChainer, SourceIPBasedChainer, LeastConnectionChainer]


@pytest.fixture(autouse=True)
def own_zones(no_zones):
    """No zone is known."""


@pytest.fixture
def pair():
    """Two servers that are up."""
    with Server() as a, Server(host="127.0.0.2") as b:
        yield a, b


@pytest.fixture
def dead():
    """The address of a server that is down."""
    with unused_port() as port:
        yield SockAddrInet("127.0.0.1", port)


def both(pair):
    return DirectedRouter([address_of(server) for server in pair])


def count_of(pair):
    return [len(server.peers) for server in pair]


# all of the family

@pytest.mark.parametrize("chainer", FAMILY)
def test_target_that_is_down_is_not_the_end(asking, dead, chainer):
    with Server() as server:
        made = chainer()
        for count in (1, 2, 3):
            asked = asking(DirectedRouter([dead, address_of(server)]), made)
            assert asked.connect() is not None
            server.wait_for_peers(count)
            assert str(asked.session.server_address) == str(address_of(server))


@pytest.mark.parametrize("chainer", FAMILY)
def test_no_target_at_all(asking, chainer):
    asked = asking(DirectedRouter([]), chainer())
    assert asked.connect() is None
    assert asked.log.has("Server connection failure, no destination;", ())
    assert asked.log.find("Traceback") == []


@pytest.mark.parametrize("chainer", FAMILY)
def test_one_target(asking, chainer, dead):
    with Server() as server:
        asked = asking(DirectedRouter(address_of(server)), chainer())
        assert asked.connect() is not None
    assert asking(DirectedRouter(dead), chainer()).connect() is None


@pytest.mark.parametrize("chainer", FAMILY)
def test_every_attempt_has_its_own_line(asking, chainer, dead):
    with unused_port("127.0.0.2") as port:
        targets = [dead, SockAddrInet("127.0.0.2", port)]
        asked = asking(DirectedRouter(targets), chainer())
        assert asked.connect() is None
    failures = asked.log.find("Server connection failure; server_address=")
    rounds = 2 if chainer in WITH_STATE else 1
    assert len(failures) == 2 * rounds
    for target in targets:
        assert sum(str(target) in failure.text for failure in failures) == rounds


@pytest.mark.parametrize("chainer", FAMILY)
def test_session_that_gave_up_can_ask_again_and_does_not_hang(asking, chainer, dead):
    """Scenario 16, and the third connect of one session, on which the original looped for ever."""
    asked = asking(DirectedRouter([dead]), chainer())
    for _ in range(4):
        assert asked.connect() is None
    attempts = len(asked.log.find("Server connection failure;"))
    # those that keep state: two rounds, later ones find it marked and try it in the second round only
    assert attempts == (5 if chainer in WITH_STATE else 4)


@pytest.mark.parametrize("chainer", FAMILY)
def test_refusal_by_access_control_ends_the_attempt(asking, chainer, pair):
    """As always: the first target that the policy forbids ends it, unless the site says otherwise."""
    Zone("forbidden", "127.0.0.1/32")
    Zone("permitted", "127.0.0.2/32")
    first = address_of(pair[0])
    router = DirectedRouter([first, address_of(pair[1])])
    made = chainer()
    client = SockAddrInet("127.0.0.4", 1)              # an even address: the first target by source
    asked = asking(router, made, limit_target_zones_to=("permitted",), client=client)
    assert asked.connect() is None
    assert asked.verdict == "DENIED_BY_POLICY"
    assert count_of(pair) == [0, 0]
    # when the site says otherwise, then the next one serves
    made = chainer()
    made.next_after_refusal = TRUE
    asked = asking(router, made, limit_target_zones_to=("permitted",), client=client)
    assert asked.connect() is not None
    pair[1].wait_for_peers(1)
    # and where all are forbidden the refusal is the result
    asked = asking(router, made, limit_target_zones_to=("elsewhere",))
    assert asked.connect() is None
    assert asked.log.find("DAC policy violation;")


@pytest.mark.parametrize("chainer", FAMILY)
def test_stop_request_ends_the_walk(asking, chainer, dead):
    asked = asking(DirectedRouter([dead, dead, dead]), chainer())
    connect_target = asked.session.chainer.connectTarget

    def stopping(session, local, remote):
        asked.proxy.request_stop()
        return connect_target(session, local, remote)

    asked.session.chainer.connectTarget = stopping
    assert asked.connect() is None
    assert len(asked.log.find("Server connection failure;")) == 1
    assert asked.log.find("Destination is down, keeping state;") == []


# rotation

@pytest.mark.parametrize("chainer", [MultiTargetChainer, RoundRobinChainer, RoundRobinAvailabilityChainer,
                                     lambda: FailoverChainer(round_robin=TRUE)])
def test_connections_are_split_evenly(asking, pair, chainer):
    """Scenario 17."""
    made = chainer()
    for _ in range(10):
        assert asking(both(pair), made).connect() is not None
    for server in pair:
        server.wait_for_peers(5)
    assert count_of(pair) == [5, 5]
    assert made.connection_count == 10


def test_split_stays_even_with_threads(asking, pair):
    """Scenario 17: eight threads at once."""
    made = RoundRobinChainer()
    sessions = [asking(both(pair), made) for _ in range(32)]
    start = threading.Barrier(8)

    def eight(mine):
        start.wait(DEADLINE_S)
        for asked in mine:
            assert asked.connect() is not None

    threads = [threading.Thread(target=eight, args=(sessions[i::8],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    pair[0].wait_for_peers(16)
    pair[1].wait_for_peers(16)
    assert count_of(pair) == [16, 16]


def test_failures_do_not_disturb_the_rotation(asking, pair, dead):
    """The original counted attempts: with an even number of failures one host got everything."""
    made = MultiTargetChainer()
    a, b = map(address_of, pair)
    for _ in range(6):
        asking(DirectedRouter([a, dead, b, dead]), made).connect()
    # every first index has its turn: a, (dead) b, b, (dead) a, a, (dead) b
    pair[0].wait_for_peers(3)
    pair[1].wait_for_peers(3)
    assert count_of(pair) == [3, 3]


def test_first_target_stays_first_for_failover_and_availability(asking, pair):
    for chainer in (FailoverChainer(), AvailabilityChainer()):
        for _ in range(3):
            asking(both(pair), chainer).connect()
    pair[0].wait_for_peers(6)
    assert count_of(pair) == [6, 0]


def test_reconnect_of_a_session_selects_anew(asking, pair):
    asked = asking(both(pair), RoundRobinChainer())
    for _ in range(4):
        asked.connect()
        asked.proxy._disconnect_server()
    pair[0].wait_for_peers(2)
    pair[1].wait_for_peers(2)
    assert count_of(pair) == [2, 2]


def test_hooks_of_sites(asking, pair):
    """getFirstTargetIndex(), disableTarget() and getNextTarget() may be overridden."""
    calls = []

    class Own(FailoverChainer):
        def getFirstTargetIndex(self, session):
            calls.append("first")
            return 1

        def disableTarget(self, session, target_local, target_remote):
            calls.append(("down", str(target_remote)))
            FailoverChainer.disableTarget(self, session, target_local, target_remote)

        def getNextTarget(self, session):
            calls.append("next")
            return FailoverChainer.getNextTarget(self, session)

    with unused_port() as port:
        down = SockAddrInet("127.0.0.1", port)
        assert asking(DirectedRouter([address_of(pair[0]), down]), Own()).connect() is not None
    assert calls == ["next", "first", ("down", str(down)), "next"]


def test_own_loop_of_a_site_over_get_next_target(asking, pair):
    """restart() and getNextTarget() without chainParent(): each target once, then none."""
    chainer = MultiTargetChainer()
    session = asking(both(pair), chainer).session
    for _ in range(2):
        chainer.restart(session)
        first, second = chainer.getNextTarget(session), chainer.getNextTarget(session)
        assert {str(first[1]), str(second[1])} == {str(address_of(server)) for server in pair}
        assert chainer.getNextTarget(session) == (None, None)


def test_targets_that_change_begin_another_round(asking, pair):
    chainer = MultiTargetChainer()
    session = asking(both(pair), chainer).session
    chainer.getNextTarget(session)
    session.setTargetAddress(SockAddrInet("192.0.2.1", 1))
    assert str(chainer.getNextTarget(session)[1]) == "AF_INET(192.0.2.1:1)"
    assert chainer.getNextTarget(session) == (None, None)


def test_site_with_targets_of_its_own(asking, pair):
    """A site's getNextTarget() need not look at the session's targets."""
    class Own(RoundRobinChainer):
        def __init__(self, targets):
            RoundRobinChainer.__init__(self)
            self.targets = list(targets)

        def getNextTarget(self, session):
            return None, self.targets.pop(0) if self.targets else None

    with unused_port() as port:
        chainer = Own([SockAddrInet("127.0.0.1", port), address_of(pair[1])])
        assert asking(DirectedRouter([]), chainer).connect() is not None
        assert asking(DirectedRouter([]), chainer).connect() is None
    pair[1].wait_for_peers(1)


# down state

def test_failover_skips_what_another_session_found_down(asking, dead):
    """Scenario 14."""
    with Server() as server:
        router, chainer = DirectedRouter([dead, address_of(server)]), FailoverChainer()
        asked = asking(router, chainer)
        assert asked.connect() is not None
        assert asked.log.has("Destination is down, keeping state; remote='%s'", (str(dead),))
        # when the next session connects
        asked = asking(router, chainer)
        assert asked.connect() is not None
        # then no packet goes to the one that is down
        assert asked.log.has("Destination is down, skipping; remote='%s'", (str(dead),))
        assert len(asked.log.find("Server connection failure;")) == 1


def test_failover_returns_to_a_server_that_is_back(asking):
    """Scenario 15, with a shorter time."""
    with Server(host="127.0.0.2") as b:
        with unused_port() as port:
            router, chainer = DirectedRouter([SockAddrInet("127.0.0.1", port), address_of(b)]), \
                FailoverChainer(timeout_state=1000)
            marked_s = time.monotonic()
            asking(router, chainer).connect()
        with Server(port=port) as a:
            # when it is back but still marked, then it is passed over
            asking(router, chainer).connect()
            assert a.peers == [] or time.monotonic() - marked_s > 1
            # and when the mark is old enough, it serves again
            limit = time.monotonic() + DEADLINE_S
            while not a.peers and time.monotonic() < limit:
                asking(router, chainer).connect()
                time.sleep(0.05)
            assert a.peers


def test_two_full_rounds_then_giving_up(asking, dead):
    """Scenario 16."""
    with unused_port("127.0.0.2") as port:
        asked = asking(DirectedRouter([dead, SockAddrInet("127.0.0.2", port)]), FailoverChainer())
        assert asked.connect() is None
    texts = [message.text for message in asked.log.messages if message.tag == "core.message"]
    assert texts == [
        f"Destination is down, keeping state; remote='{dead}'",
        f"Destination is down, keeping state; remote='AF_INET(127.0.0.2:{port})'",
        "All destinations are down, clearing cache and trying again;",
        f"Destination is down, keeping state; remote='{dead}'",
        f"Destination is down, keeping state; remote='AF_INET(127.0.0.2:{port})'",
        "All destinations are down for two full iterations, giving up;",
    ]
    assert asked.verdict == "DENIED_BY_CONNECTION_FAIL"


def test_targets_that_all_were_marked_are_still_tried_once(asking, dead):
    chainer = FailoverChainer()
    asking(DirectedRouter([dead]), chainer).connect()
    asked = asking(DirectedRouter([dead]), chainer)
    before = len(asked.log.find("Server connection failure;"))
    assert asked.connect() is None
    assert len(asked.log.find("Server connection failure;")) == before + 1


def test_forgetting_is_only_about_the_own_targets(asking, dead):
    """A service whose servers are all down must not wipe out what others know."""
    with unused_port("127.0.0.2") as port, Server() as server:
        chainer, other = FailoverChainer(), SockAddrInet("127.0.0.2", port)
        asking(DirectedRouter([other, address_of(server)]), chainer).connect()
        asking(DirectedRouter([dead]), chainer).connect()
        asked = asking(DirectedRouter([other, address_of(server)]), chainer)
        assert asked.connect() is not None
        assert asked.log.has("Destination is down, skipping; remote='%s'", (str(other),))


def test_state_is_kept_by_address_and_port(asking, dead):
    """Another port of the same host is another server."""
    with Server() as server:
        chainer = FailoverChainer()
        asking(DirectedRouter([dead, address_of(server)]), chainer).connect()
        asked = asking(DirectedRouter(address_of(server)), chainer)
        assert asked.connect() is not None
        assert not asked.log.find("All destinations are down")


def test_sessions_that_fail_together_end(asking, dead):
    """Eight sessions mark and forget the same targets at the same time; each ends after two rounds."""
    with unused_port("127.0.0.2") as port:
        chainer = RoundRobinChainer()
        router = DirectedRouter([dead, SockAddrInet("127.0.0.2", port)])
        results = []
        sessions = [asking(router, chainer) for _ in range(8)]
        threads = [threading.Thread(target=lambda asked=asked: results.append(asked.connect())) for asked in sessions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        assert results == [None] * 8


# availability

def test_unavailable_targets_are_passed_over(asking, pair):
    class Checked(AvailabilityChainer):
        def isAvailable(self, target):
            return target.ip_s != "127.0.0.1"

    assert asking(both(pair), Checked()).connect() is not None
    pair[1].wait_for_peers(1)
    assert count_of(pair) == [0, 1]


# by the client's address

def bare_session(client, targets=3):
    """The object that a published test passes: three attributes and nothing else."""
    return types.SimpleNamespace(
        owner=types.SimpleNamespace(client_address=client), target_local=None,
        target_address=tuple(SockAddrInet("10.0.0.1", 8000 + n) for n in range(targets)))


def test_source_decides():
    """Scenario 41."""
    chainer = SourceIPBasedChainer()
    for port in (1, 2, 3):
        session = bare_session(SockAddrInet("1.2.3.4", port))
        assert chainer.getNextTarget(session) == (None, session.target_address[1])
        session = bare_session(SockAddrInet6("ff::", port))
        assert chainer.getNextTarget(session) == (None, session.target_address[0])


def test_source_based_answer_does_not_depend_on_earlier_questions():
    chainer = SourceIPBasedChainer()
    session = bare_session(SockAddrInet("1.2.3.4", 1))
    assert {str(chainer.getNextTarget(session)[1]) for _ in range(5)} == {"AF_INET(10.0.0.1:8001)"}
    session.owner.client_address = SockAddrInet("1.2.3.5", 1)
    assert str(chainer.getNextTarget(session)[1]) == "AF_INET(10.0.0.1:8002)"


def test_source_based_chainer_takes_the_next_one_while_its_own_is_down(asking):
    """Scenario 41: and the old one again when its mark is old."""
    client = SockAddrInet("127.0.0.5", 1)            # an odd address: the second of two
    with Server() as a:
        with unused_port("127.0.0.2") as port:
            router = DirectedRouter([address_of(a), SockAddrInet("127.0.0.2", port)])
            chainer = SourceIPBasedChainer(timeout_state=1000)
            asked = asking(router, chainer, client=client)
            marked_s = time.monotonic()
            assert asked.connect() is not None
            a.wait_for_peers(1)
            asking(router, chainer, client=client).connect()
            assert len(asked.log.find("Server connection failure;")) == 1 or time.monotonic() - marked_s > 1
        with Server(host="127.0.0.2", port=port) as b:
            limit = time.monotonic() + DEADLINE_S
            while not b.peers and time.monotonic() < limit:
                asking(router, chainer, client=client).connect()
                time.sleep(0.05)
            assert b.peers


# by the number of connections

def test_given_numbers_decide():
    chainer = LeastConnectionChainer()
    session = bare_session(SockAddrInet("1.2.3.4", 1))
    asked_for = []

    def number(targets, index):
        asked_for.append((targets, index))
        return [5, 2, 2][index]

    for _ in range(3):
        assert chainer.getNextTarget(session, number) == (None, session.target_address[1])
    assert {targets for targets, _ in asked_for} == {session.target_address}
    assert {index for _, index in asked_for} == {0, 1, 2}


def test_handed_out_targets_count_by_themselves():
    chainer = LeastConnectionChainer()
    ports = [chainer.getNextTarget(bare_session(SockAddrInet("1.2.3.4", 1)))[1].port for _ in range(6)]
    assert ports == [8000, 8001, 8002] * 2


def test_long_connection_sends_the_next_ones_elsewhere(asking, pair):
    """Scenario 42."""
    chainer = LeastConnectionChainer()
    first = asking(both(pair), chainer).connect()
    second = asking(both(pair), chainer).connect()
    asking(both(pair), chainer).connect()
    pair[0].wait_for_peers(2)
    pair[1].wait_for_peers(1)
    assert count_of(pair) == [2, 1]
    # when the connections to the first end, then it is its turn again
    first.close()
    first.close()                                     # counts once
    second.close()
    asking(both(pair), chainer).connect()
    pair[1].wait_for_peers(2)
    asking(both(pair), chainer).connect()
    pair[0].wait_for_peers(3)


def test_failed_connects_are_not_counted(asking, dead):
    with Server() as server:
        chainer = LeastConnectionChainer(timeout_state=1)
        for _ in range(3):
            asking(DirectedRouter([dead, address_of(server)]), chainer).connect()
        asking(DirectedRouter([dead]), chainer).connect()
        Zone("all", "0.0.0.0/0")
        refused = asking(DirectedRouter([dead]), chainer, limit_target_zones_to=("elsewhere",))
        assert refused.connect() is None
        assert chainer._counts.number(str(dead)) == 0
        assert chainer._counts.number(str(address_of(server))) == 3


# shared state

def test_rotation_of_nothing():
    assert Rotation().next_index(0) == 0


def test_counts_forget_targets_without_connections():
    counts = ConnectionCounts()
    for n in range(100):
        counts.enter_least([n])
    for n in range(100):
        counts.leave(n)
        counts.leave(n)
    assert counts._counts == {}


# constructors

def test_positional_order_of_arguments():
    chainer = StateBasedChainer(ZD_PROTO_TCP, 1500, 2500)
    assert (chainer.protocol, chainer.timeout_connect, chainer.state.timeout) == (ZD_PROTO_TCP, 1500, 3)
    chainer = FailoverChainer(ZD_PROTO_TCP, 0, 2500, 1500, TRUE)
    assert (chainer.protocol, chainer.timeout_connect, chainer.state.timeout, chainer.round_robin) == (
        ZD_PROTO_TCP, 1500, 3, TRUE)
    assert FailoverChainer().round_robin == FALSE


@pytest.mark.parametrize("chainer", WITH_STATE)
def test_time_a_target_stays_down(chainer):
    assert chainer().state.timeout == 60
    assert chainer(timeout_state=1).state.timeout == 1
    assert chainer().state.name == "chainer-state"


def test_obsolete_timeout_is_in_seconds_and_wins():
    assert FailoverChainer(timeout=30, timeout_state=1000).state.timeout == 30


@pytest.mark.parametrize("wrong", [{"timeout_state": -1}, {"timeout": -1}, {"timeout": "soon"},
                                   {"timeout_connect": -5}])
def test_impossible_times_are_refused_at_load(wrong):
    with pytest.raises(PolicyError):
        FailoverChainer(**wrong)
