"""The cache of watched host names (addressing-helpers 3.1) against a real name server."""

import math
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from test.support.dns_server import ANSWER, SERVFAIL, SILENCE, DnsServer
from test.support.logged import captured_log
from Zorp import ResolverCache as module
from Zorp.ResolverCache import AbstractHostnameCache, AbstractResolver, DNSResolver, ResolverCache


class Clock:
    """A clock that runs and that a test may set forward."""

    def __init__(self):
        self.ahead = 0.0

    def __call__(self):
        return time.monotonic() + self.ahead


@pytest.fixture
def clock(monkeypatch):
    moved = Clock()
    monkeypatch.setattr(module, "monotonic", moved)
    return moved


@pytest.fixture
def server():
    with DnsServer() as running:
        yield running


@pytest.fixture
def logged():
    with captured_log() as messages:
        yield messages


def resolver(server, timeout=5.0):
    return DNSResolver(server=server.address, timeout=timeout)


def cache_of(server, *names, **bounds):
    cache = ResolverCache(resolver(server), **bounds)
    for name in names:
        cache.watch(name)
    return cache


# ------------------------------------------------------------------ the resolver

def test_both_record_types_with_the_smallest_ttl(server):
    server.set("a.test", "A", "192.0.2.1", ttl=70)
    server.set("a.test", "AAAA", "2001:db8::1", ttl=50)
    assert resolver(server).resolve("a.test") == (50, ["192.0.2.1"], ["2001:db8::1"])


def test_no_records_is_no_error(server, logged):
    server.set("a.test", "TXT", "x")
    assert resolver(server).resolve("a.test") == (60, [], [])
    assert logged.find("No records; host='a.test', record_type='A'")
    assert not logged.find("Error while resolving host")


@pytest.mark.parametrize("chains", [True, False], ids=["server follows", "we follow"])
def test_aliases_are_followed_and_their_ttl_counts(server, chains):
    server.chains = chains
    server.set("www.test", "CNAME", "real.test.", ttl=30)
    server.set("real.test", "A", "192.0.2.1", ttl=70)
    assert resolver(server).resolve("www.test") == (30, ["192.0.2.1"], [])


def test_a_long_chain_ends_at_the_limit(server, logged):
    server.chains = False
    for number in range(10):
        server.set(f"c{number}.test", "CNAME", f"c{number + 1}.test.")
    server.set("c10.test", "A", "192.0.2.1")
    assert resolver(server).resolve("c0.test")[1:] == ([], [])
    assert logged.find("Recursion limit reached of CNAME resolvation; max_recursion_depth='5'")[0].level == 3
    assert resolver(server).resolve("c6.test")[1:] == (["192.0.2.1"], [])


def test_a_circle_of_aliases_ends(server, logged):
    server.set("a.test", "CNAME", "b.test.")
    server.set("b.test", "CNAME", "a.test.")
    # given a server that follows it itself, then the answer is unusable
    with pytest.raises(KeyError):
        resolver(server).resolve("a.test")
    # and where we follow it, it is left when a name comes again
    server.chains = False
    assert resolver(server).resolve("a.test")[1:] == ([], [])
    assert logged.find("CNAME already resolved, skipping; host='b.test', cname='a.test'")


@pytest.mark.parametrize("name", ["missing.test", "a..b", "x" * 70])
def test_a_name_that_does_not_exist(server, logged, name):
    with pytest.raises(KeyError):
        resolver(server).resolve(name)
    message = logged.find(f"Error while resolving host; host='{name}', record_type='A', error='")[0]
    assert (message.tag, message.level) == ("core.error", 4)


@pytest.mark.parametrize("behaviour", [SILENCE, SERVFAIL])
def test_a_server_without_answers(server, logged, behaviour):
    server.behaviour = behaviour
    with pytest.raises(KeyError):
        resolver(server, timeout=0.2).resolve("a.test")
    assert len(logged.find("Error while resolving host; host='a.test'")) == 2


