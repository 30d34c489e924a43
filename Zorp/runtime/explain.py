"""What a policy does with a connection, and why: zorp --explain, zorpctl explain.

    zorp --as intra --explain "tcp 10.1.0.2 203.0.113.80:80 eth1"
    zorp --as intra --explain "service office_http"

Theory of operation
    The policy is loaded in a child without privileges (Zorp.runtime.check).  explain() answers a
    question about a connection with plain data: zones (of the client, of the address that it connects
    to, which for a dispatcher is ours, and of each server), the listener that takes it, the winning
    rule and the ones that came near, the service with everything it would use, and whether the
    zones permit it.  text() puts the same into words; --json prints the data.

    Rules are judged by the engine that judges connections.  Sites' own getService() is asked as
    a reload with revocation asks it (Zorp.runtime.decision).  Nothing is resolved, nothing is
    connected to: addresses of zones' host names are not known here, so a policy with such zones gets
    its answer under a condition, and where the real one is found (kzorp --evaluate).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

from Zorp import Globals
from Zorp.acceptance.binds import DBSockAddr
from Zorp.Chainer import StateBasedChainer
from Zorp.Config import config
from Zorp.Constants import (
    Z_KEEPALIVE_BOTH,
    Z_KEEPALIVE_CLIENT,
    Z_KEEPALIVE_NONE,
    Z_KEEPALIVE_SERVER,
    Z_PORT_ANY,
    Z_PORT_EXACT,
    Z_PORT_GROUP,
    Z_PORT_RANDOM,
    ZD_PROTO_TCP,
    ZD_PROTO_UDP,
)
from Zorp.Dispatch import RuleDispatcher
from Zorp.Router import DirectedRouter, InbandRouter, TransparentRouter
from Zorp.rules.explanation import COMPONENTS, conditions, lost_by, unmet
from Zorp.runtime.decision import Arrival, Refused, dispatcher_for, permit, service_for, sock_addr
from Zorp.Service import DenyService, PFService
from Zorp.transport.hostaddr import is_own_address
from Zorp.Zone import Zone

MOST_RULES = 5                   # that lost, and that came near
_DEFAULT_CLIENT_PORT = 1024
_WILDCARDS = ("0.0.0.0", "::")
_ADDRESS = re.compile(r"(?:\[(?P<v6>[^\]]+)\]|(?P<v4>[^:\[\]]+)|(?P<bare6>[0-9A-Fa-f:.]+))(?::(?P<port>[0-9]{1,5}))?")
_SERVICE_SETTINGS = ("snat_policy", "dnat_policy", "authentication_policy", "authorization_policy", "encryption_policy",
                     "max_instances", "limit_target_zones_to")
_KEEPALIVE = {Z_KEEPALIVE_CLIENT: "of the client's connection", Z_KEEPALIVE_SERVER: "of the server's connection",
              Z_KEEPALIVE_BOTH: "of both connections"}
_PORTS = {Z_PORT_GROUP: "Z_PORT_GROUP", Z_PORT_EXACT: "Z_PORT_EXACT", Z_PORT_RANDOM: "Z_PORT_RANDOM"}
_PROTOCOLS = {"tcp": ZD_PROTO_TCP, "udp": ZD_PROTO_UDP}
USAGE = "write: tcp|udp CLIENT[:PORT] SERVER:PORT [INTERFACE], or: service NAME; IPv6 addresses in []"


class QuestionError(ValueError):
    """The question makes no sense; `str()` says what to write."""


def read_question(text: str) -> Arrival | str:
    """Return the connection, or the name of the service, that is asked about.  Raises QuestionError."""
    words = text.split()
    if len(words) == 2 and words[0] == "service":
        return words[1]
    if len(words) not in (3, 4) or words[0].lower() not in _PROTOCOLS:
        raise QuestionError(USAGE)
    client = _address(words[1], _DEFAULT_CLIENT_PORT)
    server = _address(words[2], None)
    if (":" in client[0]) != (":" in server[0]):
        raise QuestionError("client and server are of different address families")
    return Arrival(_PROTOCOLS[words[0].lower()], client, server, iface=words[3] if len(words) == 4 else None)


def _address(text: str, default_port: int | None) -> tuple[str, int]:
    found = _ADDRESS.fullmatch(text)
    port = int(found["port"]) if found is not None and found["port"] else default_port
    if "%" in text:                      # the interface has a place of its own in the question
        raise QuestionError(f"an address without its interface is expected: {text}; {USAGE}")
    try:
        address = str(ipaddress.ip_address((found["v6"] or found["v4"] or found["bare6"]) if found else text))
    except ValueError:
        raise QuestionError(f"not an IP address: {text}; {USAGE}") from None
    if port is None or not 0 < port <= 65_535:
        raise QuestionError(f"no port in {text}; {USAGE}")
    return address, port


# ---------------------------------------------------------------------------- the answer, as data

def explain(question: Arrival | str) -> dict:
    """Return the answer as plain data.  Raises QuestionError for a service that does not exist."""
    if isinstance(question, str):
        if question not in Globals.services:
            known = ", ".join(sorted(Globals.services)) or "none"
            raise QuestionError(f"no such service: {question}; the policy has: {known}")
        return {"service": _service(Globals.services[question], None), "rules": _rules_for(question)}
    answer = {"client": list(question.client), "server": list(question.destination), "interface": question.iface,
              "protocol": "UDP" if question.protocol == ZD_PROTO_UDP else "TCP",
              "client_zone": _zone(question.client), "destination_zone": _zone(question.destination),
              "listener": None, "rule": None, "service": None, "refused": None,
              "unresolved_zones": sorted(name for name, zone in Globals.zones.items() if zone.hostnames)}
    question = question._replace(listener=_own_listener(question))
    try:
        dispatcher = dispatcher_for(question)
        is_by_rules = isinstance(dispatcher, RuleDispatcher)
        answer["listener"] = {"class": type(dispatcher).__name__, "by_rules": is_by_rules,
                              "bind": ", ".join(str(dispatch.chain.bind) for dispatch in dispatcher.dispatches),
                              "place": _place(dispatcher)}
        if is_by_rules:
            answer["rule"], answer["lost"], answer["near"] = _rules(question)
        service = service_for(question)
        answer["service"] = _service(service, question)
        permit(service, question)
    except Refused as reason:
        answer["refused"] = str(reason)
    return answer


def _own_listener(question: Arrival) -> tuple | None:
    """Return the bind key of the policy's listener at the destination; None: packets reach the rules."""
    address, port = question.destination
    for chain in Globals.dispatch_table.chains():
        bind = chain.bind
        if chain.params.rule_chain or chain.protocol != question.protocol or not isinstance(bind, DBSockAddr):
            continue
        is_here = bind.sa.ip_s == address or (
            bind.sa.ip_s in _WILDCARDS and is_own_address(sock_addr(question.destination).pack()))
        ports = [port_range for entry in chain.entries for dispatcher in Globals.dispatches
                 if entry in dispatcher.dispatches for port_range in dispatcher.rule_port]
        if (is_here and bind.sa.port == port) or (chain.params.transparent and _in(port, ports)):
            return tuple(bind.key())
    return None


