"""From the first-match list to chains that ask few questions.

Theory of operation
    A list of more entries than a chain shall have is cut in two: by destination port, by a net
    of the source or of the destination, or by the incoming interface, whichever leaves the
    shorter lists.  The entries that can match on one side of the cut go, in their old order,
    into that side's list, and so on.  A chain asks for one side ("goto" another chain) and goes
    on with the other itself, so that a packet answers one question per cut, about log2 of the
    number of entries, and the few entries of its list at the end.

    An entry that does not ask for what a cut tells apart stands on both sides.  Of those there
    may be many, so a list that was cut holds at most _COPIES times as many entries as before.
    Where that leaves long lists, runs of entries that ask for the same things (the better score
    comes first, so all that ask for a port come before those that do not) are cut each by itself:
    what no entry of a run takes goes on to the next run.

    The kernel follows at most 15 chains into each other (nf_tables; a gone-to chain counts), of
    which others stand before and behind a tree.  So no chain of a tree is more than _LEVELS deep;
    the few lists that would be cut further stay longer.

    Zones stand in a cut for the nets they are made of, and anywhere if they name hosts: addresses
    of hosts change sets, never chains.

    Chains are called after a hash of what they say: equal ones are one, and a rule that changes
    changes the chains on its way only, so that little has to be loaded again.

    Entries that cannot be reached are dropped: behind one without conditions, and before one of
    the same rule that asks for less.
"""

from __future__ import annotations

import hashlib
import ipaddress
import itertools
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from Zorp.netfilter.entries import CLOSED, TCP, UDP, Entry
from Zorp.netfilter.plan import Chain, Rule, Target, Test
from Zorp.netfilter.zonesets import SetRegistry

PORTS = 65_536
_ALL_PORTS = 0, PORTS - 1
_COPIES = 3                      # a list that was cut is at most this many times as long in all its pieces
_WORTHWHILE = 0.9                # a cut that leaves more than this part of the list is none
_LEVELS = 8                      # chains that a tree goes down at most; PREROUTING, ZORP, ZORP_EVAL, ... come on top
_LOOK_AHEAD = 64                 # entries of one rule that are compared with each other
_HASH_DIGITS = 10
_ORDER = ("iface", "ifgroup", "reqid", "icmp", "sport", "dport", "src", "dst", "local", "set-src", "set-dst")
_WITH_PROTOCOL = frozenset({"icmp", "sport", "dport"})       # tests that need the protocol beside them
_WIDTH = {4: 32, 6: 128}

RETURN = Target("return")
Span = tuple[int, int]           # first and last address or port
Spans = tuple[Span, ...]         # ascending, not empty, not touching in between


class _View(NamedTuple):
    """What a part of the traffic can meet of an entry."""

    entry: Entry
    iface: str | None
    ports: Span
    src: Spans
    dst: Spans


class _Cut(NamedTuple):
    """A question, and what can be met when the answer is yes or no."""

    tests: tuple[Test, ...]
    inside: list[_View]
    outside: list[_View]
    inside_ports: Span
    outside_ports: Span


