"""What config() left behind that does not look like what the administrator meant.

Theory of operation
    A name that no engine knows is an ordinary attribute, so `self.relay_zone = ...` is accepted
    and does nothing; an entry of a table is looked at when a client asks for it, so
    `self.request["VRFY"] = 99` ends the session of the first client who does.  Both are said once
    for each class: in the log when the first session is configured, by zorp --check-policy before
    there is any.  The line of the policy is found in the code of the class, by what it stores.

    The names to compare with are the engine's, those of the library's classes, and those that the
    object had before config().  What tables and other values may hold, each protocol knows:
    _config_problems() of its class.

For the thread of the proxy.  What is done with _seen and _judged is atomic each; a second warning
would do no harm.
"""

from __future__ import annotations

import dis
import types
from typing import NamedTuple

from Zorp.Constants import CORE_POLICY
from Zorp.Log import log

_SIMILAR_EDITS = 2
_SHORTEST_COMPARED = 4       # names of fewer characters resemble each other by chance
_MOST_COMPARED = 4096        # classes, and names of a class, that policies invent at run time must not fill the memory
_STORES_OR_KEYS = ("STORE_ATTR", "LOAD_CONST")

_NOTHING: frozenset[str] = frozenset()
_seen: set[type] = set()
_judged: dict[type, set[str]] = {}           # names of plain attributes that objects of the class had


class Problem(NamedTuple):
    """A setting that cannot be meant: what is wrong, what to write instead, the name or key it is stored under."""

    text: str
    remedy: str
    key: object
    is_fatal: bool = True        # zorp --check-policy refuses the policy; else sessions work, and it is said only


def look_at(proxy, names_before: int) -> None:
    """Log, once per class, what config() of the proxy left behind.

    names_before: how many plain attributes there were before config().
    """
    cls = type(proxy)
    names = vars(proxy)
    if len(names) > names_before and not names.keys() <= _judged.get(cls, _NOTHING):
        _report_misspelt(proxy, list(names), names_before)
    if cls not in _seen and len(_seen) < _MOST_COMPARED:
        _seen.add(cls)
        for problem in proxy._config_problems():
            text = problem.text.replace("%", "%%")           # part of the message: its quotes are no quotes of a value
            log(proxy._session_id, CORE_POLICY, 2, text + "; class='%s', place='%s', remedy='%s'",
                (cls.__name__, place_of(cls, problem.key), problem.remedy))


def _report_misspelt(proxy, names: list[str], names_before: int) -> None:
    cls, table = type(proxy), proxy._table.attributes
    if len(_judged) >= _MOST_COMPARED and cls not in _judged:
        return
    judged = _judged.setdefault(cls, set())
    if len(judged) >= _MOST_COMPARED:
        return
    for number, name in enumerate(names):
        if name.startswith("_") or name in table or name in judged or hasattr(cls, name):
            continue
        known = {*table, *_settings_of(cls), *names[:names_before]} if number >= names_before else table
        similar = _most_similar(name, known)
        if similar is not None:
            log(proxy._session_id, CORE_POLICY, 2,
                "Unknown attribute set, perhaps misspelt; class='%s', attribute='%s', similar='%s', place='%s'",
                (cls.__name__, name, similar, place_of(cls, name)))
    judged.update(names)


def _settings_of(cls: type) -> set[str]:
    """Return the plain class attributes that the library's classes have for policies to set."""
    return {name for base in cls.__mro__ if base.__module__.startswith("Zorp.")
            for name, value in vars(base).items() if not name.startswith("_") and not callable(value)}


def place_of(cls: type, key) -> str:
    """Return "file:line" where methods of the class store under this name or key; else where config() begins."""
    beginning = "unknown"
    for base in cls.__mro__:
        if base.__module__.startswith("Zorp."):
            continue
        for method in vars(base).values():
            code = getattr(method, "__code__", None)
            if not isinstance(code, types.CodeType):
                continue
            line = _line_of(code, key)
            if line is not None:
                return f"{code.co_filename}:{line}"
            if code.co_name == "config" and beginning == "unknown":
                beginning = f"{code.co_filename}:{code.co_firstlineno}"
    return beginning


def _line_of(code: types.CodeType, key) -> int | None:
    line = code.co_firstlineno
    for instruction in dis.get_instructions(code):
        line = getattr(instruction, "line_number", None) or instruction.starts_line or line    # Python 3.13, older
        if instruction.opname in _STORES_OR_KEYS and instruction.argval == key:
            return line
    return None


def _most_similar(name: str, names) -> str | None:
    """Return the first of the names nearest to `name`, or None when none is within two edits."""
    if len(name) < _SHORTEST_COMPARED:
        return None
    near = [(_edits(name, other), other) for other in sorted(names)
            if abs(len(name) - len(other)) <= _SIMILAR_EDITS and len(other) >= _SHORTEST_COMPARED]
    edits, other = min(near, default=(_SIMILAR_EDITS + 1, None))
    return other if edits <= _SIMILAR_EDITS else None


def _edits(one: str, other: str) -> int:
    """Return how many characters must be inserted, deleted or replaced to get from one to the other."""
    row = list(range(len(other) + 1))
    for number, character in enumerate(one, 1):
        last, row[0] = row[0], number
        for column, opposite in enumerate(other, 1):
            last, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, last + (character != opposite))
    return row[-1]
