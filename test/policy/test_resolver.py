"""Resolvers of policies (addressing-helpers 3) against a real name server."""

import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from test.support.dns_server import SERVFAIL, SILENCE, DnsServer
from test.support.logged import captured_log
from Zorp import Globals
from Zorp.matching import host_names
from Zorp.Constants import AF_INET, AF_INET6
from Zorp.matching.host_names import SystemNames, address_from_text, host_name, server_from_text
from Zorp.Resolver import (
    AbstractResolver,
    DNSResolver,
    HashResolver,
    ResolverPolicy,
    create_sockaddr,
    getResolverPolicy,
)


@pytest.fixture
def names(monkeypatch, tmp_path):
    """A name server that is the host's only source, beside an empty hosts file."""
    with DnsServer() as server:
        server.hosts = tmp_path / "hosts"
        server.hosts.write_text("")
        monkeypatch.setattr(host_names, "system_names", SystemNames(str(server.hosts), server.address))
        yield server


@pytest.fixture
def policies(monkeypatch):
    monkeypatch.setattr(Globals, "resolver_policies", {})


def texts(answer):
    return [str(address) for address in answer]


# ------------------------------------------------------------------ DNSResolver

def test_scenario_14_each_address_comes_once(names):
    names.set("two.test", "A", "192.0.2.1", "192.0.2.2")
    answer = DNSResolver(multi=True).resolve("two.test", 80)
    assert sorted(texts(answer)) == ["AF_INET(192.0.2.1:80)", "AF_INET(192.0.2.2:80)"]


def test_scenario_15_only_the_family_that_was_asked_for(names):
    names.set("both.test", "A", "192.0.2.1")
    names.set("both.test", "AAAA", "2001:db8::1")
    assert texts(DNSResolver(multi=True, family=AF_INET6).resolve("both.test", 25)) == ["AF_INET6(2001:db8::1:25)"]
    assert str(DNSResolver(family=AF_INET).resolve("both.test", 25)) == "AF_INET(192.0.2.1:25)"
    assert sorted(texts(DNSResolver(multi=True).resolve("both.test", 25))) == [
        "AF_INET(192.0.2.1:25)", "AF_INET6(2001:db8::1:25)"]


def test_an_address_with_a_route_comes_first(names, monkeypatch):
    names.set("both.test", "A", "192.0.2.1")
    names.set("both.test", "AAAA", "2001:db8::1")
    for routed, text in ((AF_INET, "AF_INET(192.0.2.1:1)"), (AF_INET6, "AF_INET6(2001:db8::1:1)")):
        monkeypatch.setattr(host_names, "_has_route", lambda address, routed=routed: address.family == routed)
        assert str(DNSResolver().resolve("both.test", 1)) == text


def test_a_single_answer_is_one_address_and_no_answer_is_none(names):
    names.set("one.test", "A", "192.0.2.1")
    assert str(DNSResolver().resolve("one.test", 80)) == "AF_INET(192.0.2.1:80)"
    assert DNSResolver().resolve("missing.test", 80) is None
    assert DNSResolver(multi=True).resolve("missing.test", 80) is None


@pytest.mark.parametrize("host", [
    "a..b", "a" * 64 + ".test", ".".join(["a" * 60] * 5), "", ".", "a b.test", "a\0b", "a\\065.test", "a/b",
    "ä\udcff.test",
])
def test_what_no_host_can_be_called_is_none_without_a_query(names, host):
    assert DNSResolver().resolve(host, 80) is None
    assert names.queries == []


@pytest.mark.parametrize("host", [
    "10.1", "0x7f.0.0.1", "2130706433", "127.1", "017700000001", "1.2.3.4.5", "0x7f000001",
])
def test_numbers_that_the_c_library_takes_for_addresses_are_none_without_a_query(names, host):
    assert DNSResolver().resolve(host, 80) is None
    assert names.queries == []


def test_an_address_is_its_own_answer_without_a_query(names):
    assert str(DNSResolver().resolve("192.0.2.7", 80)) == "AF_INET(192.0.2.7:80)"
    assert texts(DNSResolver(multi=True).resolve("2001:db8::7", 80)) == ["AF_INET6(2001:db8::7:80)"]
    assert DNSResolver(family=AF_INET6).resolve("192.0.2.7", 80) is None
    assert names.queries == []


