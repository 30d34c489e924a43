"""What this process listens on, and who gets the connections that arrive there.

Theory of operation
    A dispatcher registers (Dispatch) its bind object with a priority and a handler.  Equal
    binds share one Chain: one listening socket, parameters of the first registration, and
    entries in the order in which they are asked: lowest priority number first, among equals
    the latest registration.  A bind to port 0 always gets a chain of its own.  Dispatchers of a
    policy take or refuse whatever they are offered, so that one of them that shares its address
    with an earlier asked one never serves: that is said when the policy has loaded.

    Nothing here opens a listening socket.  The runtime takes chains() after the policy has
    loaded, listens as chain.bind and chain.params say, reports the real addresses with
    chain.bound(), and calls chain.deliver() with every accepted connection.

    deliver() is the way of a connection from the socket to the handler:

        where did it want to go (redirected connections: ask the kernel)
        a transparent chain refuses whoever addressed it directly
        a listed load balancer tells the real client with a PROXY header
        entries are asked until one takes the connection

    A UDP chain has a table of its sessions (Zorp.acceptance.datagram_sessions); each new one is delivered as
    a connection is, once, with the socket that was made for it.

Threads
    Registration happens while the policy loads.  Proxies may register later and unregister, on an
    address that has a listener already: after seal() a new one is refused at once, because
    the sockets are the master's, opened before the policy serves.
    _chains_lock guards changes of the chains and of every chain's entries; both are immutable tuples,
    so deliver() reads them without the lock and no policy code ever runs under it.  deliver() is
    called in the thread that will own the session.

Deviations
    All chains are "threaded": selection and start of a service run in the session's own thread.
    A wildcard bind refuses direct connections too, when the destination is an own address with
    the bound port.  A shared chain keeps the first registration's parameters, as always, and
    says so in the log when a later one asks for others.
"""

from __future__ import annotations

import dataclasses
import socket
import threading

from Zorp import Globals, Log
from Zorp.acceptance.binds import BindKey, DBSockAddr, DispatchBindType
from Zorp.acceptance.datagram_sessions import DatagramSessions
from Zorp.Constants import (
    CORE_DEBUG,
    CORE_ERROR,
    CORE_POLICY,
    ZD_PROTO_AUTO,
    ZD_PROTO_TCP,
    ZD_PROTO_UDP,
)
from Zorp.Exceptions import PolicyError
from Zorp.language import arguments
from Zorp.language.caller import policy_caller
from Zorp.Log import log, log_exception
from Zorp.SockAddr import from_sockaddr
from Zorp.Stream import Stream
from Zorp.Subnet import Subnet
from Zorp.transport.arrival import original_destination
from Zorp.transport.hostaddr import is_own_address
from Zorp.transport.proxy_header import read_source
from Zorp.wire.errors import WireError

NO_SESSION = "nosession"
NOT_MINE = object()              # returned by a handler that leaves the connection to the next entry

_CONNECTION = "protocol='%d', remote='%s', local='%s', dest='%s'"
_WILDCARDS = ("0.0.0.0", "::")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DispatchParams:
    """How a chain listens; the keywords of dispatcher constructors."""

    transparent: bool = False        # foreign destinations are accepted, direct connections refused
    mark_tproxy: bool = False        # the socket options of transparent without the refusal
    threaded: bool = False           # accepted for old policies; every session has its thread
    backlog: int = 255               # listen queue
    accept_one: bool = False         # stop listening after one connection, share with nobody
    rcvbuf_bytes: int = 65536        # UDP: receive buffer of the listening socket
    rule_chain: bool = False         # made by the RuleDispatcher, not by the policy
    proxy_protocol: tuple = ()       # subnets whose hosts must send a PROXY header

    @classmethod
    def from_keywords(cls, protocol: int, keywords: dict) -> DispatchParams:
        """Read the keywords of a dispatcher; TypeError names one that does not belong there."""
        allowed = _KEYWORDS[protocol]
        values = {}
        for name, value in keywords.items():
            if name not in allowed:
                kind = "UDP" if protocol == ZD_PROTO_UDP else "TCP"
                raise TypeError(f"'{name}' is an invalid keyword argument for a {kind} dispatcher")
            convert = allowed[name]
            if convert is not None:
                values[_FIELDS.get(name, name)] = convert(name, value)
        return cls(**values)


