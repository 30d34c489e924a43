"""Address translation for connections to servers: NATPolicy and the classes that do the mapping.

    NATPolicy("hide", nat=GeneralNAT([(InetSubnet("10.0.0.0/8"), InetSubnet("0.0.0.0/0"),
                                       InetSubnet("198.51.100.0/24"))]))
    Service("web", HttpProxy, snat_policy="hide")

Theory of operation
    The chainer asks a service's policies with the pair (local address, server address), both
    untranslated: performTranslation(session, addrs, NAT_SNAT) for the address to come from,
    NAT_DNAT for the address to go to.  The answer is a new SockAddr, or None for "this policy
    does not translate that": SNAT then leaves the connection to the kernel's choice of address
    (to the client's, with forge_addr), DNAT leaves the server as it is.

    A cacheable policy remembers its answers by both addresses, so that a client meets a server
    always under the same address (RandomNAT).  It also remembers that it does not translate.

Threads
    Policies and NAT objects are shared by all sessions.  NATPolicy._answers_lock guards the
    step "nobody has decided yet, so this is the decision"; NAT objects run outside of it.

Deviations
    Remembered answers keep the kind of translation apart and keep a port that the translation
    chose.  With default_reject=FALSE, OneToOneNAT and HashNAT mean "not translated" for
    addresses outside; the original failed there, and failed in DNAT altogether.
"""

from __future__ import annotations

import ipaddress
import random
import threading
from collections.abc import Mapping
from typing import NamedTuple

from Zorp import Globals
from Zorp.Cache import ShiftCache
from Zorp.Constants import AF_INET, AF_INET6, CORE_DEBUG, CORE_POLICY, FALSE, TRUE
from Zorp.Exceptions import DACException, PolicyError, UserException
from Zorp.language import arguments
from Zorp.Log import enabled, log
from Zorp.SockAddr import SockAddr, SockAddrInet, SockAddrInet6, SockAddrUnix, from_ip_int
from Zorp.Subnet import Subnet

NAT_SNAT = 0
NAT_DNAT = 1

_CACHE_SHIFT_THRESHOLD = 1000
_random = random.SystemRandom()


class _Answer(NamedTuple):
    """What a policy remembers: the translated address, None for "not translated"."""

    address: SockAddr | None
    keeps_port: bool             # the port is that of the question, not that of `address`


