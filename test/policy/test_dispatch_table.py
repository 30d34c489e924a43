"""The dispatch table: sharing, priorities, parameters, and the way of a socket to a handler."""

import socket
import struct

import pytest

from Zorp.acceptance import dispatch_table as module
from Zorp import Globals
from Zorp.acceptance.binds import DBIface, DBSockAddr
from Zorp.Constants import ZD_PROTO_AUTO, ZD_PROTO_TCP, ZD_PROTO_UDP
from Zorp.acceptance.dispatch_table import NOT_MINE, Dispatch, DispatchParams, DispatchTable
from Zorp.Exceptions import PolicyError
from Zorp.SockAddr import SockAddrInet, from_sockaddr
from Zorp.transport import proxy_header
from Zorp.wire import proxy_protocol

from test.support.gateway import ended
from test.support.logged import captured_log


@pytest.fixture
def table(monkeypatch):
    table = DispatchTable()
    monkeypatch.setattr(Globals, "dispatch_table", table)
    # connections say themselves where they go, often to made-up addresses: what the host tracks is no part of it
    monkeypatch.setattr(module, "original_destination", lambda sock, family: None)
    return table


@pytest.fixture
def logged():
    with captured_log() as logged:
        yield logged


def bind(port=5001, host="127.0.0.1", protocol=ZD_PROTO_TCP):
    return DBSockAddr(SockAddrInet(host, port), protocol)


def take(*connection):
    return 1


class Taker:
    """A handler that remembers its connections and answers as told."""

    def __init__(self, answer=1):
        self.answer = answer
        self.connections = []

    def __call__(self, stream, client_address, client_local, client_listen):
        self.connections.append((stream, client_address, client_local, client_listen))
        return self.answer


