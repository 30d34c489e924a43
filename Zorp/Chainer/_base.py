"""AbstractChainer: both APIs of chainers in one class, and the connect procedure itself.

Theory of operation
    Today's API is chainParent(session): return a Stream or None, raise to refuse.  That of
    release 1 is connectServer(session, host, port), which also decides on the destination.
    Each has a default that leads to the other, so a site's class overrides one of them:

        the proxy calls chainParent():    a class that overrides connectServer() gets it called
                                          with the proxy's last hint
        somebody calls connectServer():   the hint goes the way of every hint, then chainParent()

    While connectServer() runs, chainParent() of the same object means "just connect", so a
    class may override one and call the other.

    establishConnection() is the last part of every way to a server, in an order that must not
    change: final address and zone, access control, loop check, socket, log, statistics.

Threads
    A chainer object serves all sessions of its services at once and keeps nothing per session:
    that lives on the session, which belongs to one thread.
"""

from __future__ import annotations

import socket

from Zorp import Globals
from Zorp.Attach import Attach
from Zorp.Config import config
from Zorp.Constants import (
    AF_INET,
    AF_INET6,
    CORE_ERROR,
    CORE_POLICY,
    CORE_SESSION,
    FALSE,
    Z_KEEPALIVE_SERVER,
    ZD_PROTO_AUTO,
    ZD_PROTO_NAME,
    ZD_PROTO_TCP,
    ZD_PROTO_UDP,
    ZV_ACCEPT,
)
from Zorp.Exceptions import DACException, PolicyError
from Zorp.language import arguments
from Zorp.Log import log
from Zorp.SockAddr import SockAddr, SockAddrInet, SockAddrInet6
from Zorp.Stream import Stream
from Zorp.transport.connect import SelfConnection
from Zorp.wire import proxy_protocol

_INET = (AF_INET, AF_INET6)
_NO_HINT = ("", 0)


class AbstractChainer:
    """The base of all chainers.

    Arguments:
        protocol: ZD_PROTO_TCP, ZD_PROTO_UDP; ZD_PROTO_AUTO (default): the client's.

    Raises PolicyError while the policy loads for another protocol.
    """

    # what a site's class has that does not call our constructor
    protocol = ZD_PROTO_AUTO
    timeout_connect = None
    proxy_protocol = 0

    def __init__(self, protocol=ZD_PROTO_AUTO):
        self.protocol = _checked_protocol(protocol)

    def getProtocol(self):
        """Return the protocol towards the server; ZD_PROTO_AUTO: the client's."""
        return self.protocol

    def fitting_router(self):
        """Return the router that this chainer brings along; None here: any router will do."""

    # the two APIs

    def chainParent(self, session):
        """Connect the session's proxy; return a Stream, or None when the log says why not."""
        if type(self).connectServer is AbstractChainer.connectServer:
            raise NotImplementedError
        return self._call_connect_server(session)

    def connectServer(self, session, host, port):
        """Connect as release 1 did: host and port are what the proxy suggests, "" and 0 when nothing."""
        if type(self).chainParent is AbstractChainer.chainParent:
            raise NotImplementedError
        if not self._take_hint(session, host, port):
            return None
        return self.chainParent(session)

    def _uses_connect_server(self, session):
        """True when chainParent() has to go through a connectServer() of the site."""
        return (type(self).connectServer is not AbstractChainer.connectServer
                and self not in vars(session).get("chainers_connecting", ()))

    def _call_connect_server(self, session):
        host, port = getattr(session, "connect_hint", _NO_HINT)
        outer = vars(session).get("chainers_connecting", ())
        session.chainers_connecting = (*outer, self)
        try:
            return _as_stream(session, self.connectServer(session, host, port))
        finally:
            session.chainers_connecting = outer

    def _take_hint(self, session, host, port):
        """Make a hint the target where the router allows it; return false when it is refused.

        The hint that the proxy gave already is not resolved a second time: the name might lead
        elsewhere by now.
        """
        if not host or (host, port) == getattr(session, "connect_hint", _NO_HINT):
            return True
        if not isinstance(host, SockAddr):
            return session.setTargetAddressByHostname(host, port)
        if session.target_address_inband:
            target = host.clone(FALSE)
            target.port = port or target.port
            session.setTargetAddress(target)
        return True

    # the connect procedure

    def establishConnection(self, session, local, remote):
        """Connect from `local` (None: the kernel chooses) to `remote`; return a Stream or None.

        Raises DACException when the policy does not permit the server.  A port of 0 means the
        one that the client addressed.
        """
        protocol = self.protocol or session.protocol
        remote = _final_address(session, remote)
        master = session.getMasterSession()
        session.server_local = master.server_local = None
        session.setServerAddress(remote)
        if session.isServerPermitted() != ZV_ACCEPT:
            raise DACException("Server connection is not permitted")
        _refuse_own_listener(session, protocol, remote)
        stream = self._attach(session, master, protocol, local, remote)
        if stream is None:
            return self._failed(session, protocol)
        stream.name = f"{session.session_id}/server"
        if self.proxy_protocol and not self._send_proxy_header(session, stream):
            stream.close()
            return self._failed(session, protocol)
        self._established(session, master, protocol, stream)
        return stream

    def _attach(self, session, master, protocol, local, remote):
        local, usable = _local_for(session, local, remote)
        if not usable or (self.proxy_protocol and _is_datagram(session, protocol)):
            return None
        proxy = session.proxy
        settings = getattr(proxy, "_vars", None)
        tos, mark = getattr(settings, "server_local_tos", 0), getattr(settings, "server_socket_mark", 0)
        attach = Attach(
            proxy, protocol, local, remote, timeout=self._timeout_ms(session), local_loose=session.target_local_loose,
            tos=tos, local_random=session.target_local_random, server_socket_mark=mark,
            keepalive=session.service.keepalive & Z_KEEPALIVE_SERVER)
        stream = attach.start()
        if stream is not None:
            session.server_local = master.server_local = attach.local
            return stream
        session.server_failure = attach.failure.strerror
        if isinstance(attach.failure, SelfConnection):
            _refuse(session, "Server connection leads back to itself", remote)
        return stream

    def _timeout_ms(self, session):
        return session.connect_timeout_ms or self.timeout_connect or config.options.timeout_server_connect

    def _failed(self, session, protocol):
        session.server_stream = None
        session.server_local = session.getMasterSession().server_local = None
        log(session.session_id, CORE_SESSION, 3,
            "Server connection failure; server_address='%s', server_zone='%s', server_local='%s', server_protocol='%s'",
            (session.server_address, session.server_zone, session.server_local, ZD_PROTO_NAME[protocol]))

    def _established(self, session, master, protocol, stream):
        log(session.session_id, CORE_SESSION, 3,
            "Server connection established; server_fd='%d', server_address='%s', server_zone='%s', server_local='%s',"
            " server_protocol='%s'",
            (stream.fd, master.server_address, master.server_zone, master.server_local, ZD_PROTO_NAME[protocol]))
        session.registerServerAddress()

    def _send_proxy_header(self, session, stream):
        """Tell the server who the client is; true when the header is on its way."""
        header = proxy_protocol.write(self.proxy_protocol, _endpoint(session.client_address),
                                      _endpoint(session.client_local))
        try:
            stream.sock.sendall(header)           # not stream.send(): it is not the client's data
        except OSError as problem:
            log(session.session_id, CORE_ERROR, 2, "Error sending PROXY protocol header; error='%s'",
                (problem.strerror,))
            return False
        return True


