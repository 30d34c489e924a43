"""Statistics: counting, properties, the tree, and events that policies report."""

import json
import threading

import pytest

from Zorp import Szig
from Zorp.Constants import (
    Z_SZIG_CONNECTION_PROPS,
    Z_SZIG_CONNECTION_START,
    Z_SZIG_CONNECTION_STOP,
    Z_SZIG_SERVICE_COUNT,
    Z_SZIG_THREAD_START,
    Z_SZIG_TYPE_CONNECTION_PROPS,
    Z_SZIG_TYPE_LONG,
    Z_SZIG_TYPE_PROPS,
    Z_SZIG_TYPE_STRING,
    Z_SZIG_TYPE_TIME,
)
from Zorp.Szig import Statistics, szigEvent

from test.support.logged import captured_log


@pytest.fixture
def statistics(monkeypatch):
    statistics = Statistics()
    monkeypatch.setattr(Szig, "statistics", statistics)
    return statistics


def test_top_nodes_exist_from_the_start_and_have_no_value():
    statistics = Statistics()
    assert statistics.children(()) == ["conns", "info", "service", "stats"]
    assert statistics.value(("conns",)) is None
    assert statistics.value(("stats", "sessions_running")) is None
    assert statistics.value(("nosuch", "node")) is None


def test_three_sessions_one_after_the_other():
    # given three sessions of one service that came and went
    statistics = Statistics()
    for number in range(3):
        statistics.service_started("web", number, 1570611049.123)
        statistics.service_stopped("web")
    # then the service was started three times and nothing runs
    assert statistics.value(("service", "web", "session_number")) == "3"
    assert statistics.value(("service", "web", "sessions_running")) == "0"
    assert statistics.value(("service", "web", "sessions_max")) == "1"
    assert statistics.value(("service", "web", "last_started")) == "1570611049.12"


def test_properties_of_a_connection_live_as_long_as_it_does():
    statistics = Statistics()
    key = ("web", 17, 0, 0)
    statistics.service_started("web", 17, 1.0)
    statistics.connection_opened(key, lambda: {"client_zone": "office", "server_zone": "internet"})
    statistics.server_connected(key, "office", "internet")
    path = ("conns", "web", "17", "0", "0")
    assert statistics.children(path) == ["client_zone", "server_zone"]
    assert statistics.value((*path, "client_zone")) == "office"
    assert statistics.value(("stats", "sessions_running")) == "1"
    assert statistics.value(("service", "web", "inbound_zones")) == "internet(1)"
    assert statistics.value(("service", "web", "outbound_zones")) == "office(1)"
    # when it ends, then its node is gone and the service's stays
    statistics.connection_closed(key)
    assert statistics.value((*path, "client_zone")) is None
    assert statistics.children(("conns", "web")) == []
    assert statistics.children(("conns",)) == ["web"]
    assert statistics.value(("stats", "sessions_running")) == "0"


def test_connections_that_share_an_instance_stand_side_by_side():
    statistics = Statistics()
    statistics.service_started("web", 17, 1.0)
    first, second, other = ("web", 17, 0, 0), ("web", 17, 1, 0), ("web", 18, 0, 0)
    for key in (first, second, other):
        statistics.connection_opened(key, dict)
    assert statistics.connection_properties(second, {"auth_user": "joe"})
    assert statistics.children(("conns", "web")) == ["17", "18"]
    assert statistics.children(("conns", "web", "17")) == ["0", "1"]
    assert statistics.value(("conns", "web", "17", "1", "0", "auth_user")) == "joe"
    statistics.connection_closed(first)
    assert statistics.children(("conns", "web", "17")) == ["1"]
    # when the number comes again, then with nothing of the one before
    statistics.connection_closed(second)
    statistics.connection_opened(second, dict)
    assert statistics.tree()["conns"]["web"] == {"17": {"1": {"0": {}}}, "18": {"0": {"0": {}}}}


class Address:
    """An object of a policy whose text is what a function returns."""

    def __init__(self, text):
        self._text = text

    def __str__(self):
        return self._text()


