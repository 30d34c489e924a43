"""Matchers (addressing-helpers 4)."""

import os
import time

import pytest

from test.support.dns_server import SILENCE, DnsServer
from test.support.logged import captured_log
from Zorp import Globals, ResolverCache
from Zorp.matching import patterns
from Zorp.Constants import Z_AND, Z_EQ, Z_NE, Z_NOT, Z_OR, Z_XOR
from Zorp.Exceptions import MatcherException, PolicyError
from Zorp.Matcher import (
    AbstractMatcher,
    CombineMatcher,
    DNSMatcher,
    MatcherPolicy,
    RegexpFileMatcher,
    RegexpMatcher,
    SmtpProto,
    WindowsUpdateMatcher,
    getMatcher,
    validateMatchers,
)
from Zorp.language.caller import POLICY_LANGUAGE, PYTHON2


@pytest.fixture(autouse=True)
def _no_policies(monkeypatch):
    monkeypatch.setattr(Globals, "matchers", {})


@pytest.fixture
def logged():
    with captured_log() as messages:
        yield messages


class Fixed(AbstractMatcher):
    """A matcher that always answers the same and counts how often it was asked."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = 0

    def checkMatch(self, str):
        self.asked += 1
        return self.answer


# ------------------------------------------------------------------ regular expressions

def test_scenario_18_a_pattern_is_found_anywhere_unless_another_one_is():
    matcher = RegexpMatcher(("smtp.example.com",), ("^bad",))
    assert matcher.checkMatch("SMTP.EXAMPLE.COM")
    assert matcher.checkMatch("xsmtp.example.com.y")
    assert not matcher.checkMatch("bad-smtp.example.com")
    assert not matcher.checkMatch("other")


def test_a_hit_is_logged(logged):
    RegexpMatcher(("nope", "b.d ")).checkMatch("a bad thing")
    assert [(m.tag, m.level, m.text) for m in logged.messages] == [
        ("core.policy", 4, "Matching regexp found; str='a bad thing', pattern='b.d'")]


def test_case_counts_when_it_shall():
    assert RegexpMatcher(["abc"]).checkMatch("ABC")
    assert not RegexpMatcher(["abc"], None, False).checkMatch("ABC")


def test_without_patterns_nothing_matches():
    assert not RegexpMatcher().checkMatch("x")
    assert not RegexpMatcher(None, ["x"]).checkMatch("y")


def test_the_lists_are_open_to_policies():
    matcher = RegexpMatcher("one pattern", ["x", "y"])
    assert [text for _, text in matcher.match] == ["one pattern"]
    assert [text for _, text in matcher.ignore] == ["x", "y"]
    assert matcher.match[0][0].search("one pattern")
    matcher.match.append((matcher.compilePattern("more"), "more"))
    assert matcher.checkMatch("more")


def test_a_bad_pattern_fails_the_load_and_is_logged(logged):
    for lists in ((["ok", "(bad"],), (None, ["(bad"])):
        with pytest.raises(ValueError, match=r"Error compiling regular expression; expr='\(bad'"):
            RegexpMatcher(*lists)
    assert [(m.tag, m.level) for m in logged.find("Error compiling regular expression; expr='(bad'")] == [
        ("core.policy", 3)] * 2
    with pytest.raises(ValueError, match="Error compiling regular expression"):
        RegexpMatcher([5])


def test_nested_repetition_is_reported_with_the_pattern(logged):
    RegexpMatcher(["(a+)+$"])
    assert logged.find("Nested repetition in regular expression, matching may take long; expr='(a+)+$'")


def test_a_set_of_another_dialect_is_reported_with_the_pattern(logged):
    # given a pattern whose author expects classes of characters as grep knows them
    matcher = RegexpMatcher(["card [[:digit:]]"])
    # then it does not match what he expects, and the log says why
    assert not matcher.checkMatch("card 4")
    assert logged.find("Set of another dialect in regular expression, taken for single characters; "
                       "set='[[:digit:]', expr='card [[:digit:]]'")


def test_texts_are_bytes_one_character_each():
    matcher = RegexpMatcher(["bü+cher"])
    assert matcher.checkMatch("büücher".encode().decode("latin-1"))
    assert matcher.checkMatch("büücher".encode())
    assert RegexpMatcher(["€"]).checkMatch("5 €")
    # a deny list does not fail open over case folding: only ASCII letters have a case
    assert not RegexpMatcher(["k"]).checkMatch("\u212a")


def test_patterns_of_python_2_are_bytes_already():
    names = {"RegexpMatcher": RegexpMatcher, "__name__": "policy", POLICY_LANGUAGE: PYTHON2}
    matcher = eval(compile(r"RegexpMatcher(['b\xc3\xbccher'])", "policy.py", "eval"), names)
    assert matcher.checkMatch("bücher".encode().decode("latin-1"))


def test_what_cannot_be_searched_cannot_be_decided():
    matcher = RegexpMatcher(["x"])
    with pytest.raises(MatcherException, match="too long"):
        matcher.checkMatch("x" * 4097)
    with pytest.raises(MatcherException, match="Only text"):
        matcher.checkMatch(None)
    matcher.max_subject_length = 5000
    assert matcher.checkMatch("x" * 4097)


@pytest.mark.parametrize("lists", [(["(x+x+)+y"],), (["x"], ["(x+x+)+y"])], ids=["match", "ignore"])
def test_a_search_that_takes_too_long_refuses(monkeypatch, logged, lists):
    monkeypatch.setattr(patterns, "SEARCH_SECONDS", 0.1)
    with pytest.raises(MatcherException, match="Matching took too long"):
        RegexpMatcher(*lists).checkMatch("x" * 4000)
    assert logged.find("Matching took too long; str='xxx")[0].text.endswith("pattern='(x+x+)+y'")


# ------------------------------------------------------------------ files

def write(path, text):
    """Write a file so that its state differs from before, however coarse the clock of the file system."""
    path.write_text(text, encoding="utf-8")
    write.count += 1
    os.utime(path, ns=(write.count, write.count * 1_000_000_000))


write.count = 0


def test_scenario_19_a_changed_file_counts_from_the_next_check_on(tmp_path):
    # given a file with an empty line, a comment and blanks at line ends
    path = tmp_path / "match"
    write(path, "one  \n\n# two\n\\#three\r\n")
    matcher = RegexpFileMatcher(str(path))
    assert matcher.checkMatch("ONE")
    assert not matcher.checkMatch("two")
    assert matcher.checkMatch("#three")
    assert not matcher.checkMatch("four")
    # when a line is added
    write(path, "one\n\n# two\nfour\n")
    # then the next check knows
    assert matcher.checkMatch("four")
    assert not matcher.checkMatch("#three")
    assert matcher.match_date == int(path.stat().st_mtime)
    assert (matcher.match_file, matcher.ignore_file, matcher.ignore_date) == (str(path), None, 0)


def test_a_change_within_one_tick_of_the_clock_is_seen_by_size_or_inode(tmp_path):
    path = tmp_path / "match"
    path.write_text("one\n")
    state = path.stat()
    matcher = RegexpFileMatcher(str(path))
    replacement = tmp_path / "new"
    replacement.write_text("two\n")
    os.utime(replacement, ns=(state.st_atime_ns, state.st_mtime_ns))
    replacement.rename(path)
    assert matcher.checkMatch("two")


def test_the_ignore_file_excludes(tmp_path):
    match, ignore = tmp_path / "match", tmp_path / "ignore"
    write(match, "example\n")
    write(ignore, "^good\n")
    matcher = RegexpFileMatcher(str(match), str(ignore))
    assert matcher.checkMatch("bad.example")
    assert not matcher.checkMatch("good.example")


def test_a_missing_file_is_logged_once_and_old_patterns_stay(tmp_path, logged):
    path = tmp_path / "match"
    write(path, "one\n")
    matcher = RegexpFileMatcher(str(path), str(tmp_path / "missing"))
    assert [m.level for m in logged.find(f"Error opening ignore file; filename='{tmp_path}/missing'")] == [3]
    path.unlink()
    for _ in range(3):
        assert matcher.checkMatch("one")
    assert len(logged.find(f"Error opening match file; filename='{path}'")) == 1
    write(path, "two\n")
    assert matcher.checkMatch("two")
    assert not matcher.checkMatch("one")


def test_a_directory_or_a_pipe_is_no_pattern_file(tmp_path, logged):
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path, tmp_path / "pipe"):
        assert not RegexpFileMatcher(str(name)).checkMatch("x")
    assert len(logged.find("Error opening match file; filename='")) == 2


def test_a_bad_line_fails_the_load_and_later_keeps_all_old_patterns(tmp_path, logged):
    path = tmp_path / "match"
    write(path, "one\n(bad\n")
    with pytest.raises(ValueError, match=r"Error compiling regular expression; expr='\(bad', file='.*match', line='2'"):
        RegexpFileMatcher(str(path))
    write(path, "one\ntwo\n")
    matcher = RegexpFileMatcher(str(path))
    write(path, "three\n(bad\n")
    for _ in range(3):
        assert matcher.checkMatch("two")
        assert not matcher.checkMatch("three")
    assert len(logged.find("Error compiling regular expression; expr='(bad'")) == 2
    write(path, "three\n")
    assert matcher.checkMatch("three")


def test_read_file_appends_to_a_list(tmp_path):
    path = tmp_path / "match"
    path.write_bytes("\ufeffbücher\n".encode())
    entries = []
    RegexpFileMatcher().readFile(str(path), entries)
    (pattern, text), = entries
    assert text == "bücher".encode().decode("latin-1")
    assert pattern.search(text)


# ------------------------------------------------------------------ policies and references

def test_policies_are_found_by_object_and_by_name():
    matcher = Fixed(True)
    policy = MatcherPolicy("c", matcher)
    assert (policy.name, policy.matcher) == ("c", matcher)
    assert getMatcher(matcher) is getMatcher(policy) is getMatcher("c") is matcher
    with pytest.raises(ValueError, match="Duplicate matcher policy: c"):
        MatcherPolicy("c", matcher)


def test_unknown_names_and_other_types_are_refused():
    with pytest.raises(MatcherException) as problem:
        getMatcher("nope")
    assert str(problem.value) == "Matcher error: No such matcher; matcher='nope'"
    for other in (None, 5, object()):
        with pytest.raises(MatcherException, match="Matcher is of invalid type"):
            getMatcher(other)
    MatcherPolicy("broken", "not a matcher")
    with pytest.raises(MatcherException):
        validateMatchers()


def test_the_base_is_abstract():
    with pytest.raises(NotImplementedError):
        AbstractMatcher().checkMatch("x")
    AbstractMatcher().validateMatcher()


def test_scenario_20_names_may_be_used_before_they_are_defined():
    MatcherPolicy("c", CombineMatcher((Z_AND, "a", (Z_NOT, "b"))))
    MatcherPolicy("a", RegexpMatcher(["a"]))
    with pytest.raises(MatcherException, match="No such matcher; matcher='b'; correct MatcherPolicy 'c'") as problem:
        validateMatchers()
    assert isinstance(problem.value, PolicyError)
    assert problem.value.place.startswith(__file__ + ":")
    MatcherPolicy("b", RegexpMatcher(["b"]))
    validateMatchers()
    assert getMatcher("c").checkMatch("xa")
    assert not getMatcher("c").checkMatch("ab")
    assert not getMatcher("c").checkMatch("b")


def test_a_combination_without_a_policy_resolves_names_at_its_first_use():
    matcher = CombineMatcher((Z_NOT, "late"))
    with pytest.raises(MatcherException, match="No such matcher; matcher='late'"):
        matcher.checkMatch("x")
    MatcherPolicy("late", Fixed(False))
    assert matcher.checkMatch("x")


def test_a_circle_of_names_is_refused():
    MatcherPolicy("a", CombineMatcher((Z_NOT, "b")))
    MatcherPolicy("b", CombineMatcher((Z_AND, Fixed(True), (Z_OR, "a"))))
    with pytest.raises(MatcherException, match="circle"):
        validateMatchers()
    with pytest.raises(MatcherException, match="circle"):
        getMatcher("a").checkMatch("x")


T, F = True, False


@pytest.mark.parametrize(("operator", "values", "result"), [
    (Z_NOT, (T,), F), (Z_NOT, (F,), T),
    (Z_AND, (T, T), T), (Z_AND, (T, F), F), (Z_AND, (T,), T),
    (Z_OR, (F, T), T), (Z_OR, (F, F), F),
    (Z_XOR, (T, F), T), (Z_XOR, (T, T), F), (Z_XOR, (T, T, T), T), (Z_XOR, (F,), F),
    (Z_NE, (T, F), T), (Z_NE, (T, T), F),
    (Z_EQ, (F, F, T), F), (Z_EQ, (F, F, F), T), (Z_EQ, (T, T), T), (Z_EQ, (T, F), F), (Z_EQ, (T,), T),
])
def test_operators(operator, values, result):
    matcher = CombineMatcher((operator, *map(Fixed, values)))
    assert bool(matcher.checkMatch("x")) is result
    assert (matcher.op, len(matcher.arg)) == (operator, len(values))


@pytest.mark.parametrize(("operator", "decisive"), [(Z_AND, False), (Z_OR, True)])
def test_and_and_or_stop_at_the_first_decisive_argument(operator, decisive):
    last = Fixed(True)
    CombineMatcher((operator, Fixed(not decisive), Fixed(decisive), last)).checkMatch("x")
    assert last.asked == 0


@pytest.mark.parametrize(("expression", "text"), [
    ((), "Missing operator in CombineMatcher expression"),
    (None, "Missing operator in CombineMatcher expression"),
    ((Z_NOT,), "Invalid number of arguments (0) for operator Z_NOT in CombineMatcher expression"),
    ((Z_NOT, "a", "b"), "Invalid number of arguments (2) for operator Z_NOT in CombineMatcher expression"),
    ((Z_AND,), "Invalid number of arguments (0) for operator Z_AND in CombineMatcher expression"),
    (("Z_NAND", "a"), "Invalid operator Z_NAND in CombineMatcher expression"),
    (([], "a"), "Invalid operator [] in CombineMatcher expression"),
    ((Z_NOT, (Z_OR,)), "Invalid number of arguments (0) for operator Z_OR in CombineMatcher expression"),
])
def test_expressions_that_mean_nothing_are_refused(expression, text):
    with pytest.raises(MatcherException) as problem:
        CombineMatcher(expression)
    assert problem.value.detail == text


# ------------------------------------------------------------------ host names

@pytest.fixture
def dns():
    with DnsServer() as server:
        yield server


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        ahead = 0.0

        def __call__(self):
            return time.monotonic() + self.ahead

    moved = Clock()
    monkeypatch.setattr(ResolverCache, "monotonic", moved)
    return moved


def test_scenario_16_addresses_follow_the_names(dns, clock):
    dns.set("a.test", "A", "192.0.2.1", ttl=5)
    dns.set("b.test", "A", "192.0.2.2", ttl=5)
    dns.set("b.test", "AAAA", "2001:db8::2", ttl=5)
    matcher = DNSMatcher(hosts=("a.test", "b.test"), server=dns.address)
    assert dns.queries == []                         # loading a policy asks nobody
    assert matcher.checkMatch("192.0.2.1")
    assert matcher.checkMatch("192.0.2.2")
    assert matcher.checkMatch("2001:DB8::2")
    assert not matcher.checkMatch("192.0.2.3")
    assert not matcher.checkMatch("a.test")
    dns.set("a.test", "A", "192.0.2.9", ttl=5)
    assert matcher.checkMatch("192.0.2.1")
    clock.ahead += 6
    assert not matcher.checkMatch("192.0.2.1")
    assert matcher.checkMatch("192.0.2.9")


def test_scenario_17_a_dead_name_server_leaves_the_last_known_addresses(dns, clock):
    dns.set("a.test", "A", "192.0.2.1", ttl=5)
    matcher = DNSMatcher("a.test", dns.address)
    assert matcher.checkMatch("192.0.2.1")
    dns.behaviour = SILENCE
    matcher.cache.resolver.timeout = 0.3
    clock.ahead += 6
    for _ in range(3):
        assert matcher.checkMatch("192.0.2.1")


def test_before_the_first_answer_nothing_is_decided(dns):
    dns.set("a.test", "A", "192.0.2.1")
    dns.behaviour = SILENCE
    matcher = DNSMatcher("a.test", dns.address)
    matcher.cache.resolver.timeout = 0.3
    with pytest.raises(MatcherException, match="not resolved yet"):
        matcher.checkMatch("192.0.2.1")
    # and when the look-up has failed for good, nothing matches
    deadline = time.monotonic() + 5
    while not matcher.cache.is_answered() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not matcher.checkMatch("192.0.2.1")


def test_names_are_checked_at_load():
    for hosts in ("a..b", ("ok.test", "1.2.3.4"), (5,)):
        with pytest.raises(ValueError, match="Invalid host name"):
            DNSMatcher(hosts)
    with pytest.raises(ValueError, match="Invalid name server"):
        DNSMatcher("a.test", server="ns.test")


def test_the_interface_of_older_releases(dns):
    dns.set("a.test", "A", "192.0.2.1", ttl=30)
    matcher = DNSMatcher(["a.test"], dns.address)
    matcher.fillCache()
    matcher.addHostToCache("own.test", ["192.0.2.50", "2001:db8::50"])
    assert matcher.checkMatch("2001:db8::50")
    assert matcher.hosts == {"a.test", "own.test"}
    assert matcher.cache_address_to_names["192.0.2.50"] == {"own.test"}
    assert matcher.cache_name_to_addresses["a.test"] == ({"192.0.2.1"}, set())
    assert matcher.server == dns.address
    dns.set("a.test", "A", "192.0.2.2", ttl=30)
    matcher.updateCachedHost("a.test", time.time())
    assert matcher.checkMatch("192.0.2.1")
    matcher.updateCache(time.time() + 31)
    assert matcher.checkMatch("192.0.2.2")
    matcher.dropHostFromCache("own.test")
    assert not matcher.checkMatch("192.0.2.50")
    assert set(matcher.expires) == {"a.test"}


def test_windows_update_is_three_names(dns):
    dns.set("v5.windowsupdate.microsoft.nsatc.net", "A", "192.0.2.1")
    assert WindowsUpdateMatcher(dns.address).checkMatch("192.0.2.1")
    assert len(WindowsUpdateMatcher().hosts) == 3


def test_the_mail_client_of_the_library_is_there_for_policies():
    assert SmtpProto(bind_addr="127.0.0.1").bind_addr == "127.0.0.1"
