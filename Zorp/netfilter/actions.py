"""What happens to packets once their rule is known: diversion, forwarding with NAT, refusal.

Theory of operation
    In table mangle the chain ZORP_R<index> writes the rule's index and class into the mark of
    the connection; packets of proxies go on in the chain ZORP_I<number> of their instance, which
    diverts them to its listeners and ends with a drop.  The tables nat and filter read the
    connection mark:

        nat PREROUTING     DNAT, by the service's list or its router
        nat POSTROUTING    SNAT by list, else the host's address, else (forge_addr) nothing
        filter FORWARD     forwarded connections pass, refused ones are answered, others end here
        filter INPUT       diverted packets pass, refused ones are answered

    Our nat chains accept at their end, so that NAT rules of the site leave connections of ours
    alone.

    The tables cannot be exchanged in the same moment, so nat may meet an index that the mangle
    table of a moment ago gave away, or of a moment later.  What to translate such a connection
    to is not known: it is not forwarded, and its client's next attempt is a new connection; if
    it came by the destination's NAT already, its source is hidden.

    NAT is asked about the first packet of a connection only.  One that was let in as something
    else, to a proxy that has not answered or to this host, and that a rule forwards now, would
    pass untranslated: it is marked undecided (ZORP_LATE) and not forwarded, until it is taken out
    of connection tracking and begins anew (Zorp.netfilter.sessions).

    Connection tracking takes up TCP connections in the middle (nf_conntrack_tcp_loose): to it, the
    next packet of one that it does not know, or that was ended with its rule, is the first of a new
    one, whichever side sends it, and a rule for the other direction might take it.  A forwarded
    connection therefore begins with a SYN; any other packet is too late as well (ZORP_LATE).

    NAT lists mean what they mean to proxies (Zorp.NAT): host bits are kept, a destination is
    the one before any translation, and the port of a DirectedRouter counts with a list, too.

    Many rules are told apart by the bits of their index, so that finding one among n takes
    about log2(n) questions.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping

from Zorp.netfilter.plan import Chain, Rule, RuleIndex, Target, Test
from Zorp.netfilter.site import INDEX_BITS, Marks, Site
from Zorp.netfilter.zonesets import family_of
from Zorp.rules.description import DenyData, ForwardData, ListenerData, NatData
from Zorp.rules.engine import NetData

TCP, UDP, DCCP, SCTP = 6, 17, 33, 132
_WITH_PORTS = (TCP, UDP, DCCP, SCTP)
_LINEAR = 6                      # as many rules are found by asking for one after the other
_WIDTH = {4: 32, 6: 128}

FORWARD_CHAIN = "ZORP_FORWARD"
LOG_PREFIX = "zorp:"
NO_RULE = 0                      # indexes of rules begin at 1

ACCEPT, DROP, RETURN, MASQUERADE = (Target(what) for what in ("accept", "drop", "return", "masquerade"))

_REJECT = {
    4: {"ICMP_NET_UNREACHABLE": "icmp-net-unreachable", "ICMP_HOST_UNREACHABLE": "icmp-host-unreachable",
        "ICMP_PROTO_UNREACHABLE": "icmp-proto-unreachable", "ICMP_PORT_UNREACHABLE": "icmp-port-unreachable",
        "ICMP_NET_PROHIBITED": "icmp-net-prohibited", "ICMP_HOST_PROHIBITED": "icmp-host-prohibited",
        "ICMP_ADMIN_PROHIBITED": "icmp-admin-prohibited"},
    6: {"ICMP_NO_ROUTE": "icmp6-no-route", "ICMP_ADMIN_PROHIBITED": "icmp6-adm-prohibited",
        "ICMP_ADDR_UNREACHABLE": "icmp6-addr-unreachable", "ICMP_PORT_UNREACHABLE": "icmp6-port-unreachable"},
}


def goto(chain: str) -> Target:
    """Return the target that goes on in a chain and does not come back."""
    return Target("goto", (chain,))


def jump(chain: str) -> Target:
    """Return the target that calls a chain."""
    return Target("jump", (chain,))


def undecided(marks: Marks) -> Target:
    """Return the target for connections that belong to no rule and must not be forwarded."""
    return Target("connmark", (marks.undecided, marks.connection_mask))


class Actions:
    """The actions of one family.

    rules: every rule of the plan with its service.  listeners: (instance name, TCP or UDP) to its
    listener of this family; what an instance has no listener for is dropped.
    """

    def __init__(self, family: int, site: Site, rules: Iterable[tuple[RuleIndex, object]],
                 listeners: Mapping[tuple[str, int], ListenerData]) -> None:
        self._family, self._site, self._marks = family, site, site.marks
        self._rules = tuple(rules)
        self._listeners = listeners
        self._services: dict[object, int] = {}           # service -> number in chain names
        for rule, service in self._rules:
            self._services.setdefault((rule.instance, service), len(self._services) + 1)

    def _connmark(self, value: int, mask: int) -> Test:
        return Test("connmark", (value, mask))

    def _mark_of(self, rule: RuleIndex) -> int:
        classes = {"forward": self._marks.forward, "deny": self._marks.deny, "proxy": 0}
        return self._marks.of_index(rule.index) | classes[rule.kind]

    # ---- mangle

    def mangle(self) -> list[Chain]:
        """Return the chains ZORP_R<index>, and of each instance the one that diverts."""
        diverting: dict[str, str] = {}
        for rule, _ in self._rules:
            if rule.kind == "proxy":
                diverting.setdefault(rule.instance, f"ZORP_I{len(diverting) + 1}")
        chains = [Chain(f"ZORP_R{rule.index}", (
            *([Rule((Test("known"),), goto("ZORP_LATE")),
               Rule((Test("proto", TCP), Test("syn", negated=True)), goto("ZORP_LATE"))]
              if rule.kind == "forward" else []),
            Rule((), Target("connmark", (self._mark_of(rule), self._marks.connection_mask))),
            *([Rule((), goto(diverting[rule.instance]))] if rule.kind == "proxy" else []),
            *([Rule((), DROP)] if self._is_out_of_reach(service) else []))) for rule, service in self._rules]
        chains += [Chain(name, tuple(self._diversion(instance))) for instance, name in diverting.items()]
        if any(rule.kind == "forward" for rule, _ in self._rules):
            chains.append(Chain("ZORP_LATE", (Rule((), undecided(self._marks)),)))
        return chains

    def closed(self, name: str) -> Chain:
        """Return the chain for packets that must not pass and that no rule refuses."""
        return Chain(name, (*([self._logged(NO_RULE)] if self._site.log_unmatched else []), Rule((), DROP)))

    def _diversion(self, instance: str) -> list[Rule]:
        marks = self._marks.divert, self._marks.divert
        listeners = ((protocol, self._listeners.get((instance, protocol))) for protocol in (TCP, UDP))
        return [*(Rule((Test("proto", protocol),), Target("tproxy", (listener.address, listener.port, *marks)))
                  for protocol, listener in listeners if listener is not None), Rule((), DROP)]

    def _is_out_of_reach(self, service: object) -> bool:
        """Return whether a service leads to an address of the other family."""
        return isinstance(service, ForwardData) and service.router is not None and not self._is_own(service.router[0])

    def _is_own(self, address: str) -> bool:
        return ipaddress.ip_address(address).version == self._family

    # ---- nat

    def nat_prerouting(self) -> list[Chain]:
        """Return the chains that translate destinations, ZORP_PREROUTING first."""
        marks = self._marks
        return self._nat("ZORP_PREROUTING", "ZORP_D", self._destination_rules,
                         first=[Rule((Test("mark", (marks.divert, marks.divert)),), ACCEPT)],
                         unknown=undecided(marks))

    def nat_postrouting(self) -> list[Chain]:
        """Return the chains that translate sources, ZORP_POSTROUTING first."""
        return self._nat("ZORP_POSTROUTING", "ZORP_S", self._source_rules, first=[], unknown=MASQUERADE)

    def _nat(self, name: str, prefix: str, rules_of, *, first: list[Rule], unknown: Target) -> list[Chain]:
        chains: dict[str, Chain] = {}
        targets: dict[int, str] = {}
        for rule, service in self._rules:
            if isinstance(service, ForwardData):
                rules = rules_of(service)
                chain = f"{prefix}{self._services[rule.instance, service]}" if rules else f"{prefix}0"
                chains[chain] = Chain(chain, (*rules, Rule((), ACCEPT)))
                targets[rule.index] = chain
        forwarded = Test("connmark", (self._marks.forward, self._marks.class_mask), negated=True)
        heads = mark_dispatch(name, targets, self._marks, self._marks.forward,
                              before=[*first, Rule((forwarded,), RETURN)], after=[Rule((), unknown)])
        return [*heads, *chains.values()]

    def _entries(self, entries: tuple[NatData, ...]) -> list[NatData]:
        return [entry for entry in entries if family_of(entry.source) == self._family]

    def _destination_rules(self, service: ForwardData) -> list[Rule]:
        if service.router is None:
            return [Rule((*_net("src", entry.source), *_net("dst", entry.destination)),
                         self._move("dnat", entry.destination, entry.translated))
                    for entry in self._entries(service.dnat)]
        address, port = service.router
        if not self._is_own(address):
            return []
        rules: list[Rule] = []
        number = int(ipaddress.ip_address(address))
        for entry in self._entries(service.dnat):
            if _holds(entry.destination, number):
                moved = str(_moved(number, entry.destination, entry.translated))
                rules += self._to_server(_net("src", entry.source), moved, port)
        return rules + self._to_server((), address, port)

    @staticmethod
    def _to_server(tests: tuple[Test, ...], address: str, port: int) -> list[Rule]:
        """Return DNAT to an address; the port only for protocols that have ports."""
        with_ports = [Rule((Test("proto", number), *tests), Target("dnat", (address, port)))
                      for number in _WITH_PORTS] if port else []
        return [*with_ports, Rule(tests, Target("dnat", (address, 0)))]

    def _source_rules(self, service: ForwardData) -> list[Rule]:
        rules = []
        for entry in self._entries(service.snat):
            tests = _net("src", entry.source)
            if service.router is None:
                tests += _net("origdst", entry.destination)
            elif not _holds(entry.destination, int(ipaddress.ip_address(service.router[0]))):
                continue
            rules.append(Rule(tests, self._move("snat", entry.source, entry.translated)))
        if not service.forge_addr:
            rules.append(Rule((), MASQUERADE))
        return rules

    def _move(self, what: str, replaced: NetData, translated: NetData) -> Target:
        """Return the translation that puts the host bits of one net into another."""
        bits = max(replaced.bits, translated.bits)
        if bits == _WIDTH[self._family]:
            return Target(what, (str(ipaddress.ip_network(str(translated)).network_address), 0))
        return Target("netmap", (str(NetData(translated.family, translated.network, bits)),))

    # ---- filter

    def filter_input(self) -> list[Chain]:
        """Return the chain for packets to this host."""
        marks = self._marks
        return [Chain("ZORP_INPUT", (
            Rule((Test("mark", (marks.divert, marks.divert)),), ACCEPT),
            Rule((self._connmark(marks.deny, marks.class_mask),), goto("ZORP_DENY"))))]

    def filter_forward(self) -> list[Chain]:
        """Return the chains for packets that pass through, and those of refusals."""
        marks = self._marks
        rules = [
            Rule((self._connmark(marks.forward, marks.class_mask), Test("state", "INVALID", negated=True)), ACCEPT),
            Rule((self._connmark(marks.deny, marks.class_mask),), goto("ZORP_DENY")),
        ]
        if self._site.default_deny:
            rules.append(Rule((self._connmark(marks.bypass, marks.class_mask),), RETURN))
            if self._site.log_unmatched:
                rules.append(self._logged(NO_RULE))
            rules.append(Rule((), DROP))
        else:
            rules.append(Rule((self._connmark(marks.undecided, marks.connection_mask),), DROP))
        return [Chain(FORWARD_CHAIN, tuple(rules)), *self._refusals()]

    def _logged(self, index: int) -> Rule:
        """Return the rule that hands a packet to the log; the prefix has the index of the policy's rule."""
        return Rule((), Target("nflog", (self._site.nflog_group, f"{LOG_PREFIX}{index}")))

    def _refusals(self) -> list[Chain]:
        targets = {rule.index: f"ZORP_N{rule.index}" for rule, _ in self._rules if rule.kind == "deny"}
        chains = mark_dispatch("ZORP_DENY", targets, self._marks, self._marks.deny, before=[],
                               after=[Rule((), DROP)])
        for rule, service in self._rules:
            if isinstance(service, DenyData):
                chains.append(Chain(targets[rule.index], tuple(self._refusal(rule, service))))
        return chains

    def _refusal(self, rule: RuleIndex, service: DenyData) -> list[Rule]:
        rules = []
        if service.logging:
            rules.append(self._logged(rule.index))
        setting = service.ipv4 if self._family == 4 else service.ipv6
        if setting == "TCP_RESET":
            rules.append(Rule((Test("proto", TCP),), Target("reject", ("tcp-reset",))))
        elif setting != "DROP":
            rules.append(Rule((), Target("reject", (_REJECT[self._family][setting],))))
        return [*rules, Rule((), DROP)]


