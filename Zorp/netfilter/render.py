"""Plans in the language of iptables.

Theory of operation
    words_of() spells one rule as matches and target with their options, the one form that both
    writers use: text() joins it into lines for iptables-restore, the legacy writer hands it to
    python-iptables option by option.

    Reading back compares what iptables-save prints with what we would have written.  Both are
    brought into one form first (canonical()): names of protocols and of interface groups become
    numbers, matches that only carry the name of the protocol disappear, and the order of options
    means nothing.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import re
import shlex
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from Zorp.netfilter.plan import CHAIN_PREFIX, Chain, Rule, Table, Target, Test

_PROTOCOL_NAMES = {1: "icmp", 6: "tcp", 17: "udp", 33: "dccp", 47: "gre", 50: "esp", 51: "ah", 58: "ipv6-icmp",
                   132: "sctp"}
_NUMBERS = {name: number for number, name in _PROTOCOL_NAMES.items()} | {"icmpv6": 58}
_TOKEN = re.compile(r"0x[0-9a-f]+|[0-9]+")
_GROUP_NAMES = pathlib.Path("/etc/iproute2/group")


@dataclass(frozen=True, slots=True)
class Part:
    """A match or the target of a rule: its module and options.

    Options are (name, values, negated); a part with an empty module holds those that need none.
    """

    module: str
    options: tuple[tuple[str, tuple[str, ...], bool], ...] = ()


@dataclass(frozen=True, slots=True)
class Words:
    """One rule as iptables spells it."""

    parts: tuple[Part, ...]
    target: Part
    is_goto: bool = False


# ---------------------------------------------------------------------------- one rule

def words_of(rule: Rule, family: int) -> Words:
    """Return a rule in the language of iptables (family 4) or ip6tables (6)."""
    protocol = next((test.value for test in rule.tests if test.what == "proto" and not test.negated), None)
    plain: list[tuple] = []
    parts: list[Part] = []
    for test in rule.tests:
        if test.what in _PLAIN:
            option, spell = _PLAIN[test.what]
            plain.append((option, (spell(test.value),), test.negated))
        else:
            parts.append(_match(test, family, protocol))
    plain.sort(key=lambda option: _PLAIN_ORDER.index(option[0]))
    target, is_goto = _target(rule.target, family)
    return Words((Part("", tuple(plain)), *_merged(parts)), target, is_goto)


def _protocol_name(number: int) -> str:
    return _PROTOCOL_NAMES.get(number, str(number))


_PLAIN = {"iface": ("in-interface", str), "proto": ("protocol", _protocol_name), "src": ("source", str),
          "dst": ("destination", str)}
_PLAIN_ORDER = ("source", "destination", "in-interface", "protocol")
_SHORT = {"source": "-s", "destination": "-d", "in-interface": "-i", "protocol": "-p"}


def _range(value: tuple[int, int]) -> str:
    low, high = value
    return str(low) if low == high else f"{low}:{high}"


def _match(test: Test, family: int, protocol: int | None) -> Part:
    what, value = test.what, test.value
    if what in ("sport", "dport"):
        return Part(_protocol_name(protocol), ((what, (_range(value),), test.negated),))
    if what == "syn":
        return Part("tcp", (("tcp-flags", ("FIN,SYN,RST,ACK", "SYN"), test.negated),))
    if what == "icmp":
        number, code = value
        text = str(number) if code is None else f"{number}/{code}"
        module, option = ("icmp", "icmp-type") if family == 4 else ("icmp6", "icmpv6-type")
        return Part(module, ((option, (text,), test.negated),))
    if what in ("set-src", "set-dst"):
        return Part("set", (("match-set", (value, what[4:]), test.negated),))
    if what in ("mark", "connmark"):
        return Part(what, (("mark", (_hex(*value),), test.negated),))
    if what == "state":
        return Part("conntrack", (("ctstate", (value,), test.negated),))
    if what == "direction":
        return Part("conntrack", (("ctdir", (value,), test.negated),))
    if what == "known":
        return Part("conntrack", (("ctstatus", ("CONFIRMED",), test.negated),))
    if what == "origdst":
        return Part("conntrack", (("ctorigdst", (value,), test.negated),))
    if what == "ifgroup":
        return Part("devgroup", (("src-group", (f"{value:#x}",), test.negated),))
    if what == "local":
        return Part("addrtype", (("dst-type", ("LOCAL",), False), ("limit-iface-in", (), False)))
    if what == "reqid":
        return Part("policy", (("dir", ("in",), False), ("pol", ("ipsec",), False), ("reqid", (str(value),), False)))
    return Part("socket", (("transparent", (), False),))


def _hex(value: int, mask: int) -> str:
    return f"{value:#x}/{mask:#x}"


def _merged(parts: Iterable[Part]) -> list[Part]:
    """Join neighbours of one module that may stand together: source and destination port."""
    merged: list[Part] = []
    for part in parts:
        if merged and merged[-1].module == part.module and part.module in ("tcp", "udp"):
            merged[-1] = Part(part.module, merged[-1].options + part.options)
        else:
            merged.append(part)
    return merged


def _target(target: Target, family: int) -> tuple[Part, bool]:
    what, values = target.what, target.values
    if what in ("jump", "goto"):
        return Part(values[0]), what == "goto"
    return Part(*_TARGETS[what](family, *values)), False


def _option(name: str, *values: str) -> tuple[str, tuple[str, ...], bool]:
    return name, values, False


def _address(family: int, address: str, port: int) -> str:
    if not port:
        return address
    return f"[{address}]:{port}" if family == 6 else f"{address}:{port}"


_TARGETS = {
    "accept": lambda family: ("ACCEPT",),
    "drop": lambda family: ("DROP",),
    "return": lambda family: ("RETURN",),
    "masquerade": lambda family: ("MASQUERADE",),
    "mark": lambda family, value, mask: ("MARK", (_option("set-xmark", _hex(value, mask)),)),
    "connmark": lambda family, value, mask: ("CONNMARK", (_option("set-xmark", _hex(value, mask)),)),
    "tproxy": lambda family, address, port, value, mask: ("TPROXY", (
        _option("on-port", str(port)), _option("on-ip", address), _option("tproxy-mark", _hex(value, mask)))),
    "dnat": lambda family, address, port: ("DNAT", (_option("to-destination", _address(family, address, port)),)),
    "snat": lambda family, address, port: ("SNAT", (_option("to-source", _address(family, address, port)),)),
    "netmap": lambda family, net: ("NETMAP", (_option("to", net),)),
    "reject": lambda family, code: ("REJECT", (_option("reject-with", code),)),
    "nflog": lambda family, group, prefix: ("NFLOG", (
        _option("nflog-prefix", prefix), _option("nflog-group", str(group)))),
}


# ---------------------------------------------------------------------------- text

def line_of(chain: str, rule: Rule, family: int) -> str:
    """Return the line that appends a rule to a chain."""
    words = words_of(rule, family)
    tokens = ["-A", chain]
    for part in words.parts:
        if part.module:
            tokens += ["-m", part.module]
        for name, values, negated in part.options:
            tokens += [*(["!"] if negated else []), _SHORT.get(name, f"--{name}"), *map(_quoted, values)]
    tokens += ["-g" if words.is_goto else "-j", words.target.module]
    for name, values, _ in words.target.options:
        tokens += [f"--{name}", *map(_quoted, values)]
    return " ".join(tokens)


def _quoted(value: str) -> str:
    if '"' in value or "\\" in value or "\n" in value:
        raise ValueError(f"not a value for a packet rule: {value!r}")
    return f'"{value}"' if " " in value else value


def text_of(table: Table, *, remove: Iterable[str] = (), add_hooks: Iterable[str] = ()) -> str:
    """Return the input of iptables-restore --noflush that makes the chains of a table ours.

    remove: chains of ours that the plan does not have.  add_hooks: lines that change built-in chains.
    """
    gone = sorted(remove)
    lines = [f"*{table.name}"]
    lines += [f":{name} - [0:0]" for name in (*gone, *(chain.name for chain in table.chains))]
    lines += add_hooks
    lines += [line_of(chain.name, rule, table.family) for chain in table.chains for rule in chain.rules]
    lines += [f"-X {name}" for name in gone]
    return "\n".join((*lines, "COMMIT", ""))


# ---------------------------------------------------------------------------- reading back

@dataclass(frozen=True, slots=True)
class Present:
    """What one table of the kernel holds: our chains as canonical rules, and the rules of built-in chains."""

    ours: dict[str, tuple[frozenset, ...]]
    builtin: dict[str, tuple[str, ...]]          # built-in chain -> its rules as lines
    policies: dict[str, str]
    foreign: tuple[str, ...] = ()                # lines of chains that are neither
    lines: tuple[str, ...] = ()                  # of our chains, as they were printed


def parse_save(text: str) -> dict[str, Present]:
    """Return table name -> content, from what iptables-save printed."""
    tables: dict[str, Present] = {}
    ours: dict[str, list[frozenset]] = {}
    builtin: dict[str, list[str]] = {}
    policies: dict[str, str] = {}
    foreign: list[str] = []
    lines: list[str] = []
    name = ""
    for line in text.split("\n"):                # a comment of the site may hold what else ends a line to Python
        if line.startswith("*"):
            name, ours, builtin, policies, foreign, lines = line[1:], {}, {}, {}, [], []
        elif line.startswith(":"):
            chain, policy = line[1:].split()[:2]
            if chain.startswith(CHAIN_PREFIX):
                ours[chain] = []
            elif policy != "-":
                builtin[chain], policies[chain] = [], policy
        elif line.startswith("-A "):
            chain = line.split(maxsplit=2)[1]
            if chain in ours:
                ours[chain].append(canonical(line))
                lines.append(line)
            elif chain in builtin:
                builtin[chain].append(line)
            else:
                foreign.append(line)
        elif line == "COMMIT":
            tables[name] = Present({chain: tuple(rules) for chain, rules in ours.items()},
                                   {chain: tuple(rules) for chain, rules in builtin.items()}, policies,
                                   tuple(foreign), tuple(lines))
    return tables


def canonical(line: str) -> frozenset:
    """Return what a rule line says, whatever its spelling: {(option, values, negated)}."""
    tokens = shlex.split(line) if '"' in line or "\\" in line else line.split()      # shlex takes 50 times as long
    options: list[list] = []
    negated = False
    for token in tokens:
        if token == "!":
            negated = True
        elif token.startswith("-") and len(token) > 1 and not token[1:].isdigit():
            options.append([token, [], negated])
            negated = False
        else:
            options[-1][1].append(_canonical_value(options[-1][0], token))
    kept = [(option, tuple(values), is_negated) for option, values, is_negated in options
            if option != "-m" and option != "-A"]
    return frozenset(_numbered(kept))


def _numbered(options: list[tuple]) -> Iterator[tuple]:
    """Tell equal options apart, so that none is lost in a set."""
    seen: dict[tuple, int] = {}
    for option in options:
        seen[option] = seen.get(option, 0) + 1
        yield (*option, seen[option])


def _canonical_value(option: str, value: str) -> str:
    if option == "-p":
        return str(_NUMBERS.get(value) or _number_of(value))
    if option in ("-s", "-d", "--ctorigdst"):
        address, _, bits = value.partition("/")
        if ":" in address:
            return f"{socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, address))}/{bits or 128}"
        return f"{address}/{bits or 32}"
    if option in ("--to-source", "--to-destination", "--to"):
        return value.removesuffix("/32").removesuffix("/128")
    if option == "--src-group" and (number := _numbers_of_groups(_GROUP_NAMES).get(value)) is not None:
        return str(number)
    return _TOKEN.sub(lambda found: str(int(found[0], 0)), value) if value.startswith("0x") else value


def _numbers_of_groups(path: pathlib.Path) -> Mapping[str, int]:
    """Return name -> number of interface groups; iptables-save shows the names that this host gave them."""
    try:
        return _groups_in(path, path.stat().st_mtime_ns)
    except OSError:
        return {}


@functools.lru_cache(maxsize=1)
def _groups_in(path: pathlib.Path, changed_ns: int) -> Mapping[str, int]:
    found = {}
    for line in path.read_text("utf-8", "replace").splitlines():
        number, name, *_ = [*line.partition("#")[0].split(), "", ""]
        with contextlib.suppress(ValueError):
            found[name] = int(number, 0)
    return found


def _number_of(protocol: str) -> int | str:
    if protocol.isdigit():
        return int(protocol)
    try:
        return socket.getprotobyname(protocol)
    except OSError:
        return protocol


@functools.lru_cache(maxsize=6)                  # three tables of two families: one plan is asked for several times
def expected(chains: tuple[Chain, ...], family: int) -> Mapping[str, tuple[frozenset, ...]]:
    """Return the chains of a plan in the form of Present.ours."""
    return {chain.name: tuple(canonical(line_of(chain.name, rule, family)) for rule in chain.rules)
            for chain in chains}
