"""From host names to addresses: what both kinds of resolver share.

Theory of operation
    host_name() decides what may be asked for at all: labels of letters, digits, "-" and "_",
    at most 63 characters each, non-ASCII ones in their IDNA form.  Everything else has no
    addresses, without a query.  That includes number-like names ("0x7f.1", "10.1"): the C
    library takes those for addresses, so a client could name 127.0.0.1 without writing it.

    SystemNames is the host's own view: /etc/hosts, then the name servers of /etc/resolv.conf,
    both read again when they change.  Answers are kept for their TTL, a day at most, in a
    bounded cache.

    ::ffff:1.2.3.4 is IPv4 in disguise: the kernel sends such packets by IPv4.  We report the
    IPv4 address, so that the zone that is asked for permission is the one that gets the packets.

Deadlines
    One call waits LIFETIME_SECONDS at most, whatever the servers do.

Threads
    SystemNames may be used by any thread; its lock guards which files have been read, and is
    never held while a query runs.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from typing import NamedTuple

import dns.exception
import dns.name
import dns.rdatatype
import dns.resolver

from Zorp.Constants import AF_INET, AF_INET6, AF_UNSPEC, CORE_ERROR
from Zorp.Exceptions import PolicyError
from Zorp.Log import log

LIFETIME_SECONDS = 5.0
LONGEST_TTL_SECONDS = 86400
DNS_PORT = 53

_CACHED_ANSWERS = 2000
_HOSTS_FILE_BYTES = 16 * 1024 * 1024
_NAME = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*", re.ASCII | re.IGNORECASE)
_NUMBER_LIKE = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)", re.ASCII | re.IGNORECASE)
_SERVER = re.compile(
    r"(?P<v4>[0-9.]+)(?::(?P<port4>[0-9]{1,5}))?|\[(?P<v6>[0-9A-Fa-f:.]+)\]:(?P<port6>[0-9]{1,5})", re.ASCII)
_MAPPED_IPV4 = 0xffff
_RECORDS = {AF_INET: "A", AF_INET6: "AAAA"}


class Address(NamedTuple):
    """One address of a host."""

    family: int
    ip_int: int            # host byte order


def host_name(text: str) -> dns.name.Name | None:
    """Return the name to query for, or None for text that no host can be called."""
    try:
        if not text.isascii():
            text = dns.name.from_text(_unicode(text)).to_text(omit_final_dot=True)
        text = text.removesuffix(".")
        if not _NAME.fullmatch(text) or _NUMBER_LIKE.fullmatch(text):
            return None
        return dns.name.from_text(text)
    except (dns.exception.DNSException, UnicodeError):
        return None


def _unicode(text: str) -> str:
    """Undo one character per byte where the bytes are UTF-8."""
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text


def address_from_text(text: str) -> Address | None:
    """Return the address that the text is, None when it is none; disguised IPv4 comes out as IPv4."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            value = int.from_bytes(socket.inet_pton(family, text), "big")
        except (OSError, ValueError):
            continue
        if family == socket.AF_INET6 and value >> 32 == _MAPPED_IPV4:
            return Address(AF_INET, value & 0xffffffff)
        return Address(int(family), value)
    return None


def server_from_text(text: str) -> tuple[str, int]:
    """Return address and port of a name server: "192.0.2.1", "192.0.2.1:5300", "2001:db8::1", "[2001:db8::1]:5300"."""
    parsed = _SERVER.fullmatch(text) if isinstance(text, str) else None
    host = (parsed["v4"] or parsed["v6"]) if parsed else text
    port = int(parsed["port4"] or parsed["port6"] or DNS_PORT) if parsed else DNS_PORT
    if not isinstance(host, str) or address_from_text(host) is None or not 0 < port < 65536:
        raise PolicyError(f"Invalid name server; server='{text}'", remedy="give the IP address of a name server")
    return host, port


def resolver_for(server: str | None) -> dns.resolver.Resolver:
    """Return a resolver for one name server, or for the host's own ones; raises PolicyError for a bad `server`."""
    if server:
        resolver = dns.resolver.Resolver(configure=False)
        host, resolver.port = server_from_text(server)
        resolver.nameservers = [host]
        return resolver
    try:
        return dns.resolver.Resolver()
    except dns.resolver.NoResolverConfiguration:
        resolver = dns.resolver.Resolver(configure=False)
        resolver.nameservers = ["127.0.0.1"]             # what the C library does then
        return resolver


