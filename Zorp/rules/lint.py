"""What a rule set says that its author can hardly have meant: rules that never win, and surprises.

Theory of operation
    Rule A shadows rule B when A matches everything that B matches and never scores less.  In
    every component A must then say at least what B says: the same alternatives and perhaps
    more, or, where the component takes plain values or ports, score at least as high for each
    of B's values.  If that holds and A has the lower id, or if A scores higher somewhere for
    all of B's traffic, B can never win.

    The test is one of intersections of bitmaps, as the evaluation itself, so ten thousand
    rules take a fraction of a second.  It is sound and not complete: rules that only several
    others shadow together are not found, nor those shadowed because a zone happens to consist
    of the same nets as a subnet condition.
"""

from __future__ import annotations

from collections.abc import Iterator

from Zorp.rules.engine import Addresses, Incoming, Ports, RuleData, RuleEngine, Values

_MOST_CLASSES = 64               # of ports that one rule is compared on; beyond, only equal ranges are recognised


def shadowed(engine: RuleEngine) -> Iterator[tuple[RuleData, RuleData]]:
    """Yield (rule that can never win, the rule of lowest id that shadows it)."""
    for bit, rule in enumerate(engine.rules):
        at_least = ~(1 << bit)                      # rules that so far score no less on all of this rule's traffic
        more = 0                                    # rules that score more in some component and match all of it
        for component, side in _components(engine):
            no_less, higher, covering = _against(component, side, rule)
            more = (more & covering) | (at_least & higher)
            at_least &= no_less
        winners = (more | (at_least & ((1 << bit) - 1))) & ((1 << len(engine.rules)) - 1)
        if winners:
            yield rule, engine.rules[(winners & -winners).bit_length() - 1]


def _components(engine: RuleEngine):
    names = ("proto", "proto_type", "proto_subtype", "src_port", "dst_port")
    return ((engine.incoming, ""), *zip((*engine.values, *engine.ports), names, strict=True),
            (engine.source, "src"), (engine.destination, "dst"))


def _against(component, side: str, rule: RuleData) -> tuple[int, int, int]:
    """Return the rules that score no less, that score more, and that match, for all this rule takes in a component."""
    if isinstance(component, (Values, Ports)):
        return _plain(component, getattr(rule, side))
    if isinstance(component, Incoming):
        asked = ((component.reqids, rule.reqid), (component.names, rule.iface), (component.groups, rule.ifgroup))
    else:
        asked = _address_conditions(component, side, rule)
    same_or_more = -1
    for named, values in asked:
        for value in values:
            same_or_more &= named[value]
    if same_or_more == -1:                          # this rule restricts nothing here: only its like match all of it
        return component.free, 0, component.free
    return same_or_more, 0, same_or_more | component.free


def _address_conditions(component: Addresses, side: str, rule: RuleData):
    common = ((component.subnets, getattr(rule, f"{side}_subnet")), (component.zones, getattr(rule, f"{side}_zone")))
    if side == "src":
        return common
    return (*common, (component.names, rule.dst_iface), (component.groups, rule.dst_ifgroup))


def _plain(component: Values | Ports, values: tuple) -> tuple[int, int, int]:
    """As _against(), where each value has its own score."""
    if not values:
        return component.free, 0, component.free
    classes = list(_classes(component, values))
    if len(classes) > _MOST_CLASSES:
        return _same_ranges(component, values)
    no_less = higher = covering = -1
    for class_, own_score in classes:
        reached = exceeded = matching = 0
        for score, bitmap in component.levels(class_):
            matching |= bitmap
            if score >= own_score:
                reached |= bitmap
            if score > own_score:
                exceeded |= bitmap
        no_less, higher, covering = no_less & reached, higher & exceeded, covering & matching
    return no_less, higher, covering


def _same_ranges(component: Ports, ranges: tuple) -> tuple[int, int, int]:
    """As _plain() for many ports, but only rules that name the very same ranges are found."""
    no_less = -1
    for named in ranges:
        no_less &= component.named[named]
    return no_less, 0, no_less | component.free


def _classes(component: Values | Ports, values: tuple) -> Iterator[tuple[int, int]]:
    """Yield every class of values that the condition takes, with the score it has there."""
    if isinstance(component, Values):
        yield from ((value, 1) for value in values)
        return
    singles = {low for low, high in values if low == high}
    for low, high in values:
        for class_ in component.classes_within(low, high):
            yield class_, 2 if component.first_port(class_) in singles else 1


def nets_for_everyone(rules: tuple[RuleData, ...]) -> Iterator[tuple[RuleData, str]]:
    """Yield (rule, dimension) where a subnet of length 0 outranks other rules' zones, however deep those are."""
    for side in ("src", "dst"):
        if any(getattr(rule, f"{side}_zone") for rule in rules):
            yield from ((rule, f"{side}_subnet") for rule in rules
                        if any(net.bits == 0 for net in getattr(rule, f"{side}_subnet")))
