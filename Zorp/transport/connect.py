"""Connects a socket: from which address and port, to where, within how many milliseconds.

Theory of operation
    A Connector is one attempt to reach one remote address.  run() makes the socket, binds it
    when a Source says where the connection must come from, sets the options, connects without
    blocking and waits in poll(), whose timeout has the resolution of a millisecond.  It
    returns a socket in blocking mode, or raises a child of ConnectError that names the step.

    A Source is a host address and the local ports to try, in order.  A port that is taken
    shows in two ways: bind() fails with EADDRINUSE, or, because SO_REUSEADDR lets sockets
    share a port as long as their peers differ, connect() fails with EADDRNOTAVAIL.  Both mean
    "try the next port"; when no port is left the last error is the result.  So an exact port
    is simply a Source with one port.

    A bind to an address that is not the host's needs a transparent socket.  Where the process
    may not make one, the bind is still tried without: it succeeds for the host's own addresses
    and fails for all others.  There is no way in which the connection leaves with another
    address than the one asked for.

Guarantees
    No descriptor outlives a failed run().  A mark that cannot be set fails the attempt, since
    a mark is only asked for where routing depends on it; a TOS value that cannot be set is
    noted in option_failures and forgotten.  IPv6 sockets never talk IPv4 (IPV6_V6ONLY), so
    a mapped address cannot get around rules that were written for IPv4.

Threads
    run() belongs to one thread.  abort() may be called by any other, before, during and after
    run(); it makes run() raise ConnectInterrupted.  _sock_lock guards _sock and _aborted.

    No log and no policy here: Zorp.Attach turns the results into log lines.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import select
import socket
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

IP_FREEBIND = 15                     # linux/in.h; the socket module does not have these
IP_TRANSPARENT = getattr(socket, "IP_TRANSPARENT", 19)
IP_BIND_ADDRESS_NO_PORT = 24
IPV6_TRANSPARENT = 75
IPV6_FREEBIND = 78
SO_MARK = getattr(socket, "SO_MARK", 36)

PORT_GROUPS = ((1, 511), (512, 1023), (1024, 65535))     # a server must not tell the client's group apart
_RANDOM_SHARE = 8                    # random ports are tried up to this fraction of the group's size
_WILDCARDS = ("0.0.0.0", "::")
_INET = (socket.AF_INET, socket.AF_INET6)
_COLLISIONS = (errno.EADDRINUSE, errno.EADDRNOTAVAIL)
_BROKEN = select.POLLERR | select.POLLHUP
_UNIX_RETRY_S = 0.01                 # a full backlog of a local socket cannot be waited for with poll()


class ConnectError(OSError):
    """An attempt failed; errno and strerror say why, fd is the socket's number (-1: none)."""

    def __init__(self, code: int, fd: int = -1, text: str | None = None) -> None:
        super().__init__(code, text or os.strerror(code))
        self.fd = fd


class SocketFailed(ConnectError):
    """No socket could be made."""


class BindFailed(ConnectError):
    """The local address or every allowed local port is refused."""


class MarkFailed(ConnectError):
    """The packet mark could not be set."""


class ConnectFailed(ConnectError):
    """The remote end or the network refused.  `at_once`: connect() itself said so."""

    def __init__(self, code: int, fd: int, *, at_once: bool) -> None:
        super().__init__(code, fd)
        self.at_once = at_once


class ConnectTimeout(ConnectError):
    """The remote end did not answer in time."""

    def __init__(self, fd: int = -1) -> None:
        super().__init__(errno.ETIMEDOUT, fd, "connection timed out")


class ConnectInterrupted(ConnectError):
    """abort() was called."""

    def __init__(self, fd: int = -1) -> None:
        super().__init__(errno.ECANCELED, fd, "interrupted by a stop request")


class SelfConnection(ConnectError):
    """The socket got connected to itself: the kernel chose the remote port as the local one."""

    def __init__(self, fd: int) -> None:
        super().__init__(errno.ELOOP, fd, "connected to itself")


Connected = tuple[socket.socket, tuple | str]       # in blocking mode, and its own address, as getsockname() gives it


def exact(port: int) -> Iterator[int]:
    """This port and no other; 0: the kernel chooses."""
    yield port


def port_group(port: int) -> tuple[int, int]:
    """Return the first and last port of the group that `port` (1 to 65535) belongs to."""
    return next(group for group in PORT_GROUPS if group[0] <= port <= group[1])


def same_group(port: int) -> Iterator[int]:
    """`port` first, then the others of its group upwards, around, each once; 0: the kernel chooses."""
    yield from in_range(*port_group(port), start=port) if port else exact(0)