def test_one_family_may_fail_alone(server):
    server.set("a.test", "A", "192.0.2.1")
    server.silent_types = {"AAAA"}
    assert resolver(server, timeout=1.0).resolve("a.test") == (60, ["192.0.2.1"], [])


# ------------------------------------------------------------------ the cache

def test_names_and_addresses_find_each_other(server):
    server.set("a.test", "A", "192.0.2.1", "192.0.2.2", ttl=100)
    server.set("b.test", "A", "192.0.2.1", ttl=50)
    server.set("b.test", "AAAA", "2001:db8::1", ttl=50)
    cache = cache_of(server)
    cache.addHost("a.test")
    cache.addHost("b.test")
    count = len(server.queries)
    assert cache.lookupAddress("192.0.2.1") == {"a.test", "b.test"}
    assert cache.lookupAddress("192.0.2.2") == {"a.test"}
    assert cache.lookupAddress("2001:DB8:0::1") == {"b.test"}
    assert cache.lookupAddress("::ffff:192.0.2.2") == {"a.test"}
    assert cache.lookupAddress("192.0.2.3") is None
    assert cache.lookupAddress("nonsense") is None
    assert cache.lookupHostname("b.test") == ({"192.0.2.1"}, {"2001:db8::1"})
    assert cache.lookupCachedHostname("a.test") == ({"192.0.2.1", "192.0.2.2"}, set())
    assert cache.hosts == {"a.test", "b.test"}
    assert cache.cache_name_to_addresses["b.test"] == ({"192.0.2.1"}, {"2001:db8::1"})
    assert cache.cache_address_to_names["192.0.2.1"] == {"a.test", "b.test"}
    # all of it from memory
    assert len(server.queries) == count
    # and the next to expire is the one with the shorter life
    name, moment = cache.getNextExpiration()
    assert name == "b.test"
    assert moment == pytest.approx(time.time() + 50, abs=10)
    assert cache.lookupTTL("b.test") == pytest.approx(moment, abs=0.1) == cache.expires["b.test"]
    assert cache.lookupTTL("c.test") is None
    cache.removeHost("b.test")
    cache.removeHost("b.test")
    assert cache.lookupAddress("192.0.2.1") == {"a.test"}
    with pytest.raises(KeyError):
        cache.lookupCachedHostname("b.test")


def test_an_empty_cache():
    cache = ResolverCache(DNSResolver(server="127.0.0.1"))
    with pytest.raises(ValueError, match="empty"):
        cache.getNextExpiration()
    assert not cache.shouldUpdate()
    assert cache.lookupAddress("192.0.2.1") is None


def test_expired_names_are_looked_up_again(server, clock, logged):
    server.set("a.test", "A", "192.0.2.1", ttl=30)
    cache = cache_of(server, "a.test")
    assert cache.shouldUpdate()
    assert cache.lookupAddress("192.0.2.1") == {"a.test"}
    server.set("a.test", "A", "192.0.2.2", ttl=30)
    assert not cache.shouldUpdate()
    assert cache.updateHostIfNeeded("a.test") is False
    assert logged.find("Host already in DNS cache and within TTL; host='a.test', ttl='")
    clock.ahead += 31
    assert cache.shouldUpdate()
    assert cache.lookupAddress("192.0.2.1") is None
    assert cache.lookupAddress("192.0.2.2") == {"a.test"}
    assert logged.find("Found expired host in DNS cache; host='a.test'")
    assert logged.find("Host not in DNS cache or has expired, doing lookup; host='a.test'")


def test_updates_tell_what_has_changed(server, clock):
    server.set("a.test", "A", "192.0.2.1", ttl=30)
    server.set("b.test", "A", "192.0.2.1", ttl=30)
    cache = cache_of(server, "a.test", "b.test")
    assert sorted(cache.update()) == ["a.test", "b.test"]
    server.set("a.test", "A", "192.0.2.9", ttl=30)
    assert cache.update() == []
    assert cache.update(time.time() + 31) == ["a.test"]
    assert cache.updateHostIfNeeded("a.test", time.time() + 31) is False
    assert cache.updateHost("b.test") is False


