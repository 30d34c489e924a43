"""`python -m doc.attributes`: write doc/attributes.md, every attribute of every proxy.

Name, type, permissions and default come from the `engine_attributes` of the classes, the tables
that the program itself uses.  The meaning stands here, because it is for readers.  An attribute
without a meaning, or a meaning without an attribute, is an error: the page is complete or it is
not written.  A test holds the file in the repository to what would be written now.
"""

from __future__ import annotations

import sys
from pathlib import Path

from Zorp import AnyPy, Plug, Proxy, Smtp
from Zorp.engine import builtin_proxy
from Zorp.engine.attributes import ALIAS, CONFIG_R, CONFIG_W, CUSTOM, DIMHASH, HASH, METHOD, OBSOLETE, RUN_R, RUN_W

PAGE = Path(__file__).parent / "attributes.md"

CLASSES = {
    "Every proxy": builtin_proxy.BuiltinProxy,
    "AnyPy": AnyPy.AbstractAnyPyProxy,
    "Plug": Plug.AbstractPlugProxy,
    "Smtp": Smtp.AbstractSmtpProxy,
}

INTRODUCTION = """\
# Attributes of the proxies

Written by `python -m doc.attributes` from the tables that the program uses; do not edit.

A policy sets attributes in `config()` of its proxy class and reads or changes some of them later, in the callbacks.
*config* and *run* say what is allowed when: `r` read, `w` write, `-` nothing. A write that is not allowed now is logged
(`core.policy` 3) and has no effect. Truth values are numbers: 0 is no, everything else yes. Times are milliseconds and
sizes bytes unless the meaning says otherwise. Attributes of type *plain* are ordinary ones of the Python class.
"""

HEAD = "| attribute | type | config | run | default | meaning |\n|---|---|---|---|---|---|\n"

MEANINGS = {
    "Every proxy": {
        "alerting_config": "accepted and without effect",
        "client_local_tos": "type of service of packets to the client (IP TOS, IPv6 traffic class)",
        "client_remote_tos": "type of service seen from the client; never filled in",
        "client_stream": "the connection to the client, None when there is none",
        "language": "language of messages to users: `en`, `de`, `hu`",
        "max_session_time": "longest time of the whole session, from the end of `config()` on, when it is stopped "
                            "and the summary gets `info='max_session_time reached'`; 0: any",
        "server_local_tos": "type of service of packets to the server, from the first one on",
        "server_remote_tos": "type of service seen from the server; never filled in",
        "server_socket_mark": "packet mark (SO_MARK) of the connection to the server, for packet rules",
        "server_stream": "the connection to the server, None before it is made",
        "ssl": "TLS settings in the words of releases up to 6.0",
        "tls": "what TLS found out about client and server",
    },
    "AnyPy": {
        "client_max_line_length": "longest line that `readline()` accepts from the client",
        "server_max_line_length": "longest line that `readline()` accepts from the server",
        "set_content_hint": "`set_content_hint(length)`: tells the parent how long the content will be; -1: unknown",
        "set_verdict": "`set_verdict(verdict, description)`: tells the parent what to do with the content",
        "stack": "`stack(how, what)`: starts a child, returns its two streams; RuntimeError when it fails",
    },
    "Plug": {
        "bandwidth_to_client": "bytes per second to the client, the average since passing began; 0.0 before",
        "bandwidth_to_server": "bytes per second to the server, the average since passing began; 0.0 before",
        "buffer_size": "bytes of a connection that become one datagram, where only one side is UDP; no effect otherwise"
                       " up to 65536, above that the size of one read",
        "copy_to_client": "bytes of the server are passed on to the client",
        "copy_to_server": "bytes of the client are passed on to the server",
        "packet_stats_interval": "the same under its old name",
        "packet_stats_interval_packet": "`packetStats()` is called after so many reads; 0: never for that reason",
        "packet_stats_interval_time": "`packetStats()` is called after this time; 0: never for that reason",
        "shutdown_soft": "the end of one direction leaves the other one open; yes when stacked",
        "timeout": "idle time after which the session ends; 0 and less: never; with UDP the default is 60000, and never"
                   " means that",
    },
    "Smtp": {
        "active_extensions": "extensions in force now, as the sum of their `SMTP_EXT_` numbers",
        "address_syntax": "`strict`: odd addresses are refused; `compat`: those that harm nobody pass",
        "auth_mechanisms": "names of the SASL mechanisms that may be used; `()`: all",
        "auth_requires_tls": "AUTH is hidden from clients without TLS",
        "client_tls_required": "refused when set: TLS is not built",
        "command_timeout": "time from the first to the last byte of a command",
        "greeting_delay": "the greeting waits this long",
        "max_body_line_length": "longest line of a mail's text; 0: any",
        "max_errors": "refused commands after which the session ends; 0: no limit",
        "max_message_size": "longest mail; 0: any",
        "max_recipients": "recipients of one mail; 0: 10000",
        "min_data_rate": "bytes per second that a mail's text must come with; 0: any",
        "permit_nul_in_body": "NUL bytes in a mail's text pass",
        "refuse_early_talkers": "clients that speak before the greeting are refused",
        "server_tls_required": "refused when set: TLS is not built",
        "add_received_header": "a Received: line is put before each mail",
        "append_domain": "domain that is added to addresses without one",
        "error_abort": "a callback sets this to end the session after the refusal",
        "error_code": "reply code of the refusal that a callback decides",
        "error_info": "reply text of the refusal that a callback decides",
        "extensions": "what happens to each extension that the server offers; key: its keyword, or `*`",
        "helo_string": "the name that the client gave in HELO or EHLO",
        "interval_transfer_noop": "the server hears NOOP this often while a stacked proxy is silent",
        "max_auth_request_length": "longest line of an AUTH dialogue",
        "max_line_length": "longest line that is read at all, with its end, from either side",
        "max_request_length": "longest command line",
        "max_response_length": "longest reply line",
        "permit_extensions": "sum of `SMTP_EXT_` numbers: extensions let through that the table does not decide",
        "permit_long_responses": "replies longer than `max_response_length` are cut and not refused",
        "permit_omission_of_angle_brackets": "addresses without `<>` are accepted",
        "permit_unknown_command": "commands that nobody knows are let through when the table accepts them",
        "protocol": "`SMTP` or `ESMTP`, as the client began",
        "recipients": "recipients of the mail so far, separated by blanks",
        "request": "what happens to each command; key: the verb, or `*`",
        "request_cmd": "the command that a callback decides about",
        "request_command": "the same under its documented name",
        "request_param": "the argument of that command",
        "require_crlf": "lines must end in CR LF",
        "response": "what happens to each reply; key: (verb, reply code), either may be `*`, codes may be cut",
        "response_code": "reply code that a callback decides about",
        "response_param": "text of that reply",
        "response_value": "the same under its documented name",
        "sanitizeAddress": "`sanitizeAddress(address)`: the address in its plain form, or None",
        "sender": "sender of the mail now",
        "timeout": "idle time after which the session ends",
        "tls_passthrough": "refused when set: TLS is not built",
        "unconnected_response_code": "reply code to the client when the server cannot be reached",
    },
}

