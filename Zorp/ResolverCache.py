"""Addresses of watched host names, kept current by their TTL.

Theory of operation
    A ResolverCache knows for each watched name its IPv4 and IPv6 addresses and the moment when
    they expire, and for each address the names that have it.  When a reader finds that names
    have expired, the first one starts a refresh in threads of its own; readers wait for it as
    long as one query may take, counted from its start, and go on with what is known then.  So
    a dead name server delays a session by that time, once, and never by the number of names.

    A refresh that fails keeps the addresses known before, up to stale_seconds after the last
    good answer, and is tried again after default_cache_timeout.  "No such name" is an answer,
    not a failure.  IPv4 and IPv6 are looked up separately: one may fail without the other.

    An answer is looked at before anything is changed by it (Answer.checked): addresses become
    the one text that all spellings share, and what is no address of its family is refused.  That
    includes IPv4 addresses in IPv6 form (::ffff:192.0.2.1), which are no IPv6 address of any host.

    A name is on its own: whatever goes wrong with one, a defect of ours or of a policy's resolver
    included, refresh() reports once and postpones, so that every other name gets its turn.

    updateHost() and its like look up in the calling thread; they are for tools.

Threads
    Any thread may call anything.  _entries_lock guards the entries, and no query and no log
    line happens under it; _refresh_lock guards which refresh is running.  No thread exists
    while nothing is refreshed.

Deviations from the original
    One query per record type: answers carry their CNAME chain, so CNAME is not asked for; a
    chain that the server leaves to us is followed, at most MAX_CNAMES names.  TTLs are kept
    within ttl_floor and ttl_ceiling seconds.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections import deque
from time import monotonic

import dns.exception
import dns.resolver

from Zorp.Constants import AF_INET, AF_INET6, CORE_DEBUG, CORE_ERROR, CORE_INFO
from Zorp.language import arguments
from Zorp.Log import log, log_exception
from Zorp.matching.host_names import address_from_text, host_name, log_failure, resolver_for
from Zorp.SockAddr import ipv4_text, ipv6_text

MAX_CNAMES = 5

_DEFAULT_TTL_SECONDS = 60
_TTL_FLOOR_SECONDS = 5
_TTL_CEILING_SECONDS = 86400
_STALE_SECONDS = 3600
_REFRESH_THREADS = 8

__all__ = ["AbstractHostnameCache", "AbstractResolver", "DNSResolver", "ResolverCache"]


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What the name servers said about one host; of a policy's resolver, anything at all until it is checked()."""

    ttl: int                             # seconds
    ipv4: tuple[str, ...] | None         # None: the query failed
    ipv6: tuple[str, ...] | None

    def checked(self, host):
        """Return the answer with canonical addresses, each family's own only.

        Raises TypeError, ValueError and OverflowError for what no resolver may say.
        """
        if not math.isfinite(self.ttl):
            raise ValueError(f"not a time to live: {self.ttl}")
        return Answer(self.ttl, _checked(host, AF_INET, self.ipv4), _checked(host, AF_INET6, self.ipv6))


class AbstractResolver:
    """Looks names up.  `timeout` is the longest time of one query in seconds."""

    def __init__(self, timeout):
        self.timeout = timeout

    def resolve(self, name):
        """Return (ttl, [ipv4 texts], [ipv6 texts]); raises KeyError when the name cannot be resolved."""
        raise NotImplementedError


