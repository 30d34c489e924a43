"""Engine attributes: what reads and writes of a policy do, and what the log says about them."""

from __future__ import annotations

import socket

import pytest

from test.support.proxies import serve
from Zorp import Globals
from Zorp.engine import config_lint
from Zorp.engine.builtin_proxy import BuiltinProxy
from Zorp.Config import config
from Zorp.Plug import PlugProxy
from Zorp.engine.policy_hash import PolicyHash
from Zorp.engine.attributes import (
    ALIAS, ALWAYS, CONFIG, CSTRING, HASH, INT, INT8, INT64, METHOD, OBJECT, OBSOLETE, READ, RUN, RUN_READ, STRING, Attr,
    AttributeStruct,
)

__all__ = ["serve"]


class Engine(PlugProxy):
    """A protocol class with every kind of attribute; config() and the main loop come from the test."""

    engine_attributes = (
        Attr("number", INT, CONFIG, 7),
        Attr("small", INT8, CONFIG, 0),
        Attr("large", INT64, CONFIG, 0),
        Attr("text", STRING, CONFIG, "a"),
        Attr("short_text", CSTRING, CONFIG, "", size=4),
        Attr("anything", OBJECT, CONFIG, None),
        Attr("later", INT, RUN, 1),
        Attr("state", STRING, RUN_READ, "s"),
        Attr("request", HASH, READ, PolicyHash),
        Attr("old_number", ALIAS, ALWAYS, "number"),
        Attr("commands", OBSOLETE, READ, "request"),
        Attr("old_text", OBSOLETE, ALWAYS, "text"),
        Attr("call", METHOD, RUN_READ, "_call"),
        Attr("secret", STRING, ALWAYS, "", shown=lambda proxy, value: "***"),
    )
    at_run = staticmethod(lambda proxy: None)
    result = None

    def _call(self):
        return "called"

    def _engine_main(self):
        type(self).result = type(self).at_run(self)


@pytest.fixture
def lived(serve):
    """Return a function: run one session with this config and main loop; gives (result, session)."""

    def live(config=lambda self: None, at_run=lambda self: None, **members):
        proxy_class = type("Tested", (Engine,), {"config": config, "at_run": staticmethod(at_run), **members})
        with serve(proxy_class) as session:
            session.wait_for_end()
        return proxy_class.result, session

    return live


def refused(session):
    return str(session.master.verdict) == "ABORTED_BY_POLICY_ACTION"


# reading and writing in their time

def test_setting_in_config_reaches_the_engine_and_the_log(lived):
    result, session = lived(lambda self: setattr(self, "timeout", 5000), lambda self: self._vars.timeout)
    assert result == 5000
    line = session.log.find("Attribute changed; attribute='timeout'")[0]
    assert line.text == "Attribute changed; attribute='timeout', newvalue='5000'"
    assert (line.tag, line.level, line.session) == ("core.debug", 6, session.session.session_id)


def test_reading_is_logged_with_the_value(lived):
    result, session = lived(at_run=lambda self: self.text)
    assert result == "a"
    assert session.log.has("Attribute fetched; attribute='%s', value='%s'", ("text", "'a'"))


def test_shown_replaces_the_value_in_the_log(lived):
    def config(self):
        self.secret = "hunter2"
        assert self.secret == "hunter2"

    _, session = lived(config)
    assert not any("hunter2" in text for text in session.log.texts())
    assert session.log.has("Attribute changed; attribute='%s', newvalue='%s'", ("secret", "***"))


def test_late_write_is_logged_and_without_effect(lived):
    def at_run(self):
        self.number = 8
        return self.number, self._vars.number

    result, session = lived(at_run=at_run)
    assert result == (7, 7)
    lines = session.log.find("Attribute cannot be written; config='0', name='number'")
    assert [(line.level, line.session) for line in lines] == [(3, None), (2, session.session.session_id)]


def test_early_write_is_logged_and_without_effect(lived):
    result, session = lived(lambda self: setattr(self, "later", 5), lambda self: self.later)
    assert result == 1
    assert session.log.find("Attribute cannot be written; config='1', name='later'")


def test_what_cannot_be_read_now_is_an_ordinary_attribute(lived):
    def config(self):
        with pytest.raises(AttributeError):
            _ = self.state
        self.__dict__["state"] = "own"
        assert self.state == "own"

    result, session = lived(config, lambda self: self.state)
    assert result == "s"
    assert session.log.has("Attribute cannot be read; config='%d', name='%s'", (1, "state"))
    assert not refused(session)


def test_values_set_in_init_are_shadowed(lived):
    def init(self, session):
        Engine.__init__(self, session)
        self.number = 99
        assert self.number == 99

    result, _ = lived(at_run=lambda self: self.number, __init__=init)
    assert result == 7


