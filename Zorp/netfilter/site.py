"""What the host's administrator decides about packet rules: kzorp.yml.

read() takes the text of the file apart.  Every key is optional; unknown keys, wrong kinds and
impossible values are errors that name the key, because a misspelt `default_deny` must not pass
for its default.  Whatever stands in the file, SiteError is the only exception.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import yaml

from Zorp.wire.kzorpd import KZORPD_DIR

FILE_NAME = "kzorp.yml"
INDEX_BITS = 16
_CONNECTION_BITS = 20            # index, undecided, one bit that stays free, class
_U32 = 0xFFFFFFFF
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60
_IFACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@-]{0,14}")
_PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17, "icmpv6": 58}
MODES = ("compiled", "listeners")
BACKENDS = ("auto", "nft", "legacy", "legacy-restore")
HOOKS = ("first", "last", "none")
TABLES = ("mangle", "nat", "filter")


class SiteError(ValueError):
    """kzorp.yml cannot be used; `str()` names the key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """Which bits of packet and connection marks are ours."""

    divert: int = 0x80000000         # packet: goes to a local socket
    own: int = 0x40000000            # packet: from a server-side socket of a proxy
    connection_shift: int = 0        # connection: where our twenty bits begin

    @property
    def connection_mask(self) -> int:
        return ((1 << _CONNECTION_BITS) - 1) << self.connection_shift

    @property
    def class_mask(self) -> int:
        return 0xC0000 << self.connection_shift

    @property
    def forward(self) -> int:
        return 0x40000 << self.connection_shift

    @property
    def deny(self) -> int:
        return 0x80000 << self.connection_shift

    @property
    def bypass(self) -> int:
        return 0xC0000 << self.connection_shift

    @property
    def undecided(self) -> int:
        """A connection that was a proxy's and is nobody's now."""
        return 1 << INDEX_BITS << self.connection_shift

    def of_index(self, index: int) -> int:
        return index << self.connection_shift


@dataclass(frozen=True, slots=True, kw_only=True)
class Bypass:
    """Traffic that is hidden from the rules; what is not given matches anything."""

    iface: str = ""
    proto: int | None = None
    src: str = ""
    dst: str = ""
    dst_port: tuple[int, int] | None = None

    @property
    def family(self) -> int | None:
        """4 or 6 when an address says so, else None."""
        for net in (self.src, self.dst):
            if net:
                return 6 if ":" in net else 4
        return {1: 4, 58: 6}.get(self.proto)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """The settings of a host."""

    mode: str = "compiled"                   # listeners: no packet rules on this host
    backend: str = "auto"                    # auto: what the command iptables uses
    marks: Marks = dataclasses.field(default_factory=Marks)
    families: tuple[int, ...] = (4, 6)
    routing_table: int = 100
    rule_priority: int = 100                 # of the policy routing rule
    accepts_marks: bool = False              # net.ipv4.tcp_fwmark_accept is 1 on this host
    hooks: str = "first"                     # where our jumps stand in the built-in chains; none: the site's business
    default_deny: bool = True                # what no rule allowed is not forwarded
    bypass: tuple[Bypass, ...] = ()
    nflog_group: int = 5
    split_above: int = 8                     # more rules than this in one list are cut (Zorp.netfilter.evaluation)
    export_zone_sets: bool = False           # sets of all zones, for the site's own packet rules
    user: str = "zorp"                       # who loads policies
    pid_dir: str = KZORPD_DIR                # of kzorpd's socket; this and state_dir are not the instances'
    state_dir: str = "/var/lib/kzorp"
    keep_sessions: bool = False              # forwarded connections may outlive their rule
    on_stop: str = "keep"                    # the rules of an instance that stops: keep, or flush
    on_drift: str = "repair"                 # when others changed our rules: repair, or report only
    log_session_verdict: bool = False        # a summary line for every forwarded or denied connection
    log_unmatched: bool = False              # a line for what default_deny drops
    deny_log_rate: int = 50                  # "Session denied" lines per second and service


def read(text: str, path: str = FILE_NAME) -> Site:
    """Return the settings in the text of kzorp.yml; raises SiteError, which names the place in `path`."""
    tree, value = _yaml(text, path)
    lines = {key.value: key.start_mark.line + 1 for key, _ in tree.value} if isinstance(tree, yaml.MappingNode) else {}
    return Site(**_fields(path, {} if value is None else value, _SITE, lines))


