"""Forwarded connections whose rule is gone: they end with it.

The mark of a connection names the rule that let it pass.  After a load, entries of connection
tracking with the class of forwarded connections and an index that no forwarding rule has any
more are deleted; the connection's next packet meets the rules as a new one.  Connections of
proxies are not touched: they belong to their sockets.
"""

from __future__ import annotations

import contextlib
import socket

from pyroute2 import NFCTSocket
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple

from Zorp.netfilter.plan import Plan
from Zorp.netfilter.site import INDEX_BITS, Site

_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}


def end_without_rule(plan: Plan, site: Site) -> int:
    """Delete the connections of forwarding rules that the plan no longer has; return how many there were."""
    marks = site.marks
    index_mask = ((1 << INDEX_BITS) - 1) << marks.connection_shift
    living = {marks.of_index(rule.index) for rule in plan.indexes if rule.kind == "forward"}
    ended = 0
    with NFCTSocket() as tracking:
        for family in site.families:
            entries = tracking.dump(mark=marks.forward, mark_mask=marks.class_mask, tuple_orig=NFCTAttrTuple(
                family=_FAMILY[family]))
            for entry in list(entries):
                mark = entry.get_attr("CTA_MARK") or 0
                if mark & marks.class_mask == marks.forward and mark & index_mask not in living:
                    ended += _delete(tracking, entry, _FAMILY[family])
    return ended


def _delete(tracking: NFCTSocket, entry, family: int) -> int:
    """Delete one entry; return 1, or 0 when it is gone already."""
    original = NFCTAttrTuple.from_netlink(family, entry.get_attr("CTA_TUPLE_ORIG"))
    with contextlib.suppress(NetlinkError):
        tracking.entry("del", tuple_orig=original)
        return 1
    return 0
