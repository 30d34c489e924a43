"""SMTP: mail sessions inspected command by command.

    class InboundMail(SmtpProxy):
        def config(self):
            SmtpProxy.config(self)
            self.relay_domains = ("example.com", ".example.com")
            self.request["VRFY"] = (SMTP_REQ_REJECT, "252", "Cannot VRFY user")

Plain SmtpProxy refuses every recipient until the policy says who may send where: relay_zones,
relay_domains, or relay_check = FALSE.  AbstractSmtpProxy refuses everything, also the server's
greeting, until its tables are filled.

This module is what policies see; Zorp.smtp_engine speaks the protocol.

What this release refuses
    tls_passthrough, client_tls_required, server_tls_required: the session ends after config().
    STARTTLS is never offered.  CHUNKING is not offered where request_stack asks for stacking.

Deviations
    Everything that means two things to two mail servers is refused: bare CR and LF, control
    bytes, odd addresses (see address_syntax), unasked replies.  max_auth_request_length is
    12288, because tokens of today do not fit into 256.  <postmaster> without domain is never
    relaying: the server itself has that mailbox.  A session without server ends after 20
    commands and asks no policy function.
    A recipient with "@" in its quoted local part is refused (permit_quoted_at): relaying is
    judged at ours.example for <"joe@other.example"@ours.example>, but a server that takes the
    quotes away before it looks at the local part routes it to other.example, as it does
    <joe%other.example@ours.example>.  So with "\\@" and with a route, "@other.example:joe".
"""

from __future__ import annotations

import contextlib
import functools
import operator

from Zorp import Log
from Zorp.Constants import FALSE, TRUE
from Zorp.engine.attributes import (
    ALIAS,
    ALWAYS,
    CONFIG,
    DIMHASH,
    HASH,
    INT,
    METHOD,
    OBJECT,
    READ,
    RUN,
    RUN_READ,
    STRING,
    Attr,
)
from Zorp.engine.config_lint import Problem
from Zorp.engine.policy_hash import ActionError, PolicyHash, parse_action, parse_policy_action
from Zorp.Exceptions import MatcherException, PolicyError
from Zorp.language import star_names
from Zorp.Log import log
from Zorp.Matcher import AbstractMatcher, SmtpInvalidRecipientMatcher, getMatcher
from Zorp.Proxy import Proxy, proxyLog
from Zorp.smtp_engine import presets, received
from Zorp.smtp_engine.dialogue import Dialogue
from Zorp.wire.errors import WireError
from Zorp.wire.limits import SmtpLimits
from Zorp.wire.smtp_addresses import common_path, comparable_domain, parse_path, path_rules, split_address
from Zorp.wire.text import TextError, to_policy, to_wire
from Zorp.Zone import Zone

SMTP_POLICY = "smtp.policy"
SMTP_DEBUG = "smtp.debug"
SMTP_INFO = "smtp.info"
SMTP_ERROR = "smtp.error"

SMTP_REQ_ACCEPT = SMTP_RSP_ACCEPT = SMTP_EXT_ACCEPT = 1
SMTP_REQ_REJECT = SMTP_RSP_REJECT = 3
SMTP_REQ_ABORT = SMTP_RSP_ABORT = 4
SMTP_REQ_POLICY = SMTP_RSP_POLICY = 6
SMTP_EXT_DROP = 5

SMTP_EXT_PIPELINING = 0x0001
SMTP_EXT_SIZE = 0x0002
SMTP_EXT_ETRN = 0x0004
SMTP_EXT_8BITMIME = 0x0008
SMTP_EXT_AUTH = 0x0010
SMTP_EXT_STARTTLS = 0x0020
SMTP_EXT_ALL = 0x000F
SMTP_EXT_ENHANCEDSTATUSCODES = 0x0100
SMTP_EXT_SMTPUTF8 = 0x0200
SMTP_EXT_DSN = 0x0400
SMTP_EXT_CHUNKING = 0x0800
SMTP_EXT_BINARYMIME = 0x1000
SMTP_EXT_REQUIRETLS = 0x2000
SMTP_EXT_LIMITS = 0x4000
SMTP_EXT_OTHERS = 0x8000            # DELIVERBY, MT-PRIORITY, FUTURERELEASE, RRVS, NO-SOLICITING

