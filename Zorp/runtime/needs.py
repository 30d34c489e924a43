"""Which capabilities the loaded policy uses.

A policy whose services all reach their servers from an address and port that the host chooses
needs none: the listening sockets come from the master.  These keep both: forged or translated
source addresses and ports, packet marks (also those of kzorp), transparent listeners and with them data channels on
foreign addresses, routers and chainers that the site wrote itself, and those of the first
generation, which forge by themselves.
"""

from __future__ import annotations

import types

from Zorp import Globals
from Zorp.Constants import Z_PORT_ANY, ZD_PROTO_UDP
from Zorp.process.capabilities import CAP_NET_BIND_SERVICE, CAP_NET_RAW

_PLAIN_ROUTERS = frozenset({"DirectedRouter", "InbandRouter", "TransparentRouter"})
_PLAIN_CHAINERS = frozenset({"ConnectChainer", "MultiTargetChainer", "StateBasedChainer", "RoundRobinChainer",
                             "FailoverChainer", "SideStackChainer"})
_FIRST_FREE_PORT = 1024
_MARK_ATTRIBUTE = "server_socket_mark"


def unused_capabilities() -> int:
    """Return the set of capabilities that this policy can do without."""
    if any(_answers_from_a_low_port(chain) for chain in Globals.dispatch_table.chains()):
        return 0
    transparent = any(chain.params.transparent or chain.params.mark_tproxy for chain in Globals.dispatch_table.chains())
    if Globals.kzorp_available or transparent or not all(map(_is_plain, Globals.services.values())):
        return 0
    return 1 << CAP_NET_RAW | 1 << CAP_NET_BIND_SERVICE


def _answers_from_a_low_port(chain) -> bool:
    """True for a UDP listener below 1024: each session has a socket of its own on the listener's port."""
    return chain.protocol == ZD_PROTO_UDP and 0 < chain.key.port < _FIRST_FREE_PORT


def _is_plain(service) -> bool:
    """True when the server is reached from an address that the host chooses, and unmarked."""
    router, chainer = getattr(service, "router", None), getattr(service, "chainer", None)
    return (getattr(service, "snat_policy", None) is None
            and _is_ours(router, "Zorp.Router", _PLAIN_ROUTERS)
            and (chainer is None or _is_ours(chainer, "Zorp.Chainer", _PLAIN_CHAINERS))
            and not getattr(chainer, "forge_addr", False) and getattr(chainer, "local", None) is None
            and not getattr(router, "forge_addr", True)
            and getattr(router, "forge_port", None) in (None, Z_PORT_ANY)
            and not _mentions_marks(getattr(service, "proxy_class", None)))


def _is_ours(thing, module: str, names: frozenset[str]) -> bool:
    """True for an object of exactly one of these classes, not of a class that derives from it."""
    kind = type(thing)
    return kind.__module__.startswith(module) and kind.__name__ in names


def _mentions_marks(proxy_class) -> bool:
    """True when the site's proxy class sets packet marks, as far as its code shows."""
    functions = (value for kind in getattr(proxy_class, "__mro__", ()) if not kind.__module__.startswith("Zorp.")
                 for value in vars(kind).values() if isinstance(value, types.FunctionType))
    return any(_MARK_ATTRIBUTE in function.__code__.co_names for function in functions)
