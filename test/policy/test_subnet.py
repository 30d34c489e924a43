"""Subnets and domains (addressing-helpers 2), held against the ipaddress module."""

import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from test.support.logged import captured_log
from Zorp import Subnet as module
from Zorp.Domain import AbstractDomain
from Zorp.SockAddr import SockAddrInet, SockAddrInet6, SockAddrUnix
from Zorp.Subnet import Inet6Domain, Inet6Subnet, InetDomain, InetSubnet, Subnet


@pytest.fixture
def logged(monkeypatch):
    monkeypatch.setattr(module, "_host_bits_reported", module._ReportedOnce())
    monkeypatch.setattr(InetDomain, "deprecated_warning", 1)
    with captured_log() as messages:
        yield messages


def inet(text):
    return SockAddrInet(text, 0)


def test_scenario_9_host_bits_stay_in_the_text_and_nowhere_else(logged):
    subnet = InetSubnet("192.168.0.1/24")
    assert (subnet.addr_str(), str(subnet)) == ("192.168.0.1", "192.168.0.1/24")
    assert subnet.broadcast() == inet("192.168.0.255").ip
    assert subnet.network() == subnet.addr_int() == inet("192.168.0.0").ip
    assert subnet.contains(inet("192.168.0.77"))
    assert not subnet.contains(inet("192.168.1.1"))
    assert subnet.contains(InetSubnet("192.168.0.128/25"))
    # and that is reported once
    InetSubnet("192.168.0.1/24")
    assert len(logged.find("Host bits of subnet ignored; subnet='192.168.0.1/24'")) == 1


def test_scenario_10_a_domain_without_text_is_everything():
    for domain in (InetDomain(), InetDomain("")):
        assert str(domain) == "0.0.0.0/0"
        assert domain.contains(inet("0.0.0.0"))
        assert domain.contains(inet("255.255.255.255"))
        assert not domain.contains(SockAddrInet6("::1", 0))
    assert Inet6Domain().contains(SockAddrInet6("::1", 0))


def test_scenario_11_order_is_inclusion():
    a, b = InetDomain("10.0.0.0/8"), InetDomain("10.1.0.0/16")
    assert a > b
    assert b < a
    assert a >= b
    assert a >= InetDomain("10.0.0.0/8")
    assert not a > InetDomain("10.0.0.0/8")
    assert a.contains(b)
    for compare in (lambda: a < InetDomain("11.0.0.0/8"), lambda: a >= InetDomain("11.0.0.0/8"),
                    lambda: a > Inet6Domain()):
        with pytest.raises(ValueError, match=r"10\.0\.0\.0/8 and .* are incomparable"):
            compare()
    with pytest.raises(TypeError):
        assert a < 5


def test_comparison_with_an_address_is_a_membership_test():
    net = InetDomain("10.0.0.0/8")
    assert inet("10.1.2.3") < net
    assert net > inet("10.1.2.3")
    assert not inet("11.1.2.3") < net
    assert not inet("10.1.2.3") > net
    assert inet("10.1.2.3") <= net
    assert not SockAddrInet6("::1", 0) < net


def test_scenario_12_host_parts_move_between_nets():
    host = InetSubnet("192.168.0.0/16").getHostAddr(inet("192.168.1.2"))
    moved = inet("0.0.0.0")
    moved.ip = InetSubnet("10.0.0.0/8").mapHostAddr(host)
    assert moved.ip_s == "10.0.1.2"
    # and a host part too long for the net is cut
    moved.ip = InetSubnet("10.0.0.0/24").mapHostAddr(host)
    assert moved.ip_s == "10.0.0.2"


def test_host_parts_of_ipv6():
    host = Inet6Subnet("2001:db8::/32").getHostAddr(SockAddrInet6("2001:db8:1::2", 0))
    assert host == ipaddress.ip_address("0:0:1::2").packed
    moved = SockAddrInet6("::", 0)
    moved.ip = Inet6Subnet("2001:db9::/32").mapHostAddr(host)
    assert moved.ip_s == "2001:db9:1::2"
    moved.ip = Inet6Subnet("2001:dba::/32").mapHostAddr(moved.ip)
    assert moved.ip_s == "2001:dba:1::2"


@pytest.mark.parametrize("text", [
    "10.0.0.0/33", "10.0.0.0/-1", "10.0.0.0/x", "10.0.0.0/", "10.0.0.0/255.0.0.0", "10.0.0.0/8/8", "www.example.com",
    "10.0.0/8", "10", "any", "", None, 5, "::/129", "::/ 8", "zz::", "::1%eth0", "10.0.0.0/٨", "10.0.0.0\0/8",
])
def test_what_is_no_subnet_is_refused(text):
    with pytest.raises(ValueError, match="Invalid subnet specification: value="):
        Subnet.create(text)


@pytest.mark.parametrize(("text", "kind"), [
    ("10.0.0.0/8", InetSubnet), ("10.0.0.1", InetSubnet), ("2001:db8::/32", Inet6Subnet),
    ("::ffff:1.2.3.4", Inet6Subnet), ("::ffff:1.2.3.4/128", Inet6Subnet),
])
def test_create_chooses_the_family(text, kind):
    assert type(Subnet.create(text)) is kind


