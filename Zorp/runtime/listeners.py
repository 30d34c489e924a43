"""Listening sockets: what a worker asks for, and how the master opens and keeps them.

Theory of operation
    A ListenSpec is the bind key of one socket as plain data; a worker sends it over its channel
    and gets a descriptor back.  The master keeps one open description per key in its
    ListenerTable, non-blocking from the start, and every worker of every generation gets a
    duplicate of the same one.  So a listening socket outlives workers and policies: a client
    that connects while they change waits in the kernel's queue, and nobody refuses it.

    Port 0 means "any free port", once per `ordinal`: the n-th such bind of a policy gets the
    same socket in every worker and after every reload.  Ports that packet rules lead to are
    even the same after a restart of the instance, as long as they are free: PortStore.

    A listener is closed when no living worker of a serving policy uses it any more.

Nobody may change how the shared open description accepts: no shutdown(), no settimeout().

Rejected: SO_REUSEPORT, also for the moment of a reload from every address of a port to one of them,
which is refused instead (ListenSpec.excludes).  The kernel remembers it for the port as long as
anybody listens there, when both sockets have long taken it back, and any process of our user, a
stacked program for one, can bind beside us then and gets every connection.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket

from Zorp.Constants import ZD_PROTO_TCP, ZD_PROTO_UDP
from Zorp.Log import log
from Zorp.transport.interfaces import remember_incoming_interface

_IP_TRANSPARENT = 19
_IP_FREEBIND = 15
_IP_RECVTOS = 13
_IP_RECVORIGDSTADDR = 20
_IPV6_TRANSPARENT = 75
_IPV6_FREEBIND = 78
_IPV6_RECVORIGDSTADDR = 74
_EVERY_ADDRESS = ("0.0.0.0", "::")


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
    lasting: bool = False        # port 0: try to get the port of the last start again

    @property
    def key(self) -> tuple:
        return self.protocol, self.family, self.address, self.port, self.ordinal

    def excludes(self, other: ListenSpec) -> bool:
        """True when the kernel does not let two listening sockets be open that differ in their address alone.

        One that listens on every address leaves none for another, whatever it asked for with
        SO_REUSEADDR; datagrams are no matter, and IPv6 listeners leave IPv4 alone (IPV6_V6ONLY).
        """
        return (self.protocol == other.protocol == ZD_PROTO_TCP and self.family == other.family
                and self.port == other.port != 0 and self.address != other.address
                and not {self.address, other.address}.isdisjoint(_EVERY_ADDRESS))


class ListenError(OSError):
    """A listening socket could not be opened.

    `step` names the call that failed; `obstacle` what of our own is in the way, "": nothing.
    """

    def __init__(self, step: str, problem: OSError) -> None:
        super().__init__(problem.errno, problem.strerror or str(problem))
        self.step = step
        self.obstacle = ""


def open_listener(spec: ListenSpec, ports: PortStore | None = None) -> socket.socket:
    """Open, bind and listen; return the socket, which does not block.  Raises ListenError.

    ports: where lasting ports are remembered.
    """
    if ports is None or not spec.lasting or spec.port:
        return _open(spec, spec.port)
    try:
        sock = _open(spec, ports.recall(spec))
    except ListenError:
        sock = _open(spec, 0)
    ports.remember(spec, sock.getsockname()[1])
    return sock


def _open(spec: ListenSpec, port: int) -> socket.socket:
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
        sock.bind((spec.address, port))
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
        _set_transparent(sock, six, True)
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


def port_store_path(options) -> str:
    """Where the instance of these options keeps the ports of its lasting listeners."""
    return os.path.join(options.state_dir, f"ports-{options.instance}.json")


def _set_transparent(sock: socket.socket, six: bool, on: bool) -> None:
    if six:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, on)
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, on)
    else:
        sock.setsockopt(socket.SOL_IP, _IP_TRANSPARENT, on)
        sock.setsockopt(socket.SOL_IP, _IP_FREEBIND, on)


class PortStore:
    """Ports of lasting listeners, in a small JSON file; without a directory for it, forgotten."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            with open(path, encoding="ascii") as file:
                known = json.load(file)
            self._ports = {str(key): int(port) for key, port in known.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            self._ports = {}

    def recall(self, spec: ListenSpec) -> int:
        """The port of the last time, 0 when there was none."""
        port = self._ports.get(self._name_of(spec), 0)
        return port if 0 < port <= 65_535 else 0

    def remember(self, spec: ListenSpec, port: int) -> None:
        """Write the port down for the next start."""
        if self._ports.get(self._name_of(spec)) == port:
            return
        self._ports[self._name_of(spec)] = port
        try:
            with open(self._path + ".new", "w", encoding="ascii") as file:
                json.dump(self._ports, file)
            os.replace(self._path + ".new", self._path)
        except OSError as problem:
            log(None, "core.error", 3, "Cannot store the ports of rule listeners; file='%s', error='%s'",
                (self._path, problem.strerror))

    @staticmethod
    def _name_of(spec: ListenSpec) -> str:
        return f"{spec.protocol} {int(spec.family)} {spec.address} {spec.ordinal}"


class ListenerTable:
    """The master's listening sockets by bind key, and who uses each, with which wishes."""

    def __init__(self, ports: PortStore | None = None) -> None:
        self._ports = ports
        self._sockets: dict[tuple, socket.socket] = {}
        self._users: dict[tuple, dict[int, ListenSpec]] = {}

    def obtain(self, spec: ListenSpec, user: int) -> socket.socket:
        """Return the socket of this key, opened now if need be.  Raises ListenError.

        A socket that is open already stays as it is until adjust().
        """
        sock = self._sockets.get(spec.key)
        if sock is None:
            try:
                sock = open_listener(spec, self._ports)
            except ListenError as problem:
                problem.obstacle = self._obstacle_to(spec)
                raise
            self._sockets[spec.key] = sock
            self._users[spec.key] = {}
        self._users[spec.key][user] = spec
        return sock

    def _obstacle_to(self, spec: ListenSpec) -> str:
        """Return the address of a socket of ours beside which this one cannot be."""
        return next((f"{held.address}:{held.port}" for users in self._users.values()
                     for held in users.values() if spec.excludes(held)), "")

    def adjust(self, user: int) -> None:
        """Give every socket of this user, who serves from now on, the options that it asked for."""
        for key, users in self._users.items():
            spec = users.get(user)
            if spec is not None:
                _adjust(self._sockets[key], spec)

    def release(self, user: int) -> None:
        """Forget a user; close what nobody uses any more."""
        for key in list(self._sockets):
            self.give_back(key, user)

    def give_back(self, key: tuple, user: int) -> None:
        """Forget a user of one socket, and close that when nobody uses it any more; others are no error."""
        users = self._users.get(key, {})
        if users.pop(user, None) is not None and not users:
            self._sockets.pop(key).close()
            del self._users[key]

    def close(self) -> None:
        """Close everything, at the end or in a child."""
        for sock in self._sockets.values():
            sock.close()
        self._sockets.clear()
        self._users.clear()


def _adjust(sock: socket.socket, spec: ListenSpec) -> None:
    """What a reload may change on an open listener: the length of its queue, and transparency."""
    with contextlib.suppress(OSError):               # as good as it was before
        _set_transparent(sock, spec.family == socket.AF_INET6, spec.transparent)
        if spec.protocol == ZD_PROTO_TCP:
            sock.listen(spec.backlog)
