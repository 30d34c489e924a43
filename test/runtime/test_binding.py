"""Binds of a policy: which sockets they mean, and following interfaces."""

import dataclasses
import os
import socket

import pytest

from Zorp.acceptance.binds import DBIface, DBIfaceGroup, DBSockAddr
from Zorp.acceptance.dispatch_table import Chain, DispatchParams
from Zorp.Constants import ZD_PROTO_TCP
from Zorp.runtime import interfaces
from Zorp.runtime.acceptor import Acceptor
from Zorp.runtime.binding import BindFailed, Binding
from Zorp.runtime.listeners import ListenError, ListenerTable, ListenSpec, PortStore, open_listener
from Zorp.SockAddr import SockAddrInet
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


def test_ipv6_listeners_leave_ipv4_alone():
    with open_listener(ListenSpec(protocol=ZD_PROTO_TCP, family=socket.AF_INET6, address="::", port=0)) as six:
        port = six.getsockname()[1]
        with open_listener(ListenSpec(protocol=ZD_PROTO_TCP, family=socket.AF_INET, address="0.0.0.0", port=port)):
            pass


def test_addresses_are_followed(monkeypatch):
    # given a bind to an interface that has one address, then another, then none
    states = [Snapshot({"x0": 0}, {"x0": frozenset({(socket.AF_INET, number)})}) for number in (0x7F000001, 0x7F000002)]
    states.append(Snapshot({}, {}))
    monkeypatch.setattr("Zorp.runtime.binding.take_snapshot", lambda: states.pop(0))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
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
