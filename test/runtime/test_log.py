"""Lines of the log: which are written, how they look, and that nobody can forge one."""

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from Zorp import Log
from Zorp.Log import BadLogSpec, Filter, enabled, log, parse_spec, unrecorded
from Zorp.runtime.logsetup import change_spec


@pytest.fixture
def lines():
    """Collects lines instead of writing them; settings are put back."""
    collected = []
    before = Log.current_filter()
    Log.configure(sink=lambda *record: collected.append(Log.line_of(*record)))
    yield collected
    Log.configure()
    Log.set_filter(before)


EFFECTIVE = {
    "no spec": ("", "core.debug", 3),
    "first match wins": ("*:0,http.request:6", "http.request", 0),
    "second item": ("http.*:6,core:2", "core.session", 2),
    "prefix": ("core:5", "core.debug", 5),
    "star is one part": ("*.summary:4", "core.summary", 4),
    "star does not match two": ("*.summary:4", "a.b.summary", 3),
    "longer pattern than tag": ("core.debug.x:5", "core.debug", 3),
    "case counts": ("Core:5", "core.debug", 3),
    "no partial wildcard": ("co*:5", "core.debug", 3),
    "missing number": ("core:", "core.debug", 0),
    "blanks before an item": (" , core:5", "core.debug", 5),
    "rest after the number": ("core:5xyz,http:1", "http.request", 1),
    "beyond 10": ("core:77", "core.debug", 77),
    "default": (Log.DEFAULT_SPEC, "http.accounting", 4),
}


@pytest.mark.parametrize(("spec", "tag", "level"), EFFECTIVE.values(), ids=EFFECTIVE)
def test_effective_verbosity(spec, tag, level):
    assert Filter(3, spec).effective(tag) == level


@pytest.mark.parametrize(("spec", "missing"), [
    ("*.summary:4,*.accounting:4", []), ("*.summary:4,*.accounting:4,smtp.*:6", []), ("core:5", []), ("*:9", []),
    ("smtp.*:6", ["core.summary", "core.accounting"]), ("", ["core.summary", "core.accounting"]),
    ("*.summary:4", ["core.accounting"]), ("core:3,*.summary:4", ["core.summary", "core.accounting"]),
])
def test_what_a_spec_leaves_out_of_the_audit_trail(spec, missing):
    assert unrecorded(spec) == missing


def test_a_change_that_drops_the_audit_trail_is_logged(monkeypatch):
    lines = []
    monkeypatch.setattr(Log, "_filter", Filter(3, Log.DEFAULT_SPEC))
    monkeypatch.setattr(Log, "_sink", lambda tag, level, session, text: lines.append((tag, level, text)))
    assert change_spec("smtp.*:6")
    assert ("core.error", 0, "Log spec leaves records of sessions to the verbosity; "
            "missing='core.summary,core.accounting', verbose_level='3'") in lines


@pytest.mark.parametrize("spec", ["http.request:6,", "http_x:3", "core", "  ", ",", "a-b:1", ":3"])
def test_invalid_specs(spec):
    with pytest.raises(BadLogSpec):
        parse_spec(spec)


def test_shadowed_items_are_found():
    assert Filter(3, "core:1,core.debug:6,http:2").shadowed_items() == ["core.debug"]


def test_the_three_argument_form(lines):
    log("core.debug", 3, "x")
    assert lines == ["core.debug(3): (nosession): x"]


def test_a_policy_tag_with_arguments(lines):
    log(None, "my.tag", 2, "hello; a='%d'", (5,))
    log("svc/intra/x:0", "my.tag", 2, "one; a='%s'", 7)
    log("s", "my.tag", 2, "named; a='%(a)s'", {"a": "b'c"})
    log("s", "my.tag", 2, "100%")
    assert lines == ["my.tag(2): (nosession): hello; a='5'", "my.tag(2): (svc/intra/x:0): one; a='7'",
                     "my.tag(2): (s): named; a='b<27>c'", "my.tag(2): (s): 100%"]


def test_levels_above_the_verbosity_are_not_even_formatted(lines):
    class Explosive:
        def __str__(self):
            raise AssertionError("formatted")

    assert not enabled("core.debug", 4)
    log(None, "core.debug", 4, "%s", (Explosive(),))
    assert lines == []


MISTAKES = {
    "too few": ("a='%s', b='%s'", ("x",)), "wrong kind": ("a='%d'", ("x",)), "too many": ("a='%s'", (1, 2)),
    "text is a number": (5, (1,)),
}


@pytest.mark.parametrize(("verbosity", "spec", "loudest"), [
    (3, "*.summary:4,*.accounting:4", 4), (7, "smtp.*:3", 7), (0, "", 0), (3, "smtp.*:9,core.debug:1", 9),
])
def test_no_message_is_written_above_the_loudest_level(lines, verbosity, spec, loudest):
    Log.set_filter(Filter(verbosity, spec))
    assert Log.loudest == loudest
    assert not any(enabled(tag, loudest + 1) for tag in ("core.summary", "core.debug", "smtp.request", "a.b"))


