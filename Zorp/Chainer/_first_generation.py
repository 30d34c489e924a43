"""The chainers of release 1, which also decide where to connect: there are no routers beside them.

    Service("http", TransparentChainer(), HttpProxy)
    Service("files", DirectedChainer(SockAddrInet("10.30.1.7", 21)), FtpProxyRO)

Theory of operation
    Each is a ConnectChainer and a router in one object: a service without a router of its own
    uses it as both.  getNextTarget() routes the session (again), so the chainer's own target
    holds even beside another router, and then goes the way of all: NAT, access control, connect.

    `local` is the address to come from; only its IP address counts.  A true forge_addr means
    the client's address and wins over it.
"""

from __future__ import annotations

from Zorp.Chainer._connect import ConnectChainer
from Zorp.Chainer._state import Turns
from Zorp.Chainer._targets import StateBasedChainer, _is_stopping, _no_destination
from Zorp.Constants import CORE_POLICY, FALSE, TRUE, Z_PORT_ANY, ZD_PROTO_AUTO
from Zorp.Exceptions import PolicyError
from Zorp.language import arguments
from Zorp.language.caller import policy_caller
from Zorp.Log import log
from Zorp.Router import DirectedRouter, InbandRouter, TransparentRouter, as_addresses
from Zorp.SockAddr import SockAddr


class _RoutingChainer:
    """The router half.  Classes with it have `_router()`, which returns a router for now."""

    forge_port = Z_PORT_ANY
    overrideable = FALSE
    permit_local_targets = FALSE

    def _set_source(self, local, forge_addr):
        if local is not None and not isinstance(local, SockAddr):
            raise PolicyError(f"Invalid local address of a chainer; local='{local}'",
                              remedy="give a SockAddrInet, or None for the firewall's own address")
        self.local = local
        self.forge_addr = arguments.flag("a chainer", "forge_addr", forge_addr)

    def fitting_router(self):
        return self

    def routeConnection(self, session):
        """Write target and local address into the session, as routers do."""
        self._router().routeConnection(session)
        if self.local is not None and not self.forge_addr:
            session.target_local = self.local.clone(TRUE)

    def getNextTarget(self, session):
        """Return (address to come from or None, address to connect to or None)."""
        self.routeConnection(session)
        targets = session.target_address
        return session.target_local, targets[0] if targets else None

    def _take_hint(self, session, host, port):
        return True                   # the target does not depend on what the proxy suggests

    def _forges(self, service):
        return self.forge_addr or service.router.forge_addr


class DirectedChainer(_RoutingChainer, ConnectChainer):
    """Connects to one fixed server, whatever the client addressed.

    Arguments:
        remote: SockAddr of the server.
        local: SockAddr to come from.
        forge_addr: true: come from the client's address.

    The order of release 0.6, (local or None, remote), is understood.
    """

    def __init__(self, remote, local=None, forge_addr=0):
        super().__init__()
        if not isinstance(remote, SockAddr) and isinstance(local, SockAddr):
            remote, local = local, remote
            _report_old_form("DirectedChainer(local, remote)")
        if not isinstance(remote, SockAddr):
            raise PolicyError(f"Invalid remote address of DirectedChainer; remote='{remote}'",
                              remedy="give a SockAddrInet or SockAddrInet6")
        self.remote = remote
        self._set_source(local, forge_addr)

    def _router(self):
        return DirectedRouter(self.remote, self.forge_addr)


class TransparentChainer(_RoutingChainer, ConnectChainer):
    """Connects to the server that the client addressed.

    Arguments:
        local: SockAddr to come from.
        forge_addr: true: come from the client's address.
        forced_port: port to use instead of the one that the client addressed; 0: that one.
    """

    def __init__(self, local=None, forge_addr=0, forced_port=0):
        super().__init__()
        self.forced_port = forced_port
        self._set_source(local, forge_addr)
        self._router()                # refuses a wrong port while the policy loads

    def _router(self):
        return TransparentRouter(self.forced_port, self.forge_addr)


class InbandChainer(_RoutingChainer, ConnectChainer):
    """Connects to the server that the client names in the protocol.

    Arguments:
        local: SockAddr to come from.
        forge_addr: true: come from the client's address.
    """

    overrideable = TRUE

    def __init__(self, local=None, forge_addr=0):
        super().__init__()
        self._set_source(local, forge_addr)

    def _router(self):
        return InbandRouter(self.forge_addr)

    def _take_hint(self, session, host, port):
        self.routeConnection(session)          # also beside a router that does not take hints
        return ConnectChainer._take_hint(self, session, host, port)