class NATPolicy:
    """A named translation, for the snat_policy and dnat_policy of services.

    Arguments:
        name: unique among NAT policies.
        nat: an object of a NAT class.
        cacheable: TRUE: the same pair of addresses is always translated alike.

    Raises ValueError "Duplicate NATPolicy name: <name>" while the policy loads.
    """

    def __init__(self, name, nat, cacheable=TRUE):
        arguments.name("NATPolicy", "name", name)
        if name in Globals.nat_policies:
            raise PolicyError(f"Duplicate NATPolicy name: {name}", remedy="give each NATPolicy its own name")
        if isinstance(nat, type) or not hasattr(nat, "performTranslation"):
            raise PolicyError(f"Invalid NAT object; policy='{name}', nat='{nat}'",
                              remedy="give an object such as GeneralNAT([...])")
        self.name = name
        self.nat = nat
        self.cacheable = arguments.flag(f"NATPolicy '{name}'", "cacheable", cacheable)
        self.nat_cache = ShiftCache(f"nat({name})", _CACHE_SHIFT_THRESHOLD) if cacheable else None
        self._answers_lock = threading.Lock()
        Globals.nat_policies[name] = self

    def performTranslation(self, session, addrs, nat_type):
        """Translate addrs[nat_type]; return a new SockAddr, or None when the policy does not translate it.

        addrs: (source, destination), each a SockAddr or None.  nat_type: NAT_SNAT or NAT_DNAT.
        Raises DACException when the NAT class refuses the address.
        """
        if not enabled(CORE_DEBUG, 4):
            return self._decide(session, addrs, nat_type)
        session_id = getattr(session, "session_id", None)
        log(session_id, CORE_DEBUG, 4, "Before NAT mapping; nat_type='%d', src_addr='%s', dst_addr='%s'",
            (nat_type, *addrs))
        result = self._decide(session, addrs, nat_type)
        log(session_id, CORE_DEBUG, 4,
            "After NAT mapping; nat_type='%d', src_addr='%s', dst_addr='%s', new_addr='%s'",
            (nat_type, *addrs, result))
        return result

    def getKZorpMapping(self):
        """Return the mapping for the packet filter; ValueError when the NAT class has none."""
        if not hasattr(self.nat, "getKZorpMapping"):
            raise ValueError("NAT class does not support KZorp representation")
        return self.nat.getKZorpMapping()

    def _decide(self, session, addrs, nat_type):
        if not self.cacheable:
            return self._translate(session, addrs, nat_type)
        if addrs[NAT_SNAT] is None and addrs[NAT_DNAT] is None:
            raise ValueError("NAT without any address set")
        key = (nat_type, _host(addrs[NAT_SNAT]), _host(addrs[NAT_DNAT]))
        answer = self.nat_cache.lookup(key)
        if answer is None:
            result = self._translate(session, addrs, nat_type)
            answer = self._remember(key, _Answer(result, self._keeps_port(addrs[nat_type], result, nat_type)))
        if answer.address is None:
            return None
        result = answer.address.clone(FALSE)
        if answer.keeps_port and addrs[nat_type] is not None:
            result.port = addrs[nat_type].port
        return result

    def _translate(self, session, addrs, nat_type):
        result = self.nat.performTranslation(session, addrs, nat_type)
        if result is None or (result is addrs[nat_type] and getattr(self.nat, "unchanged_is_none", FALSE)):
            return None
        return result.clone(FALSE)

    def _remember(self, key, answer):
        with self._answers_lock:
            earlier = self.nat_cache.lookup(key)          # another session may have decided meanwhile
            if earlier is not None:
                return earlier
            self.nat_cache.store(key, answer)
        return answer

    def _keeps_port(self, question, result, nat_type):
        if result is None or question is None or SockAddrUnix in (type(question), type(result)):
            return False
        rule = getattr(self.nat, "keeps_port", None)      # (for SNAT, for DNAT); None: a class of the site
        return rule[nat_type] if rule is not None else result.port == question.port


def getNATPolicy(name):
    """Return the NATPolicy of that name; None, and a line in the log, when there is none."""
    if not name:
        return None
    policy = Globals.nat_policies.get(name)
    if policy is None:
        log(None, CORE_POLICY, 3, "No such NAT policy; policy='%s'", (name,))
    return policy


class AbstractNAT:
    """The base of NAT classes; sites derive from it.

    keeps_port: for SNAT and DNAT: TRUE when the result has the port of the question, FALSE when
    it has a port of its own; None: the policy looks at its first answer.
    """

    keeps_port = None
    unchanged_is_none = FALSE        # returning the question itself means "not translated"

    def performTranslation(self, session, addrs, nat_type):
        """Return the address to use for addrs[nat_type], None for "not translated"."""
        raise NotImplementedError


class ForgeClientSourceNAT(AbstractNAT):
    """The client's address with any port (obsolete: use forge_addr of the router)."""

    keeps_port = (FALSE, FALSE)

    def performTranslation(self, session, addrs, nat_type):
        return session.client_address.clone(TRUE)


class StaticNAT(AbstractNAT):
    """One fixed address and port."""

    keeps_port = (FALSE, FALSE)

    def __init__(self, addr):
        self.addr = _checked_address(addr, "StaticNAT")

    def performTranslation(self, session, addrs, nat_type):
        return self.addr.clone(FALSE)


