"""Addresses of sockets: what a policy connects to, binds to, and learns about a peer.

Theory of operation
    An address object holds its IP address twice, as an integer in host byte order (`ip_int`) and
    as canonical text, and its port; every way to change the address changes both forms.  The
    integers that policies see are made when somebody asks.  from_sockaddr() makes an address from
    what the kernel gave us; it lies on the way of every connection and only fills the three slots.

    `ip` of an IPv4 address is the network-order address read as an integer of this host, the
    form in which old policies compute (0x04030201 for 1.2.3.4 on a little-endian host); the
    constructor takes integers in host byte order.  The asymmetry is part of the interface.

    Objects are open: any other attribute may be assigned and read back.  Two addresses are
    equal when they name the same thing; the hash follows the current value, so an address that
    is a key of a dictionary must not be changed.

Deviations from the original, all towards refusing
    Bad IPv6 text is an error (it became "::"), so are over-long paths (they were cut) and
    ports outside 0 to 65535.  Python 2 policies in the field contain ports such as 70000:
    there they are cut to 16 bits as ever, with one line in the log that names the place.
    A range is checked when it is made, and a range without a free port ends after one round.
"""

from __future__ import annotations

import errno
import random
import re
import socket
import struct
from operator import attrgetter

from Zorp.Constants import CORE_DEBUG, CORE_ERROR, CORE_POLICY
from Zorp.Exceptions import PolicyError
from Zorp.language.caller import policy_caller
from Zorp.Log import log

_PATH_BYTES = 107                       # sun_path without its NUL
_PORT_MASK = 0xffff
_FOUR_PARTS = re.compile(r"(?:(?:0|[1-9][0-9]{0,2})\.){3}(?:0|[1-9][0-9]{0,2})", re.ASCII)
_LIKE_A_HOST_NAME = re.compile(r"[A-Za-z0-9_.-]*[A-Za-z][A-Za-z0-9_.-]*", re.ASCII)
_C_LIBRARY_FORM = re.compile(r"[0-9A-Fa-fxX.]+", re.ASCII)      # the C library stops at a blank and ignores the rest
_NETWORK_WORD = struct.Struct("!I")
_NATIVE_WORD = struct.Struct("=I")
_NATIVE_HALVES = struct.Struct("=8H")
_new = object.__new__

AF_UNIX = int(socket.AF_UNIX)
AF_INET = int(socket.AF_INET)
AF_INET6 = int(socket.AF_INET6)

__all__ = [
    "SockAddr", "SockAddrInet", "SockAddrInet6", "SockAddrInetHostname", "SockAddrInetRange", "SockAddrUnix",
    "getHostByName", "htonl", "inet_aton", "inet_ntoa", "inet_ntop", "inet_pton", "ntohl",
]

def ntohl(value):
    """Return a 32-bit number of network byte order in the order of the host; raises OverflowError beyond 32 bits."""
    return socket.ntohl(value)


def htonl(value):
    """Return a 32-bit number of the host's byte order in network order; raises OverflowError beyond 32 bits."""
    return socket.htonl(value)


# ---------------------------------------------------------------------------- text and numbers

def ipv4_from_text(text: str) -> int:
    """Return the host-order integer of dotted text; raises ValueError("Invalid IP address; ...").

    The forms of the C library (`10.1`, octal and hexadecimal parts) are understood, with a warning.
    """
    try:
        if _FOUR_PARTS.fullmatch(text):
            return int.from_bytes(socket.inet_aton(text), "big")
        if _C_LIBRARY_FORM.fullmatch(text):
            value = int.from_bytes(socket.inet_aton(text), "big")
            log(None, CORE_POLICY, 3, "Unusual notation of an IP address; text='%s', address='%s', place='%s'",
                (text, ipv4_text(value), policy_caller()))
            return value
    except OSError:
        pass
    raise PolicyError("Invalid IP address", remedy=f"write four decimal numbers from 0 to 255 with dots, not {text!r}")


def ipv4_text(value: int) -> str:
    """Return the dotted text of a host-order integer."""
    return socket.inet_ntoa(value.to_bytes(4, "big"))


