"""Caches (addressing-helpers 5)."""

import threading

import pytest

from test.support.logged import captured_log
from Zorp import Cache
from Zorp.Cache import AbstractCache, LockedCache, ShiftCache, TimedCache


class Clock:
    """A clock that a test moves."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    moved = Clock()
    monkeypatch.setattr(Cache, "monotonic", moved)
    return moved


def all_caches():
    return [ShiftCache("x", 10), TimedCache("x", 10), LockedCache(ShiftCache("x", 10))]


@pytest.mark.parametrize("cache", all_caches(), ids=lambda cache: type(cache).__name__)
def test_store_look_up_and_forget(cache):
    assert cache.lookup("a") is None
    cache.store("a", 1)
    cache.store("b", "two")
    assert (cache.lookup("a"), cache.lookup("b"), cache.name) == (1, "two", "x")
    # a false value deletes
    for false in (None, 0, "", False):
        cache.store("a", 1)
        cache.store("a", false)
        assert cache.lookup("a") is None
    cache.clear()
    assert cache.lookup("b") is None


def test_scenario_24_the_shift_is_logged_once_and_the_newest_entries_stay():
    with captured_log() as logged:
        cache = ShiftCache("x", 2)
        for key in "abcd":
            cache.store(key, key.upper())
    assert [(m.tag, m.level, m.text) for m in logged.messages] == [
        ("core.message", 3, "Cache over shift-threshold, shifting; cache='x', threshold='2'")]
    assert [cache.lookup(key) for key in "dcb"] == ["D", "C", "B"]


def test_an_entry_in_use_survives_shifts():
    cache = ShiftCache("x", 3)
    cache.store("used", 1)
    for number in range(50):
        cache.store(number, 1)
        assert cache.lookup("used") == 1
    assert cache.lookup(0) is None


def test_look_ups_do_not_make_a_shift_cache_grow():
    cache = ShiftCache("x", 10)
    for number in range(500):
        cache.store(number, 1)
        for older in range(number):
            cache.lookup(older)
    assert len(cache.cache) + len(cache.old_cache) <= 22


def test_scenario_25_an_entry_without_refresh_disappears_in_its_time(clock):
    cache = TimedCache("t", 1, update_stamp=False)
    cache.store("a", 1)
    clock.now += 0.9
    assert cache.lookup("a") == 1
    clock.now += 0.2
    assert cache.lookup("a") is None


def test_a_look_up_refreshes_by_default(clock):
    cache = TimedCache("t", 1)
    cache.store("a", 1)
    for _ in range(5):
        clock.now += 0.9
        assert cache.lookup("a") == 1
    clock.now += 1.1
    assert cache.lookup("a") is None


def test_storing_an_equal_value_does_not_refresh_and_another_value_does(clock):
    cache = TimedCache("t", 10, update_stamp=False)
    cache.store("a", 1)
    cache.store("b", 1)
    clock.now += 9
    cache.store("a", 1)
    cache.store("b", 2)
    clock.now += 2
    assert (cache.lookup("a"), cache.lookup("b")) == (None, 2)
    # and an entry that has died is new again
    cache.store("a", 1)
    assert cache.lookup("a") == 1


def test_above_the_clean_up_threshold_a_look_up_drops_what_is_too_old(clock):
    cache = TimedCache("t", 10, cleanup_threshold=3)
    for number in range(4):
        cache.store(number, 1)
    clock.now += 11
    cache.store("young", 1)
    cache.lookup("young")
    assert list(cache.cache) == ["young"]
    clock.now += 11
    cache.cleanup()
    assert not cache.cache


def test_a_timed_cache_is_bounded():
    cache = TimedCache("t", 3600, cleanup_threshold=2)
    for number in range(1000):
        cache.store(number, 1)
    assert len(cache.cache) == 200
    assert (cache.lookup(0), cache.lookup(999)) == (None, 1)


def test_caches_bear_many_threads(clock):
    caches = [ShiftCache("x", 5), TimedCache("x", 10, cleanup_threshold=1)]
    problems = []

    def work(seed):
        try:
            for number in range(2000):
                for cache in caches:
                    cache.store((seed + number) % 40, number + 1)
                    cache.lookup((seed * number) % 40)
        except Exception as problem:
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_the_base_is_abstract():
    cache = AbstractCache("x")
    for call in (lambda: cache.store(1, 1), lambda: cache.lookup(1), cache.clear):
        with pytest.raises(NotImplementedError):
            call()