class RandomNAT(AbstractNAT):
    """One of several addresses, with its port, at random."""

    keeps_port = (FALSE, FALSE)

    def __init__(self, addresses):
        if isinstance(addresses, SockAddr):
            addresses = (addresses,)
        if not isinstance(addresses, (list, tuple)) or not addresses:
            raise PolicyError(f"Invalid addresses of RandomNAT; addresses='{addresses}'",
                              remedy="give a list of SockAddrInet or SockAddrInet6")
        for address in addresses:
            _checked_address(address, "RandomNAT")
        self.addresses = addresses

    def performTranslation(self, session, addrs, nat_type):
        return _random.choice(self.addresses).clone(FALSE)


class GeneralNAT(AbstractNAT):
    """Nets mapped to nets, host by host.

    Arguments:
        mapping: a list of (source, destination, translated): where the connection comes from
            and goes to, and the net that replaces source in SNAT, destination in DNAT.  First
            match wins; a source that is not known matches.  The older (from, to) means
            (from, anything, to) in SNAT and (anything, from, to) in DNAT.

    Host bits that have no place in the translated net are cut.  Port and family stay.
    """

    keeps_port = (TRUE, TRUE)
    compatibility_mode = 0

    def __init__(self, mapping):
        self.mappings = [_checked_rule(rule) for rule in _as_rules(mapping)]

    def performTranslation(self, session, addrs, nat_type):
        address = addrs[nat_type]
        if address is None:
            return None
        for rule in self.mappings:
            *conditions, translated = rule
            if len(conditions) == 1:
                replaced = conditions[0]
                matches = _is_inside(address, replaced)
            else:
                replaced = conditions[nat_type]
                matches = _is_inside(addrs[NAT_SNAT], conditions[0]) and _is_inside(addrs[NAT_DNAT], conditions[1])
            if matches:
                return _moved(address, replaced, translated, address.port)
        return None

    def getKZorpMapping(self):
        """Return the rules as tuples of three subnets; ValueError when one has only two."""
        if any(len(rule) != 3 for rule in self.mappings):
            raise ValueError("GeneralNAT with old-style mapping parameter does not support KZorp representation")
        return [tuple(rule) for rule in self.mappings]


class _RejectingNAT(AbstractNAT):
    """What the classes with default_reject share."""

    keeps_port = (FALSE, TRUE)
    unchanged_is_none = TRUE

    def _outside(self, address):
        """Answer for an address that the class does not know."""
        if self.default_reject:
            raise DACException("IP not within the required range.")
        return address


class OneToOneNAT(_RejectingNAT):
    """One net mapped to another of the same size.

    Arguments:
        from_domain, to_domain: InetSubnet or Inet6Subnet.
        default_reject: TRUE: DACException for addresses outside from_domain; FALSE: they stay.

    SNAT leaves the port to the kernel, DNAT keeps it.
    """

    def __init__(self, from_domain, to_domain, default_reject=TRUE):
        _check_sizes("OneToOneNAT", from_domain, to_domain)
        self.from_domain = from_domain
        self.to_domain = to_domain
        self.default_reject = arguments.flag("OneToOneNAT", "default_reject", default_reject)

    def performTranslation(self, session, addrs, nat_type):
        return self.mapAddress(addrs[nat_type], self.from_domain, self.to_domain, nat_type)

    def mapAddress(self, addr, from_domain, to_domain, nat_type):
        """Return `addr` moved from one net to the other; what default_reject says when it is outside."""
        if addr is None or not _is_inside(addr, from_domain):
            return self._outside(addr)
        return _moved(addr, from_domain, to_domain, addr.port if nat_type == NAT_DNAT else 0)


