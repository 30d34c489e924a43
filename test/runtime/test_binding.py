"""Binds of a policy: which sockets they mean, and following interfaces."""

import dataclasses
import itertools
import os
import socket

import pytest

from test.support.ports import free_port
from Zorp.acceptance.binds import DBIface, DBIfaceGroup, DBSockAddr
from Zorp.acceptance.dispatch_table import Chain, DispatchParams
from Zorp.Constants import ZD_PROTO_TCP, ZD_PROTO_UDP
from Zorp.runtime import interfaces
from Zorp.runtime.acceptor import Acceptor
from Zorp.runtime.binding import BindFailed, Binding, ImpossibleBind, check
from Zorp.runtime.listeners import ListenError, ListenerTable, ListenSpec, PortStore, open_listener
from Zorp.SockAddr import SockAddrInet, SockAddrInet6
from Zorp.transport.interfaces import Snapshot

HOST = Snapshot({"eth0": 0, "eth1": 7, "eth2": 7}, {
    "eth0": frozenset({(socket.AF_INET, 0x0A000001), (socket.AF_INET, 0x0A000002), (socket.AF_INET6, 1)}),
    "eth1": frozenset({(socket.AF_INET, 0x0A010001)}), "eth2": frozenset({(socket.AF_INET, 0x0A020001)})})


def chain_of(bind, **params) -> Chain:
    return Chain(bind, DispatchParams(**params))


class Master:
    """Opens what a worker asks for, as the master would."""

    def __init__(self, refused: dict[str, str] | None = None) -> None:
        self.refused = refused or {}
        self.asked: list[ListenSpec] = []

    def ask(self, spec: ListenSpec) -> socket.socket:
        self.asked.append(spec)
        if spec.address in self.refused:
            raise BindFailed("bind", self.refused[spec.address])
        return open_listener(spec)


@pytest.mark.parametrize(("bind", "addresses"), [
    (DBIface("eth0", 80), ["10.0.0.1", "10.0.0.2"]),
    (DBIface("eth0", 80, ip="10.0.0.2"), ["10.0.0.2"]),
    (DBIface("eth0", 80, ip="10.9.9.9"), []),
    (DBIface("eth9", 80), []),
    (DBIfaceGroup(7, 80), ["10.1.0.1", "10.2.0.1"]),
    (DBIfaceGroup(8, 80), [])])
def test_what_an_interface_bind_means(bind, addresses):
    assert interfaces.addresses_of(bind, HOST) == addresses


def test_the_real_port_is_written_back():
    bind = DBSockAddr(SockAddrInet("127.0.0.1", 0), ZD_PROTO_TCP)
    binding = Binding(Master().ask)
    binding.bind([chain_of(bind)])
    assert bind.sa.port == binding.sockets()[0][0].getsockname()[1] != 0


def test_each_bind_to_port_0_is_a_socket_of_its_own_in_the_same_order_every_time():
    asked = []
    for _generation in range(2):
        master = Master()
        Binding(master.ask).bind([chain_of(DBSockAddr(SockAddrInet("127.0.0.1", 0), ZD_PROTO_TCP)) for _ in range(3)])
        asked.append([spec.key for spec in master.asked])
    assert asked[0] == asked[1]
    assert len(set(asked[0])) == 3


def test_the_master_keeps_one_socket_per_key_until_nobody_uses_it():
    # given two generations that use one key
    table = ListenerTable()
    spec = ListenSpec(protocol=ZD_PROTO_TCP, family=socket.AF_INET, address="127.0.0.1", port=0)
    first = table.obtain(spec, 1)
    assert table.obtain(spec, 2) is first
    # when they leave one after the other
    table.release(1)
    assert first.fileno() >= 0
    table.release(2)
    # then it is closed with the second
    assert first.fileno() < 0


def test_a_failing_bind_names_the_call():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ListenError) as refusal:
        open_listener(ListenSpec(protocol=ZD_PROTO_TCP, family=socket.AF_INET, address="127.0.0.1",
                                 port=taken.getsockname()[1]))
    assert (refusal.value.step, refusal.value.strerror) == ("bind", "Address already in use")


def test_listeners_do_not_block_and_hand_nodelay_on():
    with open_listener(ListenSpec(protocol=ZD_PROTO_TCP, family=socket.AF_INET, address="127.0.0.1", port=0)) as sock:
        assert not sock.getblocking()
        with socket.create_connection(sock.getsockname()):
            accepted, _ = sock.accept()
            with accepted:
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert accepted.getblocking()