def log_failure(host: str, record_type: str, problem: Exception) -> None:
    """Write the line about a query without an answer."""
    log(None, CORE_ERROR, 4, "Error while resolving host; host='%s', record_type='%s', error='%s', message='%s'",
        (host, record_type, type(problem).__name__, problem))


class _Answers(dns.resolver.LRUCache):
    """Answers until their TTL has passed, a day at most."""

    def put(self, key, value):
        value.expiration = min(value.expiration, time.time() + LONGEST_TTL_SECONDS)
        super().put(key, value)


def _signature(path):
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_mtime_ns, state.st_size, state.st_ino


class SystemNames:
    """What this host knows about names.

    Arguments:
        hosts_file: lines of address and names, asked first.
        server: ask this name server instead of those of /etc/resolv.conf.
    """

    def __init__(self, hosts_file="/etc/hosts", server=None):
        self._hosts_file = hosts_file
        self._server = server
        self._files_lock = threading.Lock()          # guards the four below
        self._hosts_signature = self._resolv_signature = None
        self._hosts = {}
        self._resolver = None

    def addresses(self, host: str, family: int) -> list[Address]:
        """Return the addresses of a name or of an address as text, the best first; empty when there are none."""
        literal = address_from_text(host)
        if literal is not None:
            return [literal] if family in (AF_UNSPEC, literal.family) else []
        name = host_name(host)
        if name is None:
            return []
        hosts, resolver = self._current()
        known = _of_family(hosts.get(name.to_text(omit_final_dot=True).lower(), ()), family)
        return _best_first(known or _of_family(_query(resolver, host, name, family), family))

    def _current(self):
        with self._files_lock:
            signature = _signature(self._hosts_file)
            if signature != self._hosts_signature:
                self._hosts, self._hosts_signature = _read_hosts(self._hosts_file), signature
            signature = _signature("/etc/resolv.conf")
            if self._resolver is None or signature != self._resolv_signature:
                self._resolver, self._resolv_signature = resolver_for(self._server), signature
                self._resolver.cache = _Answers(_CACHED_ANSWERS)
            return self._hosts, self._resolver


system_names = SystemNames()


def _read_hosts(path) -> dict[str, list[Address]]:
    try:
        with open(path, encoding="latin-1") as file:
            text = file.read(_HOSTS_FILE_BYTES)
    except OSError:
        return {}
    hosts: dict[str, list[Address]] = {}
    for line in text.splitlines():
        fields = line.partition("#")[0].split()
        address = address_from_text(fields[0].partition("%")[0]) if fields else None
        for name in fields[1:] if address else ():
            known = hosts.setdefault(name.lower().removesuffix("."), [])
            if address not in known:
                known.append(address)
    return hosts


def _query(resolver, host, name, family) -> list[Address]:
    deadline = time.monotonic() + LIFETIME_SECONDS
    found: dict[Address, None] = {}
    for record_type in [_RECORDS[family]] if family in _RECORDS else _RECORDS.values():
        left_seconds = deadline - time.monotonic()
        if left_seconds <= 0:
            break
        try:
            relative = name.relativize(dns.name.root) if len(name.labels) <= 2 else name
            answer = resolver.resolve(relative, record_type, raise_on_no_answer=False, search=True,
                                      lifetime=left_seconds)
        except dns.resolver.NXDOMAIN as problem:
            log_failure(host, record_type, problem)
            break
        except (dns.exception.DNSException, OSError) as problem:
            log_failure(host, record_type, problem)
            continue
        for record in answer.rrset or ():
            found[address_from_text(record.address)] = None
    return list(found)


def _of_family(addresses, family: int) -> list[Address]:
    return [address for address in addresses if family in (AF_UNSPEC, address.family)]


def _best_first(addresses: list[Address]) -> list[Address]:
    """Put addresses without a route last, IPv6 before IPv4 otherwise (the gist of RFC 6724, 6)."""
    if len({address.family for address in addresses}) < 2:
        return addresses
    return sorted(addresses, key=lambda address: (not _has_route(address), -address.family))


def _has_route(address: Address) -> bool:
    size = 4 if address.family == AF_INET else 16
    text = socket.inet_ntop(address.family, address.ip_int.to_bytes(size, "big"))
    try:
        with socket.socket(address.family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
            probe.connect((text, DNS_PORT))            # nothing is sent
    except OSError:
        return False
    return True