def _flag(name: str, value) -> bool:
    return bool(arguments.flag("a dispatcher", name, value))


def _size(name: str, value) -> int:
    return arguments.whole_number("a dispatcher", name, value)


def _subnets(name: str, value) -> tuple:
    remedy = "give the subnets of the load balancers, such as ('192.0.2.0/24',)"
    subnets = (value,) if isinstance(value, Subnet) else arguments.items("a dispatcher", name, value, remedy)
    for item in subnets:
        if not isinstance(item, (str, Subnet)):
            raise arguments.invalid("a dispatcher", name, item, remedy)
    return tuple(Subnet.create(item) if isinstance(item, str) else item for item in subnets)


_COMMON_KEYWORDS = {"transparent": _flag, "mark_tproxy": _flag, "threaded": _flag, "session_limit": None}
_TCP_KEYWORDS = {**_COMMON_KEYWORDS, "backlog": _size, "accept_one": _flag, "proxy_protocol": _subnets}
_UDP_KEYWORDS = {**_COMMON_KEYWORDS, "rcvbuf": _size}
_KEYWORDS = {ZD_PROTO_TCP: _TCP_KEYWORDS, ZD_PROTO_UDP: _UDP_KEYWORDS}
_FIELDS = {"rcvbuf": "rcvbuf_bytes"}


