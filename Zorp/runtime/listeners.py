"""Listening sockets: what a worker asks for, and how the master opens and keeps them.

Theory of operation
    A ListenSpec is the bind key of one socket as plain data; a worker sends it over its channel
    and gets a descriptor back.  The master keeps one open description per key in its
    ListenerTable, non-blocking from the start, and every worker of every generation gets a
    duplicate of the same one.  So a listening socket outlives workers and policies: a client
    that connects while they change waits in the kernel's queue, and nobody refuses it.

    Port 0 means "any free port", once per `ordinal`: the n-th such bind of a policy gets the
    same socket in every worker and after every reload, so that packet rules stay right.

    A listener is closed when no living generation uses it any more.

Nobody may change the shared open description later: no shutdown(), no settimeout().
"""

from __future__ import annotations

import dataclasses
import socket

from Zorp.Constants import ZD_PROTO_TCP, ZD_PROTO_UDP
from Zorp.transport.interfaces import remember_incoming_interface

_IP_TRANSPARENT = 19
_IP_FREEBIND = 15
_IP_RECVTOS = 13
_IP_RECVORIGDSTADDR = 20
_IPV6_TRANSPARENT = 75
_IPV6_FREEBIND = 78
_IPV6_RECVORIGDSTADDR = 74


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ListenSpec:
    """The bind key of one listening socket, and how to open it when it is the first."""

    protocol: int                # ZD_PROTO_TCP or ZD_PROTO_UDP
    family: int
    address: str
    port: int                    # 0: any free one
    ordinal: int = 0             # which of the binds to port 0 of this address
    backlog: int = 255
    rcvbuf_bytes: int = 65_536   # UDP
    transparent: bool = False

    @property
    def key(self) -> tuple:
        return self.protocol, self.family, self.address, self.port, self.ordinal


class ListenError(OSError):
    """A listening socket could not be opened; `step` names the call that failed."""

    def __init__(self, step: str, problem: OSError) -> None:
        super().__init__(problem.errno, problem.strerror or str(problem))
        self.step = step


def open_listener(spec: ListenSpec) -> socket.socket:
    """Open, bind and listen; return the socket, which does not block.  Raises ListenError."""
    kind = socket.SOCK_DGRAM if spec.protocol == ZD_PROTO_UDP else socket.SOCK_STREAM
    step = "socket"
    try:
        sock = socket.socket(spec.family, kind | socket.SOCK_NONBLOCK)
    except OSError as problem:
        raise ListenError(step, problem) from problem
    try:
        step = "setsockopt"
        _set_options(sock, spec)
        remember_incoming_interface(sock)
        step = "bind"
        sock.bind((spec.address, spec.port))
        if spec.protocol == ZD_PROTO_TCP:
            step = "listen"
            sock.listen(spec.backlog)
    except OSError as problem:
        sock.close()
        raise ListenError(step, problem) from problem
    return sock


def _set_options(sock: socket.socket, spec: ListenSpec) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    six = spec.family == socket.AF_INET6
    if six:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    if spec.transparent:
        if six:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
        else:
            sock.setsockopt(socket.SOL_IP, _IP_TRANSPARENT, 1)
            sock.setsockopt(socket.SOL_IP, _IP_FREEBIND, 1)
    if spec.protocol == ZD_PROTO_UDP:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, spec.rcvbuf_bytes)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        if six:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVORIGDSTADDR, 1)
        else:
            sock.setsockopt(socket.SOL_IP, _IP_RECVORIGDSTADDR, 1)
            sock.setsockopt(socket.SOL_IP, _IP_RECVTOS, 1)
    else:
        # Accepted sockets inherit it, which saves a call per connection.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class ListenerTable:
    """The master's listening sockets, by bind key, and the generations that use each."""

    def __init__(self) -> None:
        self._sockets: dict[tuple, socket.socket] = {}
        self._users: dict[tuple, set[int]] = {}

    def obtain(self, spec: ListenSpec, generation: int) -> socket.socket:
        """Return the socket of this key, opened now if need be.  Raises ListenError."""
        sock = self._sockets.get(spec.key)
        if sock is None:
            sock = self._sockets[spec.key] = open_listener(spec)
            self._users[spec.key] = set()
        self._users[spec.key].add(generation)
        return sock

    def release(self, generation: int) -> None:
        """Forget a generation; close what nobody uses any more."""
        for key in list(self._sockets):
            self._users[key].discard(generation)
            if not self._users[key]:
                self._sockets.pop(key).close()
                del self._users[key]

    def close(self) -> None:
        """Close everything, at the end or in a child."""
        for sock in self._sockets.values():
            sock.close()
        self._sockets.clear()
        self._users.clear()
