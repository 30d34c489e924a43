"""What each verb needs: checks and rewriting before the policy is asked, bookkeeping after the reply.

    do_VERB(parameter) -> parameter     before; raises Refusal.  vars.request_param is the same as text
    done_VERB(reply) -> reply           after, for replies that the policy accepted

Methods are found by name; a verb without them is passed on as it is.  Where the original let
addresses and arguments pass that mean two things, these refuse; see the grammar in Zorp.wire.
"""

from __future__ import annotations

from typing import NoReturn

from Zorp.smtp_engine.decisions import Decisions
from Zorp.smtp_engine.session import Refusal, SmtpSession, Transaction
from Zorp.wire.smtp_addresses import (
    PathError,
    PathRules,
    common_path,
    is_helo_argument,
    parse_path,
    path_rules,
)
from Zorp.wire.smtp_commands import CommandError, is_etrn_argument, parse_auth
from Zorp.wire.smtp_extensions import NEEDS, bits_of, ehlo_keyword, keep_mechanisms, lower_limits, lower_size
from Zorp.wire.smtp_parameters import NO_PARAMETERS, ParameterError, Parameters, check_parameters
from Zorp.wire.smtp_replies import Reply
from Zorp.wire.text import to_policy

_MOST_RECIPIENTS = 10_000           # when the policy sets no limit: the list is kept in memory
# offered only when both sides can do it, which takes TLS
_NEED_TLS = frozenset({"STARTTLS", "REQUIRETLS"})
# a stacked proxy looks at whole messages
_UNINSPECTED = frozenset({"CHUNKING"})