class DNSResolver(AbstractResolver):
    """Asks DNS servers.

    Arguments:
        server: IP address of the name server, with ":port" if it is not 53; None: those of this host.
        timeout: seconds for each query.

    `resolver` is the dnspython resolver behind it.
    """

    def __init__(self, server=None, timeout=2):
        super().__init__(2 if timeout is None else arguments.number(
            "DNSResolver", "timeout", timeout, least=0.001, most=arguments.LONGEST_SECONDS, unit="seconds"))
        self.server = server
        self.resolver = resolver_for(server)

    def resolve(self, host, resolved_cnames=None, recursion_depth=0):
        """Return (ttl in seconds, [ipv4 texts], [ipv6 texts]); raises KeyError when nothing answered."""
        answer = self.answer(host, set(resolved_cnames or ()), recursion_depth)
        if answer is None or (answer.ipv4 is None and answer.ipv6 is None):
            raise KeyError(host)
        return answer.ttl, list(answer.ipv4 or ()), list(answer.ipv6 or ())

    def answer(self, host, resolved_cnames=frozenset(), recursion_depth=0):
        """Return an Answer, None when the name does not exist."""
        name = host_name(host)
        if name is None:
            log_failure(host, "A", ValueError("not a host name"))
            return None
        ttls, found = [], {}
        for family, record_type in ((AF_INET, "A"), (AF_INET6, "AAAA")):
            try:
                found[family] = self._look_up(name, record_type, ttls, {*resolved_cnames, name}, recursion_depth)
            except dns.resolver.NXDOMAIN as problem:
                log_failure(host, record_type, problem)
                return None
            except (dns.exception.DNSException, OSError) as problem:
                log_failure(host, record_type, problem)
                found[family] = None
        answer = Answer(min(ttls, default=_DEFAULT_TTL_SECONDS), found[AF_INET], found[AF_INET6])
        log(None, CORE_DEBUG, 6, "Host resolved; host='%s', ttl='%d', addresses='%s'",
            (host, answer.ttl, (*(answer.ipv4 or ()), *(answer.ipv6 or ()))))
        return answer

    def _look_up(self, name, record_type, ttls, seen, depth):
        """Return the addresses of one record type as texts; appends to `ttls` and `seen`."""
        text = name.to_text(omit_final_dot=True)
        log(None, CORE_DEBUG, 6, "Resolving host; host='%s', record_type='%s'", (text, record_type))
        reply = self.resolver.resolve(name, record_type, raise_on_no_answer=False, lifetime=self.timeout)
        if reply.rrset is not None:
            ttls.append(reply.chaining_result.minimum_ttl)
            return tuple(dict.fromkeys(record.address for record in reply.rrset))
        target = reply.canonical_name
        if target == name:
            log(None, CORE_DEBUG, 6, "No records; host='%s', record_type='%s'", (text, record_type))
            return ()
        ttls.append(reply.chaining_result.minimum_ttl)
        target_text = target.to_text(omit_final_dot=True)
        if target in seen:
            log(None, CORE_DEBUG, 6, "CNAME already resolved, skipping; host='%s', cname='%s'", (text, target_text))
            return ()
        if depth >= MAX_CNAMES:
            log(None, CORE_ERROR, 3, "Recursion limit reached of CNAME resolvation; max_recursion_depth='%d'",
                (MAX_CNAMES,))
            return ()
        log(None, CORE_DEBUG, 6, "Resolving CNAME for host; host='%s', cname='%s'", (text, target_text))
        return self._look_up(target, record_type, ttls, {*seen, target}, depth + 1)


class AbstractHostnameCache:
    """What a cache of host names can do."""

    default_cache_timeout = _DEFAULT_TTL_SECONDS       # seconds

    def __init__(self, hosts=(), server=None):
        raise NotImplementedError

    def addHost(self, name):
        """Watch a name."""
        raise NotImplementedError

    def removeHost(self, name):
        """Forget a name."""
        raise NotImplementedError

    def updateHost(self, name):
        """Look a name up."""
        raise NotImplementedError

    def lookupAddress(self, address):
        """Return the set of names that have an address, or None."""
        raise NotImplementedError

    def lookupHostname(self, name):
        """Return (set of IPv4 texts, set of IPv6 texts)."""
        raise NotImplementedError

    def lookupCachedHostname(self, name):
        """Return what is known about a name without a look-up."""
        raise NotImplementedError

    def lookupTTL(self, name):
        """Return when a name expires, or None."""
        raise NotImplementedError

    def getNextExpiration(self):
        """Return (name, time) of the name that expires first."""
        raise NotImplementedError

    def shouldUpdate(self):
        """Return whether any name has expired."""
        raise NotImplementedError