def test_text_of_a_policys_object_is_made_without_the_lock():
    # given a connection whose address does not return from str() before others are counted
    statistics = Statistics()
    counted, asked = threading.Event(), threading.Event()

    def wait():
        asked.set()
        return "late" if counted.wait(10) else "never"

    statistics.service_started("web", 1, 1.0)
    statistics.connection_opened(("web", 1, 0, 0), lambda: {"client_address": Address(wait)})
    found = []
    asking = threading.Thread(target=lambda: found.append(statistics.tree()["conns"]["web"]["1"]["0"]["0"]))
    asking.start()
    assert asked.wait(10)
    # when somebody wants to know, then others are counted meanwhile
    counting = threading.Thread(target=lambda: (statistics.service_started("web", 2, 1.0), counted.set()), daemon=True)
    counting.start()
    asking.join()
    assert found == [{"client_address": "late"}]
    counting.join()


def test_a_connection_that_cannot_be_described_costs_its_own_entry_only():
    statistics = Statistics()

    def leave():
        raise SystemExit("not this one")

    with captured_log() as logged:
        for number, describe in enumerate((leave, lambda: {"client_address": Address(leave), "client_zone": "office"},
                                           lambda: {"client_zone": "office"})):
            statistics.service_started("web", number, 1.0)
            statistics.connection_opened(("web", number, 0, 0), describe)
        instances = statistics.tree()["conns"]["web"]
        assert [instances[number]["0"]["0"] for number in "012"] == [
            {}, {"client_address": None, "client_zone": "office"}, {"client_zone": "office"}]
        assert statistics.value(("conns", "web", "1", "0", "0", "client_address")) is None
        assert statistics.value(("conns", "web", "1", "0", "0", "client_zone")) == "office"
    assert logged.texts("core.error")


def test_late_properties_do_not_bring_a_connection_back():
    statistics = Statistics()
    key = ("web", 1, 0, 0)
    assert not statistics.connection_properties(key, {"auth_user": "x"})
    assert statistics.tree()["conns"] == {}


def test_end_of_an_unknown_connection_is_reported():
    with captured_log() as logged:
        Statistics().connection_closed(("web", 5, 0, 0))
    assert logged.has("Internal error, end-of-service notification referred to a non-existent service;"
                      " service='%s:%d:%d'", ("web", 5, 0))


def test_siblings_follow_the_order_of_bytes():
    statistics = Statistics()
    statistics.service_started("web", 10, 1.0)
    for number in (9, 10):
        statistics.connection_opened(("web", number, 0, 0), dict)
    assert statistics.children(("conns", "web")) == ["10", "9"]
    assert statistics.next_sibling(("conns", "web", "10")) == "9"
    assert statistics.next_sibling(("conns", "web", "9")) is None
    assert statistics.next_sibling(("conns",)) == "info"


def test_threads_and_rates(monkeypatch):
    # given sixty threads started in five seconds
    statistics = Statistics()
    for _ in range(60):
        statistics.thread_started()
    statistics.thread_stopped()
    now = [1000.0]
    monkeypatch.setattr(Szig.time, "monotonic", lambda: now[0])
    # when the ticks are counted
    statistics.tick()
    # then the rates are per second, whole numbers
    assert statistics.value(("stats", "threads_running")) == "59"
    assert statistics.value(("stats", "thread_number")) == "60"
    assert statistics.value(("stats", "threads_max")) == "60"
    assert statistics.value(("stats", "thread_rate_max")) == "12"
    assert statistics.value(("stats", "thread_rate_avg1")) == "1"
    assert statistics.value(("stats", "thread_rate_avg15")) == "0"
    # and a minute later they are out of the shortest window, the maximum stays
    now[0] += 61
    statistics.tick()
    assert statistics.value(("stats", "thread_rate_avg1")) == "0"
    assert statistics.value(("stats", "thread_rate_max")) == "12"


def test_counters_go_on_in_the_next_generation():
    old, new = Statistics(), Statistics()
    old.service_started("web", 41, 5.0)
    new.adopt_state(json.loads(json.dumps(old.export_state())))
    assert new.value(("service", "web", "session_number")) == "42"
    assert new.value(("service", "web", "sessions_running")) == "0"


