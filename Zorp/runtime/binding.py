"""From the binds of a policy to listening sockets, and keeping up with interface addresses.

Theory of operation
    What the kernel would refuse in any case, an address beside every address for example, is
    refused before anything is asked for: check() does no more than that, for zorp --check-policy.

    A DBSockAddr is one socket.  A DBIface is one per address of the interface, a DBIfaceGroup
    one per address of every interface in the group; when addresses come or go, follow() opens
    and closes sockets.  An address that another bind of the policy has already is skipped.

    Sockets come from the master through `ask(chain, spec)`; a change while the worker serves
    adds to and removes from the acceptor.  Main thread only.
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import os
import socket
from collections.abc import Callable

from Zorp.acceptance.binds import DBSockAddr
from Zorp.Constants import ZD_PROTO_TCP, ZD_PROTO_UDP
from Zorp.Log import log
from Zorp.runtime import interfaces
from Zorp.runtime.listeners import ListenSpec
from Zorp.SockAddr import SockAddrInet, from_sockaddr
from Zorp.transport.interfaces import Snapshot, take_snapshot

_REMEDIES = {
    os.strerror(errno.EADDRINUSE): "stop what listens there ('ss -ltnup' shows it), or bind to another port",
    os.strerror(errno.EADDRNOTAVAIL): "bind to an address that this host has; for one that comes later or moves "
                                      "(DHCP, VRRP) give DBIface(INTERFACE, PORT, ip=ADDRESS)",
    os.strerror(errno.EACCES): "ports below 1024 need the capability cap_net_bind_service",
}


class BindFailed(Exception):
    """The master could not open a socket; `step` is the call that failed, `reason` the text for the administrator.

    obstacle: the address on which this instance listens by the policy in force, if that is in the way.
    """

    def __init__(self, step: str, error: str, obstacle: str = "") -> None:
        super().__init__(f"{step}: {error}")
        self.step, self.error, self.obstacle = step, error, obstacle
        self.reason = f"Error binding to interface; error='{error}'"

    def at(self, chain) -> None:
        """Say which bind of the policy it was."""
        place = f"{chain.declared_at}: " if chain.declared_at else ""
        remedy = _REMEDIES.get(self.error)
        if self.obstacle:
            remedy = (f"the policy in force listens on {self.obstacle}, and the two cannot be open side by side: "
                      "restart the instance, or bind to another port")
        self.reason = (f"{place}Error binding to interface; bind='{chain.bind.format()}', error='{self.error}'"
                       + (f"; {remedy}" if remedy else ""))


@dataclasses.dataclass(eq=False)
class BoundChain:
    """A chain and its sockets by bind key."""

    chain: object
    sockets: dict[tuple, socket.socket] = dataclasses.field(default_factory=dict)

    def report(self) -> None:
        """Tell the chain where it really listens."""
        self.chain.bound([from_sockaddr(sock.family, sock.getsockname()) for sock in self.sockets.values()])


class ImpossibleBind(Exception):
    """The kernel would refuse what the policy asks for, on every host; `str()` is for the administrator."""


def check(chains) -> None:
    """Refuse binds that cannot be, as this host's interfaces are now.  Raises ImpossibleBind."""
    dynamic = any(not isinstance(chain.bind, DBSockAddr) for chain in chains)
    snapshot = take_snapshot() if dynamic else Snapshot({}, {})
    _refuse_impossible([(chain, spec) for chain in chains for spec in _specs_of(chain, snapshot)])


def _refuse_impossible(wanted: list[tuple[object, ListenSpec]]) -> None:
    by_port: dict[tuple, list] = {}
    for chain, spec in wanted:
        if spec.family == socket.AF_INET6 and spec.address.startswith("::ffff:"):
            raise ImpossibleBind(f"{_place_of(chain)}: IPv4 address in the form of IPv6 cannot be listened on; "
                                 f"bind='{chain.bind.format()}'; bind to a SockAddrInet")
        others = by_port.setdefault((spec.protocol, spec.family, spec.port), [])
        for other_chain, other in others:
            if spec.excludes(other):
                raise ImpossibleBind(
                    f"{_place_of(chain)}: Listening on every address leaves none for another dispatcher; "
                    f"bind='{chain.bind.format()}', address='{spec.address}', other_place='{_place_of(other_chain)}', "
                    f"other_bind='{other_chain.bind.format()}', other_address='{other.address}'; "
                    "bind both to single addresses, or one of them to another port")
        others.append((chain, spec))


def _place_of(chain) -> str:
    return chain.declared_at or "config.options.rule_listen_port"


