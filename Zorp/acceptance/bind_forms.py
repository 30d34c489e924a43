"""The forms in which a policy may say where to listen, made into bind objects.

The names are those that policies know from Zorp.Dispatch.
"""

from __future__ import annotations

import re
import socket

from Zorp.acceptance.binds import DBSockAddr, DispatchBindType
from Zorp.Constants import ZD_PROTO_AUTO, ZD_PROTO_TCP, ZD_PROTO_UDP
from Zorp.Exceptions import PolicyError
from Zorp.language import arguments
from Zorp.SockAddr import SockAddrType

_IPPROTO = {ZD_PROTO_TCP: socket.IPPROTO_TCP, ZD_PROTO_UDP: socket.IPPROTO_UDP}
_PORT_RANGE = re.compile(r"\s*([0-9]{1,5})(?::([0-9]{1,5}))?\s*", re.ASCII)


def convertDBProtoToIPProto(dbproto):
    """Return the IP protocol number of ZD_PROTO_TCP or ZD_PROTO_UDP; raises ValueError for others."""
    if dbproto not in _IPPROTO:
        raise ValueError("Unknown dispatch bind protocol")
    return int(_IPPROTO[dbproto])


def convertIPProtoToDBProto(ipproto):
    """Return ZD_PROTO_TCP or ZD_PROTO_UDP for an IP protocol number; raises ValueError for others."""
    for dbproto, number in _IPPROTO.items():
        if number == ipproto:
            return dbproto
    raise ValueError(f"IP protocol not representable in DBProto; protocol='{ipproto}'")


def convertSockAddrToDB(sa, protocol):
    """Return the bind object for a SockAddr or bind object, or a list of them for a sequence.

    A bind object without protocol gets this one.  Raises ValueError when it has another, and
    for a bare SockAddr without a protocol.
    """
    if isinstance(sa, (list, tuple)):
        return [convertSockAddrToDB(item, protocol) for item in sa]
    if isinstance(sa, SockAddrType):
        if protocol == ZD_PROTO_AUTO:
            raise PolicyError("No preferred protocol specified",
                              remedy="wrap the address: DBSockAddr(sa, ZD_PROTO_TCP)")
        return DBSockAddr(sa, protocol)
    if not isinstance(sa, DispatchBindType):
        raise PolicyError(f"Expected SockAddr; bindto='{sa}'",
                          remedy="give a SockAddrInet, SockAddrInet6, DBSockAddr, DBIface or DBIfaceGroup")
    if sa.protocol == ZD_PROTO_AUTO:
        sa.protocol = protocol
    elif sa.protocol != protocol and protocol != ZD_PROTO_AUTO:
        raise PolicyError(f"Protocol number mismatch ({sa.protocol} != {protocol})",
                          remedy="leave the protocol out of the bind object, or use a Dispatcher")
    return sa


def parsePortString(s):
    """Return the (from, to) pairs of a port list: an int, "80", "80,443", "1024:2048,8080"; "" is none."""
    if isinstance(s, int) and 0 <= s <= arguments.LARGEST_PORT:
        return [(s, s)]
    if not s:
        return []
    ports = []
    for part in s.split(",") if isinstance(s, str) else (s,):
        found = _PORT_RANGE.fullmatch(part) if isinstance(part, str) else None
        low, high = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not low <= high <= 0xFFFF:
            raise PolicyError(f"Invalid port range: '{s}'",
                              remedy="write rule_port as \"80\", \"80,443\" or \"1024:2048\"")
        ports.append((low, high))
    return ports


def binds_of(bindto):
    """Return the bind objects of a dispatcher: at least one, all with the same explicit protocol."""
    if bindto is None or (isinstance(bindto, (list, tuple)) and not bindto):
        raise PolicyError("bindto is required argument and must be a sequence",
                          remedy="give bindto=DBSockAddr(SockAddrInet('192.0.2.1', 50080), ZD_PROTO_TCP)")
    items = bindto if isinstance(bindto, (list, tuple)) else (bindto,)
    binds = [convertSockAddrToDB(item, ZD_PROTO_TCP if isinstance(item, SockAddrType) else ZD_PROTO_AUTO)
             for item in items if not isinstance(item, (list, tuple))]
    if len(binds) != len(items):
        raise PolicyError(f"Expected SockAddr; bindto='{bindto}'", remedy="give one list, not a list of lists")
    if any(bind.protocol == ZD_PROTO_AUTO for bind in binds):
        raise PolicyError("No preferred protocol is specified", remedy="give the bind object protocol=ZD_PROTO_TCP")
    if len({bind.protocol for bind in binds}) > 1:
        raise PolicyError("Inconsistent protocol specified in dispatch addresses",
                          remedy="use one dispatcher for TCP and another one for UDP")
    return binds