class Chain:
    """One bind of this process with everybody who waits for its connections."""

    def __init__(self, bind: DispatchBindType, params: DispatchParams) -> None:
        self.bind = bind
        self.params = params
        self.declared_at = "" if params.rule_chain else str(policy_caller())     # file:line of the first registration
        self.key: BindKey = bind.key()
        self.protocol = self.key.protocol        # ZD_PROTO_TCP or ZD_PROTO_UDP
        self.addresses: tuple = ()               # real addresses of the listening sockets
        self.bound_port = self.key.port          # theirs; 0 before they exist
        self.entries: tuple[Dispatch, ...] = ()
        self._only_connection = threading.Lock()     # taken for good by the one connection of accept_one
        self.datagrams: DatagramSessions | None = None           # of a UDP chain
        if bind.protocol == ZD_PROTO_UDP:
            self.datagrams = DatagramSessions(transparent=params.transparent or params.mark_tproxy)

    def bound(self, addresses) -> None:
        """Remember where the sockets really listen (SockAddr each); called again when that changes."""
        self.addresses = tuple(addresses)
        self.bound_port = self.addresses[0].port if self.addresses else self.key.port
        if isinstance(self.bind, DBSockAddr) and self.addresses:
            self.bind.sa.port = self.bound_port

    def deliver(self, sock: socket.socket, remote, local) -> None:
        """Take over an accepted connection and give it to the first entry that wants it.

        Never raises.  The socket is ours from now on: it ends up with a session or closed.
        """
        self.deliver_stream(Stream(sock, NO_SESSION), remote, local)

    def deliver_stream(self, stream: Stream, remote, local) -> None:
        """The same for a stream, that of a new UDP session for example."""
        try:
            self._deliver(stream, remote, local)
        except BaseException:
            # neither a policy's SystemExit nor a defect of ours may end the thread of the pool
            log_exception(NO_SESSION)
            stream.close()

    def _deliver(self, stream: Stream, remote, local) -> None:
        if self.params.accept_one and not self._only_connection.acquire(blocking=False):
            log(self._session_id(), CORE_POLICY, 2, "Listener was for one connection only, refusing; remote='%s'",
                (remote,))
            stream.close()
            return
        destination = self._wanted_destination(stream, local)
        if destination is None:
            log(self._session_id(), CORE_ERROR, 1,
                "Transparent listener connected directly, dropping connection; local='%s', client_local='%s'",
                (self.bind.sa if isinstance(self.bind, DBSockAddr) else local, local))
            stream.close()
            return
        if self.params.proxy_protocol:
            remote = self._announced_client(stream, remote)
            if remote is None:
                stream.close()
                return
        fields = (self.protocol, remote, local, destination)
        for entry in self.entries:
            if Log.loudest >= 6:
                log(entry.session_id, CORE_DEBUG, 6, "Incoming connection; " + _CONNECTION, fields)
            result = entry.handler(stream, remote, destination, self.bind)
            if result is NOT_MINE:
                continue
            if result is None:
                log(NO_SESSION, CORE_POLICY, 1, "Connection denied by policy; " + _CONNECTION, fields)
                stream.close()
            return
        log(NO_SESSION, CORE_ERROR, 3, "Nobody was interested in this connection; " + _CONNECTION, fields)
        stream.close()

    def _wanted_destination(self, stream: Stream, local):
        """Return where the client wanted to go, or None when a transparent chain was addressed directly.

        A connection to our own address and port is either redirected to us, then the kernel
        knows where it wanted to go, or really meant for us.
        """
        if not self._is_listening_address(local):
            return local
        original = original_destination(stream.sock, local.family)
        if original is not None and original != (local.ip_s, local.port):
            return from_sockaddr(local.family, original)
        return None if self.params.transparent else local

    def _is_listening_address(self, local) -> bool:
        """True when `local` is one of our listening sockets as the client would address it directly."""
        if local.port != self.bound_port:
            return False
        if not (self.params.transparent or self.params.mark_tproxy):
            return True                              # without IP_TRANSPARENT nothing foreign gets here
        return local in self.addresses or _belongs_to_host(local)

    def _announced_client(self, stream: Stream, remote):
        """Return who a trusted load balancer says the client is; None when it sent no valid header."""
        if not any(subnet.contains(remote) for subnet in self.params.proxy_protocol):
            return remote
        try:
            source = read_source(stream)
        except (WireError, OSError) as problem:
            log(self._session_id(), "core.violation", 2,
                "No valid PROXY protocol header, dropping connection; remote='%s', error='%s'", (remote, problem))
            return None
        if source is None:
            return remote
        return from_sockaddr(socket.AF_INET6 if ":" in source[0] else socket.AF_INET, source)

    def listens_on(self, address) -> bool:
        """True when a connection to `address` would arrive here."""
        if address.port != self.bound_port:
            return False
        return any(address == mine or (mine.ip_s in _WILDCARDS and mine.family == address.family
                                       and _belongs_to_host(address))
                   for mine in self.addresses)

    def _session_id(self) -> str:
        return self.entries[0].session_id if self.entries else NO_SESSION


def _belongs_to_host(address) -> bool:
    try:
        return is_own_address(address.pack())
    except OSError:
        return True              # cannot be told apart from our own: refuse rather than loop


class Dispatch:
    """One registration: from construction to destroy() its handler is offered connections.

    Arguments:
        session_id: for the log lines of this registration.
        addr: bind object with protocol TCP.
        prio: -100 expected data channels, 0 proxies with several sub-sessions, 100 listeners.
        handler: called as handler(stream, client_address, client_local, client_listen); NOT_MINE
            leaves the connection to the next entry, None refuses it, all else takes it.
        keywords: the constructor keywords that describe the chain, or ready DispatchParams.
    """

    def __init__(self, session_id, addr, prio, handler, keywords=None):
        self.session_id = session_id
        self.prio = prio
        self.handler = handler
        self.declared_at = str(policy_caller()) if Globals.parsing else ""       # file:line, of those in the policy
        if not isinstance(keywords, DispatchParams):
            protocol = addr.protocol if addr.protocol in _KEYWORDS else ZD_PROTO_TCP
            keywords = DispatchParams.from_keywords(protocol, keywords or {})
        self.chain = Globals.dispatch_table.register(self, addr, keywords)
        log(session_id, CORE_DEBUG, 7, "Dispatcher on address; local='%s', prio='%d'", (addr.format(), prio))

    def destroy(self):
        """Stop taking connections; a second call does nothing."""
        Globals.dispatch_table.unregister(self)