# Attributes that are ordinary ones of the Python classes: any value, any time, no log line.
PLAIN = {
    "Every proxy": (Proxy.Proxy, {
        "encryption_policy": "name of an encryption policy; refused when set: TLS is not built",
    }),
    "Plug": (Plug.PlugProxy, {
        "secondary_mask": "what a connection must share with a running plug to join it: 1 source address,"
                          " 2 source port, 4 destination address, 8 destination port; setting it or"
                          " `secondary_sessions` switches joining on",
        "secondary_sessions": "how many connections may join a running plug beside its first one; 0: none",
        "stack_proxy": "what to stack inside: a proxy class, a command, or a stack tuple",
    }),
    "Smtp": (Smtp.SmtpProxy, {
        "autodetect_domain_from": "where the Received: line has our name from: `SMTP_GETDOMAIN_MAILNAME` or"
                                  " `SMTP_GETDOMAIN_FQDN`",
        "domain_name": "our name in the Received: line",
        "error_soft": "senders and recipients that a matcher finds are refused for now (450), not for good",
        "permit_exclamation_mark": "`!` in recipients is permitted",
        "permit_percent_hack": "`%` in recipients is permitted",
        "permit_quoted_at": "`@` in quoted local parts of recipients, as in `\"joe@other.example\"@ours.example`, is"
                            " permitted; some servers take that for a route",
        "recipient_matcher": "matcher policy; a match refuses the recipient",
        "relay_check": "recipients must be in `relay_domains`, or the client in `relay_zones`",
        "relay_domains": "recipient domains accepted from anyone; `.d` is every domain below d",
        "relay_domains_matcher": "matcher policy of more such domains",
        "relay_zones": "names of client zones that may send to anyone; `*`: all",
        "request_stack": "what mails go through: `request_stack['*'] = (SMTP_STK_MIME, (Z_STACK_PROGRAM, 'scan'))`",
        "resolve_host": "the Received: line has the client's name beside its address",
        "sender_matcher": "matcher policy; a match refuses the sender",
    }),
}


def page():
    """Return the text of the page; ValueError names what lacks a meaning or an attribute."""
    parts = [INTRODUCTION]
    problems = []
    for title, cls in CLASSES.items():
        own = {attribute.name: attribute for attribute in vars(cls).get("engine_attributes", ())}
        meanings = MEANINGS[title]
        problems += [f"{title}: {name} has no meaning" for name in own if name not in meanings]
        problems += [f"{title}: no attribute {name}" for name in meanings if name not in own]
        parts.append(f"\n## {title}\n\n{HEAD}")
        parts += [_row(own[name], meanings.get(name, "")) for name in sorted(own, key=str.lower)]
        if title in PLAIN:
            parts += _plain_rows(*PLAIN[title])
    if problems:
        raise ValueError("\n".join(problems))
    return "".join(parts)


def _plain_rows(cls, meanings):
    """Rows of ordinary attributes; their default is the class's, when it has one."""
    for name, meaning in sorted(meanings.items()):
        default = f"`{getattr(cls, name)!r}`" if hasattr(cls, name) else ""
        yield f"| `{name}` | plain | rw | rw | {default} | {meaning} |\n"


def _row(attribute, meaning):
    access = [_allowed(attribute.access, *flags) for flags in ((CONFIG_R, CONFIG_W), (RUN_R, RUN_W))]
    if attribute.kind in (HASH, DIMHASH, METHOD):
        access = [letters.replace("w", "") for letters in access]
    read_write = [letters or "-" for letters in access]
    return f"| {' | '.join((f'`{attribute.name}`', attribute.kind, *read_write, _default(attribute), meaning))} |\n"


def _allowed(access, read, write):
    return ("r" if access & read else "") + ("w" if access & write else "")


def _default(attribute):
    if attribute.kind in (ALIAS, OBSOLETE):
        return f"= `{attribute.default}`"
    if attribute.kind in (HASH, DIMHASH):
        return "empty table"
    if attribute.kind in (CUSTOM, METHOD):
        return ""
    return f"`{attribute.default!r}`"


if __name__ == "__main__":
    try:
        PAGE.write_text(page(), encoding="utf-8")
    except ValueError as problem:
        sys.exit(str(problem))
