"""Small helpers that policies and our own modules share: sequences, enumerations, interface groups."""

from __future__ import annotations

import re

from Zorp.Constants import CORE_POLICY
from Zorp.Log import log

__all__ = ["enum", "isSequence", "makeSequence", "parseIfaceGroupAliases"]

_ALIAS = re.compile(r"([0-9]{1,3})[ \t]+(\S+)", re.ASCII)
_MAX_ALIAS_NUMBER = 255


def enum(*args, **kw):
    """Return a class with the names as attributes 0, 1, ... and the keywords as given.

    Its static to_string(value) returns the name of a value; raises KeyError for a value without one.
    """
    values = {name: number for number, name in enumerate(args)} | kw
    names = {value: name for name, value in values.items()}
    return type("Enum", (), {**values, "to_string": staticmethod(names.__getitem__)})


def isSequence(value):
    """Return whether a value is a collection of values; texts are single values."""
    return hasattr(value, "__iter__") and not isinstance(value, (str, bytes))


def makeSequence(value):
    """Return a sequence as it is, and a tuple of one for a single value."""
    return value if isSequence(value) else (value,)


def parseIfaceGroupAliases(filename="/etc/iproute2/group"):
    """Return {alias: number} of the interface groups that iproute2 knows by name.

    Lines are `NUMBER NAME`, 0 to 255; "#" starts a comment.  Lines that are neither are skipped
    with a warning.  Raises OSError when the file cannot be read.
    """
    aliases = {}
    with open(filename, encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            text = line.partition("#")[0].strip()
            if not text:
                continue
            entry = _ALIAS.fullmatch(text)
            if entry is None or int(entry[1]) > _MAX_ALIAS_NUMBER:
                log(None, CORE_POLICY, 3, "Line of the interface group table skipped; file='%s', line='%d', text='%s'",
                    (filename, number, text))
            else:
                aliases[entry[2]] = int(entry[1])
    return aliases