def test_counting_from_many_threads_loses_nothing():
    statistics = Statistics()

    def work(offset):
        for number in range(200):
            key = ("web", offset + number, 0, 0)
            statistics.service_started("web", offset + number, 1.0)
            statistics.connection_opened(key, dict)
            statistics.connection_closed(key)
            statistics.service_stopped("web")
    threads = [threading.Thread(target=work, args=(n * 1000,)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statistics.value(("stats", "sessions_running")) == "0"
    assert statistics.value(("service", "web", "sessions_running")) == "0"


# ------------------------------------------------------------------ szigEvent

@pytest.mark.parametrize(("value", "text"), [
    ((Z_SZIG_TYPE_LONG, "1"), "Z_SZIG_TYPE_LONG requires an integer argument"),
    ((Z_SZIG_TYPE_TIME, 5), "Z_SZIG_TYPE_TIME requires"),
    ((Z_SZIG_TYPE_STRING, 1), "Z_SZIG_TYPE_STRING requires a string argument"),
    ((Z_SZIG_TYPE_PROPS, ("x", 1)), "Z_SZIG_TYPE_PROPS requires a mapping as 2nd argument"),
    ((Z_SZIG_TYPE_PROPS, ("x", {"a": 1.5})), "Z_SZIG_TYPE_PROPS requires a string->string or string->int mapping"),
    ((Z_SZIG_TYPE_PROPS, ("x", {1: "a"})), "Z_SZIG_TYPE_PROPS cannot handle not string keys"),
    ((Z_SZIG_TYPE_CONNECTION_PROPS, ("x", 0, 0, 0)), "Z_SZIG_TYPE_CONNECTION_PROPS requires a mapping as 5th argument"),
    ((Z_SZIG_TYPE_CONNECTION_PROPS, ("x", 0, 0, 0, {"a": 1})),
     "Z_SZIG_TYPE_CONNECTION_PROPS requires a string->string mapping"),
    ((99, 1), "Unknown SZIG type;"),
])
def test_arguments_of_the_wrong_kind_are_refused(statistics, value, text):
    with pytest.raises(ValueError, match="^" + text):
        szigEvent(Z_SZIG_SERVICE_COUNT, value)


def test_events_of_policies_are_counted(statistics):
    statistics.connection_opened(("web", 0, 0, 0), dict)
    szigEvent(Z_SZIG_THREAD_START, (Z_SZIG_TYPE_LONG, 0))
    szigEvent(Z_SZIG_CONNECTION_PROPS, (Z_SZIG_TYPE_CONNECTION_PROPS, ("web", 0, 0, 0, {"auth_user": "joe"})))
    szigEvent(Z_SZIG_CONNECTION_START, (Z_SZIG_TYPE_PROPS, ("web", {})))
    szigEvent(Z_SZIG_SERVICE_COUNT, (Z_SZIG_TYPE_PROPS, ("web", {"colour": "red"})))
    tree = statistics.tree()
    assert tree["conns"]["web"]["0"]["0"]["0"] == {"auth_user": "joe"}
    assert tree["stats"]["sessions_running"] == 2
    assert tree["stats"]["threads_running"] == 1
    assert tree["service"]["web"]["colour"] == "red"
    szigEvent(Z_SZIG_CONNECTION_STOP, (Z_SZIG_TYPE_CONNECTION_PROPS, ("web", 0, 0, 0, {})))
    assert statistics.tree()["conns"] == {"web": {}}


def test_event_with_an_argument_of_another_event_counts_nothing(statistics):
    before = statistics.tree()
    szigEvent(Z_SZIG_SERVICE_COUNT, (Z_SZIG_TYPE_LONG, 1))
    assert statistics.tree() == before


def test_seventeenth_property_is_dropped_and_reported(statistics):
    with captured_log() as logged:
        szigEvent(Z_SZIG_SERVICE_COUNT, (Z_SZIG_TYPE_PROPS, ("web", {f"p{n:02}": n for n in range(17)})))
    assert logged.has("Internal error, error adding property, properties are limited to 16 elements; add_name='%s'",
                      ("p16",))
    assert "p16" not in statistics.tree()["service"]["web"]
