"""What a packet filter does with the plan: an interpreter of its first table, for comparisons.

Model(plan).rule_of(traffic) -> (RuleIndex | None | CLOSED, number of rules that were tested on the way).
Model(plan).is_late(rule, traffic, begins=...) -> whether a rule's chain refuses a packet as too late to begin.
"""

from __future__ import annotations

import ipaddress
import socket

from Zorp.netfilter.plan import Plan
from Zorp.rules.engine import Traffic

_BITS = {4: 32, 6: 128}
CLOSED = -1                      # dropped before any rule


def _number(net):
    network = ipaddress.ip_network(net)
    return int(network.network_address), network.prefixlen


class Model:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.rules = {rule.index: rule for rule in plan.indexes}
        self.chains = {(table.family, chain.name): chain for table in plan.tables if table.name == "mangle"
                       for chain in table.chains}
        self.sets = {}
        for members in plan.sets:
            nets = {_number(member.net): member.nomatch for member in members.members}
            lengths = sorted({bits for _, bits in nets}, reverse=True)
            self.sets[members.name] = members.family, nets, lengths

    def rule_of(self, traffic: Traffic):
        """Return the rule that the chains of evaluation lead to, and the number of packet rules tested."""
        family = 4 if traffic.family == socket.AF_INET else 6
        self.tested = self.index = 0
        self._walk(family, "ZORP_EVAL", traffic)
        return (CLOSED if self.index == CLOSED else self.rules[self.index] if self.index else None), self.tested

    def is_late(self, rule, traffic, *, begins):
        """Return whether the chain of a rule leaves a packet undecided; begins: if it is TCP, it is a SYN."""
        family = 4 if traffic.family == socket.AF_INET else 6
        self.index, self.begins = 0, begins
        return self._chain(family, self.chains[family, f"ZORP_R{rule.index}"], traffic) == "ZORP_LATE"

    def _walk(self, family, name, traffic):
        """Go through a chain and those it goes to, until they return."""
        while name:
            if name.startswith("ZORP_R") and name[6:].isdigit():
                self.index = int(name[6:])
                return
            if name == "ZORP_CLOSED":
                assert self.chains[family, name].rules[-1].target.what == "drop"
                self.index = CLOSED
                return
            name = self._chain(family, self.chains[family, name], traffic)

    def _chain(self, family, chain, traffic):
        """Return the chain to go on in; None: the end."""
        for rule in chain.rules:
            self.tested += 1
            if all(self._holds(family, test, traffic) for test in rule.tests):
                if rule.target.what == "goto":
                    return rule.target.values[0]
                if rule.target.what == "return":
                    return None
                if rule.target.what == "drop":
                    self.index = CLOSED
                    return None
                if rule.target.what == "jump":
                    self._walk(family, rule.target.values[0], traffic)
                elif rule.target.what == "tproxy":
                    return None
                else:
                    assert rule.target.what == "connmark", rule
        return None

    def _holds(self, family, test, traffic):
        return getattr(self, "_is_" + test.what.replace("-", "_"))(family, test.value, traffic) != test.negated

    def _is_state(self, family, value, traffic):
        return value == "NEW"

    def _is_direction(self, family, value, traffic):
        return value == "ORIGINAL"

    def _is_known(self, family, value, traffic):
        return False

    def _is_syn(self, family, value, traffic):
        assert traffic.proto == 6
        return self.begins

    def _is_connmark(self, family, value, traffic):
        return value[0] == self.index == 0               # no class but while nothing is decided

    def _is_proto(self, family, value, traffic):
        return traffic.proto == value

    def _is_iface(self, family, value, traffic):
        return traffic.iface == value

    def _is_ifgroup(self, family, value, traffic):
        return traffic.ifgroup == value

    def _is_reqid(self, family, value, traffic):
        return value in traffic.reqids

    def _is_local(self, family, value, traffic):
        return traffic.dst_on_iface

    def _is_sport(self, family, value, traffic):
        return traffic.proto in (6, 17) and value[0] <= traffic.src_port <= value[1]

    def _is_dport(self, family, value, traffic):
        return traffic.proto in (6, 17) and value[0] <= traffic.dst_port <= value[1]

    def _is_icmp(self, family, value, traffic):
        return traffic.proto == {4: 1, 6: 58}[family] and value[0] == traffic.proto_type and \
            value[1] in (None, traffic.proto_subtype)

    def _in_net(self, family, net, address):
        network, bits = _number(net)
        shift = _BITS[family] - bits
        return address >> shift == network >> shift

    def _is_src(self, family, value, traffic):
        return self._in_net(family, value, traffic.src)

    def _is_dst(self, family, value, traffic):
        return self._in_net(family, value, traffic.dst)

    def _in_set(self, family, name, address):
        set_family, nets, lengths = self.sets[name]
        assert set_family == family, name
        for bits in lengths:
            shift = _BITS[family] - bits
            found = nets.get((address >> shift << shift, bits))
            if found is not None:
                return not found
        return False

    def _is_set_src(self, family, value, traffic):
        return self._in_set(family, value, traffic.src)

    def _is_set_dst(self, family, value, traffic):
        return self._in_set(family, value, traffic.dst)