SMTP_STK_NONE = 0
SMTP_STK_MIME = 1

SMTP_GETDOMAIN_MAILNAME = "mailname"
SMTP_GETDOMAIN_FQDN = "fqdn"

_NUMBERS = {                        # attribute: field of SmtpLimits
    "timeout": "idle_ms", "command_timeout": "command_ms",
    "max_request_length": "command_bytes", "max_auth_request_length": "sasl_line_bytes",
    "max_response_length": "reply_line_bytes", "max_line_length": "line_bytes",
    "max_recipients": "recipients", "max_errors": "errors", "max_message_size": "message_bytes",
}
_NUMBERS_OF = operator.attrgetter(*_NUMBERS)
_MAY_BE_ZERO = ("max_recipients", "max_errors", "max_message_size")
_ACTIONS = {SMTP_REQ_ACCEPT: "ACCEPT", SMTP_REQ_REJECT: "REJECT", SMTP_REQ_ABORT: "ABORT", SMTP_REQ_POLICY: "POLICY"}
# what the entries of each table may say; an extension is dropped by every number but the first
_VERDICTS = {
    "request": {number: f"SMTP_REQ_{name}" for number, name in _ACTIONS.items()},
    "response": {number: f"SMTP_RSP_{name}" for number, name in _ACTIONS.items()},
    "extensions": {SMTP_EXT_ACCEPT: "SMTP_EXT_ACCEPT", SMTP_EXT_DROP: "SMTP_EXT_DROP", SMTP_REQ_REJECT: "",
                   SMTP_REQ_ABORT: ""},
}
_GOODBYE_MS = 500                   # for the last reply after a stop request
_MOST_ITEMS = 2                     # after the number: code and text, or a function
_NEEDS_TLS = ("tls_passthrough", "client_tls_required", "server_tls_required")
_TLS_WISHES_OF = operator.attrgetter(*_NEEDS_TLS)
_UTF8_FLAG = SMTP_EXT_SMTPUTF8


def _shown_parameter(proxy, value):
    """Return what a log may say of request_param: credentials only when the administrator asked for secrets."""
    return repr(value) if Log.show_secrets or proxy._vars.request_cmd.upper() != "AUTH" else "(hidden)"


