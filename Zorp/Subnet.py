"""Blocks of IP addresses: `InetSubnet("10.0.0.0/8")`, `Inet6Subnet("2001:db8::/32")`.

Theory of operation
    A subnet is its first address as an integer in host byte order (`network_int`) and a prefix
    length (`mask_bits`); `contains` is two integer operations.  Whoever compiles look-up tables
    (zones, rules) reads these two and `family`.  The other forms, integers read natively and
    packed octets, are made when asked for.

    One class per family has the methods of both generations: those of InetSubnet, and those of
    the older InetDomain (netaddr(), netmask(), ordering by inclusion).  InetDomain and
    Inet6Domain are subclasses whose text may be missing, which means every address.

    `A > B` means that A really contains B.  Two subnets neither of which contains the other are
    not comparable: ValueError.  With an address the comparison is a membership test, and
    answers True or False.

Deviation from the original
    Host bits (`192.168.0.1/24`) used to make a subnet that contains nothing.  Here they are
    kept in text only, and reported once; every comparison uses the network.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import threading

from Zorp.Constants import AF_INET, AF_INET6, AF_UNSPEC, CORE_DEBUG, CORE_POLICY, FALSE, TRUE
from Zorp.Exceptions import PolicyError
from Zorp.language.caller import policy_caller
from Zorp.Log import log
from Zorp.SockAddr import (
    SockAddrInet,
    SockAddrInet6,
    from_native_halves,
    from_native_word,
    ipv4_text,
    ipv6_text,
    native_halves,
    native_word,
)

_BITS = re.compile(r"[0-9]{1,3}", re.ASCII)
_REPORTED_TEXTS = 1000

__all__ = [
    "IPRange", "Inet6Domain", "Inet6Subnet", "InetDomain", "InetSubnet", "Subnet",
    "packed_1operand", "packed_2operand", "packed_mask",
]


class _ReportedOnce:
    """Texts that were reported already, so that a zone file is not repeated in the log.

    _texts_lock guards _texts, which stops growing at _REPORTED_TEXTS: later ones are not reported.
    """

    def __init__(self):
        self._texts_lock = threading.Lock()
        self._texts = set()

    def is_new(self, text):
        with self._texts_lock:
            if text in self._texts or len(self._texts) >= _REPORTED_TEXTS:
                return False
            self._texts.add(text)
            return True


_host_bits_reported = _ReportedOnce()


class IPRange:
    """The first and the last address of a subnet, as integers; [0] and [-1] give them as address objects."""

    __slots__ = ("_address", "first", "last")

    def __init__(self, address, first, last):
        self._address = address
        self.first = first
        self.last = last

    def __len__(self):
        return min(self.last - self.first + 1, 0x7fffffffffffffff)

    def __getitem__(self, index):
        value = self.first + index if index >= 0 else self.last + 1 + index
        if not self.first <= value <= self.last:
            raise IndexError("index out of range")
        return self._address(value)

    def __repr__(self):
        return f"{self._address(self.first)}-{self._address(self.last)}"


class Subnet:
    """The base of both families; also the abstract domain of old policies (family 0)."""

    __slots__ = ("__dict__", "_address_int", "mask_bits", "network_int")

    family = AF_UNSPEC
    _width = 0                     # bits of an address

    def __init__(self):
        self._address_int = self.network_int = self.mask_bits = 0

    @staticmethod
    def create(addr):
        """Return the subnet that the text describes; raises ValueError("Invalid subnet specification: ...")."""
        if isinstance(addr, str):
            if ":" in addr:
                return Inet6Subnet(addr)
            if "." in addr:
                return InetSubnet(addr)
        raise _invalid(addr)

    def _parse(self, text):
        """Set the three numbers from `address[/bits]`; raises PolicyError."""
        if not isinstance(text, str):
            raise _invalid(text)
        address, slash, bits = text.partition("/")
        try:
            value = int.from_bytes(socket.inet_pton(self.family, address), "big")
        except (OSError, ValueError):
            raise _invalid(text) from None
        length = int(bits) if _BITS.fullmatch(bits) else self._width + 1
        if not slash:
            length = self._width
        if length > self._width:
            raise _invalid(text)
        host_bits = self._width - length
        self._address_int = value
        self.network_int = value >> host_bits << host_bits
        self.mask_bits = length
        if value != self.network_int and _host_bits_reported.is_new(text):
            log(None, CORE_POLICY, 3, "Host bits of subnet ignored; subnet='%s', network='%s', place='%s'",
                (text, self._network_text(), policy_caller()))

    # ------------------------------------------------------------------ numbers

    @property
    def mask_int(self):
        """The netmask as an integer in host byte order."""
        return (1 << self._width) - (1 << (self._width - self.mask_bits))

    @property
    def last_int(self):
        """The last address as an integer in host byte order."""
        return self.network_int | ((1 << (self._width - self.mask_bits)) - 1)

    @property
    def ip(self):
        """The network address, packed in network order."""
        return self.addr_packed()

    @property
    def mask(self):
        """The netmask, packed in network order."""
        return self.netmask_packed()

    @property
    def ip_range(self):
        """The first and the last address."""
        return IPRange(self._ip_object, self.network_int, self.last_int)

    def addr_packed(self):
        """Return the network address as octets in network order."""
        return self.network_int.to_bytes(self._width // 8, "big")

    def netmask_packed(self):
        """Return the netmask as octets in network order."""
        return self.mask_int.to_bytes(self._width // 8, "big")

    def addr_int(self):
        """Return the network address as native-read number(s), as in `SockAddr.ip`."""
        return self._native(self.network_int)

    def netmask_int(self):
        """Return the netmask as native-read number(s)."""
        return self._native(self.mask_int)

    def netmask_bits(self):
        """Return the prefix length."""
        return self.mask_bits

    netmaskbits = netmask_bits
    netaddr = addr_int
    netmask = netmask_int
    network = addr_int

    def broadcast(self):
        """Return the last address as native-read number(s); for /0 the network address itself."""
        return self._native(self.last_int if self.mask_bits else self.network_int)

    def get_family(self):
        """Return AF_INET or AF_INET6."""
        return self.family

    def _network_text(self):
        return f"{self._text(self.network_int)}/{self.mask_bits}"

    # ------------------------------------------------------------------ inclusion

    def contains(self, other):
        """Return whether `other`, a subnet or an address, lies inside or is equal; nothing else is contained."""
        return self._includes_address(other) or self._includes_subnet(other)

    def contains_int(self, value):
        """Return whether an address, an integer in host byte order, lies inside."""
        return (value ^ self.network_int) >> (self._width - self.mask_bits) == 0

    def _includes_address(self, other):
        return isinstance(other, self._address_class) and self.contains_int(other.ip_int)

    def _includes_subnet(self, other):
        return (isinstance(other, Subnet) and other.family == self.family and other.mask_bits >= self.mask_bits
                and self.contains_int(other.network_int))

    def getHostAddr(self, addr):
        """Return the host part of an address, in the form that mapHostAddr() takes; to be overridden."""
        raise NotImplementedError

    def mapHostAddr(self, addr):
        """Return this network with another host part, suitable for `sockaddr.ip`; to be overridden."""
        raise NotImplementedError

    def _host_part(self, value):
        return value & ~self.mask_int

    # ------------------------------------------------------------------ order

    def __eq__(self, other):
        if not isinstance(other, Subnet):
            return NotImplemented
        return (self.family, self.network_int, self.mask_bits) == (other.family, other.network_int, other.mask_bits)

    def __hash__(self):
        return hash((self.family, self.network_int, self.mask_bits))

    def __gt__(self, other):
        if isinstance(other, Subnet):
            self._must_be_comparable(other)
            return self != other and self._includes_subnet(other)
        return self._includes_address(other) if isinstance(other, _ADDRESSES) else NotImplemented

    def __ge__(self, other):
        if isinstance(other, Subnet):
            self._must_be_comparable(other)
            return self._includes_subnet(other)
        return self._includes_address(other) if isinstance(other, _ADDRESSES) else NotImplemented

    def __lt__(self, other):
        if isinstance(other, Subnet):
            self._must_be_comparable(other)
            return self != other and other._includes_subnet(self)
        return False if isinstance(other, _ADDRESSES) else NotImplemented

    def __le__(self, other):
        if isinstance(other, Subnet):
            self._must_be_comparable(other)
            return other._includes_subnet(self)
        return False if isinstance(other, _ADDRESSES) else NotImplemented

    def _must_be_comparable(self, other):
        if not self._includes_subnet(other) and not other._includes_subnet(self):
            raise ValueError(f"{self} and {other} are incomparable")

    def __repr__(self):
        return f"{type(self).__name__}('{self}')"


class InetSubnet(Subnet):
    """A block of IPv4 addresses.

    Arguments:
        addr: `a.b.c.d/bits` or `a.b.c.d`, which is one address.

    Raises ValueError("Invalid subnet specification: ...").
    """

    __slots__ = ()

    family = AF_INET
    _width = 32
    _address_class = SockAddrInet
    _ip_object = ipaddress.IPv4Address
    _text = staticmethod(ipv4_text)
    _native = staticmethod(native_word)

    def __init__(self, addr):
        self._parse(addr)

    def addr_str(self):
        """Return the address as it was written."""
        return ipv4_text(self._address_int)

    def __str__(self):
        return f"{ipv4_text(self._address_int)}/{self.mask_bits}"

    def getHostAddr(self, addr):
        """Return `addr.ip` without the bits of the network, as a native-read integer."""
        return native_word(self._host_part(addr.ip_int))

    def mapHostAddr(self, addr):
        """Return this network with the host bits of `addr`, a native-read integer, as one."""
        return native_word(self.network_int | self._host_part(from_native_word(addr)))


class Inet6Subnet(Subnet):
    """A block of IPv6 addresses.

    Arguments:
        addr: `x:y::z/bits` or `x:y::z`, which is one address.

    Raises ValueError("Invalid subnet specification: ...").
    """

    __slots__ = ()

    family = AF_INET6
    _width = 128
    _address_class = SockAddrInet6
    _ip_object = ipaddress.IPv6Address
    _text = staticmethod(ipv6_text)
    _native = staticmethod(native_halves)

    def __init__(self, addr):
        self._parse(addr)

    def addr_str(self):
        """Return the network address."""
        return ipv6_text(self.network_int)

    def __str__(self):
        return self._network_text()

    def getHostAddr(self, addr):
        """Return 16 octets: the address without the bits of the network."""
        return self._host_part(addr.ip_int).to_bytes(16, "big")

    def mapHostAddr(self, addr):
        """Return this network with the host bits of `addr`, 16 octets or eight native-read words, as eight words."""
        value = int.from_bytes(addr, "big") if isinstance(addr, bytes) else from_native_halves(addr)
        return native_halves(self.network_int | self._host_part(value))


class InetDomain(InetSubnet):
    """The older name of InetSubnet: text may be missing or empty, which means every address.

    `ip` and `mask` are native-read integers, as this class always had them, and str() shows the network.
    """

    __slots__ = ()

    deprecated_warning = TRUE

    def __init__(self, addr=None):
        _warn_of_old_name()
        super().__init__(addr or "0.0.0.0/0")

    ip = property(InetSubnet.addr_int, doc="The network address as a native-read integer.")
    mask = property(InetSubnet.netmask_int, doc="The netmask as a native-read integer.")

    def __str__(self):
        return self._network_text()


class Inet6Domain(Inet6Subnet):
    """The older name of Inet6Subnet: text may be missing or empty, which means every address.

    `ip` and `mask` are tuples of eight native-read words.
    """

    __slots__ = ()

    def __init__(self, addr=None):
        super().__init__(addr or "::/0")

    ip = property(Inet6Subnet.addr_int, doc="The network address as eight native-read words.")
    mask = property(Inet6Subnet.netmask_int, doc="The netmask as eight native-read words.")


_ADDRESSES = (SockAddrInet, SockAddrInet6)


def _invalid(text):
    return PolicyError(f"Invalid subnet specification: value='{text}'",
                       remedy="write an address and a prefix length, such as 10.0.0.0/8 or 2001:db8::/32; "
                              "netmasks and host names have no place here")


def _warn_of_old_name():
    if InetDomain.deprecated_warning:
        InetDomain.deprecated_warning = FALSE
        log(None, CORE_DEBUG, 3,
            "Use of InetDomain class is deprecated, InetSubnet should be used instead.; place='%s'", (policy_caller(),))


# ---------------------------------------------------------------------------- functions of old policies

def packed_1operand(a, f):
    """Return packed octets with `f` applied to each one."""
    return bytes(f(octet) & 0xff for octet in a)


def packed_2operand(a, b, f):
    """Return packed octets with `f` applied to each pair of two equally long ones."""
    return bytes(f(left, right) & 0xff for left, right in zip(a, b, strict=True))


def packed_mask(addr, mask):
    """Return the octets of `addr` that `mask` lets through."""
    return packed_2operand(addr, mask, lambda octet, bits: octet & bits)