def _ipv4_and_no_name(text: str) -> int:
    """As ipv4_from_text(); who gives the name of a host learns where it belongs."""
    try:
        return ipv4_from_text(text)
    except PolicyError as problem:
        if _LIKE_A_HOST_NAME.fullmatch(text) is None:
            raise
        remedy = f"{problem.remedy}; SockAddrInetHostname takes names of hosts"
        raise PolicyError(problem.problem, remedy=remedy) from None


def ipv6_from_text(text: str) -> int:
    """Return the 128-bit integer of IPv6 text; raises ValueError("Invalid IP address; ...")."""
    try:
        return int.from_bytes(socket.inet_pton(socket.AF_INET6, text), "big")
    except (OSError, UnicodeError, ValueError):
        raise PolicyError("Invalid IP address", remedy=f"write an IPv6 address such as '2001:db8::1', "
                                                       f"not {text!r}") from None


def ipv6_text(value: int) -> str:
    """Return the canonical text of a 128-bit integer."""
    return socket.inet_ntop(socket.AF_INET6, value.to_bytes(16, "big"))


def native_word(value: int) -> int:
    """Turn a host-order IPv4 integer into the form of `SockAddrInet.ip`."""
    return _NATIVE_WORD.unpack(value.to_bytes(4, "big"))[0]


def from_native_word(word: int) -> int:
    """Turn the form of `SockAddrInet.ip` into a host-order integer; negative numbers of 32-bit times are accepted."""
    if not -0x80000000 <= word <= 0xffffffff:
        raise PolicyError("Invalid parameter", remedy="an IPv4 address has 32 bits")
    return int.from_bytes(_NATIVE_WORD.pack(word & 0xffffffff), "big")


def native_halves(value: int) -> tuple[int, ...]:
    """Turn a 128-bit integer into the form of `SockAddrInet6.ip`: eight network-order words read natively."""
    return _NATIVE_HALVES.unpack(value.to_bytes(16, "big"))


def from_native_halves(halves) -> int:
    """Turn eight natively read words into a 128-bit integer; raises ValueError."""
    try:
        return int.from_bytes(_NATIVE_HALVES.pack(*halves), "big")
    except (struct.error, TypeError):
        raise PolicyError("Invalid parameter", remedy="give a tuple of eight numbers from 0 to 65535") from None


def checked_port(port) -> int:
    """Return a port number from 0 to 65535; raises ValueError, or cuts it where an old policy relies on that."""
    if not isinstance(port, int):
        raise PolicyError("Invalid parameter", remedy=f"a port is a number, not {port!r}")
    if 0 <= port <= _PORT_MASK:
        return int(port)
    caller = policy_caller()
    if not caller.is_legacy:
        raise PolicyError("Invalid parameter", remedy=f"a port is a number from 0 to 65535, not {port}")
    log(None, CORE_ERROR, 1, "Port number out of range, using its low 16 bits; port='%d', used='%d', place='%s'",
        (port, port & _PORT_MASK, caller))
    return port & _PORT_MASK


# ---------------------------------------------------------------------------- address objects

class SockAddr:
    """The base of all addresses; called itself it makes the one that fits the arguments.

        SockAddr('192.168.0.2', 80)  SockAddr('2001:db8::1', 80)  SockAddr('/run/socket')
    """

    __slots__ = ("__dict__",)

    def __new__(cls, *args, **kwargs):
        return _new(_class_for(args) if cls is SockAddr else cls)

    def __getattr__(self, name):
        raise AttributeError("No such attribute", name=name, obj=self)

    def _identity(self):
        raise NotImplementedError

    def __eq__(self, other):
        return self._identity() == other._identity() if isinstance(other, SockAddr) else NotImplemented

    def __hash__(self):
        return hash(self._identity())

    def __repr__(self):
        return str(self)

    def format(self):
        """Return the text that str() gives."""
        return str(self)

    def equal(self, other):
        """Return 1 when `other` has the same family and the same address and port (or path), else 0."""
        if not isinstance(other, SockAddr):
            raise ValueError("Argument must be a SockAddr instance")
        return int(self._identity()[:3] == other._identity()[:3])

    def bind(self, sock):
        """Bind a socket object to this address; raises OSError."""
        sock.bind(self.to_sockaddr())