class AbstractSmtpProxy(Proxy):
    """The engine of SMTP with its attributes; every table empty, so everything is refused."""

    name = "smtp"
    engine_attributes = (
        Attr("timeout", INT, CONFIG, 600_000),                          # ms, each read and write
        Attr("interval_transfer_noop", INT, ALWAYS, 60_000),            # ms, while a stacked proxy is silent
        Attr("max_request_length", INT, CONFIG, 512),                   # bytes, without line end
        Attr("max_auth_request_length", INT, CONFIG, 12288),
        Attr("max_response_length", INT, CONFIG, 512),
        Attr("max_line_length", INT, CONFIG, 4096),                     # bytes, with line end, either side
        Attr("require_crlf", INT, CONFIG, TRUE),
        Attr("unconnected_response_code", INT, ALWAYS, 451),
        Attr("permit_unknown_command", INT, CONFIG, FALSE),
        Attr("permit_long_responses", INT, CONFIG, FALSE),
        Attr("permit_omission_of_angle_brackets", INT, CONFIG, FALSE),
        Attr("append_domain", STRING, ALWAYS, ""),
        Attr("permit_extensions", INT, ALWAYS, 0),
        Attr("extensions", HASH, READ, PolicyHash),
        Attr("request", HASH, READ, PolicyHash),
        Attr("response", DIMHASH, READ, presets.reply_table),
        Attr("active_extensions", INT, RUN_READ, 0),
        Attr("add_received_header", INT, CONFIG, FALSE),
        Attr("tls_passthrough", INT, CONFIG, FALSE),
        Attr("helo_string", STRING, READ, ""),
        Attr("protocol", STRING, READ, ""),
        Attr("request_cmd", STRING, RUN, ""),
        Attr("request_command", ALIAS, RUN, "request_cmd"),
        Attr("request_param", STRING, RUN, "", shown=_shown_parameter),
        Attr("response_code", STRING, RUN, ""),
        Attr("response_value", ALIAS, RUN, "response_code"),
        Attr("response_param", STRING, RUN, ""),
        Attr("error_code", STRING, RUN, ""),
        Attr("error_info", STRING, RUN, "Invalid command"),
        Attr("error_abort", INT, RUN, 0),
        Attr("sender", STRING, RUN, ""),
        Attr("recipients", STRING, RUN, ""),
        Attr("sanitizeAddress", METHOD, RUN_READ, "_sanitize_address"),
        # of this release
        Attr("address_syntax", STRING, CONFIG, "strict"),               # or "compat": odd addresses pass
        Attr("command_timeout", INT, CONFIG, 300_000),                  # ms, from first to last byte of a command
        Attr("max_errors", INT, CONFIG, 20),                            # refused commands; 0: no limit
        Attr("max_recipients", INT, CONFIG, 0),                         # per message; 0: 10000
        Attr("max_message_size", INT, CONFIG, 0),                       # bytes; 0: no limit
        Attr("max_body_line_length", INT, CONFIG, 0),                   # bytes; 0: no limit
        Attr("min_data_rate", INT, CONFIG, 0),                          # bytes per second of a body; 0: any
        Attr("permit_nul_in_body", INT, CONFIG, FALSE),
        Attr("auth_mechanisms", OBJECT, CONFIG, ()),                    # names of SASL mechanisms; (): all
        Attr("auth_requires_tls", INT, CONFIG, FALSE),                  # hide AUTH from clients without TLS
        Attr("greeting_delay", INT, CONFIG, 0),                         # ms
        Attr("refuse_early_talkers", INT, CONFIG, FALSE),
        Attr("client_tls_required", INT, CONFIG, FALSE),
        Attr("server_tls_required", INT, CONFIG, FALSE),
    )
    _limits = None
    _dialogue = None

    def __init__(self, session):
        self.request_stack = {}
        super().__init__(session)

    # tables

    def loadSMTP(self):
        """Accept the commands and replies of plain SMTP."""
        tables = self._vars
        presets.SMTP_REQUESTS.load(tables.request)
        presets.SMTP_REPLIES.load(tables.response)

    def loadESMTP(self):
        """Accept those of SMTP, and EHLO, AUTH, ETRN, STARTTLS with the extensions of everyday mail."""
        self.loadSMTP()
        tables = self._vars
        presets.ESMTP_REQUESTS.load(tables.request)
        presets.ESMTP_REPLIES.load(tables.response)
        presets.ESMTP_EXTENSIONS.load(tables.extensions)

    # what policies override

    def requestStack(self):
        """Return what is to be stacked for a message, None for nothing; called at DATA."""
        entry = self.request_stack.get("DATA", self.request_stack.get("*"))
        if _asks_for_stacking(entry):
            return entry[1]
        return None

    def generateReceived(self):
        """Return the Received line that add_received_header puts in front of a message, with its CRLF."""
        client_ip = getattr(self.session.client_address, "ip_s", "")
        client = received.address_literal(client_ip) if client_ip else "unknown"
        if getattr(self, "resolve_host", FALSE) and client_ip:
            name = received.reverse_names.name_of(client_ip)
            client = f"{name} {client}" if name else client
        return received.received_line(
            helo=self.helo_string, client=client, host=self._own_mail_name(),
            protocol=self._dialogue.protocol_keyword(),
            message_id=self.session.getMasterSession().session_id.replace(":", "."))

    def _own_mail_name(self):
        """Return the name behind "by": domain_name, or what autodetect_domain_from says, or `unknown`."""
        if hasattr(self, "domain_name"):
            return self.domain_name
        source = getattr(self, "autodetect_domain_from", None)
        if source == SMTP_GETDOMAIN_FQDN:
            return received.own_name()
        if source == SMTP_GETDOMAIN_MAILNAME:
            try:
                return received.mail_name()
            except OSError as problem:
                log(None, SMTP_ERROR, 3, "Error reading mailname; error='%s'", (problem,))
        return "unknown"

    # the engine

    def _check_config(self):
        super()._check_config()
        if any(_TLS_WISHES_OF(self._vars)):
            name = next(name for name in _NEEDS_TLS if getattr(self._vars, name))
            raise PolicyError(f"TLS is not built in this release, session refused; attribute='{name}'",
                              remedy=f"take {name} out of the policy")

    def _engine_config(self):
        settings = self._vars
        if settings.address_syntax not in ("strict", "compat"):
            raise PolicyError(f"Unknown address syntax; address_syntax='{settings.address_syntax}'",
                              remedy="write 'strict' or 'compat'")
        if isinstance(settings.auth_mechanisms, str):
            settings.auth_mechanisms = (settings.auth_mechanisms,)
        if settings.auth_mechanisms and not all(isinstance(name, str) for name in settings.auth_mechanisms):
            raise PolicyError("Invalid auth_mechanisms", remedy="give a tuple of mechanism names")
        self._limits = _limits_of(*_NUMBERS_OF(settings))

    def _config_problems(self):
        found = []
        for name, verdicts in _VERDICTS.items():
            for key, entry in getattr(self._vars, name).items():
                wrong = _wrong_entry(entry, verdicts)
                if wrong:
                    found.append(Problem(f"No such action; table='{name}', key='{key}', error='{wrong}'",
                                         f"write {', '.join(filter(None, verdicts.values()))}", key))
        return found

    def _datagram_problems(self):
        return [Problem("SMTP does not go over UDP", "give the dispatcher a TCP bind, or a service with a Plug proxy",
                        None)]

    def _wake(self):
        """A client of ours is told that the service ends, after what it is just being told (RFC 5321, 3.8)."""
        if self._parent is not None:
            super()._wake()
            return
        with contextlib.suppress(OSError):
            self._client.timeout_ms = _GOODBYE_MS        # for what is still sent; one that takes nothing now is cut off
        self._client.wake()
        for busy in (self._connecting, *self._stacked, self._server):
            if busy is not None:
                with contextlib.suppress(OSError):
                    busy.abort()

    def _engine_main(self):
        self._dialogue = Dialogue(self, self._limits)
        self._dialogue.run()

    def _may_stack(self):
        """Tell whether messages of this session may go through a stacked proxy."""
        return (type(self).requestStack is not AbstractSmtpProxy.requestStack
                or any(_asks_for_stacking(entry) for entry in self.request_stack.values()))

    def _sanitize_address(self, *arguments):
        """Return the bare address at the beginning of a path, "" for the null path; text behind it is ignored.

        Raises ValueError when there is no address.
        """
        if len(arguments) != 1:
            raise ValueError("Invalid arguments")
        try:
            text = to_wire(arguments[0])
            address, _ = common_path(text) or parse_path(text, self._path_rules())
            return to_policy(address)
        except TextError:
            raise ValueError("Invalid arguments") from None
        except WireError:
            raise ValueError("Invalid address") from None

    def _path_rules(self):
        settings = self._vars
        return path_rules(
            compat=settings.address_syntax == "compat",
            brackets_optional=bool(settings.permit_omission_of_angle_brackets),
            append_domain=to_wire(settings.append_domain), utf8=bool(settings.active_extensions & _UTF8_FLAG),
            null=True, postmaster=True)