def test_delete_touches_the_ordinary_attribute_only(lived):
    def at_run(self):
        self.number = 8
        del self.number
        with pytest.raises(AttributeError):
            del self.number
        return self.number

    assert lived(at_run=at_run)[0] == 7


def test_class_level_assignment_does_not_configure_the_engine(lived):
    result, _ = lived(at_run=lambda self: (self.timeout, self._vars.timeout), timeout=1000)
    assert result == (600000, 600000)


def test_class_level_values_are_seen_where_there_is_no_engine():
    class Mixin:
        text = "mixed in"

    class Site(Mixin, Engine):
        number = 12

    class Deeper(Site):
        pass

    assert (Site.number, Deeper.number, Site.text) == (12, 12, "mixed in")
    assert not hasattr(Engine, "number")
    fresh = Deeper.__new__(Deeper)
    assert (fresh.number, fresh.text) == (12, "mixed in")


def test_mixin_cannot_hide_the_engine(lived):
    class Mixin:
        number = 12

    class Site(Mixin, Engine):
        at_run = staticmethod(lambda proxy: proxy.number)

    assert isinstance(Site.__dict__["number"], type(vars(Engine)["number"]))
    assert Site._table.attributes["number"].default == 7


def test_class_attribute_outside_the_table_is_ordinary(lived):
    result, _ = lived(at_run=lambda self: self.site_option, site_option=3)
    assert result == 3


def test_sessions_do_not_share_values(lived):
    def config(self):
        self.request["POST"] = len(self.request)

    for _ in range(2):
        result, _session = lived(config, lambda self: self.request["POST"])
        assert result == 0


def test_proxy_started_is_one_whatever_was_written(lived):
    def at_run(self):
        self.proxy_started = 0
        return self.proxy_started

    assert lived(at_run=at_run)[0] == 1
    assert Engine.__new__(Engine).proxy_started == 0


# kinds

@pytest.mark.parametrize(("name", "value"), [
    ("number", "5000"), ("number", None), ("number", 1.5), ("number", 1 << 31), ("number", -(1 << 31) - 1),
    ("small", 256), ("large", 1 << 64), ("text", 5), ("text", None), ("text", "a\0b"), ("short_text", ["a"]),
])
def test_wrong_value_fails_config(lived, name, value):
    _, session = lived(lambda self: setattr(self, name, value))
    assert refused(session)
    line = session.log.find(f"Invalid value of attribute; attribute='{name}'")[0]
    assert (line.tag, line.level, line.session) == ("core.policy", 1, session.session.session_id)


@pytest.mark.parametrize(("name", "value", "stored"), [
    ("number", True, 1), ("number", (1 << 31) - 1, (1 << 31) - 1), ("number", 5, 5), ("small", 255, 255),
    ("large", 1 << 40, 1 << 40), ("text", "\xe9", "\xe9"), ("text", b"\xe9", "\xe9"), ("text", "\u0151", "\xc5\x91"),
    ("short_text", "abcdef", "abc"), ("anything", (1, 2), (1, 2)), ("anything", None, None),
])
def test_value_is_accepted(lived, name, value, stored):
    result, session = lived(lambda self: setattr(self, name, value), lambda self: getattr(self, name))
    assert result == stored
    assert not refused(session)


def test_table_cannot_be_replaced(lived):
    def config(self):
        self.request["GET"] = 1
        self.request = {}

    result, session = lived(config, lambda self: (self.request["GET"], self._vars.request.search("GET")))
    assert result == (1, 1)
    assert session.log.find("Attribute cannot be written; config='1', name='request'")


def test_method_is_there_at_run_time_only(lived):
    result, session = lived(lambda self: hasattr(self, "call"), lambda self: self.call())
    assert result == "called"
    assert session.log.has("Attribute cannot be read; config='%d', name='%s'", (1, "call"))


def test_alias_reaches_its_target_with_the_rules_of_both(lived):
    def config(self):
        self.old_number = 9

    def at_run(self):
        self.old_number = 10
        return self.number, self.old_number

    result, session = lived(config, at_run)
    assert result == (9, 9)
    assert session.log.find("Attribute cannot be written; config='0', name='number'")


def test_obsolete_alias_says_so(lived):
    def config(self):
        self.old_text = "new"
        self.commands["GET"] = 1

    result, session = lived(config, lambda self: (self.text, self.request["GET"]))
    assert result == ("new", 1)
    assert session.log.find("Changing obsolete attribute; name='old_text'")[0].level == 3
    assert session.log.find("Fetching obsolete attribute; name='commands'")[0].session is None


# misspelt names

@pytest.mark.parametrize(("wrong", "right"), [("tiemout", "timeout"), ("request", None), ("timout", "timeout"),
                                              ("site_name", None), ("txt", None)])
