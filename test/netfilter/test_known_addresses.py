"""The file of the last addresses of host names: what can stand in a directory of somebody else."""

import os

import pytest

from test.support.unprivileged import NOBODY
from Zorp import Log
from Zorp.netfilter.known_addresses import FILE_NAME, KnownAddresses

KNOWN = {"a.test": ["192.0.2.1", "2001:db8::1"], "b.test": []}


def test_what_was_written_is_read_back(tmp_path):
    KnownAddresses(str(tmp_path)).write(KNOWN)
    assert KnownAddresses(str(tmp_path)).read() == KNOWN
    assert os.listdir(tmp_path) == [FILE_NAME]


SPOILT = {
    "no JSON": lambda path: path.write_text("{"),
    "another thing": lambda path: path.write_text('{"a.test": 7}'),
    "deep": lambda path: path.write_text("[" * 100_000),
    "a number without end": lambda path: path.write_text('{"a.test": ' + "9" * 10_000 + "}"),
    "not text": lambda path: path.write_bytes(b"\xff\xfe"),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "another file": lambda path: (path.rename(f"{path}.x"), os.symlink(f"{path}.x", path)),
    "a second name": lambda path: os.link(path, f"{path}.x"),
    "somebody else's": lambda path: os.chown(path, NOBODY, NOBODY),
    "endless": lambda path: os.truncate(path, 1 << 40),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_file_that_cannot_be_used_is_one_line_and_no_addresses(tmp_path, monkeypatch, spoil):
    # given known addresses, and what somebody made of their file
    lines = []
    monkeypatch.setattr(Log, "_sink", lambda *record: lines.append(record))
    KnownAddresses(str(tmp_path)).write(KNOWN)
    spoil(tmp_path / FILE_NAME)
    # when they are read, then nothing is known, and one line says so
    assert KnownAddresses(str(tmp_path)).read() == {}
    ((tag, level, _, text),) = lines
    assert (tag, level) == ("core.error", 1)
    assert text.startswith("Addresses of host names cannot be read, starting without them; file=")


def test_no_file_is_no_addresses(tmp_path):
    assert KnownAddresses(str(tmp_path)).read() == {}