class _Entry:
    """One watched name; ResolverCache._entries_lock guards it."""

    __slots__ = ("expires_at", "good_until", "has_failed", "ipv4", "ipv6", "is_answered", "is_known")

    def __init__(self, now):
        self.ipv4 = self.ipv6 = frozenset()
        self.expires_at = now                       # monotonic seconds
        self.good_until = {AF_INET: now, AF_INET6: now}
        self.is_answered = False                    # a first look-up has come to an end, well or not
        self.is_known = False                       # name servers have said everything about the name once
        self.has_failed = False                     # by a defect, and that has been reported

    @property
    def addresses(self):
        return self.ipv4 | self.ipv6


class _Refresh:
    """Looks up some names in a few threads of its own; `done` is set when the last one has ended."""

    def __init__(self, look_up, names, wait_seconds):
        self._look_up = look_up
        self._names = deque(names)                  # thread-safe by itself
        self._running_lock = threading.Lock()       # guards _running
        self._running = min(_REFRESH_THREADS, len(names))
        self.done = threading.Event()
        self.wait_until = monotonic() + wait_seconds

    def start(self):
        for _ in range(self._running):
            try:
                threading.Thread(target=self._work, name="resolver", daemon=True).start()
            except RuntimeError as problem:         # no thread left: the others do its work
                log(None, CORE_ERROR, 3, "Error starting resolver thread; error='%s'", (problem,))
                self._one_ended()

    def wait(self):
        self.done.wait(max(self.wait_until - monotonic(), 0))

    def _work(self):
        try:
            while (name := self._next_name()) is not None:
                self._look_up(name)
        finally:
            self._one_ended()

    def _next_name(self):
        try:
            return self._names.popleft()
        except IndexError:
            return None

    def _one_ended(self):
        with self._running_lock:
            self._running -= 1
            if self._running == 0:
                self.done.set()


