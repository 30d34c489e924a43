"""Addresses: what policies write, read and compare (addressing-helpers 1)."""

import copy
import errno
import ipaddress
import socket
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from test.support.logged import captured_log
from Zorp import SockAddr as module
from Zorp.language.caller import POLICY_LANGUAGE, PYTHON2, PYTHON3
from Zorp.SockAddr import (
    SockAddr,
    SockAddrInet,
    SockAddrInet6,
    SockAddrInetHostname,
    SockAddrInetRange,
    SockAddrUnix,
    from_sockaddr,
)


@pytest.fixture
def logged():
    with captured_log() as messages:
        yield messages


def in_policy(language, expression):
    """Evaluate an expression as a policy file of that language would."""
    names = dict(vars(module), __name__="policy")
    names[POLICY_LANGUAGE] = language
    return eval(compile(expression, "policy.py", "eval"), names)


# ------------------------------------------------------------------ text, numbers, attributes

@pytest.mark.parametrize(("address", "text"), [
    (SockAddrInet("1.2.3.4", 80), "AF_INET(1.2.3.4:80)"),
    (SockAddrInet6("2001:db8::1", 80), "AF_INET6(2001:db8::1:80)"),
    (SockAddrInet6("2001:DB8:0:0::1", 80), "AF_INET6(2001:db8::1:80)"),
    (SockAddrUnix("/a"), "AF_UNIX(/a)"),
    (SockAddrUnix(""), "AF_UNIX(anonymous)"),
    (SockAddrInetRange("1.2.3.4", 10, 20), "AF_INET(1.2.3.4:0)"),
])
def test_scenario_1_text(address, text):
    assert str(address) == repr(address) == address.format() == text


def test_scenario_2_integers_are_host_order_in_and_native_network_order_out():
    address = SockAddrInet(0x0A000001, 25)
    assert (address.ip_s, address.ip) == ("10.0.0.1", socket.htonl(0x0A000001))


def test_scenario_3_a_clone_is_independent():
    a = SockAddrInet("10.0.0.1", 25)
    b = a.clone(True)
    assert (b.port, a.port) == (0, 25)
    assert a.clone(False).equal(a) == 1
    b.ip_s = "10.0.0.9"
    assert a.ip_s == "10.0.0.1"
    with pytest.raises(TypeError):
        a.clone()


def test_scenario_4_address_and_port_can_be_assigned():
    a = SockAddrInet("10.0.0.1", 25)
    assert str(a) == "AF_INET(10.0.0.1:25)"
    a.port = 26
    a.ip_s = "10.0.0.2"
    assert str(a) == "AF_INET(10.0.0.2:26)"
    a.ip = socket.htonl(0x0A000003)
    assert (str(a), a.pack()) == ("AF_INET(10.0.0.3:26)", b"\x0a\0\0\x03")


@pytest.mark.parametrize(("make", "problem"), [
    (lambda: SockAddrInet("10.0.0.300", 1), "Invalid IP address"),
    (lambda: SockAddrInet("", 1), "Invalid IP address"),
    (lambda: SockAddrInet("1.2.3.4 and more", 1), "Invalid IP address"),
    (lambda: SockAddrInet("::1", 1), "Invalid IP address"),
    (lambda: SockAddrInet("www.example.com", 1), "Invalid IP address; .*; SockAddrInetHostname takes names of hosts"),
    (lambda: SockAddrInet6("zz", 1), "Invalid IP address"),
    (lambda: SockAddrInet6("1.2.3.4", 1), "Invalid IP address"),
    (lambda: SockAddrInet6("::1\0", 1), "Invalid IP address"),
    (lambda: SockAddrInet(None, 1), "Invalid parameter"),
    (lambda: SockAddrInet(2**32, 1), "Invalid parameter"),
    (lambda: SockAddrInet("1.2.3.4", "80"), "Invalid parameter"),
    (lambda: SockAddrInet("1.2.3.4"), "Invalid parameter"),
    (lambda: SockAddrInet6(1, 1), "Invalid parameter"),
    (lambda: SockAddrInetHostname(1, 1), "Invalid parameter"),
    (lambda: SockAddrInetRange("1.2.3.x", 1, 2), "Invalid IP address"),
    (lambda: SockAddrUnix("/" + "a" * 107), "Invalid socket path"),
    (lambda: SockAddrUnix("/a\0b"), "Invalid socket path"),
    (lambda: SockAddr("x/y"), "Invalid IP address"),
])
def test_scenario_5_what_is_no_address_is_refused(make, problem):
    with pytest.raises(ValueError, match=problem):
        make()


def test_scenario_6_a_host_name_is_resolved_once():
    assert str(SockAddrInetHostname("localhost", 80)) == "AF_INET(127.0.0.1:80)"
    assert str(SockAddrInetHostname("127.0.0.1", 80)) == "AF_INET(127.0.0.1:80)"
    with pytest.raises(ValueError, match="Invalid hostname"):
        SockAddrInetHostname("no such name..", 80)