def test_ttls_are_kept_within_bounds(server):
    server.set("short.test", "A", "192.0.2.1", ttl=0)
    server.set("long.test", "A", "192.0.2.1", ttl=10_000_000)
    cache = cache_of(server, "short.test", "long.test")
    before_s = time.time()
    cache.update()
    for name, ttl_s in (("short.test", 5), ("long.test", 86_400)):
        assert before_s + ttl_s - 0.1 < cache.expires[name] < time.time() + ttl_s + 0.1


@pytest.mark.parametrize("behaviour", [SILENCE, SERVFAIL])
def test_addresses_outlive_a_failing_refresh_for_a_while(server, clock, logged, behaviour):
    # given a name that was resolved, and a server that stops answering
    server.set("a.test", "A", "192.0.2.1", ttl=30)
    cache = cache_of(server, "a.test", stale_seconds=100)
    assert cache.lookupAddress("192.0.2.1") == {"a.test"}
    server.behaviour = behaviour
    cache.resolver.timeout = 0.1
    # when it expires
    clock.ahead += 31
    cache.updateHost("a.test")
    # then the address stays, and the next attempt is a minute away
    assert cache.lookupAddress("192.0.2.1") == {"a.test"}
    assert cache.lookupTTL("a.test") - time.time() == pytest.approx(60, abs=10)
    message = logged.find("Could not resolve host name trying again after default timeout; host='a.test', timeout='60'")
    assert (message[0].tag, message[0].level) == ("core.info", 3)
    # until its stale time has passed
    clock.ahead += 101
    cache.updateHost("a.test")
    assert cache.lookupAddress("192.0.2.1") is None


def test_a_name_that_ceased_to_exist_is_dropped_at_once(server, clock):
    server.set("a.test", "A", "192.0.2.1")
    cache = cache_of(server, "a.test")
    cache.update()
    server.remove("a.test")
    clock.ahead += 61
    assert cache.lookupAddress("192.0.2.1") is None


def test_one_family_is_kept_while_only_its_look_up_fails(server, clock):
    server.set("a.test", "A", "192.0.2.1")
    server.set("a.test", "AAAA", "2001:db8::1")
    cache = cache_of(server, "a.test")
    cache.update()
    server.silent_types = {"AAAA"}
    cache.resolver.timeout = 1.0
    server.set("a.test", "A", "192.0.2.2")
    cache.updateHost("a.test")
    assert cache.lookupCachedHostname("a.test") == ({"192.0.2.2"}, {"2001:db8::1"})


def test_readers_wait_no_longer_than_one_query_however_many_names_there_are(server, clock):
    names = [f"n{number}.test" for number in range(30)]
    for name in names:
        server.set(name, "A", "192.0.2.1", ttl=30)
    cache = cache_of(server, *names)
    assert cache.lookupAddress("192.0.2.1") == set(names)
    server.behaviour = SILENCE
    cache.resolver.timeout = 0.5                 # thirty names, one after the other: fifteen seconds at least
    clock.ahead += 31
    started = time.monotonic()
    assert cache.lookupAddress("192.0.2.1") == set(names)
    assert time.monotonic() - started < 5
    # and while that refresh still runs, later readers do not wait at all
    started = time.monotonic()
    for _ in range(20):
        assert cache.lookupAddress("192.0.2.1") == set(names)
    assert time.monotonic() - started < 5        # twenty times half a second, were it otherwise
    # and when the server is back, the refresh comes to its end
    server.behaviour = ANSWER
    deadline = time.monotonic() + 30
    while cache.shouldUpdate() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not cache.shouldUpdate()