class OneToOneMultiNAT(OneToOneNAT):
    """Several nets, each mapped to another of its size; the first that contains the address counts.

    Arguments:
        mapping: a list of (from_domain, to_domain).
        default_reject: see OneToOneNAT.
    """

    def __init__(self, mapping, default_reject=TRUE):
        self.mapping = _as_rules(mapping)
        for pair in self.mapping:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise PolicyError(f"Invalid mapping of OneToOneMultiNAT; item='{pair}'",
                                  remedy="give a list of (from, to) pairs of subnets")
            _check_sizes("OneToOneMultiNAT", *pair)
        self.default_reject = arguments.flag("OneToOneMultiNAT", "default_reject", default_reject)

    def performTranslation(self, session, addrs, nat_type):
        address = addrs[nat_type]
        for from_domain, to_domain in self.mapping:
            if address is not None and _is_inside(address, from_domain):
                return self.mapAddress(address, from_domain, to_domain, nat_type)
        return self._outside(address)


class HashNAT(_RejectingNAT):
    """Single addresses mapped to single addresses.

    Arguments:
        ip_hash: dictionary, IP text to IP text.
        default_reject: see OneToOneNAT.
    """

    def __init__(self, ip_hash, default_reject=TRUE):
        if not isinstance(ip_hash, Mapping):
            raise arguments.invalid("HashNAT", "ip_hash", ip_hash, "write HashNAT({'192.0.2.1': '10.0.0.1'})")
        for text in (*ip_hash.keys(), *ip_hash.values()):
            _address_of_text(text, 0)
        self.ip_hash = ip_hash
        self.default_reject = arguments.flag("HashNAT", "default_reject", default_reject)

    def performTranslation(self, session, addrs, nat_type):
        address = addrs[nat_type]
        text = self.ip_hash.get(getattr(address, "ip_s", None))
        if text is None:
            return self._outside(address)
        return _address_of_text(text, address.port if nat_type == NAT_DNAT else 0)


# Where the octets of an IPv4 address sit inside an IPv6 one (RFC 6052, 2.2); octet 8 stays zero.
_EMBEDDED_OCTETS = {
    32: (4, 5, 6, 7),
    40: (5, 6, 7, 9),
    48: (6, 7, 9, 10),
    56: (7, 9, 10, 11),
    64: (9, 10, 11, 12),
    96: (12, 13, 14, 15),
}


class NAT64(AbstractNAT):
    """The IPv4 address that is embedded in an IPv6 one (RFC 6052).

    Arguments:
        prefix_mask: number of bits before the IPv4 address: 32, 40, 48, 56, 64 or 96.

    Raises UserException: for another prefix_mask while the policy loads, for an IPv4 address later.
    """

    keeps_port = (TRUE, TRUE)

    def __init__(self, prefix_mask=96):
        _check_prefix_mask(prefix_mask)
        self.prefix_mask = prefix_mask

    def performTranslation(self, session, addrs, nat_type):
        address = addrs[nat_type]
        if address is None:
            return None
        if address.family != AF_INET6:
            raise UserException(
                f"NAT64 might only be used to translate IPv6 addresses; family='{address.family}'")
        octets = address.pack()
        embedded = bytes(octets[place] for place in _EMBEDDED_OCTETS[self.prefix_mask])
        return from_ip_int(AF_INET, int.from_bytes(embedded, "big"), address.port)


class NAT46(AbstractNAT):
    """An IPv6 address that embeds the IPv4 one (RFC 6052).

    Arguments:
        prefix: IPv6 text; its first prefix_mask bits are used.
        prefix_mask: see NAT64.
        suffix: IPv6 text; the octets behind the IPv4 address come from its end.

    Raises UserException: for wrong arguments while the policy loads, for an IPv6 address later.
    """

    keeps_port = (TRUE, TRUE)

    def __init__(self, prefix="64:ff9b::", prefix_mask=96, suffix="::"):
        _check_prefix_mask(prefix_mask)
        self.prefix_mask = prefix_mask
        self.prefix = prefix
        self.suffix = suffix
        self._frame = self._frame_of(_packed("prefix", prefix), _packed("suffix", suffix))

    def _frame_of(self, prefix, suffix):
        """Return the 16 octets around the IPv4 address."""
        end = max(_EMBEDDED_OCTETS[self.prefix_mask][-1], 8) + 1
        if any(suffix[:end]):
            raise UserException("Suffix length doesn't match the configured mask, the first "
                                f"{(128 - self.prefix_mask) // 8} bytes should be zeroes")
        start = self.prefix_mask // 8
        return prefix[:start] + bytes(end - start) + suffix[end:]

    def performTranslation(self, session, addrs, nat_type):
        address = addrs[nat_type]
        if address is None:
            return None
        if address.family != AF_INET:
            raise UserException(
                f"NAT46 might only be used to translate IPv4 addresses; family='{address.family}'")
        octets = bytearray(self._frame)
        for place, octet in zip(_EMBEDDED_OCTETS[self.prefix_mask], address.pack(), strict=True):
            octets[place] = octet
        return from_ip_int(AF_INET6, int.from_bytes(octets, "big"), address.port)


