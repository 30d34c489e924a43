"""Rules: which service takes which traffic.

    Rule(src_zone="office", dst_zone="internet", dst_port=(80, PortRange(8000, 8099)), service="web")

Among the rules that match a connection the most specific one wins, not the first: the order of
rules in a policy means nothing.  Zorp.rules.engine decides, Zorp.rules.conditions explains what a
keyword takes.

Theory of operation
    A Rule checks its keywords, keeps them as plain data and joins Globals.rules, the RuleSet of
    the instance.  The set numbers rules that have no id, compiles all of them, and decides:
    RuleSet.decide(socket, ...) for connections, evaluate(packet) for questions.  check() compiles
    when the policy is complete, and reports what looks like a mistake; without it the first
    connection does.

    A rule outside any instance function belongs to every instance that loads the file.

Deviations from the original
    Rules without an id are numbered when all explicit ids are known; an explicit id can no
    longer collide with one that was given away before.  Conditions that the kernel module
    refused at the end of the load are refused where they are written.

Rules are made while a policy loads.  decide() and evaluate() may be called by any thread.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from typing import NamedTuple

from Zorp import Globals
from Zorp.Base import BaseZone
from Zorp.Constants import AF_INET6, CORE_DEBUG, CORE_INFO, CORE_POLICY
from Zorp.Exceptions import PolicyError
from Zorp.language import arguments
from Zorp.language.caller import policy_caller
from Zorp.Log import log
from Zorp.rules import denials
from Zorp.rules.by_name import Strictness, hanging_on_names
from Zorp.rules.conditions import ALIASES, PortRange, read_conditions, read_description
from Zorp.rules.description import ZoneData
from Zorp.rules.engine import DIMENSIONS, NetData, RuleData, RuleEngine, Traffic
from Zorp.rules.lint import nets_for_everyone, shadowed
from Zorp.Service import DenyService, PFService
from Zorp.SockAddr import from_sockaddr
from Zorp.transport.interfaces import incoming_interface, interfaces
from Zorp.transport.stream import kind_of
from Zorp.Util import makeSequence
from Zorp.Zone import Zone, claimants
from Zorp.zones.table import unmapped_address, unmapped_net

__all__ = ["PortRange", "Rule", "RuleSet"]

_TCP, _UDP, _DATAGRAMS = int(socket.IPPROTO_TCP), int(socket.IPPROTO_UDP), int(socket.SOCK_DGRAM)
_MAX_ID = 0xFFFFFFFF
_MOST_REPORTS = 100              # of rules that can never win, one by one; the rest is counted


class Packet(NamedTuple):
    """A connection as rules see it: its first packet, original direction, before any NAT."""

    protocol: int                        # IP protocol number
    src: object                          # SockAddr
    dst: object                          # SockAddr: what the client asked for
    src_port: int = 0                    # 0 unless TCP or UDP
    dst_port: int = 0
    iface: str | None = None             # None: unknown; interface conditions do not match then
    ifgroup: int | None = None
    proto_type: int = -1                 # -1 unless ICMP
    proto_subtype: int = -1
    reqids: tuple = ()                   # of the IPsec transforms that it came through
    dst_on_iface: bool = False           # the destination is an address of the incoming interface
    sock: socket.socket | None = None    # where to find the three interface fields if a rule needs them


class Decision(NamedTuple):
    """The winner for a packet."""

    service_name: str
    rule_id: int
    client_zone: BaseZone | None
    server_zone: BaseZone | None


class Rule:
    """A rule of the instance.

    Arguments (keywords only; one value or a sequence of values each, all optional):
        service: name of the service to start.
        rule_id: number from 1 to 4294967295; of rules that are equally specific the lower wins.
        iface (src_iface), ifgroup (src_ifgroup), reqid: where the connection came in.
        proto, proto_type (icmp_type), proto_subtype (icmp_code): IP protocol, ICMP type and code.
        src_port, dst_port: number, "80", "80,8000:8099", or PortRange(low, high).
        src_subnet, dst_subnet: "address/bits", InetSubnet or Inet6Subnet.
        src_zone, dst_zone: names of zones; the zones below them are included.
        dst_iface, dst_ifgroup: the destination is an address of the incoming interface, which
            has this name or group.
        detect: (detector, service) pairs.

    Raises PolicyError.
    """

    place = None                         # where the policy makes the rule; None: unknown
    dimension_aliases = ALIASES
    valid_dim_names = (*DIMENSIONS, "src_subnet6", "dst_subnet6")
    valid_dimensions = dict.fromkeys(valid_dim_names, True)

    def __init__(self, **kw):
        self._read(kw)
        self.place = policy_caller()
        if Globals.rules is None:
            Globals.rules = RuleSet()
        Globals.rules.add(self)

    def _read(self, keywords):
        """Check the keywords and keep them as data."""
        keywords = dict(keywords)
        self.rule_id = self._checked_id(keywords.pop("rule_id", None))
        self.has_own_id = self.rule_id is not None
        service, detect = keywords.pop("service", None), keywords.pop("detect", None)
        named = [f"in rule {self.rule_id or 'without id'}"] if self.rule_id or service is not None else []
        named += [f"for service '{service}'"] if service is not None else []
        try:
            if detect is not None:
                refuse_detect(detect, service)
            self.service = _known_service(service)
            self.dimensions = read_conditions(keywords)
        except PolicyError as error:
            raise PolicyError(error.problem, remedy=": ".join(filter(None, (" ".join(named), error.remedy)))) from None

    @classmethod
    def from_description(cls, description):
        """Make a rule of a dictionary as NDimensionDispatcher takes it; it joins no set."""
        described = read_description(description)
        rule = cls.__new__(cls)
        rule._read({**described.conditions, "service": described.service, "rule_id": described.rule_id})
        return rule

    @staticmethod
    def _checked_id(rule_id):
        if rule_id is not None and (not isinstance(rule_id, int) or not 1 <= rule_id <= _MAX_ID):
            raise PolicyError(f"Invalid rule id; rule_id='{rule_id}'", remedy=f"give a number from 1 to {_MAX_ID}")
        return rule_id

    def getId(self):
        """Return the id; a rule that was given none gets one that no rule has so far."""
        if self.rule_id is None and Globals.rules is not None:
            Globals.rules.number()
        return self.rule_id

    def setId(self, rule_id):
        """Set the id; the rule set does this for rules that were given none."""
        self.rule_id = self._checked_id(rule_id)

    def data(self):
        """Return the rule as plain data, for evaluation and for compilers of packet rules."""
        return RuleData(rule_id=self.rule_id, service=self.service, **self.dimensions)

    def buildKZorpMessage(self, dispatcher_name):
        """Return the rule as a list of messages, plain dictionaries, for a rule set of this name."""
        return [{"message": "add rule", "dispatcher": dispatcher_name, "rule_id": self.getId(),
                 "service": self.service, "dimensions": dict(self.dimensions)}]

    def __repr__(self):
        conditions = "".join(f", {name}={values!r}" for name, values in self.dimensions.items())
        return f"Rule(rule_id={self.rule_id}, service={self.service!r}{conditions})"


def _strictness_of(service):
    if isinstance(service, DenyService):
        return Strictness.REFUSED
    return Strictness.FORWARDED if isinstance(service, PFService) else Strictness.PROXIED


def _known_service(service):
    if not isinstance(service, str) or service not in Globals.services:
        raise PolicyError(f"No valid service was specified for the rule; service='{service}'",
                          remedy="give service= the name of a service that is defined above the rule")
    return service


def refuse_detect(detect, default):
    """Check what detect= names; raises PolicyError in any case, because nothing here detects protocols yet."""
    if hasattr(detect, "items"):
        log(None, CORE_DEBUG, 3,
            "Using dictionary in the detect parameter is deprecated, list should be used instead.")
    pairs = detect.items() if hasattr(detect, "items") else makeSequence(detect)
    for detector, service in pairs:
        if detector not in Globals.detectors:
            raise PolicyError(f"No such detector defined; detector='{detector}'",
                              remedy="define it with DetectorPolicy above the rule")
        if service not in Globals.services:
            raise PolicyError(f"No such service defined; service='{service}'", remedy="define it above the rule")
    if default is not None and default not in Globals.services:
        raise PolicyError(f"No valid default service was specified for the rule; service='{default}'",
                          remedy="define it above the rule")
    raise PolicyError("Protocol detection is not built yet", remedy="give service= one service instead of detect=")


class _Address(NamedTuple):
    """As much of an address as a look-up of zones needs."""

    family: int
    ip_int: int


def _zone_facts():
    """Return what is known of the zones of the policy, as data."""
    def zone_at(family, value):
        zone = Zone.lookup(_Address(family, value))
        return zone.name if zone is not None else None

    return denials.ZoneFacts(
        parents={name: zone.admin_parent.name if zone.admin_parent is not None else None
                 for name, zone in Globals.zones.items()},
        nets={name: [NetData(*unmapped_net(net.family, net.network_int, net.mask_bits)) for net in zone.subnets]
              for name, zone in Globals.zones.items()},
        zone_at=zone_at)


class RuleSet:
    """The rules of an instance, and the decision between them.

    Loading fills it in one thread.  _engine_lock guards the making of _engine; decisions read
    _engine without it, because an engine is replaced as a whole.
    """

    def __init__(self):
        self._rules: list[Rule] = []
        self._by_id: dict[int, Rule] = {}
        self._engine_lock = threading.Lock()
        self._engine: RuleEngine | None = None
        self._engine_zones = 0                   # number of zones when the engine was made

    @classmethod
    def from_descriptions(cls, descriptions):
        """Return the set of rules that a sequence of dictionaries describes (NDimensionDispatcher)."""
        rules = cls()
        remedy = "give a list of dictionaries: [{'dst_port': 443, 'service': 'web'}]"
        for description in arguments.items("a dispatcher", "rules", descriptions, remedy):
            if not isinstance(description, Mapping):
                raise arguments.invalid("a dispatcher", "rules", description, remedy)
            rules.add(Rule.from_description(description), duplicate="Duplicated rule_id found; rule_id=%d")
        return rules

    # ------------------------------------------------------------------ filled while a policy loads

    def add(self, rule, duplicate="Duplicate rule id found; id='%d'"):
        """Take a rule into the set; raises PolicyError when another rule was given its id."""
        holder = self._by_id.get(rule.rule_id)
        if holder is not None and holder.has_own_id and rule.has_own_id:
            raise PolicyError(duplicate % rule.rule_id,
                              remedy=f"rules for services '{holder.service}' and '{rule.service}' need different ids")
        if rule.has_own_id and holder is not None:
            self._forget_numbers()
        self._rules.append(rule)
        if rule.has_own_id:
            self._by_id[rule.rule_id] = rule
        self._engine = None

    def _forget_numbers(self):
        for rule in self._rules:
            if not rule.has_own_id:
                rule.setId(None)
        self._by_id = {rule.rule_id: rule for rule in self._rules if rule.has_own_id}

    def number(self):
        """Give every rule without an id the lowest number that no rule has, in the order of their definition."""
        number = 1
        for rule in self._rules:
            if rule.rule_id is None:
                while number in self._by_id:
                    number += 1
                rule.setId(number)
                self._by_id[number] = rule

    @property
    def length(self):
        """The number of rules."""
        return len(self._rules)

    def __len__(self):
        return len(self._rules)

    def __iter__(self):
        """Iterate over the rules by ascending id."""
        self.number()
        return iter(sorted(self._rules, key=lambda rule: rule.rule_id))

    def data(self):
        """Return the rules as plain data, by ascending id."""
        return tuple(rule.data() for rule in self)

    def check(self):
        """Compile the complete set, and report rules that can never win and other surprises."""
        engine = self._compile()
        losers = list(shadowed(engine))
        for loser, winner in losers[:_MOST_REPORTS]:
            log(None, CORE_POLICY, 2, "Rule can never win; rule_id='%d', service='%s', place='%s', winner='%d', "
                "instead='%s', winner_place='%s'", (loser.rule_id, loser.service, self._place_of(loser),
                                                    winner.rule_id, winner.service, self._place_of(winner)))
        if len(losers) > _MOST_REPORTS:
            log(None, CORE_POLICY, 2, "More rules can never win; number='%d'", (len(losers) - _MOST_REPORTS,))
        self._report_holes(engine)
        self._report_names(engine)
        for rule, dimension in nets_for_everyone(engine.rules):
            log(None, CORE_POLICY, 3, "Subnet of length 0 outranks every zone condition; rule_id='%d', dimension='%s'",
                (rule.rule_id, dimension))
        if engine.incoming.reqids:
            log(None, CORE_POLICY, 2, "Conditions on IPsec request ids do not match here; reqids='%s'",
                (",".join(map(str, sorted(engine.incoming.reqids))),))
        log(None, CORE_INFO, 4, "Rules compiled; rules='%d', zones='%d'", (len(engine.rules), len(Globals.zones)))

    def _report_holes(self, engine):
        """Name rules that deny and lose to a permitting one; see Zorp.rules.denials."""
        denying = {rule.service for rule in engine.rules if isinstance(Globals.services.get(rule.service), DenyService)}
        if not denying:
            return
        for hole in denials.holes(engine, denying, _zone_facts()):
            loser, winner = hole.denial, hole.winner
            log(None, CORE_POLICY, 2,
                "Deny rule loses to a permitting one; rule_id='%d', service='%s', place='%s', winner='%d', "
                "permits='%s', winner_place='%s', winner_is_narrower_in='%s', denial_is_narrower_in='%s'; give the "
                "deny rule the %s as well, or the permitting one the %s",
                (loser.rule_id, loser.service, self._place_of(loser), winner.rule_id, winner.service,
                 self._place_of(winner), hole.decided_by, hole.narrower_in, hole.decided_by, hole.narrower_in))

    def _report_names(self, engine):
        """Name rules that restrict by host name what others let pass; see Zorp.rules.by_name."""
        if not Zone.has_dynamic_subnet:
            return
        zones = [ZoneData(name=zone.name, parent=zone.admin_parent.name if zone.admin_parent is not None else None,
                          nets=tuple(zone.subnets), hostnames=tuple(zone.hostnames)) for zone in Globals.zones.values()]
        strictness = {rule.service: _strictness_of(Globals.services.get(rule.service)) for rule in engine.rules}
        for hanging in hanging_on_names(engine.rules, strictness, zones):
            rule, broader = hanging.rule, hanging.broader
            log(None, CORE_POLICY, 2,
                "Rule restricts by host name, while the name has no known address another rule decides; rule_id='%d', "
                "service='%s', place='%s', zone='%s', hostname='%s', instead='%d', its_service='%s', its_place='%s'; "
                "give the zone the addresses, too, or permit by host name and let nothing else pass",
                (rule.rule_id, rule.service, self._place_of(rule), hanging.zone, hanging.hostname, broader.rule_id,
                 broader.service, self._place_of(broader)))

    def _place_of(self, rule):
        return self._by_id[rule.rule_id].place or "unknown"

    def _compile(self):
        with self._engine_lock:
            if self._engine is None or self._engine_zones != len(Globals.zones):
                parents = {name: zone.admin_parent.name if zone.admin_parent is not None else None
                           for name, zone in Globals.zones.items()}
                self._engine_zones = len(parents)
                self._engine = RuleEngine(self.data(), parents)
            return self._engine

    # ------------------------------------------------------------------ decisions

    def decide(self, sock, remote, local, client_zone=None):
        """Return (the rule that wins or None, client zone, server zone) for an accepted socket; the rule is RuleData.

        remote, local: the SockAddrs that the session goes by.
        client_zone: the zone of `remote`, where it is known already.
        """
        engine = self._present_engine()
        client_zone, server_zone = client_zone or Zone.lookup(remote), Zone.lookup(local)
        numbers = _numbers(remote, local)
        if numbers is None:
            return None, client_zone, server_zone
        family, src, dst = numbers
        interface = _interface_of(engine, sock, family, dst) if engine.uses_interface else None
        iface, ifgroup, dst_on_iface = interface or (None, None, False)
        traffic = Traffic(family, src, dst, _ip_protocol(sock), remote.port, local.port, -1, -1, iface, ifgroup, (),
                          dst_on_iface, client_zone.name if client_zone is not None else None,
                          server_zone.name if server_zone is not None else None)
        return self._winner(engine, remote, local, traffic), client_zone, server_zone

    def zones_of(self, packet):
        """Return (client zone, server zone) of a packet; None where no zone holds the address."""
        return Zone.lookup(packet.src), Zone.lookup(packet.dst)

    def evaluate(self, packet):
        """Return the Decision for a Packet; None: no rule matches, nothing may pass."""
        engine = self._present_engine()
        client_zone, server_zone = self.zones_of(packet)
        traffic = _traffic(engine, packet, client_zone, server_zone)
        if traffic is None:
            return None
        rule = self._winner(engine, packet.src, packet.dst, traffic)
        return Decision(rule.service, rule.rule_id, client_zone, server_zone) if rule is not None else None

    def _present_engine(self):
        engine = self._engine
        if engine is None or self._engine_zones != len(Globals.zones):
            engine = self._compile()
        return engine

    @staticmethod
    def _winner(engine, src, dst, traffic):
        return engine.best(traffic) if not Zone.zone_subnet_tree.has_disputes else _agreed(engine, traffic, src, dst)

    def explain(self, packet):
        """Return [(eight scores, RuleData)] of all rules that match a packet, the winner first."""
        engine = self._compile()
        traffic = _traffic(engine, packet, *self.zones_of(packet))
        return engine.ranking(traffic) if traffic is not None else []

    def traffic_of(self, packet):
        """Return (what the engine sees of a packet, parents of zones); no traffic for what is not IP."""
        traffic = _traffic(self._compile(), packet, *self.zones_of(packet))
        return traffic, {name: zone.admin_parent.name if zone.admin_parent is not None else None
                         for name, zone in Globals.zones.items()}

    def by_id(self, rule_id):
        """Return the rule of this id; None when there is none."""
        self.number()
        return self._by_id.get(rule_id)

    def result_for_socket(self, family, fd):
        """Return (client zone, server zone, set name, service, rule id) for a connected socket, names or None.

        None when no rule matches.  The form is that of the original's getKZorpResult().
        """
        with socket.socket(fileno=fd) as sock:
            try:
                rule, *zones = self.decide(sock, from_sockaddr(family, sock.getpeername()),
                                           from_sockaddr(family, sock.getsockname()))
            finally:
                sock.detach()
        if rule is None:
            return None
        names = (zone.getName() if zone is not None else None for zone in zones)
        return (*names, Globals.instance_name, rule.service, rule.rule_id)


def packet_of(sock, remote, local):
    """Return the Packet of an accepted socket; `remote` and `local` are the SockAddrs the session goes by."""
    return Packet(_ip_protocol(sock), remote, local, remote.port, local.port, sock=sock)


def _ip_protocol(sock):
    return _UDP if kind_of(sock) == _DATAGRAMS else _TCP


def _agreed(engine, traffic, src, dst):
    """Return the rule that wins whichever zones disputed addresses are in; None, and logged, when there is none."""
    clients, servers = ([found, *(zone.name for zone in claimants(address))] for found, address in
                        ((traffic.src_zone, src), (traffic.dst_zone, dst)))
    if len(clients) == len(servers) == 1:
        return engine.best(traffic)
    ranked, is_agreed = engine.agreed(traffic, clients, servers)
    if is_agreed:
        return ranked[1] if ranked is not None else None
    log(None, CORE_POLICY, 2, "Host names of several zones have an address of a connection, and the zones do not "
        "permit the same; client='%s', client_zones='%s', server='%s', server_zones='%s'",
        (src, _names(clients), dst, _names(servers)))
    return None


def _names(zones):
    return ",".join(zone or "(none)" for zone in zones)


def _traffic(engine, packet, client_zone, server_zone):
    """Return what the engine takes; None for addresses that are not IP, or not of one family."""
    numbers = _numbers(packet.src, packet.dst)
    if numbers is None:
        return None
    family, src, dst = numbers
    iface, ifgroup, dst_on_iface = packet.iface, packet.ifgroup, packet.dst_on_iface
    if engine.uses_interface and packet.sock is not None and iface is None:
        iface, ifgroup, dst_on_iface = (_interface_of(engine, packet.sock, family, dst)
                                        or (iface, ifgroup, dst_on_iface))
    return Traffic(family, src, dst, packet.protocol, packet.src_port, packet.dst_port, packet.proto_type,
                   packet.proto_subtype, iface, ifgroup, packet.reqids, dst_on_iface,
                   client_zone.name if client_zone is not None else None,
                   server_zone.name if server_zone is not None else None)


def _numbers(src, dst):
    """Return (family, source, destination) as the engine takes them; None: not IP, or not of one family."""
    src_number, dst_number = getattr(src, "ip_int", None), getattr(dst, "ip_int", None)
    if src_number is None or dst_number is None:
        return None
    family = src.family
    if family != dst.family:
        return None
    if family == AF_INET6:
        src_family, unmapped_src = unmapped_address(family, src_number)
        dst_family, unmapped_dst = unmapped_address(family, dst_number)
        if src_family == dst_family:
            return src_family, unmapped_src, unmapped_dst
    return family, src_number, dst_number


def _interface_of(engine, sock, family, dst):
    """Return (interface, its group, whether it has the address `dst`) of a connection; None: not known."""
    iface = incoming_interface(sock)
    if iface is None:
        return None
    dst_on_iface = engine.uses_destination_interface and (family, dst) in interfaces.addresses(iface)
    return iface, interfaces.group(iface), dst_on_iface
