"""What must not come into force: more than is in force while a policy is unknown, more than a policy says.

Theory of operation
    What a rule keeps for a proxy, or refuses, another rule that forwards may cover as well, in the
    same instance or in another, and a zone that grows, or loses an exception, changes which of
    them decides.  So nothing here weighs rules against each other: a change is harmless when
    nothing is forwarded after it, or when only rules that forward nothing were added.

    What is kept for a proxy whose instance has never run is dropped until it starts: only then is
    it known which port its listener has, and until then nobody else may have these packets.

    Descriptions are compared without the ports of listeners: these are not in a policy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from Zorp.rules.description import DenyData, ForwardData, InstanceDescription, ProxyData
from Zorp.rules.engine import RuleData

_PARTS = {"zones": "zone", "services": "service", "rules": "rule"}
_SHOWN_CHARACTERS = 300


class Unconfirmed(Exception):
    """An instance wants what its policy file does not say; `str()` is for the administrator."""


def forwarding_rules(description: InstanceDescription) -> tuple[RuleData, ...]:
    """Return the rules that let the kernel forward."""
    forwarding = {service.name for service in description.services if isinstance(service, ForwardData)}
    return tuple(rule for rule in description.rules if rule.service in forwarding)


def lacks_port(description: InstanceDescription) -> bool:
    """Return whether rules lead to a listener whose port is not known, because its instance has never run."""
    proxied = {service.name for service in description.services if isinstance(service, ProxyData)}
    return (any(rule.service in proxied for rule in description.rules)
            and any(not listener.port for listener in description.listeners))


def until_it_runs(description: InstanceDescription) -> InstanceDescription:
    """Return the description without listeners whose port is not known: packets for them are dropped."""
    return dataclasses.replace(description, listeners=tuple(
        listener for listener in description.listeners if listener.port)) if lacks_port(description) else description


def opening(before: Iterable[InstanceDescription], after: Iterable[InstanceDescription]) -> str | None:
    """Return what might be forwarded after a change and was not before, None: surely nothing."""
    old, new = ({one.instance: one for one in descriptions} for descriptions in (before, after))
    if not any(map(forwarding_rules, new.values())):
        return None
    for name, description in new.items():
        known = old.get(name)
        fresh = [rule for rule in forwarding_rules(description)
                 if known is None or rule not in forwarding_rules(known)]
        if fresh:
            return f"instance '{name}', rule {fresh[0].rule_id} might forward"
        if known is not None and (changed := difference(known, description)):
            return f"instance '{name}' ({changed[0]}, which was {changed[1]}) might let rules forward"
    if gone := [name for name, description in old.items() if name not in new and description.rules]:
        return f"other instances, without the rules of instance '{gone[0]}', might forward"
    return None


def difference(one: InstanceDescription, other: InstanceDescription) -> tuple[str, str] | None:
    """Return what the second says where the two differ first, and what the first says there; None: nowhere."""
    for part, what in _PARTS.items():
        here, there = ({_name(item): item for item in getattr(description, part)} for description in (one, other))
        for name in (*there, *here):
            if here.get(name) != there.get(name):
                return _text(what, name, there.get(name)), _text(what, name, here.get(name))
    return None


def closed(description: InstanceDescription) -> InstanceDescription:
    """Return a description whose rules take what they took and let nothing pass."""
    return dataclasses.replace(description, services=tuple(
        DenyData(name=service.name, logging=False) for service in description.services))


def confirmed(name: str, handed: InstanceDescription | None, own: InstanceDescription) -> InstanceDescription | None:
    """Return what was read from a policy file, `own`, with the ports that its instance hands over.

    handed: None when the instance wants no rules, and None is returned.  Raises Unconfirmed when
    the instance wants anything else than the file says.
    """
    if handed is None:
        if not own.rules:
            return None
        raise Unconfirmed(f"instance '{name}' wants its rules removed; its policy file has {len(own.rules)}; take them "
                          "out of it and reload kzorpd, or the instance out of instances.conf and restart kzorpd")
    differing = difference(own, handed)
    if differing is None and _places(own) != _places(handed):
        differing = f"listeners at {_places(handed)}", f"listeners at {_places(own)}"
    if differing is not None:
        raise Unconfirmed(
            f"instance '{handed.instance}' hands over {differing[0]}; its policy file says {differing[1]}; start it "
            "with the policy and options of instances.conf, reload it when the file has changed since, or leave packet "
            "rules to the administrator (--packet-rules administrator)")
    return dataclasses.replace(own, listeners=handed.listeners)


def _places(description: InstanceDescription) -> list[tuple[int, str]]:
    return sorted((listener.protocol, listener.address) for listener in description.listeners)


def _name(item: object) -> object:
    return item.rule_id if isinstance(item, RuleData) else item.name


def _text(what: str, name: object, item: object) -> str:
    if item is None:
        return f"no {what} '{name}'"
    fields = ((field.name, getattr(item, field.name), field.default) for field in dataclasses.fields(item))
    said = ", ".join(f"{name}={_value(value)}" for name, value, default in fields
                     if value != default and name not in ("name", "rule_id"))
    return f"{what} '{name}': {said or 'without properties'}"[:_SHOWN_CHARACTERS]


def _value(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
