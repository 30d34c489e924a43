"""Forwarded connections after a load: they go on under the new rules, or end with their rule.

Theory of operation
    The mark of a connection names the rule that let it pass, and filter FORWARD looks at nothing
    else.  After a load each entry of connection tracking with the class of forwarded connections
    is decided anew, by the original direction of its first packet (kzorp.md 9.12):

        the same service, with the same router and NAT     stays; gets the mark of the rule that
                                                           permits it now
        another service, a refusal, or no rule             deleted; what comes next is a new
                                                           connection

    Connection tracking does not remember the incoming interface or the IPsec request, and the
    addresses of host names may not be known yet.  Where rules or zones depend on these, a
    connection whose own rule is unchanged stays, and for the others such conditions count as not
    met.

    Connections of proxies are not touched: they belong to their sockets.

Each family needs a netlink socket of its own: the kernel reads addresses as the header of a
message says, not as the attributes look.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pyroute2 import NFCTSocket
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple

from Zorp.netfilter.evaluator import Evaluator
from Zorp.netfilter.plan import RuleIndex
from Zorp.netfilter.site import INDEX_BITS, Site
from Zorp.rules.description import InstanceDescription
from Zorp.rules.engine import Traffic

_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
_ICMP = (1, 58)


class Settled(NamedTuple):
    """What became of forwarded connections."""

    ended: int
    marked_anew: int


def settle(site: Site, before: Iterable[RuleIndex], after: Iterable[RuleIndex],
           descriptions: Iterable[InstanceDescription], evaluator: Evaluator) -> Settled:
    """Decide about all forwarded connections, once rules `after` have replaced `before`.

    Raises OSError and NetlinkError when connection tracking cannot be read.
    """
    marks, shift = site.marks, site.marks.connection_shift
    living = {rule.index: rule for rule in after if rule.kind == "forward"}
    known = {rule.index: rule for rule in before} | living
    by_rule = {(rule.instance, rule.rule_id): rule for rule in living.values()}
    is_certain = not any(_depends_on_the_moment(description) for description in descriptions)
    ended = marked = 0
    for tracking, original, mark in _forwarded(site):
        index = mark >> shift & ((1 << INDEX_BITS) - 1)
        if index in living and not is_certain:
            continue
        verdict = evaluator.evaluate(_traffic(original))
        rule, old = by_rule.get((verdict.instance, verdict.rule_id)), known.get(index)
        if rule is None or old is None or rule.service_key != old.service_key:
            ended += _change(tracking, "del", original)
        elif rule.index != index:
            new = mark & ~marks.connection_mask | marks.of_index(rule.index) | marks.forward
            marked += _change(tracking, "set", original, mark=new)
    return Settled(ended, marked)


def _depends_on_the_moment(description: InstanceDescription) -> bool:
    """Return whether the rules ask for what cannot be told from a connection's addresses and ports."""
    return any(zone.hostnames for zone in description.zones) or any(
        rule.iface or rule.ifgroup or rule.reqid or rule.dst_iface or rule.dst_ifgroup for rule in description.rules)


def _forwarded(site: Site) -> Iterator[tuple[NFCTSocket, NFCTAttrTuple, int]]:
    """Yield (socket of the family, original direction, mark) of the connections with the class of forwarded ones."""
    marks = site.marks
    for version in site.families:
        family = _FAMILY[version]
        with NFCTSocket(nfgen_family=family) as tracking:
            for entry in list(tracking.dump(mark=marks.forward, mark_mask=marks.class_mask)):
                mark = entry.get_attr("CTA_MARK") or 0
                if entry["nfgen_family"] == family and mark & marks.class_mask == marks.forward:
                    yield tracking, NFCTAttrTuple.from_netlink(family, entry.get_attr("CTA_TUPLE_ORIG")), mark


def _traffic(original: NFCTAttrTuple) -> Traffic:
    """Return what the rules see of a connection's first packet."""
    addresses = (int(ipaddress.ip_address(address)) for address in (original.saddr, original.daddr))
    if original.proto in _ICMP:
        return Traffic(int(original.family), *addresses, original.proto, proto_type=_number(original.icmp_type, -1),
                       proto_subtype=_number(original.icmp_code, -1))
    return Traffic(int(original.family), *addresses, original.proto, src_port=_number(original.sport, 0),
                   dst_port=_number(original.dport, 0))


def _number(value: int | None, otherwise: int) -> int:
    return otherwise if value is None else value


def _change(tracking: NFCTSocket, command: str, original: NFCTAttrTuple, **values) -> int:
    """Delete or change one entry; return 1, or 0 when it is gone already."""
    with contextlib.suppress(NetlinkError):
        tracking.entry(command, tuple_orig=original, **values)
        return 1
    return 0