class _Internet(SockAddr):
    """What IPv4 and IPv6 addresses share."""

    __slots__ = ("_port", "_text", "ip_int")

    type = property(lambda self: "inet", doc='"inet"')

    def _set_port(self, value):
        self._port = checked_port(value)

    def _set_ip_s(self, value):
        if not isinstance(value, str):
            raise PolicyError("Invalid parameter", remedy=f"ip_s is text, not {value!r}")
        self._set_ip_int(self._int_of(value))

    def _set_ip_int(self, value):
        self.ip_int = value
        self._text = self._text_of(value)

    # attrgetter: read several times per connection, and so without a call of Python code
    port = property(attrgetter("_port"), _set_port, doc="The port, 0 to 65535.")
    family = property(attrgetter("_family"), doc="AF_INET or AF_INET6.")
    ip_s = property(attrgetter("_text"), _set_ip_s, doc="The address as canonical text.")


class SockAddrInet(_Internet):
    """An IPv4 address and a port.

    Arguments:
        ip: dotted text, or an integer in host byte order; also under the name ip_addr.
        port: 0 to 65535.
    """

    __slots__ = ()
    _family = AF_INET
    _int_of, _text_of = staticmethod(ipv4_from_text), staticmethod(ipv4_text)

    def __init__(self, ip=None, port=None, ip_addr=None):
        ip = ip_addr if ip is None else ip
        if isinstance(ip, str):
            self._set_ip_int(_ipv4_and_no_name(ip))
        elif isinstance(ip, int) and 0 <= ip <= 0xffffffff:
            self._set_ip_int(int(ip))
        else:
            raise PolicyError("Invalid parameter", remedy=f"give the address as dotted text, not {ip!r}")
        self._port = checked_port(port)

    @property
    def ip(self):
        """The address as a network-order integer read natively."""
        return native_word(self.ip_int)

    @ip.setter
    def ip(self, value):
        if not isinstance(value, int):
            raise PolicyError("Invalid parameter", remedy=f"ip is a number; assign text such as {value!r} to ip_s")
        self._set_ip_int(from_native_word(value))

    def __str__(self):
        return f"AF_INET({self._text}:{self._port})"

    def _identity(self):
        return (AF_INET, self.ip_int, self._port)

    def to_sockaddr(self):
        """Return the tuple that socket calls take."""
        return (self._text, self._port)

    def pack(self):
        """Return the address as four octets in network order."""
        return self.ip_int.to_bytes(4, "big")

    def clone(self, wildcard):
        """Return an independent copy; its port is 0 when `wildcard` is true."""
        copy = _new(SockAddrInet)
        copy.ip_int = self.ip_int
        copy._text = self._text
        copy._port = 0 if wildcard else self._port
        return copy


class SockAddrInetHostname(SockAddrInet):
    """The first IPv4 address of a host name, looked up once, when the object is made.

    Raises ValueError("Invalid hostname; ...") when it does not resolve.
    """

    __slots__ = ()

    def __init__(self, hostname=None, port=None):
        super().__init__(_first_ipv4(hostname), port)


class SockAddrInetRange(SockAddrInet):
    """An IPv4 address with a range of ports; binding takes the next free one.

    The search starts at a random port, goes up to port_max, then from port_min; the next bind
    of the same object starts one above the port found.  `port` is 0 until then.
    """

    __slots__ = ("_start", "port_max", "port_min")

    def __init__(self, ip=None, port_min=None, port_max=None, ip_addr=None):
        super().__init__(ip, 0, ip_addr)
        self.port_min = checked_port(port_min)
        self.port_max = checked_port(port_max)
        if self.port_min > self.port_max:
            problem = (f"SockAddrInetRange, invalid range given; min_port='{self.port_min}', "
                       f"max_port='{self.port_max}'")
            log(None, CORE_ERROR, 3, problem)
            raise PolicyError(problem, remedy="give the lower port first")
        self._start = random.randint(self.port_min, self.port_max)

    def _identity(self):
        return (*super()._identity(), self.port_min, self.port_max)

    def clone(self, wildcard):
        """Return an independent copy that starts its search at another random port."""
        copy = SockAddrInetRange(self.ip_s, self.port_min, self.port_max)
        copy._port = 0 if wildcard else self._port
        return copy

    def bind(self, sock):
        """Bind a socket object to the next free port of the range; raises OSError when there is none."""
        self._port = bind_in_range(sock, self.ip_s, self.port_min, self.port_max, self._start)
        self._start = self._port + 1 if self._port < self.port_max else self.port_min