class SmtpProxy(AbstractSmtpProxy):
    """SMTP with everyday commands permitted, and senders and recipients checked.

    relay_zones             names of client zones that may send to anyone; "*" is every zone
    relay_domains           recipient domains accepted from anyone; ".d" is every domain below d
    relay_domains_matcher   more of those
    sender_matcher, recipient_matcher   a match refuses the address
    permit_percent_hack, permit_exclamation_mark   "%" and "!" in recipients
    permit_quoted_at        "@" in the quoted local part of recipients
    error_soft              matched addresses are refused for now (450), not for good
    """

    relay_domains_matcher = None
    sender_matcher = None
    recipient_matcher = None

    def __init__(self, session):
        self.relay_check = TRUE
        self.relay_domains = ()
        self.relay_zones = ()
        self.permit_percent_hack = FALSE
        self.permit_exclamation_mark = FALSE
        self.permit_quoted_at = FALSE
        self.error_soft = FALSE
        super().__init__(session)

    def config(self):
        """Permit ESMTP, check MAIL and RCPT, refuse relaying."""
        self.loadESMTP()
        self.request["MAIL"] = (SMTP_REQ_POLICY, self.checkSender)
        self.request["RCPT"] = (SMTP_REQ_POLICY, self.checkRecipient)
        self.relay_check = TRUE

    def __post_config__(self):
        """Find the matchers; raises MatcherException for an unknown name."""
        super().__post_config__()
        for name in ("sender_matcher", "recipient_matcher", "relay_domains_matcher"):
            if getattr(self, name) is not None:
                setattr(self, name, getMatcher(getattr(self, name)))
        if isinstance(self.relay_domains, str):
            self.relay_domains = (self.relay_domains,)

    def _config_problems(self):
        found = super()._config_problems()
        if self.relay_zones and not _names(self.relay_zones):
            found.append(Problem("relay_zones is no list of zone names", "write relay_zones = ('office',)",
                                 "relay_zones"))
        for name in _names(self.relay_zones):
            if name != "*" and (not isinstance(name, str) or Zone.lookupByName(name) is None):
                found.append(Problem(f"No such zone in relay_zones; zone='{name}'", "write the name of a zone, or '*'",
                                     "relay_zones"))
        if not isinstance(self.relay_domains, (list, tuple, set, frozenset)) or not all(
                isinstance(domain, str) for domain in self.relay_domains):
            found.append(Problem("relay_domains is no list of domains",
                                 "write relay_domains = ('example.com', '.example.com')", "relay_domains"))
        return found

    def checkSender(self, cmd, param):
        """Decide about a MAIL command: SMTP_REQ_ACCEPT or SMTP_REQ_REJECT."""
        email = self._sanitize_address(param[5:])
        try:
            refused = self.sender_matcher is not None and self.sender_matcher.checkMatch(email)
        except MatcherException:
            return self._refuse("450", "Cannot verify sender at this time, come back later.")
        if refused:
            proxyLog(self, SMTP_POLICY, 3, "Sender address administratively prohibited; email='%s'", (email,))
            if self.error_soft:
                return self._refuse("450", "Cannot verify sender at this time, come back later.")
            return self._refuse("550", "Sender address refused.")
        if Log.loudest >= 6:
            proxyLog(self, SMTP_DEBUG, 6, "Sender check successful; email='%s'", (email,))
        return SMTP_REQ_ACCEPT

    def checkRecipient(self, cmd, param):
        """Decide about a RCPT command: SMTP_REQ_ACCEPT or SMTP_REQ_REJECT."""
        email = self._sanitize_address(param[3:])
        local, _ = split_address(email)
        if "%" in local and not self.permit_percent_hack:
            proxyLog(self, SMTP_POLICY, 3, "Forbidden percent found in address local-part; email='%s'", (email,))
            return self._refuse("501", "Malformed address")
        if "!" in local and not self.permit_exclamation_mark:
            proxyLog(self, SMTP_POLICY, 3, "Forbidden exclamation mark found in address local-part; email='%s'",
                     (email,))
            return self._refuse("501", "Malformed address")
        if self.relay_check and not self.relayCheck(email):
            proxyLog(self, SMTP_POLICY, 3, "Relaying denied; email='%s'", (email,))
            return self._refuse("554", "Relaying denied.")
        if "@" in local and not self.permit_quoted_at:      # who is not ours has been told that
            proxyLog(self, SMTP_POLICY, 3, "Forbidden at sign found in address local-part; email='%s'", (email,))
            return self._refuse("501", "Malformed address")
        if Log.loudest >= 6:
            proxyLog(self, SMTP_DEBUG, 6, "Relay check successful; email='%s'", (email,))
        return self._match_recipient(email)

    def _match_recipient(self, email):
        try:
            refused = self.recipient_matcher is not None and self.recipient_matcher.checkMatch(email)
        except MatcherException:
            return self._refuse("450", "Cannot verify recipient at this time, come back later.")
        if refused:
            proxyLog(self, SMTP_POLICY, 3, "Recipient address administratively prohibited; email='%s'", (email,))
            if self.error_soft:
                return self._refuse("450", "Cannot verify recipient at this time, come back later.")
            return self._refuse("554", "Recipient address refused.")
        if Log.loudest >= 6:
            proxyLog(self, SMTP_DEBUG, 6, "Recipient check successful; email='%s'", (email,))
        return SMTP_REQ_ACCEPT

    def _refuse(self, code, info):
        self.error_code = code
        self.error_info = info
        return SMTP_REQ_REJECT

    def relayCheck(self, email):
        """Return TRUE when the client may send to this address."""
        zone = self.session.client_zone
        zones = _names(self.relay_zones)
        if Log.loudest >= 7:
            proxyLog(self, SMTP_DEBUG, 7, "Relay check, checking client_zone; client_zone='%s'",
                     (zone.getName() if zone is not None else None,))
        if "*" in zones or self.zoneCheck(zone):
            return TRUE
        local, domain = split_address(email)
        if Log.loudest >= 7:
            proxyLog(self, SMTP_DEBUG, 7, "Relay check, checking mail domain; local='%s', domain='%s'",
                     (local, domain))
        if not domain:
            return TRUE if local.lower() == "postmaster" else FALSE
        if _is_listed(comparable_domain(domain), self.relay_domains):
            return TRUE
        try:
            if self.relay_domains_matcher is not None and self.relay_domains_matcher.checkMatch(domain):
                return TRUE
        except MatcherException:
            pass                                    # cannot decide: not permitted
        return FALSE

    def zoneCheck(self, zone):
        """Return TRUE when the zone, or one above it, is in relay_zones."""
        zones = _names(self.relay_zones)
        while zone is not None and zones:
            if zone.getName() in zones:
                return TRUE
            zone = zone.admin_parent
        return FALSE