class Evaluation:
    """The chains for one family and kind of traffic; `name` is the first of them.

    most: entries of a chain that is not cut.  undecided: the test that holds until a rule was found.
    """

    def __init__(self, name: str, family: int, kind: int | None, *, registry: SetRegistry, most: int,
                 undecided: Test) -> None:
        self._name, self._family, self._kind, self._most = name, family, kind, most
        self._undecided = undecided
        self._registry = registry
        self._protocol = (Test("proto", kind),) if kind is not None else ()
        self._chains: dict[str, Chain] = {}

    def chains(self, entries: Sequence[Entry]) -> list[Chain]:
        """Return the chains of a first-match list."""
        views = [self._view(entry) for entry in entries]
        views = self._reduced([view for view in views if view.src and view.dst], _ALL_PORTS)
        rules = self._tree(views, _ALL_PORTS, _COPIES * len(views))
        if self._longest(rules) > self._most + 2 * len(views).bit_length():
            rules = min(rules, self._one_after_the_other(self._runs(views)), key=self._longest)
        return [Chain(self._name, tuple(rules)), *self._reachable(rules)]

    def _one_after_the_other(self, runs: list[list[_View]]) -> list[Rule]:
        """Return rules that ask the tree of one run after that of another, until one decides."""
        rules: list[Rule] = []
        for run in runs[:-1]:
            chain = self._chain(self._tree(run, _ALL_PORTS, _COPIES * len(run), level=1))
            rules += [Rule((), Target("jump", (chain,))), Rule((self._undecided._replace(negated=True),), RETURN)]
        return rules + self._tree(runs[-1], _ALL_PORTS, _COPIES * len(runs[-1]))

    def _longest(self, rules: Sequence[Rule]) -> int:
        """Return how many rules a packet can meet."""
        most = before = 0
        for place, rule in enumerate(rules, 1):
            chain = self._chains.get(rule.target.values[0]) if rule.target.what in ("goto", "jump") else None
            below = self._longest(chain.rules) if chain is not None else 0
            most = max(most, before + place + below)
            before += below if rule.target.what == "jump" else 0
        return most

    def _reachable(self, rules: Sequence[Rule]) -> list[Chain]:
        """Return the chains that rules lead to, each before those that it leads to itself."""
        found: dict[str, Chain] = {}
        waiting = list(rules)[::-1]
        while waiting:
            target = waiting.pop().target
            name = target.values[0] if target.what in ("goto", "jump") else ""
            if name in self._chains and name not in found:
                found[name] = self._chains[name]
                waiting += found[name].rules[::-1]
        return list(found.values())

    # ---- what entries ask for

    def _view(self, entry: Entry) -> _View:
        everything = ((0, (1 << _WIDTH[self._family]) - 1),)
        found = {"src": everything, "dst": everything}
        iface = None
        for test in entry.tests:
            if test.what == "iface":
                iface = test.value
            elif test.what in ("src", "dst"):
                found[test.what] = _common(found[test.what], (_span_of(test.value),))
            elif test.what in ("set-src", "set-dst"):
                found[test.what[4:]] = _common(found[test.what[4:]], self._registry.spans(test.value) or everything)
        return _View(entry, iface, entry.ports or _ALL_PORTS, found["src"], found["dst"])

    def _runs(self, views: list[_View]) -> list[list[_View]]:
        """Return the list in pieces that ask for the same things; none of them is short."""
        def asked(view: _View) -> tuple[bool, bool, bool]:
            whole = (1 << _WIDTH[self._family]) - 1
            return view.ports != _ALL_PORTS, view.src != ((0, whole),), view.dst != ((0, whole),)

        runs: list[list[_View]] = []
        for _, group in itertools.groupby(views, asked):
            run = list(group)
            if runs and (len(run) <= self._most or len(runs[-1]) <= self._most):
                runs[-1] += run
            else:
                runs.append(run)
        return runs

    def _reduced(self, views: list[_View], ports: Span) -> list[_View]:
        """Return the list without what cannot make a difference to traffic for these ports."""
        kept: list[_View] = []                       # from the last to the first
        asks: list[frozenset[Test]] = []
        for view in reversed(views):
            tests = self._tests(view, ports)
            if not tests:
                kept, asks = [], []
            for other, fewer in zip(reversed(kept[-_LOOK_AHEAD:]), reversed(asks[-_LOOK_AHEAD:]), strict=True):
                if other.entry.index != view.entry.index:
                    kept.append(view)
                    asks.append(tests)
                    break
                if fewer <= tests:
                    break
            else:
                kept.append(view)
                asks.append(tests)
        return kept[::-1]

    @staticmethod
    def _tests(view: _View, ports: Span) -> frozenset[Test]:
        """Return what has to be asked for an entry when the port is known to be among these."""
        own = view.entry.ports
        if own is None or (own[0] <= ports[0] and ports[1] <= own[1]):
            return view.entry.tests
        return view.entry.tests | {Test("dport", own)}

    # ---- chains

    def _tree(self, views: list[_View], ports: Span, budget: int, level: int = 0) -> list[Rule]:
        """Return the rules for a list; its pieces may hold `budget` entries together."""
        rules: list[Rule] = []
        while True:
            views = self._reduced(views, ports)
            is_long = len(views) > self._most and level < _LEVELS
            cut = self._best_cut(views, ports, budget) if is_long else None
            if cut is None:
                return rules + [Rule(self._ordered(self._tests(view, ports)), action(view.entry.index))
                                for view in views]
            total = len(cut.inside) + len(cut.outside)
            inside = self._tree(cut.inside, cut.inside_ports, budget * len(cut.inside) // total, level + 1)
            rules.append(Rule(cut.tests, self._target_of(inside)))
            views, ports, budget = cut.outside, cut.outside_ports, budget * len(cut.outside) // total

    def _target_of(self, rules: list[Rule]) -> Target:
        """Return the jump to a chain of these rules; straight to a rule's action when nothing is asked."""
        if not rules:
            return RETURN
        if not rules[0].tests:
            return rules[0].target
        return Target("goto", (self._chain(rules),))

    def _chain(self, rules: list[Rule]) -> str:
        """Return the name of the chain of these rules."""
        text = "\n".join(map(str, rules))
        for attempt in itertools.count():
            digest = hashlib.sha256(f"{attempt}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_DIGITS]
            chain = Chain(f"{self._name}_{digest}", tuple(rules))
            if self._chains.setdefault(chain.name, chain) == chain:
                return chain.name
        raise AssertionError

    def _ordered(self, tests: frozenset[Test]) -> tuple[Test, ...]:
        """Return tests in the order in which they are cheap to ask, with the protocol where it is needed."""
        ordered = sorted(tests, key=lambda test: (_ORDER.index(test.what) if test.what in _ORDER else -1, test))
        if any(test.what in _WITH_PROTOCOL for test in ordered):
            ordered[:0] = self._protocol
        return tuple(ordered)

    # ---- cuts

    def _best_cut(self, views: list[_View], ports: Span, budget: int) -> _Cut | None:
        """Return the cut that leaves the shortest lists, None when none is worth its question."""
        cuts = [self._port_cut(views, ports)] if self._kind in (TCP, UDP) else []
        cuts += [self._net_cut(views, "src", ports), self._net_cut(views, "dst", ports), _iface_cut(views, ports)]
        found = [cut for cut in cuts if cut is not None and len(cut.inside) + len(cut.outside) <= budget
                 and max(len(cut.inside), len(cut.outside)) <= _WORTHWHILE * len(views)]
        return min(found, key=lambda cut: (max(len(cut.inside), len(cut.outside)), len(cut.inside) + len(cut.outside)),
                   default=None)

    def _port_cut(self, views: list[_View], ports: Span) -> _Cut | None:
        firsts = sorted(view.ports[0] for view in views)
        lasts = sorted(view.ports[1] for view in views)
        borders = {border for border in (*firsts, *(last + 1 for last in lasts)) if ports[0] < border <= ports[1]}

        def cost(border: int) -> tuple[int, int, int]:
            below, above = bisect_left(firsts, border), len(views) - bisect_left(lasts, border)
            return max(below, above), below + above, border

        if not borders:
            return None
        border = min(borders, key=cost)
        below, above = (ports[0], border - 1), (border, ports[1])
        return _Cut((*self._protocol, Test("dport", (0, border - 1))), _at_ports(views, below), _at_ports(views, above),
                    below, above)

    def _net_cut(self, views: list[_View], side: str, ports: Span) -> _Cut | None:
        width = _WIDTH[self._family]
        net = _centre([getattr(view, side) for view in views], width)
        if net is None:
            return None
        first, last = span = _span(*net, width)
        inside = [view._replace(**{side: spans}) for view in views if (spans := _common(getattr(view, side), (span,)))]
        around = tuple(part for part in ((0, first - 1), (last + 1, (1 << width) - 1)) if part[0] <= part[1])
        outside = [view._replace(**{side: spans}) for view in views if (spans := _common(getattr(view, side), around))]
        address = ipaddress.IPv4Address(first) if width == 32 else ipaddress.IPv6Address(first)
        return _Cut((Test(side, f"{address}/{net[1]}"),), inside, outside, ports, ports)


def _iface_cut(views: list[_View], ports: Span) -> _Cut | None:
    names = Counter(view.iface for view in views if view.iface is not None)
    if not names:
        return None
    name = min(names, key=lambda name: (-names[name], name))
    return _Cut((Test("iface", name),), [view for view in views if view.iface in (None, name)],
                [view for view in views if view.iface != name], ports, ports)


def _at_ports(views: Iterable[_View], ports: Span) -> list[_View]:
    return [view._replace(ports=(max(view.ports[0], ports[0]), min(view.ports[1], ports[1])))
            for view in views if view.ports[0] <= ports[1] and ports[0] <= view.ports[1]]


# ---------------------------------------------------------------------------- spans of addresses

def _span(network: int, bits: int, width: int) -> Span:
    return network, network | ((1 << (width - bits)) - 1)


def _span_of(net: str) -> Span:
    network = ipaddress.ip_network(net)
    return int(network.network_address), int(network.broadcast_address)


def _common(some: Spans, others: Spans) -> Spans:
    """Return what two lists of spans have in common."""
    if len(some) == len(others) == 1:                # nearly always
        first, last = max(some[0][0], others[0][0]), min(some[0][1], others[0][1])
        return ((first, last),) if first <= last else ()
    found = [(max(one[0], other[0]), min(one[1], other[1])) for one in some for other in others]
    return tuple((first, last) for first, last in found if first <= last)


def _centre(conditions: Sequence[Spans], width: int) -> tuple[int, int] | None:
    """Return the net (network, bits) that divides conditions on addresses best; None: none divides them.

    From the net of everything it goes down into the half that more conditions have to do with,
    skipping nets that divide nothing, until less than half of the conditions are left inside.
    """
    best: tuple[tuple[int, int], tuple[int, int]] | None = None
    network, bits = 0, 0
    while True:
        span = _span(network, bits, width)
        parts = [part for spans in conditions if (part := _common(spans, (span,)))]
        parts_of_it = [part for part in parts if part != (span,)]
        if not parts_of_it or (best is not None and 2 * len(parts) < len(conditions)):
            break
        first, last = min(part[0][0] for part in parts_of_it), max(part[-1][1] for part in parts_of_it)
        bits = max(bits, width - (first ^ last).bit_length())
        network = first >> (width - bits) << (width - bits)
        best = _better(best, conditions, (network, bits), width)
        if bits == width:
            break
        halves = [(network | half << (width - bits - 1), bits + 1) for half in (0, 1)]
        network, bits = max(halves, key=lambda half: sum(
            bool(_common(spans, (_span(*half, width),))) for spans in parts_of_it))
        best = _better(best, conditions, (network, bits), width)
    return best[1] if best is not None else None


def _better(best, conditions: Sequence[Spans], net: tuple[int, int], width: int):
    """Return ((larger side, both sides), net) of this net or of the best before."""
    span = _span(*net, width)
    inside = sum(bool(_common(spans, (span,))) for spans in conditions)
    outside = sum(_common(spans, (span,)) != spans for spans in conditions)
    cost = max(inside, outside), inside + outside
    return (cost, net) if best is None or cost < best[0] else best


CLOSED_CHAIN = "ZORP_CLOSED"


def action(index: int) -> Target:
    """Return the jump to what is done with the packets of a rule."""
    if index == CLOSED:
        return Target("goto", (CLOSED_CHAIN,))
    return Target("goto", (f"ZORP_R{index}",))