class SockAddrInet6(_Internet):
    """An IPv6 address and a port.

    `scope_id` is the number of the interface of a link-local peer, as the kernel gave it.
    """

    __slots__ = ("scope_id",)
    _family = AF_INET6
    _int_of, _text_of = staticmethod(ipv6_from_text), staticmethod(ipv6_text)

    def __init__(self, ip=None, port=None, ip_addr=None):
        ip = ip_addr if ip is None else ip
        if not isinstance(ip, str):
            raise PolicyError("Invalid parameter", remedy=f"give the address as text, not {ip!r}")
        self._set_ip_int(ipv6_from_text(ip))
        self._port = checked_port(port)
        self.scope_id = 0

    @property
    def ip(self):
        """The address as a tuple of eight network-order words read natively."""
        return native_halves(self.ip_int)

    @ip.setter
    def ip(self, value):
        self._set_ip_int(from_native_halves(value))

    def __str__(self):
        return f"AF_INET6({self._text}:{self._port})"

    def _identity(self):
        return (AF_INET6, self.ip_int, self._port)

    def to_sockaddr(self):
        """Return the tuple that socket calls take."""
        return (self._text, self._port, 0, self.scope_id)

    def pack(self):
        """Return the address as 16 octets in network order."""
        return self.ip_int.to_bytes(16, "big")

    def clone(self, wildcard):
        """Return an independent copy; its port is 0 when `wildcard` is true."""
        copy = _new(SockAddrInet6)
        copy.ip_int = self.ip_int
        copy._text = self._text
        copy._port = 0 if wildcard else self._port
        copy.scope_id = self.scope_id
        return copy


class SockAddrUnix(SockAddr):
    """The name of a local socket; empty: an anonymous one.

    Arguments:
        path: at most 107 bytes, also under the name socket_path.
    """

    __slots__ = ("_path",)

    family = property(lambda self: AF_UNIX, doc="AF_UNIX")
    type = property(lambda self: "unix", doc='"unix"')

    def __init__(self, path=None, socket_path=None):
        self.path = socket_path if path is None else path

    @property
    def path(self):
        """The file name."""
        return self._path

    @path.setter
    def path(self, value):
        if not isinstance(value, str):
            raise PolicyError("Invalid parameter", remedy=f"give the path as text, not {value!r}")
        if "\0" in value or len(value.encode("utf-8", "surrogateescape")) > _PATH_BYTES:
            raise PolicyError(f"Invalid socket path; path={value!r}",
                              remedy=f"use a path of at most {_PATH_BYTES} bytes without NUL")
        self._path = value

    def __str__(self):
        return f"AF_UNIX({self._path or 'anonymous'})"

    def _identity(self):
        return (AF_UNIX, self._path)

    def to_sockaddr(self):
        """Return the path that socket calls take."""
        return self._path

    def clone(self, wildcard):
        """Return an independent copy; the argument means nothing here."""
        copy = _new(SockAddrUnix)
        copy._path = self._path
        return copy


SockAddr.SockAddrInet = SockAddrInet
SockAddr.SockAddrInet6 = SockAddrInet6
SockAddr.SockAddrInetHostname = SockAddrInetHostname
SockAddr.SockAddrInetRange = SockAddrInetRange
SockAddr.SockAddrUnix = SockAddrUnix

SockAddrType = SockAddr
SockAddrInetType = SockAddrInet
SockAddrInet6Type = SockAddrInet6
SockAddrUnixType = SockAddrUnix


def _class_for(args):
    host = args[0] if args else None
    if not isinstance(host, str):
        raise PolicyError("Invalid parameter", remedy="SockAddr takes an address and a port, or a path")
    if len(args) == 1 and host.startswith("/"):
        return SockAddrUnix
    return SockAddrInet6 if ":" in host else SockAddrInet


