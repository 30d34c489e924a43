"""Connections of two sockets, how a peer ends one, and how it sees one end.

    reset(session.server)
    assert is_reset(session.client)
"""

from __future__ import annotations

import contextlib
import socket
import struct

_TCP_REPAIR = 19                     # linux/tcp.h


def tcp_pair():
    """Return two connected sockets: who connected, and who accepted."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = socket.create_connection(listener.getsockname())
        near, _ = listener.accept()
    return far, near


def receive_all(sock) -> bytes:
    """Return everything until the end of file; raises ConnectionResetError."""
    return b"".join(iter(lambda: sock.recv(65536), b""))


def whatever_comes(sock) -> bytes:
    """Return everything until the end of the connection, however that looks."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(65536):
            received += data
    return received


def is_reset(sock) -> bool:
    """Read to the end; True when that is a reset."""
    try:
        receive_all(sock)
    except ConnectionResetError:
        return True
    return False


def flood(sock) -> None:
    """Send until the connection takes nothing more for as long as the socket waits, or is gone."""
    with contextlib.suppress(OSError):
        while True:
            sock.sendall(bytes(65536))


def reset(sock) -> None:
    """Close as a host does that wants no more of this connection."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def vanish(sock) -> None:
    """Close without a word to the peer, as a host does that lost its power.  Needs CAP_NET_ADMIN."""
    sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
    sock.close()