def test_the_forms_of_both_generations():
    subnet = InetSubnet("10.1.2.3")
    assert (subnet.ip, subnet.mask, subnet.mask_bits) == (b"\x0a\x01\x02\x03", b"\xff" * 4, 32)
    assert (subnet.netmask_bits(), subnet.netmaskbits(), subnet.get_family()) == (32, 32, socket.AF_INET)
    domain = InetDomain("10.1.2.3/8")
    assert (domain.ip, domain.mask, domain.family) == (socket.htonl(0x0A000000), socket.htonl(0xFF000000), 2)
    assert (domain.netaddr(), domain.netmask()) == (domain.ip, domain.mask)
    assert (str(domain), domain.addr_str()) == ("10.0.0.0/8", "10.1.2.3")
    assert Inet6Domain("2001:db8::/32").ip == SockAddrInet6("2001:db8::", 0).ip
    assert isinstance(domain, AbstractDomain)
    assert (str(subnet.ip_range[0]), str(InetSubnet("10.0.0.0/8").ip_range[-1])) == ("10.1.2.3", "10.255.255.255")


def test_broadcast_of_everything_is_the_address_itself():
    assert InetSubnet("0.0.0.0/0").broadcast() == 0


def test_other_objects_are_not_contained():
    for other in (SockAddrUnix("/a"), "10.0.0.1", None, 0x0A000001):
        assert not InetSubnet("10.0.0.0/8").contains(other)


def test_the_old_name_is_reported_once(logged):
    InetDomain("10.0.0.0/8")
    InetDomain("10.0.0.0/8")
    assert [(m.tag, m.level) for m in logged.find("Use of InetDomain class is deprecated")] == [("core.debug", 3)]


def test_functions_on_packed_octets():
    assert module.packed_mask(b"\x0a\x01\x02\x03", b"\xff\xff\0\0") == b"\x0a\x01\0\0"
    assert module.packed_1operand(b"\xff\x00", lambda octet: ~octet) == b"\x00\xff"
    assert module.packed_2operand(b"\x01\x02", b"\x04\x04", lambda a, b: a | b) == b"\x05\x06"


# ------------------------------------------------------------------ against the standard library

def nets(version):
    width = 32 if version == 4 else 128
    return st.tuples(st.ip_addresses(v=version), st.integers(0, width)).map(
        lambda pair: ipaddress.ip_network((int(pair[0]), pair[1]), strict=False)
        if version == 4 else ipaddress.IPv6Network((int(pair[0]), pair[1]), strict=False))


def near(version):
    """Pairs that often lie inside each other: the second shares leading bits with the first."""
    width = 32 if version == 4 else 128
    network = ipaddress.IPv4Network if version == 4 else ipaddress.IPv6Network
    return st.tuples(nets(version), st.integers(0, width), st.integers(0, 2**width - 1)).map(
        lambda parts: (parts[0], network(
            (int(parts[0].network_address) ^ (parts[2] & int(parts[0].hostmask)), parts[1]), strict=False)))


PAIRS = st.one_of(near(4), near(6), st.tuples(nets(4), nets(4)), st.tuples(nets(6), nets(6)))


@given(PAIRS)
def test_inclusion_is_that_of_the_standard_library(pair):
    a, b = pair
    ours_a, ours_b = Subnet.create(str(a)), Subnet.create(str(b))
    assert bool(ours_a.contains(ours_b)) == b.subnet_of(a)
    assert (ours_a == ours_b) == (a == b)
    assert (hash(ours_a) == hash(ours_b)) or a != b
    if b.subnet_of(a) or a.subnet_of(b):
        assert (ours_a > ours_b) == (b.subnet_of(a) and a != b)
        assert (ours_a <= ours_b) == a.subnet_of(b)
    else:
        with pytest.raises(ValueError, match="incomparable"):
            assert ours_a > ours_b


@given(PAIRS)
def test_membership_is_that_of_the_standard_library(pair):
    net, other = pair
    ours = Subnet.create(str(net))
    for address in (other.network_address, other.broadcast_address):
        made = SockAddrInet(str(address), 1) if net.version == 4 else SockAddrInet6(str(address), 1)
        assert bool(ours.contains(made)) == (address in net)


@given(st.one_of(nets(4), nets(6)))
def test_numbers_are_those_of_the_standard_library(net):
    ours = Subnet.create(str(net))
    assert ipaddress.ip_network(str(ours)) == net
    assert (ours.network_int, ours.last_int) == (int(net.network_address), int(net.broadcast_address))
    assert (ours.addr_packed(), ours.netmask_packed()) == (net.network_address.packed, net.netmask.packed)
    assert (ours.ip_range.first, ours.ip_range.last) == (ours.network_int, ours.last_int)
    assert ours.ip_range[0] == net.network_address
    assert ours.ip_range[-1] == net.broadcast_address


@given(nets(4), st.ip_addresses(v=4), nets(4))
def test_a_host_part_survives_the_move_between_nets_of_one_size(net, address, other):
    size = net.prefixlen
    here, there = InetSubnet(f"{other.network_address}/{size}"), InetSubnet(f"{net.network_address}/{size}")
    moved = inet("0.0.0.0")
    moved.ip = there.mapHostAddr(here.getHostAddr(SockAddrInet(str(address), 0)))
    assert there.contains(moved)
    assert there.getHostAddr(moved) == here.getHostAddr(SockAddrInet(str(address), 0))