def _in(port: int, ranges: list[tuple[int, int]]) -> bool:
    return any(low <= port <= high for low, high in ranges)


def _zone(address: tuple[str, int]) -> dict | None:
    zone = Zone.lookup(sock_addr(address))
    if zone is None:
        return None
    path = []
    above = zone
    while above is not None:
        path.append(above.getName())
        above = above.admin_parent
    value = sock_addr(address)
    nets = [str(net) for net in zone.subnets if net.contains(value)]
    return {"name": path[0], "inside": path[1:], "because": nets[-1] if nets else None}


def _rules(question: Arrival) -> tuple[dict | None, list[dict], list[dict]]:
    """Return the winning rule, those that match too, and those that nearly match."""
    ranking = Globals.rules.explain(question.packet)
    winner = None
    if ranking:
        rule = ranking[0][1]
        winner = {**_rule(rule), "conditions": {name: conditions(rule, name) for name in _asked(rule)}}
    lost = [{**_rule(rule), "because": _because(ranking[0], (other, rule))}
            for other, rule in ranking[1:1 + MOST_RULES]]
    traffic, parents = Globals.rules.traffic_of(question.packet)
    matching = {rule.rule_id for _, rule in ranking}
    near = [(unmet(rule, traffic, parents), rule) for rule in Globals.rules.data()
            if rule.rule_id not in matching] if traffic is not None else []
    near.sort(key=lambda item: (len(item[0]), item[1].rule_id))
    return winner, lost, [{**_rule(rule), "because": problems} for problems, rule in near[:MOST_RULES]
                          if len(problems) == len(near[0][0])]


def _asked(rule) -> list[str]:
    return [component for component in COMPONENTS if conditions(rule, component) != "anything"]


def _because(winner, loser) -> str:
    component = lost_by(winner[0], loser[0])
    if component is None:
        return f"equally specific, and rule {winner[1].rule_id} has the lower id"
    return (f"less specific in {component}: it asks for {conditions(loser[1], component)}, "
            f"rule {winner[1].rule_id} for {conditions(winner[1], component)}")


def _rule(rule) -> dict:
    return {"rule_id": rule.rule_id, "service": rule.service, "place": _place(Globals.rules.by_id(rule.rule_id))}


