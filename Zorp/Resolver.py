"""Resolvers: from the host name that a client asks for to the addresses that we connect to.

    Service("proxy", HttpProxy, router=InbandRouter(), resolver_policy="inside")
    ResolverPolicy("inside", HashResolver({"www": ("10.0.0.1", "10.0.0.2")}))

`resolve(host, port)` answers one SockAddr, a sequence of them, or None.  It runs in the
session's own thread and returns within Zorp.matching.host_names.LIFETIME_SECONDS.  A host that is an
address already goes the same way, and causes no DNS traffic.

Deviations from the original
    Answers are kept for their TTL.  Each address comes once (it came once per socket type).
    Name service switches other than the hosts file and DNS are not consulted, because they
    have no deadline.
"""

from __future__ import annotations

from collections.abc import Mapping

from Zorp import Globals
from Zorp.Constants import AF_INET, AF_INET6, AF_UNSPEC, CORE_POLICY, FALSE
from Zorp.Exceptions import PolicyError
from Zorp.language import arguments
from Zorp.Log import log
from Zorp.matching import host_names
from Zorp.matching.host_names import address_from_text
from Zorp.SockAddr import from_ip_int, from_sockaddr

__all__ = [
    "AbstractResolver", "DNSResolver", "HashResolver", "ResolverPolicy", "create_sockaddr", "getResolverPolicy",
]


class AbstractResolver:
    """What a resolver can do; policies derive their own from it."""

    def resolve(self, host, port):
        """Return one SockAddr, a sequence of them, or None when the name has no address."""
        raise NotImplementedError


class DNSResolver(AbstractResolver):
    """Asks what this host asks: the hosts file, then DNS.

    Arguments:
        multi: TRUE: answer all addresses as a list; FALSE: the best one.
        family: AF_INET, AF_INET6, or AF_UNSPEC for both.
    """

    def __init__(self, multi=FALSE, family=AF_UNSPEC):
        if not isinstance(family, int) or family not in (AF_UNSPEC, AF_INET, AF_INET6):
            raise PolicyError(f"Invalid address family; family='{family}'",
                              remedy="write AF_INET, AF_INET6 or AF_UNSPEC")
        self.multi = arguments.flag("DNSResolver", "multi", multi)
        self.family = family

    def resolve(self, host, port):
        """Return one SockAddr, or a list when `multi`; None when the name does not resolve."""
        addresses = host_names.system_names.addresses(host, self.family)
        if not addresses:
            return None
        if self.multi:
            return [from_ip_int(family, ip_int, port) for family, ip_int in addresses]
        return from_ip_int(*addresses[0], port)


class HashResolver(AbstractResolver):
    """Knows the names of a dictionary and no others.

    Arguments:
        mapping: host name to address as text, or to a sequence of them.

    Names are compared as written, then without regard to case and a final dot.  Raises
    ValueError when a value is not an address.
    """

    def __init__(self, mapping):
        if not isinstance(mapping, Mapping):
            raise PolicyError("HashResolver needs a dictionary",
                              remedy="write HashResolver({'www.example.com': '192.0.2.1'})")
        self.mapping = mapping
        self._folded = {}
        for host, value in mapping.items():
            _addresses_of(host, value)
            self._folded.setdefault(_folded(host), host)

    def resolve(self, host, port):
        """Return a list of SockAddr, None for a name that the dictionary does not have."""
        value = self.mapping.get(host)
        if value is None:
            host = self._folded.get(_folded(host))
            value = self.mapping.get(host)
        if not value:
            return None
        return [from_ip_int(family, ip_int, port) for family, ip_int in _addresses_of(host, value)]


def _folded(host):
    return host.lower().removesuffix(".")


def _addresses_of(host, value):
    remedy = "map each host name to an IP address or a sequence of them"
    addresses = [address_from_text(text) if isinstance(text, str) else None
                 for text in arguments.items("HashResolver", "mapping", value, remedy)]
    if None in addresses or not isinstance(host, str):
        raise PolicyError(f"Invalid IP address; host='{host}', value={value!r}", remedy=remedy)
    return addresses


class ResolverPolicy:
    """A resolver under a name, which services refer to; without a name it is not registered."""

    def __init__(self, name, resolver):
        if not callable(getattr(resolver, "resolve", None)):
            raise PolicyError(f"ResolverPolicy needs a resolver; policy='{name}'",
                              remedy="give it a DNSResolver, a HashResolver, or an object with resolve(host, port)")
        self.name = name
        self.resolver = resolver
        if name:
            arguments.name("ResolverPolicy", "name", name)
            if name in Globals.resolver_policies:
                raise PolicyError(f"Duplicate ResolverPolicy: {name}", remedy="give each policy its own name")
            Globals.resolver_policies[name] = self

    def resolve(self, host, port):
        """Return what the resolver answers."""
        return self.resolver.resolve(host, port)


def getResolverPolicy(name):
    """Return the policy of that name, None for no name; raises ValueError for an unknown one."""
    if not name:
        return None
    policy = Globals.resolver_policies.get(name)
    if policy is None:
        problem = f"No such resolver policy; policy='{name}'"
        log(None, CORE_POLICY, 3, problem)
        raise PolicyError(problem, remedy="define ResolverPolicy of that name before the service that uses it")
    return policy


def create_sockaddr(addrinfo, port):
    """Return the SockAddr of one entry that socket.getaddrinfo() gave, with another port."""
    address = from_sockaddr(addrinfo[0], addrinfo[4])
    address.port = port
    return address
