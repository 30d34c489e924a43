"""The kernel's messages about connections: a vector, and bytes that are none."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from test.support.net import CLIENT, SERVER, SERVER6, net
from Zorp.netfilter.conntrack import Connection, Endpoints, connections, read_connection
from Zorp.netfilter.netlink import attributes, messages
from Zorp.netfilter.nflog import LoggedPacket, read_packet

__all__ = ["net"]


def attribute(kind, value):
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def direction(kind, source, source_port, destination, destination_port, number=6):
    addresses = attribute(1, source) + attribute(2, destination)
    protocol = attribute(1, bytes([number])) + attribute(2, struct.pack("!H", source_port)) + attribute(
        3, struct.pack("!H", destination_port))
    return attribute(kind | 0x8000, attribute(1 | 0x8000, addresses) + attribute(2 | 0x8000, protocol))


def counters(kind, packets, size):
    return attribute(kind | 0x8000, attribute(1, struct.pack("!Q", packets)) + attribute(2, struct.pack("!Q", size)))


BODY = (bytes([2, 0, 0, 0]) + direction(1, bytes([10, 1, 0, 2]), 1024, bytes([10, 2, 0, 2]), 80)
        + direction(2, bytes([10, 2, 0, 2]), 80, bytes([10, 2, 0, 1]), 1024) + attribute(8, b"\0\4\0\7")
        + attribute(12, b"\0\0\0\x2a") + counters(9, 3, 300) + counters(10, 4, 400))
MESSAGE = struct.pack("=IHHII", 16 + len(BODY), 0x102, 0, 0, 0) + BODY


def test_a_message_is_a_connection():
    (kind, message), = messages(MESSAGE)
    assert kind == 0x102
    assert read_connection(message) == Connection(
        number=42, family=2, protocol=6, original=Endpoints("10.1.0.2", 1024, "10.2.0.2", 80),
        reply=Endpoints("10.2.0.2", 80, "10.2.0.1", 1024), mark=0x40007, sent=(300, 3), received=(400, 4))


@pytest.mark.parametrize("number", [47, 132])
def test_a_protocol_other_than_tcp_and_udp_has_no_ports_in_the_log(number):
    # given a connection of SCTP, or of GRE, which has its keys in the place of ports
    body = bytes([2, 0, 0, 0]) + b"".join(
        direction(kind, bytes([10, 1, 0, 2]), 1024, bytes([10, 2, 0, 2]), 80, number) for kind in (1, 2))
    # then its ports are 0
    found = read_connection(struct.pack("=IHHII", 16 + len(body), 0x102, 0, 0, 0) + body)
    assert found.original == found.reply == Endpoints("10.1.0.2", 0, "10.2.0.2", 0)


@given(st.integers(0, len(MESSAGE)), st.binary(max_size=40))
def test_messages_cut_and_continued_with_anything_are_harmless(end, rest):
    data = MESSAGE[:end] + rest
    for _, message in messages(data):
        read_connection(message)
    assert len(list(attributes(data, 0))) <= len(data)


@given(st.binary(max_size=200))
def test_packets_of_anybody_are_harmless(payload):
    body = bytes(4) + attribute(10, b"zorp:7\0") + attribute(9, payload)
    packet = read_packet(struct.pack("=IHHII", 16 + len(body), 0x400, 0, 0, 0) + body)
    assert packet is None or (isinstance(packet, LoggedPacket) and packet.prefix == "zorp:7")


def test_the_list_of_the_kernel_is_filtered_by_mark(net):
    # given connections through the firewall, one of them marked
    net.firewall.run("iptables", "-t", "mangle", "-A", "PREROUTING", "-p", "tcp", "--dport", "81", "-j", "CONNMARK",
                     "--set-mark", "0x40009")
    net.firewall.run("ip6tables", "-t", "mangle", "-A", "PREROUTING", "-p", "tcp", "--dport", "81", "-j", "CONNMARK",
                     "--set-mark", "0x40008")
    open_sockets = []
    for address, port in ((SERVER, 80), (SERVER, 81), (SERVER6, 81)):
        open_sockets += [net.server.listen(address, port), net.client.connect(address, port)]
    # when those of a class are listed
    found = net.firewall.inside(lambda: connections(0x40000, 0xC0000))
    # then it is the marked ones, of both families
    assert {(one.original.destination, one.original.destination_port, one.mark) for one in found} == {
        (SERVER, 81, 0x40009), (SERVER6, 81, 0x40008)}
    assert {one.original.source for one in found if one.family == 2} == {CLIENT}
    for each in open_sockets:
        each.close()


@pytest.mark.parametrize("data", [b"", b"\0" * 16, struct.pack("=IHHII", 4_000_000, 1, 0, 0, 0)])
def test_what_is_no_message_ends_the_datagram(data):
    assert list(messages(data)) == []
