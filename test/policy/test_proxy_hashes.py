"""Policy tables: exact access for policies, weakening search for engines, action tuples."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from Zorp.engine.policy_hash import (
    CONSUME, LITERAL, WILDCARD, Action, ActionError, DimHash, PolicyHash, Preset, parse_action, parse_policy_action,
)

ACCEPT, REJECT, ABORT = 1, 3, 4


def ftp_response(**_):
    return DimHash(WILDCARD, CONSUME, least_parts=2)


# one key

def test_entries_are_read_set_and_deleted_by_exact_key():
    table = PolicyHash()
    table["GET"] = ACCEPT
    assert table["GET"] == ACCEPT
    with pytest.raises(KeyError):
        _ = table["get"]
    del table["GET"]
    with pytest.raises(KeyError):
        del table["GET"]


@pytest.mark.parametrize("key", [1, None, ("GET",)])
def test_key_must_be_text(key):
    with pytest.raises(TypeError):
        PolicyHash()[key] = ACCEPT


def test_star_entry_answers_for_the_rest():
    table = PolicyHash({"*": (REJECT, "no"), "GET": ACCEPT})
    assert table.search("GET") == ACCEPT
    assert table.search("HEAD") == (REJECT, "no")
    # a method called * on the wire gets no more than the * entry
    assert table.search("*") == (REJECT, "no")
    assert PolicyHash({"MK*": ACCEPT}).search("MKCOL") is None


def test_false_entry_is_an_entry():
    assert PolicyHash({"GET": 0, "*": ACCEPT}).search("GET") == 0


def test_header_tables_ignore_case_of_ascii_letters():
    table = PolicyHash(ignore_case=True)
    table["User-Agent"] = ACCEPT
    assert table["USER-AGENT"] == ACCEPT
    assert table.search("user-agent") == ACCEPT
    table["\xc4"] = ACCEPT
    assert table.search("\xe4") is None


def test_tables_can_be_looked_through():
    table = PolicyHash({"a": 1, b"b": 2})
    assert (len(table), list(table), table.items(), table.values()) == (2, ["a", "b"], [("a", 1), ("b", 2)], [1, 2])
    assert "a" in table
    assert table.get("c", 3) == 3
    assert repr(table) == "{'a': 1, 'b': 2}"


# several keys

def test_specific_wildcard_beats_general_code():
    table = ftp_response()
    table["*", "2"] = ACCEPT
    table["RETR", "*"] = (ABORT, "no")
    assert table.search("RETR", "226") == (ABORT, "no")
    assert table.search("STOR", "226") == ACCEPT


def test_longer_code_beats_shorter():
    table = ftp_response()
    table["*", "*"] = ACCEPT
    table["*", "22"] = REJECT
    assert table.search("PASV", "227") == REJECT
    assert table.search("PASV", "250") == ACCEPT


def test_search_order_is_that_of_the_original():
    # every key of the documented order, and only the first of them is found each time
    order = [("RETR", "226"), ("RETR", "22"), ("RETR", "2"), ("RETR", "*"), ("*", "226"), ("*", "22"), ("*", "2"),
             ("*", "*"), ("RETR",), ("*",)]
    table = DimHash(WILDCARD, CONSUME, entries={key: number for number, key in enumerate(order)})
    for number, key in enumerate(order):
        assert table.search("RETR", "226") == number
        del table[key]
    assert table.search("RETR", "226") is None


def test_suboption_falls_back_to_its_option():
    table = DimHash(WILDCARD, WILDCARD)
    table["24"] = ACCEPT
    table["*", "0"] = REJECT
    assert table.search("24", "0") == REJECT
    assert table.search("24", "1") == ACCEPT
    assert table.search("25", "1") is None


@pytest.mark.parametrize("same", [("*", "4"), ["*", 4], ("", "4"), ["", 4]])
def test_star_and_empty_are_the_same_part(same):
    table = ftp_response()
    table["*", "4"] = ACCEPT
    assert table[same] == ACCEPT


def test_one_part_is_not_one_part_and_a_wildcard():
    table = DimHash(WILDCARD, CONSUME)
    table["GET"] = ACCEPT
    with pytest.raises(KeyError):
        _ = table["GET", "*"]


def test_key_of_wrong_arity_is_refused():
    table = ftp_response()
    with pytest.raises(ValueError, match="2 to 2 parts"):
        table["USER"] = ACCEPT
    with pytest.raises(ValueError, match="2 to 2 parts"):
        table["a", "b", "c"] = ACCEPT
    with pytest.raises(KeyError):
        _ = table["USER"]
    assert table.search("USER") is None


@pytest.mark.parametrize("key", [5, None, {"a"}])
def test_key_must_be_text_or_sequence(key):
    with pytest.raises(TypeError):
        ftp_response()[key] = ACCEPT


def test_bytes_of_a_peer_cannot_stand_for_two_parts_or_a_wildcard():
    table = DimHash(WILDCARD, CONSUME)
    table["GET", "2"] = ACCEPT
    table["*", "5"] = REJECT
    assert table.search("GET::2") is None
    assert table.search("*", "2") is None
    assert table.search("*", "5") == REJECT


def test_literal_dimension_is_not_weakened():
    table = DimHash(LITERAL, CONSUME)
    table["*", "*"] = ACCEPT
    table["A", "*"] = REJECT
    assert table.search("A", "1") == REJECT
    assert table.search("B", "1") is None


def test_write_is_seen_by_the_next_search():
    table = ftp_response()
    table["*", "*"] = ACCEPT
    assert table.search("RETR", "226") == ACCEPT
    table["RETR", "226"] = REJECT
    assert table.search("RETR", "226") == REJECT
    del table["RETR", "226"]
    assert table.search("RETR", "226") == ACCEPT


def test_searches_of_a_peer_do_not_fill_the_memory():
    table = ftp_response()
    table["*", "*"] = ACCEPT
    for number in range(5000):
        assert table.search(str(number), "x" * 20_000) == ACCEPT
    assert len(table._remembered) <= 128


parts = st.text("*ab2", max_size=4)


@given(st.dictionaries(st.tuples(parts, parts) | st.tuples(parts), st.integers(0, 9), max_size=8), parts, parts)
def test_search_equals_the_documented_walk(entries, first, second):
    # the walk, as written down: n parts down to one, last dimension fastest
    stored = {tuple("" if part == "*" else part for part in key): value for key, value in entries.items()}
    consumed = [second[:length] for length in range(len(second), -1, -1)]
    walk = [*itertools.product([first, ""], consumed), (first,), ("",)]
    expected = next((stored[key] for key in walk if key in stored), None)
    assert DimHash(WILDCARD, CONSUME, entries=entries).search(first, second) == expected


# presets

@pytest.fixture
def presets():
    """Presets of two layers for reply tables: (lower, upper)."""
    lower_entries, upper_entries = ftp_response(), ftp_response()
    lower_entries.update({("MAIL", "250"): ACCEPT, ("*", "4"): REJECT})
    upper_entries.update({("AUTH", "235"): ACCEPT, ("*", "4"): ACCEPT})
    lower = Preset(lower_entries)
    return lower, Preset(upper_entries, lower)


def test_preset_and_the_one_upon_it_give_the_entries_of_both(presets):
    table = ftp_response()
    for preset in presets:
        preset.load(table)
    assert dict(table.items()) == {("MAIL", "250"): ACCEPT, ("*", "4"): ACCEPT, ("AUTH", "235"): ACCEPT}
    assert table.search("RCPT", "450") == ACCEPT


def test_what_one_table_changes_no_other_table_sees(presets):
    changed, other = ftp_response(), ftp_response()
    for table in (changed, other):
        for preset in presets:
            preset.load(table)
    changed["MAIL", "250"] = ABORT
    del changed["AUTH", "235"]
    changed.update({("QUIT", "2"): REJECT})
    later = ftp_response()
    for preset in presets:
        preset.load(later)
    assert changed.search("MAIL", "250") == ABORT
    assert changed.search("AUTH", "235") is None
    assert dict(other.items()) == dict(later.items())
    assert (other.search("MAIL", "250"), other.search("QUIT", "221")) == (ACCEPT, None)


@pytest.mark.parametrize("before", [{}, {("MAIL", "250"): ABORT}, {("AUTH", "235"): ABORT}], ids=str)
def test_upper_preset_alone_brings_only_its_own_entries(presets, before):
    table = ftp_response()
    table.update(before)
    presets[1].load(table)
    assert dict(table.items()) == {**before, ("AUTH", "235"): ACCEPT, ("*", "4"): ACCEPT}


# actions

@pytest.mark.parametrize(("value", "action"), [
    (1, Action(1, ())), (True, Action(True, ())), ((3, "no"), Action(3, ("no",))), ([6, print], Action(6, (print,))),
])
def test_action_is_read(value, action):
    assert parse_action(value) == action


@pytest.mark.parametrize("value", [("accept",), "accept", None, (), {}, 1.0, (None, 1)])
def test_malformed_action_is_refused(value):
    with pytest.raises(ActionError):
        parse_action(value)


def test_too_many_items_are_refused_where_the_engine_says_so():
    assert parse_action((3, "a"), args_max=1) == Action(3, ("a",))
    with pytest.raises(ActionError):
        parse_action((3, "a", "b"), args_max=1)


def test_policy_action_has_exactly_one_function():
    assert parse_policy_action((6, print)) is print
    assert parse_policy_action(Action(6, (print,))) is print
    for value in ((6,), 6, (6, print, 1), (6, "print")):
        with pytest.raises(ActionError):
            parse_policy_action(value)
