"""What the keywords of a rule mean: from what a policy writes to plain, checked data.

read_conditions() takes the keywords of Rule() apart: aliases are resolved and merged, single
values become tuples, port texts become ranges, subnets become numbers, names are looked up.
Everything that could make a rule useless or dangerous later is refused here, while the policy
loads; the original left much of it to the kernel, which could only refuse the whole load.

A condition that is an empty sequence is no restriction, as it always was.  That widens a rule
without a word, so it is reported.

Which rule an exception is about, the caller adds, who knows its id and service.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from Zorp import Globals, Subnet
from Zorp.Base import BaseZone
from Zorp.Constants import CORE_POLICY
from Zorp.Exceptions import PolicyError
from Zorp.Log import log
from Zorp.rules.engine import DIMENSIONS, PORTS, NetData
from Zorp.Util import makeSequence, parseIfaceGroupAliases
from Zorp.zones.table import unmapped_net

ALIASES = {"src_iface": "iface", "src_ifgroup": "ifgroup", "icmp_type": "proto_type", "icmp_code": "proto_subtype"}
INTERNAL = ("src_subnet6", "dst_subnet6")        # the original kept IPv6 subnets under these names
KEYWORDS = frozenset({*DIMENSIONS, *ALIASES})

_MAX_IFACE = 15
_MAX_U32 = 0xFFFFFFFF


class PortRange:
    """The ports from low to high, both included: `dst_port=PortRange(8000, 8099)`.

    The rule that uses it checks the numbers.
    """

    def __init__(self, low, high):
        self.low = low
        self.high = high

    def getTuple(self):
        """Return (low, high)."""
        return self.low, self.high

    def __eq__(self, other):
        return isinstance(other, PortRange) and self.getTuple() == other.getTuple()

    def __hash__(self):
        return hash(self.getTuple())

    def __repr__(self):
        return f"PortRange({self.low}, {self.high})"


def read_conditions(keywords: dict) -> dict[str, tuple]:
    """Return dimension -> values for the keywords of a rule, without those that restrict nothing.

    Raises PolicyError, whose text begins with that of the original.
    """
    conditions: dict[str, list] = {}
    for keyword, given in keywords.items():
        if keyword in INTERNAL:
            raise PolicyError(f"Invalid dimension specification '{keyword}'",
                                 remedy=f"write IPv6 subnets into {keyword[:-1]}, together with IPv4 ones")
        if keyword not in KEYWORDS:
            raise PolicyError(f"Unknown dimension '{keyword}'", remedy=f"rules know {', '.join(sorted(KEYWORDS))}")
        dimension = ALIASES.get(keyword, keyword)
        read = _group_or_name if keyword in _NAMED_GROUPS else _READERS[dimension]
        values = [value for item in makeSequence(given) for value in read(keyword, item)]
        if not values:
            log(None, CORE_POLICY, 2, "Empty condition restricts nothing; dimension='%s'", (keyword,))
        conditions.setdefault(dimension, []).extend(values)
    return {dimension: tuple(dict.fromkeys(values)) for dimension, values in conditions.items() if values}


# ---------------------------------------------------------------------------- one value each

def _number_within(low: int, high: int) -> Callable[[str, object], Iterable[int]]:
    def read(keyword: str, value: object) -> Iterable[int]:
        if not isinstance(value, int) or not low <= value <= high:
            raise PolicyError(f"Integer value expected; dimension='{keyword}', value='{value}'",
                                 remedy=f"{keyword} is a number from {low} to {high}")
        return (int(value),)

    return read


def _iface(keyword: str, value: object) -> Iterable[str]:
    if not isinstance(value, str) or not 0 < len(value.encode()) <= _MAX_IFACE or set(value) & set("/ \t\r\n\0"):
        raise PolicyError(f"Interface name expected; dimension='{keyword}', value='{value}'",
                             remedy=f"an interface name has 1 to {_MAX_IFACE} characters, no blank and no slash")
    return (value,)


class _GroupNames:
    """The interface groups that have a name, read when the first rule needs one."""

    def __init__(self):
        self._aliases = None

    def aliases(self) -> dict[str, int]:
        if self._aliases is None:
            try:
                self._aliases = parseIfaceGroupAliases()
            except OSError:
                self._aliases = {}
        return self._aliases


group_names = _GroupNames()


def _group_or_name(keyword: str, value: object) -> Iterable[int]:
    number = value
    if isinstance(value, str):
        number = int(value) if value.isascii() and value.isdigit() else group_names.aliases().get(value)
    if not isinstance(number, int) or not 0 <= number <= _MAX_U32:
        raise PolicyError(f"Valid group name expected; value='{value}' {group_names.aliases()}",
                             remedy=f"{keyword} is a number, or a name from /etc/iproute2/group")
    return (int(number),)


def _ports(keyword: str, value: object) -> Iterable[tuple[int, int]]:
    if isinstance(value, PortRange):
        ranges = [(value.low, value.high)]
    elif isinstance(value, str):
        ranges = [_port_text(keyword, part) for part in value.split(",")]
    else:
        ranges = [(value, value)]
    for low, high in ranges:
        if not isinstance(low, int) or not isinstance(high, int):
            raise PolicyError(f"Integer port value expected; value='{value}'",
                                 remedy=f"{keyword} takes a number, '80,8000:8099', or PortRange(low, high)")
        if not 0 <= low <= high < PORTS:
            raise PolicyError(f"Invalid port range; dimension='{keyword}', low='{low}', high='{high}'",
                                 remedy=f"ports go from 0 to {PORTS - 1}, the lower one first")
    return [(int(low), int(high)) for low, high in ranges]


def _port_text(keyword: str, text: str) -> tuple[int, int]:
    """Return the range of one part of a port list: "80", "1024:2048"."""
    low, colon, high = text.partition(":")
    try:
        return int(low), int(high if colon else low)
    except ValueError:
        raise PolicyError(f"Integer port value expected; value='{text}'", remedy=f"{keyword} takes texts like '80', "
                          "'8000:8099' (a range), or both with a comma between") from None


def _subnet(keyword: str, value: object) -> Iterable[NetData]:
    if not isinstance(value, (str, Subnet.Subnet)):
        raise PolicyError(f"Invalid subnet specification: value='{value}'",
                             remedy=f"{keyword} takes 'address/bits' in quotes, or an InetSubnet or Inet6Subnet")
    subnet = value if isinstance(value, Subnet.Subnet) else Subnet.Subnet.create(value)
    return (NetData(*unmapped_net(subnet.family, subnet.network_int, subnet.mask_bits)),)


def _zone(keyword: str, value: object) -> Iterable[str]:
    name = value.name if isinstance(value, BaseZone) else value
    if not isinstance(name, str) or name not in Globals.zones:
        raise PolicyError(f"No zone was defined with that name; zone='{name}'",
                             remedy=f"define the zone above the rule, or take it out of {keyword}")
    return (name,)


_NAMED_GROUPS = ("src_ifgroup", "dst_ifgroup")
_READERS: dict[str, Callable[[str, object], Iterable]] = {
    "reqid": _number_within(0, _MAX_U32),
    "iface": _iface,
    "ifgroup": _number_within(0, _MAX_U32),
    "proto": _number_within(0, 255),
    "proto_type": _number_within(0, 255),
    "proto_subtype": _number_within(0, 255),
    "src_port": _ports,
    "dst_port": _ports,
    "src_subnet": _subnet,
    "src_zone": _zone,
    "dst_subnet": _subnet,
    "dst_iface": _iface,
    "dst_ifgroup": _group_or_name,
    "dst_zone": _zone,
}


class Described(NamedTuple):
    """A rule as releases up to 3.9.0 described it: a dictionary."""

    service: object
    rule_id: object
    conditions: dict


_DESCRIPTION_KEYS = frozenset({"iface", "ifgroup", "proto", "src_port", "dst_port", "src_subnet", "src_zone",
                               "dst_subnet", "dst_zone"})


def read_description(description: dict) -> Described:
    """Return what a rule dictionary of NDimensionDispatcher says; the dictionary is left as it is.

    Raises PolicyError with the text of 3.9.0.
    """
    if "service" not in description:
        raise PolicyError("Service key not found in rule description",
                          remedy=f"add 'service': a name; rule={dict(description)!r}")
    conditions = {key: value for key, value in description.items() if key not in ("service", "rule_id", "auth")}
    unknown = conditions.keys() - _DESCRIPTION_KEYS
    if unknown:
        raise PolicyError(f"Dimension name='{sorted(unknown)[0]}' not found",
                          remedy=f"rule dictionaries know {', '.join(sorted(_DESCRIPTION_KEYS))}")
    return Described(description["service"], description.get("rule_id"), conditions)