@pytest.mark.parametrize(("text", "arguments"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_of_policies_never_raise(lines, text, arguments):
    log("s", "my.tag", 2, text, arguments)
    assert any("Unable to format log message; error='" in line for line in lines)


class _Pair(NamedTuple):
    """What a module may keep the arguments of a message in."""

    name: str
    place: str


@pytest.mark.parametrize("place", ["policy.py:7", "it's", "caf\xe9", "x" * 3000],
                         ids=["plain", "quote", "high", "long"])
def test_a_named_tuple_is_as_good_as_a_tuple(lines, place):
    log("s", "my.tag", 2, "option='%s', place='%s'", _Pair("ids", place))
    log("s", "my.tag", 2, "option='%s', place='%s'", ("ids", place))
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert lines[0].startswith("my.tag(2): (s): option='ids', place='")


def test_the_raw_text_of_a_mistake_is_kept(lines):
    log("s", "my.tag", 2, "a='%d'", ("x",))
    assert lines[0].startswith("core.error(3): (s): Unable to format log message; error='")
    assert lines[1] == "core.error(3): (s): a='%d'"


FORGED = {
    "end of value": ("', verdict='ACCEPTED", "<27>, verdict=<27>ACCEPTED"),
    "new line": ("x\r\ncore.summary(4): ", "x<0D><0A>core.summary(4): "),
    "nul and delete": ("\x00\x7f", "<00><7F>"),
    "escape sequence": ("\x1b[2J", "<1B>[2J"),
    "escape sequence of C1": ("\xc2\x9b2J", "<C2><9B>2J"),
    "next line of C1": ("\xc2\x85core.summary(4): ", "<C2><85>core.summary(4): "),
    "line and paragraph separators": ("\xe2\x80\xa8\xe2\x80\xa9", "<E2><80><A8><E2><80><A9>"),
    "text that nobody sees": ("a\xad\u200bb\ufeff\U000e0041", "a<C2><AD><E2><80><8B>b<EF><BB><BF><F3><A0><81><81>"),
    "text that turns its direction": ("\u202egpj.exe\u2066\u200f", "<E2><80><AE>gpj.exe<E2><81><A6><E2><80><8F>"),
    "byte of C1 that is no UTF-8": ("\x85", "<85>"),
    "bytes that are UTF-8": ("\xc3\xa9", "\xe9"),
    "bytes that are not": ("\xff\xfe", "<FF><FE>"),
    "text beyond bytes": ("\u20ac", "\u20ac"),
    "bytes object": (b"\xc3\xa9'", "\xe9<27>"),
}


@pytest.mark.parametrize(("value", "written"), FORGED.values(), ids=FORGED)
def test_nothing_that_a_peer_sends_can_forge(lines, value, written):
    log("s", "http.request", 1, "Request; url='%s'", (value,))
    assert lines == [f"http.request(1): (s): Request; url='{written}'"]


def test_a_long_value_is_cut_and_the_rest_of_the_line_survives(lines):
    log("s", "http.request", 1, "Request; url='%s', end='%d'", ("x" * 5000, 1))
    assert lines[0].endswith("x…(cut)', end='1'")
    assert len(lines[0]) < 2200


def test_quotes_stay_readable_where_nothing_is_quoted(lines):
    log("s", "core.error", 1, "Traceback: %s", ("NameError: name 'x' is not defined",))
    assert lines == ["core.error(1): (s): Traceback: NameError: name 'x' is not defined"]


def test_high_bytes_are_escaped_when_asked(lines):
    Log.configure(sink=lambda *record: lines.append(Log.line_of(*record)), escape_high=True)
    log("s", "http.request", 1, "Request; url='%s'", ("\xc3\xa9\u20ac",))
    log("s", "http.request", 1, "Request; url='%s'", ("\xff",))
    assert lines[-1].endswith("url='<FF>'")
    assert lines[-2].endswith("<E2><82><AC>'")


def test_an_exception_is_logged_line_by_line(lines):
    try:
        raise ValueError("bad")
    except ValueError:
        Log.log_exception("s")
    assert lines[0] == "core.error(2): (s): Traceback: Traceback (most recent call last):"
    assert lines[-1] == "core.error(2): (s): Traceback: ValueError: bad"


def test_last_words_have_no_session_and_no_level(lines):
    Log.set_filter(Filter(0, ""))
    Log.log_always("core.info", 3, "Shutting down; version='8'")
    assert lines == ["core.info(3): Shutting down; version='8'"]


def test_invented_tags_do_not_fill_the_memory():
    present = Filter(3, "")
    for number in range(5000):
        present.effective(f"tag.{number}")
    assert len(present.levels) <= 1000


@given(st.text(max_size=60), st.text(max_size=60) | st.binary(max_size=60) | st.none() | st.integers())
def test_any_argument_gives_one_record_with_one_value(session, value):
    collected = []
    Log.configure(sink=lambda *record: collected.append(Log.line_of(*record)))
    try:
        log(session, "my.tag", 1, "Text; a='%s', b='%s'", (value, value))
    finally:
        Log.configure()
    assert len(collected) == 1
    assert "\n" not in collected[0]
    assert collected[0].partition("Text; ")[2].count("'") == 4


def test_nothing_that_we_say_ourselves_has_quotes_within_quotes(zorp):
    # given rules that nobody puts in force, and a table entry that cannot be meant
    daemon = zorp('''
        from Zorp.Core import *
        from Zorp.Plug import *
        from Zorp.Smtp import *

        class Mail(SmtpProxy):
            def config(self):
                SmtpProxy.config(self)
                self.request["VRFY"] = 99

        def intra():
            Service("plug", PlugProxy, router=TransparentRouter())
            Service("mail", Mail, router=DirectedRouter(SockAddrInet("127.0.0.1", 9)))
            Rule(proto=6, dst_port=80, service="plug")
            Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", $port), ZD_PROTO_TCP), service="mail")
        ''', verbosity=5)
    client = daemon.connect()
    daemon.log.wait_for("core.policy", 2, "No such action", key="VRFY")
    client.close()
    daemon.log.wait_for("core.error", 2, "Nobody puts the packet rules of this instance in force")
    assert "<27>" not in daemon.log.text()
