"""Zorp.transport.connect against real sockets of the loopback network 127.0.0.0/8."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from test.support.deaf import silent_server
from test.support.unprivileged import run_unprivileged
from Zorp.transport import connect as connecting
from Zorp.transport.connect import (
    BindFailed,
    ConnectError,
    ConnectFailed,
    ConnectInterrupted,
    Connector,
    ConnectTimeout,
    MarkFailed,
    SelfConnection,
    SocketFailed,
    Source,
    exact,
    in_range,
    port_group,
    random_in_group,
    same_group,
)

STREAM, DATAGRAM = socket.SOCK_STREAM, socket.SOCK_DGRAM
FOREIGN = "203.0.113.7"              # an address that this host does not have
DEADLINE_S = 10


@pytest.fixture
def server():
    with listener("127.0.0.1") as sock:
        yield sock


@contextlib.contextmanager
def listener(host, port=0, family=socket.AF_INET, backlog=64):
    with socket.socket(family, STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(backlog)
        sock.settimeout(DEADLINE_S)
        yield sock


def connect(remote, *, source=None, kind=STREAM, **options):
    return Connector(socket.AF_INET, kind, remote, source=source, **options).run()


def from_address(host, ports=(0,), family=socket.AF_INET):
    return Source(family, (host, 0), ports)


def open_descriptors():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


# where it comes from

def test_without_source_the_kernel_chooses(server):
    # given a server, when we connect without a wish
    sock, local = connect(server.getsockname())
    # then the server sees the address that we were told, and the socket blocks and is not delayed
    peer, seen = server.accept()
    assert seen == local
    assert sock.gettimeout() is None
    assert os.get_blocking(sock.fileno())
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    sock.close(), peer.close()


def test_source_address_and_port_are_kept(server):
    sock, local = connect(server.getsockname(), source=from_address("127.0.0.9", exact(20123)))
    peer, seen = server.accept()
    assert seen == local == ("127.0.0.9", 20123)
    sock.close(), peer.close()


def test_foreign_source_leaves_with_that_address(server):
    # given the right to make transparent sockets, and an address of somebody else
    connector = Connector(socket.AF_INET, DATAGRAM, server.getsockname(), source=from_address(FOREIGN))
    # when we connect a datagram socket, which needs no answer
    sock, local = connector.run()
    # then it carries that address and a port of the kernel's choice
    assert local[0] == FOREIGN
    assert local[1] != 0
    sock.close()


def test_foreign_source_without_privilege_fails_and_nothing_arrives(server):
    # given a process that may not make transparent sockets
    def attempt():
        try:
            connect(server.getsockname(), source=from_address(FOREIGN))
        except BindFailed as problem:
            return problem.errno
        return 0
    # when it connects with the address of somebody else, then it fails for lack of permission
    assert run_unprivileged(attempt) == errno.EPERM
    # and the server never sees a connection
    server.settimeout(0)
    with pytest.raises(BlockingIOError):
        server.accept()


def test_own_source_without_privilege_works(server):
    def attempt():
        sock, local = connect(server.getsockname(), source=from_address("127.0.0.5", exact(25678)))
        sock.close()
        return local
    assert run_unprivileged(attempt) == ("127.0.0.5", 25678)


def test_privileged_port_without_privilege_fails(server):
    def attempt():
        with pytest.raises(BindFailed) as refused:
            connect(server.getsockname(), source=from_address("127.0.0.5", same_group(600)))
        return refused.value.errno
    if int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) > 600:
        assert run_unprivileged(attempt) == errno.EACCES
    else:
        sock, _ = connect(server.getsockname(), source=from_address("127.0.0.5", same_group(600)))
        sock.close()


def test_source_of_another_family_fails(server):
    with pytest.raises(BindFailed) as refused:
        connect(server.getsockname(), source=from_address("::1", family=socket.AF_INET6))
    assert refused.value.errno == errno.EAFNOSUPPORT


def test_one_source_address_serves_the_same_port_to_many_servers():
    # given two servers, and one local address with an exact port
    with listener("127.0.0.1") as first, listener("127.0.0.2") as second:
        # when both are connected to, then both see it: only the pair must be unique
        one, local_one = connect(first.getsockname(), source=from_address("127.0.0.9", exact(20222)))
        two, local_two = connect(second.getsockname(), source=from_address("127.0.0.9", exact(20222)))
        assert local_one == local_two == ("127.0.0.9", 20222)
        one.close(), two.close()


# ports

def test_port_groups_cover_every_port_once():
    assert [port_group(port) for port in (1, 511, 512, 1023, 1024, 65535)] == [
        (1, 511), (1, 511), (512, 1023), (512, 1023), (1024, 65535), (1024, 65535)]


def test_same_group_starts_with_the_wish_and_goes_around_once():
    ports = list(same_group(1020))
    assert ports[:5] == [1020, 1021, 1022, 1023, 512]
    assert sorted(ports) == list(range(512, 1024))


def test_random_ports_stay_in_the_group_and_end_with_every_port():
    ports = list(random_in_group(600))
    assert len(ports) == 512 // 8 + 512
    assert set(ports) == set(range(512, 1024))
    assert list(random_in_group(600)) != ports


@pytest.mark.parametrize("choice", [same_group, random_in_group, exact])
def test_no_wish_leaves_the_port_to_the_kernel(choice):
    assert list(choice(0)) == [0]


def test_range_is_tried_once_from_any_start():
    assert list(in_range(5, 9, start=8)) == [8, 9, 5, 6, 7]
    assert sorted(in_range(5, 9)) == [5, 6, 7, 8, 9]


def test_port_group_with_the_wanted_port_listened_on(server):
    """Scenario: the client came from port 600, and 600 is occupied for that address."""
    # given a listener on the port that we want
    with listener("127.0.0.9", 600):
        # when we connect with any port of the group
        sock, local = connect(server.getsockname(), source=from_address("127.0.0.9", same_group(600)))
    # then the next port of the group is used
    assert local == ("127.0.0.9", 601)
    sock.close()


def test_port_group_with_the_wanted_port_connected_to_the_same_server(server):
    """bind() lets sockets share the port; the collision shows in connect()."""
    source = from_address("127.0.0.9")
    first, _ = connect(server.getsockname(), source=Source(source.family, source.address, same_group(21000)))
    second, local = connect(server.getsockname(), source=Source(source.family, source.address, same_group(21000)))
    assert local == ("127.0.0.9", 21001)
    first.close(), second.close()


def test_exact_port_that_is_taken_fails(server):
    first, _ = connect(server.getsockname(), source=from_address("127.0.0.9", exact(21500)))
    with pytest.raises(ConnectFailed) as refused:
        connect(server.getsockname(), source=from_address("127.0.0.9", exact(21500)))
    assert refused.value.errno == errno.EADDRNOTAVAIL
    assert refused.value.at_once
    first.close()


def test_exact_port_that_is_listened_on_fails(server):
    with listener("127.0.0.9", 21501), pytest.raises(BindFailed) as refused:
        connect(server.getsockname(), source=from_address("127.0.0.9", exact(21501)))
    assert refused.value.errno == errno.EADDRINUSE


def test_random_ports_do_not_follow_the_wish(server):
    seen = set()
    for wish in range(50000, 50020):
        sock, local = connect(server.getsockname(), source=from_address("127.0.0.9", random_in_group(wish)))
        assert 1024 <= local[1] <= 65535
        seen.add(local[1] - wish)
        sock.close()
    assert len(seen) > 15


def test_range_without_free_port_fails(server):
    with listener("127.0.0.9", 22000), listener("127.0.0.9", 22001), pytest.raises(BindFailed) as refused:
        connect(server.getsockname(), source=from_address("127.0.0.9", in_range(22000, 22001)))
    assert refused.value.errno == errno.EADDRINUSE


def test_search_for_a_port_ends_at_the_deadline(server):
    # given a source whose ports never end and are all taken
    with listener("127.0.0.9") as other:
        ports = itertools.repeat(other.getsockname()[1])
        started = time.monotonic()
        # when we connect, then the deadline holds for the search too
        with pytest.raises(ConnectTimeout):
            connect(server.getsockname(), source=from_address("127.0.0.9", ports), timeout_ms=200)
    assert time.monotonic() - started < 10


def test_address_without_port_wish_is_not_bound_to_a_port_before_connect():
    """Two connections from one address to two servers may share a port: the pair decides."""
    with socket.socket(socket.AF_INET, STREAM) as sock:
        assert connecting._bind_port(sock, ("127.0.0.9", 0), 0, None) is None
        assert sock.getsockname() == ("127.0.0.9", 0)


# IPv6

def test_ipv6_source_and_traffic_class():
    with listener("::1", family=socket.AF_INET6) as server:
        connector = Connector(socket.AF_INET6, STREAM, server.getsockname(), tos=0x20,
                              source=Source(socket.AF_INET6, ("::1", 0, 0, 0), same_group(23000)))
        sock, local = connector.run()
        assert local[:2] == ("::1", 23000)
        assert sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS) == 0x20
        assert connector.option_failures == []
        sock.close()


def test_foreign_ipv6_source():
    connector = Connector(socket.AF_INET6, DATAGRAM, ("::1", 9, 0, 0),
                          source=Source(socket.AF_INET6, ("2001:db8::7", 0, 0, 0)))
    sock, local = connector.run()
    assert local[0] == "2001:db8::7"
    sock.close()


def test_mapped_ipv4_address_is_not_reached_through_an_ipv6_socket(server):
    # given an IPv4 server, when its address comes dressed as IPv6
    with pytest.raises(ConnectFailed):
        Connector(socket.AF_INET6, STREAM, ("::ffff:127.0.0.1", server.getsockname()[1], 0, 0)).run()
    # then nothing arrives
    server.settimeout(0)
    with pytest.raises(BlockingIOError):
        server.accept()


# options

def test_tos_and_mark_are_set(server):
    sock, _ = connect(server.getsockname(), tos=0x10, mark=0x40000000)
    assert sock.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) == 0x10
    assert sock.getsockopt(socket.SOL_SOCKET, connecting.SO_MARK) == 0x40000000
    sock.close()


def test_mark_without_privilege_fails_the_connect(server):
    def attempt():
        with pytest.raises(MarkFailed) as refused:
            connect(server.getsockname(), mark=1)
        return refused.value.errno
    assert run_unprivileged(attempt) == errno.EPERM


def test_tos_that_cannot_be_set_is_noted_and_ignored(server):
    # given a socket whose options fail
    connector = Connector(socket.AF_INET, STREAM, server.getsockname())
    connector._try_option("tos", server, socket.IPPROTO_IP, 9999, 1)
    # then the connection is made, and what failed can be told
    sock, _ = connector.run()
    assert [(failure.option, failure.error.errno) for failure in connector.option_failures] == [
        ("tos", errno.ENOPROTOOPT)]
    sock.close()


# how it fails

def test_refused():
    with listener("127.0.0.1") as gone:
        address = gone.getsockname()
    with pytest.raises(ConnectFailed) as refused:
        connect(address)
    assert refused.value.strerror == "Connection refused"


def test_timeout_has_the_resolution_of_milliseconds():
    with silent_server() as address:
        started = time.monotonic()
        with pytest.raises(ConnectTimeout) as expired:
            connect(address, timeout_ms=150)
        assert 0.14 < time.monotonic() - started < 10
    assert expired.value.strerror == "connection timed out"


def test_unroutable_family_fails_at_once():
    with pytest.raises(ConnectFailed) as refused:
        connect(("255.255.255.255", 1))
    assert refused.value.at_once


def test_unknown_family():
    with pytest.raises(SocketFailed):
        Connector(9999, STREAM, ("127.0.0.1", 1)).run()


def test_self_connection_is_refused():
    # given a port of the host that nobody listens on, and the wish to come from there
    with pytest.raises(SelfConnection):
        connect(("127.0.0.1", 24001), source=from_address("127.0.0.1", exact(24001)))


def test_failures_leave_no_descriptor(server):
    with listener("127.0.0.1") as gone:
        closed = gone.getsockname()
    before = open_descriptors()
    attempts = [
        lambda: connect(closed),
        lambda: connect(("127.0.0.1", 24002), source=from_address("127.0.0.1", exact(24002))),
        lambda: connect(server.getsockname(), source=from_address("::1", family=socket.AF_INET6)),
        lambda: Connector(socket.AF_UNIX, STREAM, "/nonexistent/socket").run(),
    ]
    for attempt in attempts:
        with pytest.raises(ConnectError):
            attempt()
    assert open_descriptors() == before


# stop requests

def test_abort_wakes_a_pending_connect():
    # given a connect that waits for a server that is silent
    with silent_server() as address:
        connector = Connector(socket.AF_INET, STREAM, address, timeout_ms=60_000)
        outcome = []
        thread = threading.Thread(target=lambda: outcome.append(caught(connector.run)))
        thread.start()
        wait_until(lambda: state_of(connector) == "SYN_SENT")
        # when somebody asks it to stop
        connector.abort()
        thread.join(DEADLINE_S)
    # then it ends at once
    assert not thread.is_alive()
    assert isinstance(outcome[0], ConnectInterrupted)


def test_abort_before_run():
    connector = Connector(socket.AF_INET, STREAM, ("127.0.0.1", 1))
    connector.abort()
    with pytest.raises(ConnectInterrupted):
        connector.run()


def test_abort_between_the_socket_and_connect(server):
    """The narrow place: there is a socket, but nothing that a shutdown could wake."""
    with silent_server() as address:
        connector = Connector(socket.AF_INET, STREAM, address, timeout_ms=60_000)
        connector._set_options = lambda sock: connector.abort()
        with pytest.raises(ConnectInterrupted):
            connector.run()


def test_abort_after_the_end_does_not_touch_the_connection(server):
    connector = Connector(socket.AF_INET, STREAM, server.getsockname())
    sock, _ = connector.run()
    connector.abort()
    peer, _ = server.accept()
    sock.sendall(b"x")
    assert peer.recv(1) == b"x"
    sock.close(), peer.close()


def caught(function):
    try:
        return function()
    except ConnectError as problem:
        return problem


def state_of(connector):
    """The TCP state of the socket of a connector that runs in another thread."""
    sock = connector._sock
    if sock is None:
        return None
    with contextlib.suppress(OSError):
        return {2: "SYN_SENT", 1: "ESTABLISHED"}.get(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0])
    return None


def wait_until(condition):
    limit = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.002)


# other kinds

def test_datagrams():
    with socket.socket(socket.AF_INET, DATAGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(DEADLINE_S)
        sock, local = connect(server.getsockname(), kind=DATAGRAM)
        sock.send(b"x")
        assert server.recvfrom(10) == (b"x", local)
        sock.close()


def test_unix_socket_with_a_local_path(tmp_path):
    # given a local server, and a stale socket where ours should be
    path, own = str(tmp_path / "server"), str(tmp_path / "own")
    with socket.socket(socket.AF_UNIX, STREAM) as server, socket.socket(socket.AF_UNIX, STREAM) as stale:
        server.bind(path)
        server.listen()
        stale.bind(own)
        # when we connect, then the stale one is replaced and the server sees our name
        sock, local = Connector(socket.AF_UNIX, STREAM, path, source=Source(socket.AF_UNIX, own)).run()
        assert local == own
        peer, seen = server.accept()
        assert seen == own
        sock.close(), peer.close()


def test_unix_local_path_that_is_a_file_stays(tmp_path):
    own = tmp_path / "own"
    own.write_text("precious")
    with pytest.raises(BindFailed):
        Connector(socket.AF_UNIX, STREAM, "/nowhere", source=Source(socket.AF_UNIX, str(own))).run()
    assert own.read_text() == "precious"


def test_unix_server_with_a_full_queue_times_out(tmp_path):
    path = str(tmp_path / "server")
    with socket.socket(socket.AF_UNIX, STREAM) as server, contextlib.ExitStack() as clients:
        server.bind(path)
        server.listen(0)
        for _ in range(4):
            client = clients.enter_context(socket.socket(socket.AF_UNIX, STREAM))
            client.setblocking(False)
            client.connect_ex(path)
        with pytest.raises(ConnectTimeout):
            Connector(socket.AF_UNIX, STREAM, path, timeout_ms=100).run()


def test_unix_path_that_is_too_long():
    with pytest.raises(ConnectError):
        Connector(socket.AF_UNIX, STREAM, "/" + "x" * 300).run()
    with pytest.raises(BindFailed):
        Connector(socket.AF_UNIX, STREAM, "/nowhere", source=Source(socket.AF_UNIX, "/" + "x" * 300)).run()
