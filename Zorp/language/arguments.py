"""Arguments of the classes that policies use: looked at while the policy loads, not at the first client.

    self.timeout_connect = arguments.number("ConnectChainer", "timeout_connect", timeout_connect, most=LONGEST_MS)

Every function returns the value as the class wants it, or raises PolicyError with one text:
`Invalid ARGUMENT of OWNER; ARGUMENT='...'` and what to write instead.  `owner` is the class, or
the object with its name where it has one.

A time longer than LONGEST_MS overflows the timers of the kernel, so it would end a session in the
middle instead of waiting for ever; a truth value that is a text is refused because "FALSE" is true.
"""

from __future__ import annotations

import math
from typing import Any

from Zorp.Exceptions import PolicyError

LONGEST_MS = (1 << 31) - 1               # poll() counts milliseconds in a C int: 24 days
LONGEST_SECONDS = LONGEST_MS // 1000
LARGEST_INT = (1 << 31) - 1              # a C int: queue lengths, buffer sizes
LARGEST_PORT = 65535


def invalid(owner: str, argument: str, value: Any, remedy: str) -> PolicyError:
    """Return the error for a value that is none of those which `remedy` names."""
    return PolicyError(f"Invalid {argument} of {owner}; {argument}='{value}'", remedy=remedy)


def number(owner: str, argument: str, value: Any, *, least: float = 0, most: float = LARGEST_INT,
           unit: str = "") -> int | float:
    """Return a number between `least` and `most`; whole and broken ones, but no TRUE."""
    if (not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value)
            or not least <= value <= most):
        raise invalid(owner, argument, value, f"give a number{f' of {unit}' if unit else ''} from {least} to {most}")
    return value


def whole_number(owner: str, argument: str, value: Any, *, least: int = 0, most: int = LARGEST_INT) -> int:
    """Return an int between `least` and `most`."""
    if not isinstance(value, int) or not least <= value <= most:
        raise invalid(owner, argument, value, f"give a whole number from {least} to {most}")
    return int(value)


def milliseconds(owner: str, argument: str, value: Any) -> int | float | None:
    """Return a time in milliseconds that the kernel can wait for; None for what means none: 0, None, ""."""
    if not value:
        return None
    return number(owner, argument, value, most=LONGEST_MS, unit="milliseconds") or None


def flag(owner: str, argument: str, value: Any) -> int:
    """Return TRUE or FALSE: any int, or None for FALSE."""
    if value is None or isinstance(value, int):
        return 1 if value else 0
    raise invalid(owner, argument, value, "write TRUE or FALSE, without quotes")


def name(owner: str, argument: str, value: Any) -> str:
    """Return a text that is not empty."""
    if isinstance(value, str) and value:
        return value
    raise invalid(owner, argument, value, "give a name, as a text")


def text(owner: str, argument: str, value: Any, remedy: str = "give a text") -> str:
    """Return a text without NUL, perhaps an empty one."""
    if isinstance(value, str) and "\0" not in value:
        return value
    raise invalid(owner, argument, value, remedy)


def items(owner: str, argument: str, value: Any, remedy: str) -> tuple:
    """Return the items of a list, tuple, set or dictionary; a text is one item, None is none."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, (bytes, bytearray)) or not hasattr(value, "__iter__") or isinstance(value, type):
        raise invalid(owner, argument, value, remedy)
    return tuple(value)

