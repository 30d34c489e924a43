"""Zorp.transport.hostaddr: what belongs to this host, what to others."""

from __future__ import annotations

import socket

import pytest

from Zorp.transport.hostaddr import Delivery, delivery, is_for_one_remote_host, is_own_address, unmapped


def packed(text):
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


@pytest.mark.parametrize("text", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
def test_own(text):
    assert is_own_address(packed(text))


@pytest.mark.parametrize("text", ["203.0.113.7", "2001:db8::7"])
def test_not_own(text):
    assert not is_own_address(packed(text))


@pytest.mark.parametrize("text", [
    "0.0.0.0", "0.1.2.3", "127.0.0.1", "127.255.255.254", "224.0.0.1", "239.255.255.255", "255.255.255.255",
    "::", "::1", "ff02::1", "ff05::1:3", "::ffff:127.0.0.1", "::ffff:0.0.0.0", "::ffff:224.0.0.1",
])
def test_not_for_one_remote_host(text):
    assert not is_for_one_remote_host(packed(text))


@pytest.mark.parametrize("text", ["203.0.113.7", "198.51.100.1", "2001:db8::7", "::ffff:203.0.113.7"])
def test_for_one_remote_host(text):
    assert is_for_one_remote_host(packed(text))


def test_broadcast_of_loopback():
    assert delivery(packed("127.255.255.255")) in (Delivery.BROADCAST, Delivery.LOCAL)


def test_mapped_addresses_count_as_what_they_carry():
    assert unmapped(packed("::ffff:192.0.2.1")) == packed("192.0.2.1")
    assert unmapped(packed("2001:db8::1")) == packed("2001:db8::1")
    assert unmapped(packed("192.0.2.1")) == packed("192.0.2.1")
