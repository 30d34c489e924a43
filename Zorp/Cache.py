"""Small caches that policies and our own modules keep answers in.

    ShiftCache   forgets by number: two generations, the older one is dropped when the younger
                 has outgrown its threshold
    TimedCache   forgets by age
    LockedCache  any other cache, made safe for threads

`lookup` answers None for what is not there.  Storing a false value (None, 0, "", FALSE) deletes
the key, in all of them: policies delete that way, so whoever wants to remember a "no" stores a
true value that means it.

Guarantees
    ShiftCache and TimedCache may be used by any thread; each has one lock, which guards its
    dictionaries and is never held while a line is logged.  Both are bounded, whatever keys a
    peer makes us store.  Ages are measured by the monotonic clock.

Deviations from the original
    A look-up moves an old entry to the young generation only while that is within its
    threshold; without this, look-ups alone could make the cache grow.  TimedCache drops its
    oldest entries above _MOST_ENTRIES_PER_CLEANUP times its clean-up threshold.
"""

from __future__ import annotations

import threading
from time import monotonic

from Zorp.Constants import CORE_MESSAGE, TRUE
from Zorp.language import arguments
from Zorp.Log import log

_MOST_ENTRIES_PER_CLEANUP = 100

__all__ = ["AbstractCache", "LockedCache", "ShiftCache", "TimedCache"]


class AbstractCache:
    """What every cache can do; `name` appears in logs."""

    def __init__(self, name):
        self.name = name

    def store(self, key, value):
        """Remember a value; a false one deletes the key."""
        raise NotImplementedError

    def lookup(self, key):
        """Return the value of a key, or None."""
        raise NotImplementedError

    def clear(self):
        """Forget everything."""
        raise NotImplementedError


class ShiftCache(AbstractCache):
    """Keeps the entries stored or found last, about shift_threshold to twice as many.

    Arguments:
        name: for the log.
        shift_threshold: number of entries of the young generation above which the next new one
            starts another generation.
    """

    def __init__(self, name, shift_threshold):
        super().__init__(name)
        self.shift_threshold = arguments.number("ShiftCache", "shift_threshold", shift_threshold)
        self._generations_lock = threading.Lock()
        self.cache = {}
        self.old_cache = {}

    def store(self, key, value):
        """Remember a value; a false one deletes the key."""
        if not value:
            with self._generations_lock:
                self.cache.pop(key, None)
                self.old_cache.pop(key, None)
            return
        with self._generations_lock:
            shifted = len(self.cache) > self.shift_threshold
            if shifted:
                self.old_cache, self.cache = self.cache, {}
            self.old_cache.pop(key, None)
            self.cache[key] = value
        if shifted:
            log(None, CORE_MESSAGE, 3, "Cache over shift-threshold, shifting; cache='%s', threshold='%d'",
                (self.name, self.shift_threshold))

    def lookup(self, key):
        """Return the value of a key, or None; what is found stays for another generation."""
        value = self.cache.get(key)             # one atomic step; most look-ups end here
        if value is not None:
            return value
        with self._generations_lock:
            value = self.cache.get(key)
            if value is None and (value := self.old_cache.get(key)) is not None \
                    and len(self.cache) <= self.shift_threshold:
                self.cache[key] = self.old_cache.pop(key)
            return value

    def clear(self):
        """Forget everything."""
        with self._generations_lock:
            self.cache, self.old_cache = {}, {}


class TimedCache(AbstractCache):
    """Keeps entries for `timeout` seconds.

    Arguments:
        name: for the log.
        timeout: age in seconds at which an entry is forgotten.
        update_stamp: TRUE: a look-up makes the entry young again.
        cleanup_threshold: number of entries above which a look-up drops all that are too old.

    `cache` maps keys to (value, time stamp), the oldest stamp first.
    """

    def __init__(self, name, timeout, update_stamp=TRUE, cleanup_threshold=100):
        super().__init__(name)
        self.timeout = arguments.number("TimedCache", "timeout", timeout, unit="seconds")
        self.update_stamp = arguments.flag("TimedCache", "update_stamp", update_stamp)
        self.cleanup_threshold = arguments.number("TimedCache", "cleanup_threshold", cleanup_threshold)
        self._cache_lock = threading.Lock()
        self.cache = {}

    def store(self, key, value):
        """Remember a value; a false one deletes the key, an equal one keeps its age."""
        now = monotonic()
        with self._cache_lock:
            known = self.cache.get(key)
            if known is not None and value and known[0] == value and not self._is_expired(known[1], now):
                return
            self.cache.pop(key, None)
            if value:
                self.cache[key] = (value, now)
                self._make_room(now)

    def lookup(self, key):
        """Return the value of a key that is young enough, or None."""
        now = monotonic()
        with self._cache_lock:
            if len(self.cache) > self.cleanup_threshold:
                self._drop_expired(now)
            known = self.cache.get(key)
            if known is None:
                return None
            value, stamp = known
            if self._is_expired(stamp, now):
                del self.cache[key]
                return None
            if self.update_stamp:
                del self.cache[key]
                self.cache[key] = (value, now)
            return value

    def cleanup(self):
        """Forget every entry that is too old."""
        with self._cache_lock:
            self._drop_expired(monotonic())

    def clear(self):
        """Forget everything."""
        with self._cache_lock:
            self.cache.clear()

    def _is_expired(self, stamp, now):
        return now - stamp > self.timeout

    def _drop_expired(self, now):
        while self.cache:
            oldest = next(iter(self.cache))
            if not self._is_expired(self.cache[oldest][1], now):
                return
            del self.cache[oldest]

    def _make_room(self, now):
        most = max(self.cleanup_threshold, 1) * _MOST_ENTRIES_PER_CLEANUP
        if len(self.cache) > most:
            self._drop_expired(now)
        while len(self.cache) > most:
            del self.cache[next(iter(self.cache))]


class LockedCache(AbstractCache):
    """Another cache with all its methods under one lock, `lock`."""

    def __init__(self, child_cache):
        if not isinstance(child_cache, AbstractCache):
            raise arguments.invalid("LockedCache", "child_cache", child_cache, "give another cache")
        super().__init__(child_cache.name)
        self.child_cache = child_cache
        self.lock = threading.Lock()

    def store(self, key, value):
        """Remember a value in the other cache."""
        with self.lock:
            self.child_cache.store(key, value)

    def lookup(self, key):
        """Return the other cache's value of a key, or None."""
        with self.lock:
            return self.child_cache.lookup(key)

    def clear(self):
        """Clear the other cache."""
        with self.lock:
            self.child_cache.clear()