def test_keywords_of_every_release():
    assert SockAddrInet(ip="1.2.3.4", port=1) == SockAddrInet(ip_addr="1.2.3.4", port=1)
    assert SockAddrInet6(ip="::1", port=1) == SockAddrInet6(ip_addr="::1", port=1)
    assert SockAddrUnix(path="/a") == SockAddrUnix(socket_path="/a")
    assert SockAddrInetHostname(hostname="localhost", port=1).port == 1
    assert SockAddrInetRange(ip="1.2.3.4", port_min=1, port_max=2).port == 0


@pytest.mark.parametrize(("arguments", "text"), [
    (("192.168.0.2", 80), "AF_INET(192.168.0.2:80)"),
    (("2001:db8::1", 80), "AF_INET6(2001:db8::1:80)"),
    (("/run/x",), "AF_UNIX(/run/x)"),
])
def test_the_base_makes_the_address_that_fits(arguments, text):
    assert str(SockAddr(*arguments)) == text


def test_the_base_carries_the_classes():
    assert str(SockAddr.SockAddrInet("1.2.3.4", 80)) == "AF_INET(1.2.3.4:80)"
    assert isinstance(SockAddrInetRange("1.2.3.4", 1, 2), SockAddr.SockAddrInet)


def test_families_and_types():
    inet, inet6, unix = SockAddrInet("1.2.3.4", 1), SockAddrInet6("::1", 1), SockAddrUnix("/a")
    assert [(a.family, a.type) for a in (inet, inet6, unix)] == [(2, "inet"), (10, "inet"), (1, "unix")]
    with pytest.raises(AttributeError):
        inet.family = 10


def test_objects_are_open_and_missing_attributes_say_so():
    address = SockAddrInet("1.2.3.4", 1)
    address.note = "mine"
    assert address.note == "mine"
    with pytest.raises(AttributeError, match="No such attribute"):
        assert address.nothing
    with pytest.raises(AttributeError, match="No such attribute"):
        assert SockAddrUnix("/a").pack


def test_ipv6_words_are_network_order_read_natively():
    address = SockAddrInet6("2001:db8::1", 80)
    assert address.ip == tuple(socket.htons(word) for word in (0x2001, 0xDB8, 0, 0, 0, 0, 0, 1))
    assert address.pack() == ipaddress.ip_address("2001:db8::1").packed
    address.ip = tuple(socket.htons(word) for word in (0xFE80, 0, 0, 0, 0, 0, 0, 2))
    assert address.ip_s == "fe80::2"
    with pytest.raises(ValueError, match="Invalid parameter"):
        address.ip = (1, 2, 3)


def test_equal_compares_values_of_addresses_only():
    a = SockAddrInet("1.2.3.4", 80)
    assert [a.equal(b) for b in (SockAddrInet("1.2.3.4", 80), SockAddrInet("1.2.3.4", 81),
                                 SockAddrInet6("::1", 80))] == [1, 0, 0]
    with pytest.raises(ValueError, match="Argument must be a SockAddr instance"):
        a.equal("1.2.3.4:80")


def test_equality_and_hash_follow_the_value():
    a, b = SockAddrInet("1.2.3.4", 80), SockAddrInet("1.2.3.4", 80)
    assert a == b
    assert len({a, b}) == 1
    b.port = 81
    assert a != b
    assert a != "AF_INET(1.2.3.4:80)"
    assert copy.deepcopy(a) == a
    assert SockAddrInetRange("1.2.3.4", 1, 2) != SockAddrInetRange("1.2.3.4", 1, 3)


# ------------------------------------------------------------------ ports and odd notations

def test_a_python_3_policy_gets_an_error_for_a_port_out_of_range():
    for port in (70000, -1):
        with pytest.raises(ValueError, match="Invalid parameter"):
            in_policy(PYTHON3, f"SockAddrInet('1.2.3.4', {port})")


def test_a_python_2_policy_gets_16_bits_of_the_port_and_a_line_with_the_place(logged):
    assert in_policy(PYTHON2, "SockAddrInet('1.2.3.4', 70000)").port == 70000 - 65536
    assert [(m.tag, m.level) for m in logged.find("Port number out of range")] == [("core.error", 1)]
    assert "place='policy.py:1'" in logged.texts()[0]


def test_notations_of_the_c_library_are_accepted_with_a_warning(logged):
    assert SockAddrInet("10.1", 1).ip_s == "10.0.0.1"
    assert SockAddrInet("0x7f.1", 1).ip_s == "127.0.0.1"
    assert SockAddrInet("010.0.0.1", 1).ip_s == "8.0.0.1"
    assert len(logged.find("Unusual notation of an IP address")) == 3
    assert SockAddrInet("10.0.0.1", 1)
    assert len(logged.messages) == 3


# ------------------------------------------------------------------ ranges

def three_free_ports():
    """Return the first of three neighbouring free ports."""
    for first in range(20000, 60000, 7):
        sockets = [socket.socket() for _ in range(3)]
        try:
            for offset, sock in enumerate(sockets):
                sock.bind(("127.0.0.1", first + offset))
        except OSError:
            continue
        finally:
            for sock in sockets:
                sock.close()
        return first
    raise AssertionError("no free ports")