def from_sockaddr(family, address):
    """Return the SockAddr of what getpeername(), accept() and their like gave; raises ValueError for other families."""
    if family == AF_INET:
        made = _new(SockAddrInet)
        text, port = address
        made._text, made._port = text, port
        (made.ip_int,) = _NETWORK_WORD.unpack(socket.inet_pton(AF_INET, text))
        return made
    if family == AF_INET6:
        made = _new(SockAddrInet6)
        text, _, _ = address[0].partition("%")
        made._text = text
        made._port = address[1]
        made.ip_int = int.from_bytes(socket.inet_pton(socket.AF_INET6, text), "big")
        made.scope_id = address[3] if len(address) > 3 else 0
        return made
    if family == AF_UNIX:
        made = _new(SockAddrUnix)
        made._path = address.decode("latin-1") if isinstance(address, bytes) else address or ""
        return made
    raise ValueError(f"No address class for this family; family='{family}'")


def from_ip_int(family, value, port):
    """Return the SockAddr of an integer in host byte order; `family` is AF_INET or AF_INET6."""
    made = _new(SockAddrInet if family == AF_INET else SockAddrInet6)
    made._set_ip_int(value)
    made._port = port
    if family == AF_INET6:
        made.scope_id = 0
    return made


def bind_in_range(sock, host, port_min, port_max, start):
    """Bind to the first free port from `start` up to port_max, then from port_min; return it.

    Raises OSError(EADDRINUSE) when all are taken, another OSError at once.
    """
    for port in (*range(start, port_max + 1), *range(port_min, start)):
        if _is_bound(sock, (host, port)):
            log(None, CORE_DEBUG, 6, "SockAddrInetRange, successfully bound; min_port='%d', max_port='%d', port='%d'",
                (port_min, port_max, port))
            return port
    log(None, CORE_ERROR, 3, "SockAddrInetRange, could not find free port to bind; min_port='%d', max_port='%d'",
        (port_min, port_max))
    raise OSError(errno.EADDRINUSE, f"could not find free port to bind; min_port='{port_min}', max_port='{port_max}'")


def _is_bound(sock, address):
    try:
        sock.bind(address)
    except OSError as problem:
        if problem.errno == errno.EADDRINUSE:
            return False
        raise
    return True


# ---------------------------------------------------------------------------- functions of old policies

def _first_ipv4(hostname):
    if not isinstance(hostname, str):
        raise PolicyError("Invalid parameter", remedy=f"give the host name as text, not {hostname!r}")
    try:
        return _ipv4_texts(hostname)[0]
    except (OSError, UnicodeError, IndexError):
        raise PolicyError("Invalid hostname", remedy=f"write a name that this host resolves to an IPv4 address, "
                                                     f"not {hostname!r}") from None


def _ipv4_texts(hostname):
    answers = socket.getaddrinfo(hostname, None, socket.AF_INET, socket.SOCK_STREAM)
    return list(dict.fromkeys(sockaddr[0] for *_, sockaddr in answers))


def getHostByName(hostname):
    """Return the IPv4 addresses of a name as dotted texts; raises IOError("Error resolving hostname.")."""
    try:
        return _ipv4_texts(hostname)
    except (OSError, UnicodeError):
        raise OSError("Error resolving hostname.") from None


def inet_aton(ip):
    """Return the network-order integer (read natively) of dotted text; raises ValueError."""
    return native_word(ipv4_from_text(ip))


def inet_ntoa(ip):
    """Return the dotted text of a network-order integer (read natively)."""
    return ipv4_text(from_native_word(ip))


def inet_ntop(family, packed):
    """Return the text of an IPv6 address given as eight natively read words."""
    _only_ipv6(family)
    return ipv6_text(from_native_halves(packed))


def inet_pton(family, text):
    """Return eight natively read words of IPv6 text; raises ValueError."""
    _only_ipv6(family)
    return native_halves(ipv6_from_text(text))


def _only_ipv6(family):
    if family != AF_INET6:
        raise PolicyError("Invalid parameter", remedy="inet_ntop and inet_pton of this module are for AF_INET6")
