"""Log lines and counters of what the packet filter itself does: forwarded and denied connections.

Theory of operation
    Forwarded connections begin and end as the kernel says (Zorp.netfilter.conntrack); denied
    packets come through a log group (Zorp.netfilter.nflog).  The number in the connection mark,
    or in the rule's prefix, names instance, rule and service.  The texts are those of the
    original's kernel log, with their prefix, written to our log.

    When events were lost the list of connections is compared with what we knew: ended ones are
    counted as ended without their bytes, new ones get their line late, and the gap is logged.

    "Session denied" is one line per packet of anybody who is not let in, so every service has a
    number of lines per second; what goes beyond is counted and reported every second.  What no
    rule matches has a number of its own, if the site wants lines for it (log_unmatched).

Counters go up by one per session: of the service, of its rule, and of the zones that the rule
    asks for.  A session's number is its service's counter.

Bounds: MAX_SESSIONS forwarded connections are remembered; beyond, ends have no line.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from Zorp.Log import log
from Zorp.netfilter.actions import LOG_PREFIX, NO_RULE
from Zorp.netfilter.conntrack import Connection, ConntrackError, Event
from Zorp.netfilter.kzorp_text import RULE, SERVICE, ZONE, parse_address
from Zorp.netfilter.nflog import LoggedPacket
from Zorp.netfilter.plan import RuleIndex
from Zorp.netfilter.site import INDEX_BITS, Site

MAX_SESSIONS = 262_144
_NONE = "(NULL)"
_NO_SERVICE = ""                         # in the account of lines: packets that no rule wants
_PROTOCOLS = {1: "ICMP", 6: "TCP", 17: "UDP", 58: "ICMPv6"}
_INDEX_MASK = (1 << INDEX_BITS) - 1
_SUMMARY = ("kzorp (svc/%s:%d): Connection summary; rule_id='%d', session_start='%d', session_end='%d', "
            "client_proto='%s', client_address='%s', client_port='%d', client_zone='%s', server_proto='%s', "
            "server_address='%s', server_port='%d', server_zone='%s', client_local='%s', client_local_port='%d', "
            "server_local='%s', server_local_port='%d', verdict='%s', info='%s', auth_user='(NULL)'")


@dataclass(frozen=True, slots=True)
class _Session:
    """A forwarded connection that lives."""

    rule: RuleIndex
    number: int
    started_s: int                       # epoch
    client_zone: str | None
    server_zone: str | None


class SessionLog:
    """Counts and logs the packet filter's own sessions; the loop's."""

    def __init__(self, site: Site, rules, listed: Callable[[], list[Connection]],
                 clock: Callable[[], float] = time.time) -> None:
        """rules: Zorp.netfilter.daemon_rules.PacketRules; listed: the forwarded connections that live now."""
        self._site = site
        self._rules = rules
        self._listed = listed
        self._clock = clock
        self._live: dict[tuple, _Session] = {}
        self._denials: dict[str, _Denials] = {}
        self.counters: Counter[tuple[str, str, str]] = Counter()

    # ---- forwarded

    def adopt(self) -> None:
        """Take over the connections that lived before us; they get no line.  Raises ConntrackError."""
        for connection in self._listed():
            self._begin(connection, is_logged=False)

    def take(self, event: Event) -> None:
        """A forwarded connection began or ended."""
        if event.has_ended:
            self._end(event.connection)
        elif _key(event.connection) not in self._live:
            self._begin(event.connection, is_logged=True)

    def resynchronise(self) -> None:
        """Events were lost: find out what lives."""
        try:
            listed = {_key(connection): connection for connection in self._listed()}
        except ConntrackError as problem:
            log(None, "core.error", 1, "Events of connections were lost; error='%s'", (problem,))
            return
        gone = self._live.keys() - listed.keys()
        new = listed.keys() - self._live.keys()
        for key in gone:
            del self._live[key]
        for key in new:
            self._begin(listed[key], is_logged=True)
        log(None, "core.error", 1, "Events of connections were lost; ended_without_line='%d', started_late='%d', "
            "alive='%d'", (len(gone), len(new), len(self._live)))

    def _begin(self, connection: Connection, *, is_logged: bool) -> None:
        rule = self._rules.rule_of(self._index_of(connection.mark))
        if rule is None:
            return
        original, reply = connection.original, connection.reply
        client_zone, server_zone = self._zone(original.source), self._zone(reply.source)
        number = self._count(rule, client_zone, server_zone)
        if len(self._live) < MAX_SESSIONS:
            self._live[_key(connection)] = _Session(rule, number, int(self._clock()), client_zone, server_zone)
        if is_logged:
            log(None, "core.session", 3, "kzorp (svc/%s): Starting forwarded session; service='%s', client_zone='%s', "
                "server_zone='%s', client_address='%s:%d', server_address='%s:%d', protocol='%s'",
                (rule.service, rule.service, client_zone or _NONE, server_zone or _NONE, original.source,
                 original.source_port, reply.source, reply.source_port, protocol_name(connection.protocol)))

    def _end(self, connection: Connection) -> None:
        session = self._live.pop(_key(connection), None)
        if session is None:
            return
        (sent_bytes, sent_packets), (received_bytes, received_packets) = connection.sent, connection.received
        name = session.rule.service
        log(None, "core.session", 3, "kzorp (svc/%s:%d): Ending forwarded session; orig_bytes='%d', orig_packets='%d', "
            "reply_bytes='%d', reply_packets='%d'",
            (name, session.number, sent_bytes, sent_packets, received_bytes, received_packets))
        if not self._site.log_session_verdict:
            return
        original, reply = connection.original, connection.reply
        protocol = protocol_name(connection.protocol)
        log(None, "core.accounting", 4, _SUMMARY, (
            name, session.number, session.rule.rule_id, session.started_s, int(self._clock()),
            protocol, original.source, original.source_port, session.client_zone or _NONE,
            protocol, reply.source, reply.source_port, session.server_zone or _NONE,
            original.destination, original.destination_port, reply.destination, reply.destination_port,
            "ACCEPTED", "Ending forwarded session"))

    def _index_of(self, mark: int) -> int:
        return mark >> self._site.marks.connection_shift & _INDEX_MASK

    # ---- denied

    def deny(self, packet: LoggedPacket) -> None:
        """A packet was refused by a rule with logging."""
        number = packet.prefix[len(LOG_PREFIX):] if packet.prefix.startswith(LOG_PREFIX) else ""
        if number == str(NO_RULE):
            self._drop(packet)
            return
        rule = self._rules.rule_of(int(number)) if number.isascii() and number.isdigit() else None
        if rule is None:
            return
        client_zone, server_zone = self._zone(packet.source), self._zone(packet.destination)
        session_number = self._count(rule, client_zone, server_zone)
        if not self._may_write(rule.service):
            return
        protocol = protocol_name(packet.protocol)
        log(None, "core.policy", 2, "kzorp (svc/%s): Session denied; service='%s', client_zone='%s', server_zone='%s', "
            "client_address='%s:%d', server_address='%s:%d', protocol='%s'",
            (rule.service, rule.service, client_zone or _NONE, server_zone or _NONE, packet.source,
             packet.source_port, packet.destination, packet.destination_port, protocol))
        if self._site.log_session_verdict:
            now = int(self._clock())
            log(None, "core.accounting", 4, _SUMMARY, (
                rule.service, session_number, rule.rule_id, now, now, protocol, packet.source, packet.source_port,
                client_zone or _NONE, _NONE, _NONE, 0, _NONE, packet.destination, packet.destination_port, _NONE, 0,
                "DENIED_BY_POLICY", "Rejecting session"))

    def _drop(self, packet: LoggedPacket) -> None:
        """A packet was not forwarded because no rule matches."""
        if self._may_write(_NO_SERVICE):
            log(None, "core.policy", 2, "kzorp: No rule matches, packet dropped; client_zone='%s', server_zone='%s', "
                "client_address='%s:%d', server_address='%s:%d', protocol='%s'",
                (self._zone(packet.source) or _NONE, self._zone(packet.destination) or _NONE, packet.source,
                 packet.source_port, packet.destination, packet.destination_port, protocol_name(packet.protocol)))

    def _may_write(self, service: str) -> bool:
        denials = self._denials.setdefault(service, _Denials(self._site.deny_log_rate))
        return denials.may_write(int(self._clock()))

    def tick(self) -> None:
        """Report what was held back; every second."""
        for service, denials in self._denials.items():
            if held := denials.take_held(int(self._clock())):
                who = f"kzorp (svc/{service})" if service != _NO_SERVICE else "kzorp"
                log(None, "core.policy", 2, "%s: %d messages suppressed.", (who, held))

    # ---- both

    def _zone(self, address: str) -> str | None:
        return self._rules.evaluator.zone_of(*parse_address(address))

    def _count(self, rule: RuleIndex, client_zone: str | None, server_zone: str | None) -> int:
        """Count a session; return its number."""
        self.counters[RULE, rule.instance, str(rule.rule_id)] += 1
        for zone, has_condition in zip((client_zone, server_zone), self._rules.zone_conditions(rule), strict=True):
            if zone is not None and has_condition:
                self.counters[ZONE, "", zone] += 1
        self.counters[SERVICE, rule.instance, rule.service] += 1
        return self.counters[SERVICE, rule.instance, rule.service]


class _Denials:
    """How many lines of one service may be written."""

    __slots__ = ("_held", "_most", "_second", "_written")

    def __init__(self, most_per_second: int) -> None:
        self._most = most_per_second
        self._second = self._written = self._held = 0

    def may_write(self, second: int) -> bool:
        if second != self._second:
            self._second, self._written = second, 0
        self._written += 1
        if self._written <= self._most:
            return True
        self._held += 1
        return False

    def take_held(self, second: int) -> int:
        """Return how many lines were held back, once their second is over."""
        if second == self._second:
            return 0
        held, self._held = self._held, 0
        return held


def protocol_name(number: int) -> str:
    """Return a protocol as the original's kernel log writes it."""
    return _PROTOCOLS.get(number, f"IP_{number}")


def _key(connection: Connection) -> tuple:
    original = connection.original
    return (connection.number, connection.protocol, original.source, original.source_port, original.destination,
            original.destination_port)
