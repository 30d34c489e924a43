"""The tables in which a policy says what each protocol element may do: HASH and DIMHASH.

    self.request["GET"] = HTTP_REQ_ACCEPT
    self.response["RETR", "*"] = (FTP_RSP_ABORT, "no")

Theory of operation
    A policy reads, sets and deletes entries by their exact key.  The engine asks search(),
    which also tries the weaker keys of each dimension, in the order that policies rely on:

        CONSUME     "226", then "22", "2", and the wildcard
        WILDCARD    the value, then the wildcard
        LITERAL     the value alone

    The last dimension varies fastest; when no key of n parts is there, the first n-1 parts
    are tried in the same way, down to one part.  The first hit wins.

    A wildcard, written "*" or "" by the policy, is stored as "".  Parts are kept apart in a
    tuple, so nothing a peer sends can be read as two parts, and a "*" from the wire is an
    ordinary character that no stored key contains: it reaches the wildcard entry by weakening
    only, as every other value does.

    DimHash remembers the result of the last searches; a write forgets them.  Both the number
    of remembered searches and the work of one search are bounded: parts longer than any stored
    part are cut before they are tried.

    Tables that begin with the same entries, a Preset, share them until one is changed: an entry
    is written into a copy.

For one thread: each proxy has tables of its own.  What is shared is only read.

Deviations
    A key with too few or too many parts raises ValueError when it is set; the original dropped
    the entry silently, and the administrator believed in a rule that was not there.
"""

from __future__ import annotations

import copy
import abc
import itertools
import string
from collections.abc import Mapping
from typing import Any, NamedTuple

LITERAL = "literal"
WILDCARD = "wildcard"
CONSUME = "consume"

_NOTHING = object()
_NO_ENTRIES: dict = {}         # of every new table; never changed
_ANY = ""                      # how a wildcard part is stored
_REMEMBERED_SEARCHES = 128     # per table; peers choose the keys, so there must be a bound
_TO_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


class ActionError(ValueError):
    """A table entry that is not an action; `str()` says why, for the log."""


class Action(NamedTuple):
    """One entry of a table: what to do, and the further items of the policy's tuple."""

    verdict: int
    args: tuple


def parse_action(value: Any, *, args_max: int | None = None) -> Action:
    """Return the Action that a policy wrote as an int or as a sequence that begins with one.

    args_max: the most items that may follow the int; None: any number.
    Raises ActionError for anything else.
    """
    if isinstance(value, int):
        return Action(value, ())
    if not isinstance(value, (tuple, list)) or not value:
        raise ActionError(f"an action is an int or a tuple, not {type(value).__name__}")
    if not isinstance(value[0], int):
        raise ActionError(f"the first item of an action is an int, not {type(value[0]).__name__}")
    if args_max is not None and len(value) > args_max + 1:
        raise ActionError(f"too many items in an action; items='{len(value)}'")
    return Action(value[0], tuple(value[1:]))


def parse_policy_action(value: Any) -> Any:
    """Return the callable of a `*_POLICY` action: exactly one item after the int.

    Raises ActionError when items are missing or superfluous, or the item cannot be called.
    """
    action = value if isinstance(value, Action) else parse_action(value)
    if len(action.args) != 1:
        raise ActionError(f"a policy action has one function; items='{len(action.args)}'")
    if not callable(action.args[0]):
        raise ActionError(f"a policy action has a function, not {type(action.args[0]).__name__}")
    return action.args[0]


def _text(part: Any) -> str:
    return part.decode("latin-1") if isinstance(part, (bytes, bytearray)) else str(part)


class _Table(abc.ABC):
    """What both tables offer to policies beyond the three operations of the original."""

    __slots__ = ("_entries", "_is_shared")

    _entries: dict
    _is_shared: bool                     # not ours alone: to be copied before it is changed

    def _own(self) -> dict:
        """Return the entries for somebody who changes them."""
        if self._is_shared:
            self._entries = self._entries.copy()
            self._is_shared = False
        return self._entries

    def share(self, source: _Table) -> None:
        """Have exactly the entries of another table of the same kind, the same objects until either is changed."""
        self._entries = source._entries
        self._is_shared = source._is_shared = True

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Any) -> bool:
        try:
            self[key]
        except KeyError:
            return False
        return True

    def __iter__(self):
        return iter(self.keys())

    def __repr__(self) -> str:
        return f"{{{', '.join(f'{key!r}: {value!r}' for key, value in self.items())}}}"

    def items(self) -> list:
        """Return (key, value) pairs, keys as the policy may write them."""
        return list(zip(self.keys(), self._entries.values(), strict=True))

    def values(self) -> list:
        """Return the values in the order they were first set."""
        return list(self._entries.values())

    def get(self, key: Any, default: Any = None) -> Any:
        """Return the entry with exactly this key, or `default`."""
        try:
            return self[key]
        except KeyError:
            return default

    def update(self, entries: Mapping) -> None:
        """Set every entry of a mapping; another table of the same kind is the quick way."""
        if type(entries) is type(self) and entries._fits(self):
            self._take_over(entries)
            return
        for key, value in entries.items():
            self[key] = value

    @abc.abstractmethod
    def _fits(self, other: _Table) -> bool:
        """True when keys of this table are stored by `other` in the same form."""

    def _take_over(self, entries: _Table) -> None:
        self._own().update(entries._entries)


