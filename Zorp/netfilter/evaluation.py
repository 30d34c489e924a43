"""From the first-match list to chains that ask few questions.

Theory of operation
    ZORP_EVAL branches by protocol: TCP, UDP, ICMP, and what is left.  Short lists become one
    chain.  Longer lists of TCP and UDP are split by destination port: the ports where a
    condition begins or ends cut the range into intervals, a tree of chains leads to the interval
    of a packet in a few steps, and there stands the list of those entries that can match it, in
    the old order, without their port conditions.

    The lists of different intervals mostly end alike, with the entries that have no port
    condition.  Lists are therefore made from their ends as linked nodes, equal nodes are the same
    node, and a node with several predecessors begins a chain of its own.  So the number of packet
    rules grows with the number of entries, not with entries times ports.

    On the way, entries that cannot be reached are dropped: behind one without conditions, and
    before one of the same rule that asks for less.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from Zorp.netfilter.entries import Entry
from Zorp.netfilter.plan import Chain, Rule, Target, Test

PORTS = 65_536
_FAN_OUT = 4                     # branches of a chain of the tree: 2.5 tests for a factor of four is the cheapest
_LOOK_AHEAD = 64                 # entries of one rule that are compared with each other
_ORDER = ("iface", "ifgroup", "reqid", "icmp", "sport", "dport", "src", "dst", "local", "set-src", "set-dst")
_WITH_PROTOCOL = frozenset({"icmp", "sport", "dport"})       # tests that need the protocol beside them

RETURN = Target("return")


class Node:
    """An entry and what follows when it does not match; None ends a list."""

    __slots__ = ("index", "rest", "tests")

    def __init__(self, tests: frozenset[Test], index: int, rest: Node | None) -> None:
        self.tests, self.index, self.rest = tests, index, rest


class Lists:
    """Lists of entries that share their ends."""

    def __init__(self) -> None:
        self._nodes: dict[tuple, Node] = {}

    def prepend(self, tests: frozenset[Test], index: int, rest: Node | None) -> Node:
        """Return the list that asks for these tests first; without what cannot make a difference."""
        if not tests:
            rest = None
        node, steps = rest, 0
        while node is not None and node.index == index and steps < _LOOK_AHEAD:
            if node.tests <= tests:
                return rest
            node, steps = node.rest, steps + 1
        key = tests, index, id(rest)
        found = self._nodes.get(key)
        if found is None:
            found = self._nodes[key] = Node(tests, index, rest)
        return found

    def of(self, entries: Sequence[Entry]) -> Node | None:
        """Return the list of these entries, their port conditions as tests."""
        rest: Node | None = None
        for entry in reversed(entries):
            tests = entry.tests if entry.ports in (None, (0, PORTS - 1)) else entry.tests | {Test("dport", entry.ports)}
            rest = self.prepend(tests, entry.index, rest)
        return rest

    def by_port(self, entries: Sequence[Entry]) -> list[tuple[int, Node | None]]:
        """Return [(last port, list)] for the intervals of ports that entries tell apart, ascending."""
        portless = [place for place, entry in enumerate(entries) if entry.ports is None]
        ends: list[Node | None] = [None]
        for place in reversed(portless):
            ends.append(self.prepend(entries[place].tests, entries[place].index, ends[-1]))
        ends.reverse()                               # ends[k]: the list of portless[k:]
        intervals: list[tuple[int, Node | None]] = []
        for last_port, present in _sweep(entries):
            head = self._merged(entries, portless, ends, present)
            if intervals and intervals[-1][1] is head:
                intervals.pop()
            intervals.append((last_port, head))
        return intervals

    def _merged(self, entries: Sequence[Entry], portless: list[int], ends: list[Node | None],
                present: list[int]) -> Node | None:
        """Return the list of the portless entries and those at the places `present`."""
        at = bisect_left(portless, present[-1]) if present else 0
        head = ends[at]
        for place in reversed(present):
            while at > 0 and portless[at - 1] > place:
                at -= 1
                head = self.prepend(entries[portless[at]].tests, entries[portless[at]].index, head)
            head = self.prepend(entries[place].tests, entries[place].index, head)
        while at > 0:
            at -= 1
            head = self.prepend(entries[portless[at]].tests, entries[portless[at]].index, head)
        return head


def _sweep(entries: Sequence[Entry]) -> Iterator[tuple[int, list[int]]]:
    """Yield (last port, places of the entries with a port condition that holds there) per interval."""
    begins: dict[int, list[int]] = {}
    stops: dict[int, list[int]] = {}
    for place, entry in enumerate(entries):
        if entry.ports is not None:
            begins.setdefault(entry.ports[0], []).append(place)
            stops.setdefault(entry.ports[1] + 1, []).append(place)
    edges = sorted({0, PORTS, *begins, *stops})
    present: set[int] = set()
    for first, after in itertools.pairwise(edges):
        present.difference_update(stops.get(first, ()))
        present.update(begins.get(first, ()))
        yield after - 1, sorted(present)


class Chains:
    """The chains of one list or tree; `prefix` begins their names, the first is called like it."""

    def __init__(self, prefix: str, protocol: int | None) -> None:
        self._prefix = prefix
        self._protocol = protocol
        self._chains: list[Chain] = []
        self._names: dict[int, str] = {}             # identity of a node that begins a chain -> its name
        self._number = 0

    def simple(self, head: Node | None) -> list[Chain]:
        """Return one list as chains."""
        self._prepare([head])
        self._write(head, self._prefix)
        return self._chains

    def split(self, intervals: list[tuple[int, Node | None]]) -> list[Chain]:
        """Return the tree over intervals of destination ports, and the lists that it leads to."""
        self._prepare([head for _, head in intervals])
        self._tree(self._prefix, intervals)
        for head in _unique(head for _, head in intervals):
            if id(head) in self._names:
                self._write(head, self._names[id(head)])
        return self._chains

    def _prepare(self, heads: list[Node | None]) -> None:
        """Find the nodes that begin chains: heads, and nodes with several predecessors."""
        predecessors: Counter[int] = Counter()
        for head in _unique(heads):
            predecessors[id(head)] += 2
        seen: set[int] = set()
        for head in _unique(heads):
            node: Node | None = head
            while node is not None and id(node) not in seen:
                seen.add(id(node))
                if node.rest is not None:
                    predecessors[id(node.rest)] += 1
                node = node.rest
        self._shared = {node for node, number in predecessors.items() if number > 1}

    def _tree(self, name: str, intervals: list[tuple[int, Node | None]]) -> None:
        groups = _groups(intervals)
        at = len(self._chains)
        self._chains.append(Chain(name, ()))                 # parents stand before their branches
        rules = []
        for number, group in enumerate(groups):
            target = self._branch(group)
            is_last = number == len(groups) - 1
            tests = () if is_last else (Test("proto", self._protocol), Test("dport", (0, group[-1][0])))
            rules.append(Rule(tests, target))
        self._chains[at] = Chain(name, tuple(rules))

    def _branch(self, group: list[tuple[int, Node | None]]) -> Target:
        if len(group) == 1:
            return self._target_of(group[0][1])
        name = self._new_name()
        self._tree(name, group)
        return Target("goto", (name,))

    def _target_of(self, head: Node | None) -> Target:
        """Return the jump to a list; straight to the rule's action when nothing is asked."""
        if head is None:
            return RETURN
        if not head.tests:
            return action(head.index)
        if id(head) not in self._names:
            self._names[id(head)] = self._new_name()
        return Target("goto", (self._names[id(head)],))

    def _write(self, node: Node | None, name: str) -> None:
        """Write the chain of a list, and after it those that it continues in, as far as they are new."""
        rules = []
        while node is not None:
            rules.append(Rule(self._ordered(node.tests), action(node.index)))
            node = node.rest
            if node is not None and node.tests and id(node) in self._shared:
                is_new = id(node) not in self._names
                rules.append(Rule((), self._target_of(node)))
                self._chains.append(Chain(name, tuple(rules)))
                if not is_new:
                    return
                name, rules = self._names[id(node)], []
        self._chains.append(Chain(name, tuple(rules)))

    def _ordered(self, tests: frozenset[Test]) -> tuple[Test, ...]:
        """Return tests in the order in which they are cheap to ask, with the protocol where it is needed."""
        ordered = sorted(tests, key=lambda test: (_ORDER.index(test.what) if test.what in _ORDER else -1, test))
        if self._protocol is not None and any(test.what in _WITH_PROTOCOL for test in ordered):
            ordered.insert(0, Test("proto", self._protocol))
        return tuple(ordered)

    def _new_name(self) -> str:
        self._number += 1
        return f"{self._prefix}_{self._number}"


def _groups(intervals: list[tuple[int, Node | None]]) -> list[list[tuple[int, Node | None]]]:
    """Cut intervals into at most _FAN_OUT runs of about the same number."""
    number = min(_FAN_OUT, len(intervals))
    cuts = [len(intervals) * place // number for place in range(number + 1)]
    return [intervals[first:after] for first, after in itertools.pairwise(cuts)]


def _unique(heads: Iterable[Node | None]) -> Iterator[Node]:
    seen: set[int] = set()
    for head in heads:
        if head is not None and id(head) not in seen:
            seen.add(id(head))
            yield head


def action(index: int) -> Target:
    """Return the jump to what is done with the packets of a rule."""
    return Target("goto", (f"ZORP_R{index}",))
