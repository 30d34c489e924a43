"""Looks up the host names of zones, in a thread of its own, and tells the loop of kzorpd.

Theory of operation
    The loop says which names there are (watch()) and reads what is known of them (addresses()).
    The thread asks for the name that expires next, wakes the loop when addresses have changed,
    and sleeps until the next one is due.  An answer lives for its TTL, at least `ttl_floor_s`
    and at most TTL_CEILING_S seconds, and a little longer by chance, so that hosts do not ask in
    step.  A name that cannot be looked up keeps its last addresses for `grace_s` seconds after
    they ran out; a name that does not exist loses them at once (Zorp.ResolverCache).

    What kzorpd knew when it ended is remembered (remember()): a name has these addresses, too, until
    name servers have answered completely for the first time, however long that takes.  Otherwise
    a denial by name would be lifted by a restart while name servers are away.

    A look-up that hangs costs the resolver's time and delays no packet rule and no request.  Whatever
    goes wrong with one name, defects of ours included, is that name's: it waits for its next turn,
    and the thread goes on with the others (ResolverCache.refresh).

Threads
    watch(), remember(), addresses(), start() and stop() are the loop's; everything with an underscore below
    _run() is the thread's.  ResolverCache has its own lock, `_changes` is an Event.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable

from Zorp.Log import log, log_exception
from Zorp.ResolverCache import DNSResolver, ResolverCache

TTL_FLOOR_S = 60
TTL_CEILING_S = 86_400
MAX_NAMES = 4_096
_JITTER_S = 5.0


class HostNames:
    """The host names of all zones of this host."""

    def __init__(self, on_change: Callable[[], None], grace_s: float, resolver=None,
                 ttl_floor_s: float = TTL_FLOOR_S) -> None:
        """on_change: called in the thread when addresses have changed."""
        self._on_change = on_change
        self._ttl_floor_s = ttl_floor_s
        self._cache = ResolverCache(resolver or DNSResolver(), ttl_floor=ttl_floor_s, ttl_ceiling=TTL_CEILING_S,
                                    stale_seconds=grace_s)
        self._cache.default_cache_timeout = ttl_floor_s  # until a failed look-up is tried again
        self._changes = threading.Event()                # other names to watch, or the end
        self._stopping = False
        self._remembered: dict[str, list[str]] = {}

    def start(self) -> None:
        """Begin to look names up."""
        threading.Thread(target=self._run, name="host-names", daemon=True).start()

    def stop(self) -> None:
        """End the thread as soon as it does not wait for a name server."""
        self._stopping = True
        self._changes.set()

    def remember(self, addresses: dict[str, list[str]]) -> None:
        """Give names the addresses they had when kzorpd ended, until the first answer."""
        self._remembered = dict(addresses)

    def watch(self, names: Iterable[str]) -> None:
        """Watch exactly these names; those that were watched before keep what is known of them."""
        wanted = sorted(set(names))
        if len(wanted) > MAX_NAMES:
            log(None, "core.error", 1, "Too many host names in zones, some are not looked up; count='%d', limit='%d'",
                (len(wanted), MAX_NAMES))
            wanted = wanted[:MAX_NAMES]
        for name in self._cache.hosts.difference(wanted):
            self._cache.removeHost(name)
        for name in wanted:
            self._cache.watch(name)
        self._changes.set()

    def addresses(self) -> dict[str, list[str]]:
        """Return what is known now: the addresses of every watched name, as texts."""
        for name in self._cache.known_hosts:
            self._remembered.pop(name, None)
        return {name: sorted({*inet, *inet6, *self._remembered.get(name, ())})
                for name, (inet, inet6) in self._cache.cache_name_to_addresses.items()}

    # ---- the thread

    def _run(self) -> None:
        while not self._stopping:
            self._changes.clear()
            try:
                wait_s = self._refresh()
            except Exception as problem:                 # a fault of ours: zones stay as they are, we try again
                log(None, "core.error", 1, "Unexpected error; error='%s'", (problem,))
                log_exception(None)
                wait_s = self._ttl_floor_s
            self._changes.wait(wait_s + random.uniform(0, min(_JITTER_S, wait_s / 4)))

    def _refresh(self) -> float:
        """Look up what is due; return the seconds until the next name is."""
        hostname, left_s = "", self._ttl_floor_s
        while not self._stopping:
            hostname, left_s = self._next()
            if left_s > 0:
                break
            log(None, "core.info", 4, "TTL for host expired, updating host; hostname='%s', ttl='%d'",
                (hostname, -left_s))
            was_known = hostname in self._cache.known_hosts
            if self._cache.refresh(hostname) or not was_known:
                self._on_change()
        if not hostname:
            log(None, "core.info", 6, "No hostnames in cache, no update needed;")
            log(None, "core.debug", 6, "No hostnames in cache, sleep minimum expiration; sleep_sec='%d'", (left_s,))
        else:
            log(None, "core.debug", 6, "Sleep until next DNS expiration; sleep_sec='%d', host='%s'", (left_s, hostname))
        return left_s

    def _next(self) -> tuple[str, float]:
        """Return the name that expires next and the seconds until then; no name: "" and the least time."""
        try:
            hostname, expires = self._cache.getNextExpiration()
        except ValueError:
            return "", self._ttl_floor_s
        return hostname, expires - time.time()