class Commands:
    """The verbs of one session; for one thread."""

    def __init__(self, session: SmtpSession, decisions: Decisions) -> None:
        self._session = session
        self._decisions = decisions
        self._vars = session.vars
        self._log = session.log
        self._compat = session.vars.address_syntax == "compat"
        self._mechanisms = frozenset([name.upper() for name in session.vars.auth_mechanisms])
        self._asked: tuple[str, str] | None = None      # sender and recipient of a MAIL or RCPT without answer

    # greeting

    def do_HELO(self, parameter: bytes) -> bytes:
        return self._greeting("HELO", "SMTP", parameter)

    def do_EHLO(self, parameter: bytes) -> bytes:
        return self._greeting("EHLO", "ESMTP", parameter)

    def _greeting(self, verb: str, protocol: str, parameter: bytes) -> bytes:
        self._vars.helo_string, self._vars.protocol = self._vars.request_param, protocol
        if not is_helo_argument(parameter, compat=self._compat):
            self._invalid(verb, parameter)
        return parameter

    def done_HELO(self, reply: Reply) -> Reply:
        self._session.set_active(frozenset(), 0)
        if len(reply.texts) > 1:
            self._log("smtp.violation", 2, "Invalid SMTP response; request='%s', response='%d'", ("HELO", reply.code))
            raise Refusal
        if reply.code < 300:
            self._session.forget_message()
        return reply

    def done_EHLO(self, reply: Reply) -> Reply:
        session = self._session
        session.set_active(frozenset(), 0)
        if reply.code >= 300:
            return reply
        session.forget_message()
        first, *lines = reply.texts
        kept = self._permitted(lines)
        keywords = frozenset(kept)
        session.set_active(keywords, bits_of(keywords))
        return Reply(reply.code, (first, *(line for group in kept.values() for line in group)))

    def _permitted(self, lines: list[bytes]) -> dict[str, list[bytes]]:
        """Return the lines of an EHLO reply that the client may see, by keyword."""
        kept: dict[str, list[bytes]] = {}
        hidden = _NEED_TLS | _UNINSPECTED if self._session.proxy._may_stack() else _NEED_TLS
        for line in lines:
            keyword = ehlo_keyword(line)
            if keyword and keyword not in hidden and self._decisions.extension(keyword):
                line = self._adjusted(keyword, line)
                if line:
                    kept.setdefault(keyword, []).append(line)
        for keyword, needed in NEEDS.items():
            if needed not in kept:
                kept.pop(keyword, None)
        return kept

    def _adjusted(self, keyword: str, line: bytes) -> bytes:
        """Return an EHLO line with our own limits in it; b"": nothing is left of it."""
        limits = self._session.limits
        if keyword == "SIZE" and limits.message_bytes:
            return lower_size(line, limits.message_bytes)
        if keyword == "LIMITS":
            return lower_limits(line, limits.recipients)
        if keyword == "AUTH":
            if self._vars.auth_requires_tls:
                return b""                          # no client of this release is encrypted
            if self._mechanisms:
                return keep_mechanisms(line, self._mechanisms)
        return line

    # the envelope

    def do_MAIL(self, parameter: bytes) -> bytes:
        session = self._session
        self._asked = self._vars.request_param, ""
        address, parameters = self._path("MAIL", b"FROM", parameter)
        self._asked = to_policy(address), ""
        if session.limits.message_bytes and parameters.size > session.limits.message_bytes:
            raise Refusal("552", "Message size exceeds fixed limit")
        if not address.isascii() and not parameters.utf8:
            raise Refusal("553", "Address needs SMTPUTF8")
        session.transaction = transaction = Transaction()
        transaction.utf8, transaction.binary = parameters.utf8, parameters.binary
        self._vars.sender = self._asked[0]
        return _argument(b"From:", address, parameters)

    def done_MAIL(self, reply: Reply) -> Reply:
        self._report_envelope(reply, "sender", self._vars.sender)
        if reply.code < 300:
            self._vars.recipients = ""
        return reply

    def do_RCPT(self, parameter: bytes) -> bytes:
        session, sender = self._session, self._vars.sender
        self._asked = sender, self._vars.request_param
        address, parameters = self._path("RCPT", b"TO", parameter)
        self._asked = sender, to_policy(address)
        if not address.isascii() and not session.transaction.utf8:
            raise Refusal("553", "Address needs SMTPUTF8")
        if session.transaction.recipients >= (session.limits.recipients or _MOST_RECIPIENTS):
            raise Refusal("452", "Too many recipients")
        return _argument(b"To:", address, parameters)

    def done_RCPT(self, reply: Reply) -> Reply:
        recipient = self._asked[1]
        self._report_envelope(reply, "recipient", recipient)
        if reply.code < 300:
            self._session.transaction.recipients += 1
            recipient = recipient.replace(" ", "<20>")          # only a quoted one has any; blanks separate them
            earlier = self._vars.recipients
            self._vars.recipients = f"{earlier} {recipient}" if earlier else recipient
        return reply

    def report_refusal(self, code: str, info: str) -> None:
        """A command is refused: when it is the client's MAIL or RCPT, say whose mail it is, and account for it."""
        if self._asked is None:
            return
        (sender, recipient), self._asked = self._asked, None
        self._log("smtp.info", 3, "Mail refused; client_address='%s', sender='%s', recipient='%s', response='%s',"
                  " response_param='%s'", (self._session.proxy.session.client_address, sender, recipient, code, info))
        self._session.account(sender, recipient, code, info, success=False)

    def _path(self, verb: str, keyword: bytes, parameter: bytes) -> tuple[bytes, Parameters]:
        """Return address and parameters of a MAIL or RCPT argument; logs and raises Refusal when it does not fit."""
        active = self._session.active
        found, colon, text = parameter.partition(b":")
        if not colon or found.upper() != keyword:
            self._invalid(verb, parameter)
        try:
            address, rest = common_path(text) or parse_path(text, self._rules(verb))
            return address, check_parameters(verb, rest, active) if rest else NO_PARAMETERS
        except PathError as problem:
            for text, fields in problem.problems:
                self._log("smtp.violation", 2, text, fields)
            self._invalid(verb, parameter, "501" if problem.unterminated else "500")
        except ParameterError as problem:
            self._log("smtp.violation", 2, problem.text, problem.fields)
            self._invalid(verb, parameter, str(problem.reply_code))

    def _rules(self, verb: str) -> PathRules:
        variables = self._vars
        return path_rules(
            compat=self._compat, brackets_optional=bool(variables.permit_omission_of_angle_brackets),
            append_domain=variables.append_domain.encode("latin-1") if variables.append_domain else b"",
            utf8="SMTPUTF8" in self._session.active, null=verb == "MAIL", postmaster=verb == "RCPT")

    def _report_envelope(self, reply: Reply, what: str, address: str) -> None:
        tag, level, text = _ENVELOPE_LINES[what, reply.code < 300]
        self._log(tag, level, text, (address, reply.digits, reply.text))
        asked, self._asked = self._asked, None
        if reply.code >= 400:
            self._session.account(*asked, reply.digits, reply.text, success=False)

    # the rest

    def do_DATA(self, parameter: bytes) -> bytes:
        if parameter:
            self._invalid("DATA", parameter, "501")
        if self._session.transaction.binary:
            raise Refusal("503", "BODY=BINARYMIME needs BDAT")      # RFC 3030, 3
        return parameter

    def do_RSET(self, parameter: bytes) -> bytes:
        if parameter:
            self._invalid("RSET", parameter)
        return parameter

    def done_RSET(self, reply: Reply) -> Reply:
        if reply.code < 300:
            self._session.forget_message()
        return reply

    def do_QUIT(self, parameter: bytes) -> bytes:
        if parameter:
            self._invalid("QUIT", parameter)
        return parameter

    def do_ETRN(self, parameter: bytes) -> bytes:
        if "ETRN" not in self._session.active or not is_etrn_argument(parameter):
            self._invalid("ETRN", parameter)
        return parameter

    def do_AUTH(self, parameter: bytes) -> bytes:
        session = self._session
        if session.authenticated:
            raise Refusal("503", "Already authenticated")
        try:
            authentication = parse_auth(parameter)
        except CommandError as problem:
            self._log("smtp.violation", 2, problem.text, problem.fields)
            raise Refusal("501") from problem
        if "AUTH" not in session.active:
            self._log("smtp.violation", 2, "Invalid SMTP command; request='%s', param='%s'", ("AUTH", ""))
            raise Refusal
        if self._mechanisms and authentication.mechanism not in self._mechanisms:
            self._log("smtp.policy", 3, "Authentication mechanism not permitted; mechanism='%s'",
                      (authentication.mechanism,))
            raise Refusal("504", "Authentication mechanism not permitted", "5.5.4")
        return parameter

    def do_STARTTLS(self, parameter: bytes) -> bytes:
        """Refuse: no side can be encrypted in this release, so the extension is never in force."""
        if parameter:
            self._log("smtp.violation", 2, "Invalid SMTP command; request='%s', param='%s'", ("STARTTLS", parameter))
            raise Refusal("501", "Syntax error (no parameters allowed)")
        self._log("smtp.violation", 4, "Server does not support the STARTTLS extension;")
        raise Refusal("454", "TLS not available due to temporary reason")

    def _invalid(self, verb: str, parameter: bytes, code: str = "500") -> NoReturn:
        self._log("smtp.violation", 2, "Invalid SMTP command; request='%s', param='%s'", (verb, parameter))
        raise Refusal(code)


_ENVELOPE_LINES = {                 # what, whether the server accepted it
    (what, accepted): (tag, level, f"Server {outcome} the {what}; {what}='%s', response='%s', response_param='%s'")
    for accepted, outcome, tag, level in ((True, "accepted", "smtp.info", 4), (False, "rejected", "smtp.error", 3))
    for what in ("sender", "recipient")
}
# by verb
CHECKS = {name[3:]: method for name, method in vars(Commands).items() if name.startswith("do_")}
FINISHES = {name[5:]: method for name, method in vars(Commands).items() if name.startswith("done_")}


def _argument(keyword: bytes, address: bytes, parameters: Parameters) -> bytes:
    argument = b"%b<%b>" % (keyword, address)
    return argument + b" " + parameters.wire if parameters.wire else argument

