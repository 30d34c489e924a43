"""Host names of zones against a real name server: TTL, grace, conflicts (zones-rules 5.3, 11)."""

import time

import pytest

from test.support.dns_server import SERVFAIL, DnsServer
from test.support.zones import log_lines, no_zones, zone_name
from Zorp import ResolverCache
from Zorp.zones import names as zone_names
from Zorp.Config import config
from Zorp.Zone import Zone

__all__ = ["log_lines", "no_zones"]
pytestmark = pytest.mark.usefixtures("no_zones")


@pytest.fixture
def dns():
    with DnsServer() as server:
        yield server


@pytest.fixture
def clock(monkeypatch):
    """Lets time pass for the cache and the refresher: clock(seconds)."""
    passed = [0.0]
    real_monotonic, real_time = time.monotonic, time.time
    monkeypatch.setattr(ResolverCache, "monotonic", lambda: real_monotonic() + passed[0])
    monkeypatch.setattr(time, "time", lambda: real_time() + passed[0])

    def advance(seconds):
        passed[0] += seconds

    return advance


def names(dns):
    return zone_names.ZoneNames(Zone.zone_subnet_tree, ResolverCache.DNSResolver(server=dns.address, timeout=2))


def test_scenario_28_the_address_changes_after_the_ttl_and_not_before(dns, clock):
    # given a zone with a host name, resolved
    Zone("partner", hostnames="h.example")
    dns.set("h.example", "A", "198.51.100.5", ttl=120)
    refresher = names(dns)
    assert 110 < refresher.refresh() <= 120
    assert zone_name("198.51.100.5") == "partner"
    # when the name moves, nothing happens within the TTL
    dns.set("h.example", "A", "198.51.100.6", ttl=120)
    clock(60)
    refresher.refresh()
    assert zone_name("198.51.100.6") is None
    # then after it the new address is in the zone and the old one is not
    clock(61)
    refresher.refresh()
    assert (zone_name("198.51.100.6"), zone_name("198.51.100.5")) == ("partner", None)


def test_scenario_31_the_last_addresses_outlive_a_dead_name_server_for_the_grace_period(dns, clock):
    # given a resolved name and a grace period of ten minutes
    config.options.zone_dns_grace = 600
    Zone("partner", hostnames="h.example")
    dns.set("h.example", "A", "198.51.100.5", ttl=60)
    dns.set("h.example", "AAAA", "2001:db8::5", ttl=60)
    refresher = names(dns)
    refresher.refresh()
    # when the name server fails
    dns.behaviour = SERVFAIL
    clock(300)
    assert refresher.refresh() <= 60
    assert (zone_name("198.51.100.5"), zone_name("2001:db8::5")) == ("partner", "partner")
    # then the addresses go when the grace period is over
    clock(361)
    refresher.refresh()
    assert (zone_name("198.51.100.5"), zone_name("2001:db8::5")) == (None, None)


def test_short_ttls_are_stretched_to_a_minute(dns, clock):
    Zone("partner", hostnames="h.example")
    dns.set("h.example", "A", "198.51.100.5", ttl=1)
    assert 55 < names(dns).refresh() <= 60


def test_the_first_answer_and_its_absence_are_logged(dns, log_lines):
    Zone("a", hostnames="h.example")
    Zone("b", hostnames="nosuch.example")
    dns.set("h.example", "A", "198.51.100.5", ttl=300)
    names(dns).refresh()
    assert ("core.error", 2, "Hostname cannot be resolved; name='nosuch.example', zone='b'") in log_lines
    assert any(text.startswith("Hostname initially added to the cache; name='h.example', ttl='")
               and text.endswith("addresses='198.51.100.5', zone='a'") for _, _, text in log_lines)


def test_the_thread_keeps_the_table_current_and_stops(dns):
    Zone("partner", hostnames="h.example")
    dns.set("h.example", "A", "198.51.100.5", ttl=300)
    refresher = names(dns)
    thread = refresher.start()
    deadline = time.monotonic() + 5
    while zone_name("198.51.100.5") is None and time.monotonic() < deadline:
        thread.join(0.01)
    assert zone_name("198.51.100.5") == "partner"
    refresher.stop()
    thread.join(5)
    assert not thread.is_alive()


def test_without_names_there_is_nothing_to_wait_for(dns):
    Zone("plain", "10.0.0.0/8")
    assert names(dns).refresh() == 3600
    assert dns.queries == []


def test_a_name_that_cannot_be_handed_over_keeps_no_other_name_from_its_zone(dns, monkeypatch):
    # given two names, and a defect of ours that one of them meets on its way to its zone
    Zone("bad", hostnames="bad.example")
    Zone("partner", hostnames="h.example")
    dns.set("bad.example", "A", "198.51.100.4", ttl=120)
    dns.set("h.example", "A", "198.51.100.5", ttl=120)
    table = Zone.zone_subnet_tree
    feed = table.feed

    def failing(answers):
        if "bad.example" in answers:
            raise KeyError("a defect")
        return feed(answers)

    monkeypatch.setattr(table, "feed", failing)
    # when the names are looked up, then the other one arrives, and both have had their turn
    assert 110 < names(dns).refresh() <= 120
    assert zone_name("198.51.100.5") == "partner"
