"""Sequences, enumerations and the table of interface groups."""

import pytest

from test.support.zones import log_lines
from Zorp.Util import enum, isSequence, makeSequence, parseIfaceGroupAliases

__all__ = ["log_lines"]


@pytest.mark.parametrize(("value", "answer"), [
    ((), True), ([1], True), ({1}, True), (iter("a"), True), ("text", False), (b"text", False), (7, False),
    (None, False)])
def test_texts_are_single_values(value, answer):
    assert isSequence(value) is answer


def test_single_values_become_tuples():
    assert makeSequence("text") == ("text",)
    assert makeSequence(["a"]) == ["a"]


def test_an_enumeration_counts_from_zero_and_knows_its_names():
    color = enum("RED", "GREEN", BLUE=7)
    assert (color.RED, color.GREEN, color.BLUE) == (0, 1, 7)
    assert color.to_string(7) == "BLUE"
    with pytest.raises(KeyError):
        color.to_string(2)


def test_the_group_table_survives_blank_and_bad_lines(tmp_path, log_lines):
    # given a table with a comment, a blank line, and lines that are neither
    table = tmp_path / "group"
    table.write_text("# groups\n0\tdefault\n\n  7   inside  # the office\n256 toohigh\ntext\n9\n255 last\n")
    # then every good line counts, and every bad one is reported
    assert parseIfaceGroupAliases(str(table)) == {"default": 0, "inside": 7, "last": 255}
    assert [text.partition("line=")[2][:3] for _, _, text in log_lines] == ["'5'", "'6'", "'7'"]


def test_a_missing_group_table_is_the_callers_business(tmp_path):
    with pytest.raises(OSError, match="nosuch"):
        parseIfaceGroupAliases(str(tmp_path / "nosuch"))
