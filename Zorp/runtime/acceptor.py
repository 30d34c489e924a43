"""Accepting: the listening sockets of one worker, in one epoll.

Theory of operation
    wait() blocks until a client is there or stop() is called, and is entered by one thread at
    a time, the leader of the pool.  It accepts exactly one connection and returns it; delivery
    happens in whatever thread the pool chooses.  Other workers share the same open
    descriptions, so the wake-up is exclusive per worker and an accept() that comes too late is
    normal.

    stop() takes every listener out of the epoll before it closes our descriptor: the
    description lives on in the master, and with it the registration would.

Out of descriptors or memory: one line, then a pause, and the clients wait in the kernel's queue.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time

from Zorp.Log import log
from Zorp.SockAddr import from_sockaddr

_PAUSE_S = 0.1
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Accepted:
    """One accepted connection on its way to the policy."""

    __slots__ = ("_chain", "_remote", "_sock")

    def __init__(self, chain, sock: socket.socket, remote: tuple) -> None:
        self._chain, self._sock, self._remote = chain, sock, remote

    @property
    def remote_host(self) -> str:
        return self._remote[0]

    def deliver(self) -> None:
        """Hand it to the dispatchers; the socket is theirs from now on."""
        sock = self._sock
        try:
            remote = from_sockaddr(sock.family, self._remote)
            local = from_sockaddr(sock.family, sock.getsockname())
        except OSError:                     # gone before anybody looked
            sock.close()
            return
        self._chain.deliver(sock, remote, local)

    def refuse(self) -> None:
        """Close it unserved."""
        self._sock.close()


class Acceptor:
    """All listeners of this worker.  _listeners_lock guards _listeners; wait() needs no lock."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._listeners_lock = threading.Lock()
        self._listeners: dict[int, tuple[socket.socket, object]] = {}
        self.stopped = False

    def add(self, sock: socket.socket, chain) -> None:
        """Accept on this socket, which is ours from now on, for this chain."""
        with self._listeners_lock:
            self._listeners[sock.fileno()] = (sock, chain)
            self._epoll.register(sock.fileno(), select.EPOLLIN | select.EPOLLEXCLUSIVE)

    def remove(self, sock: socket.socket) -> None:
        """Stop accepting on one socket and close our descriptor of it."""
        with self._listeners_lock:
            if self._listeners.pop(sock.fileno(), None) is not None:
                self._epoll.unregister(sock.fileno())
                sock.close()

    def stop(self) -> None:
        """Accept nothing more; wait() returns None from now on.  Any thread, idempotent."""
        self.stopped = True
        with self._listeners_lock:
            for descriptor, (sock, _chain) in self._listeners.items():
                self._epoll.unregister(descriptor)
                sock.close()
            self._listeners.clear()
        os.eventfd_write(self._wake, 1)

    def wait(self) -> Accepted | None:
        """Block until a client is accepted; None once stopped."""
        while not self.stopped:
            for descriptor, _events in self._epoll.poll(-1, 1):
                found = self._listeners.get(descriptor)
                accepted = self._accept(*found) if found is not None else None
                if accepted is not None:
                    return accepted
        return None

    def _accept(self, sock: socket.socket, chain) -> Accepted | None:
        try:
            client, remote = sock.accept()
        except BlockingIOError:             # another worker was faster
            return None
        except OSError as problem:
            if self.stopped:
                return None
            log(None, "core.error", 3, "accept() failed; fd='%d', error='%s'", (sock.fileno(), problem.strerror))
            if problem.errno in _EXHAUSTED:
                time.sleep(_PAUSE_S)
            return None
        return Accepted(chain, client, remote)
