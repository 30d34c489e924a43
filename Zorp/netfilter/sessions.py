"""Forwarded connections after a load: they go on under the new rules, or end with their rule.

Theory of operation
    The mark of a connection names the rule that let it pass, and filter FORWARD looks at nothing
    else.  After a load each entry of connection tracking with the class of forwarded connections
    is decided anew, by the original direction of its first packet (kzorp.md 9.12):

        the same service, with the same router and NAT     stays; gets the mark of the rule that
                                                           permits it now
        another service, a refusal, or no rule             deleted; what comes next is a new
                                                           connection, which in TCP only a SYN
                                                           can begin (Zorp.netfilter.actions)

    Connection tracking does not remember the incoming interface or the IPsec request, and the
    addresses of host names may not be known yet.  Such conditions count as not met, but a
    connection whose own rule is unchanged and has such conditions stays if that rule could win
    under any circumstances that meet them.

    Connections that kzorp.yml hid from the rules (bypass) and hides no longer are decided about,
    too: where a rule takes what comes next, the entry goes; else it loses its mark, which ends
    it if it is forwarded, and only then (default_deny).

    Connections of proxies are not touched: they belong to their sockets.  Only what a proxy, or
    whoever was to get it, has not answered begins anew when a rule forwards it now, because NAT
    is asked about the first packet of a connection: attempts to connect at once, and whatever was
    found to be too late for its NAT (undecided) when such connections are looked for.  kzorpd
    does that every minute, so that a sender of datagrams who never pauses is heard again.

    What the kernel refuses to end or to mark (it does for flows that the site lets network cards
    or a flowtable carry) is an error, once everything else has been decided about.

Each family needs a netlink socket of its own: the kernel reads addresses as the header of a
message says, not as the attributes look.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import itertools
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
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
_TCP, _UDP = 6, 17
_IS_ANSWERED = 2                 # IPS_SEEN_REPLY
_MOST_CIRCUMSTANCES = 4096       # that are looked at for one connection


class Settled(NamedTuple):
    """What became of forwarded connections."""

    ended: int
    marked_anew: int


def settle(site: Site, before: Iterable[RuleIndex], after: Iterable[RuleIndex],
           descriptions: Iterable[InstanceDescription], evaluator: Evaluator) -> Settled:
    """Decide about all connections that are forwarded or hidden, once rules `after` have replaced `before`.

    Raises OSError and NetlinkError when connection tracking cannot be read, or refuses a change.
    """
    marks, shift = site.marks, site.marks.connection_shift
    living = {rule.index: rule for rule in after if rule.kind == "forward"}
    known = {rule.index: rule for rule in before} | living
    by_rule = {(rule.instance, rule.rule_id): rule for rule in living.values()}
    circumstances = _Circumstances(descriptions)
    in_force = {rule.index for rule in after}
    ended = marked = 0
    with _changes() as change:
        for entry in _late(site):
            change(entry, "del")
        for entry in _unanswered(site):
            index = entry.mark >> shift & ((1 << INDEX_BITS) - 1)
            verdict = evaluator.evaluate(_traffic(entry.original))
            if index not in in_force or (verdict.instance, verdict.rule_id) in by_rule:
                change(entry, "del")
        for entry in _forwarded_or_hidden(site):
            traffic, mark = _traffic(entry.original), entry.mark
            verdict = evaluator.evaluate(traffic)
            if mark & marks.class_mask == marks.bypass:
                if not any(_hides(hidden, traffic) for hidden in site.bypass):
                    ended += (change(entry, "set", mark=mark & ~marks.connection_mask) if verdict.rule_id is None
                              else change(entry, "del"))
                continue
            index = mark >> shift & ((1 << INDEX_BITS) - 1)
            rule, old = by_rule.get((verdict.instance, verdict.rule_id)), known.get(index)
            if (rule is None or rule.index != index) and index in living and any(
                    (found.instance, found.rule_id) == (living[index].instance, living[index].rule_id)
                    for found in circumstances.verdicts(evaluator, traffic, living[index])):
                continue
            if rule is None or old is None or rule.service_key != old.service_key:
                ended += change(entry, "del")
            elif rule.index != index:
                marked += change(entry, "set", mark=mark & ~marks.connection_mask | marks.of_index(rule.index)
                                 | marks.forward)
    return Settled(ended, marked)


def begin_anew(site: Site) -> None:
    """Take connections out of connection tracking that came to a forwarding rule too late.

    Raises OSError and NetlinkError when connection tracking cannot be read, or refuses a change.
    """
    with _changes() as change:
        for entry in _late(site):
            change(entry, "del")


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


class _Entry(NamedTuple):
    """An entry of connection tracking."""

    tracking: NFCTSocket             # of its family
    original: NFCTAttrTuple          # of its first packet
    mark: int
    zone: int | None                 # of connection tracking, which rules of the site may cut into several


def _late(site: Site) -> Iterator[_Entry]:
    marks = site.marks
    return _entries(site, lambda mark: mark & marks.connection_mask == marks.undecided,
                    mark=marks.undecided, mark_mask=marks.connection_mask)


def _forwarded_or_hidden(site: Site) -> Iterator[_Entry]:
    marks = site.marks
    return _entries(site, lambda mark: mark & marks.class_mask in (marks.forward, marks.bypass),
                    mark=marks.forward, mark_mask=marks.forward)


def _unanswered(site: Site) -> Iterator[_Entry]:
    """Yield the attempts to connect that are a proxy's.

    Not its datagrams: the socket of their session goes on without a word, and what it sends would
    begin a connection of its own if there were no entry.
    """
    marks = site.marks
    for entry in _entries(site, lambda mark: mark & marks.connection_mask and not mark & marks.class_mask,
                          status=0, status_mask=_IS_ANSWERED):
        if entry.original.proto == _TCP:
            yield entry


def _entries(site: Site, is_wanted: Callable[[int], object], **pattern: int) -> Iterator[_Entry]:
    """Yield the entries of connection tracking whose mark is wanted; the kernel is asked for a pattern."""
    for version in site.families:
        family = _FAMILY[version]
        with NFCTSocket(nfgen_family=family) as tracking:
            for entry in list(tracking.dump(**pattern)):
                mark = entry.get_attr("CTA_MARK") or 0
                if entry["nfgen_family"] == family and is_wanted(mark) and _has_status(entry, pattern):
                    yield _Entry(tracking, _original(family, entry), mark, entry.get_attr("CTA_ZONE"))


def _original(family: int, entry) -> NFCTAttrTuple:
    """Return the original direction, with what stands in the place of ports in SCTP, DCCP, UDP-Lite and GRE, too.

    The library leaves that out, and the kernel refuses to change an entry without it.
    """
    told = entry.get_attr("CTA_TUPLE_ORIG")
    original = NFCTAttrTuple.from_netlink(family, told)
    if original.proto not in _ICMP:
        protocol = told.get_attr("CTA_TUPLE_PROTO")
        original.sport, original.dport = (protocol.get_attr(f"CTA_PROTO_{side}_PORT") for side in ("SRC", "DST"))
    return original


def _has_status(entry, pattern: Mapping[str, int]) -> bool:
    """Return whether an entry fits; kernels before 5.15 do not look at it."""
    return (entry.get_attr("CTA_STATUS") or 0) & pattern.get("status_mask", 0) == pattern.get("status", 0)


def _traffic(original: NFCTAttrTuple) -> Traffic:
    """Return what the rules see of a connection's first packet."""
    addresses = (int(ipaddress.ip_address(address)) for address in (original.saddr, original.daddr))
    if original.proto in _ICMP:
        return Traffic(int(original.family), *addresses, original.proto, proto_type=_number(original.icmp_type, -1),
                       proto_subtype=_number(original.icmp_code, -1))
    if original.proto not in (_TCP, _UDP):
        return Traffic(int(original.family), *addresses, original.proto)
    return Traffic(int(original.family), *addresses, original.proto, src_port=_number(original.sport, 0),
                   dst_port=_number(original.dport, 0))


def _number(value: int | None, otherwise: int) -> int:
    return otherwise if value is None else value


@contextlib.contextmanager
def _changes() -> Iterator[Callable[..., int]]:
    """Give a function that deletes or changes an entry: (entry, "del" or "set", values) to 1, or 0: it is gone already.

    What the kernel refuses keeps nothing else from being changed; the first refusal is raised in the end.
    """
    refusals: list[NetlinkError] = []

    def change(entry: _Entry, command: str, **values: int) -> int:
        zone = {} if entry.zone is None else {"zone": entry.zone}
        try:
            entry.tracking.entry(command, tuple_orig=entry.original, **zone, **values)
        except NetlinkError as problem:
            if problem.code != errno.ENOENT:
                refusals.append(problem)
            return 0
        return 1

    yield change
    if refusals:
        raise refusals[0]