def test_many_readers_cause_one_refresh(server):
    server.set("a.test", "A", "192.0.2.1")
    cache = cache_of(server, "a.test")
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(cache.lookupAddress("192.0.2.1"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [{"a.test"}] * 8
    assert server.queries == [("a.test", "A"), ("a.test", "AAAA")]


def test_an_unwatched_name_is_looked_up_and_not_kept(server):
    server.set("a.test", "A", "192.0.2.1")
    cache = cache_of(server)
    assert cache.lookupHostname("a.test") == ({"192.0.2.1"}, set())
    assert cache.hosts == set()
    with pytest.raises(KeyError):
        cache.lookupHostname("missing.test")


def test_resolvers_of_the_policy_and_their_faults(logged):
    class Own(AbstractResolver):
        answer = (30, ["192.0.2.1"], [])

        def resolve(self, name):
            if self.answer is None:
                raise RuntimeError("broken")
            return self.answer

    own = Own(1)
    cache = ResolverCache(own)
    cache.addHost("a")
    assert cache.lookupAddress("192.0.2.1") == {"a"}
    own.answer = None
    cache.updateHost("a")
    assert cache.lookupAddress("192.0.2.1") == {"a"}
    assert logged.find("Could not resolve host name")


def test_the_bases_are_abstract():
    with pytest.raises(NotImplementedError):
        AbstractResolver(1).resolve("a")
    with pytest.raises(NotImplementedError):
        AbstractHostnameCache()
    assert AbstractHostnameCache.default_cache_timeout == 60


# ------------------------------------------------------------------ answers that make no sense, names of their own

class Scripted(AbstractResolver):
    """Gives the answers of a dictionary: (ttl, ipv4, ipv6), or an exception to be raised."""

    def __init__(self, **answers):
        super().__init__(5)
        self.answers = answers

    def resolve(self, name):
        answer = self.answers[name]
        if isinstance(answer, Exception):
            raise answer
        return answer


def assert_links_hold(cache):
    """Names and addresses say the same, and every address is one of its family."""
    names = {}
    for name, (ipv4, ipv6) in cache.cache_name_to_addresses.items():
        assert not any(":" in text for text in ipv4)
        assert all(":" in text and not text.startswith("::ffff:") for text in ipv6)
        for text in ipv4 | ipv6:
            names.setdefault(text, set()).add(name)
    assert cache.cache_address_to_names == names
    assert all(math.isfinite(moment) for moment in cache.expires.values())


def test_an_ipv4_address_in_ipv6_form_is_no_address_of_a_host(server, logged):
    # given a name whose server gives the same address twice, once in disguise
    server.set("a.test", "A", "192.0.2.1", ttl=0)
    server.set("a.test", "AAAA", "::ffff:192.0.2.1", "::ffff:192.0.2.7", "2001:db8::1", ttl=0)
    server.set("b.test", "AAAA", "::ffff:192.0.2.1", ttl=0)
    cache = cache_of(server, "a.test", "b.test")
    # when it is looked up, again and again
    for _ in range(2):
        cache.updateHost("a.test")
        cache.updateHost("b.test")
    # then what is disguised counts nowhere, and is reported
    assert cache.lookupCachedHostname("a.test") == ({"192.0.2.1"}, {"2001:db8::1"})
    assert cache.lookupCachedHostname("b.test") == (set(), set())
    assert_links_hold(cache)
    message = logged.find("Address in an answer refused; host='a.test', address='::ffff:192.0.2.7'")
    assert (message[0].tag, message[0].level) == ("core.error", 3)
    # and the names can be forgotten
    cache.removeHost("a.test")
    cache.removeHost("b.test")
    assert cache.cache_address_to_names == {}


@pytest.mark.parametrize("answer", [
    (None, ["192.0.2.9"], []), (math.nan, ["192.0.2.9"], []), (math.inf, ["192.0.2.9"], []), (30, 7, []),
    (30, ["192.0.2.9"], [None]), (30, ["192.0.2.9"]), None, (10 ** 400, [], []), RuntimeError("broken")],
    ids=["no time", "not a number", "for ever", "no list", "no text", "no IPv6", "nothing", "a huge time", "a fault"])
def test_an_answer_that_is_none_changes_nothing_but_when_to_ask_again(answer):
    own = Scripted(a=(30, ["192.0.2.1"], ["2001:db8::1"]), b=(30, ["192.0.2.1"], []))
    cache = ResolverCache(own)
    cache.addHost("a")
    cache.addHost("b")
    own.answers["a"] = answer
    assert cache.updateHost("a") is False
    assert cache.lookupCachedHostname("a") == ({"192.0.2.1"}, {"2001:db8::1"})
    assert cache.lookupTTL("a") > time.time()
    assert_links_hold(cache)


def test_the_failure_of_one_name_keeps_no_other_name_from_being_asked(logged, monkeypatch):
    # given a cache that fails on one name, as by a defect of ours
    own = Scripted(**{f"n{number}": (0, [f"192.0.2.{number}"], []) for number in range(1, 30)})
    cache = ResolverCache(own, ttl_floor=0)
    cache.default_cache_timeout = 1000
    whole = cache._take

    def failing(entry, answer):
        if answer.ipv4 == ("192.0.2.1",):
            raise KeyError("defect")
        return whole(entry, answer)

    monkeypatch.setattr(cache, "_take", failing)
    for name in own.answers:
        cache.watch(name)
    # when a reader wants all of them
    assert cache.lookupAddress("192.0.2.29") == {"n29"}
    # then the others are known, and what failed comes again after the timeout for failures, not first
    assert {address for address, in ((ipv4 or {None}) for ipv4, _ in cache.cache_name_to_addresses.values())} == {
        None, *(f"192.0.2.{number}" for number in range(2, 30))}
    assert cache.lookupTTL("n1") > time.time() + 500
    assert cache.is_answered()
    # and it is said once, however often it fails, until it has succeeded
    assert cache.refresh("n1") is cache.refresh("n1") is False
    assert len(logged.find("Unexpected error, host name keeps its addresses; host='n1'")) == 1
    monkeypatch.undo()
    assert cache.refresh("n1") is True
    assert_links_hold(cache)


_NAMES = ("a", "b", "c")
_TEXTS = st.sampled_from(("192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:DB8:0::1", "::ffff:192.0.2.1", "::192.0.2.1",
                          "::ffff:c000:202", "", "x", "192.0.2.1 ", "::1%lo", "\0", None, 7, b"\xc0\0\x02\1"))
_PARTS = st.one_of(st.none(), st.integers(), st.lists(_TEXTS, max_size=4).map(tuple))
_ANSWERS = st.one_of(st.none(), st.just(KeyError("x")), st.just(ValueError("x")), st.tuples(
    st.one_of(st.integers(), st.floats(), st.none(), st.text(max_size=2)), _PARTS, _PARTS))
_STEPS = st.lists(st.one_of(
    st.tuples(st.just("refresh"), st.sampled_from(_NAMES), _ANSWERS),
    st.tuples(st.just("watch"), st.sampled_from(_NAMES), st.none()),
    st.tuples(st.just("removeHost"), st.sampled_from(_NAMES), st.none()),
    st.tuples(st.just("put"), st.sampled_from(_NAMES), st.lists(_TEXTS.filter(lambda text: isinstance(text, str)),
                                                                max_size=4))), max_size=12)


@given(steps=_STEPS)
def test_names_and_addresses_say_the_same_whatever_the_answers(steps):
    own = Scripted()
    cache = ResolverCache(own)
    with captured_log() as logged:
        for step, name, value in steps:
            own.answers[name] = value
            getattr(cache, step)(*((name, value) if step == "put" else (name,)))
            assert_links_hold(cache)
        assert not logged.find("Unexpected error")
        for name in _NAMES:
            cache.removeHost(name)
    assert cache.cache_address_to_names == {}
