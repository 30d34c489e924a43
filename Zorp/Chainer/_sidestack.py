"""SideStackChainer: the server of one proxy is another proxy of ours.

    Service("web", HttpProxy, chainer=SideStackChainer(PlugProxy, ConnectChainer()))

Theory of operation
    A pair of local sockets joins the left proxy's server side to the client side of a right
    proxy, which gets a session of its own below the left one's: it inherits targets, service,
    NAT policies and who the client is.  Zones, access control and the connect itself belong to
    the right proxy's chainer, which may be a SideStackChainer again.

    The right proxy holds the master session like every started proxy, and is a child of the
    left one: a stop request for the left reaches both.  When one of them ends, the other sees
    the end of its stream; when one is reset, or breaks, the other sees that (Zorp.Stream.streamPair),
    so that half of a transfer does not look like a whole one at the far end of the row.

    The pair carries a stream.  Datagrams that are to be datagrams again behind it would run into
    each other, so a session of UDP whose server speaks UDP is refused.
"""

from __future__ import annotations

import socket

from Zorp.Chainer._base import AbstractChainer
from Zorp.Chainer._connect import ConnectChainer
from Zorp.Constants import CORE_ERROR, CORE_SESSION, ZD_PROTO_AUTO, ZD_PROTO_UDP
from Zorp.engine.builtin_proxy import BuiltinProxy
from Zorp.language import arguments
from Zorp.Log import log, log_exception
from Zorp.ProxyGroup import ProxyGroup
from Zorp.Session import StackedSession
from Zorp.Stream import streamPair


class SideStackChainer(AbstractChainer):
    """Connects the proxy to the client side of a second proxy.

    Arguments:
        right_class: class of the second proxy.
        right_chainer: connects that one to the server; None: ConnectChainer().

    Raises PolicyError while the policy loads for other things.
    """

    def __init__(self, right_class, right_chainer=None):
        super().__init__()
        if not isinstance(right_class, type) or not issubclass(right_class, BuiltinProxy):
            raise arguments.invalid("SideStackChainer", "right_class", right_class,
                                    "give a proxy class such as PlugProxy, without parentheses")
        if right_chainer is not None and not isinstance(right_chainer, AbstractChainer):
            raise arguments.invalid("SideStackChainer", "right_chainer", right_chainer,
                                    "give a chainer object, with parentheses: ConnectChainer()")
        self.right_class = right_class
        self.right_chainer = right_chainer or ConnectChainer()

    def getProtocol(self):
        """Return the protocol of the chainer that connects to the server."""
        return self.right_chainer.getProtocol()

    def chainParent(self, session):
        """Start the right proxy; return the stream that leads to it, None when that failed."""
        if self._uses_connect_server(session):
            return self._call_connect_server(session)
        if session.protocol == ZD_PROTO_UDP and self.getProtocol() in (ZD_PROTO_AUTO, ZD_PROTO_UDP):
            log(session.session_id, CORE_ERROR, 3, "Datagrams cannot go through a side-stacked proxy;")
            return None
        try:
            left, right = streamPair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError:
            log(session.session_id, CORE_SESSION, 3, "Side stacking failed, socketPair failed;")
            return None
        left.name = f"{session.owner.session_id}/leftside"
        right.name = f"{session.session_id}/rightside"
        right_session = StackedSession(session, self.right_chainer)
        right_session.client_stream = right
        log(session.session_id, CORE_SESSION, 4,
            "Side-stacking proxy instance; server_fd='%d', client_fd='%d', proxy_class='%s'",
            (left.fd, right.fd, self.right_class))
        try:
            self._start(right_session)
        except Exception:
            log_exception(session.session_id)
            log(session.session_id, CORE_ERROR, 3, "Side-stacking failed; proxy_class='%s'", (self.right_class,))
            right_session.destroy()
            left.close()
            return None
        return left

    def _start(self, right_session):
        proxy = self.right_class(right_session)
        if not ProxyGroup(1).start(proxy):
            raise RuntimeError("Error starting proxy in group")