def test_scenario_7_a_range_gives_each_of_its_ports_once(logged):
    # given a range of three ports
    first = three_free_ports()
    address = SockAddrInetRange("127.0.0.1", first, first + 2)
    sockets = [socket.socket() for _ in range(4)]
    try:
        # when three sockets are bound to it
        ports = []
        for sock in sockets[:3]:
            address.bind(sock)
            ports.append(address.port)
            assert sock.getsockname()[1] == address.port
        # then they got the three ports, in turn
        assert sorted(ports) == [first, first + 1, first + 2]
        assert (ports[1] - ports[0]) % 3 == (ports[2] - ports[1]) % 3 == 1
        assert logged.has("SockAddrInetRange, successfully bound; min_port='%d', max_port='%d', port='%d'",
                          (first, first + 2, ports[0]))
        # and a fourth one fails
        with pytest.raises(OSError, match="could not find free port") as failure:
            address.bind(sockets[3])
        assert failure.value.errno == errno.EADDRINUSE
        assert logged.has("SockAddrInetRange, could not find free port to bind; min_port='%d', max_port='%d'",
                          (first, first + 2))
    finally:
        for sock in sockets:
            sock.close()


def test_a_full_range_up_to_the_last_port_ends():
    with socket.socket() as taken, socket.socket() as sock:
        taken.bind(("127.0.0.1", 65535))
        with pytest.raises(OSError, match="could not find free port"):
            SockAddrInetRange("127.0.0.1", 65535, 65535).bind(sock)


def test_a_range_upside_down_is_refused_at_once(logged):
    with pytest.raises(ValueError, match="SockAddrInetRange, invalid range given; min_port='20', max_port='10'"):
        SockAddrInetRange("1.2.3.4", 20, 10)
    assert logged.find("SockAddrInetRange, invalid range given; min_port='20', max_port='10'")[0].level == 3


def test_a_bind_that_fails_for_another_reason_does_not_try_on():
    with socket.socket() as sock, pytest.raises(OSError, match="Cannot assign") as failure:
        SockAddrInetRange("192.0.2.1", 30000, 60000).bind(sock)
    assert failure.value.errno == errno.EADDRNOTAVAIL


# ------------------------------------------------------------------ from and to the kernel

def test_addresses_of_real_sockets():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        seen = from_sockaddr(client.family, client.getpeername())
        assert seen == SockAddrInet("127.0.0.1", server.getsockname()[1])
        assert seen.to_sockaddr() == client.getpeername()
    a, b = socket.socketpair()
    with a, b:
        assert str(from_sockaddr(a.family, a.getsockname())) == "AF_UNIX(anonymous)"
    assert from_sockaddr(socket.AF_UNIX, b"\0abstract").path == "\0abstract"
    with pytest.raises(ValueError, match="No address class"):
        from_sockaddr(socket.AF_PACKET, ("eth0",))


def test_the_interface_of_a_link_local_peer_is_kept():
    address = from_sockaddr(socket.AF_INET6, ("fe80::1%eth0", 80, 0, 7))
    assert (str(address), address.to_sockaddr()) == ("AF_INET6(fe80::1:80)", ("fe80::1", 80, 0, 7))
    assert address.clone(1).to_sockaddr() == ("fe80::1", 0, 0, 7)


@given(st.ip_addresses(v=4), st.integers(0, 65535))
def test_any_ipv4_address(address, port):
    made = from_sockaddr(socket.AF_INET, (str(address), port))
    assert made.ip_int == int(address)
    assert made.pack() == address.packed
    assert made.ip == int.from_bytes(address.packed, sys.byteorder) == module.inet_aton(str(address))
    assert module.inet_ntoa(made.ip) == str(address)
    assert made == SockAddrInet(str(address), port) == SockAddrInet(int(address), port)
    copied = SockAddrInet("0.0.0.0", port)
    copied.ip = made.ip
    assert copied == made


@given(st.ip_addresses(v=6), st.integers(0, 65535))
def test_any_ipv6_address(address, port):
    made = from_sockaddr(socket.AF_INET6, (address.compressed, port, 0, 0))
    assert made.ip_int == int(address)
    assert made.pack() == address.packed
    assert module.inet_pton(socket.AF_INET6, str(address)) == made.ip
    assert ipaddress.ip_address(module.inet_ntop(socket.AF_INET6, made.ip)) == address
    assert made == SockAddrInet6(address.exploded, port)


# ------------------------------------------------------------------ functions of old policies

def test_functions_of_old_policies():
    assert module.getHostByName("localhost") == ["127.0.0.1"]
    with pytest.raises(OSError, match="Error resolving hostname"):
        module.getHostByName("no such name..")
    assert module.htonl(1) == socket.htonl(1)
    with pytest.raises(ValueError, match="Invalid parameter"):
        module.inet_pton(socket.AF_INET, "1.2.3.4")
    assert module.inet_ntoa(-1) == "255.255.255.255"
