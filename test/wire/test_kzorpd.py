"""The lines of kzorpd's control socket."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from Zorp.wire.kzorpd import (
    KzorpdProtocolError,
    LineReader,
    answer_line,
    read_answer,
    read_request,
    request_line,
)


@given(st.binary(max_size=200), st.lists(st.integers(0, 200)))
def test_how_bytes_are_cut_changes_no_line(data, cuts):
    whole = LineReader().feed(data)
    reader, lines, start = LineReader(), [], 0
    for end in [*sorted(cuts), len(data)]:
        lines += reader.feed(data[start:end])
        start = max(start, end)
    assert lines == whole == data.split(b"\n")[:-1]


def test_a_line_without_end_is_refused():
    reader = LineReader(most_bytes=10)
    assert reader.feed(b"0123456789\n0123456789") == [b"0123456789"]
    with pytest.raises(KzorpdProtocolError, match="more than 10 bytes"):
        reader.feed(b"0")


@pytest.mark.parametrize("line", [b"RELOAD", b"RELOAD\r"])
def test_the_original_s_request_is_understood(line):
    assert read_request(line) == ({"request": "reload"}, False)


def test_requests_come_back_as_they_were():
    line = request_line("instance", description="{}")
    assert line.endswith(b"\n")
    assert read_request(line[:-1]) == ({"request": "instance", "description": "{}"}, True)


@pytest.mark.parametrize("line", [b"", b"reload", b"RELOAD now", b"[]", b"{}", b'{"request": 1}', b'{"request": {}}',
                                  b"\xff", b"[" * 100_000, b'{"request": "quit"}'])
def test_what_is_no_request_is_refused(line):
    with pytest.raises(KzorpdProtocolError):
        read_request(line)


@given(st.binary(max_size=300))
def test_no_bytes_make_the_readers_raise_anything_else(data):
    for read in (read_request, read_answer):
        with contextlib.suppress(KzorpdProtocolError):
            read(data)


def test_answers_have_the_form_of_the_request():
    assert answer_line(None, {"a": 1}, as_json=False) == b"OK\n"
    assert answer_line("not\nnow", {}, as_json=False) == b"FAIL not now\n"
    assert read_answer(answer_line(None, {"a": 1}, as_json=True)) == {"ok": True, "a": 1}
    assert json.loads(answer_line("no", {"a": 1}, as_json=True)) == {"ok": False, "error": "no"}


@pytest.mark.parametrize("line", [b"OK", b"{}", b'{"ok": 1}', b'{"ok": false}', b'{"ok": false, "error": 3}'])
def test_what_is_no_answer_is_refused(line):
    with pytest.raises(KzorpdProtocolError):
        read_answer(line)