class Binding:
    """Everything this worker listens on."""

    def __init__(self, ask: Callable[[ListenSpec], socket.socket],
                 give_back: Callable[[tuple], None] = lambda key: None) -> None:
        """ask returns a listening socket that is ours, or raises BindFailed.

        give_back: told the key of a socket that we have closed, so that the master closes it, too.
        """
        self._ask = ask
        self._give_back = give_back
        self._known = Snapshot({}, {})
        self._by_key: dict[tuple, BoundChain] = {}
        self.watch: interfaces.Watch | None = None      # what becomes readable when follow() must be called
        self.bound: list[BoundChain] = []

    def bind(self, chains) -> None:
        """Get the sockets of every chain; nothing is accepted yet.  Raises ImpossibleBind, BindFailed."""
        if any(not isinstance(chain.bind, DBSockAddr) for chain in chains):
            self._begin_watching()
        specs = [(chain, _specs_of(chain, self._known)) for chain in chains]
        _refuse_impossible([(chain, spec) for chain, wanted in specs for spec in wanted])
        ordinals: collections.Counter = collections.Counter()
        for chain, wanted in specs:
            bound = BoundChain(chain)
            self.bound.append(bound)
            for spec in wanted:
                if not spec.port:                    # tell several binds to port 0 of one address apart
                    base = spec.key
                    spec = dataclasses.replace(spec, ordinal=ordinals[base])
                    ordinals[base] += 1
                self._open(bound, spec)
            bound.report()

    def sockets(self):
        """Every (socket, chain) of this moment."""
        return [(sock, bound.chain) for bound in self.bound for sock in bound.sockets.values()]

    def follow(self, acceptor) -> None:
        """Interfaces have changed: listen where the binds mean now."""
        self.watch.drain()
        before, self._known = self._known, take_snapshot()
        interfaces.log_changes(before, self._known)
        for bound in self.bound:
            if isinstance(bound.chain.bind, DBSockAddr):
                continue
            wanted = {spec.key: spec for spec in _specs_of(bound.chain, self._known)}
            for key in bound.sockets.keys() - wanted.keys():
                log(_id_of(bound.chain), "core.debug", 4,
                    "Removing dynamic interface address; addr='%s', dispatch='%s'",
                    (SockAddrInet(key[2], key[3]), bound.chain.bind.format()))
                acceptor.remove(bound.sockets.pop(key))
                del self._by_key[key]
                self._give_back(key)
            for key in wanted.keys() - bound.sockets.keys():
                self._open_later(bound, wanted[key], acceptor)
            bound.report()

    def _begin_watching(self) -> None:
        self.watch = interfaces.Watch()
        self._known = take_snapshot()
        interfaces.log_changes(Snapshot({}, {}), self._known)

    def _open(self, bound: BoundChain, spec: ListenSpec) -> bool:
        dynamic = not isinstance(bound.chain.bind, DBSockAddr)
        if spec.key in self._by_key:
            log(_id_of(bound.chain), "core.debug", 5,
                "Dynamic interface address already bound, skipping bind this time; addr='%s', dispatch='%s'",
                (spec.address, bound.chain.bind.format()))
            return False
        if dynamic:
            log(_id_of(bound.chain), "core.debug", 4, "Adding dynamic interface address; addr='%s', dispatch='%s'",
                (SockAddrInet(spec.address, spec.port), bound.chain.bind.format()))
        try:
            bound.sockets[spec.key] = self._ask(spec)
        except BindFailed as problem:
            if dynamic and problem.error == os.strerror(errno.EADDRNOTAVAIL):
                return False                         # gone again; the next change tells
            problem.at(bound.chain)
            _log_failure(bound.chain, problem)
            raise
        self._by_key[spec.key] = bound
        return True

    def _open_later(self, bound: BoundChain, spec: ListenSpec, acceptor) -> None:
        try:
            if self._open(bound, spec):
                acceptor.add(bound.sockets[spec.key], bound.chain)
        except BindFailed:
            return                                   # logged; the other addresses go on


def _specs_of(chain, snapshot: Snapshot) -> list[ListenSpec]:
    """Return the sockets that the bind of a chain means while the interfaces are these."""
    bind, params = chain.bind, chain.params
    if isinstance(bind, DBSockAddr):
        places = [bind.sa.to_sockaddr()[:2]]
        family = bind.sa.family
    else:
        places = [(address, bind.port) for address in interfaces.addresses_of(bind, snapshot)]
        family = socket.AF_INET
    protocol = bind.protocol or ZD_PROTO_TCP
    return [ListenSpec(
        protocol=protocol, family=int(family), address=address, port=port,
        backlog=params.backlog if protocol != ZD_PROTO_UDP else 0,
        rcvbuf_bytes=params.rcvbuf_bytes, lasting=params.rule_chain,
        transparent=bool(params.transparent or params.mark_tproxy)) for address, port in places]


def _id_of(chain) -> str | None:
    return chain.entries[0].session_id if getattr(chain, "entries", None) else None


def _log_failure(chain, problem: BindFailed) -> None:
    if problem.step == "socket":
        log(None, "core.error", 2, "Cannot create socket; error='%s'", (problem.error,))
    else:
        log(None, "core.error", 3, "%s() failed; bind='%s', error='%s'",
            (problem.step, chain.bind.format(), problem.error))
    log(None, "core.error", 0, "Error binding to interface; bind='%s', error='%s', place='%s'",
        (chain.bind.format(), problem.error, chain.declared_at))
