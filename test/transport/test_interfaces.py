"""Interfaces of the host, asked from the kernel; connections over loopback, changes in a network namespace."""

import socket
import subprocess
import sys

import pytest

from Zorp.transport.interfaces import Interfaces, incoming_interface, interfaces, remember_incoming_interface

LOOPBACK = (socket.AF_INET, 0x7F000001)
FAMILIES = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]


def accepted_pair(family, host, *, prepared):
    """A client socket and the accepted one, over a listener that was prepared or not."""
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        if prepared:
            remember_incoming_interface(listener)
        listener.bind((host, 0))
        listener.listen()
        listener.settimeout(5)
        client = socket.create_connection(listener.getsockname()[:2], timeout=5)
        accepted, _ = listener.accept()
    return client, accepted


@pytest.mark.parametrize(("family", "host"), FAMILIES)
def test_an_accepted_connection_knows_its_interface(family, host):
    client, accepted = accepted_pair(family, host, prepared=True)
    with client, accepted:
        assert incoming_interface(accepted) == "lo"


@pytest.mark.parametrize(("family", "host"), FAMILIES)
def test_a_listener_that_was_not_prepared_tells_nothing(family, host):
    client, accepted = accepted_pair(family, host, prepared=False)
    with client, accepted:
        assert incoming_interface(accepted) is None


def test_sockets_without_such_options_tell_nothing():
    here, there = socket.socketpair()
    with here, there:
        remember_incoming_interface(here)
        assert incoming_interface(here) is None


def test_loopback_has_its_addresses_and_the_default_group():
    assert LOOPBACK in interfaces.addresses("lo")
    assert interfaces.group("lo") == 0


def test_an_interface_that_is_not_there_has_no_group_and_no_address():
    assert interfaces.group("nosuch0") is None
    assert interfaces.addresses("nosuch0") == frozenset()


def test_a_snapshot_is_kept_while_nothing_changes():
    own = Interfaces()
    assert own.current() is own.current()


def test_a_host_that_cannot_be_asked_has_no_interfaces(monkeypatch):
    def refuse(*args):
        raise OSError("no netlink here")

    own = Interfaces()
    monkeypatch.setattr(socket, "socket", refuse)
    assert own.addresses("lo") == frozenset()
    assert own.group("lo") is None
    monkeypatch.undo()
    assert LOOPBACK in own.addresses("lo")


CHANGES = """
import socket
from pyroute2 import IPRoute
from Zorp.transport.interfaces import Interfaces

ten = (socket.AF_INET, 0x0A000001)
six = (socket.AF_INET6, 0x20010DB8 << 96 | 7)
own = Interfaces()
with IPRoute() as kernel:
    lo = kernel.link_lookup(ifname="lo")[0]
    kernel.link("set", index=lo, state="up")
    assert ten not in own.addresses("lo")
    kernel.addr("add", index=lo, address="10.0.0.1", prefixlen=32)
    assert ten in own.addresses("lo")
    kernel.addr("add", index=lo, address="2001:db8::7", prefixlen=128)
    assert own.addresses("lo") >= {ten, six}
    kernel.addr("del", index=lo, address="10.0.0.1", prefixlen=32)
    assert ten not in own.addresses("lo")
    kernel.link("set", index=lo, group=9)
    assert own.group("lo") == 9
    for last in range(1, 3000):                    # more events than the subscription can hold
        kernel.addr("add", index=lo, address=f"10.1.{last // 250}.{last % 250 + 1}", prefixlen=32)
    assert len(own.addresses("lo")) >= 2999
print("seen")
"""


def test_changes_are_seen_at_the_next_question():
    """Zones-rules 11, scenario 20: in a network namespace of its own, addresses and groups change."""
    done = subprocess.run(["unshare", "-rn", sys.executable, "-c", CHANGES], capture_output=True, text=True, timeout=50,
                          check=False)
    assert (done.stdout, done.returncode) == ("seen\n", 0), done.stderr
