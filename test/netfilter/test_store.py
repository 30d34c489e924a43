"""The state of the packet rules on disk: whole, readable for whoever runs kzorpd, one writer at a time."""

import dataclasses
import os

import pytest

from Zorp.netfilter.compiler import IndexState
from Zorp.netfilter.store import FILE_NAME, LOCK_NAME, Entry, State, Store, StoreError
from Zorp.rules.description import InstanceDescription, ZoneData, parse_net

STATE = State((Entry(InstanceDescription(instance="a", zones=(ZoneData(name="z", nets=(parse_net("10.0.0.0/8"),)),)),
                     handed_over=True), Entry(InstanceDescription(instance="b"))), IndexState({"k": 7}, 9))


def write(store, state):
    with store.replacing(State(), state):
        pass


def test_what_was_written_is_read(tmp_path):
    write(Store(str(tmp_path)), STATE)
    assert Store(str(tmp_path)).read() == STATE


def test_entries_keep_their_place_and_new_ones_come_last():
    changed = Entry(InstanceDescription(instance="a"))
    assert [entry.description.instance for entry in STATE.with_entry(changed).entries] == ["a", "b"]
    assert STATE.with_entry(changed).entries[0] is changed
    added = STATE.with_entry(Entry(InstanceDescription(instance="c")))
    assert [entry.description.instance for entry in added.entries] == ["a", "b", "c"]
    assert [entry.description.instance for entry in added.without("a").entries] == ["b", "c"]
    assert added.without("a").indexes == STATE.indexes


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": 2}',
                                  '{"version": 1, "instances": 3, "indexes": {}}',
                                  '{"version": 1, "instances": [{}], "indexes": {"last": 0, "indexes": {}}}',
                                  '{"version": 1, "instances": [], "indexes": {"last": -1, "indexes": {}}}',
                                  "[" * 100_000, "1" * 5000, "\0", '{"version": 1, "instances": null, "indexes": []}',
                                  *('{"version": 1, "instances": [], "indexes": {"indexes": {}, "last":' + number + "}}"
                                    for number in ("Infinity", "-Infinity", "NaN", "1e999", "1.5", "true", "null",
                                                   '"1"', "[1]", "9" * 400, "9" * 5000))])
def test_a_file_that_makes_no_sense_counts_as_none_and_is_reported(tmp_path, capsys, text):
    (tmp_path / FILE_NAME).write_text(text)
    assert Store(str(tmp_path)).read() == State()
    assert "State of the packet rules cannot be read" in capsys.readouterr().err


def test_the_second_writer_waits_and_gives_up_in_time(tmp_path):
    first, second = Store(str(tmp_path)), Store(str(tmp_path))
    with first.lock(), pytest.raises(StoreError, match="Another program"), second.lock(deadline_s=0.1):
        pytest.fail("two writers")
    with second.lock(deadline_s=0.1):
        write(second, STATE)


def test_a_change_of_the_kernel_that_fails_leaves_the_old_state(tmp_path):
    store = Store(str(tmp_path))
    write(store, STATE)
    with pytest.raises(ZeroDivisionError), store.replacing(STATE, State()):
        raise ZeroDivisionError
    assert store.read() == dataclasses.replace(STATE, indexes=IndexState({"k": 7}, 0))


def test_a_state_that_cannot_be_written_leaves_the_old_one(tmp_path):
    store = Store(str(tmp_path))
    write(store, STATE)
    (tmp_path / (FILE_NAME + ".new")).mkdir()
    with pytest.raises(StoreError, match="Cannot write"), store.replacing(STATE, State()):
        pytest.fail("the kernel would be changed")
    assert store.read() == STATE


def test_while_the_kernel_is_changed_indexes_are_reserved_and_connections_due(tmp_path):
    # given a settled state
    store = Store(str(tmp_path))
    store.write(dataclasses.replace(STATE, is_settled=True))
    # when the kernel gets another one, and that is never confirmed
    with pytest.raises(ZeroDivisionError), store.replacing(STATE, State((), IndexState({"new": 10}, 10))):
        raise ZeroDivisionError
    # then the old one is in force, its connections have to be decided about, and nobody gets the number
    left = store.read()
    assert (left.entries, left.is_settled) == (STATE.entries, False)
    assert (left.indexes.last, left.indexes.reserved) == (10, {"new": 10})


def put_pipe(path):
    os.mkfifo(path)


def put_directory(path):
    path.mkdir()


def put_link(path):
    path.symlink_to("/dev/zero")


def put_endless_file(path):
    path.touch()
    os.truncate(path, 1 << 40)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("put", [put_pipe, put_directory, put_link, put_endless_file])
def test_what_is_no_plain_file_in_place_of_the_state_is_no_state_and_nobody_waits(tmp_path, capsys, put):
    put(tmp_path / FILE_NAME)
    assert Store(str(tmp_path)).read() == State()
    assert "State of the packet rules cannot be read" in capsys.readouterr().err


@pytest.mark.timeout(20)
@pytest.mark.parametrize("put", [put_pipe, put_link, put_endless_file])
def test_what_is_in_the_way_of_the_new_state_is_removed_and_nobody_waits(tmp_path, put):
    put(tmp_path / (FILE_NAME + ".new"))
    write(Store(str(tmp_path)), STATE)
    assert Store(str(tmp_path)).read().entries == STATE.entries


@pytest.mark.timeout(20)
@pytest.mark.parametrize("put", [put_pipe, put_directory, put_link])
def test_a_lock_that_is_no_plain_file_is_an_error_and_nobody_waits(tmp_path, put):
    put(tmp_path / LOCK_NAME)
    with pytest.raises(StoreError, match="Cannot lock"), Store(str(tmp_path)).lock():
        pytest.fail("locked what others can do with as they like")


def test_a_lock_that_is_another_file_of_root_is_an_error(tmp_path):
    (tmp_path / "secret").touch()
    os.link(tmp_path / "secret", tmp_path / LOCK_NAME)
    with pytest.raises(StoreError, match="one name"), Store(str(tmp_path)).lock():
        pytest.fail("locked")
