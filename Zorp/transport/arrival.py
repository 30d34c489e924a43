"""Where a client wanted to go before a REDIRECT rule of the packet filter sent it to us.

The connection tracking of the kernel remembers it per connection.  The question costs one
system call and keeps no state; any thread may ask.  Never ask for a connection that TPROXY
diverted: its tracking entry may be the reversed one of another connection.
"""

from __future__ import annotations

import socket

_SO_ORIGINAL_DST = 80                  # of SOL_IP and SOL_IPV6, linux/netfilter_ipv4.h
_ASK = {                               # family: level, length of the answer, where the address is
    socket.AF_INET: (socket.IPPROTO_IP, 16, slice(4, 8)),            # struct sockaddr_in
    socket.AF_INET6: (socket.IPPROTO_IPV6, 28, slice(8, 24)),        # struct sockaddr_in6
}
_PORT = slice(2, 4)


def original_destination(sock: socket.socket, family: int) -> tuple[str, int] | None:
    """Return (address text, port) the connection tracking remembers, or None when it knows nothing."""
    try:
        level, length, address = _ASK[family]
        raw = sock.getsockopt(level, _SO_ORIGINAL_DST, length)
    except (KeyError, OSError):
        return None
    return socket.inet_ntop(family, raw[address]), int.from_bytes(raw[_PORT], "big")
