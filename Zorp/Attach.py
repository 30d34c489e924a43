"""Connecting a proxy to a remote address, as custom chainers do it.

    attach = Attach(self.session.proxy, ZD_PROTO_TCP, None, SockAddrInet("10.0.0.1", 25))
    stream = attach.start()                 # a Stream, or None: the log says why
    local = attach.local

Theory of operation
    Attach translates between policies and Zorp.transport.connect: addresses become a Source,
    results become log lines (routing 4.2) and a Stream.  Access control, NAT and zones are not
    its business; chainers do that before.

    start() blocks the session's thread for at most `timeout` milliseconds.  While it waits it
    is registered with its proxy (set_connecting), so that a stop request ends it at once.

Deviations
    A failed bind or mark fails the connect, the original let the connection leave with another
    address or without its mark.  Refused and timed-out connects have their line with the
    reason, which the original forgot.  The timeout is not rounded to seconds.
"""

from __future__ import annotations

import errno
import socket

from Zorp import Log
from Zorp.Constants import CORE_DEBUG, CORE_ERROR, ZD_PROTO_UDP
from Zorp.engine.builtin_proxy import BuiltinProxy
from Zorp.Log import log
from Zorp.SockAddr import SockAddr, SockAddrInetRange, from_sockaddr
from Zorp.Stream import Stream
from Zorp.transport.connect import (
    BindFailed,
    ConnectError,
    ConnectFailed,
    Connector,
    MarkFailed,
    SocketFailed,
    Source,
    exact,
    in_range,
    random_in_group,
    same_group,
)

_PORT_TAKEN = (errno.EADDRINUSE, errno.EADDRNOTAVAIL)
_KIND_NAMES = {socket.SOCK_STREAM: "stream", socket.SOCK_DGRAM: "dgram"}