def _wrong_entry(entry, verdicts):
    """Return why the engine could do nothing with an entry of a table, "" when it is sound."""
    try:
        action = parse_action(entry, args_max=_MOST_ITEMS)
        if action.verdict not in verdicts:
            return f"unknown number {action.verdict}"
        if action.verdict == SMTP_REQ_POLICY:
            parse_policy_action(action)
    except ActionError as problem:
        return str(problem)
    return ""


@functools.lru_cache(maxsize=64)
def _limits_of(*numbers):
    """Return the SmtpLimits with the values of _NUMBERS; one object serves all sessions of a policy."""
    for (name, _), number in zip(_NUMBERS.items(), numbers, strict=True):
        if number <= 0 and name not in _MAY_BE_ZERO:
            raise PolicyError(f"Number out of range; attribute='{name}', value='{number}'",
                              remedy="give a number above 0")
    return SmtpLimits(**{limit: max(number, 0) for limit, number in zip(_NUMBERS.values(), numbers, strict=True)})


def _asks_for_stacking(entry):
    return isinstance(entry, (tuple, list)) and len(entry) > 1 and entry[0] != SMTP_STK_NONE


def _names(value):
    """Return the zone names of relay_zones; a string is one name, other types are none."""
    if isinstance(value, str):
        return (value,)
    return value if isinstance(value, (tuple, list)) else ()


@functools.lru_cache(maxsize=4096)
def _comparable_entry(entry):
    """Return (domain as comparisons want it, whether only domains below it are meant)."""
    return comparable_domain(entry.removeprefix(".")), entry.startswith(".")


def _is_listed(domain, entries):
    for entry in entries:
        if not entry:
            continue
        listed, below_only = _comparable_entry(entry)
        if domain.endswith("." + listed) if below_only else domain == listed:
            return True
    return False


__all__ = [name for name in globals() if name.startswith("SMTP_")] + [
    "AbstractMatcher", "AbstractSmtpProxy", "MatcherException", "Proxy", "SmtpInvalidRecipientMatcher", "SmtpProxy",
    "getMatcher", "proxyLog",
]
star_names.complete(__name__)
