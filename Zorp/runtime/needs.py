"""Which capabilities the loaded policy uses.

A policy whose services all reach their servers from an address and port that the host chooses
needs none: the listening sockets come from the master.  Anything else (forged or translated
source addresses, transparent listeners and with them data channels on foreign addresses, routers
and chainers that the site wrote itself) keeps both.
"""

from __future__ import annotations

from Zorp import Globals
from Zorp.runtime.capabilities import CAP_NET_BIND_SERVICE, CAP_NET_RAW

_PLAIN_ROUTERS = frozenset({"DirectedRouter", "InbandRouter", "TransparentRouter"})


def unused_capabilities() -> int:
    """Return the set of capabilities that this policy can do without."""
    chains = Globals.dispatch_table.chains() if Globals.dispatch_table is not None else []
    transparent = any(chain.params.transparent or chain.params.mark_tproxy for chain in chains)
    if transparent or not all(_is_plain(service) for service in Globals.services.values()):
        return 0
    return 1 << CAP_NET_RAW | 1 << CAP_NET_BIND_SERVICE


def _is_plain(service) -> bool:
    """True when the server is reached from an address that the host chooses."""
    router, chainer = getattr(service, "router", None), getattr(service, "chainer", None)
    if getattr(service, "snat_policy", None) is not None:
        return False
    known_router = type(router).__module__ == "Zorp.Router" and type(router).__name__ in _PLAIN_ROUTERS
    known_chainer = chainer is None or type(chainer).__module__ == "Zorp.Chainer"
    return known_router and known_chainer and not getattr(router, "forge_addr", True)