class Preset:
    """Entries that table after table gets when its session begins.

    Arguments:
        added: table of the entries.
        upon: the Preset that nearly every table has got before this one, if there is such.
    """

    __slots__ = ("_added", "_base", "_whole")

    def __init__(self, added: _Table, upon: Preset | None = None) -> None:
        self._added = self._whole = added
        self._base = _NO_ENTRIES
        if upon is not None:
            self._base = upon._whole._entries
            self._whole = copy.copy(added)
            self._whole.share(upon._whole)
            self._whole.update(added)

    def load(self, table: _Table) -> None:
        """Set the entries in a table of the same kind."""
        if table._entries is self._base:
            table.share(self._whole)
        else:
            table.update(self._added)


class PolicyHash(_Table):
    """A table with one text as key.

    Arguments:
        ignore_case: keys are equal when they differ only in the case of ASCII letters.
        entries: mapping of entries to begin with.
    """

    __slots__ = ("_fold",)

    def __init__(self, entries: Mapping | None = None, *, ignore_case: bool = False) -> None:
        self._entries = _NO_ENTRIES
        self._is_shared = True
        self._fold = ignore_case
        if entries:
            self.update(entries)

    def _key(self, key: Any) -> str:
        if isinstance(key, (bytes, bytearray)):
            key = key.decode("latin-1")
        elif not isinstance(key, str):
            raise TypeError(f"Hash key must be a string; key={key!r}")
        return _ascii_lower(key) if self._fold else key

    def _fits(self, other: PolicyHash) -> bool:
        return self._fold == other._fold

    def __getitem__(self, key: Any) -> Any:
        return self._entries[self._key(key)]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._own()[self._key(key)] = value

    def __delitem__(self, key: Any) -> None:
        del self._own()[self._key(key)]

    def keys(self) -> list:
        """Return the keys in the order they were first set."""
        return list(self._entries)

    def search(self, key: str) -> Any:
        """Return the entry of `key`, else the one of "*", else None."""
        entries = self._entries
        if self._fold:
            key = _ascii_lower(key)
        if key in entries:
            return entries[key]
        return entries.get("*")


def _ascii_lower(text: str) -> str:
    return text.translate(_TO_LOWER)


class DimHash(_Table):
    """A table with a key of several texts.

    Arguments:
        flags: LITERAL, WILDCARD or CONSUME for each dimension; their number is the most parts.
        least_parts: the fewest parts that a key may have.
        entries: mapping of entries to begin with.
    """

    __slots__ = ("_flags", "_least_parts", "_longest", "_remembered")

    def __init__(self, *flags: str, least_parts: int = 1, entries: Mapping | None = None) -> None:
        self._entries = _NO_ENTRIES
        self._is_shared = True
        self._flags = flags
        self._least_parts = least_parts
        self._longest = 0
        self._remembered: dict = {}
        if entries:
            self.update(entries)

    def _key(self, key: Any) -> tuple[str, ...]:
        if isinstance(key, (str, bytes, bytearray)):
            parts = (_text(key),)
        elif isinstance(key, (tuple, list)):
            parts = tuple(_text(part) for part in key)
        else:
            raise TypeError(f"Hash key must be a string or a sequence; key={key!r}")
        return tuple(_ANY if part == "*" else part for part in parts)

    def _fits(self, other: DimHash) -> bool:
        return self._flags == other._flags and self._least_parts == other._least_parts

    def share(self, source: DimHash) -> None:
        super().share(source)
        self._longest = source._longest
        self._remembered = {}

    def _take_over(self, entries: DimHash) -> None:
        super()._take_over(entries)
        self._longest = max(self._longest, entries._longest)
        self._remembered.clear()

    def _allows(self, parts: tuple) -> bool:
        return self._least_parts <= len(parts) <= len(self._flags)

    def __getitem__(self, key: Any) -> Any:
        return self._entries[self._key(key)]

    def __setitem__(self, key: Any, value: Any) -> None:
        parts = self._key(key)
        if not self._allows(parts):
            raise ValueError(f"Hash key must have {self._least_parts} to {len(self._flags)} parts; key={key!r}")
        self._own()[parts] = value
        self._longest = max(self._longest, *map(len, parts))
        self._remembered.clear()

    def __delitem__(self, key: Any) -> None:
        del self._own()[self._key(key)]
        self._remembered.clear()

    def keys(self) -> list:
        """Return the keys in the order they were first set, wildcards as "*"."""
        return [tuple(part or "*" for part in parts) for parts in self._entries]

    def search(self, *parts: str) -> Any:
        """Return the entry that fits `parts` best, or None; the order is in the module's docstring."""
        entry = self._entries.get(parts, _NOTHING)
        if entry is not _NOTHING:                 # the strongest key of all
            return entry
        remembered = self._remembered
        try:
            found = remembered[parts]
        except KeyError:
            found = self._find(parts)
            if len(remembered) >= _REMEMBERED_SEARCHES:
                remembered.clear()
            remembered[parts] = found
        return found and found[0]

    def _find(self, parts: tuple[str, ...]) -> tuple | None:
        if not self._entries or not self._allows(parts):
            return None
        entries = self._entries
        tries = [self._weakened(part, flag) for part, flag in zip(parts, self._flags, strict=False)]
        for count in range(len(parts), 0, -1):
            for candidate in itertools.product(*tries[:count]):
                if candidate in entries:
                    return (entries[candidate],)
        return None

    def _weakened(self, part: str, flag: str) -> list[str]:
        """Return the values to try in this dimension, strongest first."""
        fits = len(part) <= self._longest
        if flag == CONSUME:
            return [part[:length] for length in range(min(len(part), self._longest), -1, -1)]
        values = [part] if fits else []
        if flag == WILDCARD and part != _ANY:
            values.append(_ANY)
        return values