class Attach:
    """One attempt to connect.

    Arguments:
        proxy: the proxy that will use the connection.
        protocol: ZD_PROTO_TCP or ZD_PROTO_UDP.
        local: SockAddr to come from, the client's included; None: the kernel chooses.
        remote: SockAddr to connect to.
        timeout: milliseconds.
        local_loose: true: any port of the local port's group will do (1-511, 512-1023, 1024-65535).
        tos: type of service (IPv4) or traffic class (IPv6), used when above 0.
        local_random: true, with local_loose: an unpredictable port of the group.
        server_socket_mark: packet mark, used when above 0.
        keepalive: false: no keepalive probes.

    Raises TypeError for arguments of other types.
    """

    def __init__(self, proxy, protocol, local, remote, timeout=30000, local_loose=0, tos=-1, local_random=0,
                 server_socket_mark=0, keepalive=1):
        if not isinstance(proxy, BuiltinProxy):
            raise TypeError("First argument must be a Proxy instance")
        if not isinstance(remote, SockAddr) or not (local is None or isinstance(local, SockAddr)):
            raise TypeError("Local and remote arguments must be SockAddr or None")
        self.local = None            # the real local address, once connected
        self.failure = None          # the ConnectError of a failed start()
        self._proxy = proxy
        self._session_id = proxy.session.session_id
        self._protocol, self._remote, self._wish = protocol, remote, local
        self._tos, self._mark, self._keepalive = tos, server_socket_mark, keepalive
        self._family = remote.family
        self._kind = socket.SOCK_DGRAM if protocol == ZD_PROTO_UDP else socket.SOCK_STREAM
        source = None if local is None else _source(local, local_loose, local_random)
        self._connector = Connector(self._family, self._kind, remote.to_sockaddr(), source=source, timeout_ms=timeout,
                                    tos=tos, mark=server_socket_mark)
        if Log.loudest >= 7:
            log(self._session_id, CORE_DEBUG, 7, "Connecting to remote host; protocol='%d', local='%s', remote='%s'",
                (protocol, self._wish_text(), remote))

    def start(self):
        """Connect; return a Stream, or None after logging why not."""
        if Log.loudest >= 7:
            log(self._session_id, CORE_DEBUG, 7, "Initiating connection; from='%s', to='%s'",
                (self._wish_text(), self._remote))
        self._proxy.set_connecting(self)
        try:
            sock, local = self._connector.run()
        except ConnectError as problem:
            self.failure = problem
            self._log_options()
            self._log_failure(problem)
            return None
        finally:
            self._proxy.set_connecting(None)
        self.local = from_sockaddr(self._family, local)
        if self._connector.option_failures:
            self._log_options()
        if isinstance(self._wish, SockAddrInetRange):
            log(self._session_id, CORE_DEBUG, 6,
                "SockAddrInetRange, successfully bound; min_port='%d', max_port='%d', port='%d'",
                (self._wish.port_min, self._wish.port_max, self.local.port))
        if self._tos > 0:
            log(self._session_id, CORE_DEBUG, 6, "Setting socket ToS value; fd='%d', tos='%d'",
                (sock.fileno(), self._tos))
        if Log.loudest >= 6:
            log(self._session_id, CORE_DEBUG, 6,
                "Established connection; protocol='%d', remote='%s', local='%s', dest='%s'",
                (self._protocol, self._remote, self.local, self._remote))
        stream = Stream(sock)
        if self._keepalive:
            stream.keepalive = 1
        return stream

    def abort(self):
        """End a start() that waits; for any thread, never raises."""
        self._connector.abort()

    def _wish_text(self):
        return "NULL" if self._wish is None else self._wish

    def _log_options(self):
        for option, fd, problem in self._connector.option_failures:
            if option == "tos":
                log(self._session_id, CORE_ERROR, 3,
                    "Error setting ToS value on socket; fd='%d', tos='%d', error='%s', errno='%d'",
                    (fd, self._tos, problem.strerror, problem.errno))
            else:
                log(self._session_id, CORE_ERROR, 1,
                    "Enabling SO_REUSEADDR on connect socket failed; family='%d', type='%s', error='%s'",
                    (self._family, _KIND_NAMES[self._kind], problem.strerror))

    def _log_failure(self, problem):
        reason = problem.strerror
        if isinstance(self._wish, SockAddrInetRange) and problem.errno in _PORT_TAKEN:
            self._error(3, "SockAddrInetRange, could not find free port to bind; min_port='%d', max_port='%d'",
                        self._wish.port_min, self._wish.port_max)
        if isinstance(problem, SocketFailed):
            self._error(1, "Creating socket for connecting failed; family='%d', type='%s', remote='%s', error='%s'",
                        self._family, _KIND_NAMES[self._kind], self._remote, reason)
        elif isinstance(problem, BindFailed):
            self._error(3, "bind() failed; bind='%s', error='%s'", self._wish, reason)
            self._error(1, "Error binding socket; local='%s', error='%s'", self._wish, reason)
        elif isinstance(problem, MarkFailed):
            self._error(3, "Error changing MARK; fd='%d', mark='%08x', error='%s'", problem.fd, self._mark, reason)
        else:
            if isinstance(problem, ConnectFailed) and problem.at_once:
                self._error(3, "connect() failed; fd='%d', error='%s'", problem.fd, reason)
            self._error(2, "Connection to remote end failed; local='%s', remote='%s', error='%s'",
                        self._wish_text(), self._remote, reason)

    def _error(self, level, text, *fields):
        log(self._session_id, CORE_ERROR, level, text, fields)


def _source(local, loose, unpredictable):
    """Turn the wish of a policy into a Source."""
    if local.family == socket.AF_UNIX:
        return Source(local.family, local.to_sockaddr())
    if isinstance(local, SockAddrInetRange):
        ports = in_range(local.port_min, local.port_max)
    elif not loose:
        ports = exact(local.port)
    elif unpredictable:
        ports = random_in_group(local.port)
    else:
        ports = same_group(local.port)
    return Source(local.family, local.to_sockaddr(), ports)
