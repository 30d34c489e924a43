"""What gets past a firewall: attempts of a client, and the packets that arrive at the server.

    with Capture(net.server) as capture:
        assert connected(net.client, [(SERVER, 80), (SERVER6, 80)], times=50) == []
        assert capture.arrived() == []

The kernel keeps what arrives until the test looks, so nothing is missed and nothing runs beside
the test.  Only TCP and UDP are told; neighbour discovery and the like are nobody's service.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import select
import socket
import struct
import time
from typing import NamedTuple

from test.support.net import Namespace

_EVERY_PROTOCOL, _ETH_P_IP, _ETH_P_IPV6 = 0x0003, 0x0800, 0x86DD
_SOL_PACKET, _PACKET_STATISTICS, _PACKET_OUTGOING = 263, 6, 4
_SO_RCVBUFFORCE, _BUFFER_BYTES = 33, 8 << 20
_SYN = 0x02
_WITH_PORTS = (socket.IPPROTO_TCP, socket.IPPROTO_UDP)


class Packet(NamedTuple):
    """A packet that arrived."""

    source: str
    destination: str
    port: int                        # it was for
    opens_or_speaks: bool            # False: TCP that neither begins a connection nor carries data


class Capture:
    """The packets that arrive at an interface; for `with`."""

    def __init__(self, namespace: Namespace, device: str = "s0") -> None:
        self._socket = namespace.inside(
            lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_EVERY_PROTOCOL)))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        self._socket.bind((device, _EVERY_PROTOCOL))
        self._socket.setblocking(False)

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *exc_info) -> None:
        self._socket.close()

    def arrived(self, *ports: int) -> list[Packet]:
        """Return what has come since the last call, for these ports or any."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                data, address = self._socket.recvfrom(65_536)
                packet = None if address[2] == _PACKET_OUTGOING else _packet(address[1], data)
                if packet is not None and (not ports or packet.port in ports):
                    found.append(packet)
        _, lost = struct.unpack("II", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        assert not lost, "the capture has lost packets"
        return found


def _packet(protocol: int, data: bytes) -> Packet | None:
    """Return what a packet says, None for other kinds than TCP and UDP."""
    if protocol == _ETH_P_IP and data[9] in _WITH_PORTS:
        source, destination, header, kind = data[12:16], data[16:20], 4 * (data[0] & 0xF), data[9]
        end = int.from_bytes(data[2:4], "big")
    elif protocol == _ETH_P_IPV6 and data[6] in _WITH_PORTS:
        source, destination, header, kind = data[8:24], data[24:40], 40, data[6]
        end = header + int.from_bytes(data[4:6], "big")
    else:
        return None
    payload = header + 4 * (data[header + 12] >> 4) if kind == socket.IPPROTO_TCP else header
    return Packet(str(ipaddress.ip_address(source)), str(ipaddress.ip_address(destination)),
                  int.from_bytes(data[header + 2:header + 4], "big"),
                  opens_or_speaks=payload < end or bool(data[header + 13] & _SYN))


def connected(client: Namespace, targets: list[tuple[str, int]], times: int = 1,
              within_s: float = 0.3) -> list[tuple[str, int]]:
    """Try to connect to every target so many times, all at once; return those that were reached, once each."""
    attempts = {}
    with contextlib.ExitStack() as stack:
        poll = select.poll()
        for target in targets * times:
            sock = stack.enter_context(client.socket(target[0]))
            sock.setblocking(False)
            if sock.connect_ex(target) == errno.EINPROGRESS:
                attempts[sock.fileno()] = (sock, target)
                poll.register(sock, select.POLLOUT)
        reached, deadline = set(), time.monotonic() + within_s
        while attempts:                              # who was reached in time is seen, however late we look
            remaining_s = max(deadline - time.monotonic(), 0)
            if not (ready := poll.poll(remaining_s * 1_000)) and not remaining_s:
                break
            for descriptor, _ in ready:
                poll.unregister(descriptor)
                sock, target = attempts.pop(descriptor)
                if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    reached.add(target)
    return sorted(reached)
