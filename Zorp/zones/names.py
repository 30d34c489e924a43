"""Keeps the addresses of zones' host names current.

Theory of operation
    One thread per process asks for the name that expires next, gives its addresses to the zone
    table, and sleeps until the next one is due.  Answers live for their TTL, at least
    TTL_FLOOR_S and at most TTL_CEILING_S; every wait is a little longer than it need be, by
    chance, so that the processes of an instance do not ask in step.

    A name that cannot be resolved keeps its last addresses for config.options.zone_dns_grace
    seconds after they ran out.  A name that does not exist any more loses them at once.  What goes
    wrong with one name keeps no other one from being asked (ResolverCache.refresh).

    The runtime starts the thread when the policy has been loaded and has zones with host names
    (Zone.has_dynamic_subnet).  Sessions never wait for it.
"""

from __future__ import annotations

import random
import threading
import time

from Zorp.Config import config
from Zorp.Constants import CORE_DEBUG, CORE_ERROR
from Zorp.Log import log, log_exception
from Zorp.ResolverCache import DNSResolver, ResolverCache
from Zorp.zones.table import ZoneTable

TTL_FLOOR_S = 60
TTL_CEILING_S = 86_400
_JITTER_S = 5
_IDLE_S = 3_600                  # no name at all: look again for one now and then


class ZoneNames:
    """The host names of a zone table, looked up again and again.

    refresh() is for one thread at a time; start() and stop() may be called by any.
    """

    def __init__(self, table: ZoneTable, resolver=None) -> None:
        self._table = table
        self._cache = ResolverCache(resolver or DNSResolver(), ttl_floor=TTL_FLOOR_S, ttl_ceiling=TTL_CEILING_S,
                                    stale_seconds=config.options.zone_dns_grace)
        self._stopping = threading.Event()
        self.tried_all = threading.Event()               # every name has been looked up once
        for hostname in table.hostnames():
            self._cache.watch(hostname)
        self._unknown = set(table.hostnames())           # never resolved so far

    def start(self) -> threading.Thread:
        """Keep the table current in a thread of its own, until stop()."""
        thread = threading.Thread(target=self._run, name="zone-names", daemon=True)
        thread.start()
        return thread

    def stop(self) -> None:
        """End the thread as soon as it does not wait for a name server."""
        self._stopping.set()

    def refresh(self) -> float:
        """Look up every name that is due, and return the seconds until the next one is."""
        while self._cache.hosts and not self._stopping.is_set():
            hostname, expires = self._cache.getNextExpiration()
            wait_s = expires - time.time()
            if wait_s > 0:
                log(None, CORE_DEBUG, 6, "Sleep until next DNS expiration; sleep_sec='%d', host='%s'",
                    (wait_s, hostname))
                return wait_s
            self._cache.refresh(hostname)
            try:
                self._hand_over(hostname)
            except Exception:                            # this name has had its turn, the others have theirs
                log_exception()
        return _IDLE_S

    def _hand_over(self, hostname: str) -> None:
        """Give the table what is known about a name now."""
        inet, inet6 = self._cache.lookupCachedHostname(hostname)
        addresses = sorted(inet) + sorted(inet6)
        self._table.feed({hostname: addresses})
        if hostname in self._unknown:
            self._report_first(hostname, addresses)

    def _report_first(self, hostname: str, addresses: list[str]) -> None:
        zone = self._table.name_owner(hostname).getName()
        if addresses:
            self._unknown.discard(hostname)
            ttl_s = max(self._cache.lookupTTL(hostname) - time.time(), 0)
            log(None, CORE_DEBUG, 6,
                "Hostname initially added to the cache; name='%s', ttl='%d', addresses='%s', zone='%s'",
                (hostname, ttl_s, ",".join(addresses), zone))
        else:
            log(None, CORE_ERROR, 2, "Hostname cannot be resolved; name='%s', zone='%s'", (hostname, zone))

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                wait_s = self.refresh()
                self.tried_all.set()
            except Exception:                            # a fault of ours: zones stay as they are, we try again
                log_exception()
                wait_s = TTL_FLOOR_S
            self._stopping.wait(wait_s + random.uniform(0, _JITTER_S))