ADDRESSES = [(socket.AF_INET, "0.0.0.0"), (socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "127.0.0.2"),
             (socket.AF_INET6, "::"), (socket.AF_INET6, "::1")]


@pytest.mark.parametrize("protocol", [ZD_PROTO_TCP, ZD_PROTO_UDP])
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(ADDRESSES, 2)))
def test_what_excludes_each_other_is_what_the_kernel_refuses(protocol, first, second):
    def spec(place, port) -> ListenSpec:
        return ListenSpec(protocol=protocol, family=place[0], address=place[1], port=port)

    def is_refused() -> bool:
        with open_listener(spec(first, 0)) as held:
            try:
                open_listener(spec(second, held.getsockname()[1])).close()
            except ListenError as problem:
                return problem.strerror == "Address already in use"
        return False

    # given a listening socket; when another one is opened beside it, then the kernel says what we say
    refused = all(is_refused() for _ in range(3))        # somebody else may have the port, but not three times
    assert spec(first, 8025).excludes(spec(second, 8025)) == refused
    assert spec(second, 8025).excludes(spec(first, 8025)) == refused


def chains_at(*places) -> list[Chain]:
    """Chains that were declared at policy.py:1, policy.py:2 and so on."""
    chains = []
    for line, bind in enumerate(places, 1):
        chain = chain_of(bind)
        chain.declared_at = f"policy.py:{line}"
        chains.append(chain)
    return chains


IMPOSSIBLE = {
    "one address beside all": [DBSockAddr(SockAddrInet("0.0.0.0", 8025), ZD_PROTO_TCP),
                               DBSockAddr(SockAddrInet("127.0.0.1", 8025), ZD_PROTO_TCP)],
    "all beside one": [DBSockAddr(SockAddrInet("127.0.0.1", 8025), ZD_PROTO_TCP),
                       DBSockAddr(SockAddrInet("0.0.0.0", 8025), ZD_PROTO_TCP)],
    "IPv6": [DBSockAddr(SockAddrInet6("::1", 8025), ZD_PROTO_TCP), DBSockAddr(SockAddrInet6("::", 8025), ZD_PROTO_TCP)],
    "an interface that has addresses": [DBIface("lo", 8025, protocol=ZD_PROTO_TCP),
                                        DBSockAddr(SockAddrInet("0.0.0.0", 8025), ZD_PROTO_TCP)],
}


