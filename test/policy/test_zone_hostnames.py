"""Host name zones: addresses that a resolver feeds, and their conflicts (zones-rules 5)."""

import threading

import pytest

from test.support.zones import address, log_lines, no_zones, zone_name
from Zorp.Exceptions import PolicyError
from Zorp.Zone import Zone, claimants
from Zorp.zones.table import MAX_ADDRESSES_PER_NAME

__all__ = ["log_lines", "no_zones"]
pytestmark = pytest.mark.usefixtures("no_zones")


def feed(**answers):
    return Zone.zone_subnet_tree.feed({name.replace("_", "."): addresses for name, addresses in answers.items()})


def test_scenario_28_addresses_follow_the_name():
    # given a zone with a host name
    Zone("internet", "0.0.0.0/0")
    Zone("partner", hostnames="h.example")
    assert Zone.has_dynamic_subnet
    assert zone_name("198.51.100.5") == "internet"
    # when it resolves, the address is in the zone
    assert feed(h_example=["198.51.100.5", "2001:db8::5"]) == ["h.example"]
    assert zone_name("198.51.100.5") == zone_name("2001:db8::5") == zone_name("::ffff:198.51.100.5") == "partner"
    # and when the name moves, the new one is and the old one is not
    feed(h_example=["198.51.100.6"])
    assert [zone_name(a) for a in ("198.51.100.6", "198.51.100.5", "2001:db8::5")] == ["partner", "internet", None]


def test_scenario_29_an_address_of_two_zones_is_in_neither_while_the_clash_lasts():
    Zone("a", hostnames="a.example")
    Zone("b", hostnames="b.example")
    feed(a_example=["198.51.100.5", "198.51.100.6"], b_example=["198.51.100.5"])
    assert (zone_name("198.51.100.5"), zone_name("198.51.100.6")) == (None, "a")
    assert disputing("198.51.100.5") == disputing("::ffff:198.51.100.5") == ["a", "b"]
    assert disputing("198.51.100.6") == []
    feed(b_example=["198.51.100.7"])
    assert (zone_name("198.51.100.5"), zone_name("198.51.100.7")) == ("a", "b")
    assert disputing("198.51.100.5") == []


def disputing(text):
    return [zone.name for zone in claimants(address(text))]


def test_a_dispute_is_logged_when_it_begins_and_when_it_ends_and_not_in_between(log_lines):
    Zone("a", hostnames="a.example")
    Zone("b", hostnames="b.example")
    feed(a_example=["198.51.100.5", "2001:db8::5"], b_example=["198.51.100.5", "2001:db8::5", "198.51.100.6"])
    feed(b_example=["198.51.100.5", "2001:db8::5"])
    feed(b_example=["198.51.100.7"])
    told = [(tag, level, text) for tag, level, text in log_lines if text.startswith("Host names of several zones")]
    assert told == [
        ("core.error", 2, "Host names of several zones have the same addresses, connections are refused unless all "
         "these zones permit them; zones='a,b', addresses='198.51.100.5,2001:db8::5', count='2'"),
        ("core.info", 4, "Host names of several zones do not have the same addresses any more; zones='a,b', "
         "addresses='198.51.100.5,2001:db8::5', count='2'")]


def test_scenario_30_a_static_address_stays_with_its_zone():
    Zone("x", "198.51.100.5/32")
    Zone("y", hostnames="y.example")
    Zone("z", hostnames="z.example")
    feed(y_example=["198.51.100.5"], z_example=["198.51.100.5"])
    assert zone_name("198.51.100.5") == "x"
    assert disputing("198.51.100.5") == []


def test_a_resolved_address_beats_every_wider_static_net():
    Zone("net", "198.51.100.4/31")
    Zone("y", "203.0.113.0/24", "y.example")
    feed(y_example=["198.51.100.5"])
    assert (zone_name("198.51.100.5"), zone_name("198.51.100.4"), zone_name("203.0.113.1")) == ("y", "net", "y")
    assert Zone.lookupByStaticAddress(address("198.51.100.5")).name == "net"
    assert Zone.lookupByStaticAddressExactly(address("198.51.100.5")) is None


