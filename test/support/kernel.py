"""What tests of packet rules in a real kernel share: both kinds of iptables, who gets through or which error.

    def test_something(net, backend):           # once with each of BACKENDS
        net.firewall.start_zorp(POLICY)
        assert is_silent(net.client, SERVER, 80)
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import time

import pytest

from test.support.net import Namespace

BACKENDS = ("nft", "legacy-restore")
SILENCE_S = 1.2                  # a second SYN has been sent by then
_ERROR_S = 10.0


@pytest.fixture(params=BACKENDS)
def backend(request, net):
    """Both kinds of iptables."""
    net.firewall.configure(request.param)
    return request.param


def is_silent(namespace: Namespace, address: str, port: int, **arguments) -> bool:
    """Return whether nobody answers a connect(), not even with an error."""
    try:
        namespace.connect(address, port, timeout_s=SILENCE_S, **arguments).close()
    except TimeoutError:
        return True
    return False


def errors_of_connect(namespace: Namespace, targets: list[tuple[str, int]],
                      silent: int = 0) -> dict[tuple[str, int], int | None]:
    """Connect to all targets at once; return the error that each connect() got, 0 for success, None for silence.

    So many of them are expected to be silent, over SILENCE_S; the others are waited for as long as need be:
    an error that meets a busy socket counts with the next SYN only, a second later.
    """
    found: dict[tuple[str, int], int | None] = dict.fromkeys(targets)
    with contextlib.ExitStack() as stack:
        poll, attempts, began_s = select.poll(), {}, time.monotonic()
        for target in targets:
            made = stack.enter_context(namespace.socket(target[0]))
            made.setblocking(False)
            found[target] = made.connect_ex(target)
            if found[target] == errno.EINPROGRESS:
                found[target] = None
                attempts[made.fileno()] = (made, target)
                poll.register(made, select.POLLOUT)
        while attempts:
            until_s = began_s + (SILENCE_S if len(attempts) <= silent else _ERROR_S)
            remaining_s = max(until_s - time.monotonic(), 0)
            if not (ready := poll.poll(remaining_s * 1_000)) and not remaining_s:
                break
            for descriptor, _ in ready:
                poll.unregister(descriptor)
                made, target = attempts.pop(descriptor)
                found[target] = made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return found


def echo(client: socket.socket, connection: socket.socket) -> None:
    """Check that both ends are connected with each other."""
    client.sendall(b"ping")
    assert connection.recv(4) == b"ping"
    connection.sendall(b"pong")
    assert client.recv(4) == b"pong"
