"""Whether this kernel can do what a plan needs: tried out where it changes nothing.

Theory of operation
    missing() takes from a plan one rule for every kind of test and target in it and gives them to
    a child (main), which moves into a network namespace of its own, makes a set and loads the
    rules there.  The namespace ends with the child: the packet rules of this host are neither read
    nor written.  Nothing is asked of /proc: what is listed there tells neither what can be loaded
    on demand nor what nft-based iptables can pass on.

    Needs CAP_SYS_ADMIN, as user 0 has; without it ProbesImpossible is raised.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

from Zorp.netfilter import children
from Zorp.netfilter.ipsets import SetError, Sets
from Zorp.netfilter.plan import SET_PREFIX, AddressSet, Chain, Plan, Rule, Table, Target
from Zorp.netfilter.render import text_of
from Zorp.netfilter.tables import TableError, run

_CLONE_NEWNET = 0x40000000
_DEADLINE_S = 60
_CHILD = "Zorp.netfilter.probes"
_CHAIN = "ZORP_PROBE"
_COMMAND = {4: "iptables", 6: "ip6tables"}
SETS = "sets"
_MODULES = {
    SETS: "ip_set_hash_net", "set-src": "xt_set", "set-dst": "xt_set", "socket": "xt_socket", "tproxy": "xt_TPROXY",
    "mark": "xt_mark", "connmark": "xt_connmark", "state": "xt_conntrack", "direction": "xt_conntrack",
    "known": "xt_conntrack", "origdst": "xt_conntrack", "ifgroup": "xt_devgroup", "local": "xt_addrtype",
    "reqid": "xt_policy", "sport": "xt_tcpudp", "dport": "xt_tcpudp", "syn": "xt_tcpudp", "nflog": "xt_NFLOG",
    "netmap": "xt_NETMAP", "dnat": "xt_nat", "snat": "xt_nat", "masquerade": "xt_MASQUERADE",
}
_BY_FAMILY = {"reject": {4: "ipt_REJECT", 6: "ip6t_REJECT"}, "icmp": {4: "ip_tables", 6: "ip6_tables"}}


class ProbesImpossible(Exception):
    """Nothing could be tried; `str()` says why."""


class Missing(NamedTuple):
    """Something that this kernel refuses."""

    what: str                        # a kind of test or target, or SETS
    family: int
    complaint: str

    @property
    def module(self) -> str:
        """Return the kernel module that does it."""
        return _BY_FAMILY.get(self.what, {}).get(self.family) or _MODULES.get(self.what, "x_tables")


def missing(plan: Plan, kind: str) -> list[Missing]:
    """Return what of a plan this kernel refuses; kind: nft or legacy.  Raises ProbesImpossible."""
    order = {"kind": kind, "families": sorted({table.family for table in plan.tables}), "probes": list(probes_of(plan))}
    try:
        found = json.loads(children.obeyed(_CHILD, order, _DEADLINE_S))
    except children.ChildError as problem:
        raise ProbesImpossible(str(problem)) from None
    return [Missing(*one) for one in found]


def probes_of(plan: Plan) -> Iterator[tuple[str, int, str]]:
    """Yield (what, family, input of iptables-restore) for every kind of test and target of a plan."""
    for table in plan.tables:
        seen: set[str] = set()
        for chain in table.chains:
            for rule in chain.rules:
                for what in (*(test.what for test in rule.tests), rule.target.what):
                    if what not in seen and what not in ("goto", "jump"):
                        seen.add(what)
                        yield what, table.family, _text(table, _alone(rule, what, table.family))


def _alone(rule: Rule, what: str, family: int) -> Rule:
    """Return a rule with nothing that asks the kernel for more than `what`, as far as iptables permits."""
    tests = tuple(test._replace(value=_set_name(family)) if test.what.startswith("set-") else test
                  for test in rule.tests if test.what in (what, "proto"))
    return Rule(tests, rule.target if rule.target.what == what else Target("accept"))


def _set_name(family: int) -> str:
    return f"{SET_PREFIX}probe{family}"


def _text(table: Table, rule: Rule) -> str:
    return text_of(Table(table.family, table.name, (Chain(_CHAIN, (rule,)),), ()))


# ---------------------------------------------------------------------------- in the child

def main() -> int:
    """Try what standard input says, in a namespace that ends with this process; print what is missing."""
    order = json.load(sys.stdin)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET):
        print(f"no network namespace can be made: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
        return 1
    found = [[SETS, family, complaint] for family in order["families"] if (complaint := _complaint_about_sets(family))]
    without_sets = {family for _, family, _ in found}
    for what, family, text in order["probes"]:
        if what.startswith("set-") and family in without_sets:
            continue
        try:
            run([f"{_COMMAND[family]}-{order['kind']}-restore", "--noflush"], what, text)
        except TableError as problem:
            found.append([what, family, str(problem)])
    print(json.dumps(found))
    return 0


def _complaint_about_sets(family: int) -> str:
    try:
        with Sets() as sets:
            sets.load([AddressSet(_set_name(family), family, ())])
            sets.finish()
    except SetError as problem:
        return str(problem)
    return ""
