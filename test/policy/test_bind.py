"""Bind objects: arguments, texts, equality."""

import re

import pytest

from Zorp.acceptance import binds
from Zorp.acceptance.binds import DBIface, DBIfaceGroup, DBSockAddr, DispatchBindType, protocol_name
from Zorp.Constants import ZD_PROTO_AUTO, ZD_PROTO_TCP, ZD_PROTO_UDP
from Zorp.SockAddr import SockAddrInet, SockAddrInet6, SockAddrUnix


@pytest.mark.parametrize(("bind", "formatted", "shown"), [
    (DBSockAddr(SockAddrInet("1.2.3.4", 80), ZD_PROTO_TCP),
     "SA(proto=1,addr=AF_INET(1.2.3.4:80))", "SockAddrInet(AF_INET(1.2.3.4:80))"),
    (DBSockAddr(SockAddrInet6("fe80::1", 80)),
     "SA(proto=0,addr=AF_INET6(fe80::1:80))", "SockAddrInet(AF_INET6(fe80::1:80))"),
    (DBIface("eth0", 50080, protocol=ZD_PROTO_TCP),
     "IFACE(proto=1,iface=eth0,ip=0.0.0.0,port=50080,family=2)", "DBIface(iface=eth0, port=50080)"),
    (DBIfaceGroup(0x1F, 50080, protocol=ZD_PROTO_UDP),
     "IFGROUP(proto=2,iface_group=0x1f,port=50080,family=2)", "DBIfaceGroup(group=31, port=50080)"),
])
def test_texts(bind, formatted, shown):
    assert bind.format() == formatted
    assert str(bind) == repr(bind) == shown


def test_types_number_and_classes_are_those_that_policies_test():
    assert [DBSockAddr.type, DBIface.type, DBIfaceGroup.type] == [1, 2, 3]
    assert isinstance(DBIface("eth0", 1), binds.DBIfaceType)
    assert isinstance(DBIface("eth0", 1), DispatchBindType)
    assert not isinstance(DBIface("eth0", 1), binds.DBSockAddrType)


def test_interface_address_is_the_network_order_integer_of_sockaddr():
    bind = DBIface("eth0", 3128, ip="10.1.2.3")
    assert bind.ip_s == "10.1.2.3"
    assert bind.ip == SockAddrInet("10.1.2.3", 0).ip


@pytest.mark.parametrize(("make", "text"), [
    (lambda: DBSockAddr("10.0.0.1"), "Expected SockAddr"),
    (lambda: DBSockAddr(SockAddrUnix("/tmp/x")), "Expected SockAddr"),
    (lambda: DBIface("eth0", 0), "Interface bound dispatches require a non-zero port"),
    (lambda: DBIface("eth0", 65536), "Interface bound dispatches require a non-zero port"),
    (lambda: DBIface("eth0", 80, ip="10.0.0.x"),
     "Error parsing bind ip of dispatcher; interface='eth0', ip='10.0.0.x'"),
    (lambda: DBIface("eth0", 80, family=10), "IPv4 only"),
    (lambda: DBIface("a-name-too-long-1", 80), "Invalid interface name"),
    (lambda: DBIfaceGroup(1, 0), "Interface Group bound dispatches require a non-zero port"),
])
def test_bad_arguments_are_refused_with_the_known_text(make, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        make()


@pytest.mark.parametrize(("group", "number"), [(5, 5), ("5", 5), ("0x1f", 31), ("010", 8), ("0", 0)])
def test_group_numbers_in_every_base(group, number):
    assert DBIfaceGroup(group, 80).group == number


def test_group_names_come_from_the_iproute_table(tmp_path, monkeypatch):
    # given a table with a comment, a bad line and two groups
    table = tmp_path / "rt_ifgroup"
    table.write_text("# comment\n0\tdefault\nzz bad\n0x1f lan\n")
    monkeypatch.setattr(binds, "_GROUP_NAMES_FILE", str(table))
    # when a bind names one, then it has its number
    assert DBIfaceGroup("lan", 80).group == 31
    # and an unknown name is refused
    with pytest.raises(RuntimeError, match="Error resolving interface group name"):
        DBIfaceGroup("wan", 80)


def test_equal_binds_have_equal_keys():
    one = DBSockAddr(SockAddrInet("10.0.0.1", 80), ZD_PROTO_TCP)
    assert one == DBSockAddr(SockAddrInet("10.0.0.1", 80), ZD_PROTO_TCP)
    assert hash(one) == hash(DBSockAddr(SockAddrInet("10.0.0.1", 80), ZD_PROTO_TCP))
    assert one != DBSockAddr(SockAddrInet("10.0.0.1", 81), ZD_PROTO_TCP)
    assert one != DBSockAddr(SockAddrInet("10.0.0.1", 80), ZD_PROTO_UDP)
    assert DBIface("eth0", 80, ip="10.0.0.1") != DBIface("eth0", 80)
    assert DBIface("eth0", 80) == DBIface("eth0", 80)
    assert DBIfaceGroup(1, 80) != DBIface("1", 80)


def test_key_follows_a_change_of_the_protocol_and_stays_frozen():
    bind = DBSockAddr(SockAddrInet("10.0.0.1", 80))
    before = bind.key()
    bind.protocol = ZD_PROTO_TCP
    assert bind.key() != before
    assert before.protocol == ZD_PROTO_AUTO


@pytest.mark.parametrize(("number", "name"), [(0, "AUTO"), (1, "TCP"), (2, "UDP"), (3, "Unknown(3)"),
                                              (-1, "Unknown(-1)")])
def test_protocol_names(number, name):
    assert protocol_name(number) == name