def _rules_for(service: str) -> list[dict]:
    rules = Globals.rules.data() if Globals.rules is not None else ()
    return [{**_rule(rule), "conditions": {name: conditions(rule, name) for name in _asked(rule)}}
            for rule in rules if rule.service == service]


def _place(thing) -> str | None:
    place = getattr(thing, "place", None)
    return str(place) if place is not None else None


def _service(service, question: Arrival | None) -> dict:
    if isinstance(service, DenyService):
        return {"name": service.name, "kind": "refuses", "place": _place(service)}
    is_forwarded = isinstance(service, PFService)
    value = {"name": service.name, "place": _place(service),
             "kind": "the packet filter forwards" if is_forwarded else "a proxy serves",
             "proxy": None if is_forwarded else _class(service.proxy_class),
             "router": {"class": type(service.router).__name__, "target": _target(service.router),
                        "settings": _router_settings(service)},
             "chainer": type(service.chainer).__name__, "chainer_settings": _chainer_settings(service.chainer)}
    targets = _targets(service.router, question) if question is not None else []
    value["servers"] = [{"address": list(target), "zone": _zone(target), "refused": _refusal(service, question, target)}
                        for target in targets]
    for name in _SERVICE_SETTINGS:
        found = getattr(service, name, None)
        if found:
            value[name] = _nat(found) if name.endswith("nat_policy") else _plain(found)
    if getattr(service, "keepalive", Z_KEEPALIVE_NONE):
        value["keepalive"] = _KEEPALIVE[service.keepalive]
    return value


def _router_settings(service) -> dict[str, str]:
    """Return what the router is told beyond its target, in words."""
    router, settings = service.router, {}
    if getattr(router, "forge_addr", False):
        settings["forge_addr"] = "TRUE, the server sees the client's address" + (
            " as the snat_policy translates it" if getattr(service, "snat_policy", None) else "")
    port = getattr(router, "forge_port", Z_PORT_ANY)
    if port != Z_PORT_ANY:
        settings["forge_port"] = _PORTS.get(port, str(port))
    freedoms = {"overrideable": "TRUE, the proxy may take another server",
                "permit_local_targets": "TRUE, also loopback, broadcast and multicast"}
    return settings | {name: meaning for name, meaning in freedoms.items() if getattr(router, name, False)}


def _chainer_settings(chainer) -> dict[str, str]:
    """Return the times that differ from those of every chainer, and what it sends first."""
    settings = {}
    connect_ms = getattr(chainer, "timeout_connect", None)
    if connect_ms and connect_ms != config.options.timeout_server_connect:
        settings["timeout_connect"] = f"{connect_ms} ms"
    if isinstance(chainer, StateBasedChainer):
        settings["timeout_state"] = f"{1000 * chainer.state.timeout} ms"
    if getattr(chainer, "proxy_protocol", 0):
        settings["proxy_protocol"] = str(chainer.proxy_protocol)
    return settings


def _plain(value) -> object:
    if isinstance(value, (int, str)):
        return value
    return list(value) if isinstance(value, tuple) else str(getattr(value, "name", type(value).__name__))


def _nat(policy) -> str:
    return f"{policy.name} ({type(policy.nat).__name__})"


def _class(proxy_class: type) -> dict:
    names = [cls.__name__ for cls in proxy_class.__mro__]
    config = next((cls for cls in proxy_class.__mro__ if "config" in vars(cls)), proxy_class)
    code = getattr(vars(config).get("config"), "__code__", None)
    is_site = not proxy_class.__module__.startswith("Zorp.")
    built_in = next((cls.__name__ for cls in proxy_class.__mro__ if cls.__module__.startswith("Zorp.")), names[0])
    return {"class": names[0], "built_on": built_in if is_site else None,
            "config": f"{code.co_filename}:{code.co_firstlineno}" if code is not None and is_site else None}


def _target(router) -> str:
    if isinstance(router, DirectedRouter):
        return "always to " + ", ".join(
            _shown([address.ip_s, address.port]) if hasattr(address, "ip_s") else str(address)
            for address in router.dest_addr)
    if isinstance(router, InbandRouter):
        return "where the client says in the protocol"
    if isinstance(router, TransparentRouter):
        port = f", port {router.forced_port}" if router.forced_port else ""
        return f"the server that the client addressed{port}"
    return "as the router of the site decides"


def _targets(router, question: Arrival) -> list[tuple[str, int]]:
    if isinstance(router, DirectedRouter):
        return [(address.ip_s, address.port or question.destination[1]) for address in router.dest_addr
                if hasattr(address, "ip_s")]
    if isinstance(router, TransparentRouter):
        return [(question.destination[0], router.forced_port or question.destination[1])]
    return []


def _refusal(service, question: Arrival, target: tuple[str, int]) -> str | None:
    try:
        permit(service, question._replace(server=target))
    except Refused as reason:
        return str(reason)
    return None