class FailoverChainer(_RoutingChainer, StateBasedChainer):
    """Connects to the first target that answers and passes over those known to be down.

        Service("mail", SmtpProxy, router=DirectedRouter((mx1, mx2)),
                chainer=FailoverChainer(timeout_state=30000))
        Service("mail", FailoverChainer((mx1, mx2)), SmtpProxy)            as release 1 wrote it

    Arguments:
        protocol: ZD_PROTO_TCP, ZD_PROTO_UDP; ZD_PROTO_AUTO (default): the client's.
        timeout: obsolete, whole SECONDS; when not 0 it replaces timeout_state.
        timeout_state: milliseconds a target stays marked as down; None, 0: 60000.
        timeout_connect: milliseconds per attempt; None, 0: timeout_server_connect of config.
        round_robin: TRUE: each connection starts at the next target.  FALSE: at the first.
        proxy_protocol: see ConnectChainer.

    The form of release 1 is FailoverChainer(hosts, local=None, forge_addr=0): the chainer
    decides on the targets itself, connections take turns, and failed hosts are not remembered.
    Sites of that time override getHostAddress() and nextHost().

    Raises PolicyError while the policy loads: a time is negative or not a number; TypeError for
    arguments of both forms together.
    """

    def __init__(self, protocol=ZD_PROTO_AUTO, timeout=0, timeout_state=None, timeout_connect=None,
                 round_robin=FALSE, *, hosts=None, local=None, forge_addr=None, proxy_protocol=0):
        if hosts is None and _is_host_list(protocol):
            hosts, protocol = protocol, ZD_PROTO_AUTO
            local, timeout = _either("local", local, None if timeout == 0 else timeout, None), 0
            forge_addr, timeout_state = _either("forge_addr", forge_addr, timeout_state, None), None
        first_generation = hosts is not None
        if first_generation and (protocol or timeout or timeout_state or timeout_connect or round_robin):
            raise TypeError("FailoverChainer(hosts, local, forge_addr) takes no other arguments")
        if not first_generation and (local is not None or forge_addr is not None):
            raise TypeError("FailoverChainer takes local and forge_addr only together with hosts")
        if timeout:
            timeout_state = 1000 * arguments.number("FailoverChainer", "timeout", timeout, unit="seconds",
                                                    most=arguments.LONGEST_SECONDS)
        super().__init__(protocol, timeout_connect, timeout_state, proxy_protocol)
        self.round_robin = arguments.flag("FailoverChainer", "round_robin", round_robin)
        self._set_source(local, forge_addr or 0)
        self._first_generation = first_generation
        if first_generation:
            _report_old_form("FailoverChainer(hosts)")
        self.hosts = as_addresses(hosts, "hosts") if first_generation else ()
        self._turns = Turns()

    def fitting_router(self):
        return self if self._first_generation else None

    def _router(self):
        if not self._first_generation:
            raise TypeError("FailoverChainer is a router only in the form FailoverChainer(hosts)")
        return DirectedRouter(self.hosts, self.forge_addr)

    # today's form

    def getFirstTargetIndex(self, session):
        """Hook that sites override: name, argument and result stay."""
        return StateBasedChainer.getFirstTargetIndex(self, session) if self.round_robin else 0

    def getNextTarget(self, session):
        """Return (local address or None, target), (None, None) when all were tried."""
        if self._first_generation:
            return session.target_local, self._take_host()
        self.hosts = session.target_address
        return StateBasedChainer.getNextTarget(self, session)

    def _take_hint(self, session, host, port):
        return self._first_generation or StateBasedChainer._take_hint(self, session, host, port)

    def _forges(self, service):
        return self.forge_addr or service.router.forge_addr

    # the form of release 1

    @property
    def current_host(self):
        """Index of the host whose turn it is."""
        return self._turns.position

    @current_host.setter
    def current_host(self, index):
        self._turns.position = index

    def getHostAddress(self):
        """Return the host whose turn it is."""
        return self.hosts[self.current_host % len(self.hosts)]

    def nextHost(self):
        """Give the turn to the next host."""
        self._turns.advance(len(self.hosts))

    def chainParent(self, session):
        """Connect to the first host that answers; return a Stream or None."""
        if not self._first_generation or self._uses_connect_server(session):
            return StateBasedChainer.chainParent(self, session)
        self.routeConnection(session)
        if not self.hosts:
            return _no_destination(session)
        refusal = None
        for _ in range(len(self.hosts)):
            stream, refusal = self._try_target(session, *self.getNextTarget(session), refusal)
            if stream is not None or _is_stopping(session):
                return stream
        if refusal is not None:
            raise refusal
        return None

    def disableTarget(self, session, target_local, target_remote):
        """Remember that a target is down; release 1 did not."""
        if not self._first_generation:
            StateBasedChainer.disableTarget(self, session, target_local, target_remote)

    def _take_host(self):
        """Return the host whose turn it is and give the turn on, in one step."""
        with self._turns.turn_lock:
            host = self.getHostAddress()
            self.nextHost()
        return host


def _report_old_form(form):
    log(None, CORE_POLICY, 4, "Old form of a chainer; form='%s', place='%s'", (form, policy_caller()))


def _is_host_list(value):
    if isinstance(value, SockAddr):
        return True
    return isinstance(value, (list, tuple)) and all(isinstance(item, SockAddr) for item in value)


def _either(name, keyword, positional, nothing):
    """Return the one of both that was given; TypeError when both were."""
    if keyword is not nothing and positional is not nothing:
        raise TypeError(f"FailoverChainer got {name} twice")
    return positional if keyword is nothing else keyword