def deliver(chain, local=None, source="127.0.0.1"):
    """Connect a client and give the other end to the chain; return the client's socket and both addresses."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), 10, (source, 0))
        accepted, peer = listener.accept()
    remote = from_sockaddr(socket.AF_INET, peer)
    local = local or from_sockaddr(socket.AF_INET, accepted.getsockname())
    chain.deliver(accepted, remote, local)
    return client, remote, local


# ------------------------------------------------------------------ registration

def test_equal_binds_share_a_chain_and_the_latest_registration_comes_first(table):
    # given two listeners on one address, as two definitions in one instance
    first = Dispatch("a", bind(), 100, take)
    second = Dispatch("b", bind(), 100, take)
    # then there is one chain, and the later definition is asked first
    assert first.chain is second.chain
    assert table.chains() == [first.chain]
    assert first.chain.entries == (second, first)


def test_lowest_priority_number_is_asked_first(table):
    listener = Dispatch("listen", bind(), 100, take)
    related = Dispatch("related", bind(), -100, take)
    normal = Dispatch("normal", bind(), 0, take)
    assert listener.chain.entries == (related, normal, listener)


def test_port_zero_never_shares(table):
    one, other = Dispatch("a", bind(0), 100, take), Dispatch("b", bind(0), 100, take)
    assert one.chain is not other.chain
    assert len(table.chains()) == 2


def test_parameters_are_those_of_the_first_registration_and_a_difference_is_logged(table, logged):
    first = Dispatch("a", bind(), 100, take, {"backlog": 10})
    Dispatch("b", bind(), 100, take, {"backlog": 20})
    assert first.chain.params.backlog == 10
    assert logged.find("Dispatcher shares a listener that was set up with other parameters")


def test_nobody_shares_with_accept_one(table, logged):
    Dispatch("a", bind(), 100, take, {"accept_one": True})
    with pytest.raises(PolicyError, match="previous entry specified accept_one"):
        Dispatch("b", bind(), 100, take)
    assert logged.has("Error registering dispatch, previous entry specified accept_one; dispatch='%s'",
                      ("SA(proto=1,addr=AF_INET(127.0.0.1:5001))",))


def test_unregistering_the_last_entry_removes_the_chain(table):
    one, other = Dispatch("a", bind(), 100, take), Dispatch("b", bind(), 100, take)
    one.destroy()
    assert table.chains() == [other.chain]
    other.destroy()
    other.destroy()
    assert table.chains() == []


def test_udp_chain_has_sessions_and_a_receive_buffer(table):
    chain = Dispatch("a", bind(protocol=ZD_PROTO_UDP), 100, take, {"rcvbuf": 1000}).chain
    assert chain.params.rcvbuf_bytes == 1000
    assert chain.datagrams.number == 0
    assert Dispatch("b", bind(), 100, take).chain.datagrams is None


def test_bind_without_protocol_is_refused(table):
    with pytest.raises(PolicyError, match="No preferred protocol is specified"):
        Dispatch("a", bind(protocol=ZD_PROTO_AUTO), 100, take)


@pytest.mark.parametrize(("protocol", "keywords"), [
    (ZD_PROTO_TCP, {"rcvbuf": 1}), (ZD_PROTO_TCP, {"tranparent": 1}), (ZD_PROTO_TCP, {"rule_chain": 1}),
    (ZD_PROTO_UDP, {"backlog": 1}), (ZD_PROTO_UDP, {"accept_one": 1}),
])
def test_keywords_that_do_not_belong_there_are_named(protocol, keywords):
    with pytest.raises(TypeError, match=next(iter(keywords))):
        DispatchParams.from_keywords(protocol, keywords)


def test_all_keywords_of_old_policies_are_understood():
    params = DispatchParams.from_keywords(ZD_PROTO_TCP, {
        "transparent": 1, "mark_tproxy": 0, "threaded": 1, "backlog": 100, "accept_one": 0, "session_limit": 10,
        "proxy_protocol": "10.0.0.0/8"})
    assert params.transparent is True
    assert params.backlog == 100
    assert params.proxy_protocol[0].contains(SockAddrInet("10.2.3.4", 1))


def test_real_port_is_written_back(table):
    dispatch = Dispatch("a", bind(0), 100, take)
    dispatch.chain.bound([SockAddrInet("127.0.0.1", 40001)])
    assert dispatch.chain.bind.sa.port == 40001
    assert table.listens_on(ZD_PROTO_TCP, SockAddrInet("127.0.0.1", 40001))
    assert not table.listens_on(ZD_PROTO_UDP, SockAddrInet("127.0.0.1", 40001))
    assert not table.listens_on(ZD_PROTO_TCP, SockAddrInet("127.0.0.1", 40002))
    assert not table.listens_on(ZD_PROTO_TCP, SockAddrInet("127.0.0.2", 40001))


def test_wildcard_listens_on_every_own_address_and_no_other(table):
    dispatch = Dispatch("a", bind(40001, "0.0.0.0"), 100, take)
    dispatch.chain.bound([SockAddrInet("0.0.0.0", 40001)])
    assert table.listens_on(ZD_PROTO_TCP, SockAddrInet("127.9.9.9", 40001))
    assert not table.listens_on(ZD_PROTO_TCP, SockAddrInet("203.0.113.80", 40001))


# ------------------------------------------------------------------ delivery

def test_connection_reaches_the_handler_with_its_addresses(table, logged):
    # given a dispatcher on an address
    taker = Taker()
    chain = Dispatch("x/dsp/dispatch:0", bind(), 100, taker).chain
    # when a connection is delivered
    _, remote, local = deliver(chain)
    # then the handler gets the stream, client, destination and bind object, and the log says so
    (stream, client_address, client_local, client_listen), = taker.connections
    assert (client_address, client_local, client_listen) == (remote, local, chain.bind)
    assert stream.fd > 0
    fields = (1, str(remote), str(local), str(local))
    assert logged.has("Incoming connection; protocol='%d', remote='%s', local='%s', dest='%s'", fields)
    assert logged.find("Incoming connection")[0].session == "x/dsp/dispatch:0"


def test_later_entries_are_asked_when_earlier_ones_leave_the_connection(table):
    related, listener = Taker(NOT_MINE), Taker()
    Dispatch("related", bind(), -100, related)
    chain = Dispatch("listen", bind(), 100, listener).chain
    deliver(chain)
    assert len(related.connections) == len(listener.connections) == 1


def test_refused_connection_is_closed_and_logged(table, logged):
    chain = Dispatch("a", bind(), 100, Taker(None)).chain
    client, remote, local = deliver(chain)
    assert ended(client)
    message, = logged.find("Connection denied by policy")
    assert (message.session, message.tag, message.level) == ("nosession", "core.policy", 1)
    assert message.arguments == (1, str(remote), str(local), str(local))


def test_connection_nobody_wants_is_closed_and_logged(table, logged):
    chain = Dispatch("a", bind(), 100, Taker(NOT_MINE)).chain
    client, *_ = deliver(chain)
    assert ended(client)
    assert logged.find("Nobody was interested in this connection; protocol='1'")[0][1:3] == ("core.error", 3)


@pytest.mark.parametrize("problem", [ValueError("x"), SystemExit(1), KeyboardInterrupt()])
def test_failing_handler_costs_its_connection_only(table, problem):
    def fail(*connection):
        raise problem
    chain = Dispatch("a", bind(), 100, fail).chain
    client, *_ = deliver(chain)
    assert ended(client)


def test_transparent_listener_refuses_direct_connections(table, logged):
    # given a transparent listener, when a client connects to its own address and port
    taker = Taker()
    chain = Dispatch("a", bind(5001), 100, taker, {"transparent": True}).chain
    chain.bound([SockAddrInet("127.0.0.1", 5001)])
    client, *_ = deliver(chain, local=SockAddrInet("127.0.0.1", 5001))
    # then it is closed and no handler is asked
    assert ended(client)
    assert taker.connections == []
    message, = logged.find(
        "Transparent listener connected directly, dropping connection; local='AF_INET(127.0.0.1:5001)'")
    assert (message.tag, message.level) == ("core.error", 1)


def test_transparent_wildcard_refuses_every_own_address_with_its_port(table):
    taker = Taker()
    chain = Dispatch("a", bind(5001, "0.0.0.0"), 100, taker, {"transparent": True}).chain
    chain.bound([SockAddrInet("0.0.0.0", 5001)])
    client, *_ = deliver(chain, local=SockAddrInet("127.0.0.5", 5001))
    assert ended(client)
    assert taker.connections == []


def test_transparent_listener_takes_intercepted_connections(table):
    taker = Taker()
    chain = Dispatch("a", bind(5001), 100, taker, {"transparent": True}).chain
    for wanted in (SockAddrInet("203.0.113.80", 80), SockAddrInet("203.0.113.80", 5001)):
        deliver(chain, local=wanted)
    assert [str(connection[2]) for connection in taker.connections] == [
        "AF_INET(203.0.113.80:80)", "AF_INET(203.0.113.80:5001)"]


def test_interface_bind_refuses_direct_connections_to_its_addresses(table):
    taker = Taker()
    chain = Dispatch("a", DBIface("lo", 5001, protocol=ZD_PROTO_TCP), 100, taker, {"transparent": True}).chain
    chain.bound([SockAddrInet("127.0.0.1", 5001)])
    client, *_ = deliver(chain, local=SockAddrInet("127.0.0.1", 5001))
    assert ended(client)
    assert taker.connections == []


@pytest.mark.parametrize("transparent", [False, True])
def test_redirected_connection_gets_the_destination_the_kernel_remembers(table, monkeypatch, transparent):
    # given connection tracking that remembers a REDIRECT of this connection
    taker = Taker()
    chain = Dispatch("a", bind(5001), 100, taker, {"transparent": transparent}).chain
    monkeypatch.setattr(module, "original_destination", lambda sock, family: ("203.0.113.80", 80))
    # when it arrives at the listener's own address and port
    deliver(chain, local=SockAddrInet("127.0.0.1", 5001))
    # then the policy sees where the client wanted to go
    assert str(taker.connections[0][2]) == "AF_INET(203.0.113.80:80)"


def test_diverted_connection_never_asks_connection_tracking(table, monkeypatch):
    taker = Taker()
    chain = Dispatch("a", bind(5001), 100, taker, {"transparent": True}).chain
    monkeypatch.setattr(module, "original_destination", lambda sock, family: ("10.66.66.66", 66))
    deliver(chain, local=SockAddrInet("203.0.113.80", 80))
    assert str(taker.connections[0][2]) == "AF_INET(203.0.113.80:80)"


# ------------------------------------------------------------------ PROXY header

def balanced(chain, data, source="127.0.0.1"):
    """Deliver a connection whose client has sent `data` already."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), 10, (source, 0))
        accepted, peer = listener.accept()
    client.sendall(data)
    chain.deliver(accepted, from_sockaddr(socket.AF_INET, peer), SockAddrInet("127.0.0.1", 5001))
    return client