# ---------------------------------------------------------------------------- the answer, in words

def text(answer: dict) -> str:
    """Return the answer in words."""
    return "\n".join(_lines(answer))


def _lines(answer: dict) -> Iterator[str]:
    if "client" in answer:
        iface = f" on {answer['interface']}" if answer["interface"] else ", interface unknown"
        yield f"{answer['protocol']} {_shown(answer['client'])} -> {_shown(answer['server'])}{iface}"
        yield f"client zone: {_zone_words(answer['client_zone'])}"
        listener = answer["listener"]
        is_ours = listener is not None and not listener["by_rules"]
        what = "zone of the address that the client connects to" if is_ours else "server zone"
        yield f"{what}: {_zone_words(answer['destination_zone'])}"
        if listener is not None:
            kind = "the rules of the policy" if listener["by_rules"] else f"{listener['class']} on {listener['bind']}"
            yield f"taken by: {kind}"
        yield from _rule_lines(answer)
    if answer["service"] is not None:
        yield from _service_lines(answer["service"])
    for rule in answer.get("rules", []):
        yield f"used by: {_rule_words(rule)}; {_conditions_words(rule)}"
    doubt = _doubt(answer)
    if doubt:
        yield doubt
    unless = ", unless a host name has one of these addresses" if doubt else ""
    if answer.get("refused"):
        yield f"REFUSED: {answer['refused']}{unless}"
    elif answer["service"] is not None and "client" in answer:
        yield _outcome(answer["service"]) + unless


def _doubt(answer: dict) -> str:
    """Return what makes the answer uncertain; empty: nothing."""
    zones = answer.get("unresolved_zones")
    if not zones:
        return ""
    shown = ", ".join(zones[:MOST_RULES]) + (", ..." if len(zones) > MOST_RULES else "")
    return (f"UNCERTAIN: host names are not resolved here; zones that have some: {shown}; kzorp "
            "--evaluate knows their addresses")


def _outcome(service: dict) -> str:
    if service["kind"] == "refuses":
        return "REFUSED: the service denies"
    if service["servers"] and all(server["refused"] for server in service["servers"]):
        return f"REFUSED when it connects: {service['servers'][0]['refused']}"
    return f"PERMITTED by service {service['name']}"


def _rule_lines(answer: dict) -> Iterator[str]:
    rule = answer.get("rule")
    if rule is not None:
        yield f"rule: {_rule_words(rule)}"
        yield f"    it asks for {_conditions_words(rule)}"
    for other in answer.get("lost", []):
        yield f"    it matches, too, but lost: {_rule_words(other)}"
        yield f"        {other['because']}"
    for other in answer.get("near", []):
        yield f"    it does not match: {_rule_words(other)}"
        for reason in other["because"]:
            yield f"        {reason}"


def _service_lines(service: dict) -> Iterator[str]:
    place = f" ({service['place']})" if service["place"] else ""
    yield f"service: {service['name']}{place}, {service['kind']}"
    if service["kind"] == "refuses":
        return
    if service["proxy"] is not None:
        proxy = service["proxy"]
        built_on = f", built on {proxy['built_on']}" if proxy["built_on"] else ""
        config = f", config at {proxy['config']}" if proxy["config"] else ""
        yield f"    proxy: {proxy['class']}{built_on}{config}"
    router = service["router"]
    yield f"    router: {router['class']}, {router['target']}"
    yield from (f"        {name}: {meaning}" for name, meaning in router["settings"].items())
    yield f"    chainer: {service['chainer']}"
    yield from (f"        {name}: {meaning}" for name, meaning in service["chainer_settings"].items())
    if "keepalive" in service:
        yield f"    keepalive: {service['keepalive']}"
    for server in service["servers"]:
        yield f"    server: {_shown(server['address'])} in zone {_zone_words(server['zone'])}" + (
            f"; refused: {server['refused']}" if server["refused"] else "")
    for name in _SERVICE_SETTINGS:
        if name in service:
            found = service[name]
            yield f"    {name}: {', '.join(found) if isinstance(found, list) else found}"


def _rule_words(rule: dict) -> str:
    place = f" ({rule['place']})" if rule["place"] else ""
    return f"{rule['rule_id']}{place}, service {rule['service']}"


def _conditions_words(rule: dict) -> str:
    return "; ".join(f"{name}: {asked}" for name, asked in rule["conditions"].items()) or "nothing, it takes everything"


def _shown(address: list) -> str:
    return f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"


def _zone_words(zone: dict | None) -> str:
    if zone is None:
        return "none (zones by host name are not looked up here)"
    because = f" ({zone['because']})" if zone["because"] else ""
    return zone["name"] + because + (f" inside {' inside '.join(zone['inside'])}" if zone["inside"] else "")
