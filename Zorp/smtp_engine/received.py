"""The Received line that the proxy may put in front of a message (RFC 5321, 4.4)."""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
import time
from pathlib import Path

import dns.exception
import dns.resolver

from Zorp.Log import log_exception
from Zorp.wire.text import TextError, to_wire

MAILNAME = Path("/etc/mailname")
HOSTS = Path("/etc/hosts")
LOOKUP_SECONDS = 2
REMEMBERED_SECONDS = 60
MOST_REMEMBERED = 1000
_FOLD_COLUMNS = 78

_HEADER_LINES = re.compile(rb"(?:[^.\r\n\0][^\r\n\0]*\r\n)+")
_UNPRINTABLE = re.compile(r"[^!-~]")
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def header_for(proxy) -> bytes:
    """Return what the policy's generateReceived() wants in front of the body; b"" when that is unusable."""
    try:
        value = proxy.generateReceived()
    except (Exception, SystemExit):
        log_exception(proxy._session_id)
        proxy._log("smtp.error", 3, "Couldn't generate received line; error='exception occurred'")
        return b""
    try:
        header = to_wire(value, one_line=False)
    except TextError:
        header = b""
    if not _HEADER_LINES.fullmatch(header):
        proxy._log("smtp.error", 3, "Couldn't generate received line; error='wrong return value'")
        return b""
    return header


def received_line(*, helo: str, client: str, host: str, protocol: str, message_id: str,
                  now: float | None = None) -> str:
    """Return the line, folded at 78 columns, with its CRLF.

    client: what stands in the parentheses behind `helo`; now: seconds since 1970, None: this moment.
    """
    parts = [
        f"Received: from {_UNPRINTABLE.sub('?', helo)[:255]} ({client})",
        f"by {host} with {protocol} id {message_id};",
        _date(time.time() if now is None else now),
    ]
    line = parts[0]
    column = len(line)
    for part in parts[1:]:
        glue = " " if column + 1 + len(part) <= _FOLD_COLUMNS else "\r\n\t"
        column = column + 1 + len(part) if glue == " " else 8 + len(part)
        line += glue + part
    return line + "\r\n"


def _date(now: float) -> str:
    """RFC 5322 3.3 with the zone's name behind it; English whatever the locale says."""
    t = time.localtime(now)
    return (f"{_DAYS[t.tm_wday]}, {t.tm_mday:02d} {_MONTHS[t.tm_mon - 1]} {t.tm_year} "
            f"{time.strftime('%H:%M:%S %z', t)} ({_UNPRINTABLE.sub('?', t.tm_zone or 'UTC')})")


def address_literal(ip: str) -> str:
    """Return the address in brackets, as RFC 5321 4.1.3 writes it."""
    return f"[IPv6:{ip}]" if ":" in ip else f"[{ip}]"


def keyword(protocol: str, *, authenticated: bool, utf8: bool) -> str:
    """Return the protocol name of RFC 3848 and RFC 6531 for a session without TLS."""
    if utf8:
        return "UTF8SMTPA" if authenticated else "UTF8SMTP"
    return "ESMTPA" if authenticated and protocol == "ESMTP" else protocol


def mail_name() -> str:
    """Return the first line of /etc/mailname; raises OSError."""
    with MAILNAME.open(encoding="latin-1") as file:
        return file.readline().strip()


def own_name() -> str:
    """Return the fully qualified name of this host."""
    return socket.getfqdn()


def new_resolver() -> dns.resolver.Resolver:
    """Return a resolver that asks the name servers of this host."""
    return dns.resolver.Resolver()


class ReverseNames:
    """Names of addresses, asked for at most once a minute each.

    Any thread may call.  _names_lock guards _names; nobody waits for DNS while holding it.
    """

    def __init__(self) -> None:
        self._names_lock = threading.Lock()
        self._names: dict[str, tuple[float, str]] = {}

    def name_of(self, ip: str) -> str:
        """Return the name of an address, "" when it has none or nobody says so within two seconds."""
        now = time.monotonic()
        with self._names_lock:
            until, name = self._names.get(ip, (0, ""))
        if until > now:
            return name
        name = _UNPRINTABLE.sub("?", _from_hosts(ip) or _from_dns(ip))
        with self._names_lock:
            if len(self._names) >= MOST_REMEMBERED:
                self._names.clear()
            self._names[ip] = (now + REMEMBERED_SECONDS, name)
        return name


def _from_hosts(ip: str) -> str:
    try:
        wanted = ipaddress.ip_address(ip)
        lines = HOSTS.read_text(encoding="latin-1").splitlines()
    except (OSError, ValueError):
        return ""
    for line in lines:
        words = line.partition("#")[0].split()
        if len(words) > 1 and _is_address(words[0], wanted):
            return words[1]
    return ""


def _is_address(text: str, wanted) -> bool:
    try:
        return ipaddress.ip_address(text) == wanted
    except ValueError:
        return False


def _from_dns(ip: str) -> str:
    try:
        answer = new_resolver().resolve_address(ip, lifetime=LOOKUP_SECONDS)
    except (dns.exception.DNSException, OSError, ValueError):
        return ""
    return answer[0].target.to_text(omit_final_dot=True)


reverse_names = ReverseNames()