@pytest.mark.parametrize("version", [1, 2])
def test_proxy_header_of_a_listed_balancer_replaces_the_client_address(table, version):
    taker = Taker()
    chain = Dispatch("a", bind(), 100, taker, {"proxy_protocol": ("127.0.0.0/24",)}).chain
    header = proxy_protocol.write(version, ("192.0.2.7", 4711), ("203.0.113.80", 25))
    balanced(chain, header + b"EHLO x\r\n")
    stream, client_address, client_local, _ = taker.connections[0]
    assert str(client_address) == "AF_INET(192.0.2.7:4711)"
    assert str(client_local) == "AF_INET(127.0.0.1:5001)"
    assert stream.recv() == b"EHLO x\r\n"


@pytest.mark.parametrize("data", [b"EHLO x\r\n", b"PROXY TCP4 nonsense\r\n"])
def test_listed_balancer_without_a_valid_header_is_closed(table, logged, data):
    taker = Taker()
    chain = Dispatch("a", bind(), 100, taker, {"proxy_protocol": ("127.0.0.0/24",)}).chain
    assert ended(balanced(chain, data))
    assert taker.connections == []
    assert logged.find("No valid PROXY protocol header, dropping connection; remote='AF_INET(127.0.0.1:")


def test_listed_balancer_that_sends_nothing_is_closed_in_time(table, monkeypatch):
    monkeypatch.setattr(proxy_header, "HEADER_TIMEOUT_S", 0.1)
    taker = Taker()
    chain = Dispatch("a", bind(), 100, taker, {"proxy_protocol": ("127.0.0.0/24",)}).chain
    assert ended(balanced(chain, b"PROXY "))
    assert taker.connections == []


def test_header_of_anybody_else_is_just_data(table):
    taker = Taker()
    chain = Dispatch("a", bind(), 100, taker, {"proxy_protocol": ("10.0.0.0/8",)}).chain
    balanced(chain, b"PROXY UNKNOWN\r\n")
    stream, client_address, *_ = taker.connections[0]
    assert client_address.ip_s == "127.0.0.1"
    assert stream.recv() == b"PROXY UNKNOWN\r\n"


def test_accept_one_takes_one_connection(table, logged):
    # given a listener for one connection
    taker = Taker()
    chain = Dispatch("a", bind(), 100, taker, {"accept_one": True}).chain
    # when two come, then the second is closed
    deliver(chain)
    client, *_ = deliver(chain)
    assert ended(client)
    assert len(taker.connections) == 1
    assert logged.find("Listener was for one connection only, refusing; remote='AF_INET(127.0.0.1:")


def test_closed_socket_is_no_crash(table):
    chain = Dispatch("a", bind(), 100, Taker()).chain
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
    chain.deliver(sock, SockAddrInet("127.0.0.1", 1), SockAddrInet("127.0.0.1", 2))
