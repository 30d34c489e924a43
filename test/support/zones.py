"""Empty registries for tests of zones and rules, without loading the rest of the policy language."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from Zorp import Globals
from Zorp.Config import config
from Zorp.Rule import Packet
from Zorp.SockAddr import SockAddrInet, SockAddrInet6
from Zorp.Zone import Zone


def forget_policy():
    Globals.zones.clear()
    Globals.services.clear()
    Globals.rules = None
    Zone.zone_subnet_tree.clear()
    Zone.has_dynamic_subnet = False
    config.options.zone_dac = "auto"
    config.options.zone_dns_grace = 3600


@pytest.fixture
def no_zones():
    """No zone, service or rule is known before the test, and none afterwards."""
    forget_policy()
    yield
    forget_policy()


@pytest.fixture
def log_lines(monkeypatch):
    """What is logged while the test runs: (tag, level, text with its arguments)."""
    lines = []

    def keep(session_id, tag, level, text=None, args=None):
        if text is None:
            session_id, tag, level, text = None, session_id, tag, level
        lines.append((tag, level, text % args if args else text))

    for module in ("Zone", "zones.table", "zones.names", "Rule", "rules.conditions", "Util"):
        monkeypatch.setattr(f"Zorp.{module}.log", keep, raising=False)
    return lines


def address(text, port=0):
    """The SockAddr of an IPv4 or IPv6 text."""
    return (SockAddrInet6 if ":" in text else SockAddrInet)(text, port)


def zone_name(text):
    """The name of the zone that holds an address, or None."""
    zone = Zone.lookup(address(text))
    return zone.name if zone is not None else None


def session_of(service_name):
    """As much of a session as access lists look at."""
    return SimpleNamespace(service=SimpleNamespace(name=service_name))




def define_services(*names):
    """Put service names in place for rules to refer to."""
    Globals.services.update((name, SimpleNamespace(name=name)) for name in names)


def packet(src, dst, dst_port=0, src_port=0, protocol=6, **values):
    """A packet of a connection between two address texts, TCP unless told otherwise."""
    return Packet(protocol, address(src, src_port), address(dst, dst_port), src_port, dst_port, **values)


def winner(*args, **values):
    """The service that the rules choose for packet(...), or None."""
    decision = Globals.rules.evaluate(packet(*args, **values))
    return decision.service_name if decision is not None else None


def matching(*args, **values):
    """{rule id: scores} of the rules that match packet(...), the winner first."""
    return {rule.rule_id: scores for scores, rule in Globals.rules.explain(packet(*args, **values))}