class DispatchTable:
    """All chains of this process.  _chains_lock guards changes of _chains and of every chain's entries.

    Both are tuples, which are replaced and never changed, so who only reads them needs no lock.
    """

    def __init__(self) -> None:
        self._chains_lock = threading.Lock()
        self._chains: tuple[Chain, ...] = ()
        self._is_sealed = False

    def chains(self) -> list[Chain]:
        """Return every chain that somebody waits on, in order of registration."""
        return list(self._chains)

    def seal(self) -> None:
        """The listening sockets are open: no chain can be added any more."""
        self._is_sealed = True

    def register(self, entry: Dispatch, bind: DispatchBindType, params: DispatchParams) -> Chain:
        """Add an entry to the chain of its bind, a new one when there is none.  Raises PolicyError."""
        self._check(bind)
        key = bind.key()
        with self._chains_lock:
            chain = None if not key.port else next((c for c in self._chains if c.key == key), None)
            if chain is None and self._is_sealed:
                self._refuse_to_listen(entry, bind)
            elif chain is None:
                chain = Chain(bind, params)
                self._chains = (*self._chains, chain)
            elif key.protocol == ZD_PROTO_TCP and chain.params.accept_one:
                self._refuse_to_share(entry, bind)
            # the new entry goes before its equals: sorted() is stable
            chain.entries = tuple(sorted((entry, *chain.entries), key=lambda e: e.prio))
        if chain.params != params:
            log(entry.session_id, CORE_POLICY, 3,
                "Dispatcher shares a listener that was set up with other parameters, keeping those; dispatch='%s'",
                (bind.format(),))
        return chain

    def unregister(self, entry: Dispatch) -> None:
        """Take an entry out; a chain without entries leaves the table."""
        with self._chains_lock:
            for chain in self._chains:
                if entry in chain.entries:
                    chain.entries = tuple(e for e in chain.entries if e is not entry)
            self._chains = tuple(chain for chain in self._chains if chain.entries)

    def warn_of_idle_entries(self) -> None:
        """Name the dispatchers that will never be offered a connection."""
        for chain in self.chains():
            first, *others = chain.entries
            for idle in filter(lambda entry: entry.declared_at, others):
                log(idle.session_id, CORE_POLICY, 2,
                    "Dispatcher never gets a connection, another one has the same address, take one of them out or "
                    "give it an address of its own; dispatch='%s', place='%s', winner_place='%s'",
                    (chain.bind.format(), idle.declared_at, first.declared_at))

    def listens_on(self, protocol: int, address) -> bool:
        """True when a connection of this protocol to the SockAddr would come back to this process."""
        port = address.port
        for chain in self._chains:
            if chain.bound_port == port and chain.protocol == protocol and chain.listens_on(address):
                return True
        return False

    def _check(self, bind: DispatchBindType) -> None:
        if bind.protocol == ZD_PROTO_AUTO:
            raise PolicyError("No preferred protocol is specified",
                              remedy="give the bind object protocol=ZD_PROTO_TCP or ZD_PROTO_UDP")

    @staticmethod
    def _refuse_to_listen(entry: Dispatch, bind: DispatchBindType) -> None:
        log(entry.session_id, CORE_ERROR, 1,
            "Error registering dispatch, nothing listens there and listeners are opened when the policy loads only; "
            "dispatch='%s'", (bind.format(),))
        raise PolicyError(f"Error registering dispatch, nothing listens there; dispatch='{bind.format()}'",
                          remedy="make the dispatcher in the function of the instance; this one may join its address")

    @staticmethod
    def _refuse_to_share(entry: Dispatch, bind: DispatchBindType) -> None:
        log(entry.session_id, CORE_ERROR, 1,
            "Error registering dispatch, previous entry specified accept_one; dispatch='%s'", (bind.format(),))
        raise PolicyError(
            f"Error registering dispatch, previous entry specified accept_one; dispatch='{bind.format()}'",
            remedy="a listener with accept_one=TRUE shares its address with nobody")


if Globals.dispatch_table is None:
    Globals.dispatch_table = DispatchTable()