# ---------------------------------------------------------------------------- checks of one connection

def _final_address(session, remote):
    remote = remote.clone(FALSE)
    if remote.family in _INET and remote.port == 0:
        remote.port = getattr(session.client_local, "port", 0)
    return remote


def _local_for(session, local, remote):
    """Return (the address to bind to, whether the connection is possible).

    A wildcard address only carries a wish for a port and takes the family of the server; an
    address of the other family cannot be used, and leaving it out would show another address
    to the server than the policy wants.
    """
    if local is None or local.family == remote.family:
        return local, True
    if local.family in _INET and remote.family in _INET and local.ip_int == 0:
        return (SockAddrInet("0.0.0.0", local.port) if remote.family == AF_INET
                else SockAddrInet6("::", local.port)), True
    log(session.session_id, CORE_ERROR, 3,
        "Cannot connect from an address of another family than the server's; local='%s', remote='%s'",
        (local, remote))
    return None, False


def _is_datagram(session, protocol):
    if protocol != ZD_PROTO_UDP:
        return False
    log(session.session_id, CORE_ERROR, 3, "PROXY protocol headers need a TCP connection; server_protocol='%s'",
        (ZD_PROTO_NAME[protocol],))
    return True


def _refuse_own_listener(session, protocol, remote):
    """Refuse a server that is one of our own listeners: the connection would come back for ever."""
    table = Globals.dispatch_table
    if (table is not None and remote.family in _INET and not config.options.permit_own_listeners
            and table.listens_on(protocol, remote)):
        _refuse(session, "Server is a listener of this firewall (see config.options.permit_own_listeners)", remote)


def _refuse(session, reason, remote):
    log(session.session_id, CORE_POLICY, 1, "Connection refused; reason='%s', server='%s'", (reason, remote))
    raise DACException("Server connection is not permitted")


def _endpoint(address):
    return (address.ip_s, address.port) if getattr(address, "family", None) in _INET else None


def _as_stream(session, result):
    """Turn what connectServer() of a site returned into a Stream or None."""
    if result is None or isinstance(result, Stream):
        return result
    if isinstance(result, socket.socket) or (isinstance(result, int) and not isinstance(result, bool)):
        return Stream(result, f"{session.session_id}/server")
    log(session.session_id, CORE_POLICY, 1, "Chainer returned no stream; type='%s'", (type(result).__name__,))
    return None


# ---------------------------------------------------------------------------- checks at load

def _checked_protocol(protocol):
    if protocol is None:
        return ZD_PROTO_AUTO
    if type(protocol) is int and protocol in (ZD_PROTO_AUTO, ZD_PROTO_TCP, ZD_PROTO_UDP):
        return int(protocol)
    raise PolicyError(f"Invalid protocol of a chainer; protocol='{protocol}'",
                      remedy="give ZD_PROTO_TCP, ZD_PROTO_UDP or ZD_PROTO_AUTO")


def checked_proxy_protocol(version, protocol):
    """Return the version of the PROXY protocol to speak, 0 for none; raises PolicyError."""
    if type(version) is not int or version not in (0, 1, 2):
        raise arguments.invalid("a chainer", "proxy_protocol", version,
                                "give 1 or 2, the version that the server expects, or 0 for none")
    if version and protocol == ZD_PROTO_UDP:
        raise PolicyError("PROXY protocol headers need a TCP connection",
                          remedy="leave out proxy_protocol, or protocol=ZD_PROTO_UDP")
    return version


