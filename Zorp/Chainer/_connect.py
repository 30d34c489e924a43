"""ConnectChainer: translate the addresses of one target, then connect to it.

    Service("web", HttpProxy, chainer=ConnectChainer(timeout_connect=5000))

Theory of operation
    getNextTarget(session) says where to, connectTarget() applies SNAT and DNAT, both to the
    untranslated pair, and establishConnection() does the rest.  Sites override any of them.

    A target that the peer named (in-band) may not be the firewall itself, a loopback,
    broadcast or multicast address, unless the router or config.options permits it.  What DNAT
    made of such a target is the policy's own choice and not checked.

    A name that the peer gave may have several addresses.  They are tried in turn, each for its
    share of timeout_connect, so that a dead IPv6 address does not hide a working IPv4 one.  The
    list of a DirectedRouter is not such a name: there only the first one is used.
"""

from __future__ import annotations

from Zorp.Chainer._base import _INET, AbstractChainer, _refuse, checked_proxy_protocol
from Zorp.Config import config
from Zorp.Constants import CORE_SESSION, FALSE, ZD_PROTO_AUTO
from Zorp.language import arguments
from Zorp.Log import log
from Zorp.NAT import NAT_DNAT, NAT_SNAT
from Zorp.transport.hostaddr import is_for_one_remote_host


class ConnectChainer(AbstractChainer):
    """Connects to the target of the session, the first one when there are several.

    Arguments:
        protocol: ZD_PROTO_TCP, ZD_PROTO_UDP; ZD_PROTO_AUTO (default): the client's.
        timeout_connect: milliseconds; None, 0: timeout_server_connect of config.options.
        proxy_protocol: 1, 2: tell the server the client's address with a PROXY header of this version.

    Raises PolicyError while the policy loads.  Later, chainParent() returns None when the
    server does not answer, and raises DACException when the policy forbids it.
    """

    def __init__(self, protocol=ZD_PROTO_AUTO, timeout_connect=None, proxy_protocol=0):
        super().__init__(protocol)
        self.timeout_connect = (arguments.milliseconds("a chainer", "timeout_connect", timeout_connect)
                                or config.options.timeout_server_connect)
        self.proxy_protocol = checked_proxy_protocol(proxy_protocol, self.protocol)

    def chainParent(self, session):
        """Connect to the session's target; return a Stream or None."""
        if self._uses_connect_server(session):
            return self._call_connect_server(session)
        if self._has_several_addresses(session):
            return self._first_that_answers(session)
        local, remote = self._next_target(session)
        if remote is None:
            return _no_destination(session)
        return self.connectTarget(session, local, remote)

    def getNextTarget(self, session):
        """Return (address to come from or None, address to connect to or None)."""
        targets = session.target_address
        return session.target_local, targets[0] if targets else None

    def connectTarget(self, session, target_local, target_remote):
        """Translate both addresses as the service's NAT policies say, and connect."""
        service = session.service
        addresses = (target_local, target_remote)
        local, remote = target_local, None
        if service.snat_policy:
            local = service.snat_policy.performTranslation(session, addresses, NAT_SNAT)
            if local is None and self._forges(service):
                local = target_local
        if service.dnat_policy:
            remote = service.dnat_policy.performTranslation(session, addresses, NAT_DNAT)
        if remote is None:
            remote = target_remote
            self._check_inband_target(session, target_remote)
        return self.establishConnection(session, local, remote)

    def _forges(self, service):
        return service.router.forge_addr

    def _next_target(self, session):
        """Ask getNextTarget(); its ValueError means that there is none."""
        try:
            return self.getNextTarget(session)
        except ValueError:
            return None, None

    def _check_inband_target(self, session, target):
        if not session.target_address_inband or target in getattr(session, "target_address_routed", ()):
            return
        if config.options.permit_local_targets or getattr(session.service.router, "permit_local_targets", FALSE):
            return
        if target.family not in _INET or not is_for_one_remote_host(target.pack()):
            _refuse(session, "Target named by the client is local, broadcast or multicast"
                             " (see permit_local_targets of InbandRouter)", target)

    # several addresses of one name

    def _has_several_addresses(self, session):
        return (session.target_address_inband and len(session.target_address) > 1
                and type(self).getNextTarget is ConnectChainer.getNextTarget
                and session.target_address != getattr(session, "target_address_routed", ()))

    def _first_that_answers(self, session):
        targets = session.target_address
        session.connect_timeout_ms = max(self._timeout_ms(session) // len(targets), 1)
        try:
            for target in targets:
                stream = self.connectTarget(session, session.target_local, target)
                if stream is not None or _is_stopping(session):
                    return stream
        finally:
            session.connect_timeout_ms = None
        return None


def _no_destination(session):
    session.server_failure = "no destination"
    log(session.session_id, CORE_SESSION, 3, "Server connection failure, no destination;")


def _is_stopping(session):
    """True when the session was asked to end, so that nothing more is worth trying."""
    return session.proxy is not None and session.proxy.stop_requested
