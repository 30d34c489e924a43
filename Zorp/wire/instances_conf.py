"""instances.conf: text to instances.

    NAME ZORP-ARGUMENTS [ -- ZORPCTL-ARGUMENTS ]

Theory of operation
    One instance per line; blank lines and lines that start with "#" are skipped.  Arguments are
    split once the way a shell splits them, without any expansion; the first word "--" separates
    the options of zorp from those of zorpctl.  Options of zorpctl that old manuals put before
    the separator are moved behind it, and the words of zorpctl.conf's *_APPEND_ARGS follow.

    parse() never raises.  A line that cannot be used is a Problem with its number, and all other
    instances stay controllable; a second line with the same name refuses both, because starting
    either would be a guess.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from Zorp.wire.zorpctl_conf import ZorpctlConf

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
_FUNCTION_NAME = re.compile(r"[A-Za-z0-9_]+")
_OTHER_FUNCTION = re.compile(r"--as(=|$)|-a")
_NUMBER = re.compile(r"[0-9]{1,19}")
_MOST_PROCESSES = 1024

# long and short spelling of zorpctl's own options, and whether a value follows
_OPTIONS = {
    "--auto-restart": ("auto_restart", True, False), "-A": ("auto_restart", True, False),
    "--no-auto-restart": ("auto_restart", False, False), "-a": ("auto_restart", False, False),
    "--no-auto-start": ("auto_start", False, False), "-S": ("auto_start", False, False),
    "--enable-core": ("enable_core", True, False), "-c": ("enable_core", True, False),
    "--num-of-processes": ("number_of_processes", None, True), "-P": ("number_of_processes", None, True),
    "--parallel-instances": ("number_of_processes", None, True),
    "--process-limit": ("process_limit", None, True), "-p": ("process_limit", None, True),
    "--fd-limit": ("fd_limit", None, True), "-f": ("fd_limit", None, True),
}
_BEFORE_SEPARATOR = frozenset({
    "--no-auto-restart", "--auto-restart", "--no-auto-start", "--num-of-processes", "--process-limit", "--fd-limit",
    "--parallel-instances",
})
_OBSOLETE_ZORP_OPTIONS = {"--autobind-ip": True, "-B": True}       # option -> a value follows


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceLine:
    """One usable line."""

    name: str
    zorp_args: tuple[str, ...]
    auto_restart: bool = True
    auto_start: bool = True
    enable_core: bool = False
    number_of_processes: int = 1
    line_number: int = 0

    @property
    def zorp_words(self) -> tuple[str, ...]:
        """The arguments of zorp that make this instance; it has this line's name, whatever function --as names."""
        return ("--as", self.name, *self.zorp_args, "--master", f"{self.name}#0")

    @property
    def process_names(self) -> tuple[str, ...]:
        """NAME#0 and so on, one per process."""
        return tuple(f"{self.name}#{k}" for k in range(self.number_of_processes))


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a line; `fatal` when the line's instance cannot be used."""

    line_number: int
    text: str
    fatal: bool

    def __str__(self) -> str:
        return f"instances.conf:{self.line_number}: {self.text}"


class _LineError(ValueError):
    pass


def parse(text: str, conf: ZorpctlConf) -> tuple[list[InstanceLine], list[Problem]]:
    """Return the instances in file order, and all problems found."""
    instances: dict[str, InstanceLine] = {}
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        try:
            instance = _instance(line, number, conf, problems)
        except _LineError as problem:
            problems.append(Problem(number, str(problem), fatal=True))
            continue
        if instance.name in seen:
            problems.append(Problem(number, f"Instance {instance.name} is defined twice, in lines "
                                            f"{seen[instance.name]} and {number}", fatal=True))
            instances.pop(instance.name, None)
            continue
        seen[instance.name] = number
        instances[instance.name] = instance
    return list(instances.values()), problems


def _instance(line: str, number: int, conf: ZorpctlConf, problems: list[Problem]) -> InstanceLine:
    name, words = _split(line)
    if any("\0" in word for word in (*words, *conf.zorp_append_args)):
        raise _LineError(f"Invalid arguments at instance {name}: no word can have a byte of value 0")
    separator = words.index("--") if "--" in words else len(words)
    if separator and not words[0].startswith("-"):
        raise _LineError(f"Invalid arguments at instance {name}: '{words[0]}' is not an option; "
                         "options begin with - or --, such as --policy FILE")
    if not _FUNCTION_NAME.fullmatch(name) and not any(_OTHER_FUNCTION.match(word) for word in words[:separator]):
        problems.append(Problem(number, f"{name} cannot be the name of a function in the policy; use letters, digits "
                                        "and _, or name the function with --as", fatal=False))
    zorp_args, moved = _sort_out(words[:separator], number, problems)
    settings = {"auto_restart": conf.auto_restart}
    _read_options([*words[separator + 1:], *moved, *conf.zorpctl_append_args], settings, name, number, problems)
    fd_limit = settings.pop("fd_limit", None)
    if fd_limit is not None:
        zorp_args += ["--fd-limit-min", str(fd_limit)]
    if settings.pop("process_limit", None) is not None:
        problems.append(Problem(number, "--process-limit has no effect", fatal=False))
    return InstanceLine(name=name, zorp_args=(*zorp_args, *conf.zorp_append_args), line_number=number, **settings)


def _split(line: str) -> tuple[str, list[str]]:
    try:
        name, *words = shlex.split(line)
    except ValueError as problem:
        raise _LineError(f"{problem}; close the quotation") from None
    if not _NAME.fullmatch(name):
        raise _LineError(f"Invalid instance name: {name}")
    return name, words


def _sort_out(words: list[str], number: int, problems: list[Problem]) -> tuple[list[str], list[str]]:
    """Return the options for zorp, and those that belong to zorpctl although they stand before "--"."""
    kept: list[str] = []
    moved: list[str] = []
    rest = iter(words)
    for word in rest:
        option, equals, _ = word.partition("=")
        if option in _BEFORE_SEPARATOR:
            problems.append(Problem(number, f"{option} is an option of zorpctl; put it behind ' -- '", fatal=False))
            moved.append(word)
            if _OPTIONS[option][2] and not equals:
                moved.extend([value for value in (next(rest, None),) if value is not None])
        elif option in _OBSOLETE_ZORP_OPTIONS:
            problems.append(Problem(number, f"{option} is obsolete and ignored", fatal=False))
            if not equals:
                next(rest, None)
        else:
            kept.append(word)
    return kept, moved


def _read_options(words: list[str], settings: dict, name: str, number: int, problems: list[Problem]) -> None:
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if option not in _OPTIONS:
            raise _LineError(f"Junk found at the end of the arg list: {word}; "
                             f"Invalid argument list at instance: {name}")
        setting, constant, takes_value = _OPTIONS[option]
        if option == "--parallel-instances":
            problems.append(Problem(number, "--parallel-instances is read as --num-of-processes", fatal=False))
        if not takes_value:
            settings[setting] = constant
            continue
        text = value if equals else next(rest, "")
        if not _NUMBER.fullmatch(text) or not 1 <= int(text) <= _limit(setting):
            raise _LineError(f"{option} needs a number from 1 to {_limit(setting)}, not '{text}'")
        settings[setting] = int(text)


def _limit(setting: str) -> int:
    return _MOST_PROCESSES if setting == "number_of_processes" else 2**31 - 1