# ---------------------------------------------------------------------------- addresses and nets

def _host(address):
    """Return what tells hosts apart, as a part of a key."""
    if address is None:
        return None
    return str(address) if isinstance(address, SockAddrUnix) else (address.family, address.ip_int)


def _is_inside(address, net):
    """True for an address in the net, and for one that is not known."""
    return address is None or (address.family == net.family and net.contains_int(address.ip_int))


def _moved(address, from_net, to_net, port):
    """Return the address with its host bits relative to one net put into the other."""
    host_part = address.ip_int & ~from_net.mask_int
    return from_ip_int(to_net.family, to_net.network_int | (host_part & ~to_net.mask_int), port)


def _address_of_text(text, port):
    if not isinstance(text, str):
        raise PolicyError(f"Invalid address in HashNAT; address='{text}'", remedy="give IP addresses as text")
    return SockAddrInet6(text, port) if ":" in text else SockAddrInet(text, port)


# ---------------------------------------------------------------------------- checks at load

def _checked_address(address, user):
    if not isinstance(address, SockAddr):
        raise PolicyError(f"Invalid address of {user}; address='{address}'",
                          remedy="give a SockAddrInet or SockAddrInet6")
    return address


def _as_rules(mapping):
    """Return a sequence of rules; a single rule without its list around it is one too."""
    if not isinstance(mapping, (list, tuple)):
        return (mapping,)
    if mapping and all(isinstance(item, Subnet) for item in mapping):
        return (tuple(mapping),)
    return mapping


def _checked_rule(rule):
    if not isinstance(rule, (list, tuple)) or len(rule) not in (2, 3) \
            or not all(isinstance(net, Subnet) for net in rule):
        raise PolicyError(f"Invalid mapping of GeneralNAT; rule='{rule}'",
                          remedy="write (source, destination, translated), each an InetSubnet or Inet6Subnet")
    if len({net.family for net in rule}) != 1:
        raise PolicyError(f"Invalid mapping of GeneralNAT; rule='{rule}'",
                          remedy="the subnets of a rule must be of one family; see NAT46 and NAT64")
    return tuple(rule)


def _check_sizes(user, from_domain, to_domain):
    if not isinstance(from_domain, Subnet) or not isinstance(to_domain, Subnet) \
            or (from_domain.family, from_domain.mask_bits) != (to_domain.family, to_domain.mask_bits):
        raise PolicyError(f"{user} requires two domains of the same size",
                          remedy=f"give two subnets with the same mask, not {from_domain} and {to_domain}")


def _check_prefix_mask(prefix_mask):
    if not isinstance(prefix_mask, int) or prefix_mask not in _EMBEDDED_OCTETS:
        raise UserException(f"Prefix mask must be one of: {tuple(_EMBEDDED_OCTETS)}; mask='{prefix_mask}'")


def _packed(argument, text):
    try:
        if not isinstance(text, str):
            raise ValueError("not a text")
        return ipaddress.IPv6Address(text).packed
    except ValueError as problem:
        raise UserException(f"Invalid {argument} string specified; error='{problem}'") from None
