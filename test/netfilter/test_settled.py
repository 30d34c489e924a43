"""Forwarded connections when rules change, and the load dies, fails, or says what depends on the moment."""

from __future__ import annotations

import signal
import sys

import pytest

from test.support.net import SERVER, net, policy

__all__ = ["net"]
pytestmark = [pytest.mark.netns, pytest.mark.timeout(120)]

FORWARD = "PFService('fwd')\nRule(proto=6, dst_port={}, service='fwd')\n"
DIES = {"before connections are settled": ("setup_cli", "_settle_sessions", "os.kill(os.getpid(), 9)"),
        "before the state is stored": ("backend.Backend", "apply", "real(*arguments), os.kill(os.getpid(), 9)"),
        "because connections cannot be listed": ("sessions", "_forwarded", "open('/nowhere')")}


@pytest.fixture
def firewall(net):
    """The firewall, with one instance that is not started."""
    net.firewall.configure("nft")
    net.daemon = net.firewall.add_zorp(policy(FORWARD.format(80)))
    return net.firewall


def load_that_dies(firewall, point: str) -> int:
    """Run kzorp-setup load up to a point; return the exit status."""
    place, name, instead = DIES[point]
    program = (f"import os, sys\nfrom Zorp.netfilter import backend, sessions, setup_cli\nreal = {place}.{name}\n"
               f"{place}.{name} = lambda *arguments: ({instead})\nsys.exit(setup_cli.main())")
    return firewall.run(sys.executable, "-c", program, "--config-dir", str(firewall.directory), "load",
                        check=False).returncode


class Stream:
    """A connection from the client to the server."""

    def __init__(self, net, port: int) -> None:
        self._listening = net.server.listen(SERVER, port)
        self._client = net.client.connect(SERVER, port)
        self._server, _ = self._listening.accept()

    def passes(self) -> bool:
        """Return whether a byte of the client reaches the server."""
        try:
            self._client.sendall(b"x")
            self._server.settimeout(0.7)
            return self._server.recv(1) == b"x"
        except OSError:
            return False


@pytest.mark.parametrize("point", DIES)
def test_connections_of_a_load_that_dies_are_settled_by_the_next_one(net, firewall, point):
    # given a forwarded connection
    firewall.setup("load")
    stream = Stream(net, 80)
    assert stream.passes()
    # when a policy that permits it to nobody is loaded, and the load dies on its way
    net.daemon.write_policy(policy(FORWARD.format(81)))
    assert load_that_dies(firewall, point) in (-signal.SIGKILL, 1)
    assert stream.passes()
    # then the status tells
    status = firewall.setup("status", check=False)
    assert status.returncode == 1
    assert "in force\n" not in status.stdout
    # and the next load, to which the rules are in force already, ends the connection
    assert "unchanged" in (again := firewall.setup("load").stdout)
    assert "connections ended: 1" in again
    assert not stream.passes()
    assert firewall.setup("status").stdout == "in force\n"


def test_the_number_of_a_rule_whose_load_died_is_nobody_else_s(net, firewall):
    # given a load that died when the kernel had its rules, and a connection by its new one
    firewall.setup("load")
    net.daemon.write_policy(policy(FORWARD.format(81)))
    assert load_that_dies(firewall, "before the state is stored") == -signal.SIGKILL
    stream = Stream(net, 81)
    # when a third policy is loaded, with a rule for something else
    net.daemon.write_policy(policy(FORWARD.format(82)))
    firewall.setup("load")
    # then that rule has another number, and the connection is not its
    assert "index 3: forward intra" in firewall.setup("print").stdout
    assert not stream.passes()