def test_ipv4_in_disguise_is_ipv4(names):
    names.set("sly.test", "AAAA", "::ffff:10.0.0.1")
    assert texts(DNSResolver(multi=True).resolve("sly.test", 80)) == ["AF_INET(10.0.0.1:80)"]
    assert str(DNSResolver().resolve("::ffff:10.0.0.1", 80)) == "AF_INET(10.0.0.1:80)"
    assert DNSResolver(family=AF_INET6).resolve("sly.test", 80) is None


def test_answers_are_kept_for_their_ttl(names):
    names.set("kept.test", "A", "192.0.2.1", ttl=60)
    names.set("short.test", "A", "192.0.2.1", ttl=0)
    for _ in range(3):
        DNSResolver(family=AF_INET).resolve("kept.test", 80)
        DNSResolver(family=AF_INET).resolve("short.test", 80)
    assert names.queries.count(("kept.test", "A")) == 1
    assert names.queries.count(("short.test", "A")) == 3


def test_the_hosts_file_comes_first_and_is_read_again(names):
    names.set("local.test", "A", "192.0.2.9")
    names.hosts.write_text("# comment\n127.0.0.5 Local.test other # tail\n::1 local.test\nnonsense line\n")
    assert sorted(texts(DNSResolver(multi=True).resolve("local.test.", 1))) == [
        "AF_INET(127.0.0.5:1)", "AF_INET6(::1:1)"]
    assert str(DNSResolver().resolve("OTHER", 1)) == "AF_INET(127.0.0.5:1)"
    assert names.queries == []
    names.hosts.write_text("127.0.0.66 local.test\n")
    assert str(DNSResolver().resolve("local.test", 1)) == "AF_INET(127.0.0.66:1)"


def test_a_silent_name_server_costs_a_bounded_time(names, monkeypatch):
    usual_s = host_names.LIFETIME_SECONDS
    monkeypatch.setattr(host_names, "LIFETIME_SECONDS", 0.5)
    names.set("slow.test", "A", "192.0.2.1")
    names.behaviour = SILENCE
    with captured_log() as logged:
        started = time.monotonic()
        assert DNSResolver().resolve("slow.test", 80) is None
        assert time.monotonic() - started < usual_s
    assert logged.find("Error while resolving host; host='slow.test', record_type='A', error='LifetimeTimeout'")


def test_a_failing_record_type_does_not_hide_the_other(names, monkeypatch):
    monkeypatch.setattr(host_names, "LIFETIME_SECONDS", 1)
    names.set("half.test", "A", "192.0.2.1")
    names.silent_types = {"AAAA"}
    assert str(DNSResolver().resolve("half.test", 80)) == "AF_INET(192.0.2.1:80)"
    names.behaviour = SERVFAIL
    assert DNSResolver().resolve("other.test", 80) is None


def test_large_answers_come_over_tcp(names):
    names.truncates_udp = True
    names.set("many.test", "A", *(f"192.0.2.{number}" for number in range(1, 200)))
    assert len(DNSResolver(multi=True, family=AF_INET).resolve("many.test", 80)) == 199


def test_names_beyond_ascii_are_asked_for_in_their_idna_form(names):
    names.set("xn--bcher-kva.test", "A", "192.0.2.1")
    for host in ("bücher.test", "bücher.test".encode().decode("latin-1"), "XN--BCHER-KVA.test"):
        assert str(DNSResolver().resolve(host, 80)) == "AF_INET(192.0.2.1:80)"


def test_a_wrong_family_fails_the_load():
    with pytest.raises(ValueError, match="Invalid address family"):
        DNSResolver(family=77)


# ------------------------------------------------------------------ HashResolver

def test_scenario_13_names_of_a_dictionary():
    resolver = HashResolver({"www": ("10.0.0.1", "10.0.0.2"), "mail": "2001:db8::1", "none": ()})
    assert texts(resolver.resolve("www", 80)) == ["AF_INET(10.0.0.1:80)", "AF_INET(10.0.0.2:80)"]
    assert texts(resolver.resolve("mail", 25)) == ["AF_INET6(2001:db8::1:25)"]
    assert resolver.resolve("nope", 80) is None
    assert resolver.resolve("none", 80) is None


