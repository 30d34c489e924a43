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
    addresses of host names may not be known yet.  Such conditions count as not met, but a
    connection whose own rule is unchanged and has such conditions stays if that rule could win
    under any circumstances that meet them.

    Connections that kzorp.yml hid from the rules (bypass) and hides no longer are decided about,
    too: where a rule takes what comes next, the entry goes; else it loses its mark, which ends
    it if it is forwarded, and only then (default_deny).

    Connections of proxies are not touched: they belong to their sockets.

Each family needs a netlink socket of its own: the kernel reads addresses as the header of a
message says, not as the attributes look.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import socket
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pyroute2 import NFCTSocket
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple

from Zorp.netfilter.evaluator import Evaluator, Verdict
from Zorp.netfilter.plan import RuleIndex
from Zorp.netfilter.site import INDEX_BITS, Bypass, Site
from Zorp.rules.description import InstanceDescription
from Zorp.rules.engine import Traffic

_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
_ICMP = (1, 58)
_MOST_CIRCUMSTANCES = 4096       # that are looked at for one connection


class Settled(NamedTuple):
    """What became of forwarded connections."""

    ended: int
    marked_anew: int


def settle(site: Site, before: Iterable[RuleIndex], after: Iterable[RuleIndex],
           descriptions: Iterable[InstanceDescription], evaluator: Evaluator) -> Settled:
    """Decide about all connections that are forwarded or hidden, once rules `after` have replaced `before`.

    Raises OSError and NetlinkError when connection tracking cannot be read.
    """
    marks, shift = site.marks, site.marks.connection_shift
    living = {rule.index: rule for rule in after if rule.kind == "forward"}
    known = {rule.index: rule for rule in before} | living
    by_rule = {(rule.instance, rule.rule_id): rule for rule in living.values()}
    circumstances = _Circumstances(descriptions)
    ended = marked = 0
    for tracking, original, mark in _entries(site):
        traffic = _traffic(original)
        verdict = evaluator.evaluate(traffic)
        if mark & marks.class_mask == marks.bypass:
            if not any(_hides(entry, traffic) for entry in site.bypass):
                if verdict.rule_id is None:
                    _change(tracking, "set", original, mark=mark & ~marks.connection_mask)
                else:
                    _change(tracking, "del", original)
                ended += 1
            continue
        index = mark >> shift & ((1 << INDEX_BITS) - 1)
        rule, old = by_rule.get((verdict.instance, verdict.rule_id)), known.get(index)
        if (rule is None or rule.index != index) and index in living and any(
                (found.instance, found.rule_id) == (living[index].instance, living[index].rule_id)
                for found in circumstances.verdicts(evaluator, traffic, living[index])):
            continue
        if rule is None or old is None or rule.service_key != old.service_key:
            ended += _change(tracking, "del", original)
        elif rule.index != index:
            new = mark & ~marks.connection_mask | marks.of_index(rule.index) | marks.forward
            marked += _change(tracking, "set", original, mark=new)
    return Settled(ended, marked)


class _Circumstances:
    """What a rule may have been told about a connection that cannot be told from its addresses and ports."""

    def __init__(self, descriptions: Iterable[InstanceDescription]) -> None:
        self._descriptions = {description.instance: description for description in descriptions}

    def verdicts(self, evaluator: Evaluator, traffic: Traffic, index: RuleIndex) -> Iterator[Verdict]:
        """Yield the verdicts about a connection under all circumstances that meet conditions of its rule."""
        description = self._descriptions[index.instance]
        rule = next(rule for rule in description.rules if rule.rule_id == index.rule_id)
        choices = itertools.product(
            (None, *rule.iface, *rule.dst_iface), (None, *rule.ifgroup, *rule.dst_ifgroup), (None, *rule.reqid),
            (False, True) if rule.dst_iface or rule.dst_ifgroup else (False,),
            (None, *_named(description, rule.src_zone)), (None, *_named(description, rule.dst_zone)))
        for iface, group, reqid, is_local, *zones in itertools.islice(choices, 1, _MOST_CIRCUMSTANCES):
            supposed = traffic._replace(iface=iface, ifgroup=group, reqids=() if reqid is None else (reqid,),
                                        dst_on_iface=is_local)
            yield evaluator.evaluate(supposed, {index.instance: tuple(zones)})


def _named(description: InstanceDescription, zones: Iterable[str]) -> list[str]:
    """Return the zones with host names that are among these zones or below them."""
    wanted, parents = set(zones), description.parents()
    found = []
    for zone in description.zones if wanted else ():
        above: str | None = zone.name
        while zone.hostnames and above is not None and above not in wanted:
            above = parents.get(above)
        if zone.hostnames and above is not None:
            found.append(zone.name)
    return found


def _hides(entry: Bypass, traffic: Traffic) -> bool:
    """Return whether an entry of the site hides a connection, whatever interface it came by."""
    return (entry.proto in (None, traffic.proto)
            and (entry.dst_port is None or entry.dst_port[0] <= traffic.dst_port <= entry.dst_port[1])
            and _within(traffic.family, traffic.src, entry.src) and _within(traffic.family, traffic.dst, entry.dst))


def _within(family: int, address: int, net: str) -> bool:
    if not net:
        return True
    held = ipaddress.ip_network(net, strict=False)
    return (held.version == 4) == (family == socket.AF_INET) and (
        int(held.network_address) <= address <= int(held.broadcast_address))


def _entries(site: Site) -> Iterator[tuple[NFCTSocket, NFCTAttrTuple, int]]:
    """Yield (socket of the family, original direction, mark) of the connections that are forwarded or hidden."""
    marks = site.marks
    for version in site.families:
        family = _FAMILY[version]
        with NFCTSocket(nfgen_family=family) as tracking:
            for entry in list(tracking.dump(mark=marks.forward, mark_mask=marks.forward)):
                mark = entry.get_attr("CTA_MARK") or 0
                if entry["nfgen_family"] == family and mark & marks.class_mask in (marks.forward, marks.bypass):
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