def test_two_names_of_one_zone_may_share_an_address():
    Zone("a", hostnames=["a.example", "b.example"])
    feed(a_example=["198.51.100.5"], b_example=["198.51.100.5"])
    assert zone_name("198.51.100.5") == "a"


def test_a_name_that_is_not_fed_again_keeps_its_addresses():
    Zone("a", hostnames=["a.example", "b.example"])
    feed(a_example=["198.51.100.5"])
    feed(b_example=["198.51.100.6"])
    assert zone_name("198.51.100.5") == "a"
    feed(a_example=[])
    assert zone_name("198.51.100.5") is None


def test_changes_are_logged_and_repetitions_are_not(log_lines):
    Zone("a", hostnames="a.example")
    feed(a_example=["198.51.100.6", "198.51.100.5"])
    feed(a_example=["198.51.100.5", "198.51.100.6"], unknown_example=["198.51.100.9"])
    feed(a_example=["198.51.100.5", "2001:db8::1"])
    assert [text for _, _, text in log_lines] == [
        "Addresses of a host name changed; zone='a', host='a.example', added='198.51.100.5,198.51.100.6', removed=''",
        "Addresses of a host name changed; zone='a', host='a.example', added='2001:db8::1', removed='198.51.100.6'"]


@pytest.mark.parametrize("text", ["0.0.0.0", "127.0.0.1", "127.8.8.8", "224.0.0.1", "255.255.255.255", "::", "::1",
                                  "ff02::1", "::ffff:127.0.0.1", "x", ""])
def test_addresses_that_no_name_server_may_put_into_a_zone(text, log_lines):
    Zone("a", hostnames="a.example")
    feed(a_example=[text])
    assert log_lines == [
        ("core.policy", 2, f"Address of host name is not used; hostname='a.example', address='{text}'")]


def test_a_name_has_a_bounded_number_of_addresses(log_lines):
    Zone("a", hostnames="a.example")
    feed(a_example=[f"198.51.{n // 250}.{n % 250 + 1}" for n in range(MAX_ADDRESSES_PER_NAME + 1)])
    assert zone_name(f"198.51.{(MAX_ADDRESSES_PER_NAME - 1) // 250}.6") == "a"
    assert "not used" in log_lines[0][2]


def test_lookup_by_host_name_ignores_case_and_the_final_dot():
    zone = Zone("a", hostnames=("A.Example.", "b.example"))
    assert zone.hostnames == ("a.example", "b.example")
    assert Zone.lookupByHostname("a.EXAMPLE") is zone
    assert Zone.lookupByHostname("b.example.") is zone
    assert Zone.lookupByHostname("c.example") is None
    assert Zone.zone_subnet_tree.hostnames() == ("a.example", "b.example")


def test_a_host_name_in_two_zones_is_refused():
    Zone("a", hostnames="h.example")
    with pytest.raises(ValueError, match=r"Zone with duplicate host name; hostname='h.example', zone=Zone\(a\)"):
        Zone("b", hostnames=["H.example"])


@pytest.mark.parametrize("hostnames", [["a b"], [" a.example"], [7], b"a.example", ["x" * 254], ["a.example/24", ""]])
def test_host_names_that_are_none(hostnames):
    Zone("other", hostnames="ok.example")
    with pytest.raises(PolicyError, match="Invalid host name"):
        Zone("a", hostnames=hostnames)


def test_no_host_names_leave_the_flag_alone():
    assert Zone("a", "10.0.0.0/8", hostnames="").hostnames == ()
    assert Zone("b", hostnames=None).hostnames == ()
    assert not Zone.has_dynamic_subnet


def test_a_lookup_sees_old_or_new_addresses_never_none_while_they_change():
    # given an address that belongs to the zone before and after every change
    Zone("a", hostnames=["a.example", "b.example"])
    feed(a_example=["198.51.100.5"])
    stop, missing = threading.Event(), []

    def look():
        probe = address("198.51.100.5")
        while not stop.is_set():
            if Zone.lookup(probe) is None:
                missing.append(1)

    reader = threading.Thread(target=look)
    reader.start()
    # when other addresses come and go meanwhile
    try:
        for n in range(300):
            feed(b_example=[f"203.0.113.{n % 200 + 1}"])
    finally:
        stop.set()
        reader.join(10)
    # then no look-up ever missed it
    assert missing == []