def test_misspelt_name_works_and_is_reported(lived, wrong, right):
    result, session = lived(lambda self: setattr(self, wrong, 5000),
                            lambda self: (self.timeout, self.__dict__.get(wrong)))
    assert result == (600000, 5000)
    found = [line.arguments[1:3] for line in session.log.find("Unknown attribute set, perhaps misspelt")]
    assert found == ([(wrong, right)] if right else [])


def test_misspelt_name_is_reported_once_for_a_class(serve):
    class Misspelt(PlugProxy):
        def config(self):
            self.shutdown_sotf = 1

    found = []
    for _ in range(2):
        with serve(Misspelt) as session:
            session.client.close()
            session.wait_for_end()
            found += session.log.find("Unknown attribute set, perhaps misspelt")
    assert len(found) == 1


def test_misspelt_name_is_reported_however_many_classes_came_before(serve, monkeypatch):
    # given hundreds of classes with names of their own that are no mistakes
    monkeypatch.setattr(config_lint, "_judged", {})
    for number in range(300):
        blameless = type(f"Blameless{number}", (PlugProxy,), {})
        proxy = blameless.__new__(blameless)
        vars(proxy).update({f"_own_{name}": name for name in range(30)}, _vars=proxy._table.new_vars())
        config_lint.look_at(proxy, 0)

    # when one more sets a name that cannot be meant
    class Late(PlugProxy):
        def config(self):
            self.tiemout = 1

    with serve(Late) as session:
        session.client.close()
        session.wait_for_end()
        # then that is said
        assert len(session.log.find("Unknown attribute set, perhaps misspelt")) == 1


# attributes of every proxy

def test_streams_and_tos(serve):
    class Tos(PlugProxy):
        seen = None

        def config(self):
            self.client_local_tos = 0x10
            self.server_local_tos = 0x20

        def startup(self):
            self.client_local_tos = 0x08

        def requestStack(self):
            type(self).seen = (self.client_stream is self.session.client_stream,
                               self.server_stream is self.session.server_stream,
                               self.client_stream.sock.getsockopt(socket.IPPROTO_IP, socket.IP_TOS),
                               self.server_local_tos)

    with serve(Tos) as session:
        session.client.close()
        session.wait_for_end()
    assert Tos.seen == (True, True, 0x08, 0x20)


def test_tos_of_a_wrong_type_is_refused(lived):
    _, session = lived(lambda self: setattr(self, "client_local_tos", "low delay"))
    assert refused(session)


@pytest.mark.parametrize(("enabled", "rules_loaded", "mark"), [
    (1, True, 0x40000000), (0, True, 0), (1, False, 0)])
def test_server_sockets_are_marked_for_packet_rules(lived, monkeypatch, enabled, rules_loaded, mark):
    monkeypatch.setattr(config.options, "kzorp_enabled", enabled)
    monkeypatch.setattr(Globals, "kzorp_available", rules_loaded)
    assert lived(at_run=lambda self: self.server_socket_mark)[0] == mark


def test_mark_may_have_its_highest_bit_set(lived):
    result, _ = lived(lambda self: setattr(self, "server_socket_mark", 0x80000000),
                      lambda self: self.server_socket_mark)
    assert result == 0x80000000


def test_language_is_that_of_the_options(lived, monkeypatch):
    monkeypatch.setattr(config.options, "language", "hu")
    assert lived(at_run=lambda self: self.language)[0] == "hu"


def test_every_proxy_has_the_base_attributes():
    assert {attribute.name for attribute in BuiltinProxy.engine_attributes} <= Engine._table.attributes.keys()


# struct objects

@pytest.fixture
def struct():
    return AttributeStruct((Attr("depth", INT, CONFIG, 4), Attr("name", STRING, RUN_READ, "n"),
                            Attr("handshake", HASH, READ, PolicyHash)), lambda: struct_state["config"])


struct_state = {"config": True}


def test_struct_knows_its_attributes_and_takes_new_ones(struct):
    struct.depth = 5
    struct.handshake["setup_key"] = (1, None)
    struct.key_generator = "any"
    assert (struct.depth, struct.handshake["setup_key"], struct.key_generator) == (5, (1, None), "any")
    assert not hasattr(struct, "unknown")
    with pytest.raises(AttributeError, match="No such attribute"):
        _ = struct.name
    with pytest.raises(AttributeError, match="Error writing attribute"):
        struct.name = "x"


def test_struct_lists_what_can_be_read_at_run_time(struct, monkeypatch):
    monkeypatch.setitem(struct_state, "config", False)
    struct.own = 1
    assert dir(struct) == ["depth", "handshake", "name", "own"]
    with pytest.raises(AttributeError):
        struct.depth = 6