def _yaml(text: str, path: str) -> tuple[yaml.Node | None, object]:
    """Return the tree of a text and its value; raises SiteError."""
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as problem:
        line = text.count("\n", 0, problem.position) + 1
        raise SiteError(f"{path}:{line}: not YAML: character {problem.character:#x}, {problem.reason}") from None
    except Exception as problem:             # the library lets many kinds through: ValueError, IndexError, KeyError...
        mark = getattr(problem, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark is not None else path
        raise SiteError(f"{place}: not YAML: {_reason(problem)}") from None
    try:
        return tree, None if tree is None else _value(tree)
    except Exception as problem:
        raise SiteError(f"{_place_of_fault(tree, path)}: not YAML: {_reason(problem)}") from None


def _reason(problem: Exception) -> str:
    return getattr(problem, "problem", None) or f"{type(problem).__name__}: {problem}"


def _value(tree: yaml.Node) -> object:
    return yaml.SafeLoader("").construct_document(tree)


def _place_of_fault(tree: yaml.Node, path: str) -> str:
    """Return which key has a value that cannot be had."""
    for key, value in tree.value if isinstance(tree, yaml.MappingNode) else ():
        try:
            _value(value)
        except Exception:
            return f"{path}:{value.start_mark.line + 1}: {key.value}"
    return path


def read_file(config_dir: str) -> Site:
    """Return the settings of a configuration directory, the defaults when it has no kzorp.yml.

    Raises SiteError, also when the file cannot be read.
    """
    path = os.path.join(config_dir, FILE_NAME)
    try:
        with open(path, encoding="utf-8") as file:
            return read(file.read(), path)
    except FileNotFoundError:
        return Site()
    except (OSError, UnicodeDecodeError) as problem:
        raise SiteError(f"{path} cannot be read: {problem}") from None


def _shown(value: object) -> str:
    """Return a value for a message: short, whatever it is."""
    try:
        return _REPR.repr(value)
    except ValueError:                       # a number of thousands of digits has no text
        return "a number without end"


def _fields(where: str, value: object, readers: dict[str, Callable], lines: Mapping[str, int] | None = None) -> dict:
    """Return the settings of a mapping; `lines` says where its keys stand."""
    if not isinstance(value, dict):
        raise SiteError(f"{where}: keys with values were expected")
    found = {}
    for key, given in value.items():
        place = f"{where}:{lines[key]}" if lines and key in lines else where
        if key not in readers:
            raise SiteError(f"{place}: unknown key {_shown(key)}; known are {', '.join(readers)}")
        found[key] = readers[key](f"{place}: {key}", given)
    return found


def _number(low: int, high: int) -> Callable[[str, object], int]:
    def check(where: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise SiteError(f"{where}: a number from {low} to {high} was expected, not {_shown(value)}")
        return value
    return check


def _flag(where: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise SiteError(f"{where}: true or false was expected, not {_shown(value)}")
    return value


def _choice(choices: tuple[str, ...]) -> Callable[[str, object], str]:
    def check(where: str, value: object) -> str:
        if value not in choices:
            raise SiteError(f"{where}: one of {', '.join(choices)} was expected, not {_shown(value)}")
        return value
    return check


def _text(where: str, value: object) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise SiteError(f"{where}: a text was expected, not {_shown(value)}")
    return value


def _directory(where: str, value: object) -> str:
    if not _text(where, value).startswith("/"):
        raise SiteError(f"{where}: a directory that begins with / was expected, not {_shown(value)}")
    return value


def _families(where: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or any(type(family) is not int or family not in (4, 6)
                                                       for family in value):
        raise SiteError(f"{where}: [4], [6] or [4, 6] was expected, not {_shown(value)}")
    return tuple(sorted(set(value)))


def _marks(where: str, value: object) -> Marks:
    marks = Marks(**_fields(where, value, {
        "divert": _one_bit, "own": _one_bit, "connection_shift": _number(0, 32 - _CONNECTION_BITS)}))
    if marks.divert == marks.own:
        raise SiteError(f"{where}: divert and own need different bits")
    return marks


def _one_bit(where: str, value: object) -> int:
    number = _number(1, _U32)(where, value)
    if number & (number - 1):
        raise SiteError(f"{where}: a number with one bit was expected, not {_shown(number)}")
    return number


def _bypass(where: str, value: object) -> tuple[Bypass, ...]:
    if not isinstance(value, list):
        raise SiteError(f"{where}: a list was expected")
    return tuple(_bypass_entry(f"{where}[{number}]", entry) for number, entry in enumerate(value))


def _bypass_entry(where: str, value: object) -> Bypass:
    entry = Bypass(**_fields(where, value, {
        "iface": _iface, "proto": _protocol, "src": _net, "dst": _net, "dst_port": _ports}))
    if entry == Bypass():
        raise SiteError(f"{where}: without a condition nothing would be evaluated; use mode: listeners")
    if entry.dst_port is not None and entry.proto not in (6, 17):
        raise SiteError(f"{where}: dst_port needs proto tcp or udp")
    if entry.src and entry.dst and (":" in entry.src) != (":" in entry.dst):
        raise SiteError(f"{where}: src and dst are of different families")
    return entry


def _iface(where: str, value: object) -> str:
    if not is_exact_iface(value):
        raise SiteError(f"{where}: an interface name was expected, not {_shown(value)}")
    return value


def is_exact_iface(value: object) -> bool:
    """Return whether the packet filter takes this for the name of one interface (a final + means many)."""
    return isinstance(value, str) and _IFACE.fullmatch(value) is not None


def _protocol(where: str, value: object) -> int:
    return _number(0, 255)(where, _PROTOCOLS.get(value, value) if isinstance(value, str) else value)


def _net(where: str, value: object) -> str:
    try:
        if not isinstance(value, str) or "%" in value:
            raise ValueError
        return str(ipaddress.ip_network(value))
    except ValueError:
        raise SiteError(f"{where}: address/bits was expected, not {_shown(value)}") from None


def _ports(where: str, value: object) -> tuple[int, int]:
    low, high = value if isinstance(value, list) and len(value) == 2 else (value, value)
    check = _number(0, 65_535)
    if check(where, low) > check(where, high):
        raise SiteError(f"{where}: the lower port comes first")
    return low, high


_SITE: dict[str, Callable] = {
    "mode": _choice(MODES), "backend": _choice(BACKENDS), "marks": _marks, "families": _families,
    "routing_table": _number(1, 252), "rule_priority": _number(2, 32_765), "hooks": _choice(HOOKS),
    "default_deny": _flag, "bypass": _bypass, "nflog_group": _number(0, 65_535), "split_above": _number(1, 1_000),
    "on_drift": _choice(("repair", "report")), "on_stop": _choice(("keep", "flush")),
    "log_session_verdict": _flag, "log_unmatched": _flag, "deny_log_rate": _number(1, 100_000),
    "export_zone_sets": _flag, "user": _text, "pid_dir": _directory, "state_dir": _directory, "keep_sessions": _flag,
}