@pytest.mark.parametrize("binds", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_binds_that_exclude_each_other_are_refused_before_anything_is_opened(binds):
    master = Master()
    with pytest.raises(ImpossibleBind, match=r"^policy\.py:2: Listening on every address .*other_place='policy\.py:1'"):
        Binding(master.ask).bind(chains_at(*binds))
    assert master.asked == []
    with pytest.raises(ImpossibleBind):
        check(chains_at(*binds))


def test_an_ipv4_address_in_the_form_of_ipv6_is_refused():
    with pytest.raises(ImpossibleBind, match="bind to a SockAddrInet"):
        check(chains_at(DBSockAddr(SockAddrInet6("::ffff:127.0.0.1", 8025), ZD_PROTO_TCP)))


def test_binds_that_the_kernel_lets_stand_side_by_side_are_let_alone():
    every, one, other = (SockAddrInet(address, 8025) for address in ("0.0.0.0", "127.0.0.1", "127.0.0.2"))
    check(chains_at(
        DBSockAddr(every, ZD_PROTO_TCP), DBSockAddr(SockAddrInet6("::", 8025), ZD_PROTO_TCP),
        DBSockAddr(SockAddrInet("127.0.0.1", 8026), ZD_PROTO_TCP), DBIface("nosuch0", 8025, protocol=ZD_PROTO_TCP),
        DBSockAddr(SockAddrInet("0.0.0.0", 0), ZD_PROTO_TCP), DBSockAddr(SockAddrInet("127.0.0.1", 0), ZD_PROTO_TCP)))
    check(chains_at(DBSockAddr(one, ZD_PROTO_TCP), DBSockAddr(other, ZD_PROTO_TCP)))
    check(chains_at(DBSockAddr(every, ZD_PROTO_UDP), DBSockAddr(one, ZD_PROTO_UDP)))


def test_ipv6_listeners_leave_ipv4_alone():
    port = free_port()
    six, four = (ListenSpec(protocol=ZD_PROTO_TCP, family=family, address=address, port=port)
                 for family, address in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")))
    with open_listener(six), open_listener(four):
        pass


def test_addresses_are_followed(monkeypatch):
    # given a bind to an interface that has one address, then another, then none
    states = [Snapshot({"x0": 0}, {"x0": frozenset({(socket.AF_INET, number)})}) for number in (0x7F000001, 0x7F000002)]
    states.append(Snapshot({}, {}))
    monkeypatch.setattr("Zorp.runtime.binding.take_snapshot", lambda: states.pop(0))
    port = free_port()
    binding, acceptor = Binding(Master().ask), Acceptor()
    chain = chain_of(DBIface("x0", port, protocol=ZD_PROTO_TCP))
    binding.bind([chain])
    acceptor.add(*binding.sockets()[0])
    assert [address.ip_s for address in chain.addresses] == ["127.0.0.1"]
    # when the first change comes, then the new address listens and the old one does not
    binding.follow(acceptor)
    assert [address.ip_s for address in chain.addresses] == ["127.0.0.2"]
    socket.create_connection(("127.0.0.2", port)).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    # and when the interface has gone, nothing does
    binding.follow(acceptor)
    assert chain.addresses == ()


def test_an_address_that_is_gone_again_is_no_failure():
    # given an interface whose address the kernel does not know any more
    bind = DBIface("lo", 0x5555, protocol=ZD_PROTO_TCP)
    binding = Binding(Master({"127.0.0.1": os.strerror(99)}).ask)
    # then the policy loads all the same
    binding.bind([chain_of(bind)])
    assert binding.sockets() == []


def test_a_fixed_address_that_cannot_be_bound_is_a_failure():
    binding = Binding(Master({"127.0.0.1": os.strerror(99)}).ask)
    with pytest.raises(BindFailed):
        binding.bind([chain_of(DBSockAddr(SockAddrInet("127.0.0.1", 1), ZD_PROTO_TCP))])


def test_ports_of_rules_are_the_same_after_a_restart(tmp_path):
    # given a rule listener that got some port
    spec = ListenSpec(protocol=ZD_PROTO_TCP, family=socket.AF_INET, address="127.0.0.1", port=0, lasting=True)
    path = str(tmp_path / "ports")
    with open_listener(spec, PortStore(path)) as first:
        port = first.getsockname()[1]
        # when it is taken at the next start, then there is another
        with open_listener(spec, PortStore(path)) as second:
            assert second.getsockname()[1] != port
            port = second.getsockname()[1]
    # and when it is free, the same
    with open_listener(spec, PortStore(path)) as third:
        assert third.getsockname()[1] == port


@pytest.mark.parametrize("text", ["", "[1]", "{\"1 2 127.0.0.1 0\": \"x\"}", "{\"1 2 127.0.0.1 0\": 99999}"])
def test_a_damaged_store_is_as_good_as_none(tmp_path, text):
    path = tmp_path / "ports"
    path.write_text(text)
    spec = ListenSpec(protocol=ZD_PROTO_TCP, family=socket.AF_INET, address="127.0.0.1", port=0, lasting=True)
    open_listener(spec, PortStore(str(path))).close()


def test_a_reload_may_change_transparency_of_an_open_listener():
    # given a listener of a policy that serves
    table = ListenerTable()
    spec = ListenSpec(protocol=ZD_PROTO_TCP, family=socket.AF_INET, address="127.0.0.1", port=0)
    sock = table.obtain(spec, 1)
    # when the next policy wants it to be transparent
    table.obtain(dataclasses.replace(spec, transparent=True), 2)
    assert not sock.getsockopt(socket.SOL_IP, IP_FREEBIND)
    # then it is, from the moment that this one serves, and no longer than that
    table.adjust(2)
    assert sock.getsockopt(socket.SOL_IP, IP_FREEBIND) or not may_be_transparent()
    table.adjust(1)
    assert not sock.getsockopt(socket.SOL_IP, IP_FREEBIND)
    table.close()


IP_FREEBIND, IP_TRANSPARENT = 15, 19


def may_be_transparent() -> bool:
    with socket.socket() as probe:
        try:
            probe.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
        except PermissionError:
            return False
        return True
