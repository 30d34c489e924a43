"""zorpctl.conf: text to values.

Theory of operation
    Both historical forms are read: KEY=VALUE lines (3.x to 6.x), and the same under an INI
    section [zorpctl] with blanks around "=" (7.x).  Keys are case-insensitive; a value may stand
    in single or double quotes; "#" and ";" start comment lines.  parse() never raises: what it
    does not understand becomes a warning with its line number, because one bad line must not
    take away the control of every instance.

    Times are seconds, fractions allowed.  Modes are octal.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from Zorp.wire.kzorpd import KZORPD_DIR


@dataclass(frozen=True, slots=True, kw_only=True)
class ZorpctlConf:
    """The settings of the control program; the defaults are those of an absent file."""

    auto_restart: bool = True
    start_wait_timeout: float = 10.0           # seconds; 0: do not wait
    stop_check_delay: float = 0.1              # seconds between two looks
    stop_check_timeout: float = 5.0            # seconds
    zorp_append_args: tuple[str, ...] = ()
    zorpctl_append_args: tuple[str, ...] = ()
    check_perms: bool = True
    config_dir: str = "/etc/zorp"
    config_dir_owner: str = "root"
    config_dir_group: str = "zorp"
    config_dir_mode: int = 0o750
    pidfile_dir: str = "/var/run/zorp"
    pidfile_dir_owner: str = "zorp"
    pidfile_dir_group: str = "zorp"
    pidfile_dir_mode: int = 0o770
    kzorpd_dir: str = KZORPD_DIR
    zorp_sysconfdir: str = "/etc/zorp"
    zorp_pidfiledir: str = "/var/run/zorp"
    zorp_sbindir: str = "/usr/sbin"
    zorp_libdir: str = "/usr/lib/zorp"
    product_name: str = "Zorp"
    warnings: tuple[str, ...] = field(default=(), compare=False)


_ALIASES = {"append_args": "zorp_append_args"}
_FD_LIMIT = "fd_limit_min"
_OBSOLETE = frozenset({
    "process_limit_threshold", "auto_restart_time_threshold", "auto_restart_max_count", "auto_restart_delay",
    "start_check_timeout", "fd_limit_threshold", "process_limit_min", "process_limit_reserve",
})


def _switch(text: str) -> bool:
    return {"1": True, "yes": True, "true": True, "on": True, "0": False, "no": False, "false": False,
            "off": False, "": False}[text.lower()]


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < 1e6:
        raise ValueError(text)
    return seconds


def _octal(text: str) -> int:
    return int(text, 8)


def _words(text: str) -> tuple[str, ...]:
    return tuple(shlex.split(text))


# type of the setting -> (reader, what an administrator has to write)
_CONVERTERS: dict[str, tuple[Callable, str]] = {
    "bool": (_switch, "yes or no"), "float": (_seconds, "seconds, 0 or more, like 2.5"),
    "int": (_octal, "an octal mode like 770"), "str": (str, "a text"),
    "tuple[str, ...]": (_words, "words, with quotes in pairs"),
}
_FIELDS = {item.name: _CONVERTERS[item.type] for item in fields(ZorpctlConf) if item.name != "warnings"}
_FIELDS[_FD_LIMIT] = (int, "a number")


def parse(text: str, **settings: str) -> ZorpctlConf:
    """Return the settings of a zorpctl.conf; what could not be used is in `warnings`.

    `settings` hold where the text does not say otherwise.
    """
    values: dict = dict(settings)
    warnings: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line[0] in "#;[":
            continue
        key, equals, value = line.partition("=")
        key = key.strip().lower()
        if not equals:
            warnings.append(f"Invalid zorpctl.conf line at {number}: {line}; write KEY=VALUE")
        else:
            _take(values, warnings, number, _ALIASES.get(key, key), line, value)
    if "pidfile_dir" in values:
        values.setdefault("zorp_pidfiledir", values["pidfile_dir"])
    if "config_dir" not in values and "zorp_sysconfdir" in values:
        values["config_dir"] = values["zorp_sysconfdir"]
    return ZorpctlConf(**values, warnings=tuple(warnings))


def _take(values: dict, warnings: list[str], number: int, key: str, line: str, raw: str) -> None:
    if key in _OBSOLETE:
        warnings.append(f"The use of {key.upper()} in zorpctl.conf is deprecated, its value is ignored")
        return
    if key not in _FIELDS:
        near = difflib.get_close_matches(key, _FIELDS, 1)
        advice = f"did you mean {near[0].upper()}" if near else "zorpctl.conf(5) lists what there is"
        warnings.append(f"Unknown zorpctl.conf directive at {number}: {line}; {advice}")
        return
    reader, expected = _FIELDS[key]
    try:
        value = _unquoted(raw.strip())
        if key == _FD_LIMIT:
            values["zorp_append_args"] = (*values.get("zorp_append_args", ()), "--fd-limit-min", str(reader(value)))
        elif key == "zorp_append_args":
            values[key] = (*values.get(key, ()), *reader(value))
        else:
            values[key] = reader(value)
    except (ValueError, KeyError):
        warnings.append(f"Invalid zorpctl.conf line at {number}: {line}; {key.upper()} takes {expected}")


def _unquoted(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        inner = value[1:-1]
        return inner.replace("\\" + value[0], value[0]).replace("\\\\", "\\")
    return value