def mark_dispatch(name: str, targets: Mapping[int, str], marks: Marks, class_: int, *, before: list[Rule],
                  after: list[Rule]) -> list[Chain]:
    """Return chains that lead from the index in the connection mark to a chain; `name` is the first.

    before, after: rules of the first chain around the branches; what no target takes comes to `after`.
    """
    chains: list[Chain] = []

    def branches(indexes: list[int], known_bits: int) -> list[Rule]:
        if len(indexes) <= _LINEAR:
            return [Rule((Test("connmark", (marks.of_index(index) | class_, marks.connection_mask)),),
                         goto(targets[index])) for index in indexes]
        bit = 1 << _best_bit(indexes, known_bits)
        rules = []
        for value in (0, bit):
            chain = f"{name}_{len(chains) + 1}"
            at = len(chains)
            chains.append(Chain(chain, ()))
            below = branches([index for index in indexes if index & bit == value], known_bits | bit)
            chains[at] = Chain(chain, tuple(below))
            # called, not gone to: an index that is nobody's comes back
            rules.append(Rule((Test("connmark", (marks.of_index(value), marks.of_index(bit))),), jump(chain)))
        return rules

    rules = branches(sorted(targets), 0)
    return [Chain(name, (*before, *rules, *after)), *chains]


def _best_bit(indexes: list[int], known_bits: int) -> int:
    """Return the bit that divides these indexes most evenly."""
    def unevenness(bit: int) -> int:
        return abs(2 * sum(index >> bit & 1 for index in indexes) - len(indexes))
    return min((bit for bit in range(INDEX_BITS) if not known_bits >> bit & 1), key=unevenness)


def _net(what: str, net: NetData) -> tuple[Test, ...]:
    return (Test(what, str(net)),) if net.bits else ()


def _holds(net: NetData, address: int) -> bool:
    shift = _WIDTH[family_of(net)] - net.bits
    return address >> shift == net.network >> shift


def _moved(address: int, replaced: NetData, translated: NetData) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    width = _WIDTH[family_of(translated)]
    bits = max(replaced.bits, translated.bits)
    number = translated.network | (address & ((1 << (width - bits)) - 1))
    return ipaddress.IPv4Address(number) if width == 32 else ipaddress.IPv6Address(number)