class ResolverCache(AbstractHostnameCache):
    """Watched names and their addresses.

    Arguments:
        resolver: what looks names up: a DNSResolver, or any AbstractResolver.
        ttl_floor, ttl_ceiling: bounds of the time in seconds that an answer is kept.
        stale_seconds: how long addresses outlive their last good answer while refreshing fails.
    """

    def __init__(self, resolver, *, ttl_floor=_TTL_FLOOR_SECONDS, ttl_ceiling=_TTL_CEILING_SECONDS,
                 stale_seconds=_STALE_SECONDS):
        self.resolver = resolver
        self._ttl_floor = ttl_floor
        self._ttl_ceiling = ttl_ceiling
        self._stale_seconds = stale_seconds
        self._entries_lock = threading.Lock()       # guards the two dictionaries and their entries
        self._entries = {}
        self._names_by_address = {}
        self._refresh_lock = threading.Lock()       # guards _refresh
        self._refresh = None

    # ------------------------------------------------------------------ what is watched

    def watch(self, name):
        """Watch a name without looking it up now; the first reader will."""
        with self._entries_lock:
            self._entries.setdefault(name, _Entry(monotonic()))

    def addHost(self, name):
        """Watch a name, and look it up at once."""
        self.watch(name)
        self.updateHost(name)

    def removeHost(self, name):
        """Forget a name."""
        with self._entries_lock:
            entry = self._entries.pop(name, None)
            if entry is not None:
                self._unlink(name, entry)

    def put(self, name, addresses):
        """Watch a name and take these addresses (texts) for it until the default timeout has passed."""
        self.watch(name)
        canonical = {text for address in addresses if (text := _canonical(address))}
        ipv6 = {text for text in canonical if ":" in text}
        self._store(name, Answer(self.default_cache_timeout, tuple(canonical - ipv6), tuple(ipv6)))

    # ------------------------------------------------------------------ looking up in this thread

    def updateHost(self, host):
        """Look a watched name up; return whether its addresses have changed."""
        log(None, CORE_INFO, 5, "Host not in DNS cache or has expired, doing lookup; host='%s'", (host,))
        return self._store(host, self._ask(host))

    def refresh(self, host):
        """Look a watched name up like updateHost(), and raise nothing: a defect costs this name one turn."""
        try:
            return self.updateHost(host)
        except Exception:
            if not self._postpone(host):
                log(None, CORE_ERROR, 1, "Unexpected error, host name keeps its addresses; host='%s'", (host,))
                log_exception()
            return False

    def _postpone(self, host):
        """Try a name again after the default timeout; return whether it has failed before."""
        with self._entries_lock:
            entry = self._entries.get(host)
            if entry is None:
                return False
            entry.expires_at = monotonic() + self.default_cache_timeout
            entry.is_answered = True
            had_failed, entry.has_failed = entry.has_failed, True
            return had_failed

    def _store(self, host, answer):
        """Put an answer into the entry of a name that is still watched; return whether its addresses have changed."""
        with self._entries_lock:
            entry = self._entries.get(host)
            if entry is None:
                return False
            before = entry.ipv4, entry.ipv6
            self._unlink(host, entry)
            is_complete = self._take(entry, answer)
            self._link(host, entry)
            entry.has_failed = False
            has_changed = before != (entry.ipv4, entry.ipv6)
        if not is_complete:
            log(None, CORE_INFO, 3,
                "Could not resolve host name trying again after default timeout; host='%s', timeout='%d'",
                (host, self.default_cache_timeout))
        return has_changed

    def updateHostIfNeeded(self, host, now=None):
        """Look a watched name up if it has expired; return whether its addresses have changed.

        `now` is a time as time.time() gives it; None: now.
        """
        moment = monotonic() if now is None else monotonic() + now - time.time()
        with self._entries_lock:
            entry = self._entries.get(host)
            left_seconds = 0 if entry is None else entry.expires_at - moment
        if left_seconds > 0:
            log(None, CORE_DEBUG, 6, "Host already in DNS cache and within TTL; host='%s', ttl='%f'",
                (host, left_seconds))
            return False
        return self.updateHost(host)

    def update(self, now=None):
        """Look up all expired names; return the list of those whose addresses have changed."""
        moment = monotonic() if now is None else monotonic() + now - time.time()
        return [name for name in self._expired(moment) if self.refresh(name)]

    # ------------------------------------------------------------------ readers

    def lookupAddress(self, address):
        """Return the set of names that have the address (a text), or None; refreshes expired names first."""
        self._refresh_expired()
        canonical = _canonical(address)
        with self._entries_lock:
            names = self._names_by_address.get(canonical)
            return set(names) if names else None

    def lookupHostname(self, name):
        """Return (set of IPv4 texts, set of IPv6 texts), refreshed if expired.

        A name that is not watched is looked up and not kept; raises KeyError when that fails.
        """
        if name not in self._entries:
            _, ipv4, ipv6 = self.resolver.resolve(name)
            return set(ipv4), set(ipv6)
        if name in self._expired(monotonic()):
            self._refresh_expired()
        return self.lookupCachedHostname(name)

    def lookupCachedHostname(self, name):
        """Return (set of IPv4 texts, set of IPv6 texts) as they are known; raises KeyError for an unwatched name."""
        with self._entries_lock:
            entry = self._entries[name]
            return set(entry.ipv4), set(entry.ipv6)

    def lookupTTL(self, name):
        """Return when the name expires, as time.time() counts; None for an unwatched name."""
        with self._entries_lock:
            entry = self._entries.get(name)
            return None if entry is None else entry.expires_at - monotonic() + time.time()

    def getNextExpiration(self):
        """Return (name, time) of the name that expires first; raises ValueError when none is watched."""
        return min(self.expires.items(), key=lambda item: item[1])

    def shouldUpdate(self):
        """Return whether any name has expired."""
        return bool(self._expired(monotonic(), is_logged=False))

    def is_answered(self):
        """Return whether every watched name has been looked up at least once, well or not."""
        with self._entries_lock:
            return all(entry.is_answered for entry in self._entries.values())

    @property
    def known_hosts(self):
        """The set of watched names about which name servers have once said everything, be it that there is nothing."""
        with self._entries_lock:
            return {name for name, entry in self._entries.items() if entry.is_known}

    @property
    def hosts(self):
        """The set of watched names."""
        with self._entries_lock:
            return set(self._entries)

    @property
    def expires(self):
        """When each name expires, as time.time() counts."""
        with self._entries_lock:
            offset = time.time() - monotonic()
            return {name: entry.expires_at + offset for name, entry in self._entries.items()}

    @property
    def cache_name_to_addresses(self):
        """(set of IPv4 texts, set of IPv6 texts) of each watched name."""
        with self._entries_lock:
            return {name: (set(entry.ipv4), set(entry.ipv6)) for name, entry in self._entries.items()}

    @property
    def cache_address_to_names(self):
        """The set of names of each known address."""
        with self._entries_lock:
            return {address: set(names) for address, names in self._names_by_address.items()}

    # ------------------------------------------------------------------ refreshing

    def _expired(self, moment, *, is_logged=True):
        with self._entries_lock:
            names = [name for name, entry in self._entries.items() if entry.expires_at <= moment]
        for name in names if is_logged else ():
            log(None, CORE_DEBUG, 6, "Found expired host in DNS cache; host='%s'", (name,))
        return names

    def _refresh_expired(self):
        with self._refresh_lock:
            refresh = self._refresh
            if refresh is None or refresh.done.is_set():
                names = self._expired(monotonic())
                if not names:
                    return
                refresh = self._refresh = _Refresh(self.refresh, names, getattr(self.resolver, "timeout", 2))
                refresh.start()
        refresh.wait()

    def _ask(self, host):
        """Return a checked Answer from any kind of resolver; both parts None when it failed."""
        try:
            if isinstance(self.resolver, DNSResolver):
                answer = self.resolver.answer(host) or Answer(self.default_cache_timeout, (), ())
            else:
                answer = Answer(*self.resolver.resolve(host))
            return answer.checked(host)
        except KeyError:
            pass
        except Exception:                       # a resolver of the policy: its fault must not stop the refresh
            log_exception()
        return Answer(self.default_cache_timeout, None, None)

    def _take(self, entry, answer):
        """Put an answer into its entry; return whether it was complete and had an address."""
        now = monotonic()
        ttl = min(max(answer.ttl, self._ttl_floor), self._ttl_ceiling)
        entry.ipv4 = self._part(entry, AF_INET, entry.ipv4, answer.ipv4, now + ttl)
        entry.ipv6 = self._part(entry, AF_INET6, entry.ipv6, answer.ipv6, now + ttl)
        is_complete = None not in (answer.ipv4, answer.ipv6) and bool(answer.ipv4 or answer.ipv6)
        entry.expires_at = now + (ttl if is_complete else min(ttl, self.default_cache_timeout))
        entry.is_answered = True
        entry.is_known |= None not in (answer.ipv4, answer.ipv6)
        return is_complete

    def _part(self, entry, family, known, addresses, good_until):
        if addresses is not None:
            entry.good_until[family] = good_until
            return frozenset(addresses)
        return known if monotonic() < entry.good_until[family] + self._stale_seconds else frozenset()

    def _link(self, name, entry):
        for address in entry.addresses:
            self._names_by_address.setdefault(address, set()).add(name)

    def _unlink(self, name, entry):
        for address in entry.addresses:
            names = self._names_by_address[address]
            names.remove(name)
            if not names:
                del self._names_by_address[address]


def _checked(host, family, texts):
    """Return the canonical texts of the addresses of one family, in their order; others are refused."""
    if texts is None:
        return None
    found = {}
    for text in texts:
        canonical = _canonical(text)
        if canonical is None or (":" in canonical) != (family == AF_INET6):
            log(None, CORE_ERROR, 3, "Address in an answer refused; host='%s', address='%s'", (host, text))
        else:
            found[canonical] = None
    return tuple(found)


def _canonical(text):
    """Return the one text of an address that all spellings share, None when it is no address.

    Raises TypeError when it is no text.
    """
    address = address_from_text(text)
    if address is None:
        return None
    return ipv4_text(address.ip_int) if address.family == AF_INET else ipv6_text(address.ip_int)