def test_a_dictionary_is_asked_exactly_first_and_then_without_regard_to_case():
    resolver = HashResolver({"WWW.example.": "10.0.0.1", "www.example": "10.0.0.2"})
    assert texts(resolver.resolve("WWW.example.", 1)) == ["AF_INET(10.0.0.1:1)"]
    assert texts(resolver.resolve("www.example", 1)) == ["AF_INET(10.0.0.2:1)"]
    assert texts(resolver.resolve("wWw.eXample", 1)) == ["AF_INET(10.0.0.1:1)"]


@pytest.mark.parametrize("mapping", [{"www": "10.0.0.300"}, {"www": ("10.0.0.1", "www2")}, ["www"], None])
def test_a_dictionary_without_addresses_fails_the_load(mapping):
    with pytest.raises(ValueError, match=r"host='www'|needs a dictionary"):
        HashResolver(mapping)


# ------------------------------------------------------------------ policies

@pytest.mark.usefixtures("policies")
def test_policies_are_found_by_name():
    policy = ResolverPolicy("inside", HashResolver({"www": "10.0.0.1"}))
    assert getResolverPolicy("inside") is policy
    assert (policy.name, texts(policy.resolve("www", 1))) == ("inside", ["AF_INET(10.0.0.1:1)"])
    with pytest.raises(ValueError, match="Duplicate ResolverPolicy: inside"):
        ResolverPolicy("inside", DNSResolver())
    # and those without a name are not registered
    ResolverPolicy(None, DNSResolver())
    ResolverPolicy("", DNSResolver())
    assert list(Globals.resolver_policies) == ["inside"]
    assert getResolverPolicy(None) is None


@pytest.mark.usefixtures("policies")
def test_an_unknown_policy_fails_the_load():
    with captured_log() as logged, pytest.raises(ValueError, match="No such resolver policy; policy='nope'"):
        getResolverPolicy("nope")
    assert [(m.tag, m.level) for m in logged.find("No such resolver policy; policy='nope'")] == [("core.policy", 3)]


@pytest.mark.usefixtures("policies")
def test_what_cannot_resolve_is_no_resolver():
    with pytest.raises(ValueError, match="needs a resolver"):
        ResolverPolicy("x", {"www": "10.0.0.1"})
    with pytest.raises(NotImplementedError):
        ResolverPolicy("y", AbstractResolver()).resolve("www", 1)


# ------------------------------------------------------------------ small parts

def test_create_sockaddr_takes_the_entries_of_getaddrinfo():
    for host, text in (("127.0.0.1", "AF_INET(127.0.0.1:80)"), ("::1", "AF_INET6(::1:80)")):
        entry = socket.getaddrinfo(host, 1, type=socket.SOCK_STREAM)[0]
        assert str(create_sockaddr(entry, 80)) == text


@pytest.mark.parametrize(("text", "server"), [
    ("192.0.2.1", ("192.0.2.1", 53)), ("192.0.2.1:5300", ("192.0.2.1", 5300)),
    ("2001:db8::1", ("2001:db8::1", 53)), ("[2001:db8::1]:5300", ("2001:db8::1", 5300)),
])
def test_name_servers(text, server):
    assert server_from_text(text) == server


@pytest.mark.parametrize("text", ["ns.example", "192.0.2.1:0", "192.0.2.1:99999", "192.0.2.300", "[::1]", ""])
def test_what_is_no_name_server_fails_the_load(text):
    with pytest.raises(ValueError, match="Invalid name server"):
        server_from_text(text)


def test_a_host_name_is_bounded_in_time():
    started = time.thread_time()
    for text in ("1." * 20000 + "x!", "a" * 100000, "0x" * 20000, "a." * 50000):
        assert host_name(text) is None
    assert time.thread_time() - started < 1


@given(st.text(st.characters(exclude_categories=())) | st.text("a-.0x1é", max_size=80))
def test_any_text_is_a_host_name_or_not(text):
    name = host_name(text)
    if name is not None:
        assert all(0 < len(label) < 64 for label in name.labels[:-1])
        assert address_from_text(name.to_text(omit_final_dot=True)) is None
    assert address_from_text(text) is None or name is None or ":" in text