def random_in_group(port: int) -> Iterator[int]:
    """Unpredictable ports of the group of `port`, and in the end each port of it once; 0: the kernel chooses."""
    if not port:
        yield 0
        return
    low, high = port_group(port)
    size = high - low + 1
    for _ in range(size // _RANDOM_SHARE):
        yield low + secrets.randbelow(size)
    yield from in_range(low, high, start=low + secrets.randbelow(size))


def in_range(low: int, high: int, start: int | None = None) -> Iterator[int]:
    """Every port from `low` to `high` once, beginning at `start` (None: at a random one) and going around."""
    if start is None:
        start = low + secrets.randbelow(high - low + 1)
    yield from range(start, high + 1)
    yield from range(low, start)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a connection must come from.

    address: what bind() takes: (ip, port), (ip, port, flow, scope) or a path; the port is ignored.
    ports: the local ports to try, in order; not used for a path.
    """

    family: int
    address: tuple | str
    ports: Iterable[int] = (0,)

    @property
    def foreign(self) -> bool:
        """True when the address may belong to another host: it is not the wildcard."""
        return self.family in _INET and self.address[0] not in _WILDCARDS


class OptionFailure(NamedTuple):
    """An option that could not be set and that the connection can do without."""

    option: str              # "reuseaddr" or "tos"
    fd: int
    error: OSError


class Connector:
    """One attempt to connect.

    Arguments:
        family, kind: of the socket (AF_INET, AF_INET6 or AF_UNIX; SOCK_STREAM or SOCK_DGRAM).
        remote: what connect() takes; addresses in numbers, names are not resolved.
        source: where the connection comes from; None: the kernel chooses.
        timeout_ms: bound of the whole attempt.
        tos: type of service or traffic class, set when above 0.
        mark: packet mark (SO_MARK), set when above 0.
    """

    def __init__(self, family: int, kind: int, remote: tuple | str, *, source: Source | None = None,
                 timeout_ms: int = 30_000, tos: int = -1, mark: int = 0) -> None:
        self.option_failures: list[OptionFailure] = []
        self._family, self._kind, self._remote, self._source = family, kind, remote, source
        self._timeout_ms, self._tos, self._mark = timeout_ms, tos, mark
        self._deadline = 0.0
        self._sock: socket.socket | None = None
        self._aborted = False
        self._sock_lock = threading.Lock()

    def run(self) -> Connected:
        """Connect; raises a child of ConnectError and nothing else."""
        self._deadline = time.monotonic() + self._timeout_ms / 1000
        ports = iter(self._source.ports) if self._source is not None else None
        outcome = self._attempt(ports, None)
        while isinstance(outcome, ConnectFailed):
            outcome = self._attempt(ports, outcome)
        return outcome

    def abort(self) -> None:
        """Make run() end at once, now or when it starts; for any thread, never raises."""
        with self._sock_lock:
            self._aborted = True
            if self._sock is not None:
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)      # wakes poll(), also while connecting

    def _attempt(self, ports: Iterator[int] | None, collision: ConnectFailed | None) -> Connected | ConnectFailed:
        """Use the next ports; return the collision when the port was taken for this remote address."""
        sock = self._new_socket()
        try:
            if ports is not None:
                self._bind(sock, ports, collision)
            self._set_options(sock)
            failure = self._connect(sock)
            if failure is None:
                local = sock.getsockname()
                if self._family in _INET and local[1] == self._remote[1] and self._is_itself(sock, local):
                    raise SelfConnection(sock.fileno())
                self._withdraw()
                sock.setblocking(True)
                return sock, local
            if ports is None:
                raise failure
        except BaseException as problem:
            self._close(sock)
            if isinstance(problem, OSError) and not isinstance(problem, ConnectError):
                raise ConnectFailed(problem.errno or errno.EIO, -1, at_once=False) from problem
            raise
        self._close(sock)
        return failure

    def _new_socket(self) -> socket.SocketType:
        try:
            sock = socket.SocketType(self._family, self._kind | socket.SOCK_NONBLOCK)
            if self._family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        except OSError as problem:
            raise SocketFailed(problem.errno) from None
        with self._sock_lock:
            if not self._aborted:
                self._sock = sock
                return sock
        sock.close()
        raise ConnectInterrupted

    def _withdraw(self) -> None:
        """Take the finished socket out of abort()'s reach: from here on it is the caller's."""
        with self._sock_lock:
            if self._aborted:
                raise ConnectInterrupted
            self._sock = None

    def _close(self, sock: socket.socket) -> None:
        with self._sock_lock:
            self._sock = None
        sock.close()

    # binding

    def _bind(self, sock: socket.socket, ports: Iterator[int], collision: ConnectFailed | None) -> None:
        source = self._source
        if source.family != self._family:
            raise BindFailed(errno.EAFNOSUPPORT, sock.fileno())
        if self._family == socket.AF_UNIX:
            _bind_path(sock, source.address)
            return
        self._try_option("reuseaddr", sock, socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        refusal = _make_transparent(sock) if source.foreign else None
        problem: BindFailed | None = None
        for port in ports:
            if time.monotonic() > self._deadline:
                raise ConnectTimeout(sock.fileno())
            if self._aborted:
                raise ConnectInterrupted(sock.fileno())
            problem = _bind_port(sock, source.address, port, refusal)
            if problem is None:
                return
            if problem.errno != errno.EADDRINUSE:
                raise problem
        raise problem or collision or BindFailed(errno.EADDRINUSE, sock.fileno())

    # options

    def _set_options(self, sock: socket.socket) -> None:
        if self._kind == socket.SOCK_STREAM and self._family in _INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tos > 0 and self._family == socket.AF_INET:
            self._try_option("tos", sock, socket.IPPROTO_IP, socket.IP_TOS, self._tos)
        elif self._tos > 0 and self._family == socket.AF_INET6:
            self._try_option("tos", sock, socket.IPPROTO_IPV6, socket.IPV6_TCLASS, self._tos)
        if self._mark > 0:
            try:
                sock.setsockopt(socket.SOL_SOCKET, SO_MARK, self._mark)
            except OSError as problem:
                raise MarkFailed(problem.errno, sock.fileno()) from None

    def _try_option(self, name: str, sock: socket.socket, level: int, option: int, value: int) -> None:
        try:
            sock.setsockopt(level, option, value)
        except OSError as problem:
            self.option_failures.append(OptionFailure(name, sock.fileno(), problem))

    # connecting

    def _connect(self, sock: socket.socket) -> ConnectFailed | None:
        """Connect; return the failure when it is the local port's, which another port may cure."""
        code = sock.connect_ex(self._remote)
        while code == errno.EAGAIN and self._family == socket.AF_UNIX:
            self._check(sock)
            time.sleep(_UNIX_RETRY_S)
            code = sock.connect_ex(self._remote)
        if code == errno.EINPROGRESS:
            self._wait(sock)
        elif code:
            failure = ConnectFailed(code, sock.fileno(), at_once=True)
            if code not in _COLLISIONS:
                raise failure
            return failure
        return None

    def _check(self, sock: socket.socket) -> None:
        if self._aborted:
            raise ConnectInterrupted(sock.fileno())
        if time.monotonic() >= self._deadline:
            raise ConnectTimeout(sock.fileno())

    def _wait(self, sock: socket.socket) -> None:
        if self._aborted:              # abort() may have come before connect(), when there was nothing to wake
            raise ConnectInterrupted(sock.fileno())
        poller = select.poll()
        poller.register(sock, select.POLLOUT)
        ready = poller.poll(max((self._deadline - time.monotonic()) * 1000, 0))      # which it rounds up
        if self._aborted:
            raise ConnectInterrupted(sock.fileno())
        if not ready:
            raise ConnectTimeout(sock.fileno())
        if ready[0][1] & _BROKEN:
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            raise ConnectFailed(code or errno.ECONNABORTED, sock.fileno(), at_once=False)

    def _is_itself(self, sock: socket.socket, local: tuple | str) -> bool:
        return self._kind == socket.SOCK_STREAM and local == sock.getpeername()


def _make_transparent(sock: socket.socket) -> OSError | None:
    """Allow a bind to addresses of others; return why not."""
    if sock.family == socket.AF_INET6:
        level, transparent, freebind = socket.IPPROTO_IPV6, IPV6_TRANSPARENT, IPV6_FREEBIND
    else:
        level, transparent, freebind = socket.IPPROTO_IP, IP_TRANSPARENT, IP_FREEBIND
    try:
        sock.setsockopt(level, transparent, 1)
        sock.setsockopt(level, freebind, 1)
    except OSError as problem:
        return problem
    return None


def _bind_port(sock: socket.socket, address: tuple, port: int, refusal: OSError | None) -> BindFailed | None:
    """Bind; return why not.  `refusal`: why the socket is not transparent, the better reason if so."""
    if port == 0:            # the port is chosen in connect(), where only the whole pair must be unique
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    try:
        sock.bind((address[0], port, *address[2:]))
    except OSError as problem:
        if problem.errno == errno.EADDRNOTAVAIL and refusal is not None:
            problem = refusal
        return BindFailed(problem.errno or errno.EINVAL, sock.fileno())
    return None


def _bind_path(sock: socket.socket, path: str) -> None:
    """Bind to a path, replacing a socket that is there but nothing else."""
    try:
        if stat.S_ISSOCK(os.stat(path).st_mode):
            os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as problem:
        raise BindFailed(problem.errno or errno.EINVAL, sock.fileno()) from None
    try:
        sock.bind(path)
    except OSError as problem:
        raise BindFailed(problem.errno or errno.EINVAL, sock.fileno()) from None
