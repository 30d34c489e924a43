"""What the arguments of a zone mean: the constructor had a different order in almost every release.

Theory of operation
    read_zone_call() looks only at the arguments and at the names of the zones defined so far.
    It picks the order of positional arguments by their types, gives every argument its name,
    and returns a ZoneCall.  The orders:

        0.6             (name, address, netmask, parent, inbound_services, outbound_services)
        up to 3.9.6     (name, addr, inbound_services, outbound_services, admin_parent, umbrella, inherit_name)
        3.9.7, 3.9.8    (name, addrs, admin_parent, inbound_services, outbound_services)
        5.0 and newer   (name, addrs, hostnames, admin_parent, inbound_services, outbound_services)

    The table that tells them apart is unambiguous for every policy that ran anywhere, because
    releases from 3.9.7 on refused service lists.

On purpose not as the original
    A service list given as one string is one service; the original took its letters.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Container
from dataclasses import dataclass

from Zorp.Exceptions import PolicyError
from Zorp.language import arguments

_DOTTED_QUAD = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}", re.ASCII)

_NETMASK_ORDER = ("name", "addrs", "netmask", "admin_parent", "inbound_services", "outbound_services")
_LISTS_ORDER = ("name", "addrs", "inbound_services", "outbound_services", "admin_parent", "umbrella", "inherit_name")
_GENERIC_LISTS_ORDER = (*_LISTS_ORDER[:6], "domain", "inherit_name")
_PARENT_ORDER = ("name", "addrs", "admin_parent", "inbound_services", "outbound_services")
_HOSTNAMES_ORDER = ("name", "addrs", "hostnames", "admin_parent", "inbound_services", "outbound_services")

_KEYWORDS = frozenset({*_HOSTNAMES_ORDER, "addr", "umbrella", "domain", "inherit_name"})
_KEYWORDS_OF_LISTS = frozenset({"umbrella", "domain", "inherit_name"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ZoneCall:
    """One zone as it was defined."""

    name: object
    addrs: object = ()                     # as given: one text or Subnet, or a sequence of them
    hostnames: object = ()
    admin_parent: object = None            # a name, a zone, or None
    inbound_services: tuple | None = None
    outbound_services: tuple | None = None
    umbrella: bool = False
    domain: object = None
    inherit_name: bool = False
    may_be_classic: bool = False           # nothing in it is newer than 3.9.0

    @property
    def carries_access_lists(self) -> bool:
        """True when the definition can only come from a release that enforced service lists."""
        return bool(self.inbound_services) or self.outbound_services is not None or self.umbrella


def read_zone_call(args: tuple, keywords: dict, zones: Container) -> ZoneCall:
    """Return what Zone(*args, **keywords) means, given the names of the zones defined so far.

    Raises TypeError as a function call would, and PolicyError for a netmask that is none.
    """
    unknown = keywords.keys() - _KEYWORDS
    if unknown:
        raise TypeError(f"Zone() got an unexpected keyword argument '{sorted(unknown)[0]}'")
    if "addr" in keywords and "addrs" in keywords:
        raise TypeError("Zone() got both 'addr' and 'addrs'; they are two names of one argument, write 'addrs'")
    order = _order_of(args, keywords, zones)
    given = _bound(args, keywords, order)
    if "name" not in given:
        raise TypeError("Zone() missing required argument: 'name'")
    if "netmask" in given:
        given["addrs"] = _with_netmask(given["addrs"], given.pop("netmask"))
    is_modern = "addrs" in keywords or "hostnames" in given or (order is _PARENT_ORDER and len(args) > 2)
    if not is_modern and given.get("admin_parent") == "":
        given["admin_parent"] = None              # 3.9.0 took every false value for "no parent"
    return ZoneCall(
        **{name: given[name] for name in ("name", "addrs", "hostnames", "admin_parent", "domain") if name in given},
        inbound_services=_services(given.get("inbound_services")),
        outbound_services=_services(given.get("outbound_services")),
        umbrella=bool(given.get("umbrella")), inherit_name=bool(given.get("inherit_name")),
        may_be_classic=not is_modern)


def _bound(args: tuple, keywords: dict, order: tuple) -> dict:
    """Give each argument its name, as a call does."""
    if len(args) > len(order):
        raise TypeError(f"Zone() takes at most {len(order)} positional arguments in this form, {len(args)} were given")
    given = dict(zip(order, args, strict=False))
    for name, value in keywords.items():
        name = "addrs" if name == "addr" else name
        if name in given:
            raise TypeError(f"Zone() got multiple values for argument '{name}'")
        given[name] = value
    return given


def _order_of(args: tuple, keywords: dict, zones: Container) -> tuple:
    """Return the names of the positional arguments."""
    if len(args) < 3:
        return _HOSTNAMES_ORDER
    if _is_dotted_quad(args[1]) and _is_dotted_quad(args[2]):
        return _NETMASK_ORDER
    if _has_lists(args, keywords):
        return _GENERIC_LISTS_ORDER if len(args) > 6 and not isinstance(args[6], int) else _LISTS_ORDER
    if isinstance(args[2], str) and args[2] in zones:
        return _PARENT_ORDER
    return _HOSTNAMES_ORDER


def _has_lists(args: tuple, keywords: dict) -> bool:
    """Tell whether the third positional argument is a list of inbound services."""
    third, fourth = args[2], args[3] if len(args) > 3 else None
    if isinstance(third, (list, tuple)):
        return (isinstance(fourth, (list, tuple)) or any("." not in item for item in third if isinstance(item, str))
                or _says_more_of_lists(args, keywords))
    if third is None:
        return isinstance(fourth, (list, tuple)) or _says_more_of_lists(args, keywords)
    return third == "*"


def _says_more_of_lists(args: tuple, keywords: dict) -> bool:
    """Tell whether the call has arguments that no release with another order accepted."""
    return ((len(args) > 4 and args[4] is not None) or keywords.get("outbound_services") is not None
            or not _KEYWORDS_OF_LISTS.isdisjoint(keywords))


def _is_dotted_quad(value: object) -> bool:
    return isinstance(value, str) and _DOTTED_QUAD.fullmatch(value) is not None


def _with_netmask(address: str, netmask: str) -> str:
    """Return address/bits for an address and a dotted netmask."""
    try:
        bits = ipaddress.IPv4Network(f"0.0.0.0/{netmask}").prefixlen
        # the library reads 0.0.0.255 as a host mask; a zone of 0.6 never meant one
        if ipaddress.IPv4Network(f"0.0.0.0/{bits}").netmask != ipaddress.IPv4Address(netmask):
            raise ValueError
    except ValueError:
        raise PolicyError(f"Invalid netmask; address='{address}', netmask='{netmask}'",
                          remedy="write the subnet as address/bits") from None
    return f"{address}/{bits}"


def _services(value: object) -> tuple | None:
    if value is None:
        return None
    remedy = "give a list of service names, '*' for all"
    names = arguments.items("a zone", "service list", value, remedy)
    for name in names:
        if not isinstance(name, str):
            raise arguments.invalid("a zone", "service list", name, remedy)
    return names
